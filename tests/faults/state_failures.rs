//! States, snapshots and checkpoints while the disk fails, is full or hangs: right states or a typed error, no call
//! hangs, and checkpoints that retention needs are retried.

use std::time::{Duration, Instant};

use crate::common::bank::{Account, Money, Order, Refused};
use crate::common::{SEGMENT, env_number, settle, small, soon};
use corelane::error::HistoryError;
use corelane::testing::{FaultyStorage, Unsynced};
use corelane::{CommandError, Config, Durability, Engine, Key, OpenError, Retention, Version, WaitError};

fn open(storage: &FaultyStorage, config: Config) -> Result<Engine<Account>, OpenError> {
    Engine::<Account>::builder(config).faulty_storage(storage).open()
}

fn keeping(segments: u64) -> Retention {
    Retention::bytes(segments * SEGMENT)
}

fn note(bytes: usize) -> Money {
    Money::Noted { text: "x".repeat(bytes) }
}

fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = soon().unwrap();
    while !is_so() {
        assert!(Instant::now() < deadline, "{what} does not happen");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Runs `body` on a thread of its own and aborts the process if it hangs.
fn in_time<T: Send>(what: &str, body: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let running = scope.spawn(body);
        let deadline = soon().unwrap();
        while !running.is_finished() {
            if Instant::now() >= deadline {
                eprintln!("this hangs: {what}");
                // The thread cannot be ended.
                std::process::abort();
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        running.join().unwrap()
    })
}

#[test]
fn a_checkpoint_completes_although_events_keep_coming() {
    let storage = FaultyStorage::new();
    let engine = open(&storage, small("/s").durability(Durability::OsCache).shards(2)).unwrap();
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut producer = engine.producer();
            for n in 0.. {
                if stop.load(std::sync::atomic::Ordering::SeqCst) {
                    break;
                }
                producer.publish(Key(n % 7), Money::Deposited { cents: n }).unwrap();
            }
        });
        let (began, mut failed) = (Instant::now(), None);
        while began.elapsed() < Duration::from_secs(1) && failed.is_none() {
            failed = engine.checkpoint(soon()).err();
        }
        stop.store(true, std::sync::atomic::Ordering::SeqCst);
        assert!(failed.is_none(), "{failed:?}");
    });
}

#[test]
fn a_failed_checkpoint_counts_once_and_the_next_one_succeeds() {
    let storage = FaultyStorage::new();
    let engine = open(&storage, small("/s").durability(Durability::OsCache).keys_expected(100_000)).unwrap();
    let mut producer = engine.producer();
    for n in 0..3000 {
        producer.publish(Key(n), Money::Deposited { cents: n }).unwrap();
    }
    engine.flush(soon()).unwrap();
    for failures in 1..=20 {
        producer.publish(Key(1), Money::Deposited { cents: 1 }).unwrap().appended().wait().unwrap();
        storage.refuse_side_files(true);
        assert!(matches!(engine.checkpoint(soon()), Err(WaitError::CheckpointFailed)));
        storage.refuse_side_files(false);
        engine.checkpoint(soon()).unwrap();
        assert_eq!(engine.snapshot_stats().checkpoints_failed, failures);
    }
}

#[test]
fn states_can_be_read_while_a_command_waits_for_a_full_disk() {
    let storage = FaultyStorage::new();
    storage.set_space(Some(2 * SEGMENT));
    let engine = open(&storage, small("/s")).unwrap();
    let mut client = engine.client();
    eventually("the disk is full", || {
        // The last command is not answered.
        let order = Order::Notes { count: 3, bytes: 10_000 };
        drop(client.send(Key(1), order).wait_until(Instant::now() + Duration::from_millis(300)));
        engine.shard_metrics()[0].storage_full
    });
    in_time("a question while a command waits", || {
        let (state, version) = engine.state(Key(1)).wait().unwrap().unwrap();
        assert_eq!(state.notes, version.get());
        assert_eq!(engine.state_at(Key(1), version).unwrap().state, state);
    });
    storage.set_space(None);
    engine.flush(soon()).unwrap();
}

#[test]
fn a_command_that_waits_for_a_full_disk_survives_its_client() {
    for _ in 0..30 {
        let storage = FaultyStorage::new();
        storage.set_space(Some(2 * SEGMENT));
        let engine = open(&storage, small("/s").durability(Durability::OsCache)).unwrap();
        let mut sent = 0;
        for _ in 0..8 {
            // Each client sends one command and is dropped at once. Four of the commands fit.
            let mut client = engine.client();
            client.send(Key(1), Order::Notes { count: 2, bytes: 15_000 }).tell().unwrap();
            drop(client);
            sent += 2;
            std::thread::sleep(Duration::from_millis(2));
        }
        storage.set_space(None);
        eventually("every command is appended", || {
            assert!(engine.failures().is_empty(), "{:?}", engine.failures());
            engine.state(Key(1)).wait().unwrap().is_some_and(|(state, _)| state.notes == sent)
        });
    }
}

