//! Two years that have been: a database with months of traffic in it, for what growth costs and for calls that look for their visits.
//!
//! Some traffic is stored by the server itself. Its rows are then multiplied inside PostgreSQL over the months, whole, as they are, with other
//! ids, times and visitors, so that nothing here has to know what a row consists of. A visitor of the past comes back twice in the months that
//! follow, by an ad or without one. Triggers and foreign keys rest meanwhile; the rows keep to them.

use std::sync::Arc;

use anyhow::{Context, ensure};
use chrono::{DateTime, Datelike, Months, NaiveDate, Utc};
use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use tokio_postgres::Client;

use crate::ground::{Database, Ground, SITES};
use crate::grpc_load;
use crate::server::Server;
use crate::workload::Workload;

/// Copies in which one visitor is the same, in consecutive months.
const SAME: usize = 3;
/// Months within which an ad counts for who returns.
const RECENT: usize = 3;
/// Loaders at once.
const LOADERS: usize = 2;

/// What there is of the past.
#[derive(Debug, Clone)]
pub struct Past {
    pub months: usize,
    pub copies: usize,
    /// Events of which the copies are made.
    pub template: usize,
    pub sessions: usize,
    /// Site and fingerprint of the template's visits.
    visitors: Vec<(usize, String)>,
}

impl Past {
    /// Five million events, or few.
    pub fn of(short: bool) -> Self {
        let (copies, template) = if short { (24, 2_000) } else { (99, 51_000) };
        Self { months: 24, copies, template, sessions: 0, visitors: Vec::new() }
    }

    /// Somebody who was here; every other one not long ago.
    pub fn visitor(&self, rng: &mut StdRng) -> Option<(usize, String)> {
        let (site, fingerprint) = self.visitors.choose(rng)?;
        let groups = self.copies.div_ceil(SAME);
        let recent = rng.random_bool(0.5);
        let mut group = rng.random_range(0..groups);
        while recent && group * SAME % self.months >= RECENT {
            group = (group + 1) % groups;
        }
        Some((*site, format!("{fingerprint}-{group}")))
    }

    /// Fills an empty database. `say` hears how far it is.
    pub async fn lay(
        mut self,
        ground: &Ground,
        database: &Database,
        say: &(dyn Fn(String) + Sync),
    ) -> anyhow::Result<Self> {
        self.store_template(ground, database).await?;
        let admin = database.admin().await?;
        let this_month = Utc::now().date_naive().with_day(1).context("every month has a first day")?;
        for month in 0..self.months {
            let month = this_month.checked_sub_months(Months::new(u32::try_from(month)?)).context("a month")?;
            admin.execute("SELECT opsmantik.ensure_month($1)", &[&month]).await?;
        }
        admin.batch_execute(TEMPLATES).await?;
        let copying = [copying(&admin, "sessions").await?, copying(&admin, "events").await?];
        let this = Arc::new(self);
        let tasks: Vec<_> = (0..LOADERS)
            .map(|loader| {
                let (this, copying, database) = (this.clone(), copying.clone(), database.clone());
                tokio::spawn(async move {
                    let admin = database.admin().await?;
                    admin.batch_execute("SET session_replication_role = replica; SET synchronous_commit = off").await?;
                    for copy in (loader..this.copies).step_by(LOADERS) {
                        this.copy(&admin, &copying, this_month, copy).await?;
                    }
                    anyhow::Ok(())
                })
            })
            .collect();
        let mut tasks = std::pin::pin!(futures::future::try_join_all(tasks));
        let all = (this.copies + 1) * this.template;
        let ended = loop {
            tokio::select! {
                ended = &mut tasks => break ended?,
                () = tokio::time::sleep(std::time::Duration::from_secs(2)) => {
                    say(format!("the past: about {} of {all} events", loaded(&admin).await?));
                }
            }
        };
        ended.into_iter().collect::<anyhow::Result<Vec<()>>>()?;
        say("the past: vacuum, analyze".to_owned());
        admin.batch_execute("DROP SCHEMA bench CASCADE").await?;
        admin.batch_execute("VACUUM (ANALYZE) public.sessions").await?;
        admin.batch_execute("VACUUM (ANALYZE) public.events").await?;
        let events = database.count("events").await?;
        ensure!(events == all, "the past has {events} events and should have {all}");
        database.checkpoint().await?;
        let mut past = Arc::unwrap_or_clone(this);
        past.sessions = database.count("sessions").await?;
        Ok(past)
    }

