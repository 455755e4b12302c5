//! The program `opsmantik`: logs, then the command. See `opsmantik --help`.

use std::process::ExitCode;

/// What one thread allocates another frees, all the time, which the system's allocator does at a third of the server's cost.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    opsmantik::telemetry::start_logging();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("opsmantik: cannot start: {error}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(opsmantik::cli::run()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("opsmantik: {error:#}");
            ExitCode::FAILURE
        }
    }
}
