//! No allocation per event on the hot path. A binary of its own, because it counts every allocation of the process.
#![expect(clippy::unwrap_used, reason = "a test may unwrap")]

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicU64, Ordering};

use common::soon;
use corelane::{Config, Durability, Event, EventLog, EventType, EventTypeId, Key, Retention};
use rkyv::{Archive, Deserialize, Serialize};

struct Counting;
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: everything is handed on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(at, layout) }
    }
    unsafe fn realloc(&self, at: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.realloc(at, layout, bytes) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

#[derive(Archive, Serialize, Deserialize, Debug, Clone, Copy)]
struct Step {
    x: f32,
    y: f32,
    n: u64,
}
impl Event for Step {
    const TYPES: &'static [EventType] = &[EventType::new(1, "step", 1)];
    fn event_type(&self) -> EventTypeId {
        EventTypeId(1)
    }
}

const USERS: u64 = 1000;

fn publish(producer: &mut corelane::Producer<Step>, batch: &mut Vec<(Key, Step)>, events: u64) {
    for n in 0..events / 2 {
        batch.push((Key(n % USERS), Step { x: 1.0, y: 2.0, n }));
        if batch.len() == 256 {
            producer.publish_batch(batch).unwrap();
        }
    }
    producer.publish_batch(batch).unwrap();
    for n in 0..events / 2 {
        producer.publish(Key(n % USERS), Step { x: 1.0, y: 2.0, n }).unwrap();
    }
}

/// Allocations while `events` events go through, one shard, histograms on.
fn allocations(durability: Durability, events: u64) -> u64 {
    let dir = tempfile::tempdir().unwrap();
    let keep = Retention { bytes_max: Some(16 << 20), age_max: None };
    let engine =
        EventLog::<Step>::open(Config::new(dir.path()).segment_bytes(4 << 20).durability(durability).retention(keep))
            .unwrap();
    let mut producer = engine.producer();
    let mut batch = Vec::with_capacity(256);
    publish(&mut producer, &mut batch, 100_000);
    engine.flush(soon()).unwrap();
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    publish(&mut producer, &mut batch, events);
    engine.flush(soon()).unwrap();
    let allocations = ALLOCATIONS.load(Ordering::Relaxed) - before;
    engine.shutdown(soon()).unwrap();
    allocations
}

#[test]
fn nothing_is_allocated_per_event() {
    let events = common::env_number("CORELANE_ALLOCATION_EVENTS", 600_000);
    // What remains belongs to segments (some 60,000 events each) and to syncs, not to events.
    let os_cache = allocations(Durability::OsCache, events);
    eprintln!("OsCache: {os_cache} allocations for {events} events");
    assert!(os_cache < 1_000 + events / 1_000, "{os_cache} allocations for {events} events");
    let group = allocations(Durability::GroupCommit, events);
    eprintln!("GroupCommit: {group} allocations for {events} events");
    assert!(group < 1_000 + events / 200, "{group} allocations for {events} events");
}
