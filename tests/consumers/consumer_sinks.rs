//! Sinks that keep their position with their data hold every event once and in order, whatever fails, panics, restarts
//! or loses power. A sink that is ahead of its log ends with an error.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::common::{ArchivedNote, Note, env_number, open_on, os_cache, read_shard, small, soon, until};
use corelane::consumer::{
    Batch, ConsumerError, ConsumerReport, HaltCause, HealthPolicy, Retry, Sink, SinkConsumer, Start, prometheus,
};
use corelane::error::PositionError;
use corelane::log::Position;
use corelane::testing::{FaultyStorage, Unsynced};
use corelane::{EventLog, HandlerError, Key, Meta, OpenError, Retention, ShardId};

const SHARDS: u16 = 2;

/// The committed data, and how the next transactions end.
#[derive(Default)]
struct Committed {
    rows: BTreeMap<u16, Vec<u64>>,
    positions: BTreeMap<u16, Position>,
    random: u64,
    fails: bool,
    failures: u64,
}

impl Committed {
    fn below(&mut self, end: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % end
    }
}

/// A database on another machine, which survives crashes.
#[derive(Clone, Default)]
struct Database(Arc<Mutex<Committed>>);

impl Database {
    fn seeded(seed: u64) -> Self {
        let database = Self::default();
        database.committed().random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        database.committed().fails = true;
        database
    }

    fn committed(&self) -> MutexGuard<'_, Committed> {
        // A transaction that panics is rolled back.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Sink<Note> for Database {
    fn position(&mut self, shard: ShardId) -> Result<Option<Position>, HandlerError> {
        let mut committed = self.committed();
        if committed.fails && committed.below(5) == 0 {
            return Err("no connection".into());
        }
        Ok(committed.positions.get(&shard.0).copied())
    }

    fn apply(&mut self, batch: &mut Batch<'_, Note>) -> Result<(), HandlerError> {
        let (fate, stops_after) = {
            let mut committed = self.committed();
            let fate = if committed.fails { committed.below(12) } else { 11 };
            committed.failures += u64::from(fate < 6);
            (fate, committed.below(20))
        };
        let mut rows = Vec::new();
        assert_ne!(fate, 0, "a panic before the first event");
        while let Some(record) = batch.next()? {
            rows.push(record.event.n.to_native());
            match fate {
                1 if rows.len() as u64 > stops_after => return Err("inside".into()),
                // Commits the events so far and leaves the rest of the batch.
                6 if rows.len() as u64 > stops_after => break,
                _ => {}
            }
        }
        if fate == 2 {
            return Err("before the commit".into());
        }
        let mut committed = self.committed();
        assert_ne!(fate, 3, "a panic inside the transaction");
        let shard = batch.shard().0;
        committed.rows.entry(shard).or_default().extend(rows);
        committed.positions.insert(shard, batch.end());
        drop(committed);
        assert_ne!(fate, 4, "a panic after the commit");
        if fate == 5 { Err("the answer was lost".into()) } else { Ok(()) }
    }
}

fn start(
    engine: &EventLog<Note>,
    batch_max: usize,
    sink: Database,
    before_durable: bool,
) -> Result<SinkConsumer, ConsumerError> {
    let retry = Retry::fixed().base(Duration::from_millis(1)).jitter(1.0, 1.0).attempts(1000);
    let health = HealthPolicy::default().consecutive_max(1_000_000).failure_percent_max(100);
    let builder = engine.consumer("sink").retry(retry).health(health).save_every(Duration::from_millis(1));
    let builder = if before_durable { builder.before_durable() } else { builder };
    builder.start_sink(batch_max, sink)
}

/// The numbers of a shard's log.
fn logged(engine: &EventLog<Note>, shard: u16) -> Vec<u64> {
    read_shard(engine, shard).iter().map(|held| held.n).collect()
}

