//! An allocator that counts: how much memory a piece of work holds at its worst.
#![expect(unsafe_code, reason = "an allocator cannot be written without")]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
};

#[global_allocator]
static ALLOCATOR: Counting = Counting { held: AtomicUsize::new(0), most: AtomicUsize::new(0) };

/// Runs `work`, during which at most `limit` bytes more than before may be held at any time.
///
/// # Panics
/// When it was more.
pub fn within<T>(limit: usize, work: impl FnOnce() -> T) -> T {
    let before = ALLOCATOR.held.load(Relaxed);
    ALLOCATOR.most.store(before, Relaxed);
    let result = work();
    let most = ALLOCATOR.most.load(Relaxed) - before;
    assert!(most <= limit, "{most} bytes were held, at most {limit} are allowed");
    result
}

/// The system's allocator, and what it has given away.
struct Counting {
    held: AtomicUsize,
    most: AtomicUsize,
}

// SAFETY: the system's allocator does all the work, and gets every call as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let held = self.held.fetch_add(layout.size(), Relaxed) + layout.size();
        self.most.fetch_max(held, Relaxed);
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        self.held.fetch_sub(layout.size(), Relaxed);
        unsafe { System.dealloc(pointer, layout) }
    }
}
