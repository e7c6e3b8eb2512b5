//! With retention, memory does not grow over time.

use std::time::Instant;

use crate::common::bank::{Account, Order};
use crate::common::own_process::is_own_process;
use crate::common::{Note, block_on, env_number, small, soon};
use crate::counting;
use corelane::{Config, Durability, Engine, EventLog, Key, Pin, Retention};

/// The resident anonymous memory of the process in KiB. Segments are pages of files and do not count.
fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("RssAnon")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// The number of mapped segments.
fn mappings() -> usize {
    std::fs::read_to_string("/proc/self/maps").unwrap().lines().filter(|line| line.contains(".seg")).count()
}

/// Publishes until `segments` more segments are freed, from every kind of producer; most are created and dropped on the
/// way.
fn run(engine: &EventLog<Note>, segments: u64) {
    let freed = || engine.shard_metrics()[0].segments_freed;
    let (target, end, mut n) = (freed() + segments, soon().unwrap(), 0);
    let shared = engine.shared_producer();
    while freed() < target {
        assert!(Instant::now() < end, "{} segments freed", freed());
        let mut producer = engine.producer();
        let mut receipt = None;
        for _ in 0..500 {
            receipt = Some(producer.publish(Key(n % 1000), Note::sized(n, 200)).unwrap());
            n += 1;
        }
        shared.publish(Key(n % 1000), Note::new(n)).with_receipt().wait().unwrap().appended().wait().unwrap();
        receipt.unwrap().appended().wait().unwrap();
        assert!(engine.shard_metrics()[0].failure.is_none());
    }
    engine.flush(soon()).unwrap();
}

#[test]
fn memory_does_not_grow_over_time_with_retention() {
    if !is_own_process("memory::memory_does_not_grow_over_time_with_retention") {
        return;
    }
    let segments = env_number("CORELANE_MEMORY_SEGMENTS", 40);
    for durability in [Durability::OsCache, Durability::GroupCommit] {
        let dir = tempfile::tempdir().unwrap();
        let retention = Retention::bytes(4 << 20);
        let config = Config::new(dir.path()).segment_bytes(1 << 20).event_bytes_max(1024).pin(Pin::None);
        let engine = EventLog::<Note>::open(config.durability(durability).retention(retention)).unwrap();
        run(&engine, 15);
        let (held, resident) = (counting::bytes_held(), resident_kib());
        run(&engine, segments);
        let (held_after, resident_after) = (counting::bytes_held(), resident_kib());
        eprintln!(
            "{durability:?}: {segments} segments freed; {held} -> {held_after} B, {resident} -> {resident_after} KiB"
        );
        assert!(held_after < held + (64 << 10), "{durability:?}: {held} -> {held_after} bytes held");
        assert!(resident_after < resident + 4096, "{durability:?}: {resident} -> {resident_after} KiB resident");
        // Four segments in retention, one about to be freed, one prepared, two spares.
        assert!(mappings() <= 8, "{durability:?}: {} segments mapped", mappings());
        engine.shutdown(soon()).unwrap();
    }
}

#[test]
fn discarded_answers_leave_nothing_in_a_shared_client() {
    if !is_own_process("memory::discarded_answers_leave_nothing_in_a_shared_client") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let config = small(dir.path()).durability(Durability::OsCache).retention(Retention::bytes(1 << 20));
    let engine = Engine::<Account>::open(config).unwrap();
    let client = engine.shared_client();
    let commands = |count: u64| {
        for n in 0..count {
            let answer = block_on(client.send(Key(n % 10), Order::Deposit(1)).submit()).unwrap();
            match n % 3 {
                0 => drop(block_on(answer)),
                // Dropped before the reply comes, as a rule.
                1 => drop(answer),
                // Dropped after a later reply has come.
                _ => {
                    block_on(client.send(Key(n % 10), Order::Nothing).into_future()).unwrap();
                    drop(answer);
                }
            }
        }
    };
    commands(20_000);
    let held = counting::bytes_held();
    commands(60_000);
    let grown = counting::bytes_held() - held;
    assert!(grown < 256 << 10, "{grown} bytes for 40,000 discarded answers");
}