#[test]
fn a_sink_holds_every_event_once_despite_failures_restarts_and_power_cuts() {
    let (mut failures, mut cuts) = (0, 0);
    for seed in 1..=env_number("CORELANE_POWER_CUTS", 40) {
        let database = Database::seeded(seed);
        let storage = FaultyStorage::new();
        let mut next = 0;
        for life in 0..6_u64 {
            let engine = open_on(&storage, small("/s").shards(SHARDS)).unwrap();
            for shard in 0..SHARDS {
                let (rows, log) =
                    (database.committed().rows.get(&shard).cloned().unwrap_or_default(), logged(&engine, shard));
                assert!(log.starts_with(&rows), "seed {seed}, life {life}: {rows:?} of {log:?}");
            }
            let ends_hard = (seed + life) % 3 != 0;
            if ends_hard {
                storage.be_gone(1 + seed * 7 % 40 + life);
            }
            let sink = start(&engine, 1 + (seed * 5 + life) as usize % 30, database.clone(), false);
            let mut producer = engine.producer();
            for _ in 0..60 {
                let deadline = Instant::now() + Duration::from_millis(300);
                if producer.publish_until(Key(next % 11), Note::sized(next, 100), deadline).is_err() {
                    break;
                }
                next += 1;
            }
            if ends_hard {
                // Waits until the disk is gone or everything is flushed.
                drop(engine.flush(Some(Instant::now() + Duration::from_secs(2))));
                std::thread::sleep(Duration::from_millis(seed % 4));
                drop((sink, producer, engine));
                storage.crash(if life % 2 == 0 { Unsynced::Lost } else { Unsynced::Random(seed) });
                cuts += 1;
            } else {
                let sink = sink.unwrap();
                if seed % 2 == 0 {
                    sink.drain(soon()).unwrap();
                }
                sink.stop(soon()).unwrap();
                engine.shutdown(soon()).unwrap();
            }
        }
        database.committed().fails = false;
        let engine = open_on(&storage, small("/s").shards(SHARDS)).unwrap();
        let sink = start(&engine, 7, database.clone(), false).unwrap();
        assert!(sink.drain(soon()).is_ok(), "seed {seed}: {:?}", sink.report());
        assert_eq!(sink.report().failure, None);
        for shard in 0..SHARDS {
            let rows = database.committed().rows.get(&shard).cloned().unwrap_or_default();
            assert_eq!(rows, logged(&engine, shard), "seed {seed}, shard {shard}");
        }
        failures += database.committed().failures;
    }
    assert!(failures > 20 && cuts > 20, "{failures} failures, {cuts} power cuts");
}

#[test]
fn a_sink_that_is_ahead_of_its_log_ends_with_the_reason() {
    let (storage, database) = (FaultyStorage::new(), Database::default());
    database.committed().random = 1;
    let engine = open_on(&storage, os_cache("/s")).unwrap();
    let sink = start(&engine, 10, database.clone(), true).unwrap();
    let mut producer = engine.producer();
    for n in 0..50 {
        producer.publish(Key(n), Note::new(n)).unwrap().appended().wait().unwrap();
        if n == 9 {
            engine.flush(soon()).unwrap();
        }
    }
    sink.drain(soon()).unwrap();
    let cut = storage.after_crash(Unsynced::Lost);
    drop((sink, producer, engine));

    let engine = open_on(&cut, os_cache("/s")).unwrap();
    assert!(logged(&engine, 0).len() < 50);
    let rows = database.committed().rows.clone();
    let sink = start(&engine, 10, database.clone(), true).unwrap();
    assert!(sink.drain(soon()).is_err(), "the sink has ended");
    let report = sink.report();
    let end = engine.recovery().shards[0].end;
    let position = database.committed().positions[&0].offset();
    let expected = PositionError::AheadOfLog { shard: ShardId(0), position, end };
    assert_eq!((report.is_running, failed_position(&report)), (false, Some(expected)));
    assert_shown_as_failed(&engine, expected);
    assert!(matches!(sink.stop(soon()), Err(ConsumerError::Ended { failure: Some(_) })));
    // New events at the offsets of the sink's events are not mistaken for them.
    let mut producer = engine.producer();
    for n in 100..200 {
        producer.publish(Key(n), Note::new(n)).unwrap().appended().wait().unwrap();
    }
    assert_eq!(database.committed().rows, rows);
}

