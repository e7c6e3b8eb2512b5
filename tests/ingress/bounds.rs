//! Calls to a shard that does not answer, because its thread hangs in an inline handler: they end at their deadlines,
//! change nothing, and succeed once the shard continues. A drop says what it waits for.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use corelane::error::HistoryError;
use corelane::metrics::Stage;
use corelane::{Durability, Engine, Key, Meta, OnError, Version, WaitError};
use rkyv::Archived;
use tracing::Level;

use crate::common::bank::{Account, Money};
use crate::common::log::Log;
use crate::common::{block_on, block_on_until, small, soon, until};

const KEY: Key = Key(1);
/// The amount on which the handler hangs.
const HANGS_ON: u64 = 13;
const SHORT: Duration = Duration::from_millis(5);

/// An engine whose shard hangs after the third event until it is released.
struct Hanging {
    engine: Engine<Account>,
    release: Arc<AtomicBool>,
}

impl Hanging {
    fn open(dir: &Path) -> Self {
        let (release, entered) = (Arc::<AtomicBool>::default(), Arc::<AtomicBool>::default());
        let (released, enters) = (Arc::clone(&release), Arc::clone(&entered));
        let config = small(dir).latency(true).durability(Durability::GroupCommit);
        let builder = Engine::<Account>::builder(config).handler("hangs", OnError::Halt, move |_| {
            let (released, enters) = (Arc::clone(&released), Arc::clone(&enters));
            move |event: &Archived<Money>, _: &Meta| {
                if matches!(event, Archived::<Money>::Deposited { cents } if *cents == HANGS_ON) {
                    enters.store(true, Ordering::SeqCst);
                    while !released.load(Ordering::SeqCst) {
                        std::thread::sleep(Duration::from_millis(1));
                    }
                }
                Ok(())
            }
        });
        let engine = builder.open().unwrap();
        let mut producer = engine.producer();
        for cents in [1, 2] {
            producer.publish(KEY, Money::Deposited { cents }).unwrap();
        }
        engine.flush(soon()).unwrap();
        producer.publish(KEY, Money::Deposited { cents: HANGS_ON }).unwrap();
        until("the handler hangs", || entered.load(Ordering::SeqCst));
        Self { engine, release }
    }

    fn release(&self) {
        self.release.store(true, Ordering::SeqCst);
    }
}

#[test]
fn queries_of_a_shard_that_hangs_end_at_their_deadlines_and_succeed_later() {
    let dir = tempfile::tempdir().unwrap();
    let hanging = Hanging::open(dir.path());
    let engine = &hanging.engine;
    assert!(matches!(engine.ask(KEY, |_, _| ()).wait_until(SHORT), Err(WaitError::TimedOut)));
    assert!(matches!(engine.state(KEY).wait_until(SHORT), Err(WaitError::TimedOut)));
    let past = engine.state_at_until(KEY, Version(1), SHORT);
    assert!(matches!(past, Err(HistoryError::Wait(WaitError::TimedOut))), "{past:?}");
    let stream = engine.stream_until(KEY, Version(1), SHORT);
    assert!(matches!(stream, Err(HistoryError::Wait(WaitError::TimedOut))));
    let mut awaited = Box::pin(engine.state(KEY));
    let end = std::time::Instant::now() + SHORT;
    assert!(block_on_until(awaited.as_mut(), end).is_none(), "the task waits");

    hanging.release();
    let (account, version) = block_on(awaited).unwrap().unwrap();
    assert_eq!((account.cents, version), (16, Version(3)), "the query that was sent is answered");
    assert_eq!(engine.state(KEY).wait_until(soon()).unwrap().unwrap().1, Version(3));
    assert_eq!(engine.state_at_until(KEY, Version(1), soon()).unwrap().state.cents, 1);
    let mut stream = engine.stream_until(KEY, Version(2), soon()).unwrap();
    assert_eq!(stream.next().unwrap().unwrap().meta.version, Version(2));
    engine.shutdown(soon()).unwrap();
}

