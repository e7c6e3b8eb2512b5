//! A global allocator that counts allocations and bytes: of the process, and of each thread.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);
static BYTES: AtomicI64 = AtomicI64::new(0);

thread_local! {
    static THREAD_ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
    static THREAD_BYTES: Cell<i64> = const { Cell::new(0) };
}

/// Returns the number of allocations and reallocations of the process so far.
pub(crate) fn allocations() -> u64 {
    ALLOCATIONS.load(Ordering::Relaxed)
}

/// Returns the bytes that the process holds now.
pub(crate) fn bytes_held() -> i64 {
    BYTES.load(Ordering::Relaxed)
}

/// Returns the number of allocations and reallocations of this thread so far.
pub(crate) fn thread_allocations() -> u64 {
    THREAD_ALLOCATIONS.get()
}

/// Returns the bytes that this thread has allocated minus those that it has freed.
pub(crate) fn thread_bytes() -> i64 {
    THREAD_BYTES.get()
}

struct Counting;

#[global_allocator]
static COUNTING: Counting = Counting;

fn count_allocation() {
    ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
    THREAD_ALLOCATIONS.set(THREAD_ALLOCATIONS.get() + 1);
}

fn count_bytes(change: i64) {
    BYTES.fetch_add(change, Ordering::Relaxed);
    THREAD_BYTES.set(THREAD_BYTES.get() + change);
}

// SAFETY: every call is passed unchanged to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count_allocation();
        count_bytes(layout.size() as i64);
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count_bytes(-(layout.size() as i64));
        // SAFETY: the caller keeps the contract of `dealloc`.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        count_allocation();
        count_bytes(bytes as i64 - layout.size() as i64);
        // SAFETY: the caller keeps the contract of `realloc`.
        unsafe { System.realloc(at, layout, bytes) }
    }
}
