//! Runs the command line; the exit code says how it went.

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    keep_telemetry_off();
    give_memory_back();
    tidegate::cli::run().unwrap_or_else(|error| {
        #[expect(clippy::print_stderr, reason = "whoever typed the command reads standard error")]
        {
            eprintln!("tidegate: {error:#}");
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

/// Has the C allocator, which is ONNX Runtime's, return what it gets back to the system.
///
/// Its thresholds are 128 KiB at first, but grow to 32 and 64 MiB with the first large block that is freed, and then
/// what loading needs for a moment stays for good: 200 MB of weights cost 390 MB, with fixed thresholds 210 MB, and
/// 10 MB instead of 190 MB once they are unloaded. Setting a threshold fixes it.
#[cfg(target_env = "gnu")]
#[expect(unsafe_code, reason = "no other thread exists yet that could allocate")]
fn give_memory_back() {
    const THRESHOLD: libc::c_int = 128 << 10;
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, THRESHOLD);
        libc::mallopt(libc::M_TRIM_THRESHOLD, THRESHOLD);
    }
}

#[cfg(not(target_env = "gnu"))]
fn give_memory_back() {}