#[test]
fn a_query_is_sent_when_it_is_waited_for_and_outlives_its_engine() {
    let dir = tempfile::tempdir().unwrap();
    let engine = Engine::<Account>::open(small(dir.path())).unwrap();
    let runs = Arc::new(AtomicU64::new(0));
    let counted = || {
        let runs = Arc::clone(&runs);
        engine.ask(KEY, move |_, _| runs.fetch_add(1, Ordering::SeqCst))
    };
    drop(counted());
    let late = counted();
    assert_eq!(counted().wait().unwrap(), 0, "the first one that was sent");
    // Several queries are in flight at once.
    let both = std::thread::scope(|scope| {
        let threads = [counted(), counted()].map(|query| scope.spawn(move || block_on(query)));
        threads.map(|thread| thread.join().unwrap().unwrap())
    });
    assert_eq!(both.iter().sum::<u64>(), 1 + 2);
    engine.shutdown(soon()).unwrap();
    drop(engine);
    assert!(matches!(block_on(late), Err(WaitError::Closed)));
    assert_eq!(runs.load(Ordering::SeqCst), 3);
}

#[test]
fn metrics_wait_no_longer_than_asked_and_lose_no_value_of_a_shard_that_hangs() {
    let dir = tempfile::tempdir().unwrap();
    let hanging = Hanging::open(dir.path());
    let engine = &hanging.engine;
    for deadline in [Duration::ZERO, SHORT, Duration::ZERO] {
        let metrics = engine.metrics(deadline);
        assert!(!metrics.is_complete, "the shard has not answered");
        assert_eq!(metrics.shards[0].appended, 3, "counters need no answer");
    }
    hanging.release();
    engine.flush(soon()).unwrap();
    let metrics = engine.metrics(soon());
    assert!(metrics.is_complete);
    for stage in [Stage::Ring, Stage::Appended, Stage::Handled] {
        assert_eq!(metrics.histogram(stage).len(), 3, "{stage:?}");
    }
    // Calls that do not wait take what was handed over since.
    engine.producer().publish(KEY, Money::Deposited { cents: 1 }).unwrap();
    engine.flush(soon()).unwrap();
    until("the values arrive", || engine.metrics(Duration::ZERO).histogram(Stage::Handled).len() == 4);
    let many: Vec<u64> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| engine.metrics(soon()))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap().histogram(Stage::Appended).len()).collect()
    });
    assert_eq!(many, [4; 4], "callers at the same time");
    assert_eq!(metrics.histogram(Stage::Appended).len(), 3, "what was returned before stays as it was");
    engine.shutdown(soon()).unwrap();
    let last = engine.metrics(Duration::ZERO);
    assert!(last.is_complete, "threads that have ended left their last values");
    assert_eq!(last.histogram(Stage::Appended).len(), 4);
}

#[test]
fn a_drop_that_takes_long_logs_what_it_waits_for_and_how_long() {
    let dir = tempfile::tempdir().unwrap();
    let Hanging { engine, release } = Hanging::open(dir.path());
    let log = Log::default();
    let heard = log.clone();
    let waits_for = "waits_for=shard 0 (its turn does not end)";
    std::thread::scope(|scope| {
        scope.spawn(move || {
            until("the drop says that it waits", || heard.says(Level::WARN, &["engine waits", waits_for]));
            assert_eq!(heard.messages().len(), 1);
            release.store(true, Ordering::SeqCst);
        });
        log.of(|| drop(engine));
    });
    assert!(log.says(Level::WARN, &["engine waited", waits_for, "waited_ms="]), "{:?}", log.messages());
    assert_eq!(log.messages().len(), 2, "it did not give up: {:?}", log.messages());
    drop(Engine::<Account>::open(small(dir.path())).unwrap());
}

#[test]
fn a_drop_that_has_nothing_to_wait_for_logs_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let engine = Engine::<Account>::open(small(dir.path())).unwrap();
    engine.shutdown(soon()).unwrap();
    let log = Log::default();
    log.of(|| drop(engine));
    assert_eq!(log.messages(), []);
}
