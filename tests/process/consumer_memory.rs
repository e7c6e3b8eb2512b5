//! Memory of a consumer's parts: bytes per waiting and parked key, and no allocation per item that a gate gets in order.

use std::time::{Duration, Instant};

use crate::common::env_number;
use crate::counting;
use corelane::bench_support::{QueuedEvent, Queues};
use corelane::consumer::QueuePolicy;
use corelane::ingress::{GatePolicy, Offered, SequenceGate};
use corelane::{Key, Offset};

/// `CORELANE_MEMORY_KEYS` sets the number of keys and partitions.
fn keys() -> u64 {
    env_number("CORELANE_MEMORY_KEYS", 1_000_000)
}

const SECOND: Duration = Duration::from_secs(1);

fn offer_all(queues: &mut Queues, from: u64) {
    for n in 0..keys() {
        queues.offer(Key::new(n), Offset(from + n));
    }
}

/// Takes every event that may run and ends each with `end`. Returns their number.
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
fn waiting_and_parked_keys_take_bounded_memory() {
    let tables = keys().next_power_of_two() as usize;
    let policy = QueuePolicy::default().unfinished_max(tables).keys_max(tables).concurrency(64);
    let before = counting::thread_bytes();
    let mut queues = Queues::new(policy);
    let began = Instant::now();

    offer_all(&mut queues, 0);
    // The retries spread over a second, as with jitter.
    for n in 0..keys() {
        let event = queues.next().unwrap();
        let after = Duration::from_nanos(Key::new(n).hash() % 1_000_000_000);
        queues.retry(event, after, Duration::ZERO);
    }
    assert_eq!(queues.waiting() as u64, keys());
    let retrying_bytes = (counting::thread_bytes() - before) as u64;

    assert_eq!(run_all(&mut queues, SECOND, |queues, event| queues.park(event, SECOND)), keys());
    assert_eq!((queues.keys() as u64, queues.unfinished()), (keys(), 0));
    assert_eq!(queues.position(), Offset(keys() - 1), "the position passes all but the last event");

    // Unparks every key and repeats all of it: the memory is reused.
    for n in 0..keys() {
        assert_eq!(queues.unpark(Key::new(n)), 0);
    }
    assert_eq!(queues.keys(), 0);
    offer_all(&mut queues, keys());
    let retry = |queues: &mut Queues, event| queues.retry(event, SECOND, Duration::ZERO);
    assert_eq!(run_all(&mut queues, Duration::ZERO, retry), keys());
    assert_eq!(run_all(&mut queues, SECOND, Queues::succeeded), keys());
    let after_bytes = (counting::thread_bytes() - before) as u64;
    assert!(after_bytes <= retrying_bytes, "{after_bytes} bytes after {retrying_bytes}");
    let took = began.elapsed();
    drop(queues);
    assert_eq!(counting::thread_bytes(), before);

    // Only parked keys, as after a restart.
    let mut queues = Queues::new(QueuePolicy::default());
    for n in 0..keys() {
        queues.restore_parked(Key::new(n));
    }
    let parked_bytes = (counting::thread_bytes() - before) as u64;
    let (retrying, parked) = (retrying_bytes / keys(), parked_bytes / keys());
    eprintln!("bytes per key: {retrying} retrying with one event, {parked} parked; {} steps in {took:?}", 8 * keys());
    // A table that has just doubled takes twice the size of its entries.
    assert!(retrying <= 120 && parked <= 50, "{retrying} and {parked} bytes per key");
}

#[test]
fn the_gate_allocates_nothing_per_item_in_order() {
    let mut gate = SequenceGate::new(GatePolicy::default().gap_wait_max(Duration::ZERO)).unwrap();
    // One partition without gaps, and one that remembers a closed gap.
    assert_eq!(gate.offer(0_u64, 0, [0_u8; 48], SECOND), Ok(Offered::Passed([0; 48])));
    assert_eq!(gate.offer(1, 1, [0; 48], SECOND), Ok(Offered::Buffered));
    while gate.next(SECOND).is_some() {}
    let before = counting::thread_allocations();
    for sequence in 0..100_000 {
        assert!(matches!(gate.offer(0, 1 + sequence, [0; 48], SECOND), Ok(Offered::Passed(_))));
        assert!(matches!(gate.offer(1, 2 + sequence, [0; 48], SECOND), Ok(Offered::Passed(_))));
        assert!(gate.next(SECOND).is_none());
    }
    assert_eq!(counting::thread_allocations(), before);
}

#[test]
fn a_gate_of_many_partitions_in_order_takes_little_memory() {
    let before = counting::thread_bytes();
    let mut gate = SequenceGate::new(GatePolicy::default()).unwrap();
    for partition in 0..keys() {
        assert!(matches!(gate.offer(partition, 0, (), SECOND), Ok(Offered::Passed(()))));
    }
    let partition = (counting::thread_bytes() - before) as u64 / keys();
    let before = counting::thread_bytes();
    for partition in 0..keys() {
        assert!(matches!(gate.offer(partition, 2, (), SECOND), Ok(Offered::Buffered)));
    }
    let disorder = (counting::thread_bytes() - before) as u64 / keys();
    eprintln!("bytes per partition: {partition} in order, {disorder} more with one early item");
    assert!(partition <= 96 && disorder <= 400, "{partition} and {disorder} bytes per partition");
}
