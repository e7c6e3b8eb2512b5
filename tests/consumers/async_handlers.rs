//! Asynchronous handlers: as tasks of the application's runtime they keep all promises of handlers on threads. Panics,
//! futures that never wake, a runtime that is dropped, and calls that would wait for themselves lose nothing.

use std::collections::BTreeMap;
use std::future::pending;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::common::{Note, open_on, os_cache, small, soon, until};
use corelane::consumer::{
    Consumer, ConsumerError, ConsumerReport, Delivered, Handled, HealthPolicy, Judgement, LetterKind, LetterSelector,
    Retry, Start,
};
use corelane::testing::FaultyStorage;
use corelane::{Deadline, EventLog, HandlerError, Key, WaitError};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::runtime::{Builder, Runtime};

const SECOND: Duration = Duration::from_secs(1);

fn current() -> Runtime {
    Builder::new_current_thread().enable_time().build().unwrap()
}

fn multi(workers: usize) -> Runtime {
    Builder::new_multi_thread().worker_threads(workers).enable_time().build().unwrap()
}

fn runtimes() -> [Runtime; 3] {
    [current(), multi(1), multi(4)]
}

/// The events that handlers saw, by key.
#[derive(Clone, Default)]
struct Seen(Arc<Mutex<BTreeMap<u64, Vec<u64>>>>);

impl Seen {
    fn add(&self, event: &Delivered<Note>) {
        self.0.lock().unwrap().entry(event.meta().key.0).or_default().push(event.event().n.to_native());
    }

    fn of(&self, key: u64) -> Vec<u64> {
        self.0.lock().unwrap().get(&key).cloned().unwrap_or_default()
    }

    fn len(&self) -> usize {
        self.0.lock().unwrap().values().map(Vec::len).sum()
    }
}

fn publish(engine: &EventLog<Note>, events: impl IntoIterator<Item = (u64, u64)>) {
    let mut producer = engine.producer();
    for (key, n) in events {
        drop(producer.publish(Key::new(key), Note::new(n)).unwrap());
    }
    engine.flush(soon()).unwrap();
}

fn quick(attempts: u32) -> Retry {
    Retry::fixed().base(Duration::from_millis(1)).jitter(1.0, 1.0).attempts(attempts)
}

/// A health policy that never calls the service unhealthy.
fn patient() -> HealthPolicy {
    HealthPolicy::default().consecutive_max(1_000_000).failure_percent_max(100)
}

fn report(engine: &EventLog<Note>, name: &str) -> ConsumerReport {
    engine.consumers().into_iter().find(|report| report.name == name).unwrap()
}