/// The position error that a report shows.
fn failed_position(report: &ConsumerReport) -> Option<PositionError> {
    match report.failure.as_ref()?.error() {
        ConsumerError::Position(error) => Some(*error),
        _ => None,
    }
}

/// Checks that the report and the metrics show the ended sink.
fn assert_shown_as_failed(engine: &EventLog<Note>, expected: PositionError) {
    let report = engine.consumers().into_iter().find(|report| report.name == "sink").unwrap();
    assert_eq!((report.is_running, failed_position(&report)), (false, Some(expected)));
    let text = prometheus(&[report]);
    for line in [
        "corelane_consumer_is_failed{consumer=\"sink\"} 1".to_owned(),
        format!("corelane_consumer_failure{{consumer=\"sink\",reason=\"{expected}\"}} 1"),
    ] {
        assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
    }
    let drained = engine.drain_consumers(soon());
    assert!(matches!(drained, Err(ConsumerError::Ended { failure: Some(_) })), "{drained:?}");
}

#[test]
fn a_store_opens_again_at_once_when_its_consumers_have_ended() {
    let (storage, database) = (FaultyStorage::new(), Database::default());
    database.committed().random = 1;
    for round in 0..env_number("CORELANE_REOPENINGS", 300) {
        let engine = open_on(&storage, small("/s")).unwrap_or_else(|error| panic!("round {round}: {error}"));
        let sink = start(&engine, 10, database.clone(), false).unwrap();
        let consumer = engine.consumer("many").concurrency(4).start(|_, _| Ok(())).unwrap();
        engine.producer().publish(Key(round), Note::new(round)).unwrap();
        if round % 2 == 0 {
            sink.stop(soon()).unwrap();
            consumer.stop(soon()).unwrap();
            drop(engine);
        } else {
            drop((engine, consumer, sink));
        }
    }
}

/// A sink that takes every event, fails while `is_ill` is set, and takes nothing from its batches while `idles` is set.
#[derive(Clone, Default)]
struct Moody(Arc<Mutex<(u64, bool, bool)>>, Arc<Mutex<Option<Position>>>);

impl Moody {
    fn set(&self, is_ill: bool, idles: bool) {
        let mut state = self.0.lock().unwrap();
        (state.1, state.2) = (is_ill, idles);
    }

    fn taken(&self) -> u64 {
        self.0.lock().unwrap().0
    }
}

impl Sink<Note> for Moody {
    fn position(&mut self, _shard: ShardId) -> Result<Option<Position>, HandlerError> {
        Ok(*self.1.lock().unwrap())
    }

    fn apply(&mut self, batch: &mut Batch<'_, Note>) -> Result<(), HandlerError> {
        let (_, is_ill, idles) = *self.0.lock().unwrap();
        if is_ill {
            return Err("ill".into());
        }
        while !idles && batch.next()?.is_some() {
            self.0.lock().unwrap().0 += 1;
        }
        if !idles {
            *self.1.lock().unwrap() = Some(batch.end());
        }
        Ok(())
    }
}

#[test]
fn a_halted_unhealthy_sink_continues_soon_after_it_is_repaired() {
    let storage = FaultyStorage::new();
    let engine = open_on(&storage, small("/s")).unwrap();
    let sink = Moody::default();
    sink.set(true, false);
    let health = HealthPolicy::default().consecutive_max(3).pause(Duration::from_millis(5));
    let retry = Retry::fixed().base(Duration::from_millis(1)).attempts(3);
    let consumer = engine.consumer("sink").health(health).retry(retry).start_sink(10, sink.clone()).unwrap();
    engine.producer().publish(Key(1), Note::new(1)).unwrap();
    until("the sink halts", || matches!(consumer.report().halted, Some(HaltCause::Batch { .. })));
    assert_eq!((consumer.report().failure, consumer.report().is_running), (None, true), "the sink has not ended");
    assert!(consumer.report().health.unwrap().outages > 0);
    sink.set(false, false);
    consumer.resume();
    // Much earlier than the timeout of an unanswered probe.
    until("the sink continues", || sink.taken() == 1);
    until("the report shows it", || consumer.report().halted.is_none());
    consumer.stop(soon()).unwrap();
}

