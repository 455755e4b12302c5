//! Rule 2: every statement binds the partition key. Each registered statement is explained, and run, over three years of partitions;
//! neither its plan nor its locks may name a leaf outside the months that it binds.

use std::collections::BTreeSet;

use bytes::BytesMut;
use chrono::{DateTime, NaiveDate, Utc};
use opsmantik::domain::id::SiteId;
use opsmantik::domain::month::Month;
use opsmantik::store::columns::Unreadable;
use opsmantik::store::rows::{Record, RowWriter, Rows};
use opsmantik::store::statement::{Months, STATEMENTS, Statement};
use serde_json::{Value, json};
use tokio_postgres::types::{IsNull, ToSql, Type, to_sql_checked};
use uuid::Uuid;

use crate::support::database::{Database, database};

const FIRST: &str = "2024-01-01";
const MONTHS: i32 = 36;

fn month(n: i32) -> Month {
    FIRST.parse::<Month>().expect("a month").plus(n)
}

/// A value for each parameter: months by position, text and numbers that satisfy the tables' checks.
pub fn sample(statement: &Statement, site: SiteId) -> (Vec<Box<dyn ToSql + Sync + Send>>, BTreeSet<Month>) {
    let mut next = 17;
    let mut months = BTreeSet::new();
    let mut values: Vec<Box<dyn ToSql + Sync + Send>> = Vec::new();
    for kind in statement.params {
        let day: NaiveDate = month(next).first_day();
        let instant: DateTime<Utc> = month(18).start();
        values.push(match *kind {
            Type::DATE => {
                months.insert(month(next));
                next += 1;
                Box::new(day)
            }
            Type::DATE_ARRAY => {
                months.insert(month(next));
                Box::new(vec![day])
            }
            Type::BOOL => Box::new(true),
            Type::UUID => Box::new(site.as_uuid()),
            Type::UUID_ARRAY => Box::new(vec![site.as_uuid()]),
            // Reads as a number, too: what is cast is cast when the statement is planned.
            Type::TEXT => Box::new("1"),
            Type::TEXT_ARRAY => Box::new(vec!["Direct-to-Ads"]),
            Type::TIMESTAMPTZ => Box::new(instant),
            Type::TIMESTAMPTZ_ARRAY => Box::new(vec![instant]),
            Type::BYTEA_ARRAY => Box::new(vec![vec![7u8; 32]]),
            Type::BYTEA => Box::new(vec![7u8; 32]),
            Type::INT2_ARRAY => Box::new(vec![1i16]),
            Type::INT4 => Box::new(1i32),
            Type::INT4_ARRAY => Box::new(vec![1i32]),
            Type::INT8 => Box::new(1i64),
            Type::INT8_ARRAY => Box::new(vec![1i64]),
            Type::FLOAT8_ARRAY => Box::new(vec![1f64]),
            Type::JSONB_ARRAY => Box::new(vec![json!([])]),
            ref other => panic!("{}: teach this test a value of type {other}", statement.name),
        });
    }
    if let Some(rows) = statement.rows {
        months.insert(month(next));
        values.push(Box::new(OneRow { kinds: (rows.columns)(), site, month: month(next) }));
    }
    (values, months)
}

/// A row of a site in a month, as the parameter of a statement that takes rows.
#[derive(Debug)]
struct OneRow {
    kinds: &'static [(&'static str, Type)],
    site: SiteId,
    month: Month,
}

impl Record for OneRow {
    fn put(&self, row: &mut RowWriter<'_>) -> Result<(), Unreadable> {
        for (name, kind) in self.kinds {
            match *kind {
                Type::DATE => row.put(&self.month.first_day()),
                Type::UUID => row.put(&self.site.as_uuid()),
                Type::TEXT => row.put(&"Direct-to-Ads"),
                Type::TIMESTAMPTZ => row.put(&self.month.start()),
                Type::INT2 => row.put(&1i16),
                Type::INT4 => row.put(&1i32),
                Type::INT8 => row.put(&1i64),
                Type::FLOAT8 => row.put(&1f64),
                Type::JSONB => row.put(&json!([])),
                ref other => panic!("{name}: teach this test a column of type {other}"),
            }?;
        }
        Ok(())
    }
}

