//! Asynchronous sinks hold every event once and in order, whatever fails, panics, is cancelled or restarts.

use std::collections::BTreeMap;
use std::future::pending;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::common::{Note, env_number, open_on, os_cache, read_shard, small, soon, until};
use corelane::consumer::{AsyncSink, Batch, ConsumerError, HaltCause, HealthPolicy, Retry, SinkConsumer};
use corelane::log::Position;
use corelane::testing::FaultyStorage;
use corelane::{Deadline, EventLog, HandlerError, Key, ShardId, WaitError};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::runtime::{Builder, Runtime};

const SHARDS: u16 = 2;

fn current() -> Runtime {
    Builder::new_current_thread().enable_time().build().unwrap()
}

fn multi(workers: usize) -> Runtime {
    Builder::new_multi_thread().worker_threads(workers).enable_time().build().unwrap()
}

/// The committed data, and how the next transactions end.
#[derive(Default)]
struct Committed {
    rows: BTreeMap<u16, Vec<u64>>,
    positions: BTreeMap<u16, Position>,
    random: Option<StdRng>,
    failures: u64,
    /// Transactions begin and never end.
    hangs: bool,
    begun: u64,
}

impl Committed {
    fn below(&mut self, end: u64) -> u64 {
        self.random.as_mut().map_or(end - 1, |random| random.random_range(0..end))
    }
}

/// A database on another machine, which survives crashes.
#[derive(Clone, Default)]
struct Database(Arc<Mutex<Committed>>);

impl Database {
    fn seeded(seed: u64) -> Self {
        let database = Self::default();
        database.committed().random = Some(StdRng::seed_from_u64(seed));
        database
    }

    fn committed(&self) -> MutexGuard<'_, Committed> {
        // A transaction that panics is rolled back.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The time that a statement takes on its way.
    async fn travel(&self) {
        let steps = self.committed().below(4);
        for _ in 0..steps {
            tokio::task::yield_now().await;
        }
        if steps == 2 {
            tokio::time::sleep(Duration::from_micros(300)).await;
        }
    }

    fn rows(&self, shard: u16) -> Vec<u64> {
        self.committed().rows.get(&shard).cloned().unwrap_or_default()
    }
}

impl AsyncSink<Note> for Database {
    async fn position(&mut self, shard: ShardId) -> Result<Option<Position>, HandlerError> {
        self.travel().await;
        let mut committed = self.committed();
        assert!(committed.random.is_none() || committed.below(20) > 0, "a panic while asking");
        if committed.random.is_some() && committed.below(5) == 0 {
            return Err("no connection".into());
        }
        Ok(committed.positions.get(&shard.0).copied())
    }

    async fn apply(&mut self, batch: &mut Batch<'_, Note>) -> Result<(), HandlerError> {
        let (fate, stops_after) = {
            let mut committed = self.committed();
            committed.begun += 1;
            let fate = committed.below(12);
            committed.failures += u64::from(fate < 6);
            (fate, committed.below(20))
        };
        let mut rows = Vec::new();
        assert_ne!(fate, 0, "a panic before the first event");
        while let Some(record) = batch.next()? {
            let n = record.event.n.to_native();
            if n.is_multiple_of(7) {
                // The record is kept across this.
                tokio::task::yield_now().await;
            }
            rows.push(record.event.n.to_native());
            match fate {
                1 if rows.len() as u64 > stops_after => return Err("inside".into()),
                // Commits the events so far and leaves the rest of the batch.
                6 if rows.len() as u64 > stops_after => break,
                _ => {}
            }
        }
        self.travel().await;
        if self.committed().hangs {
            pending::<()>().await;
        }
        if fate == 2 {
            return Err("before the commit".into());
        }
        {
            let mut committed = self.committed();
            assert_ne!(fate, 3, "a panic inside the transaction");
            let shard = batch.shard().0;
            committed.rows.entry(shard).or_default().extend(rows);
            committed.positions.insert(shard, batch.end());
        }
        // A cancellation here loses the answer of a committed transaction.
        self.travel().await;
        assert_ne!(fate, 4, "a panic after the commit");
        if fate == 5 { Err("the answer was lost".into()) } else { Ok(()) }
    }
}

fn start(engine: &EventLog<Note>, batch_max: usize, sink: Database) -> Result<SinkConsumer, ConsumerError> {
    let retry = Retry::fixed().base(Duration::from_millis(1)).jitter(1.0, 1.0).attempts(1000);
    let health = HealthPolicy::default().consecutive_max(1_000_000).failure_percent_max(100);
    let builder = engine.consumer("sink").retry(retry).health(health).save_every(Duration::from_millis(1));
    builder.start_sink_async(batch_max, sink)
}

