//! A failed sync is final: the shard stops with the cause, nothing later is acknowledged, and after the power
//! cut that may follow, every acknowledged event is there.
#![expect(clippy::unwrap_used, reason = "a test may unwrap")]

mod common;

use std::time::{Duration, Instant};

use common::{Note, env_number, numbers, open_on, read_shard, settle, small, soon};
use corelane::error::FailureCause;
use corelane::testing::{FaultyStorage, Unsynced};
use corelane::{EventLog, Key, Rejected, WaitError};

/// Publishes one by one until something fails. Returns (acknowledged as durable, accepted).
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

/// After the failure, everything says so at once. Returns how many were accepted until the shard's thread had closed
/// its lanes; none of those is acknowledged.
fn everybody_is_told(engine: &EventLog<Note>, durable: u64, before: u64, what: &str) -> u64 {
    let end = soon().unwrap();
    let mut producer = engine.producer();
    let mut accepted = before;
    while let Ok(receipt) = producer.publish(Key(accepted % 3), Note::sized(accepted, 2000)) {
        accepted += 1;
        assert!(matches!(receipt.durable().wait(), Err(WaitError::ShardFailed(_))), "{what}");
        assert!(!receipt.is_durable(), "{what}");
        assert!(Instant::now() < end, "{what}: a failed shard goes on accepting");
    }
    // Where everything accepted was durable before, that is what a flush says.
    let flushed = engine.flush(soon());
    assert!(
        matches!(flushed, Err(WaitError::ShardFailed(_))) || flushed.is_ok() && accepted == durable,
        "{what}: {flushed:?}"
    );
    assert!(matches!(engine.shutdown(soon()), Err(WaitError::ShardFailed(_))), "{what}");
    accepted
}

fn after_power_cut(storage: &FaultyStorage, unsynced: Unsynced, durable: u64, accepted: u64, what: &str) -> u64 {
    // What has not failed by now will not.
    storage.fail_sync(1 << 60);
    storage.fail_operation(1 << 60);
    storage.crash(unsynced);
    let engine = open_on(storage, small("/s")).unwrap_or_else(|error| panic!("{what}: {error}"));
    let found = numbers(&engine);
    assert_eq!(found, (0..found.len() as u64).collect::<Vec<_>>(), "{what}: nothing invented, nothing out of order");
    assert!(found.len() as u64 >= durable, "{what}: {} found of {durable} durable", found.len());
    assert!(found.len() as u64 <= accepted, "{what}: {} found of {accepted} accepted", found.len());
    for (i, held) in read_shard(&engine, 0).iter().enumerate() {
        assert_eq!(held.version, i as u64 / 3 + 1, "{what}");
    }
    engine.shutdown(soon()).unwrap();
    found.len() as u64
}

#[test]
fn a_failed_sync_at_any_time_poisons_the_shard_and_loses_nothing_acknowledged() {
    for n in 1..=env_number("CORELANE_SYNC_FAILURES", 60) {
        let storage = FaultyStorage::new();
        let engine = open_on(&storage, small("/s")).unwrap();
        storage.fail_sync(n);
        let (durable, mut accepted) = publish_until_failure(&engine, 0, 50 + n);
        let what = format!("sync {n}");
        let failure = engine.failures().into_iter().next().unwrap_or_else(|| panic!("{what}: no failure"));
        // The keeper syncs the page of a segment it prepares.
        let preparing = matches!(failure.cause, FailureCause::Storage { action: "preparing a segment", .. });
        assert!(preparing || matches!(failure.cause, FailureCause::Sync(_)), "{what}: {failure}");
        accepted = everybody_is_told(&engine, durable, accepted, &what);
        drop(engine);
        let unsynced = if n % 2 == 0 { Unsynced::Lost } else { Unsynced::Random(n) };
        after_power_cut(&storage, unsynced, durable, accepted, &what);
    }
}

#[test]
fn a_failed_sync_while_opening_again_is_an_error_and_loses_nothing() {
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
fn a_failed_operation_at_any_time_is_a_typed_error_and_loses_nothing_acknowledged() {
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
                    accepted = everybody_is_told(&engine, durable, accepted, &what);
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
fn publishers_that_wait_for_room_are_told_of_closing() {
    // The disk is full, the shard stalls and sleeps, the ring is full, and then the engine closes.
    let storage = FaultyStorage::new();
    storage.set_space(Some(2 * common::SEGMENT));
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
        assert!(matches!(flush, Err(WaitError::TimedOut)), "{flush:?}: what is accepted cannot be appended");
        // A flush waits for the appending, which the disk keeps from going on; closing refuses the publisher.
        let engine = &engine;
        let closer = scope.spawn(move || engine.shutdown(Some(Instant::now() + Duration::from_secs(1))));
        let rejected = publisher.join().unwrap();
        assert!(matches!(rejected, Rejected::Closed(_)), "{rejected:?}");
        assert!(closer.join().unwrap().is_err());
    });
    storage.set_space(None);
}

#[test]
fn a_group_commit_publisher_waiting_on_a_full_disk_is_told_of_a_failed_sync() {
    let storage = FaultyStorage::new();
    storage.set_space(Some(2 * common::SEGMENT));
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
fn a_flush_goes_on_to_the_shards_that_have_not_failed() {
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
    // Everything of the others is durable when it returns, whichever of the three failed.
    for shard in engine.metrics().shards {
        assert_eq!(shard.durable_to >= shard.appended_to, shard.shard != failure.shard, "{shard:?}");
    }
    // And again, with the failed one in front of them.
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
    // The keeper syncs the segments that it prepares.
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