#[test]
fn a_sink_that_takes_nothing_from_its_batches_halts() {
    let storage = FaultyStorage::new();
    let engine = open_on(&storage, small("/s")).unwrap();
    let sink = Moody::default();
    sink.set(false, true);
    let retry = Retry::fixed().base(Duration::from_millis(1)).attempts(2);
    let consumer = engine.consumer("sink").retry(retry).start_sink(10, sink.clone()).unwrap();
    engine.producer().publish(Key(1), Note::new(1)).unwrap();
    until("the sink halts", || consumer.report().halted.is_some());
    assert_eq!(consumer.report().failed, 2);
    sink.set(false, false);
    consumer.resume();
    consumer.drain(soon()).unwrap();
    assert_eq!(sink.taken(), 1);
}

#[test]
fn a_sink_with_the_name_of_a_consumer_keeps_the_consumers_dead_letters() {
    let storage = FaultyStorage::new();
    let engine = open_on(&storage, small("/s")).unwrap();
    engine.producer().publish(Key(1), Note::new(1)).unwrap();
    let retry = Retry::fixed().base(Duration::from_millis(1)).attempts(1);
    let fails = |_: &ArchivedNote, _: &Meta| -> Result<(), HandlerError> { Err("down".into()) };
    let consumer = engine.consumer("c").retry(retry).start(fails).unwrap();
    until("the event is a dead letter", || consumer.report().letters.letters == 1);
    consumer.stop(soon()).unwrap();
    // Events were delivered under this name, and the sink has no position.
    let sink = engine.consumer("c").start_sink(10, Moody::default()).unwrap();
    until("the sink ends", || engine.consumers()[0].failure.is_some());
    assert_eq!(engine.consumers()[0].letters.letters, 1, "the sink keeps the letters");
    drop(sink);
    let sink = engine.consumer("c").start_sink_over(10, Moody::default()).unwrap();
    assert_eq!(sink.report().letters.letters, 1);
    engine.producer().publish(Key(1), Note::new(2)).unwrap();
    let position = || engine.consumers()[0].positions.clone();
    let before = position();
    until("the sink has saved", || position() > before);
    sink.stop(soon()).unwrap();
    engine.shutdown(soon()).unwrap();
    let mut files = storage.files();
    files.retain(|path, _| !path.file_name().unwrap().to_str().unwrap().starts_with("letters-"));
    let engine = open_on(&FaultyStorage::with_files(files), small("/s")).unwrap();
    let refused = engine.consumer("c").poller();
    assert!(matches!(refused, Err(ConsumerError::Files(OpenError::DamagedFile { .. }))), "{refused:?}");
}

#[test]
fn a_drained_sink_has_every_event_appended_before_the_call() {
    let storage = FaultyStorage::new();
    let engine = open_on(&storage, os_cache("/s")).unwrap();
    let sink = Moody::default();
    let consumer = engine.consumer("sink").start_sink(10, sink.clone()).unwrap();
    let mut producer = engine.producer();
    for n in 0..2_000 {
        producer.publish(Key(n), Note::new(n)).unwrap().appended().wait().unwrap();
        consumer.drain(soon()).unwrap();
        assert_eq!(sink.taken(), n + 1);
    }
}

fn publish(engine: &EventLog<Note>, numbers: std::ops::Range<u64>) {
    let mut producer = engine.producer();
    for n in numbers {
        drop(producer.publish(Key(n), Note::new(n)).unwrap());
    }
    engine.flush(soon()).unwrap();
}

