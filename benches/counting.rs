//! The server's allocator, which counts when it is asked to, and the marks between which a process is counted.
//!
//! Counting is off in everything that is timed. Off, it costs an allocation one load and one branch that is always
//! taken alike, about 3 instructions of the 100 or so that mimalloc takes for a pair of calls.

use std::{
    alloc::{GlobalAlloc, Layout},
    io::{BufRead, Write},
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
};

use anyhow::Result;
use mimalloc::MiMalloc;

/// mimalloc, counted.
pub struct Counting;

static ON: AtomicBool = AtomicBool::new(false);
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);
static BYTES: AtomicU64 = AtomicU64::new(0);

/// What was allocated up to some moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allocated {
    /// Calls that may have to find memory: a block that grows or shrinks counts again.
    pub count: u64,
    /// Of new blocks all bytes, of those that grow what is added.
    pub bytes: u64,
}

fn count(bytes: usize) {
    if ON.load(Relaxed) {
        ALLOCATIONS.fetch_add(1, Relaxed);
        BYTES.fetch_add(bytes as u64, Relaxed);
    }
}

#[expect(
    unsafe_code,
    reason = "every call goes to mimalloc with the same arguments, so its contract is kept when the caller keeps ours, \
              which is the same; counting touches three atomics and never allocates"
)]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        unsafe { MiMalloc.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        unsafe { MiMalloc.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        unsafe { MiMalloc.dealloc(block, layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size.saturating_sub(layout.size()));
        unsafe { MiMalloc.realloc(block, layout, size) }
    }
}

/// What was allocated since counting began. Callgrind is told to begin a new profile before each call, so it has to
/// find this function by its name.
#[inline(never)]
pub fn mark() -> Allocated {
    Allocated { count: ALLOCATIONS.load(Relaxed), bytes: BYTES.load(Relaxed) }
}

/// Answers every line on standard input with a mark, until standard input ends.
///
/// # Errors
/// When standard input or output does not work.
pub fn answer() -> Result<()> {
    for line in std::io::stdin().lock().lines() {
        // The first line begins the count, at zero.
        ON.store(true, Relaxed);
        line?;
        let Allocated { count, bytes } = mark();
        writeln!(std::io::stdout(), "{count} {bytes}")?;
    }
    Ok(())
}

impl Allocated {
    /// Reads what `answer` wrote.
    pub fn parse(line: &str) -> Option<Self> {
        let (count, bytes) = line.split_once(' ')?;
        Some(Self { count: count.parse().ok()?, bytes: bytes.parse().ok()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_counted_with_their_bytes() {
        ON.store(true, Relaxed);
        let before = mark();
        let mut block: Vec<u8> = Vec::with_capacity(1 << 20);
        block.push(std::hint::black_box(1));
        block.reserve_exact(2 << 20);
        drop(std::hint::black_box(block));
        let after = mark();
        ON.store(false, Relaxed);
        // Other tests allocate meanwhile.
        assert!(after.count >= before.count + 2, "{before:?} {after:?}");
        assert!(after.bytes >= before.bytes + (2 << 20), "{before:?} {after:?}");
        assert_eq!(Allocated::parse("3 70"), Some(Allocated { count: 3, bytes: 70 }));
        assert_eq!(Allocated::parse("3"), None);
    }
}
