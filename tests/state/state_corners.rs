//! Corner cases of states: times that do not rise, states that are too large, and checkpoints that fail, are lost or
//! are replaced.
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::common::bank::{Account, Money, Order};
use crate::common::{ArchivedSaid, SEGMENT, Said, settle, small, soon};
use corelane::testing::{FaultyStorage, Unsynced};
use corelane::{
    Aggregate, Bounded, CommandError, Config, Durability, Emit, Engine, Key, Meta, Retention, Time, Version, WaitError,
};
use rkyv::{Archive, Deserialize, Serialize};

fn open(storage: &FaultyStorage, config: Config) -> Engine<Account> {
    Engine::<Account>::builder(config).faulty_storage(storage).open().unwrap()
}

#[derive(Archive, Serialize, Deserialize, Bounded, Debug, Clone, Default, PartialEq)]
struct Times(Vec<u64>);

impl Aggregate for Times {
    type Event = Said;
    type Command = ();
    type Rejection = ();
    fn evolve(&mut self, event: &ArchivedSaid, _: &Meta) {
        self.0.push(event.at.to_native());
    }
    fn decide(&self, (): (), _: &mut Emit<Said>) -> Result<(), ()> {
        Ok(())
    }
}

#[test]
fn a_state_at_a_time_is_right_even_if_times_do_not_rise() {
    for (every, restarts) in [(1, false), (2, true), (3, true), (5, true), (3, false)] {
        let storage = FaultyStorage::new();
        let open = || {
            let config = small("/s").snapshot_every(every);
            Engine::<Times>::builder(config).faulty_storage(&storage).open().unwrap()
        };
        let times = [10, 40, 20, 15, 30, 22, 60, 5, 50];
        let mut engine = open();
        let mut producer = engine.producer();
        for at in times {
            producer.publish(Key(1), Said { at }).unwrap();
            if restarts {
                drop(producer);
                engine.shutdown(soon()).unwrap();
                drop(engine);
                engine = open();
                producer = engine.producer();
            }
        }
        drop(producer);
        // A shutdown writes the snapshots.
        engine.shutdown(soon()).unwrap();
        drop(engine);
        let engine = open();
        for time in 0..70 {
            let until = times.iter().position(|&at| at > time).unwrap_or(times.len());
            let past = engine.state_at(Key(1), Time(time)).unwrap();
            assert_eq!(past.state.0, times[..until], "at {time}, every {every}, restarts {restarts}");
        }
    }
}

#[test]
fn the_state_at_the_end_of_a_millisecond_includes_every_event_of_it() {
    let storage = FaultyStorage::new();
    let engine = Engine::<Times>::builder(small("/s")).faulty_storage(&storage).open().unwrap();
    let ms = 1_280_526_901_009;
    let times = [Time::unix_ms(ms), Time::new(Time::unix_ms(ms).get() + 333_333), Time::end_of_ms(ms)];
    let mut producer = engine.producer();
    for time in times.into_iter().chain([Time::unix_ms(ms + 1)]) {
        producer.publish(Key(1), Said { at: time.get() }).unwrap();
    }
    let events_at = |time| engine.state_at(Key(1), time).unwrap().state.0.len();
    engine.flush(soon()).unwrap();
    assert_eq!([Time::end_of_ms(ms - 1), Time::unix_ms(ms), Time::end_of_ms(ms)].map(events_at), [0, 1, 3]);
    assert_eq!([Time::end_of_ms(ms + 1), Time::end_of_ms(u64::MAX)].map(events_at), [4, 4]);
    let mut between = engine.events_between(Time::unix_ms(ms), Time::unix_ms(ms + 1));
    let mut found = 0;
    while between.next().unwrap().is_some() {
        found += 1;
    }
    assert_eq!(found, 3);
}