impl ToSql for OneRow {
    fn to_sql(&self, kind: &Type, out: &mut BytesMut) -> Result<IsNull, Unreadable> {
        Rows(std::slice::from_ref(self)).to_sql(kind, out)
    }

    fn accepts(kind: &Type) -> bool {
        <Rows<'_, Self> as ToSql>::accepts(kind)
    }

    to_sql_checked!();
}

/// The types of a statement's parameters in this database.
async fn types(database: &Database, statement: &Statement) -> Vec<Type> {
    let mut types = statement.params.to_vec();
    if let Some(rows) = statement.rows {
        let row = database.admin.query_one(&rows.question(), &[]).await.expect("the type is there");
        types.push(rows.array(row.get(0), row.get(1)));
    }
    types
}

/// The leaves that a plan names.
fn leaves_of(plan: &Value, found: &mut BTreeSet<String>) {
    match plan {
        Value::Object(node) => {
            if let Some(name) = node.get("Relation Name").and_then(Value::as_str).filter(|name| is_leaf(name)) {
                found.insert(name.to_owned());
            }
            node.values().for_each(|value| leaves_of(value, found));
        }
        Value::Array(items) => items.iter().for_each(|item| leaves_of(item, found)),
        _ => {}
    }
}

fn is_leaf(name: &str) -> bool {
    ["sessions_2", "events_2"].iter().any(|front| name.starts_with(front))
}

/// How a statement is run: planned with all its values, or as it is kept ready, with the months written into it and nothing else known.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Run {
    AsItCame,
    Kept,
}

async fn touched(
    database: &mut Database,
    statement: &Statement,
    site: SiteId,
    run: Run,
) -> (BTreeSet<String>, BTreeSet<Month>) {
    let (values, months) = sample(statement, site);
    let types = types(database, statement).await;
    let typed: Vec<(&(dyn ToSql + Sync), Type)> =
        values.iter().map(|value| &**value as &(dyn ToSql + Sync)).zip(types).collect();
    let params: Vec<&(dyn ToSql + Sync)> = typed.iter().map(|(value, _)| *value).collect();
    let sql = (statement.sql)();
    let tx = database.admin.transaction().await.expect("a transaction");
    tx.batch_execute("SET CONSTRAINTS ALL DEFERRED").await.expect("deferred");
    let mut leaves = BTreeSet::new();
    match (run, statement.months) {
        (Run::Kept, Months::None) => {}
        // Its locks tell where it was.
        (Run::Kept, _) => {
            tx.batch_execute("SET LOCAL plan_cache_mode = force_generic_plan").await.expect("a setting");
            let sql = statement.with_months(&statement.months_of(&params).expect("its months are days"));
            let kept = tx.prepare_typed(&sql, statement.params).await;
            let kept = kept.unwrap_or_else(|error| panic!("{} cannot be prepared: {error:?}", statement.name));
            let ran = tx.query(&kept, &params).await;
            ran.unwrap_or_else(|error| panic!("{} cannot be run: {error:?}", statement.name));
        }
        (Run::AsItCame, months) => {
            let options = match months {
                Months::None => "VERBOSE, FORMAT JSON",
                _ => "ANALYZE, VERBOSE, FORMAT JSON",
            };
            let rows = tx.query_typed(&format!("EXPLAIN ({options}) {sql}"), &typed).await;
            let rows = rows.unwrap_or_else(|error| panic!("{} cannot be explained: {error:?}", statement.name));
            leaves_of(&rows[0].get::<_, Value>(0), &mut leaves);
        }
    }
    // A plan of INSERT does not name the leaf it routes to; its locks do. Foreign keys are checked here, too.
    let _ = tx.batch_execute("SET CONSTRAINTS ALL IMMEDIATE").await;
    let locked = tx
        .query(
            "SELECT DISTINCT c.relname::text FROM pg_locks l JOIN pg_class c ON c.oid = l.relation \
             WHERE l.pid = pg_backend_pid() AND c.relkind = 'r' AND l.locktype = 'relation'",
            &[],
        )
        .await
        .unwrap_or_default();
    leaves.extend(locked.iter().map(|row| row.get::<_, String>(0)).filter(|name| is_leaf(name)));
    tx.rollback().await.expect("nothing stays");
    (leaves, months)
}

