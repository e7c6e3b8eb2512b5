//! Memory of what services are made of: bytes per waiting and parked key, and no allocation per item in order.
//! A binary of its own, because it counts allocations.
#![expect(clippy::unwrap_used, reason = "a test may unwrap")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::time::{Duration, Instant};

use corelane::bench_support::{QueuedEvent, Queues};
use corelane::consumer::QueuePolicy;
use corelane::ingress::{GatePolicy, Offered, SequenceGate};
use corelane::{Key, Offset};

struct Counting;

thread_local! {
    static BYTES: Cell<i64> = const { Cell::new(0) };
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

fn count(bytes: i64) {
    BYTES.set(BYTES.get() + bytes);
    ALLOCATIONS.set(ALLOCATIONS.get() + u64::from(bytes > 0));
}

// SAFETY: everything is handed on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as i64);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count(-(layout.size() as i64));
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(at, layout) }
    }
    unsafe fn realloc(&self, at: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        count(-(layout.size() as i64));
        count(bytes as i64);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.realloc(at, layout, bytes) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

const KEYS: u64 = 1_000_000;
const SECOND: Duration = Duration::from_secs(1);

fn offer_all(queues: &mut Queues, from: u64) {
    for n in 0..KEYS {
        queues.offer(Key::new(n), Offset(from + n));
    }
}

/// Takes every event that may run and ends each with `end`. Returns how many.
fn run_all(queues: &mut Queues, now: Duration, end: impl Fn(&mut Queues, QueuedEvent)) -> u64 {
    let mut events = 0;
    loop {
        let ticked = queues.tick(now);
        while let Some(event) = queues.next() {
            events += 1;
            end(queues, event);
        }
        if ticked == 0 {
            return events;
        }
    }
}

#[test]
fn a_million_keys_wait_or_are_parked_in_bounded_memory() {
    let policy = QueuePolicy::default().unfinished_max(1 << 20).keys_max(1 << 20).concurrency(64);
    let before = BYTES.get();
    let mut queues = Queues::new(policy);
    let began = Instant::now();

    offer_all(&mut queues, 0);
    // Spread over a second, as jitter does.
    for n in 0..KEYS {
        let event = queues.next().unwrap();
        let after = Duration::from_nanos(Key::new(n).hash() % 1_000_000_000);
        queues.retry(event, after, Duration::ZERO);
    }
    assert_eq!(queues.waiting() as u64, KEYS);
    let retrying_bytes = (BYTES.get() - before) as u64;

    assert_eq!(run_all(&mut queues, SECOND, |queues, event| queues.park(event, SECOND)), KEYS);
    assert_eq!((queues.keys() as u64, queues.unfinished()), (KEYS, 0));
    assert_eq!(queues.position(), Offset(KEYS - 1), "all but the last are passed");

    // Live again, and all of it once more: everything is used again.
    for n in 0..KEYS {
        assert_eq!(queues.unpark(Key::new(n)), 0);
    }
    assert_eq!(queues.keys(), 0);
    offer_all(&mut queues, KEYS);
    let retry = |queues: &mut Queues, event| queues.retry(event, SECOND, Duration::ZERO);
    assert_eq!(run_all(&mut queues, Duration::ZERO, retry), KEYS);
    assert_eq!(run_all(&mut queues, SECOND, Queues::succeeded), KEYS);
    let after_bytes = (BYTES.get() - before) as u64;
    assert!(after_bytes <= retrying_bytes, "{after_bytes} bytes after {retrying_bytes}");
    let took = began.elapsed();
    drop(queues);
    assert_eq!(BYTES.get(), before);

    // Parked keys alone, as after a restart.
    let mut queues = Queues::new(QueuePolicy::default());
    for n in 0..KEYS {
        queues.restore_parked(Key::new(n));
    }
    let parked_bytes = (BYTES.get() - before) as u64;
    let (retrying, parked) = (retrying_bytes / KEYS, parked_bytes / KEYS);
    eprintln!("bytes per key: {retrying} retrying with one event, {parked} parked; 8 M steps in {took:?}");
    // A table that has just doubled takes twice what it holds.
    assert!(retrying <= 120 && parked <= 50, "{retrying} and {parked} bytes per key");
}

#[test]
fn the_gate_allocates_nothing_per_item_in_order() {
    let mut gate = SequenceGate::new(GatePolicy::default().gap_wait_max(Duration::ZERO)).unwrap();
    // One partition that never lost anything, and one that remembers a closed gap.
    assert_eq!(gate.offer(0_u64, 0, [0_u8; 48], SECOND), Ok(Offered::Passed([0; 48])));
    assert_eq!(gate.offer(1, 1, [0; 48], SECOND), Ok(Offered::Buffered));
    while gate.next(SECOND).is_some() {}
    let before = ALLOCATIONS.get();
    for sequence in 0..100_000 {
        assert!(matches!(gate.offer(0, 1 + sequence, [0; 48], SECOND), Ok(Offered::Passed(_))));
        assert!(matches!(gate.offer(1, 2 + sequence, [0; 48], SECOND), Ok(Offered::Passed(_))));
        assert!(gate.next(SECOND).is_none());
    }
    assert_eq!(ALLOCATIONS.get(), before);
}

#[test]
fn a_gate_of_a_million_partitions_in_order_is_small() {
    let before = BYTES.get();
    let mut gate = SequenceGate::new(GatePolicy::default()).unwrap();
    for partition in 0..KEYS {
        assert!(matches!(gate.offer(partition, 0, (), SECOND), Ok(Offered::Passed(()))));
    }
    let partition = (BYTES.get() - before) as u64 / KEYS;
    let before = BYTES.get();
    for partition in 0..KEYS {
        assert!(matches!(gate.offer(partition, 2, (), SECOND), Ok(Offered::Buffered)));
    }
    let disorder = (BYTES.get() - before) as u64 / KEYS;
    eprintln!("bytes per partition: {partition} in order, {disorder} more with one early item");
    assert!(partition <= 96 && disorder <= 400, "{partition} and {disorder} bytes per partition");
}