#[test]
fn with_a_smaller_outcomes_kept_the_newest_outcomes_stay() {
    let storage = FaultyStorage::new();
    let engine = open(&storage, small("/s").outcomes_kept(4));
    let mut client = engine.client();
    for id in 1..=4 {
        client.send(Key(1), Order::Deposit(1)).once(id).wait().unwrap();
    }
    engine.checkpoint(soon()).unwrap();
    drop(client);
    engine.shutdown(soon()).unwrap();
    drop(engine);
    let engine = open(&storage, small("/s").outcomes_kept(2));
    let mut client = engine.client();
    for id in 3..=4 {
        let outcome = client.send(Key(1), Order::Deposit(1)).once(id).wait().unwrap();
        assert!(outcome.repeated, "{id}: {outcome:?}");
        assert_eq!((outcome.version, outcome.events), (Version(id), 1));
    }
}

#[test]
fn an_acknowledged_checkpoint_survives_a_power_cut() {
    let storage = FaultyStorage::new();
    let config = || small("/s").durability(Durability::GroupCommit).snapshot_every(0);
    let engine = open(&storage, config());
    engine.producer().publish(Key(1), Money::Deposited { cents: 1 }).unwrap();
    engine.flush(soon()).unwrap();
    // Waits until the keeper has prepared its segments, because it syncs the folder too.
    settle(&storage);
    engine.checkpoint(soon()).unwrap();
    let disk = storage.after_crash(Unsynced::Lost);
    assert_eq!(open(&disk, config()).snapshot_stats().checkpoints, 1);
}

/// A state whose size an event sets, possibly too large to be saved.
#[derive(Archive, Serialize, Deserialize, Bounded, Debug, Clone, Default, PartialEq)]
struct Large(Vec<u8>);

impl Aggregate for Large {
    type Event = Said;
    type Command = ();
    type Rejection = ();
    fn evolve(&mut self, event: &ArchivedSaid, _: &Meta) {
        self.0.resize(event.at.to_native() as usize, 7);
    }
    fn decide(&self, (): (), _: &mut Emit<Said>) -> Result<(), ()> {
        Ok(())
    }
}

#[test]
fn a_checkpoint_that_omits_a_too_large_state_fails() {
    let storage = FaultyStorage::new();
    let open = || Engine::<Large>::builder(small("/s").snapshot_every(0)).faulty_storage(&storage).open().unwrap();
    let engine = open();
    let mut producer = engine.producer();
    producer.publish(Key(1), Said { at: 40 << 20 }).unwrap();
    producer.publish(Key(2), Said { at: 5 }).unwrap();
    engine.flush(soon()).unwrap();
    let failed = engine.checkpoint(soon());
    assert!(matches!(failed, Err(WaitError::CheckpointFailed)), "{failed:?}");
    assert_eq!((engine.snapshot_stats().checkpoints, engine.snapshot_stats().checkpoints_failed), (0, 1));
    drop(producer);
    engine.shutdown(soon()).unwrap();
    drop(engine);
    let engine = open();
    assert_eq!(engine.state(Key(1)).wait().unwrap().unwrap().0.0.len(), 40 << 20);
    // A checkpoint succeeds when the state is small again.
    let mut producer = engine.producer();
    producer.publish(Key(1), Said { at: 5 }).unwrap();
    engine.flush(soon()).unwrap();
    engine.checkpoint(soon()).unwrap();
}

/// The start and the end of the log that the newest checkpoint covers.
fn newest_checkpoint(storage: &FaultyStorage) -> (u64, u64) {
    let files = storage.files();
    let is_one = |path: &std::path::Path| path.file_name().unwrap().to_str().unwrap().starts_with("checkpoint-");
    let (_, bytes) = files.iter().rfind(|(path, _)| is_one(path)).unwrap();
    let u64_at = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    (u64_at(24), u64_at(bytes.len() - 48 + 24))
}

/// An aggregate that emits an event and then rejects.
#[derive(Archive, Serialize, Deserialize, Bounded, Debug, Clone, Default, PartialEq)]
struct Hasty(u64);

