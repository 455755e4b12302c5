//! The program `opsmantik`: logs, then the command. See `opsmantik --help`.

use std::process::ExitCode;

/// A server allocates on one thread and frees on another, all the time; the system's allocator spends a fifth of its processor on that.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

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
