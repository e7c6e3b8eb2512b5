//! A failed sync is final: the shard stops with the cause, no later event is acknowledged, and after a power cut every
//! acknowledged event exists.

use std::time::{Duration, Instant};

use crate::common::{Note, env_number, numbers, open_on, read_shard, settle, small, soon};
use corelane::error::FailureCause;
use corelane::testing::{FaultyStorage, Unsynced};
use corelane::{EventLog, Key, Rejected, WaitError};

/// Publishes events one by one until one fails. Returns (acknowledged as durable, accepted).
fn publish_until_failure(engine: &EventLog<Note>, from: u64, events: u64) -> (u64, u64) {
    let mut producer = engine.producer();
    let (mut durable, mut accepted) = (from, from);
    for n in from..from + events {
        match producer.publish(Key(n % 3), Note::sized(n, 2000)) {
            Ok(receipt) => {
                accepted += 1;
                match receipt.durable().wait_until(soon().unwrap()) {
                    Ok(()) => {
                        assert!(receipt.is_durable() && receipt.is_appended());
                        assert!(engine.failures().is_empty() || durable == n, "acknowledged after the failure");
                        durable = n + 1;
                    }
                    Err(WaitError::ShardFailed(_)) => break,
                    Err(other) => panic!("event {n}: {other}"),
                }
            }
            Err(Rejected::ShardFailed(event, _)) => {
                assert_eq!(event.n, n, "the event comes back");
                break;
            }
            Err(other) => panic!("event {n}: {other:?}"),
        }
    }
    (durable, accepted)
}

/// Checks that every call returns the failure. Returns the number of events accepted until the shard closed its lanes;
/// none of the later ones is acknowledged.
fn assert_all_calls_fail(engine: &EventLog<Note>, durable: u64, before: u64, what: &str) -> u64 {
    let end = soon().unwrap();
    let mut producer = engine.producer();
    let mut accepted = before;
    while let Ok(receipt) = producer.publish(Key(accepted % 3), Note::sized(accepted, 2000)) {
        accepted += 1;
        assert!(matches!(receipt.durable().wait(), Err(WaitError::ShardFailed(_))), "{what}");
        assert!(!receipt.is_durable(), "{what}");
        assert!(Instant::now() < end, "{what}: a failed shard keeps accepting events");
    }
    // The flush succeeds if every accepted event was durable before.
    let flushed = engine.flush(soon());
    assert!(
        matches!(flushed, Err(WaitError::ShardFailed(_))) || flushed.is_ok() && accepted == durable,
        "{what}: {flushed:?}"
    );
    assert!(matches!(engine.shutdown(soon()), Err(WaitError::ShardFailed(_))), "{what}");
    accepted
}

fn after_power_cut(storage: &FaultyStorage, unsynced: Unsynced, durable: u64, accepted: u64, what: &str) -> u64 {
    // Disarms faults that have not happened yet.
    storage.fail_sync(1 << 60);
    storage.fail_operation(1 << 60);
    storage.crash(unsynced);
    let engine = open_on(storage, small("/s")).unwrap_or_else(|error| panic!("{what}: {error}"));
    let found = numbers(&engine);
    assert_eq!(found, (0..found.len() as u64).collect::<Vec<_>>(), "{what}: no event is invented or out of order");
    assert!(found.len() as u64 >= durable, "{what}: {} found of {durable} durable", found.len());
    assert!(found.len() as u64 <= accepted, "{what}: {} found of {accepted} accepted", found.len());
    for (i, held) in read_shard(&engine, 0).iter().enumerate() {
        assert_eq!(held.version, i as u64 / 3 + 1, "{what}");
    }
    engine.shutdown(soon()).unwrap();
    found.len() as u64
}