/// The numbers of a shard's log.
fn logged(engine: &EventLog<Note>, shard: u16) -> Vec<u64> {
    read_shard(engine, shard).iter().map(|held| held.n).collect()
}

fn publish(engine: &EventLog<Note>, numbers: std::ops::Range<u64>) {
    let mut producer = engine.producer();
    for n in numbers {
        drop(producer.publish(Key(n % 11), Note::sized(n, 100)).unwrap());
    }
    engine.flush(soon()).unwrap();
}

#[test]
fn an_async_sink_holds_every_event_once_despite_failures_cancellations_and_dropped_runtimes() {
    let (mut failures, mut cancelled) = (0, 0);
    for seed in 1..=env_number("CORELANE_CANCELLATIONS", 12) {
        let (database, storage) = (Database::seeded(seed), FaultyStorage::new());
        let mut random = StdRng::seed_from_u64(seed);
        for life in 0..8 {
            let engine = open_on(&storage, small("/s").shards(SHARDS)).unwrap();
            let runtime = if random.random_bool(0.5) { current() } else { multi(2) };
            let consumer = runtime.block_on(async {
                let sink = start(&engine, random.random_range(1..30), database.clone()).unwrap();
                publish(&engine, life * 100..life * 100 + 100);
                tokio::time::sleep(Duration::from_micros(random.random_range(0..8000))).await;
                match random.random_range(0..3) {
                    0 => {
                        let stopped = sink.stop_async(Duration::from_micros(random.random_range(0..500))).await;
                        assert!(matches!(stopped, Ok(()) | Err(ConsumerError::Busy { .. })), "{stopped:?}");
                        cancelled += u32::from(stopped.is_err());
                        None
                    }
                    1 => {
                        sink.drain_async(soon()).await.unwrap();
                        Some(sink)
                    }
                    _ => Some(sink),
                }
            });
            cancelled += u32::from(consumer.as_ref().is_some_and(|consumer| consumer.report().running > 0));
            drop(runtime);
            until("it ends", || !engine.consumers()[0].is_running);
            for shard in 0..SHARDS {
                let (rows, log) = (database.rows(shard), logged(&engine, shard));
                assert!(log.starts_with(&rows), "seed {seed}, life {life}: {rows:?} of {log:?}");
            }
            drop(consumer);
            engine.shutdown(soon()).unwrap();
        }
        database.committed().random = None;
        let engine = open_on(&storage, small("/s").shards(SHARDS)).unwrap();
        let runtime = multi(1);
        let sink = runtime.block_on(async { start(&engine, 7, database.clone()).unwrap() });
        // Blocking calls work outside the runtime.
        sink.drain(soon()).unwrap();
        assert_eq!(sink.report().failure, None);
        sink.stop(soon()).unwrap();
        for shard in 0..SHARDS {
            assert_eq!(database.rows(shard), logged(&engine, shard), "seed {seed}, shard {shard}");
        }
        failures += database.committed().failures;
        engine.shutdown(soon()).unwrap();
    }
    assert!(failures > 20 && cancelled > 5, "{failures} failures, {cancelled} cancellations");
}

