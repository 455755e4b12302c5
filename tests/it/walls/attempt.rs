//! One actor at one table: every verb is tried, and its outcome compared with the rule. Rows are compared, not only errors: what an attempt
//! shows, how many rows it says it reached, and what the superuser then finds changed.

use std::collections::BTreeMap;

use tokio_postgres::error::SqlState;
use tokio_postgres::{SimpleQueryMessage, Transaction};
use uuid::Uuid;

use super::rule::{self, Columns, May};
use super::world::{A, ALL, Actor, B, Table, World, snapshot};

/// What became of a statement.
#[derive(Debug)]
enum Outcome {
    /// 42501.
    Refused,
    /// A constraint was in the way: the rights were not.
    Violated,
    Done {
        /// The first column of each row that it showed.
        shown: Vec<String>,
        /// How many rows it reached.
        count: usize,
        /// Whose rows are other ones now.
        changed: Vec<(String, Option<Uuid>)>,
    },
}

/// An actor's transaction on a world, and what was found.
pub struct Visit<'v> {
    pub tx: &'v Transaction<'v>,
    pub world: &'v World,
    pub before: &'v BTreeMap<String, Option<Uuid>>,
    pub actor: &'v Actor,
    pub attempts: usize,
    pub reached: usize,
    pub faults: Vec<String>,
}

