//! The rows that the tests of the feed begin with, and how new ones look: each another one, by a hash of its id.

use tokio_postgres::{Client, Error};
use uuid::Uuid;

use super::work::{SITES, Work};

/// Visits that all writers write, half of them of each site.
pub const SHARED: u8 = 20;

pub fn shared_visit(n: u8) -> Uuid {
    Uuid::from_u128(0x8000_0000_0000_0001 + u128::from(n))
}

/// The two sites, and the visits that all writers write.
pub async fn prepare(client: &Client, work: &Work) {
    // The test's statements name rows by their ids alone, as a hand at psql does.
    let indexes = "CREATE INDEX ON events (id); CREATE INDEX ON events (session_id); CREATE INDEX ON sessions (id)";
    client.batch_execute(indexes).await.expect("new indexes");
    for (site, name) in SITES.iter().zip(["alice", "bob"]) {
        let insert =
            "INSERT INTO sites (id, public_id, name, domain, region) VALUES ($1, $2, $2, $2 || '.example', 'US')";
        client.execute(insert, &[site, &name]).await.expect("a new site");
    }
    let shared: Vec<Uuid> = (0..SHARED).map(shared_visit).collect();
    for (at, half) in shared.chunks(usize::from(SHARED / 2)).enumerate() {
        insert_visits(client, SITES[at], work, 1, half).await.expect("new visits");
    }
}

/// More of one site than any server keeps in its memory: rows of some 50 KB, written again and again.
pub async fn flood(client: &Client, work: &Work) {
    let insert = "INSERT INTO events (site_id, session_month, id, session_id, created_at, occurred_at, url, event_category, event_action, lead_score, \
        metadata) SELECT $1, $2, ('ffee0000-0000-0000-0000-' || lpad(to_hex(n), 12, '0'))::uuid, $3, now(), now(), '/', 'system', 'flood', 0, \
        jsonb_build_object('long', (SELECT string_agg(md5(n || '-' || m), '') FROM generate_series(1, 1500) m)) FROM generate_series(1, 400) n";
    let visit = shared_visit(SHARED - 1);
    let mut changes = client.execute(insert, &[&SITES[1], &work.months[1], &visit]).await.expect("new events");
    for again in 1..=2 {
        let update = format!(
            "UPDATE events SET metadata = metadata || '{{\"again\": {again}}}' WHERE session_id = $1 AND event_action = 'flood'"
        );
        changes += client.execute(&update, &[&visit]).await.expect("changed events");
    }
    work.add(changes);
}

/// Inserts so many events of one visit of a site, the next after those that were; how many.
pub async fn write_plainly(client: &Client, work: &Work, site: Uuid, after: u64, count: u64) -> u64 {
    let ids: Vec<Uuid> = (after + 1..=after + count).map(|n| Uuid::from_u128((0xee << 120) | u128::from(n))).collect();
    let visit = vec![shared_visit(SHARED - 1); ids.len()];
    client.execute(INSERT_EVENTS, &[&site, &work.months[1], &ids, &visit]).await.expect("new events")
}

pub async fn insert_visits(client: &Client, site: Uuid, work: &Work, month: usize, ids: &[Uuid]) -> Result<u64, Error> {
    client.execute(INSERT_VISITS, &[&site, &work.months[month], &ids]).await
}

