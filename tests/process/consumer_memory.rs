//! Memory of what services are made of: bytes per waiting and parked key, and no allocation per item in order.

use std::time::{Duration, Instant};

use crate::counting;
use corelane::consumer::{KeyQueues, QueuePolicy, Verdict};
use corelane::ingress::{GatePolicy, Offered, SequenceGate};
use corelane::{Key, Offset};

const KEYS: u64 = 1_000_000;
const SECOND: Duration = Duration::from_secs(1);

fn offer_all(lanes: &mut KeyQueues, from: u64) {
    for n in 0..KEYS {
        lanes.offer(Key::new(n), Offset(from + n)).unwrap();
    }
}

/// Lets everything run that may; `fate` says what becomes of it.
fn run_all(lanes: &mut KeyQueues, now: Duration, verdict: Option<Verdict>) -> u64 {
    let mut runs = 0;
    loop {
        let ticked = lanes.tick(now);
        while let Some(run) = lanes.next() {
            runs += 1;
            match verdict {
                None => lanes.succeeded(run),
                Some(verdict) => {
                    if let Some(record) = lanes.failed(run, verdict, now) {
                        lanes.recorded(record);
                    }
                }
            }
        }
        if ticked == 0 {
            return runs;
        }
    }
}

#[test]
fn a_million_keys_wait_or_are_parked_in_bounded_memory() {
    let policy = QueuePolicy::default().unfinished_max(1 << 20).keys_max(1 << 20).concurrency(64);
    let before = counting::thread_bytes();
    let mut lanes = KeyQueues::new(policy, Offset(0)).unwrap();
    let began = Instant::now();

    offer_all(&mut lanes, 0);
    // Spread over a second, as jitter does.
    for n in 0..KEYS {
        let run = lanes.next().unwrap();
        let after = Duration::from_nanos(Key::new(n).hash() % 1_000_000_000);
        lanes.failed(run, Verdict::Retry { after }, Duration::ZERO);
    }
    assert_eq!(lanes.statistics().waiting as u64, KEYS);
    let retrying_bytes = (counting::thread_bytes() - before) as u64;

    assert_eq!(run_all(&mut lanes, SECOND, Some(Verdict::Park)), KEYS);
    assert_eq!((lanes.statistics().keys as u64, lanes.statistics().unfinished), (KEYS, 0));
    assert_eq!(lanes.checkpoint(), Offset(KEYS - 1), "all but the last are passed");

    // Live again, and all of it once more: everything is used again.
    for n in 0..KEYS {
        assert_eq!(lanes.unpark(Key::new(n), 1), Ok(0));
    }
    assert_eq!(lanes.statistics().keys, 0);
    offer_all(&mut lanes, KEYS);
    let retry = Verdict::Retry { after: SECOND };
    assert_eq!(run_all(&mut lanes, Duration::ZERO, Some(retry)), KEYS);
    assert_eq!(run_all(&mut lanes, SECOND, None), KEYS);
    let after_bytes = (counting::thread_bytes() - before) as u64;
    assert!(after_bytes <= retrying_bytes, "{after_bytes} bytes after {retrying_bytes}");
    let took = began.elapsed();
    drop(lanes);
    assert_eq!(counting::thread_bytes(), before);

    // Parked keys alone, as after a restart.
    let mut lanes = KeyQueues::new(QueuePolicy::default(), Offset(0)).unwrap();
    for n in 0..KEYS {
        lanes.restore_parked(Key::new(n), 1).unwrap();
    }
    let parked_bytes = (counting::thread_bytes() - before) as u64;
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
    let before = counting::thread_allocations();
    for sequence in 0..100_000 {
        assert!(matches!(gate.offer(0, 1 + sequence, [0; 48], SECOND), Ok(Offered::Passed(_))));
        assert!(matches!(gate.offer(1, 2 + sequence, [0; 48], SECOND), Ok(Offered::Passed(_))));
        assert!(gate.next(SECOND).is_none());
    }
    assert_eq!(counting::thread_allocations(), before);
}

#[test]
fn a_gate_of_a_million_partitions_in_order_is_small() {
    let before = counting::thread_bytes();
    let mut gate = SequenceGate::new(GatePolicy::default()).unwrap();
    for partition in 0..KEYS {
        assert!(matches!(gate.offer(partition, 0, (), SECOND), Ok(Offered::Passed(()))));
    }
    let partition = (counting::thread_bytes() - before) as u64 / KEYS;
    let before = counting::thread_bytes();
    for partition in 0..KEYS {
        assert!(matches!(gate.offer(partition, 2, (), SECOND), Ok(Offered::Buffered)));
    }
    let disorder = (counting::thread_bytes() - before) as u64 / KEYS;
    eprintln!("bytes per partition: {partition} in order, {disorder} more with one early item");
    assert!(partition <= 96 && disorder <= 400, "{partition} and {disorder} bytes per partition");
}
