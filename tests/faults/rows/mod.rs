//! The rows of the table. A new one is a file with a function from a [`Plan`] to a [`Report`], and a line in [`ROWS`].

use futures::FutureExt;
use futures::future::BoxFuture;

use crate::report::Report;

mod disk;
mod hostile;
mod kill;
mod outages;
mod pooler;
mod qstash;
mod two;

/// What a row is asked to do.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    pub rounds: u32,
    pub long: bool,
    pub seed: u64,
}

pub struct Row {
    pub name: &'static str,
    pub what: &'static str,
    /// Rounds of the short form ...
    pub short: u32,
    /// ... and of the long one.
    pub long: u32,
    /// Most of its time it waits: several of these run at once in the short form.
    pub waits: bool,
    pub run: fn(Plan) -> BoxFuture<'static, Report>,
}

macro_rules! row {
    ($name:literal, $short:literal, $long:literal, $run:path, $what:literal) => {
        Row { name: $name, what: $what, short: $short, long: $long, waits: false, run: |plan| $run(plan).boxed() }
    };
    (waits $name:literal, $($rest:tt)*) => {
        Row { waits: true, ..row!($name, $($rest)*) }
    };
}

pub const ROWS: &[Row] = &[
    row!("kill-server", 2, 30, kill::server, "kill -9 of the server under load through every door"),
    row!("kill-postgres", 2, 30, kill::postgres, "immediate shutdown of PostgreSQL under load through every door"),
    row!(waits "away", 1, 5, outages::away, "PostgreSQL is gone for a while"),
    row!(waits "unreachable", 1, 5, outages::unreachable, "every packet to and from PostgreSQL is lost for a while"),
    row!(waits "slow", 1, 3, outages::slow, "every answer of PostgreSQL takes five seconds"),
    row!(waits "locked", 1, 3, outages::locked, "another session holds a lock on `events`"),
    row!(waits "no-connections", 1, 5, outages::no_connections, "others have taken all connections"),
    row!(waits "read-only", 1, 5, outages::read_only, "PostgreSQL takes no writes"),
    row!(waits "disk-full", 1, 5, disk::full, "no space is left for the tables"),
    row!(waits "no-partition", 1, 5, outages::no_partition, "the month has no partition, and none can be made"),
    row!("qstash", 1, 2, qstash::row, "QStash is away, silent, slow, or answers 500, 429 or rubbish"),
    row!("hostile", 1, 50, hostile::row, "slow and hostile peers, and a million fingerprints"),
    row!("pooler", 2, 10, pooler::row, "PgBouncer in transaction mode before the database, and killed"),
    row!("two-servers", 2, 10, two::row, "the same events through two servers on one database"),
];