impl Visit<'_> {
    /// Runs a statement as if those before had not been.
    async fn attempt(&mut self, sql: &str, look: bool) -> Outcome {
        self.attempts += 1;
        match self.tx.simple_query(&format!("ROLLBACK TO attempt; {sql}")).await {
            Ok(messages) => {
                let mut shown = Vec::new();
                let mut count = 0;
                for message in messages {
                    match message {
                        SimpleQueryMessage::Row(row) => shown.push(row.get(0).unwrap_or_default().to_owned()),
                        SimpleQueryMessage::CommandComplete(rows) => count = usize::try_from(rows).expect("not many"),
                        _ => {}
                    }
                }
                shown.sort();
                let changed = if look && count > 0 { self.changed().await } else { Vec::new() };
                Outcome::Done { shown, count, changed }
            }
            Err(error) => match error.code() {
                Some(&SqlState::INSUFFICIENT_PRIVILEGE) => Outcome::Refused,
                Some(code) if code.code().starts_with("23") => Outcome::Violated,
                _ => panic!("{}: {sql}: {error:?}", self.actor.name),
            },
        }
    }

    /// What the superuser finds changed at this moment.
    async fn changed(&self) -> Vec<(String, Option<Uuid>)> {
        self.tx.batch_execute("SET LOCAL ROLE NONE").await.expect("the superuser again");
        let after = snapshot(self.tx.client(), &self.world.tables).await;
        let gone = self.before.iter().filter(|(row, _)| !after.contains_key(*row));
        let new = after.iter().filter(|(row, _)| !self.before.contains_key(*row));
        gone.chain(new).map(|(row, site)| (row.clone(), *site)).collect()
    }

    fn fault(&mut self, sql: &str, may: May, outcome: &Outcome) {
        self.faults.push(format!("{}: {sql}\n  may: {may:?}\n  was: {outcome:?}", self.actor.name));
    }

    /// The attempt reaches `expected` rows of the sites of `may`, shows `rows` of them, and changes nobody else's.
    async fn expect(&mut self, sql: &str, may: May, count: usize, rows: Option<&[String]>, look: bool) {
        let outcome = self.attempt(sql, look).await;
        let as_ruled = match (&outcome, may) {
            (Outcome::Refused, May::Not) => true,
            // Whoever may do everything still keeps to the foreign keys.
            (Outcome::Violated, May::Of(_)) => self.actor.bypasses,
            (Outcome::Done { shown, count: reached, changed }, May::Of(sites)) => {
                let within = |site: &Option<Uuid>| sites == ALL || site.is_some_and(|site| sites.contains(&site));
                *reached == count
                    && rows.is_none_or(|rows| rows == shown)
                    && changed.iter().all(|(_, site)| within(site))
                    && (!look || changed.is_empty() == (count == 0))
            }
            _ => false,
        };
        if let Outcome::Done { count, .. } = outcome {
            self.reached += count;
        }
        if !as_ruled {
            self.fault(sql, may, &outcome);
        }
    }

    /// Every verb at one table.
    pub async fn visit(&mut self, table: &Table) {
        self.tx.batch_execute("SAVEPOINT attempt").await.expect("from here on");
        self.reads(table).await;
        self.writes(table).await;
        self.adds_and_removes(table).await;
        self.expect(&format!("TRUNCATE {}", table.name), May::Not, 0, None, false).await;
        self.expect(&format!("TRUNCATE {} CASCADE", table.name), May::Not, 0, None, false).await;
        self.tx.batch_execute("ROLLBACK TO attempt; RELEASE attempt").await.expect("as if it had not been");
    }

    async fn reads(&mut self, table: &Table) {
        let (columns, may) = rule::reads(self.actor, table);
        let whole = if table.columns.iter().all(|column| columns.has(column)) { may } else { May::Not };
        let rows = table.rows_of(sites(may));
        let all = format!("SELECT to_jsonb(t)::text FROM {} t", table.name);
        self.expect(&all, whole, rows.len(), Some(&rows), false).await;
        if whole != may {
            for column in &table.columns {
                let may = if columns.has(column) { may } else { May::Not };
                self.expect(&format!("SELECT {column} FROM {}", table.name), may, rows.len(), None, false).await;
            }
        }
    }

    async fn writes(&mut self, table: &Table) {
        let (name, site) = (&table.name, table.site_column());
        let (columns, may) = rule::writes(self.actor, table);
        let (readable, _) = rule::reads(self.actor, table);
        let count = table.rows_of(sites(may)).len();
        let of = |column: &str| if columns.has(column) { may } else { May::Not };

        // A row lock needs the right to change something.
        let locks = if matches!(columns, Columns::None) { May::Not } else { may };
        self.expect(&format!("SELECT 1 FROM {name} FOR UPDATE"), locks, count, None, false).await;

        // Each column, by a change that changes nothing. One leaf stands for the others, but for the keys.
        let keys = ["site_id", "created_month", "session_month", "id"];
        let one_leaf = !table.is_leaf() || table.month == "2026-03-01";
        for column in table.columns.iter().filter(|column| one_leaf || keys.contains(&column.as_str())) {
            let sql = format!("UPDATE {name} SET {column} = {column}");
            self.expect(&sql, of(column), count, None, false).await;
        }
        // What RETURNING shows is what may be read of what was reached.
        let first = table.columns.iter().find(|column| columns.has(column)).unwrap_or(&table.columns[0]);
        let whole = table.columns.iter().all(|column| readable.has(column));
        let returning = format!("UPDATE {name} AS t SET {first} = {first} RETURNING to_jsonb(t)::text");
        let may_return = if whole { of(first) } else { May::Not };
        let rows = table.rows_of(sites(may));
        self.expect(&returning, may_return, count, Some(&rows), false).await;

        // Changes that change something.
        for (column, value) in changes(&table.kind) {
            let sql = format!("UPDATE {name} SET {column} = {value}");
            self.expect(&sql, of(column), count, None, true).await;
        }
        if table.columns.iter().any(|column| column == site) {
            for (from, to) in [(A, B), (B, A)] {
                let count = if sites(may).contains(&from) { table.rows_of(&[from]).len() } else { 0 };
                let moved = format!("UPDATE {name} SET {site} = '{to}' WHERE {site} = '{from}'");
                self.expect(&moved, of(site), count, None, true).await;
            }
        }
    }

    async fn adds_and_removes(&mut self, table: &Table) {
        let may = rule::adds(self.actor, table);
        for site in [A, B] {
            let Some(row) = new_row(table, site) else { continue };
            let here = if sites(may).contains(&site) { may } else { May::Not };
            self.expect(&format!("INSERT INTO {} {row}", table.name), here, 1, None, true).await;
        }
        let may = rule::removes(self.actor, table);
        let rows = table.rows_of(sites(may));
        self.expect(&format!("DELETE FROM {}", table.name), may, rows.len(), None, true).await;
        for site in [A, B] {
            let count = if sites(may).contains(&site) { table.rows_of(&[site]).len() } else { 0 };
            let sql = format!("DELETE FROM {} WHERE {} = '{site}'", table.name, table.site_column());
            self.expect(&sql, may, count, None, true).await;
        }
        let (readable, _) = rule::reads(self.actor, table);
        let whole = table.columns.iter().all(|column| readable.has(column));
        let returning = format!("DELETE FROM {} AS t RETURNING to_jsonb(t)::text", table.name);
        self.expect(&returning, if whole { may } else { May::Not }, rows.len(), Some(&rows), true).await;
    }
}

