//! Sinks that keep their position with their data: whatever fails, panics, restarts or loses power, every event is in it once and in
//! order; and one that is ahead of its log says so.
#![expect(clippy::unwrap_used, reason = "a test may unwrap")]

mod common;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use common::{ArchivedNote, Note, env_number, open_on, os_cache, read_shard, small, soon, until};
use corelane::consumer::{
    Batch, ConsumerError, ConsumerReport, HaltCause, HealthPolicy, Retry, Sink, SinkConsumer, Start, prometheus,
};
use corelane::testing::{FaultyStorage, Unsynced};
use corelane::{EventLog, HandlerError, Key, Meta, OpenError, Position, PositionError, Retention, ShardId};

const SHARDS: u16 = 2;

/// What is committed, and how the next transactions end.
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

/// A database on another machine: it survives.
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
        assert_ne!(fate, 0, "before anything, as it must");
        while let Some(record) = batch.next()? {
            rows.push(record.event.n.to_native());
            match fate {
                1 if rows.len() as u64 > stops_after => return Err("inside".into()),
                // It commits what it took, and leaves the rest of the batch.
                6 if rows.len() as u64 > stops_after => break,
                _ => {}
            }
        }
        if fate == 2 {
            return Err("before the commit".into());
        }
        let mut committed = self.committed();
        assert_ne!(fate, 3, "inside the transaction, as it must");
        let shard = batch.shard().0;
        committed.rows.entry(shard).or_default().extend(rows);
        committed.positions.insert(shard, batch.end());
        drop(committed);
        assert_ne!(fate, 4, "behind the commit, as it must");
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
    let builder = engine.consumer("sink").retry(retry).health(health).checkpoint_every(Duration::from_millis(1));
    let builder = if before_durable { builder.before_durable() } else { builder };
    builder.start_sink(batch_max, sink)
}

/// The numbers of a shard's log.
fn logged(engine: &EventLog<Note>, shard: u16) -> Vec<u64> {
    read_shard(engine, shard).iter().map(|held| held.n).collect()
}

#[test]
fn every_event_is_in_the_sink_once_whatever_fails_restarts_or_loses_power() {
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
                // Until the disk is gone, or everything was in time.
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
    assert!(matches!(sink.drain(soon()), Err(ConsumerError::Ended { failure: Some(_) })), "it has ended");
    let report = sink.report();
    let end = engine.recovery().shards[0].end;
    let position = database.committed().positions[&0].offset();
    let expected = PositionError::AheadOfLog { shard: ShardId(0), position, end };
    assert_eq!((report.is_running, failed_position(&report)), (false, Some(expected)));
    is_told_as_failed(&engine, expected);
    assert!(matches!(sink.stop(soon()), Err(ConsumerError::Ended { failure: Some(_) })));
    // Events in the place of those that it has are not taken for them.
    let mut producer = engine.producer();
    for n in 100..200 {
        producer.publish(Key(n), Note::new(n)).unwrap().appended().wait().unwrap();
    }
    assert_eq!(database.committed().rows, rows);
}

/// The position's failure that a report shows.
fn failed_position(report: &ConsumerReport) -> Option<PositionError> {
    match report.failure.as_ref()?.error() {
        ConsumerError::Position(error) => Some(*error),
        _ => None,
    }
}

