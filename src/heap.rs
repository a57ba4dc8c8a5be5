//! The C allocator, which is ONNX Runtime's: what it does with memory that is freed.

/// Has freed memory returned to the system. Call it before any other thread exists.
///
/// The thresholds for that are 128 KiB at first, but grow to 32 and 64 MiB with the first large block that is freed,
/// and then what loading needs for a moment stays for good: 200 MB of weights cost 390 MB, with fixed thresholds
/// 210 MB, and 10 MB instead of 190 MB once they are unloaded. Setting a threshold fixes it.
pub fn fix_thresholds() {
    #[cfg(target_env = "gnu")]
    #[expect(unsafe_code, reason = "numbers go in and nothing comes out; the caller sees to it that nobody allocates")]
    unsafe {
        const THRESHOLD: libc::c_int = 128 << 10;
        libc::mallopt(libc::M_MMAP_THRESHOLD, THRESHOLD);
        libc::mallopt(libc::M_TRIM_THRESHOLD, THRESHOLD);
    }
}

/// Returns free pages that lie between those in use, which thresholds do not reach: small weights leave them behind.
/// After four loads and unloads of 10 MB in thousands of tensors 34 MB were left, and 6 MB after this.
///
/// It takes milliseconds, and holds up threads that allocate from the heap it is looking at.
pub fn trim() {
    #[cfg(target_env = "gnu")]
    #[expect(unsafe_code, reason = "the call locks what it looks at, and touches no memory in use")]
    unsafe {
        libc::malloc_trim(0);
    }
}