#[tokio::test]
async fn every_statement_stays_inside_the_months_that_it_binds() {
    let mut database = database().await;
    for n in 0..MONTHS {
        database.store.ensure_month(month(n)).await.expect("a month");
    }
    let site = database.site("plans").await.id;
    // The rows that the samples address, so that joins have something to find.
    let uuid: Uuid = site.as_uuid();
    for n in 16..20 {
        database
            .admin
            .execute(
                "INSERT INTO sessions (site_id, created_month, id, created_at, last_seen_at, event_count, entry_page, \
                 attribution, traffic_source, traffic_medium, lead_score, fingerprint) \
                 VALUES ($1, $2, $1, $3, $3, 1, '/', 'Organic/Referral', 'Direct', 'direct', 0, 'Direct-to-Ads')",
                &[&uuid, &month(n).first_day(), &month(n).start()],
            )
            .await
            .expect("a session");
    }

    assert!(STATEMENTS.len() >= 15, "the registry is linked in: {}", STATEMENTS.len());
    let mut faults = Vec::new();
    let mut partitioned = 0;
    for (statement, run) in STATEMENTS.iter().flat_map(|statement| [(statement, Run::AsItCame), (statement, Run::Kept)])
    {
        let (leaves, months) = touched(&mut database, statement, site, run).await;
        let allowed: BTreeSet<String> = match statement.months {
            Months::None => BTreeSet::new(),
            Months::Between(..) => {
                let (first, last) = (months.first().copied(), months.last().copied());
                let (Some(first), Some(last)) = (first, last) else { panic!("{} binds no month", statement.name) };
                (0..MONTHS).map(month).filter(|m| (first..=last).contains(m)).flat_map(leaves_named).collect()
            }
            Months::In(_) | Months::Of(_) | Months::Rows => months.iter().copied().flat_map(leaves_named).collect(),
        };
        if !matches!(statement.months, Months::None) {
            partitioned += 1;
            if leaves.is_empty() {
                faults.push(format!("{} ({run:?}) touches no leaf at all: the test shows nothing", statement.name));
            }
        }
        for stray in leaves.difference(&allowed) {
            faults.push(format!("{} ({run:?}) touches {stray}, outside of {months:?}", statement.name));
        }
        let names_a_table = ["public.sessions", "public.events"].iter().any(|t| (statement.sql)().contains(t));
        if names_a_table == matches!(statement.months, Months::None) {
            faults.push(format!("{}: sessions and events are named if and only if months are bound", statement.name));
        }
    }
    assert!(partitioned >= 8, "only {partitioned} statements on partitions were seen");
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

fn leaves_named(month: Month) -> Vec<String> {
    let suffix = month.first_day().format("%Y_%m");
    vec![format!("sessions_{suffix}"), format!("events_{suffix}")]
}

#[test]
fn no_sql_runs_outside_the_store() {
    let mut strays = Vec::new();
    let mut folders = vec![std::path::PathBuf::from("src")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).expect("the crate's sources").flatten() {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let text = std::fs::read_to_string(&path).unwrap_or_default();
            let runs_sql =
                [".query_typed(", ".query_raw(", ".batch_execute(", ".simple_query(", ".query_one(", ".execute("];
            let own = ["transaction.rs", "direct.rs", "ready.rs", "rows.rs", "migrate.rs", "retention.rs"]
                .map(|file| format!("src/store/{file}"));
            let allowed = own.iter().any(|own| path.ends_with(own));
            if !allowed
                && path.extension().is_some_and(|e| e == "rs")
                && runs_sql.iter().any(|call| text.contains(call))
            {
                strays.push(path);
            }
        }
    }
    assert!(strays.is_empty(), "SQL is run in {strays:?}; statements belong to src/store");
}
