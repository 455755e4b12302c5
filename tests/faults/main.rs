//! The fault table: what breaks, one row a fault, against the real server; and that nothing is lost or stored twice.
//!
//! `cargo test` runs each row with a few rounds; `make faults` runs the long form. `cargo test --test faults -- --help` tells the rest. A row is a
//! file in `rows/` and a line in its registry. Whatever a row draws by lot comes from its seed, which is printed.

// The rows look behind the store's walls; the program may not.
#![allow(clippy::disallowed_methods)]

mod doors;
mod ledger;
mod options;
mod outage;
mod proxy;
mod report;
mod rows;
#[path = "../it/support/mod.rs"]
mod support;
mod world;

use std::process::ExitCode;

use futures::StreamExt;
use futures::stream;

use options::{Options, Order};
use report::{Line, Report};
use rows::{Plan, ROWS, Row};

fn main() -> ExitCode {
    let options = match Options::read(std::env::args().skip(1)) {
        Ok(Order::Run(options)) => options,
        Ok(Order::Help) => {
            println!("{}", options::HELP);
            return ExitCode::SUCCESS;
        }
        Ok(Order::List) => {
            ROWS.iter().for_each(|row| println!("{}: test", row.name));
            return ExitCode::SUCCESS;
        }
        Err(complaint) => {
            eprintln!("{complaint}\n\n{}", options::HELP);
            return ExitCode::from(2);
        }
    };
    options::allow_for(&options);
    let chosen: Vec<&Row> = ROWS.iter().filter(|row| options.wants(row.name)).collect();
    if chosen.is_empty() {
        println!("no fault has this name");
        return ExitCode::SUCCESS;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(4).enable_all().build();
    let lines = runtime.expect("a runtime").block_on(run(&chosen, &options));
    print!("{}", report::table(&lines));
    if let Some(path) = &options.json
        && let Err(error) = std::fs::write(path, report::json(&lines, options.seed))
    {
        eprintln!("{}: {error}", path.display());
        return ExitCode::FAILURE;
    }
    if lines.iter().all(Line::holds) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// How many rows that mostly wait run at once.
const AT_ONCE: usize = 4;

/// One row after the other: each has the machine to itself. Only the short form runs those side by side that mostly wait.
async fn run(rows: &[&'static Row], options: &Options) -> Vec<Line> {
    println!("faults: seed {}, {} rows, the {} form", options.seed, rows.len(), options.form());
    let (waiting, working): (Vec<&Row>, Vec<&Row>) = rows.iter().partition(|row| row.waits && !options.is_long());
    let waited = stream::iter(waiting).map(|row| one(row, options)).buffer_unordered(AT_ONCE).collect::<Vec<_>>();
    let worked = stream::iter(working).then(|row| one(row, options)).collect::<Vec<_>>();
    let mut lines = waited.await;
    lines.extend(worked.await);
    lines.sort_by_key(|line| rows.iter().position(|row| row.name == line.name));
    lines
}

async fn one(row: &'static Row, options: &Options) -> Line {
    let rounds = options.rounds.unwrap_or(if options.long { row.long } else { row.short });
    println!("{}: {rounds} rounds ...", row.name);
    let began = std::time::Instant::now();
    let plan = Plan { rounds, long: options.is_long(), seed: options.seed };
    // A row that panics is one that fails; the others still run.
    let report = tokio::spawn((row.run)(plan)).await.unwrap_or_else(|broken| Report::broken(&broken.to_string()));
    let line = Line { name: row.name, what: row.what, rounds, took: began.elapsed(), report };
    println!("{line}");
    line
}
