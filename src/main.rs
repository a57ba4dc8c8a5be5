//! Runs the command line; the exit code says how it went.

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    tidegate::cli::run().unwrap_or_else(|error| {
        #[expect(clippy::print_stderr, reason = "whoever typed the command reads standard error")]
        {
            eprintln!("tidegate: {error:#}");
        }
        ExitCode::FAILURE
    })
}