#[test]
fn a_batch_that_never_ends_is_cancelled_at_the_deadline_of_stop_and_delivered_again() {
    for runtime in [current(), multi(2)] {
        let dir = tempfile::tempdir().unwrap();
        let engine = EventLog::<Note>::open(small(dir.path())).unwrap();
        let database = Database::default();
        database.committed().hangs = true;
        runtime.block_on(async {
            let sink = start(&engine, 1000, database.clone()).unwrap();
            publish(&engine, 0..50);
            while database.committed().begun == 0 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            let drained = sink.drain_async(Duration::from_millis(5)).await;
            assert!(matches!(drained, Err(ConsumerError::Wait(WaitError::TimedOut))), "{drained:?}");
            assert_eq!(sink.report().running, 1);
            let stopped = sink.stop_async(Duration::from_millis(5)).await;
            assert!(matches!(stopped, Err(ConsumerError::Busy { .. })), "{stopped:?}");
            while engine.consumers()[0].is_running {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            assert_eq!(database.rows(0), [0; 0]);
            database.committed().hangs = false;
            let sink = start(&engine, 1000, database.clone()).unwrap();
            sink.drain_async(soon()).await.unwrap();
            sink.stop_async(soon()).await.unwrap();
        });
        assert_eq!(database.rows(0), (0..50).collect::<Vec<_>>());
        engine.shutdown(soon()).unwrap();
    }
}

#[test]
fn blocking_calls_on_the_only_thread_of_the_runtime_do_not_wait_for_a_batch() {
    let dir = tempfile::tempdir().unwrap();
    let engine = EventLog::<Note>::open(small(dir.path())).unwrap();
    let database = Database::default();
    database.committed().hangs = true;
    let runtime = current();
    runtime.block_on(async {
        let sink = start(&engine, 1000, database.clone()).unwrap();
        publish(&engine, 0..50);
        while database.committed().begun == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let drained = sink.drain(Deadline::NEVER);
        assert!(matches!(drained, Err(ConsumerError::Wait(WaitError::OnEngineThread))), "{drained:?}");
        assert!(matches!(engine.shutdown(Deadline::NEVER), Err(WaitError::OnEngineThread)));
        let stopped = sink.stop(Deadline::NEVER);
        assert!(matches!(stopped, Err(ConsumerError::Wait(WaitError::OnEngineThread))), "{stopped:?}");
    });
    drop(runtime);
    assert!(!engine.consumers()[0].is_running);
    // Without a batch, the sink ends on the waiting thread.
    database.committed().hangs = false;
    let runtime = current();
    let sink = runtime.block_on(async {
        let sink = start(&engine, 1000, database.clone()).unwrap();
        sink.drain_async(soon()).await.unwrap();
        sink
    });
    assert_eq!(database.rows(0).len(), 50);
    sink.stop(Deadline::NEVER).unwrap();
    engine.shutdown(Deadline::NEVER).unwrap();
}

#[test]
fn an_async_sink_halts_pauses_and_resumes() {
    let dir = tempfile::tempdir().unwrap();
    let engine = EventLog::<Note>::open(small(dir.path())).unwrap();
    let database = Database::default();
    current().block_on(async {
        database.committed().hangs = true;
        struct Refusing(Database);
        impl AsyncSink<Note> for Refusing {
            async fn position(&mut self, shard: ShardId) -> Result<Option<Position>, HandlerError> {
                AsyncSink::<Note>::position(&mut self.0, shard).await
            }
            async fn apply(&mut self, batch: &mut Batch<'_, Note>) -> Result<(), HandlerError> {
                tokio::task::yield_now().await;
                if self.0.committed().hangs {
                    return Err("refused".into());
                }
                self.0.apply(batch).await
            }
        }
        let retry = Retry::fixed().base(Duration::from_millis(1)).attempts(3);
        let sink = engine.consumer("sink").retry(retry).start_sink_async(10, Refusing(database.clone())).unwrap();
        publish(&engine, 0..20);
        while !matches!(sink.report().halted, Some(HaltCause::Batch { .. })) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(sink.report().failed, 3);
        database.committed().hangs = false;
        sink.resume();
        sink.drain_async(soon()).await.unwrap();
        sink.pause();
        publish(&engine, 20..40);
        let drained = sink.drain_async(Duration::from_millis(10)).await;
        assert!(matches!(drained, Err(ConsumerError::Wait(WaitError::TimedOut))), "{drained:?}");
        sink.resume();
        sink.drain_async(soon()).await.unwrap();
        assert_eq!(sink.report().handled, 40);
        sink.stop_async(soon()).await.unwrap();
    });
    assert_eq!(database.rows(0), (0..40).collect::<Vec<_>>());
    engine.shutdown(soon()).unwrap();
}

#[test]
fn a_sink_without_its_data_ends_and_starts_over() {
    let dir = tempfile::tempdir().unwrap();
    let engine = EventLog::<Note>::open(os_cache(dir.path())).unwrap();
    publish(&engine, 0..3000);
    multi(2).block_on(async {
        let sink = start(&engine, 100, Database::default()).unwrap();
        sink.drain_async(soon()).await.unwrap();
        sink.stop_async(soon()).await.unwrap();

        let empty = Database::default();
        let sink = start(&engine, 100, empty.clone()).unwrap();
        let drained = sink.drain_async(soon()).await;
        assert!(matches!(drained, Err(ConsumerError::Ended { failure: Some(_) })), "{drained:?}");
        let Err(ConsumerError::Ended { failure: Some(failure) }) = sink.stop_async(soon()).await else {
            panic!("it has failed");
        };
        assert!(matches!(failure.error(), ConsumerError::PositionGone { .. }), "{failure}");

        let sink = engine.consumer("sink").start_sink_over_async(100, empty.clone()).unwrap();
        sink.drain_async(soon()).await.unwrap();
        assert_eq!(empty.rows(0), (0..3000).collect::<Vec<_>>(), "over several segments");
        sink.stop_async(soon()).await.unwrap();
    });
    engine.shutdown(soon()).unwrap();
}

#[test]
fn a_disk_that_hangs_does_not_block_the_runtime_of_a_sink() {
    let storage = FaultyStorage::new();
    let engine = open_on(&storage, os_cache("/s")).unwrap();
    let database = Database::default();
    current().block_on(async {
        let sink = start(&engine, 10, database.clone()).unwrap();
        // The shard has its first segment before the disk hangs.
        publish(&engine, 0..4);
        let mut producer = engine.producer();
        for round in 1..20 {
            storage.hold(true);
            for n in round * 4..round * 4 + 4 {
                drop(producer.publish(Key(n), Note::new(n)).unwrap());
            }
            // If the sink blocked this thread, the disk would be held for ever.
            tokio::time::sleep(Duration::from_millis(5)).await;
            storage.hold(false);
            engine.flush(soon()).unwrap();
            sink.drain_async(soon()).await.unwrap();
        }
        sink.stop_async(soon()).await.unwrap();
    });
    assert_eq!(database.rows(0), (0..80).collect::<Vec<_>>());
    engine.shutdown(soon()).unwrap();
}

/// A table in SQLite, behind the runtime's threads for blocking work.
struct Table(Arc<Mutex<rusqlite::Connection>>);

impl Table {
    async fn with<T: Send + 'static>(
        &self,
        run: impl FnOnce(&mut rusqlite::Connection) -> Result<T, rusqlite::Error> + Send + 'static,
    ) -> Result<T, HandlerError> {
        let connection = Arc::clone(&self.0);
        Ok(tokio::task::spawn_blocking(move || run(&mut connection.lock().unwrap())).await??)
    }
}

