//! Runs the command line; the exit code says how it went.

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    keep_telemetry_off();
    tidegate::heap::fix_thresholds();
    tidegate::cli::run().unwrap_or_else(|error| {
        #[expect(clippy::print_stderr, reason = "whoever typed the command reads standard error")]
        {
            format!("tidegate: {error:#}").lines().for_each(|line| eprintln!("{}", tidegate::cli::seen(line)));
        }
        ExitCode::FAILURE
    })
}

/// ONNX Runtime's Linux builds keep a device id and send telemetry, whatever its API is told; only this variable, set
/// before the library is loaded, keeps them from it.
#[expect(
    unsafe_code,
    clippy::disallowed_methods,
    reason = "no other thread exists yet that could read the environment"
)]
fn keep_telemetry_off() {
    unsafe { std::env::set_var("ORT_DISABLE_TELEMETRY", "1") };
}