/// A sink that has ended is where monitoring looks.
fn is_told_as_failed(engine: &EventLog<Note>, expected: PositionError) {
    let report = engine.consumers().into_iter().find(|report| report.name == "sink").unwrap();
    assert_eq!((report.is_running, failed_position(&report)), (false, Some(expected)));
    let text = prometheus(&[report]);
    for line in [
        "corelane_consumer_is_failed{consumer=\"sink\"} 1".to_owned(),
        format!("corelane_consumer_failure{{consumer=\"sink\",reason=\"{expected}\"}} 1"),
    ] {
        assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
    }
    assert!(!engine.drain_consumers(soon()), "it has not handled what there is");
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

/// Takes everything in while it is `well`; takes nothing from its batches while it `idles`.
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
fn a_sink_that_halted_and_counts_as_unhealthy_goes_on_soon_after_it_was_put_right() {
    let storage = FaultyStorage::new();
    let engine = open_on(&storage, small("/s")).unwrap();
    let sink = Moody::default();
    sink.set(true, false);
    let health = HealthPolicy::default().consecutive_max(3).pause(Duration::from_millis(5));
    let retry = Retry::fixed().base(Duration::from_millis(1)).attempts(3);
    let consumer = engine.consumer("sink").health(health).retry(retry).start_sink(10, sink.clone()).unwrap();
    engine.producer().publish(Key(1), Note::new(1)).unwrap();
    until("it halts", || matches!(consumer.report().halted, Some(HaltCause::Batch { .. })));
    assert_eq!((consumer.report().failure, consumer.report().is_running), (None, true), "it has not ended");
    assert!(consumer.report().health.unwrap().outages > 0);
    sink.set(false, false);
    consumer.resume();
    // Long before a probe would be given up, of which nothing is heard.
    until("it goes on", || sink.taken() == 1);
    until("and says so", || consumer.report().halted.is_none());
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
    until("it halts", || consumer.report().halted.is_some());
    assert_eq!(consumer.report().failed, 2);
    sink.set(false, false);
    consumer.resume();
    consumer.drain(soon()).unwrap();
    assert_eq!(sink.taken(), 1);
}

#[test]
fn a_sink_under_the_name_of_a_consumer_forgets_none_of_its_dead_letters() {
    let storage = FaultyStorage::new();
    let engine = open_on(&storage, small("/s")).unwrap();
    engine.producer().publish(Key(1), Note::new(1)).unwrap();
    let retry = Retry::fixed().base(Duration::from_millis(1)).attempts(1);
    let fails = |_: &ArchivedNote, _: &Meta| -> Result<(), HandlerError> { Err("down".into()) };
    let consumer = engine.consumer("c").retry(retry).start(fails).unwrap();
    until("it is set aside", || consumer.report().letters.letters == 1);
    consumer.stop(soon()).unwrap();
    // Events were delivered under the name, and this sink knows of none.
    let sink = engine.consumer("c").start_sink(10, Moody::default()).unwrap();
    until("it ends", || engine.consumers()[0].failure.is_some());
    assert_eq!(engine.consumers()[0].letters.letters, 1, "they are there whoever runs");
    drop(sink);
    let sink = engine.consumer("c").start_sink_over(10, Moody::default()).unwrap();
    assert_eq!(sink.report().letters.letters, 1);
    engine.producer().publish(Key(1), Note::new(2)).unwrap();
    let position = || engine.consumers()[0].positions.clone();
    let before = position();
    until("it has saved", || position() > before);
    sink.stop(soon()).unwrap();
    engine.shutdown(soon()).unwrap();
    let mut files = storage.files();
    files.retain(|path, _| !path.file_name().unwrap().to_str().unwrap().starts_with("letters-"));
    let engine = open_on(&FaultyStorage::with_files(files), small("/s")).unwrap();
    let refused = engine.consumer("c").poller();
    assert!(matches!(refused, Err(ConsumerError::Files(OpenError::DamagedFile { .. }))), "{refused:?}");
}

#[test]
fn a_drained_sink_has_what_was_there_when_it_was_asked() {
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

/// Runs a sink until it has everything, and closes the store.
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
fn a_database_that_is_ahead_of_a_copy_of_the_store_is_told_however_long_the_copy_is() {
    // The copy goes on to before, behind, and to the same place as the database.
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
        assert!(matches!(sink.drain(soon()), Err(ConsumerError::Ended { .. })), "{more}: it ends");
        until("it has ended", || !engine.consumers()[0].is_running);
        let error = failed_position(&sink.report());
        let Some(PositionError::AheadOfLog { .. } | PositionError::OtherHistory { .. }) = error else {
            panic!("{more}: {error:?}");
        };
        is_told_as_failed(&engine, error.unwrap());
        publish(&engine, 0..10);
        assert!(engine.consumers()[0].lag_bytes > before, "{more}: its lag counts on");
        assert_eq!(database.committed().rows, rows, "{more}: it was given nothing");
        // With its data made anew, it begins again.
        let anew = self::database();
        let over = engine.consumer("sink").start_sink_over(7, anew.clone()).unwrap();
        over.drain(soon()).unwrap();
        assert!(engine.consumers()[0].failure.is_none() && engine.drain_consumers(soon()));
        assert_eq!(anew.committed().rows[&0], logged(&engine, 0), "{more}");
    }
}

#[test]
fn a_database_of_another_store_is_told() {
    let database = database();
    for store in ["/s", "/t"] {
        let engine = open_on(&FaultyStorage::new(), small(store)).unwrap();
        publish(&engine, 0..100);
        if store == "/s" {
            take_everything(engine, &database);
            continue;
        }
        let sink = start(&engine, 7, database.clone(), false).unwrap();
        until("it ends", || sink.report().failure.is_some());
        let error = failed_position(&sink.report());
        let Some(PositionError::OtherStore { position, store, .. }) = error else { panic!("{error:?}") };
        assert_ne!(position, store);
    }
}

#[test]
fn positions_of_a_database_that_was_put_back_are_gone_on_from() {
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
    assert_eq!(database.committed().rows[&0], log, "every event once, those again that the older copy had not");
}

#[test]
fn a_sink_whose_database_is_gone_begins_again_only_when_it_is_told_to() {
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
        assert!(!engine.drain_consumers(soon()) && gone.committed().rows.is_empty(), "it was given nothing");

        // Started over, it begins again even if the first run takes nothing in.
        let idle = Moody::default();
        idle.set(false, true);
        engine.consumer("sink").start_sink_over(7, idle).unwrap().stop(soon()).unwrap();
        let sink = start(&engine, 7, gone.clone(), false).unwrap();
        assert!(sink.drain(soon()).is_ok(), "{:?}", sink.report());
        for shard in 0..shards {
            assert_eq!(gone.committed().rows[&shard], logged(&engine, shard));
        }
    }
}

