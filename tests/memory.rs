//! Memory stays flat over time with retention on. A binary of its own, because it counts every byte of the process.
#![expect(clippy::unwrap_used, reason = "a test may unwrap")]

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use common::{Note, env_number, soon};
use corelane::{Config, Durability, EventLog, Key, Pin, Retention};

struct Weighing;
static HELD_BYTES: AtomicU64 = AtomicU64::new(0);

// SAFETY: everything is handed on to the system's allocator as it came.
unsafe impl GlobalAlloc for Weighing {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        HELD_BYTES.fetch_add(layout.size() as u64, Ordering::Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        HELD_BYTES.fetch_sub(layout.size() as u64, Ordering::Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static WEIGHING: Weighing = Weighing;

/// Anonymous memory of the process that is resident, in KiB. (Segments are pages of files.)
fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("RssAnon")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Segments mapped.
fn mappings() -> usize {
    std::fs::read_to_string("/proc/self/maps").unwrap().lines().filter(|line| line.contains(".seg")).count()
}

/// Publishes so that many segments are freed, from every kind of producer; some come and go.
fn run(engine: &EventLog<Note>, segments: u64) {
    let freed = || engine.metrics().shards[0].segments_freed;
    let (until, end, mut n) = (freed() + segments, soon().unwrap(), 0);
    let shared = engine.shared_producer();
    while freed() < until {
        assert!(Instant::now() < end, "{} segments freed", freed());
        let mut producer = engine.producer();
        let mut receipt = None;
        for _ in 0..500 {
            receipt = Some(producer.publish(Key(n % 1000), Note::sized(n, 200)).unwrap());
            n += 1;
        }
        shared.publish_with_receipt(Key(n % 1000), Note::new(n)).unwrap().wait_appended().unwrap();
        receipt.unwrap().appended().wait().unwrap();
        assert!(engine.metrics().shards[0].failure.is_none());
    }
    engine.flush(soon()).unwrap();
}

#[test]
fn memory_does_not_grow_over_time_with_retention() {
    let segments = env_number("CORELANE_MEMORY_SEGMENTS", 40);
    for durability in [Durability::OsCache, Durability::GroupCommit] {
        let dir = tempfile::tempdir().unwrap();
        let retention = Retention::bytes(4 << 20);
        let config = Config::new(dir.path()).segment_bytes(1 << 20).event_bytes_max(1024).pin(Pin::None);
        let engine = EventLog::<Note>::open(config.durability(durability).retention(retention)).unwrap();
        run(&engine, 15);
        let (held, resident) = (HELD_BYTES.load(Ordering::Relaxed), resident_kib());
        run(&engine, segments);
        let (held_after, resident_after) = (HELD_BYTES.load(Ordering::Relaxed), resident_kib());
        eprintln!(
            "{durability:?}: {segments} segments freed; {held} -> {held_after} B, {resident} -> {resident_after} KiB"
        );
        assert!(held_after < held + (64 << 10), "{durability:?}: {held} -> {held_after} bytes held");
        assert!(resident_after < resident + 4096, "{durability:?}: {resident} -> {resident_after} KiB resident");
        // 4 in retention, one more for a moment, one prepared, two spares.
        assert!(mappings() <= 8, "{durability:?}: {} segments mapped", mappings());
        engine.shutdown(soon()).unwrap();
    }
}