#[test]
fn a_failed_sync_at_any_time_fails_the_shard_and_loses_no_acknowledged_event() {
    for n in 1..=env_number("CORELANE_SYNC_FAILURES", 60) {
        let storage = FaultyStorage::new();
        let engine = open_on(&storage, small("/s")).unwrap();
        storage.fail_sync(n);
        let (durable, mut accepted) = publish_until_failure(&engine, 0, 50 + n);
        let what = format!("sync {n}");
        let failure = engine.failures().into_iter().next().unwrap_or_else(|| panic!("{what}: no failure"));
        // The keeper syncs the header page of a segment that it prepares.
        let preparing = matches!(failure.cause, FailureCause::Storage { action: "preparing a segment", .. });
        assert!(preparing || matches!(failure.cause, FailureCause::Sync(_)), "{what}: {failure}");
        accepted = assert_all_calls_fail(&engine, durable, accepted, &what);
        drop(engine);
        let unsynced = if n % 2 == 0 { Unsynced::Lost } else { Unsynced::Random(n) };
        after_power_cut(&storage, unsynced, durable, accepted, &what);
    }
}

#[test]
fn a_failed_sync_during_reopening_is_an_error_and_loses_no_event() {
    let storage = FaultyStorage::new();
    let engine = open_on(&storage, small("/s")).unwrap();
    let (mut durable, _) = publish_until_failure(&engine, 0, 60);
    drop(engine);
    for n in 1..20 {
        storage.fail_sync(n);
        let mut accepted = durable;
        if let Ok(engine) = open_on(&storage, small("/s")) {
            (durable, accepted) = publish_until_failure(&engine, durable, 10);
        }
        durable = after_power_cut(&storage, Unsynced::Random(n), durable, accepted, &format!("sync {n} of opening"));
    }
}

#[test]
fn a_failed_operation_at_any_time_is_a_typed_error_and_loses_no_acknowledged_event() {
    let (mut refused_open, mut failed) = (0, 0);
    for n in 1..=env_number("CORELANE_OPERATION_FAILURES", 70) {
        let storage = FaultyStorage::new();
        storage.fail_operation(n);
        let what = format!("operation {n}");
        let (mut durable, mut accepted) = (0, 0);
        match open_on(&storage, small("/s")) {
            Ok(engine) => {
                (durable, accepted) = publish_until_failure(&engine, 0, 100);
                if let Some(failure) = engine.failures().first() {
                    failed += 1;
                    assert!(matches!(failure.cause, FailureCause::Storage { .. }), "{what}: {failure}");
                    accepted = assert_all_calls_fail(&engine, durable, accepted, &what);
                }
            }
            Err(corelane::OpenError::Io { .. }) => refused_open += 1,
            Err(error) => panic!("{what}: {error}"),
        }
        after_power_cut(
            &storage,
            if n % 2 == 0 { Unsynced::Lost } else { Unsynced::Random(n) },
            durable,
            accepted,
            &what,
        );
    }
    assert!(refused_open > 3 && failed > 3, "{refused_open} {failed}");
}

#[test]
fn publishers_that_wait_for_space_are_refused_at_shutdown() {
    // The disk is full, the shard sleeps, the ring is full, and then the engine shuts down.
    let storage = FaultyStorage::new();
    storage.set_space(Some(2 * crate::common::SEGMENT));
    let engine = open_on(&storage, small("/s").durability(corelane::Durability::OsCache)).unwrap();
    std::thread::scope(|scope| {
        let publisher = scope.spawn(|| {
            let mut producer = engine.producer();
            for n in 0.. {
                if let Err(rejected) = producer.publish_until(Key(1), Note::sized(n, 3000), soon().unwrap()) {
                    return rejected;
                }
            }
            unreachable!("the disk is full")
        });
        std::thread::sleep(Duration::from_millis(300));
        let flush = engine.flush(Some(Instant::now() + Duration::from_millis(200)));
        assert!(matches!(flush, Err(WaitError::TimedOut)), "{flush:?}: accepted events cannot be appended");
        // The full disk keeps events from being appended, for which a flush waits. The shutdown refuses the publisher.
        let engine = &engine;
        let closer = scope.spawn(move || engine.shutdown(Some(Instant::now() + Duration::from_secs(1))));
        let rejected = publisher.join().unwrap();
        assert!(matches!(rejected, Rejected::Closed(_)), "{rejected:?}");
        assert!(closer.join().unwrap().is_err());
    });
    storage.set_space(None);
}