    /// By the server, through its own door.
    async fn store_template(&mut self, ground: &Ground, database: &Database) -> anyhow::Result<()> {
        let server = Server::start(ground, database).await?;
        let beats = Workload::new(77, SITES).take(self.template);
        grpc_load::ingest(server.grpc, &ground.token, &grpc_load::batches(&beats), 8).await?;
        server.stop().await?;
        self.visitors = beats.into_iter().map(|beat| (beat.site, beat.fingerprint)).collect();
        self.visitors.sort_unstable();
        self.visitors.dedup();
        Ok(())
    }

    async fn copy(
        &self,
        admin: &Client,
        copying: &[String; 2],
        this_month: NaiveDate,
        copy: usize,
    ) -> anyhow::Result<()> {
        let back = Months::new(u32::try_from(copy % self.months)?);
        let month = this_month.checked_sub_months(back).context("a month")?;
        let begins: DateTime<Utc> = month.and_time(chrono::NaiveTime::MIN).and_utc();
        // Of the current month only what has passed.
        let days = (Utc::now() - begins).num_minutes().clamp(1, 27 * 24 * 60);
        #[allow(clippy::cast_precision_loss)]
        let minutes = days as f64;
        let (copy, group) = (copy.to_string(), (copy / SAME).to_string());
        for statement in copying {
            admin.execute(statement, &[&month, &begins, &minutes, &copy, &group]).await?;
        }
        Ok(())
    }
}

/// The server's own rows, apart.
const TEMPLATES: &str = "CREATE SCHEMA bench;
    CREATE TABLE bench.sessions AS SELECT *, created_at AS began_at FROM public.sessions;
    CREATE TABLE bench.events AS SELECT e.*, s.began_at FROM public.events e JOIN bench.sessions s
        ON (s.site_id, s.created_month, s.id) = (e.site_id, e.session_month, e.session_id);
    ANALYZE bench.sessions; ANALYZE bench.events";

/// The statement that copies the rows of a table: `$1` the month, `$2` its begin, `$3` minutes over which they are spread, `$4` the copy, `$5` the
/// visitors' group. Columns with a meaning here are made new; times move along with their session; all others stay as they are.
async fn copying(admin: &Client, table: &str) -> anyhow::Result<String> {
    let session = if table == "sessions" { "id" } else { "session_id" };
    let spread = format!("(('x' || left(md5(t.{session}::text || $4), 6))::bit(24)::int / 16777216.0)");
    let moved = format!("$2::timestamptz + {spread} * $3::float8 * interval '1 minute'");
    let columns = "SELECT column_name::text, data_type::text FROM information_schema.columns \
                   WHERE table_schema = 'public' AND table_name = $1 AND is_generated = 'NEVER' ORDER BY ordinal_position";
    let (mut names, mut values) = (Vec::new(), Vec::new());
    for row in admin.query(columns, &[&table]).await? {
        let (name, kind): (String, String) = (row.get(0), row.get(1));
        values.push(match (&*name, &*kind) {
            ("created_month" | "session_month", _) => "$1::date".to_owned(),
            ("id" | "session_id", _) => format!("md5(t.{name}::text || $4)::uuid"),
            ("fingerprint", _) => "t.fingerprint || '-' || $5".to_owned(),
            (_, "timestamp with time zone") => format!("{moved} + (t.{name} - t.began_at)"),
            _ => format!("t.{name}"),
        });
        names.push(name);
    }
    // Each parameter is used, whichever the table.
    Ok(format!(
        "INSERT INTO public.{table} ({}) SELECT {} FROM bench.{table} t WHERE $4::text || $5::text <> ''",
        names.join(", "),
        values.join(", ")
    ))
}

/// About how many events are there, by the size of their tables.
async fn loaded(admin: &Client) -> anyhow::Result<i64> {
    let inserted = "SELECT coalesce(sum(n_live_tup), 0)::bigint FROM pg_stat_user_tables WHERE schemaname = 'public' AND relname LIKE 'events\\_%'";
    Ok(admin.query_one(inserted, &[]).await?.get(0))
}