#[test]
fn a_sink_that_forgets_its_position_while_it_runs_is_told() {
    let engine = open_on(&FaultyStorage::new(), small("/s")).unwrap();
    let (sink, retry) = (Moody::default(), Retry::fixed().base(Duration::from_millis(1)));
    let builder = engine.consumer("sink").retry(retry).checkpoint_every(Duration::from_secs(3_600));
    let consumer = builder.start_sink(10, sink.clone()).unwrap();
    publish(&engine, 0..100);
    consumer.drain(soon()).unwrap();
    *sink.1.lock().unwrap() = None;
    // A batch that fails makes it be asked.
    sink.set(true, false);
    publish(&engine, 100..101);
    until("it ends", || consumer.report().failure.is_some());
    let failure = consumer.report().failure.unwrap();
    assert!(matches!(failure.error(), ConsumerError::PositionGone { .. }), "{failure}");
    assert_eq!(sink.taken(), 100, "nothing twice");
}

#[test]
fn a_sink_begins_where_it_was_registered_and_cannot_begin_again_where_that_was_freed() {
    let engine = open_on(
        &FaultyStorage::new(),
        os_cache("/s").retention(Retention { bytes_max: Some(2 * common::SEGMENT), age_max: None }),
    )
    .unwrap();
    publish(&engine, 0..100);
    let builder = || engine.consumer("sink").checkpoint_every(Duration::from_millis(1));
    let sink = builder().start_at(Start::Latest).start_sink(100, database()).unwrap();
    sink.drain(soon()).unwrap();
    let report = sink.report();
    assert_eq!((report.handled, report.failure), (0, None), "no position, and nothing was delivered");
    let began = report.positions[0];
    until("its beginning is freed", || {
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
    let failure = report.failure.expect("it is shown");
    assert!(matches!(failure.error(), ConsumerError::BeginningGone { .. }), "{failure}");
    engine.remove_consumer("sink").unwrap();
    let again = builder().start_sink(100, database()).unwrap();
    again.drain(soon()).expect("registered again, it begins with the earliest event held");
}