#[test]
fn a_publisher_that_waits_for_a_full_disk_is_refused_after_a_failed_sync() {
    let storage = FaultyStorage::new();
    storage.set_space(Some(2 * crate::common::SEGMENT));
    let engine =
        open_on(&storage, small("/s").durability(corelane::Durability::Periodic(Duration::from_millis(400)))).unwrap();
    storage.fail_sync(2);
    let mut producer = engine.producer();
    let mut n = 0;
    let rejected = loop {
        match producer.publish_until(Key(1), Note::sized(n, 3000), soon().unwrap()) {
            Ok(_) => n += 1,
            Err(rejected) => break rejected,
        }
    };
    assert!(matches!(rejected, Rejected::ShardFailed(..)), "{rejected:?}");
}

#[test]
fn a_flush_covers_the_other_shards_when_one_has_failed() {
    let storage = FaultyStorage::new();
    let engine = open_on(&storage, small("/s").shards(3).durability(corelane::Durability::OsCache)).unwrap();
    let key_of = |shard: u16| (0..).map(Key).find(|key| key.shard(3).0 == shard).unwrap();
    let mut producer = engine.producer();
    for shard in 0..3 {
        producer.publish(key_of(shard), Note::new(0)).unwrap().appended().wait().unwrap();
    }
    settle(&storage);
    storage.fail_sync(1);
    let lost = engine.flush(soon());
    let Err(WaitError::ShardFailed(failure)) = lost else { panic!("{lost:?}") };
    assert_eq!(engine.failures().len(), 1);
    // Every event of the other two shards is durable when the flush returns.
    for shard in engine.shard_metrics() {
        assert_eq!(shard.durable_to >= shard.appended_to, shard.shard != failure.shard, "{shard:?}");
    }
    // The same again, with a shard that has already failed.
    let receipts: Vec<_> =
        (0..3).filter(|&n| n != failure.shard.0).map(|n| producer.publish(key_of(n), Note::new(1)).unwrap()).collect();
    assert!(matches!(engine.flush(soon()), Err(WaitError::ShardFailed(_))));
    assert!(receipts.iter().all(corelane::Receipt::is_durable));
}

#[test]
fn a_shard_that_fails_leaves_the_others_running() {
    let storage = FaultyStorage::new();
    let engine = open_on(&storage, small("/s").shards(4)).unwrap();
    let mut producer = engine.producer();
    let key_of = |shard: u16| (0..).map(Key).find(|key| key.shard(4).0 == shard).unwrap();
    settle(&storage);
    for shard in 0..4 {
        producer.publish(key_of(shard), Note::new(1000)).unwrap().durable().wait().unwrap();
    }
    // Waits until the keeper has synced the segments that it prepares.
    settle(&storage);
    storage.fail_sync(1);
    let first = producer.publish(key_of(2), Note::new(1)).unwrap();
    assert!(matches!(first.durable().wait(), Err(WaitError::ShardFailed(failure)) if failure.shard.0 == 2));
    for shard in [0, 1, 3] {
        for n in 0..200 {
            producer.publish(key_of(shard), Note::new(n)).unwrap();
        }
        producer.publish(key_of(shard), Note::new(200)).unwrap().durable().wait_until(soon().unwrap()).unwrap();
        assert_eq!(read_shard(&engine, shard).len(), 202);
    }
    assert_eq!(engine.failures().len(), 1);
    assert!(matches!(engine.shutdown(soon()), Err(WaitError::ShardFailed(_))));
    drop(engine);
    storage.crash(Unsynced::Lost);
    let engine = open_on(&storage, small("/s").shards(4)).unwrap();
    assert!(engine.recovery().events() >= 603);
}