impl AsyncSink<Note> for Table {
    async fn position(&mut self, shard: ShardId) -> Result<Option<Position>, HandlerError> {
        let saved = self.with(move |connection| {
            let mut query = connection.prepare("SELECT position FROM positions WHERE shard = ?")?;
            let mut rows = query.query([shard.0])?;
            rows.next()?.map(|row| row.get::<_, String>(0)).transpose()
        });
        Ok(saved.await?.map(|text| text.parse()).transpose()?)
    }

    async fn apply(&mut self, batch: &mut Batch<'_, Note>) -> Result<(), HandlerError> {
        let mut numbers = Vec::new();
        while let Some(record) = batch.next()? {
            numbers.push(record.event.n.to_native());
        }
        let (shard, end) = (batch.shard().0, batch.end().to_string());
        self.with(move |connection| {
            let transaction = connection.transaction()?;
            for n in numbers {
                transaction.execute("INSERT INTO notes VALUES (?)", [n as i64])?;
            }
            transaction.execute("REPLACE INTO positions VALUES (?, ?)", rusqlite::params![shard, end])?;
            transaction.commit()
        })
        .await
    }
}

#[test]
fn a_table_in_sqlite_holds_every_event_once_when_runtimes_are_dropped() {
    let dir = tempfile::tempdir().unwrap();
    let engine = EventLog::<Note>::open(small(dir.path().join("log"))).unwrap();
    let connection = rusqlite::Connection::open(dir.path().join("db.sqlite")).unwrap();
    let schema =
        "CREATE TABLE notes (n INTEGER PRIMARY KEY); CREATE TABLE positions (shard INTEGER PRIMARY KEY, position TEXT)";
    connection.execute_batch(schema).unwrap();
    let connection = Arc::new(Mutex::new(connection));
    for life in 0..10 {
        let runtime = if life % 2 == 0 { current() } else { multi(2) };
        runtime.block_on(async {
            let sink = engine.consumer("sql").start_sink_async(7, Table(Arc::clone(&connection))).unwrap();
            publish(&engine, life * 50..life * 50 + 50);
            if life == 9 {
                sink.drain_async(soon()).await.unwrap();
            } else {
                tokio::time::sleep(Duration::from_millis(life)).await;
            }
        });
        drop(runtime);
        until("it ends", || !engine.consumers()[0].is_running);
    }
    let count: i64 = connection.lock().unwrap().query_row("SELECT count(*) FROM notes", [], |row| row.get(0)).unwrap();
    assert_eq!(count, 500, "the primary key refuses repeats");
    engine.shutdown(soon()).unwrap();
}