fn sites(may: May) -> &'static [Uuid] {
    match may {
        May::Not => &[],
        May::Of(sites) => sites,
    }
}

/// Values that differ from those of every row.
fn changes(kind: &str) -> &'static [(&'static str, &'static str)] {
    match kind {
        "public.sites" => &[
            ("name", "'another'"),
            ("domain", "'another.example'"),
            ("origins", "'{https://another.example}'"),
            ("region", "'TR'"),
            ("user_id", "'c0000000-0000-4000-8000-00000000000a'"),
        ],
        "public.site_members" => {
            &[("created_at", "'2020-01-01'"), ("user_id", "gen_random_uuid()"), ("role", "'owner'")]
        }
        "public.sessions" => &[("lead_score", "77"), ("id", "gen_random_uuid()")],
        "public.events" => &[("url", "'/another'"), ("id", "gen_random_uuid()")],
        "public.calls" => &[("review", "'JUNK'"), ("recording_ref", "'another'"), ("id", "gen_random_uuid()")],
        "public.dead_letters" => &[("tries", "77"), ("replayed_at", "now()"), ("payload", "'another'")],
        "public.api_tokens" => &[("last_used_at", "now()"), ("revoked_at", "now()"), ("scopes", "'{calls:write}'")],
        "opsmantik.call_rematches" => &[("call_id", "gen_random_uuid()")],
        "opsmantik.late_followers" => &[("until", "'2020-01-01'"), ("noted_at", "'2020-01-01'")],
        "opsmantik.vanished" => &[("cause", "'attach'")],
        "opsmantik.attached" => &[("link", "'another'")],
        "opsmantik.schema_history" => &[("name", "'another'")],
        other => panic!("teach this test what to change in {other}"),
    }
}

/// A row that the table takes from whoever may add one for this site.
fn new_row(table: &Table, site: Uuid) -> Option<String> {
    let month = &table.month;
    Some(match table.kind.as_str() {
        "public.sites" => {
            format!("(public_id, name, domain, user_id) VALUES ('new', 'New', 'new.example', '{site}')")
        }
        "public.site_members" => {
            format!("(site_id, user_id, role) VALUES ('{site}', 'c0000000-0000-4000-8000-00000000000a', 'owner')")
        }
        "public.sessions" => format!(
            "(site_id, created_month, id, created_at, last_seen_at, event_count, entry_page, attribution, traffic_source, \
             traffic_medium, lead_score) VALUES ('{site}', '{month}', gen_random_uuid(), '{month}', '{month}', 1, '/new', \
             'Organic/Referral', 'Direct', 'direct', 0)"
        ),
        "public.events" => format!(
            "(site_id, session_month, id, session_id, created_at, occurred_at, url, event_category, event_action, lead_score) \
             VALUES ('{site}', '{month}', gen_random_uuid(), md5('s{month}1')::uuid, '{month}', '{month}', '/new', 'c', 'a', 0)"
        ),
        "public.calls" => format!(
            "(site_id, provider, provider_call_id, channel, direction, dialled_number, started_at) \
             VALUES ('{site}', 'p', 'new', 'PHONE', 'INBOUND', '+12025550123', now())"
        ),
        "public.dead_letters" => format!(
            "(site_id, source, reason, detail, payload, received_at) VALUES ('{site}', 'sync', 'r', 'd', 'new', now())"
        ),
        "public.api_tokens" => {
            format!("(site_id, token_hash, scopes) VALUES ('{site}', sha256('new'), '{{calls:read}}')")
        }
        "opsmantik.call_rematches" => {
            let letter = if site == A { 'a' } else { 'b' };
            format!("(site_id, call_id) VALUES ('{site}', md5('{letter}2')::uuid)")
        }
        "opsmantik.late_followers" => {
            format!(
                "(site_id, fingerprint, after, until, month, since, since_id) \
             VALUES ('{site}', 'new', now(), now(), '2026-03-01', now(), '{site}')"
            )
        }
        "opsmantik.vanished" => {
            format!("(tab, month, site_id, xid, cause) VALUES ('calls', '-infinity', '{site}', '2', 'delete')")
        }
        "opsmantik.attached" | "opsmantik.schema_history" => return None,
        other => panic!("teach this test a row of {other}"),
    })
}
