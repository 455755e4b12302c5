//! What the spine can do on this machine, each figure with its comparison in the same run: `cargo bench --bench spine`, or `make bench`.
//!
//! Raises a PostgreSQL cluster of its own that keeps every promise (`fsync`, `synchronous_commit` and `full_page_writes` on), runs the real
//! `opsmantik` program beside it, and measures row by row. A ratio is taken within a round whose two sides follow one another, and the median
//! of the rounds is told. Beside each rate stands what it cost in seconds of processor, which other work on the machine does not change.
//! Every row also counts its rows in the tables: what was not stored was not measured.

// The bench looks behind the store's walls; the program may not.
#![allow(clippy::disallowed_methods)]

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, ensure};
use clap::Parser;
use opsmantik::dev::progress::Progress;
use report::Line;
use rows::{ALL, Bench};

/// The server's own: what it answers without storing is answered here.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

mod answering;
mod copy;
mod flood;
mod ground;
mod grpc_load;
mod http_load;
mod past;
mod processes;
mod report;
mod rows;
mod sent;
mod server;
mod workload;

/// Measures the spine: durable ingest, latency, growth, memory, start. Raises its own PostgreSQL, and is gone afterwards.
///
/// The table tells for each row what was measured, against what in the same run, and the bar it is held to. A row that does not reach its bar
/// is no error (see --strict); a row that cannot run, or loses an event, is.
#[derive(Debug, Parser)]
#[command(name = "cargo bench --bench spine --", after_help = EXAMPLES)]
struct Options {
    /// Only this row; may be given several times. See --list
    #[arg(long = "row", value_name = "NAME")]
    rows: Vec<String>,
    /// Name the rows and end
    #[arg(long)]
    list: bool,
    /// Everything small, within a minute: shows that each row runs, and is no figure to quote
    #[arg(long)]
    short: bool,
    /// Where to write the figures
    #[arg(long, value_name = "FILE", default_value = "target/bench/spine.json")]
    json: PathBuf,
    /// End with an error if a bar is not reached
    #[arg(long)]
    strict: bool,
    /// A further setting of PostgreSQL, for who looks into it; may be given several times
    #[arg(long = "pg", value_name = "NAME=VALUE", value_parser = setting)]
    settings: Vec<(String, String)>,
    /// Given by cargo
    #[arg(long, hide = true)]
    bench: bool,
}

const EXAMPLES: &str = "Examples:
  make bench                                          the whole table
  make bench ARGS=--short                             a minute, for a first look
  make bench ARGS='--row sync --row latency'          two rows
  make bench ARGS='--row ingest --pg shared_preload_libraries=auto_explain --pg auto_explain.log_min_duration=5'
  perf record -g -p PID                               the servers' PIDs are shown while they run";

fn setting(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("it is not NAME=VALUE")?;
    Ok((name.to_owned(), value.to_owned()))
}

fn main() -> ExitCode {
    let answering = std::env::var_os(answering::VARIABLE).is_some();
    if !answering && std::env::args_os().len() == 1 {
        println!("This is a bench: cargo bench --bench spine -- --help");
        return ExitCode::SUCCESS;
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("bench: cannot start: {error}");
            return ExitCode::FAILURE;
        }
    };
    let ran = runtime.block_on(async {
        if answering { answering::run().await.map(|()| true) } else { run(Options::parse()).await }
    });
    match ran {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether all that was asked for holds.
async fn run(options: Options) -> anyhow::Result<bool> {
    if options.list {
        for row in ALL {
            println!("{:<10} {}", row.name, row.about);
        }
        return Ok(true);
    }
    for name in &options.rows {
        ensure!(ALL.iter().any(|row| row.name == name), "there is no row `{name}`; --list names them");
    }
    let began = Instant::now();
    let progress = Progress::stderr();
    let mut bench = Bench::raise(progress, options.short, options.settings).await?;
    let mut lines: Vec<Line> = Vec::new();
    let mut failed = None;
    for row in ALL.iter().filter(|row| options.rows.is_empty() || options.rows.iter().any(|name| name == row.name)) {
        progress.say(format!("{}: {}", row.name, row.about));
        // Short, so that a line has room for what it is busy with.
        let step = progress.step(row.name);
        bench.show(step);
        match row.measure(&mut bench).await {
            Ok(measured) => {
                bench.shown(true);
                measured.iter().for_each(|line| progress.say(line.brief()));
                lines.extend(measured);
            }
            Err(error) => {
                bench.shown(false);
                failed = Some(error.context(format!("row {}", row.name)));
                break;
            }
        }
    }
    let (settings, seconds) = (bench.settings(), began.elapsed().as_secs_f64());
    bench.end().await?;
    if let Some(error) = failed {
        return Err(error);
    }

    let processors = std::thread::available_parallelism().map_or(0, usize::from);
    println!("\n{}", report::table(&lines));
    println!("{processors} processors, {seconds:.0} s; {}", settings.join(", "));
    if cfg!(debug_assertions) {
        println!("Built without optimisation: its figures say nothing.");
    }
    if options.short {
        println!("Short: it shows that each row runs. Its figures are not to be quoted.");
    }
    write(&options.json, &report::json(&lines, &settings, options.short, seconds))?;
    println!("Written: {}", options.json.display());
    Ok(!options.strict || lines.iter().all(|line| line.met().0 != Some(false)))
}

fn write(file: &PathBuf, json: &serde_json::Value) -> anyhow::Result<()> {
    if let Some(folder) = file.parent() {
        std::fs::create_dir_all(folder)?;
    }
    std::fs::write(file, format!("{json:#}\n")).with_context(|| format!("cannot write {}", file.display()))
}
