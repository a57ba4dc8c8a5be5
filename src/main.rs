//! Runs the command line; the exit code says how it went.

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    set_variables();
    tidegate::heap::fix_thresholds();
    tidegate::cli::run().unwrap_or_else(|error| {
        #[expect(clippy::print_stderr, reason = "whoever typed the command reads standard error")]
        {
            format!("tidegate: {error:#}").lines().for_each(|line| eprintln!("{}", tidegate::cli::seen(line)));
        }
        ExitCode::FAILURE
    })
}

/// What libraries are told by variables and in no other way.
///
/// ONNX Runtime's Linux builds keep a device id and send telemetry, whatever its API is told; only this variable, set
/// before the library is loaded, keeps them from it. candle counts the cores in /proc/cpuinfo before each product of matrices,
/// 24 times in a run of four layers, where nobody says how many there are; so it is told what it would find, or as many as
/// the process may use.
#[expect(
    unsafe_code,
    clippy::disallowed_methods,
    reason = "no other thread exists yet that could read the environment"
)]
fn set_variables() {
    unsafe { std::env::set_var("ORT_DISABLE_TELEMETRY", "1") };
    #[cfg(feature = "candle")]
    if let (None, Ok(cores)) = (std::env::var_os("RAYON_NUM_THREADS"), std::thread::available_parallelism()) {
        let threads = tidegate::backend::candle::threads_found().min(cores.get());
        unsafe { std::env::set_var("RAYON_NUM_THREADS", threads.to_string()) };
    }
}
