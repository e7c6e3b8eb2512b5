//! Resources exhausted for a while (descriptors, memory, quota, space) and interrupted calls are backpressure like a
//! full disk: no shard fails, and the engine continues by itself.

use std::fs::File;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::common::bank::{Account, Money};
use crate::common::own_process::is_own_process;
use crate::common::{ArchivedNote, Note, SEGMENT, fill, numbers, open_on, os_cache, small, soon, until};
use corelane::consumer::{Consumer, HealthPolicy, Retry};
use corelane::error::{GateError, HistoryError, RejectedReason};
use corelane::ingress::{Accepted, GatePolicy, GatedProducer};
use corelane::testing::FaultyStorage;
use corelane::{
    Config, Engine, EventLog, HandlerError, Key, Meta, OnError, ReadError, Rejected, Retention, ShardId, Version,
};
use rustix::io::Errno;

const REASONS: [Errno; 6] = [Errno::MFILE, Errno::NFILE, Errno::NOMEM, Errno::DQUOT, Errno::INTR, Errno::NOSPC];

fn config() -> Config {
    small("/s").retention(Retention::bytes(2 * SEGMENT)).spares_max(1)
}

/// Every writer of files: an inline handler whose failures are recorded, a consumer with dead letters, a gate,
/// checkpoints.
struct Busy {
    engine: EventLog<Note>,
    consumer: Consumer<Note>,
    gate: GatedProducer<Note>,
}

const EVENTS: u64 = 120;

fn is_noted(n: u64) -> bool {
    n % 20 == 3
}

fn is_parked(n: u64) -> bool {
    n % 20 == 7
}

impl Busy {
    fn open(storage: &FaultyStorage) -> Self {
        let fails = |_: ShardId| {
            |event: &ArchivedNote, _: &Meta| -> Result<(), HandlerError> {
                if is_noted(event.n.to_native()) { Err("noted".into()) } else { Ok(()) }
            }
        };
        let builder = EventLog::<Note>::builder(config()).handler("h", OnError::Quarantine, fails);
        let engine = builder.faulty_storage(storage).open().unwrap();
        let once = Retry::fixed().base(Duration::from_millis(1)).jitter(1.0, 1.0).attempts(1);
        let patient = HealthPolicy::default().consecutive_max(1_000_000).failure_percent_max(100);
        let builder = engine.consumer("c").retry(once).health(patient).checkpoint_every(Duration::from_millis(1));
        let consumer = builder.start(|event: &ArchivedNote, _: &Meta| -> Result<(), HandlerError> {
            if is_parked(event.n.to_native()) { Err("parked".into()) } else { Ok(()) }
        });
        let gate = engine.gated("g", GatePolicy::default().gap_wait_max(Duration::from_millis(1)), |_| None).unwrap();
        Self { consumer: consumer.unwrap(), gate, engine }
    }

    /// Publishes until the storage is exhausted, heals it after a while, and publishes the rest.
    fn run(mut self, storage: &FaultyStorage, what: &str) {
        let mut producer = self.engine.producer();
        assert!(matches!(self.gate.offer(1, 5, Key(1), Note::new(0)).unwrap(), Accepted::Buffered));
        let mut is_healed = false;
        let mut exhausted_at = None;
        for n in 0..EVENTS {
            loop {
                let patience = Instant::now() + Duration::from_millis(10);
                match producer.publish_until(Key(n), Note::sized(n, 3000), patience) {
                    Ok(_) => break,
                    Err(Rejected::Full(_) | Rejected::StorageFull(_)) => {}
                    Err(other) => panic!("{what}: {other:?}"),
                }
                if storage.is_exhausted() {
                    exhausted_at.get_or_insert_with(Instant::now);
                }
                // Long enough for every operation to be retried.
                if !is_healed && exhausted_at.is_some_and(|at| at.elapsed() > Duration::from_millis(250)) {
                    let shard = &self.engine.shard_metrics()[0];
                    assert_eq!(shard.storage_full, shard.storage_full_why.is_some(), "{what}");
                    is_healed = true;
                    storage.heal();
                }
            }
            match self.gate.pump() {
                Ok(_) | Err(GateError::Publish(RejectedReason::Full | RejectedReason::StorageFull)) => {}
                Err(error) => panic!("{what}: {error}"),
            }
        }
        storage.heal();
        self.engine.flush(soon()).unwrap();
        until("the gap is recorded", || {
            self.gate.pump().unwrap();
            self.gate.gaps().unwrap().len() == 1
        });
        self.engine.flush(soon()).unwrap();
        assert!(self.consumer.drain(soon()).is_ok(), "{what}: {:?}", self.consumer.report());
        self.consumer.save().unwrap();
        self.gate.save(soon()).unwrap();
        self.engine.checkpoint(soon()).unwrap();
        assert_eq!(self.consumer.report().letters.letters, (0..EVENTS).filter(|n| is_parked(*n)).count(), "{what}");
        assert_eq!(self.engine.failures().len(), 0, "{what}");
        until("retention continues", || self.engine.shard_metrics()[0].segments <= 3);
        until("the shard is no longer waiting", || !self.engine.shard_metrics()[0].storage_full);
        let Self { engine, consumer, gate } = self;
        drop((consumer, gate, producer));
        engine.shutdown(soon()).unwrap();
        assert_eq!(engine.shard_metrics()[0].sequence.0, EVENTS + 1, "{what}");
        drop(engine);
        let files = storage.files();
        let notes = files.iter().find(|(path, _)| path.ends_with("handlers.jsonl")).unwrap().1;
        let noted = String::from_utf8(notes.clone()).unwrap();
        assert_eq!(
            noted.lines().count(),
            (0..EVENTS).filter(|n| is_noted(*n)).count(),
            "{what}: each failure is recorded once"
        );
        let engine = open_on(storage, config()).unwrap();
        assert_eq!(engine.shard_metrics()[0].sequence.0, EVENTS + 1, "{what}");
        let spares = files.keys().filter(|path| path.to_string_lossy().contains("spare-")).count();
        assert!(spares <= 2, "{what}: unused files are removed");
    }
}