/// Each row another one: with and without what may be absent, and with a text that does not fit into a page now and then.
const INSERT_VISITS: &str = "INSERT INTO sessions (site_id, created_month, id, created_at, last_seen_at, event_count, fingerprint, entry_page, \
    exit_page, referrer, gclid, click_ids, attribution, traffic_source, traffic_medium, utm_source, utm_campaign, matchtype, ads_network, signals, \
    lead_score, device_type, browser, city, country, timezone, ip_truncated, language, duration_sec, scroll_pct, cta_hovers, active_sec) \
    SELECT $1, $2, id, $2::date::timestamp AT TIME ZONE 'UTC' + h * interval '1.000123 s', $2::date::timestamp AT TIME ZONE 'UTC' + h * interval '2 s', 1 + h % 9, \
        CASE WHEN h % 2 = 0 THEN 'fp-' || h END, 'https://shop.example/' || h || CASE WHEN h % 40 = 0 THEN \
        (SELECT string_agg(md5(h::text || n), '') FROM generate_series(1, 300) n) ELSE '' END, CASE WHEN h % 3 = 0 THEN '/out' END, \
        CASE WHEN h % 5 = 0 THEN 'https://www.google.com/' END, CASE WHEN h % 4 = 0 THEN 'g-' || h END, \
        CASE WHEN h % 6 = 0 THEN '{\"fbclid\": \"F\", \"msclkid\": \"M\"}'::jsonb ELSE '{}' END, \
        CASE WHEN h % 4 = 0 THEN 'Direct-to-Ads' ELSE 'Organic/Referral' END, 'Google Ads', 'cpc', CASE WHEN h % 3 = 1 THEN 'news' END, \
        CASE WHEN h % 3 = 1 THEN 'Ağustos' END, CASE WHEN h % 7 = 0 THEN 'e' END, CASE WHEN h % 7 = 0 THEN 'g' END, \
        (ARRAY[0, 1, 2, 3, 4, 12, 14, 16, 31])[1 + h % 9], (ARRAY[0, 50, 10, 60, 10, 30, 40, 15, 100])[1 + h % 9], \
        CASE WHEN h % 2 = 1 THEN 'mobile' END, 'Chrome', CASE WHEN h % 2 = 1 THEN 'Bursa' END, 'TR', 'Europe/Istanbul', \
        CASE WHEN h % 3 = 2 THEN '192.0.2.0' END, 'tr-TR', h % 300, CASE WHEN h % 3 = 0 THEN h % 101 END, h % 3, NULLIF(h % 50, 0) \
    FROM (SELECT id, abs(hashtext(id::text)::bigint) % 100000 AS h FROM unnest($3::uuid[]) AS id) AS t";

pub const INSERT_EVENTS: &str = "INSERT INTO events (site_id, session_month, id, session_id, created_at, occurred_at, received_at, url, referrer, \
    event_category, event_action, event_label, event_value, signals, lead_score, metadata) \
    SELECT $1, $2, id, session, $2::date::timestamp AT TIME ZONE 'UTC' + h * interval '1.000321 s', now(), CASE WHEN h % 10 = 0 THEN now() END, \
        'https://shop.example/?p=' || h, CASE WHEN h % 5 = 0 THEN 'https://a.example/' END, 'interaction', 'view', \
        CASE WHEN h % 3 = 0 THEN 'label ' || h END, CASE WHEN h % 4 = 0 THEN h / 8.0 END, \
        (ARRAY[0, 1, 2, 3, 4, 12, 14, 16, 31])[1 + h % 9], (ARRAY[0, 50, 10, 60, 10, 30, 40, 15, 100])[1 + h % 9], \
        CASE WHEN h % 50 = 0 THEN jsonb_build_object('long', (SELECT string_agg(md5(h::text || n), '') FROM generate_series(1, 200) n)) \
             WHEN h % 2 = 0 THEN jsonb_build_object('n', h, 'deep', jsonb_build_array(true, NULL, h::text, jsonb_build_object('x', 1.5))) \
             ELSE '{}' END \
    FROM (SELECT id, session, abs(hashtext(id::text)::bigint) % 100000 AS h FROM unnest($3::uuid[], $4::uuid[]) AS u (id, session)) AS t";

pub const INSERT_CALLS: &str = "INSERT INTO calls (id, site_id, provider, provider_call_id, channel, direction, dialled_number, caller_hmac, \
    caller_last_digits, started_at, duration_sec, status, recording_ref, fingerprint, click_id_kind, click_id, created_at) \
    SELECT id, $1, 'sql', id::text, CASE WHEN h % 5 = 0 THEN 'WHATSAPP' ELSE 'PHONE' END, CASE WHEN h % 7 = 0 THEN 'OUTBOUND' ELSE 'INBOUND' END, \
        '+1202555' || lpad((h % 10000)::text, 4, '0'), CASE WHEN h % 2 = 0 THEN sha256(h::text::bytea) END, CASE WHEN h % 2 = 0 THEN '87' END, \
        TIMESTAMPTZ '2026-03-01 00:00:00Z' + h * interval '1.5 s', CASE WHEN h % 3 = 0 THEN h % 600 END, \
        (ARRAY['RINGING', NULL, 'COMPLETED', 'NO_ANSWER'])[1 + h % 4], CASE WHEN h % 9 = 0 THEN 'rec-' || h END, \
        CASE WHEN h % 8 = 0 THEN 'fp-' || h END, CASE WHEN h % 6 = 0 THEN 'gclid' END, CASE WHEN h % 6 = 0 THEN 'g-' || h END, now() \
    FROM (SELECT id, abs(hashtext(id::text)::bigint) % 100000 AS h FROM unnest($2::uuid[]) AS id) AS t";