/// Runs a sink until it has every event, and closes the store.
fn take_everything(engine: EventLog<Note>, database: &Database) {
    let sink = start(&engine, 7, database.clone(), false).unwrap();
    assert!(sink.drain(soon()).is_ok(), "{:?}", sink.report());
    sink.stop(soon()).unwrap();
    engine.shutdown(soon()).unwrap();
}

fn database() -> Database {
    let database = Database::default();
    database.committed().random = 1;
    database
}

#[test]
fn a_database_ahead_of_a_copy_of_the_store_is_detected_however_long_the_copy_is() {
    // The copy grows to an offset before the database's position, to that position, and to offsets beyond it.
    for more in [1, 20, 50, 51, 100, 2_000] {
        let (storage, database) = (FaultyStorage::new(), database());
        let engine = open_on(&storage, small("/s")).unwrap();
        publish(&engine, 0..50);
        take_everything(engine, &database);
        let copy = storage.files();
        let engine = open_on(&storage, small("/s")).unwrap();
        publish(&engine, 50..100);
        take_everything(engine, &database);

        let engine = open_on(&FaultyStorage::with_files(copy), small("/s")).unwrap();
        publish(&engine, 1_000..1_000 + more);
        let before = engine.consumers()[0].lag_bytes;
        let rows = database.committed().rows.clone();
        let sink = start(&engine, 7, database.clone(), false).unwrap();
        assert!(sink.drain(soon()).is_err(), "{more}: the sink ends");
        until("the sink has ended", || !engine.consumers()[0].is_running);
        let error = failed_position(&sink.report());
        let Some(PositionError::AheadOfLog { .. } | PositionError::OtherHistory { .. }) = error else {
            panic!("{more}: {error:?}");
        };
        assert_shown_as_failed(&engine, error.unwrap());
        publish(&engine, 0..10);
        assert!(engine.consumers()[0].lag_bytes > before, "{more}: the lag keeps growing");
        assert_eq!(database.committed().rows, rows, "{more}: the sink got no event");
        // With empty data the sink begins again.
        let anew = self::database();
        let over = engine.consumer("sink").start_sink_over(7, anew.clone()).unwrap();
        over.drain(soon()).unwrap();
        assert!(engine.consumers()[0].failure.is_none());
        engine.drain_consumers(soon()).unwrap();
        assert_eq!(anew.committed().rows[&0], logged(&engine, 0), "{more}");
    }
}

#[test]
fn a_database_of_another_store_is_detected() {
    let database = database();
    for store in ["/s", "/t"] {
        let engine = open_on(&FaultyStorage::new(), small(store)).unwrap();
        publish(&engine, 0..100);
        if store == "/s" {
            take_everything(engine, &database);
            continue;
        }
        let sink = start(&engine, 7, database.clone(), false).unwrap();
        until("the sink ends", || sink.report().failure.is_some());
        let error = failed_position(&sink.report());
        let Some(PositionError::OtherStore { position, store, .. }) = error else { panic!("{error:?}") };
        assert_ne!(position, store);
    }
}

#[test]
fn a_sink_continues_from_the_positions_of_a_restored_database() {
    let (storage, database) = (FaultyStorage::new(), database());
    let engine = open_on(&storage, small("/s")).unwrap();
    publish(&engine, 0..50);
    take_everything(engine, &database);
    let rows = database.committed().rows.clone();
    let positions = database.committed().positions.clone();
    let engine = open_on(&storage, small("/s")).unwrap();
    publish(&engine, 50..3_000);
    take_everything(engine, &database);
    database.committed().rows = rows;
    database.committed().positions = positions;
    let engine = open_on(&storage, small("/s")).unwrap();
    let log = logged(&engine, 0);
    take_everything(engine, &database);
    assert_eq!(
        database.committed().rows[&0],
        log,
        "every event once, including those that the older copy did not have"
    );
}