#[test]
fn a_checkpoint_that_retention_needs_is_retried_while_the_engine_is_idle() {
    for durability in [Durability::GroupCommit, Durability::OsCache] {
        let storage = FaultyStorage::new();
        let engine =
            open(&storage, small("/s").durability(durability).retention(keeping(2)).snapshot_every(0)).unwrap();
        let mut producer = engine.producer();
        // Every checkpoint fails for a while, because its file cannot be created.
        let deadline = soon().unwrap();
        let mut n = 0;
        while engine.snapshot_stats().checkpoints_failed < 3 || engine.shard_metrics()[0].segments < 5 {
            assert!(Instant::now() < deadline, "{:?}", engine.snapshot_stats());
            storage.refuse_side_files(true);
            producer.publish(Key(n % 3), note(3000)).unwrap();
            n += 1;
        }
        engine.flush(soon()).unwrap();
        // Waits until every thread sleeps.
        settle(&storage);
        storage.refuse_side_files(false);
        eventually("retention continues", || engine.shard_metrics()[0].segments <= 2);
        assert!(engine.failures().is_empty());
        assert!(engine.compare().unwrap().differing.is_empty());
    }
}

#[test]
fn a_full_disk_under_retention_that_needs_a_checkpoint_recovers_by_itself() {
    // Space for the segments that retention keeps and few more, so that freed ones must be reused.
    for segments in 3..6 {
        let storage = FaultyStorage::new();
        storage.set_space(Some(segments * SEGMENT));
        let config = || small("/s").retention(keeping(2)).snapshot_every(7);
        let engine = open(&storage, config()).unwrap();
        let mut producer = engine.producer();
        for n in 0..400_u64 {
            let publish = producer.publish_until(Key(n % 5), note(3000), soon().unwrap());
            publish.unwrap_or_else(|error| panic!("{segments} segments, event {n}: {error:?}"));
        }
        let mut client = engine.client();
        for _ in 0..50 {
            let order = Order::Notes { count: 4, bytes: 3000 };
            client.send(Key(1), order).wait_until(soon().unwrap()).unwrap();
        }
        // Publishes until the shutdown, which must append the accepted events.
        for n in 0..60_u64 {
            producer.publish_until(Key(n % 5), note(3000), soon().unwrap()).unwrap();
        }
        in_time("the shutdown", || engine.shutdown(soon()).unwrap());
        drop(engine);
        let engine = open(&storage, config()).unwrap();
        for key in 0..5 {
            let (state, version) = engine.state(Key(key)).wait().unwrap().unwrap();
            let events = 80 + 12 + if key == 1 { 200 } else { 0 };
            assert_eq!((state.notes, version), (events, Version(events)), "key {key}");
        }
    }
}

/// By key, the number of published events, which deposit 1, 2, 3, …, and of events acknowledged as durable.
#[derive(Default)]
struct Published([(u64, u64); 3]);