#[test]
fn the_engine_continues_after_a_resource_was_exhausted_at_any_operation() {
    let next = std::sync::atomic::AtomicU64::new(1);
    std::thread::scope(|scope| {
        // Each of the threads sleeps most of its time.
        for _ in 0..8 {
            scope.spawn(|| {
                loop {
                    let n = next.fetch_add(1, Ordering::SeqCst);
                    if n > 64 {
                        break;
                    }
                    let storage = FaultyStorage::new();
                    let busy = Busy::open(&storage);
                    let errno = REASONS[n as usize % REASONS.len()];
                    storage.exhaust(n, errno.raw_os_error());
                    busy.run(&storage, &format!("{errno} from operation {n} on"));
                }
            });
        }
    });
}

#[test]
fn saved_states_that_cannot_be_opened_for_now_do_not_count_as_unreadable() {
    let storage = FaultyStorage::new();
    let engine = Engine::<Account>::builder(small("/s").snapshot_every(10)).faulty_storage(&storage).open().unwrap();
    let mut producer = engine.producer();
    for cents in 1..=50 {
        producer.publish(Key(1), Money::Deposited { cents }).unwrap();
    }
    engine.flush(soon()).unwrap();
    until("the snapshots are saved", || engine.snapshot_stats().count == 5);
    storage.exhaust(1, Errno::MFILE.raw_os_error());
    let error = engine.state_at(Key(1), Version(25)).unwrap_err();
    assert!(matches!(error, HistoryError::Read(ReadError::Io { .. })), "{error}");
    storage.heal();
    let past = engine.state_at(Key(1), Version(25)).unwrap();
    assert_eq!((past.state.cents, past.applied), (25 * 26 / 2, 5), "from the snapshot");
    assert_eq!(engine.snapshot_stats().unreadable, 0);
}

#[test]
fn a_process_without_free_descriptors_is_backpressure_until_some_are_free() {
    if !is_own_process("exhausted::a_process_without_free_descriptors_is_backpressure_until_some_are_free") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let engine = EventLog::<Note>::open(os_cache(dir.path())).unwrap();
    let handled = std::sync::Arc::new(std::sync::atomic::AtomicU64::new(0));
    let count = std::sync::Arc::clone(&handled);
    let builder = engine.consumer("c").checkpoint_every(Duration::from_millis(1));
    let consumer = builder.start(move |_: &ArchivedNote, _: &Meta| {
        count.fetch_add(1, Ordering::SeqCst);
        Ok(())
    });
    let consumer = consumer.unwrap();
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let low = rustix::process::Rlimit { current: Some(64), maximum: limit.maximum };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, low).unwrap();
    // Also takes every descriptor that the engine closes.
    let (taken, is_over) = (Mutex::new(Vec::new()), AtomicBool::new(false));
    let accepted = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::SeqCst) {
                match File::open("/dev/null") {
                    Ok(file) => taken.lock().unwrap().push(file),
                    Err(error) => {
                        assert_eq!(error.raw_os_error(), Some(Errno::MFILE.raw_os_error()));
                        std::thread::sleep(Duration::from_micros(50));
                    }
                }
            }
        });
        let accepted = fill(&engine, 0);
        is_over.store(true, Ordering::SeqCst);
        accepted
    });
    let shard = engine.shard_metrics().remove(0);
    let why = shard.storage_full_why.unwrap();
    assert!(shard.storage_full && why.contains("Too many open files"), "{why}");
    until("every appended event is handled", || consumer.report().unread == 0);
    assert!(consumer.report().failure.is_none(), "a failed save is no failure of the consumer");
    drop(taken);
    rustix::process::setrlimit(rustix::process::Resource::Nofile, limit).unwrap();
    engine.flush(soon()).unwrap();
    assert_eq!(numbers(&engine), (0..accepted).collect::<Vec<_>>());
    consumer.drain(soon()).unwrap();
    assert_eq!(handled.load(Ordering::SeqCst), accepted);
    consumer.save().unwrap();
    until("the shard is no longer waiting", || !engine.shard_metrics()[0].storage_full);
    engine.shutdown(soon()).unwrap();
}