#[test]
fn a_sink_without_its_database_begins_again_only_on_request() {
    for shards in [1, SHARDS] {
        let storage = FaultyStorage::new();
        let config = || small("/s").shards(shards);
        let engine = open_on(&storage, config()).unwrap();
        publish(&engine, 0..500);
        take_everything(engine, &database());
        let engine = open_on(&storage, config()).unwrap();
        publish(&engine, 500..600);
        let gone = database();
        let sink = start(&engine, 7, gone.clone(), false).unwrap();
        assert!(matches!(sink.drain(soon()), Err(ConsumerError::Ended { .. })));
        let stopped = sink.stop(soon());
        let Err(ConsumerError::Ended { failure: Some(failure) }) = stopped else { panic!("{stopped:?}") };
        assert!(matches!(failure.error(), ConsumerError::PositionGone { .. }), "{failure}");
        assert_eq!(engine.consumers()[0].failure, Some(failure));
        let drained = engine.drain_consumers(soon());
        assert!(matches!(drained, Err(ConsumerError::Ended { failure: Some(_) })), "{drained:?}");
        assert!(gone.committed().rows.is_empty(), "the sink got nothing");

        // The request to begin again stays valid if the sink takes no event the first time.
        let ill = Moody::default();
        ill.set(true, false);
        let over = engine.consumer("sink").start_sink_over(7, ill).unwrap();
        over.stop(soon()).unwrap();
        let sink = start(&engine, 7, gone.clone(), false).unwrap();
        assert!(sink.drain(soon()).is_ok(), "{:?}", sink.report());
        for shard in 0..shards {
            assert_eq!(gone.committed().rows[&shard], logged(&engine, shard));
        }
    }
}

#[test]
fn a_sink_that_forgets_its_position_while_it_runs_ends_with_an_error() {
    let engine = open_on(&FaultyStorage::new(), small("/s")).unwrap();
    let (sink, retry) = (Moody::default(), Retry::fixed().base(Duration::from_millis(1)));
    let builder = engine.consumer("sink").retry(retry).save_every(Duration::from_secs(3_600));
    let consumer = builder.start_sink(10, sink.clone()).unwrap();
    publish(&engine, 0..100);
    consumer.drain(soon()).unwrap();
    *sink.1.lock().unwrap() = None;
    // After a failed batch the sink's position is read again.
    sink.set(true, false);
    publish(&engine, 100..101);
    until("the sink ends", || consumer.report().failure.is_some());
    let failure = consumer.report().failure.unwrap();
    assert!(matches!(failure.error(), ConsumerError::PositionGone { .. }), "{failure}");
    assert_eq!(sink.taken(), 100, "no event came twice");
}

#[test]
fn a_sink_begins_where_it_was_registered_and_cannot_begin_again_once_that_is_freed() {
    let engine =
        open_on(&FaultyStorage::new(), os_cache("/s").retention(Retention::bytes(2 * crate::common::SEGMENT))).unwrap();
    publish(&engine, 0..100);
    let builder = || engine.consumer("sink").save_every(Duration::from_millis(1));
    let sink = builder().start_at(Start::Latest).start_sink(100, database()).unwrap();
    sink.drain(soon()).unwrap();
    let report = sink.report();
    assert_eq!((report.handled, report.failure), (0, None), "no position, and no event was delivered");
    let began = report.positions[0];
    until("its start is freed", || {
        let mut producer = engine.producer();
        for n in 0..100 {
            drop(producer.publish(Key(n), Note::sized(n, 100)).unwrap());
        }
        engine.reader(ShardId(0)).offset() > began
    });
    sink.stop(soon()).unwrap();
    let over = builder().start_sink_over(100, database());
    let Err(ConsumerError::BeginningGone { began: told, earliest, .. }) = over else { panic!("{over:?}") };
    assert!(told == began && earliest > began);
    let report = engine.consumers().remove(0);
    let failure = report.failure.expect("the failure is shown");
    assert!(matches!(failure.error(), ConsumerError::BeginningGone { .. }), "{failure}");
    engine.remove_consumer("sink").unwrap();
    // Registered again, the sink begins with the earliest event.
    builder().start_sink(100, database()).unwrap().drain(soon()).unwrap();
}