impl Aggregate for Hasty {
    type Event = Said;
    type Command = ();
    type Rejection = ();
    fn evolve(&mut self, _: &ArchivedSaid, _: &Meta) {
        self.0 += 1;
    }
    fn decide(&self, (): (), emit: &mut Emit<Said>) -> Result<(), ()> {
        emit.event(Said { at: 1 });
        Err(())
    }
}

#[test]
fn events_emitted_before_a_rejection_are_not_appended() {
    let storage = FaultyStorage::new();
    let open = || Engine::<Hasty>::builder(small("/s")).faulty_storage(&storage).open().unwrap();
    let engine = open();
    let mut client = engine.client();
    for _ in 0..2 {
        let rejected = client.send(Key(1), ()).wait();
        assert!(matches!(rejected, Err(CommandError::Rejected(()))), "{rejected:?}");
        let rejected = client.send(Key(1), ()).once(7).wait();
        assert!(matches!(rejected, Err(CommandError::Rejected(()))), "{rejected:?}");
    }
    assert_eq!(engine.state(Key(1)).wait().unwrap(), None);
    drop(client);
    engine.shutdown(soon()).unwrap();
    drop(engine);
    assert_eq!(open().recovery().events(), 0);
}

#[test]
fn retention_requests_a_checkpoint_again_after_a_failure_while_every_thread_sleeps() {
    let storage = FaultyStorage::new();
    let config = small("/s").durability(Durability::OsCache).snapshot_every(0).retention(Retention::bytes(2 * SEGMENT));
    let engine = Engine::<Large>::builder(config).faulty_storage(&storage).open().unwrap();
    let mut producer = engine.producer();
    // This state makes every checkpoint fail at its end.
    producer.publish(Key(1), Said { at: 40 << 20 }).unwrap();
    for _ in 0..5_000 {
        producer.publish(Key(2), Said { at: 5 }).unwrap();
    }
    producer.receipts()[0].appended().wait().unwrap();
    let deadline = soon().unwrap();
    while engine.snapshot_stats().checkpoints_failed < 4 {
        assert!(Instant::now() < deadline, "{:?}", engine.snapshot_stats());
        std::thread::sleep(Duration::from_millis(1));
    }
    producer.publish(Key(1), Said { at: 5 }).unwrap();
    while engine.shard_metrics()[0].segments > 2 {
        assert!(Instant::now() < deadline, "{:?}", engine.snapshot_stats());
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_checkpoint_of_events_lost_in_a_power_cut_is_forgotten_for_good() {
    let storage = FaultyStorage::new();
    let config = || small("/s").durability(Durability::OsCache).snapshot_every(0);
    let engine = open(&storage, config());
    let mut producer = engine.producer();
    let mut publish = |from: u64, until: u64| {
        for cents in from..until {
            producer.publish(Key(0), Money::Deposited { cents }).unwrap();
        }
    };
    publish(1, 101);
    let is_appended = |count| engine.shard_metrics()[0].sequence.get() == count;
    crate::common::until("appended", || is_appended(100));
    // The operating system has written back this part of the log. No event was acknowledged as durable, so none is
    // synced.
    let log = storage.files();
    publish(101, 201);
    crate::common::until("appended", || is_appended(200));
    engine.checkpoint(soon()).unwrap();
    let end = newest_checkpoint(&storage).1;
    // The checkpoint may have reached the disk, but no later part of the log.
    let is_saved = |path: &std::path::Path| path.extension().is_some_and(|extension| extension == "snp");
    let mut files = storage.files();
    files.retain(|path, _| is_saved(path));
    assert_eq!(files.len(), 1);
    files.extend(log.into_iter().filter(|(path, _)| !is_saved(path)));
    let disk = FaultyStorage::with_files(files);
    // The machine restarts.
    disk.crash(Unsynced::Lost);
    let other = open(&disk, config());
    assert_eq!(other.state(Key(0)).wait().unwrap().unwrap().1, Version(100));
    // Other events take the offsets of the lost ones and continue beyond them.
    let mut producer = other.producer();
    for _ in 0..150 {
        producer.publish(Key(0), Money::Deposited { cents: 7 }).unwrap();
    }
    drop(producer);
    other.shutdown(soon()).unwrap();
    drop(other);
    let again = open(&disk, config());
    assert!(again.recovery().shards[0].end.get() > end);
    let (state, version) = again.state(Key(0)).wait().unwrap().unwrap();
    assert_eq!((state.cents, version), (100 * 101 / 2 + 150 * 7, Version(250)));
    assert!(again.compare().unwrap().differing.is_empty());
}

#[test]
fn a_checkpoint_that_cannot_be_made_durable_does_not_count() {
    let failed = |_| {
        let storage = FaultyStorage::new();
        let engine = open(&storage, small("/s").durability(Durability::GroupCommit).snapshot_every(0));
        engine.producer().publish(Key(1), Money::Deposited { cents: 1 }).unwrap();
        engine.flush(soon()).unwrap();
        settle(&storage);
        storage.fail_sync(1);
        let results = engine.checkpoint(soon());
        storage.heal();
        // Otherwise another thread's sync failed.
        let is_alone = matches!(results, Err(WaitError::CheckpointFailed)) && engine.failures().is_empty();
        is_alone.then_some(engine)
    };
    let engine = (0..100).find_map(failed).unwrap();
    assert_eq!(engine.snapshot_stats().checkpoints, 0);
    engine.checkpoint(soon()).unwrap();
    assert!(engine.failures().is_empty());
}

#[test]
fn retention_continues_when_the_log_becomes_durable_after_its_last_segment_was_begun() {
    let storage = FaultyStorage::new();
    let config = small("/s")
        .durability(Durability::Periodic(Duration::from_secs(3)))
        .snapshot_every(0)
        .retention(Retention::bytes(2 * SEGMENT));
    let engine = open(&storage, config);
    let mut producer = engine.producer();
    let mut segments = 0;
    while segments < 6 {
        producer.publish(Key(1), Money::Noted { text: "n".repeat(3000) }).unwrap();
        producer.receipts()[0].appended().wait().unwrap();
        let now = engine.shard_metrics()[0].segments;
        if now > segments {
            // Lets the keeper prepare the next segment, check retention, and sleep.
            std::thread::sleep(Duration::from_millis(50));
            segments = now;
        }
    }
    engine.flush(soon()).unwrap();
    let deadline = soon().unwrap();
    while engine.shard_metrics()[0].segments > 3 {
        assert!(Instant::now() < deadline, "{} segments", engine.shard_metrics()[0].segments);
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn states_are_compared_while_checkpoints_are_replaced() {
    let storage = FaultyStorage::new();
    let config = small("/s").durability(Durability::OsCache).snapshot_every(0).retention(Retention::bytes(2 * SEGMENT));
    let engine = open(&storage, config);
    let mut producer = engine.producer();
    let mut publish = |count: u64| {
        for n in 0..count {
            producer.publish(Key(n % 5), Money::Noted { text: "n".repeat(900) }).unwrap();
        }
    };
    publish(600);
    engine.checkpoint(soon()).unwrap();
    while engine.shard_metrics()[0].segments_freed == 0 {
        std::thread::yield_now();
    }
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::SeqCst) {
                publish(3);
                if engine.checkpoint(soon()).is_err() {
                    break;
                }
            }
        });
        let results: Vec<_> = (0..1_500).map(|_| engine.compare().map(|compared| compared.differing.len())).collect();
        stop.store(true, Ordering::SeqCst);
        let is_right =
            |result: &_| matches!(result, Ok(0) | Err(corelane::error::HistoryError::BeyondRetention { .. }));
        let failed: Vec<_> = results.iter().filter(|result| !is_right(*result)).collect();
        assert!(failed.is_empty(), "{} of {}, the first {:?}", failed.len(), results.len(), failed[0]);
    });
}
