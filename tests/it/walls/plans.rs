//! Walls that slow nobody down: under the policies a tenant's page of a month is read from one partition by an index, over 36 months and 1,000
//! sites, whether the statement names the site or leaves it to the policy.

use serde_json::Value;

use super::world::Actor;
use crate::support::database::database;

/// 36 months, and in one of them enough of each site that reading all of it would be cheaper only by mistake. Site 7 is a big one; the agency
/// is a member of 50. Foreign keys are not what is tested.
const FILL: &str = "
    DO $$ BEGIN FOR n IN 0..35 LOOP PERFORM opsmantik.ensure_month((DATE '2024-01-01' + make_interval(months => n))::date); END LOOP; END $$;
    INSERT INTO sites (id, public_id, user_id, name, domain)
    SELECT md5('site ' || n)::uuid, 'site' || n, md5('owner ' || n)::uuid, 'S', 's' || n || '.example' FROM generate_series(1, 1000) n;
    INSERT INTO site_members (site_id, user_id, role) SELECT md5('site ' || n)::uuid, md5('agency')::uuid, 'viewer' FROM generate_series(1, 50) n;
    SET session_replication_role = replica;
    INSERT INTO events (site_id, session_month, id, session_id, created_at, occurred_at, url, event_category, event_action, lead_score)
    SELECT md5('site ' || s)::uuid, m.first, gen_random_uuid(), md5(s || ' ' || e / 10)::uuid, m.first + e * interval '1 minute', m.first, '/', 'c', 'a', 0
    FROM generate_series(0, 35) n CROSS JOIN LATERAL (SELECT (DATE '2024-01-01' + make_interval(months => n))::date) AS m (first)
    CROSS JOIN generate_series(1, 1000) s CROSS JOIN LATERAL generate_series(1, CASE WHEN n <> 30 THEN 1 WHEN s = 7 THEN 10000 ELSE 50 END) e;
    INSERT INTO sessions (site_id, created_month, id, created_at, last_seen_at, event_count, entry_page, attribution, traffic_source, traffic_medium, lead_score)
    SELECT site_id, session_month, session_id, min(created_at), max(created_at), count(*), '/', 'Organic/Referral', 'Direct', 'direct', count(*) % 100
    FROM events GROUP BY 1, 2, 3;
    RESET session_replication_role;
    ANALYZE events, sessions, sites, site_members;
";

const MONTH: &str = "2026-07-01";

/// What a plan did with relations: the names and kinds of its scans, the conditions of its index scans, and the rows that these read.
#[derive(Debug, Default)]
struct Read {
    relations: Vec<String>,
    scans: Vec<String>,
    conditions: Vec<String>,
    rows: i64,
    sorts: bool,
}

impl Read {
    fn of(plan: &Value, read: &mut Self) {
        match plan {
            Value::Object(node) => {
                let text = |key: &str| node.get(key).and_then(Value::as_str).map(str::to_owned);
                let kind = text("Node Type").unwrap_or_default();
                read.relations.extend(text("Relation Name"));
                read.conditions.extend(text("Index Cond"));
                read.sorts |= kind.contains("Sort");
                if kind.contains("Scan") {
                    let number = |key: &str| node.get(key).and_then(Value::as_i64).unwrap_or_default();
                    read.rows = read.rows.max(number("Actual Rows") + number("Rows Removed by Filter"));
                    read.scans.push(kind);
                }
                node.values().for_each(|value| Self::of(value, read));
            }
            Value::Array(items) => items.iter().for_each(|item| Self::of(item, read)),
            _ => {}
        }
    }
}

#[tokio::test]
async fn a_page_of_a_month_is_read_from_one_partition_by_an_index() {
    let mut database = database().await;
    database.admin.batch_execute(FILL).await.expect("three years of a thousand sites");
    let ids = "SELECT md5('owner 7')::uuid AS owner, md5('owner 8')::uuid AS small, md5('agency')::uuid AS agency, md5('site 7')::uuid AS site, \
        md5('site 8')::uuid AS small_site, md5('7 200')::uuid AS session";
    let ids = database.rows(ids).await.remove(0);
    let id = |name: &str| ids[name].as_str().and_then(|id| id.parse::<uuid::Uuid>().ok()).expect("a UUID");
    let readers = [
        (Actor::person("owner of a big site", id("owner")), id("site"), 10_000),
        (Actor::person("owner of a small site", id("small")), id("small_site"), 50),
        (Actor::person("member of 50 sites", id("agency")), id("site"), 10_000 + 49 * 50),
        (
            Actor::of("opsmantik_tenant", "of a big site").with("opsmantik.site_id", &id("site").to_string()),
            id("site"),
            10_000,
        ),
    ];
    let session = id("session");
    for (reader, site, all) in &readers {
        // What is asked, which rows it may read at most, and whether it has to come sorted out of the index. A thousand sessions are
        // sorted as soon: what is read is the site's own.
        let asked = [
            (
                "events",
                format!("site_id = '{site}' AND session_month = '{MONTH}' ORDER BY created_at DESC LIMIT 50"),
                50,
                true,
            ),
            (
                "events",
                format!(
                    "site_id = '{site}' AND session_month = '{MONTH}' AND session_id = '{session}' ORDER BY created_at DESC LIMIT 50"
                ),
                50,
                false,
            ),
            ("events", format!("session_month = '{MONTH}' ORDER BY created_at DESC LIMIT 50"), *all, false),
            ("events_2026_07", format!("site_id = '{site}' ORDER BY created_at DESC LIMIT 50"), 50, true),
            ("events_2026_07", format!("site_id = '{site}' AND session_id = '{session}'"), 50, true),
            ("events_2026_07", "true ORDER BY created_at DESC LIMIT 50".to_owned(), *all, false),
            (
                "sessions",
                format!("site_id = '{site}' AND created_month = '{MONTH}' ORDER BY lead_score DESC, id LIMIT 50"),
                *all,
                false,
            ),
            ("sessions", format!("created_month = '{MONTH}' LIMIT 50"), *all, false),
            ("sessions_2026_07", format!("site_id = '{site}' AND id = '{session}'"), 1, true),
        ];
        for (table, page, most, in_order) in asked {
            let sql = format!("SELECT * FROM {table} WHERE {page}");
            let tx = database.admin.transaction().await.expect("a transaction");
            tx.batch_execute(&reader.opening()).await.expect("the superuser may be anybody");
            let rows = tx.query(&format!("EXPLAIN (ANALYZE, FORMAT JSON) {sql}"), &[]).await.expect("explained");
            let plan: Value = rows[0].get(0);
            tx.rollback().await.expect("nothing stays");
            let mut read = Read::default();
            Read::of(&plan, &mut read);
            let told = format!("{}: {sql}\n{read:?}\n{plan:#}", reader.name);
            let leaf = format!("{}_2026_07", table.trim_end_matches("_2026_07"));
            assert!(
                !read.relations.is_empty() && read.relations.iter().all(|relation| *relation == leaf),
                "one partition: {told}"
            );
            assert!(!read.scans.iter().any(|scan| scan == "Seq Scan"), "an index: {told}");
            assert!(
                !read.conditions.is_empty() && read.conditions.iter().all(|condition| condition.contains("site_id")),
                "by site: {told}"
            );
            assert!(read.rows <= most, "no more than is needed: {told}");
            assert!(!(in_order && read.sorts), "in order: {told}");
        }
    }
}