impl Published {
    /// Fills several segments, with snapshots, checkpoints and retention in between. Ends at the first refusal.
    fn fill(&mut self, engine: &Engine<Account>) -> Result<(), Box<dyn std::error::Error>> {
        let mut producer = engine.producer();
        for round in 0..8 {
            for _ in 0..40 {
                for (key, (published, _)) in (0..).zip(&mut self.0) {
                    let event = Money::Deposited { cents: *published + 1 };
                    producer.publish_until(Key(key), event, soon().unwrap()).map_err(|rejected| rejected.reason())?;
                    *published += 1;
                }
                // Fills the log with events of an unchecked key.
                producer.publish_until(Key(9), note(800), soon().unwrap()).map_err(|rejected| rejected.reason())?;
            }
            if round % 3 == 1 {
                match engine.checkpoint(soon()) {
                    Ok(()) | Err(WaitError::CheckpointFailed) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            engine.flush(soon())?;
            self.0.iter_mut().for_each(|(published, durable)| *durable = *published);
        }
        Ok(())
    }

    /// Checks that every state is an earlier one, and not older than the acknowledged one.
    fn check(&mut self, engine: &Engine<Account>) {
        for (key, (published, durable)) in (0..).zip(&mut self.0) {
            let (state, version) = engine.state(Key(key)).wait().unwrap().unwrap_or((Account::default(), Version(0)));
            let version = version.get();
            assert!((*durable..=*published).contains(&version), "key {key}: {version} in {durable}..={published}");
            assert_eq!(state.cents, version * (version + 1) / 2, "key {key} at {version}");
            for version in 0..=version {
                match engine.state_at(Key(key), Version(version)) {
                    Ok(past) => assert_eq!(past.state.cents, version * (version + 1) / 2, "key {key} at {version}"),
                    Err(HistoryError::BeyondRetention { earliest, .. }) => assert!(earliest.get() > version),
                    Err(error) => panic!("key {key} at {version}: {error}"),
                }
            }
            (*published, *durable) = (version, version);
        }
    }
}

/// Runs with one failure, placed by `fail`, while states are saved and segments freed, and checks the store after it.
fn with_failure(what: &str, durability: Durability, fail: impl Fn(&FaultyStorage)) -> bool {
    let config = || small("/s").durability(durability).retention(keeping(2)).snapshot_every(7);
    let storage = FaultyStorage::new();
    let engine = open(&storage, config()).unwrap();
    let mut published = Published::default();
    fail(&storage);
    let outcome = in_time(what, || published.fill(&engine).map_err(|error| error.to_string()));
    // Disarms faults that have not happened yet.
    storage.fail_operation(1 << 40);
    storage.fail_sync(1 << 40);
    let failures = engine.failures();
    assert!(outcome.is_ok() || !failures.is_empty(), "{what}: {outcome:?}, {failures:?}");
    if failures.is_empty() {
        published.check(&engine);
        eventually("retention continues", || engine.shard_metrics()[0].segments <= 2);
        assert!(engine.compare().unwrap().differing.is_empty(), "{what}");
    }
    let ended = in_time(what, || engine.shutdown(soon()));
    assert_eq!(ended.is_err(), !engine.failures().is_empty(), "{what}: {ended:?}");
    let failed = !engine.failures().is_empty();
    drop(engine);
    // In `OsCache` mode the log may be unsynced unless the shutdown succeeded, so only the state after a kill is
    // checked.
    let killed = FaultyStorage::with_files(storage.files());
    let disks = match durability {
        Durability::OsCache if ended.is_err() => vec![killed],
        _ => vec![storage.after_crash(Unsynced::Lost), storage.after_crash(Unsynced::Random(7)), killed],
    };
    for disk in disks {
        let engine = open(&disk, config()).unwrap_or_else(|error| panic!("{what}: {error}"));
        let mut left = Published(published.0);
        left.check(&engine);
        // The store keeps working.
        in_time(what, || left.fill(&engine).map_err(|error| error.to_string())).unwrap();
        left.check(&engine);
        engine.shutdown(soon()).unwrap();
    }
    failed
}

/// The numbers of the operations to fail, out of `count`.
fn places(count: u64) -> impl Iterator<Item = u64> {
    let step = env_number("CORELANE_FAILURE_STEP", 13);
    // All of the first ones, which belong to opening, and then a sample.
    (1..20).chain((20..count).step_by(step as usize))
}

#[test]
fn an_operation_that_fails_while_states_are_saved_ends_in_right_states_or_a_typed_error() {
    for durability in [Durability::GroupCommit, Durability::OsCache] {
        let mut failed = 0;
        for n in places(160) {
            let what = format!("operation {n} in {durability:?}");
            failed += u64::from(with_failure(&what, durability, |storage| storage.fail_operation(n)));
        }
        assert!(failed > 0, "no operation of the log failed");
    }
}

#[test]
fn a_sync_that_fails_while_states_are_saved_ends_in_right_states_or_a_typed_error() {
    let mut failed = 0;
    for n in places(60) {
        let what = format!("sync {n}");
        failed += u64::from(with_failure(&what, Durability::GroupCommit, |storage| storage.fail_sync(n)));
    }
    assert!(failed > 0, "no sync of the log failed");
}

#[test]
fn a_stream_overtaken_by_retention_keeps_returning_the_error() {
    let storage = FaultyStorage::new();
    let engine = open(&storage, small("/s").retention(keeping(2))).unwrap();
    let mut producer = engine.producer();
    // Slightly more than one segment, so that no segment is freed yet.
    for _ in 0..25 {
        producer.publish(Key(1), note(3000)).unwrap();
    }
    engine.flush(soon()).unwrap();
    let mut stream = engine.stream(Key(1), Version(1)).unwrap();
    for _ in 0..100 {
        producer.publish(Key(2), note(3000)).unwrap();
    }
    engine.flush(soon()).unwrap();
    eventually("retention frees the first event", || engine.state_at(Key(1), Version(1)).is_err());
    for _ in 0..3 {
        let gone = stream.next();
        assert!(matches!(gone, Err(corelane::ReadError::BeyondRetention { .. })), "{:?}", gone.map(|_| ()));
    }
}

#[test]
fn outcomes_of_keys_without_events_are_remembered_across_a_checkpoint() {
    let storage = FaultyStorage::new();
    let config = || small("/s").outcomes_kept(2);
    let engine = open(&storage, config()).unwrap();
    let mut client = engine.client();
    for key in 0..200 {
        let rejected = client.send(Key(key), Order::Withdraw(key + 1)).once(7).wait();
        assert!(matches!(rejected, Err(CommandError::Rejected(_))));
        let done = client.send(Key(key), Order::Nothing).once(8).wait().unwrap();
        assert_eq!((done.version, done.events), (Version(0), 0));
    }
    // One of the keys gets an event before the checkpoint, and one after it.
    client.send(Key(3), Order::Deposit(1000)).wait().unwrap();
    engine.checkpoint(soon()).unwrap();
    client.send(Key(4), Order::Deposit(1000)).wait().unwrap();
    for _ in 0..3 {
        engine.checkpoint(soon()).unwrap();
    }
    drop(client);
    engine.shutdown(soon()).unwrap();
    drop(engine);
    for _ in 0..2 {
        let engine = open(&storage, config()).unwrap();
        assert_eq!(engine.recovery().shards[0].keys, 2);
        let mut client = engine.client();
        for key in 0..200 {
            match client.send(Key(key), Order::Withdraw(key + 1)).once(7).wait() {
                Err(CommandError::Rejected(Refused::NotEnough { missing })) => assert_eq!(missing, key + 1),
                other => panic!("key {key}: {other:?}"),
            }
            assert!(client.send(Key(key), Order::Nothing).once(8).wait().unwrap().repeated);
        }
        engine.checkpoint(soon()).unwrap();
    }
}

#[test]
fn a_shutdown_writes_the_snapshots_of_the_last_events() {
    for _ in 0..20 {
        let storage = FaultyStorage::new();
        let config = || small("/s").snapshot_every(1).ring_capacity(256);
        let engine = open(&storage, config()).unwrap();
        let mut producer = engine.producer();
        let mut batch: Vec<_> = (0..200).map(|cents| (Key(1), Money::Deposited { cents })).collect();
        producer.publish_batch(&mut batch).unwrap();
        engine.shutdown(soon()).unwrap();
        assert_eq!(engine.snapshot_stats().skipped, 0);
        drop(engine);
        let engine = open(&storage, config()).unwrap();
        for version in 1..=200 {
            assert_eq!(engine.state_at(Key(1), Version(version)).unwrap().applied, 0, "version {version}");
        }
    }
}

#[test]
fn a_state_can_be_read_while_its_snapshots_are_taken() {
    // Large states fill a chunk in the middle of a batch, so a snapshot is saved before its event can be read.
    let storage = FaultyStorage::new();
    let config = small("/s").segment_bytes(1 << 20).snapshot_every(2).ring_capacity(4096).batch_max(4096);
    let engine = Engine::<Big>::builder(config).faulty_storage(&storage).open().unwrap();
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut producer = engine.producer();
            for round in 0..400 {
                let mut batch: Vec<_> = (0..500).map(|n| (Key(1), Money::Deposited { cents: n + round })).collect();
                producer.publish_batch(&mut batch).unwrap();
            }
            stop.store(true, std::sync::atomic::Ordering::SeqCst);
        });
        let mut answers = 0;
        while !stop.load(std::sync::atomic::Ordering::SeqCst) {
            let Some((_, newest)) = engine.state(Key(1)).wait().unwrap() else { continue };
            for back in 0..4 {
                let version = Version(newest.get().saturating_sub(back));
                let past = engine.state_at(Key(1), version).unwrap();
                assert_eq!(past.state.events, version.get());
                answers += 1;
            }
        }
        assert!(answers > 0);
    });
}

/// A state of 4 KiB.
#[derive(rkyv::Archive, rkyv::Serialize, rkyv::Deserialize, corelane::Bounded, Debug, Clone, PartialEq)]
struct Big {
    events: u64,
    rest: Vec<u64>,
}

impl Default for Big {
    fn default() -> Self {
        Self { events: 0, rest: vec![7; 500] }
    }
}

impl corelane::Aggregate for Big {
    type Event = Money;
    type Command = ();
    type Rejection = ();

    fn evolve(&mut self, _: &crate::common::bank::ArchivedMoney, _: &corelane::Meta) {
        self.events += 1;
    }

    fn decide(&self, (): (), _: &mut corelane::Emit<Money>) -> Result<(), ()> {
        Ok(())
    }
}