/// Waits without blocking the runtime.
async fn until_so(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + crate::common::PATIENCE;
    while !is_so() {
        assert!(Instant::now() < end, "{what}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[test]
fn each_key_is_handled_in_order_with_64_futures_at_once() {
    for runtime in runtimes() {
        let dir = tempfile::tempdir().unwrap();
        let engine = EventLog::<Note>::open(small(dir.path()).shards(2)).unwrap();
        let (seen, running, most) = (Seen::default(), Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (saw, runs, peak) = (seen.clone(), Arc::clone(&running), Arc::clone(&most));
        runtime.block_on(async {
            publish(&engine, (0..4000).map(|n| (n % 100, n)));
            let consumer = engine.consumer("c").concurrency(64).retry(quick(1000)).health(patient());
            let consumer = consumer.start_async(move |event| {
                let (saw, runs, peak) = (saw.clone(), Arc::clone(&runs), Arc::clone(&peak));
                async move {
                    peak.fetch_max(runs.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                    let mut random = StdRng::seed_from_u64(event.event().n.to_native());
                    for _ in 0..random.random_range(0..4) {
                        tokio::task::yield_now().await;
                    }
                    if random.random_bool(0.1) {
                        tokio::time::sleep(Duration::from_micros(random.random_range(0..2000))).await;
                    }
                    runs.fetch_sub(1, Ordering::SeqCst);
                    if event.call().attempt() == 1 && random.random_bool(0.1) {
                        return Err("once".into());
                    }
                    saw.add(&event);
                    Ok(())
                }
            });
            let consumer = consumer.unwrap();
            // More events while it runs.
            publish(&engine, (4000..6000).map(|n| (n % 100, n)));
            consumer.drain_async(soon()).await.unwrap();
            let report = consumer.report();
            assert_eq!((report.handled, report.waiting(), report.running), (6000, 0, 0));
            assert!(report.failed > 100, "{}", report.failed);
            consumer.stop_async(soon()).await.unwrap();
        });
        for key in 0..100 {
            assert_eq!(seen.of(key), (0..6000).filter(|n| n % 100 == key).collect::<Vec<_>>());
        }
        let most = most.load(Ordering::SeqCst);
        assert!((16..=64).contains(&most), "{most}");
        engine.shutdown(soon()).unwrap();
    }
}

/// A dropped runtime is a crash of the consumer alone, at any point.
#[test]
fn nothing_is_lost_and_no_order_is_broken_when_runtimes_are_dropped_at_any_time() {
    let (mut unfinished, mut repeated) = (0, 0);
    for seed in 0..8 {
        let dir = tempfile::tempdir().unwrap();
        let mut random = StdRng::seed_from_u64(seed);
        let (lives, done) = (Arc::new(Mutex::new(Vec::<BTreeMap<u64, Vec<u64>>>::new())), Seen::default());
        let count = 2000;
        let open = || EventLog::<Note>::open(small(dir.path()).shards(2)).unwrap();
        let mut engine = open();
        publish(&engine, (0..count).map(|n| (n % 50, n)));
        for life in 0.. {
            let runtime = if random.random_bool(0.5) { current() } else { multi(2) };
            let last = life == 12;
            lives.lock().unwrap().push(BTreeMap::new());
            let (saw, did) = (Arc::clone(&lives), done.clone());
            let (consumer, is_over) = runtime.block_on(async {
                let builder = engine.consumer("c").concurrency(64).save_every(Duration::from_millis(1));
                let consumer = builder.start_async(move |event| {
                    let (saw, did) = (Arc::clone(&saw), did.clone());
                    async move {
                        let n = event.event().n.to_native();
                        let key = event.meta().key.0;
                        saw.lock().unwrap().last_mut().unwrap().entry(key).or_default().push(n);
                        tokio::time::sleep(Duration::from_micros(n * 7919 % 3000)).await;
                        did.add(&event);
                        Ok(())
                    }
                });
                let consumer = consumer.unwrap();
                if last {
                    consumer.drain_async(soon()).await.unwrap();
                } else {
                    tokio::time::sleep(Duration::from_millis(random.random_range(0..15))).await;
                }
                let report = consumer.report();
                (consumer, report.waiting() == 0)
            });
            match random.random_range(0..3) {
                0 => runtime.shutdown_background(),
                1 => drop(runtime),
                _ => {
                    drop(consumer);
                    drop(runtime);
                    until("the consumer ends", || !report(&engine, "c").is_running);
                    if last {
                        break;
                    }
                    continue;
                }
            }
            until("the consumer ends", || !report(&engine, "c").is_running);
            let ended = report(&engine, "c").failure;
            assert!(matches!(ended.unwrap().error(), ConsumerError::RuntimeEnded));
            let stopped = consumer.stop(soon());
            assert!(matches!(stopped, Err(ConsumerError::Ended { failure: Some(_) })), "{stopped:?}");
            unfinished += usize::from(!is_over);
            if last {
                break;
            }
            if random.random_bool(0.3) {
                drop(engine);
                engine = open();
            }
        }
        for key in 0..50 {
            let all: Vec<u64> = (0..count).filter(|n| n % 50 == key).collect();
            let mut handled = done.of(key);
            repeated += handled.len() - all.len();
            handled.sort_unstable();
            handled.dedup();
            assert_eq!(handled, all, "seed {seed}: every event is handled");
            for life in lives.lock().unwrap().iter() {
                let saw = life.get(&key).cloned().unwrap_or_default();
                assert!(saw.is_sorted(), "seed {seed}, key {key}: {saw:?}");
                // A run has no holes either.
                let from = all.iter().position(|n| saw.first() == Some(n)).unwrap_or(0);
                assert_eq!(saw, all[from..from + saw.len()], "seed {seed}, key {key}");
            }
        }
        engine.shutdown(soon()).unwrap();
    }
    assert!(unfinished > 10, "runtimes were dropped while handlers ran: {unfinished}");
    assert!(repeated < 8 * 12 * 200, "the position was saved between: {repeated} events again");
}

#[test]
fn failures_become_dead_letters_and_are_handled_again() {
    for runtime in runtimes() {
        let dir = tempfile::tempdir().unwrap();
        let engine = EventLog::<Note>::open(small(dir.path())).unwrap();
        publish(&engine, (0..40).map(|n| (n % 4, n)));
        let (seen, is_repaired) = (Seen::default(), Arc::new(AtomicBool::new(false)));
        let (saw, repaired) = (seen.clone(), Arc::clone(&is_repaired));
        runtime.block_on(async {
            let builder = engine.consumer("c").concurrency(8).retry(quick(3)).health(patient());
            let builder = builder.judge(|error, _| match error.to_string().as_str() {
                "skip me" => Judgement::Skip,
                _ => Judgement::ByPolicy,
            });
            let consumer = builder.start_async(move |event| {
                let (saw, is_repaired) = (saw.clone(), repaired.load(Ordering::SeqCst));
                async move {
                    tokio::task::yield_now().await;
                    match event.meta().key.0 {
                        1 if !is_repaired => Err("broken".into()),
                        2 if event.event().n == 2 => Err("skip me".into()),
                        _ => {
                            saw.add(&event);
                            Ok(())
                        }
                    }
                }
            });
            let consumer = consumer.unwrap();
            consumer.drain_async(soon()).await.unwrap();
            let report = consumer.report();
            assert_eq!((report.handled, report.parked, report.skipped, report.failed), (29, 10, 1, 4));
            let letters = consumer.dead_letters_async(None, 100).await.unwrap();
            assert_eq!(letters.len(), 10);
            assert_eq!((letters[0].why, letters[0].attempts, &*letters[0].error), (LetterKind::Failed, 3, "broken"));
            assert!(letters[1..].iter().all(|letter| letter.why == LetterKind::Behind));
            is_repaired.store(true, Ordering::SeqCst);
            assert_eq!(consumer.reprocess_async(LetterSelector::All).await.unwrap(), 1);
            until_so("the letters are handled", || consumer.report().letters.letters == 0).await;
            publish(&engine, [(1, 41)]);
            consumer.drain_async(soon()).await.unwrap();
            assert_eq!(consumer.discard_async(LetterSelector::All).await.unwrap(), 0);
            consumer.stop_async(soon()).await.unwrap();
        });
        assert_eq!(seen.of(1), (0..40).filter(|n| n % 4 == 1).chain([41]).collect::<Vec<_>>());
        engine.shutdown(soon()).unwrap();
    }
}

#[test]
fn a_panic_of_the_handler_or_of_its_future_is_a_failed_attempt() {
    for runtime in runtimes() {
        let dir = tempfile::tempdir().unwrap();
        let engine = EventLog::<Note>::open(small(dir.path())).unwrap();
        publish(&engine, (0..4).map(|n| (n, n)).chain((0..4).map(|n| (n, n + 4))));
        let seen = Seen::default();
        let saw = seen.clone();
        struct PanicsInDrop;
        impl Drop for PanicsInDrop {
            fn drop(&mut self) {
                assert!(std::thread::panicking(), "dropped");
            }
        }
        runtime.block_on(async {
            let builder = engine.consumer("c").concurrency(4).retry(quick(2)).health(patient());
            let consumer = builder.start_async(move |event| {
                let (saw, n) = (saw.clone(), event.event().n.to_native());
                let is_first = event.call().attempt() == 1;
                assert!(n != 0 || !is_first, "before the future");
                async move {
                    assert!(n != 1 || !is_first, "first poll");
                    tokio::task::yield_now().await;
                    assert!(n != 2, "each later poll");
                    if n == 3 && is_first {
                        let _held = PanicsInDrop;
                        tokio::task::yield_now().await;
                    }
                    saw.add(&event);
                    Ok(())
                }
            });
            let consumer = consumer.unwrap();
            consumer.drain_async(soon()).await.unwrap();
            let report = consumer.report();
            assert_eq!((report.handled, report.failed, report.parked), (6, 5, 2));
            let letters = consumer.dead_letters_async(None, 10).await.unwrap();
            assert_eq!(letters[0].error, "the handler panicked: each later poll");
            consumer.stop_async(soon()).await.unwrap();
        });
        assert_eq!([0, 1, 2, 3].map(|key| seen.of(key)), [vec![0, 4], vec![1, 5], vec![], vec![3, 7]]);
        engine.shutdown(soon()).unwrap();
    }
}

/// Starts a consumer whose handler never completes for key 0. Returns what it has handled, and what it saw.
fn start_stuck(engine: &EventLog<Note>) -> (Consumer<Note>, Seen, Arc<AtomicUsize>) {
    let (seen, started) = (Seen::default(), Arc::new(AtomicUsize::new(0)));
    let (saw, starts) = (seen.clone(), Arc::clone(&started));
    let consumer = engine.consumer("c").concurrency(4).start_async(move |event| {
        let (saw, starts) = (saw.clone(), Arc::clone(&starts));
        async move {
            if event.meta().key.0 == 0 {
                starts.fetch_add(1, Ordering::SeqCst);
                pending::<()>().await;
            }
            saw.add(&event);
            Ok(())
        }
    });
    (consumer.unwrap(), seen, started)
}

#[test]
fn a_future_that_never_wakes_holds_up_its_key_alone_and_is_cancelled_at_the_deadline_of_stop() {
    for runtime in runtimes() {
        let dir = tempfile::tempdir().unwrap();
        let engine = EventLog::<Note>::open(small(dir.path())).unwrap();
        publish(&engine, (0..40).map(|n| (n % 4, n)));
        runtime.block_on(async {
            let (consumer, seen, started) = start_stuck(&engine);
            until_so("the other keys are done", || seen.len() == 30).await;
            until_so("it waits", || consumer.report().running_since.is_some_and(|since| since > SECOND / 100)).await;
            let drained = consumer.drain_async(Duration::from_millis(20)).await;
            assert!(matches!(drained, Err(ConsumerError::Wait(WaitError::TimedOut))), "{drained:?}");
            let stopped = consumer.stop_async(Duration::from_millis(20)).await;
            assert!(matches!(stopped, Err(ConsumerError::Busy { .. })), "{stopped:?}");
            until_so("it ends", || !report(&engine, "c").is_running).await;
            assert_eq!(report(&engine, "c").failure, None);
            assert_eq!(started.load(Ordering::SeqCst), 1);

            // The event counts as not handled, and the others as handled.
            let seen = Seen::default();
            let saw = seen.clone();
            let consumer = engine.consumer("c").concurrency(4).start_async(move |event| {
                saw.add(&event);
                async { Ok(()) }
            });
            let consumer = consumer.unwrap();
            consumer.drain_async(soon()).await.unwrap();
            assert_eq!(seen.of(0), (0..40).filter(|n| n % 4 == 0).collect::<Vec<_>>());
            assert_eq!(seen.len(), 10);
            consumer.stop_async(soon()).await.unwrap();
        });
        engine.shutdown(soon()).unwrap();
    }
}

#[test]
fn the_blocking_stop_gives_up_at_its_deadline_and_cancels_too() {
    let dir = tempfile::tempdir().unwrap();
    let engine = EventLog::<Note>::open(small(dir.path())).unwrap();
    publish(&engine, [(0, 0), (1, 1)]);
    let runtime = multi(2);
    let (consumer, seen, started) = runtime.block_on(async { start_stuck(&engine) });
    until("it is stuck", || started.load(Ordering::SeqCst) == 1 && seen.len() == 1);
    let stopped = consumer.stop(Duration::from_millis(20));
    assert!(matches!(stopped, Err(ConsumerError::Busy { .. })), "{stopped:?}");
    // Now the engine can close.
    engine.shutdown(soon()).unwrap();
}

#[test]
fn a_consumer_ends_with_its_runtime_and_marks_nothing_as_handled() {
    for (runtime, waits) in [(current(), true), (multi(2), true), (multi(2), false)] {
        let dir = tempfile::tempdir().unwrap();
        let engine = EventLog::<Note>::open(small(dir.path())).unwrap();
        publish(&engine, (0..40).map(|n| (n % 4, n)));
        let (consumer, _seen, _) = runtime.block_on(async {
            let (consumer, seen, started) = start_stuck(&engine);
            until_so("the other keys are done", || seen.len() == 30 && started.load(Ordering::SeqCst) == 1).await;
            (consumer, seen, started)
        });
        if waits {
            drop(runtime)
        } else {
            runtime.shutdown_background()
        }
        until("it ends", || !consumer.report().is_running);
        let failure = report(&engine, "c").failure.unwrap();
        assert!(matches!(failure.error(), ConsumerError::RuntimeEnded), "{failure}");
        let drained = consumer.drain(Deadline::NEVER);
        assert!(matches!(drained, Err(ConsumerError::Ended { .. })), "{drained:?}");
        assert!(matches!(engine.drain_consumers(Deadline::NEVER), Err(ConsumerError::Ended { .. })));
        drop(consumer);

        let seen = Seen::default();
        let saw = seen.clone();
        let again = engine.consumer("c").start(move |event, meta| {
            saw.0.lock().unwrap().entry(meta.key.0).or_default().push(event.n.to_native());
            Ok(())
        });
        again.unwrap().drain(soon()).unwrap();
        assert_eq!((seen.of(0).len(), seen.len()), (10, 10), "the unfinished key alone");
        engine.shutdown(soon()).unwrap();
    }
}

/// A runtime of one thread runs nothing outside `block_on`.
#[test]
fn an_idle_consumer_stops_and_answers_although_its_runtime_does_not_run() {
    let dir = tempfile::tempdir().unwrap();
    let engine = EventLog::<Note>::open(small(dir.path())).unwrap();
    let runtime = current();
    let names = ["a", "b"];
    let handler = |_: Delivered<Note>| async { Ok(()) };
    let [a, b] = runtime.block_on(async {
        let consumers = names.map(|name| engine.consumer(name).start_async(handler).unwrap());
        publish(&engine, (0..100).map(|n| (n, n)));
        for consumer in &consumers {
            consumer.drain_async(soon()).await.unwrap();
        }
        consumers
    });
    a.drain(soon()).unwrap();
    a.seek(Start::Latest).unwrap();
    a.pause().unwrap();
    assert!(report(&engine, "a").is_paused);
    assert!(a.dead_letters(None, 1).unwrap().is_empty());
    a.save().unwrap();
    a.stop(Deadline::NEVER).unwrap();
    assert!(!report(&engine, "a").is_running);
    // The engine stops the other one.
    engine.shutdown(Deadline::NEVER).unwrap();
    assert!(!b.report().is_running);
    drop((runtime, engine));

    let engine = EventLog::<Note>::open(small(dir.path())).unwrap();
    for name in names {
        let consumer = engine.consumer(name).start(|_, _| Err("handled twice".into())).unwrap();
        consumer.drain(soon()).unwrap();
        assert_eq!((consumer.report().failed, consumer.report().handled), (0, 0), "all positions were saved");
    }
}

#[test]
fn blocking_calls_on_the_only_thread_of_the_runtime_never_wait_for_a_running_handler() {
    let dir = tempfile::tempdir().unwrap();
    let engine = EventLog::<Note>::open(small(dir.path())).unwrap();
    publish(&engine, [(0, 0)]);
    current().block_on(async {
        let (consumer, _, started) = start_stuck(&engine);
        until_so("it is stuck", || started.load(Ordering::SeqCst) == 1).await;
        let on_thread = |outcome: Result<(), ConsumerError>| {
            assert!(matches!(outcome, Err(ConsumerError::Wait(WaitError::OnEngineThread))), "{outcome:?}");
        };
        on_thread(consumer.drain(Deadline::NEVER));
        on_thread(consumer.seek(Start::Beginning));
        on_thread(engine.drain_consumers(Deadline::NEVER));
        assert!(matches!(engine.shutdown(Deadline::NEVER), Err(WaitError::OnEngineThread)));
        publish(&engine, [(1, 1)]);
        // These wait for no handler.
        consumer.pause().unwrap();
        consumer.resume().unwrap();
        consumer.save().unwrap();
        // On a blocking thread of the runtime, waiting is allowed.
        let waited = tokio::task::spawn_blocking(move || (consumer.drain(Duration::from_millis(20)), consumer)).await;
        let (drained, consumer) = waited.unwrap();
        assert!(matches!(drained, Err(ConsumerError::Wait(WaitError::TimedOut))), "{drained:?}");
        on_thread(consumer.stop(Deadline::NEVER));
        assert!(report(&engine, "c").is_running, "its handler still runs");
    });
    // The runtime is gone, and with it the handler.
    engine.shutdown(soon()).unwrap();
}

#[test]
fn an_engine_that_shuts_down_waits_for_running_handlers() {
    for workers in [1, 4] {
        let dir = tempfile::tempdir().unwrap();
        let engine = Arc::new(EventLog::<Note>::open(small(dir.path())).unwrap());
        let runtime = multi(workers);
        let (started, ended) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (starts, ends, own) = (Arc::clone(&started), Arc::clone(&ended), Arc::clone(&engine));
        let consumer = runtime.block_on(async {
            let consumer = engine.consumer("c").concurrency(8).start_async(move |_| {
                let (starts, ends, own) = (Arc::clone(&starts), Arc::clone(&ends), Arc::clone(&own));
                async move {
                    starts.fetch_add(1, Ordering::SeqCst);
                    assert!(matches!(own.shutdown(Deadline::NEVER), Err(WaitError::OnEngineThread)));
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    ends.fetch_add(1, Ordering::SeqCst);
                    Ok(())
                }
            });
            consumer.unwrap()
        });
        publish(&engine, (0..8).map(|n| (n, n)));
        until("the handlers run", || started.load(Ordering::SeqCst) == 8);
        engine.shutdown(Deadline::NEVER).unwrap();
        assert_eq!(ended.load(Ordering::SeqCst), 8);
        let report = consumer.report();
        assert_eq!((report.handled, report.is_running, report.failure), (8, false, None));
        assert!(matches!(consumer.pause(), Err(ConsumerError::Ended { failure: None })));
        assert!(matches!(runtime.block_on(consumer.pause_async()), Err(ConsumerError::Ended { failure: None })));
    }
}

#[test]
fn an_engine_is_dropped_while_handlers_run_and_its_store_opens_again() {
    for runtime in [current(), multi(1)] {
        let dir = tempfile::tempdir().unwrap();
        runtime.block_on(async {
            let engine = EventLog::<Note>::open(small(dir.path())).unwrap();
            publish(&engine, [(0, 0)]);
            let started = Arc::new(AtomicUsize::new(0));
            let starts = Arc::clone(&started);
            let consumer = engine.consumer("c").start_async(move |_| {
                starts.fetch_add(1, Ordering::SeqCst);
                async {
                    tokio::time::sleep(Duration::from_millis(30)).await;
                    Ok(())
                }
            });
            until_so("it runs", || started.load(Ordering::SeqCst) == 1).await;
            drop(consumer);
            tokio::task::spawn_blocking(move || drop(engine)).await.unwrap();
            let engine = EventLog::<Note>::open(small(dir.path())).unwrap();
            assert_eq!(engine.consumer("c").start(|_, _| Ok(())).unwrap().report().unread, 0, "it was handled");
        });
    }
}

#[test]
fn handlers_call_the_engine_and_their_own_consumer() {
    for runtime in runtimes() {
        let dir = tempfile::tempdir().unwrap();
        let engine = Arc::new(EventLog::<Note>::open(small(dir.path())).unwrap());
        publish(&engine, (0..8).map(|n| (n, n)));
        let own: Arc<Mutex<Option<Arc<Consumer<Note>>>>> = Arc::default();
        let (said, is_done) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicUsize::new(0)));
        runtime.block_on(async {
            let (me, words, done, called) =
                (Arc::clone(&own), Arc::clone(&said), Arc::clone(&is_done), Arc::clone(&engine));
            let consumer = engine.consumer("c").concurrency(8).start_async(move |event| {
                let (me, words, done, engine) =
                    (Arc::clone(&me), Arc::clone(&words), Arc::clone(&done), Arc::clone(&called));
                async move {
                    if event.event().n != 3 {
                        return Ok(());
                    }
                    until_so("the handle is there", || me.lock().unwrap().is_some()).await;
                    let me = me.lock().unwrap().take().unwrap();
                    let (key, id) = (event.meta().key, event.meta().id());
                    let mut outcomes = Vec::new();
                    outcomes.push(me.drain(Deadline::NEVER));
                    outcomes.push(me.drain_async(Deadline::NEVER).await);
                    outcomes.push(me.wait_handled(key, id, Deadline::NEVER).map(drop));
                    outcomes.push(me.wait_handled_async(key, id, Deadline::NEVER).await.map(drop));
                    outcomes.push(me.seek(Start::Beginning));
                    outcomes.push(me.seek_async(Start::Beginning).await);
                    outcomes.push(engine.drain_consumers(Deadline::NEVER));
                    let refused = outcomes.len();
                    outcomes.push(me.pause());
                    outcomes.push(me.pause_async().await);
                    outcomes.push(me.resume_async().await);
                    outcomes.push(me.save_async().await);
                    outcomes.push(me.save());
                    outcomes.push(me.dead_letters_async(None, 1).await.map(drop));
                    outcomes.push(me.gap_filled_async(key).await.map(drop));
                    for (i, outcome) in outcomes.into_iter().enumerate() {
                        let is_refused = matches!(outcome, Err(ConsumerError::Wait(WaitError::OnEngineThread)));
                        assert!(is_refused == (i < refused) && (is_refused || outcome.is_ok()), "{i}: {outcome:?}");
                    }
                    // Publishing and its receipt, awaited.
                    let shared = engine.shared_producer();
                    let receipt = shared.publish(Key(9), Note::new(99)).with_receipt().await.unwrap();
                    receipt.appended().await.unwrap();
                    words.lock().unwrap().push("checked");
                    let me = Arc::into_inner(me).unwrap();
                    let stopped = me.stop_async(Deadline::NEVER).await;
                    assert!(matches!(stopped, Err(ConsumerError::Wait(WaitError::OnEngineThread))), "{stopped:?}");
                    done.fetch_add(1, Ordering::SeqCst);
                    Ok(())
                }
            });
            *own.lock().unwrap() = Some(Arc::new(consumer.unwrap()));
            until_so("it stopped itself", || !report(&engine, "c").is_running).await;
        });
        let report = report(&engine, "c");
        assert_eq!((report.failure, is_done.load(Ordering::SeqCst)), (None, 1));
        assert_eq!(*said.lock().unwrap(), ["checked"]);
        engine.shutdown(soon()).unwrap();
    }
}

#[test]
fn a_consumer_needs_a_runtime_with_timers_and_registers_nothing_without() {
    let dir = tempfile::tempdir().unwrap();
    let engine = EventLog::<Note>::open(small(dir.path())).unwrap();
    let handler = |_: Delivered<Note>| async { Ok(()) };
    let outside = engine.consumer("c").start_async(handler);
    assert!(matches!(outside, Err(ConsumerError::NoRuntime)), "{outside:?}");
    let no_timers = Builder::new_current_thread().build().unwrap();
    let without = no_timers.block_on(async { engine.consumer("c").start_async(handler) });
    assert!(matches!(without, Err(ConsumerError::NoRuntime)), "{without:?}");
    assert!(engine.consumers().is_empty());
    // A runtime that is shut down drops its tasks at once.
    let runtime = current();
    let handle = runtime.handle().clone();
    drop(runtime);
    let entered = handle.enter();
    let gone = engine.consumer("c").start_async(handler);
    assert!(matches!(gone, Err(ConsumerError::RuntimeEnded)), "{gone:?}");
    drop(entered);
    assert!(!report(&engine, "c").is_running);
    drop(engine.consumer("c").start(|_, _| Ok(())).unwrap());
    engine.shutdown(soon()).unwrap();
}

#[test]
fn pausing_seeking_and_waiting_work_from_tasks() {
    for runtime in runtimes() {
        let dir = tempfile::tempdir().unwrap();
        let engine = EventLog::<Note>::open(small(dir.path())).unwrap();
        let (seen, effects) = (Seen::default(), Arc::new(AtomicUsize::new(0)));
        let (saw, had) = (seen.clone(), Arc::clone(&effects));
        runtime.block_on(async {
            let builder = engine.consumer("c").concurrency(4).start_at(Start::Latest);
            let consumer = builder.start_async(move |event| {
                let (saw, had) = (saw.clone(), Arc::clone(&had));
                async move {
                    let call = event.call();
                    call.effect_async(async |key| {
                        tokio::task::yield_now().await;
                        assert!(key.to_string().starts_with("c/0/"));
                        had.fetch_add(1, Ordering::SeqCst);
                        Ok::<_, HandlerError>(())
                    })
                    .await?;
                    saw.add(&event);
                    Ok(())
                }
            });
            let consumer = consumer.unwrap();
            consumer.pause_async().await.unwrap();
            publish(&engine, (0..10).map(|n| (n, n)));
            let drained = consumer.drain_async(Duration::from_millis(20)).await;
            assert!(matches!(drained, Err(ConsumerError::Wait(WaitError::TimedOut))), "{drained:?}");
            assert_eq!(seen.len(), 0);
            consumer.resume_async().await.unwrap();
            consumer.drain_async(soon()).await.unwrap();
            consumer.seek_async(Start::Beginning).await.unwrap();
            consumer.drain_async(soon()).await.unwrap();
            assert_eq!((seen.len(), effects.load(Ordering::SeqCst)), (20, 10), "no effect runs again");
            let letters = engine.shared_producer();
            let receipt = letters.publish(Key(7), Note::new(10)).with_receipt().wait().unwrap();
            receipt.appended().wait().unwrap();
            engine.flush(soon()).unwrap();
            let mut reader = engine.reader(corelane::ShardId(0));
            let mut last = None;
            while let Some(record) = reader.next().unwrap() {
                last = Some((record.meta.key, record.meta.id()));
            }
            let (key, id) = last.unwrap();
            let handled = consumer.wait_handled_async(key, id, soon()).await;
            assert_eq!(handled.unwrap(), Handled::Yes);
            assert_eq!(seen.of(7), [7, 7, 10]);
            consumer.stop_async(soon()).await.unwrap();
        });
        engine.shutdown(soon()).unwrap();
    }
}

/// A request, a change of position and a wait that are dropped leave the consumer running.
#[test]
fn dropped_futures_of_the_handle_leave_the_consumer_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let engine = EventLog::<Note>::open(small(dir.path())).unwrap();
    current().block_on(async {
        let (may_go, go) = tokio::sync::watch::channel(false);
        let consumer = engine.consumer("c").concurrency(2).start_async(move |_| {
            let mut go = go.clone();
            async move { go.wait_for(|may_go| *may_go).await.map(drop).map_err(Into::into) }
        });
        let consumer = consumer.unwrap();
        publish(&engine, (0..10).map(|n| (n, n)));
        until_so("two handlers run", || consumer.report().running == 2).await;
        for _ in 0..50 {
            tokio::select! {
                biased;
                sought = consumer.seek_async(Start::Latest) => panic!("handlers run: {sought:?}"),
                drained = consumer.drain_async(Deadline::NEVER) => panic!("handlers run: {drained:?}"),
                () = tokio::time::sleep(Duration::from_millis(1)) => {}
            }
        }
        may_go.send(true).unwrap();
        consumer.drain_async(soon()).await.unwrap();
        assert_eq!(consumer.report().handled, 10, "no position was changed");
        // A dropped stop stops.
        tokio::select! {
            biased;
            () = async {} => {}
            stopped = consumer.stop_async(Deadline::NEVER) => panic!("not polled: {stopped:?}"),
        }
        until_so("it ends", || !report(&engine, "c").is_running).await;
    });
    engine.shutdown(soon()).unwrap();
}

/// While its probe of an unhealthy service is being handled, a consumer has nothing to do and asks for no attention.
#[test]
fn a_consumer_sleeps_while_its_only_place_probes_the_service() {
    let dir = tempfile::tempdir().unwrap();
    let engine = EventLog::<Note>::open(small(dir.path())).unwrap();
    publish(&engine, (0..3).map(|n| (n, n)));
    let seconds = Arc::new(AtomicUsize::new(1));
    let clock = Arc::clone(&seconds);
    let builder = engine.consumer("c").retry(Retry::fixed().base(3600 * SECOND).cap(3600 * SECOND));
    let builder = builder.save_every(3600 * SECOND).health(HealthPolicy::default().consecutive_max(1));
    let poller = builder.poller().unwrap();
    let mut poller = poller.clock(move || SECOND * clock.load(Ordering::SeqCst) as u32);
    let failing = poller.next().unwrap().unwrap();
    poller.failed(failing, "down").unwrap();
    seconds.store(100, Ordering::SeqCst);
    let probe = poller.next().unwrap().expect("a probe is due");
    assert!(poller.next().unwrap().is_none(), "one place");
    let mut ready = Box::pin(poller.ready());
    assert!(crate::common::poll_once(&mut ready).is_none(), "nothing to do before the probe is reported");
    drop(ready);
    poller.succeeded(probe).unwrap();
    assert!(poller.next().unwrap().is_some());
}

/// The disk hangs while the consumer's position is due. Other tasks of the only thread go on.
#[test]
fn a_disk_that_hangs_does_not_block_the_runtime() {
    let storage = FaultyStorage::new();
    let engine = open_on(&storage, os_cache("/s")).unwrap();
    let runtime = current();
    runtime.block_on(async {
        let builder = engine.consumer("c").concurrency(2).save_every(Duration::from_millis(1)).retry(quick(1));
        let consumer = builder.start_async(|event| async move {
            if event.event().n.to_native().is_multiple_of(2) { Err("parked".into()) } else { Ok(()) }
        });
        let consumer = consumer.unwrap();
        // The shard has its first segment before the disk hangs.
        publish(&engine, [(100, 1)]);
        let mut producer = engine.producer();
        for round in 0..20 {
            storage.hold(true);
            for n in 0..4 {
                drop(producer.publish(Key(round * 4 + n), Note::new(n)).unwrap());
            }
            // If a step of the consumer blocked this thread, the disk would be held for ever.
            tokio::time::sleep(Duration::from_millis(5)).await;
            storage.hold(false);
            engine.flush(soon()).unwrap();
            consumer.drain_async(soon()).await.unwrap();
            // Time to save: the next round begins without anything due.
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!((consumer.report().handled, consumer.report().parked), (41, 40));
        consumer.stop_async(soon()).await.unwrap();
    });
    engine.shutdown(soon()).unwrap();
}

#[test]
fn a_handler_that_blocks_a_thread_of_the_runtime_delays_but_loses_nothing() {
    for runtime in runtimes() {
        let dir = tempfile::tempdir().unwrap();
        let engine = EventLog::<Note>::open(small(dir.path())).unwrap();
        publish(&engine, (0..60).map(|n| (n % 10, n)));
        let seen = Seen::default();
        let saw = seen.clone();
        runtime.block_on(async {
            let consumer = engine.consumer("c").concurrency(4).start_async(move |event| {
                let saw = saw.clone();
                async move {
                    std::thread::sleep(Duration::from_millis(2));
                    saw.add(&event);
                    Ok(())
                }
            });
            let consumer = consumer.unwrap();
            consumer.drain_async(soon()).await.unwrap();
            consumer.stop_async(soon()).await.unwrap();
        });
        for key in 0..10 {
            assert_eq!(seen.of(key), (0..60).filter(|n| n % 10 == key).collect::<Vec<_>>());
        }
        engine.shutdown(soon()).unwrap();
    }
}

/// The names of this process's threads.
fn threads() -> Vec<String> {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    tasks.filter_map(|task| std::fs::read_to_string(task.unwrap().path().join("comm")).ok()).collect()
}

#[test]
fn an_asynchronous_consumer_has_no_thread() {
    let dir = tempfile::tempdir().unwrap();
    let engine = EventLog::<Note>::open(small(dir.path())).unwrap();
    current().block_on(async {
        let handler = |_: Delivered<Note>| async { Ok(()) };
        let start = |i| engine.consumer(&format!("lazy{i}")).concurrency(64).start_async(handler).unwrap();
        let consumers: Vec<_> = (0..20).map(start).collect();
        publish(&engine, (0..100).map(|n| (n, n)));
        for consumer in &consumers {
            consumer.drain_async(soon()).await.unwrap();
        }
        let own: Vec<_> = threads().into_iter().filter(|name| name.starts_with("corelane-lazy")).collect();
        assert_eq!(own, [""; 0]);
        for consumer in consumers {
            consumer.stop_async(soon()).await.unwrap();
        }
    });
    engine.shutdown(soon()).unwrap();
}

/// Older segments, which an earlier process wrote, are read on the runtime's blocking threads.
#[test]
fn a_consumer_far_behind_reads_the_older_segments() {
    let dir = tempfile::tempdir().unwrap();
    let config = || small(dir.path());
    let count = 3000;
    {
        let engine = EventLog::<Note>::open(config()).unwrap();
        drop(engine.consumer("c").start(|_, _| Err("not yet".into())).unwrap());
        let mut producer = engine.producer();
        for n in 0..count {
            drop(producer.publish(Key(n % 10), Note::sized(n, 200)).unwrap());
        }
        engine.shutdown(soon()).unwrap();
    }
    for runtime in [current(), multi(2)] {
        let engine = EventLog::<Note>::open(config()).unwrap();
        let seen = Seen::default();
        let saw = seen.clone();
        runtime.block_on(async {
            let consumer = engine.consumer("c").concurrency(16).health(patient()).start_async(move |event| {
                let saw = saw.clone();
                async move {
                    let kept = event.clone();
                    tokio::task::yield_now().await;
                    assert_eq!(kept.event().text.len(), 200);
                    saw.add(&event);
                    Ok(())
                }
            });
            let consumer = consumer.unwrap();
            consumer.drain_async(soon()).await.unwrap();
            seen.0.lock().unwrap().clear();
            consumer.seek_async(Start::Beginning).await.unwrap();
            consumer.drain_async(soon()).await.unwrap();
            consumer.stop_async(soon()).await.unwrap();
        });
        for key in 0..10 {
            assert_eq!(seen.of(key), (0..count).filter(|n| n % 10 == key).collect::<Vec<_>>());
        }
        engine.shutdown(soon()).unwrap();
    }
}
