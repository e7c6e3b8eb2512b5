//! Live feeds and pollers as streams: tasks on a small executor, waiting threads, and the end of engine and shard.

use std::collections::BTreeMap;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};
use std::thread;
use std::time::Duration;

use crate::common::{Note, PATIENCE, SEGMENT, block_on_until, open_on, os_cache, small, soon, until};
use corelane::consumer::{HealthPolicy, Poller, Retry};
use corelane::error::LiveError;
use corelane::log::{Live, LiveEvent, LiveFrom};
use corelane::testing::FaultyStorage;
use corelane::{EventLog, Handler, HandlerError, Key, Meta, OnError, Retention, Wait, WaitError};
use futures_core::{FusedStream, Stream};

type Task = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Wakes a task: its number goes to the executor.
struct TaskWaker(usize, Sender<usize>);

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        // An error: the executor has ended.
        self.1.send(self.0).ok();
    }
}

/// Runs tasks on this thread until all are done, or until no task is woken within `patience`. Returns the number of
/// unfinished tasks. A task is polled only after it was woken.
fn run_all(tasks: Vec<Task>, patience: Duration) -> usize {
    let (woken, wakes): (Sender<usize>, Receiver<usize>) = channel();
    let mut left = tasks.len();
    let waker = |task| Waker::from(Arc::new(TaskWaker(task, woken.clone())));
    let mut tasks: Vec<_> = tasks.into_iter().enumerate().map(|(i, task)| Some((task, waker(i)))).collect();
    (0..left).for_each(|task| woken.send(task).unwrap());
    while left > 0 {
        let Ok(woken) = wakes.recv_timeout(patience) else { break };
        if let Some((task, waker)) = &mut tasks[woken]
            && task.as_mut().poll(&mut Context::from_waker(waker)).is_ready()
        {
            (tasks[woken], left) = (None, left - 1);
        }
    }
    left
}

async fn next<S: Stream + Unpin>(stream: &mut S) -> Option<S::Item> {
    poll_fn(|context| Pin::new(&mut *stream).poll_next(context)).await
}

/// Polls a stream once, with a waker that counts its calls.
fn poll<S: Stream + Unpin>(stream: &mut S, counter: &Arc<Counter>) -> Poll<Option<S::Item>> {
    let waker = Waker::from(Arc::clone(counter));
    Pin::new(stream).poll_next(&mut Context::from_waker(&waker))
}

#[derive(Default)]
struct Counter(AtomicU64);

impl Wake for Counter {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

impl Counter {
    fn get(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }
}

fn publish(engine: &EventLog<Note>, events: impl IntoIterator<Item = (u64, u64)>) {
    let mut producer = engine.producer();
    for (key, n) in events {
        drop(producer.publish(Key::new(key), Note::new(n)).unwrap());
    }
    engine.flush(soon()).unwrap();
}

fn number(event: &LiveEvent<Note>) -> u64 {
    event.event().n.to_native()
}

#[test]
fn feeds_and_their_events_may_go_to_other_threads() {
    fn is_send<T: Send>() {}
    fn is_shared<T: Send + Sync + Clone>() {}
    is_send::<Live<Note>>();
    is_send::<corelane::log::LiveBatches<Note>>();
    is_send::<corelane::log::LiveBatch<Note>>();
    is_shared::<LiveEvent<Note>>();
    is_send::<Poller<Note>>();
}

#[test]
fn a_task_is_woken_by_each_event_of_any_shard() {
    let dir = tempfile::tempdir().unwrap();
    let engine = Arc::new(EventLog::<Note>::open(small(dir.path()).shards(3)).unwrap());
    let mut feed = engine.live().start().unwrap();
    let mut answer = engine.live().key(Key::new(1_000)).start().unwrap();
    let publisher = Arc::clone(&engine);
    // Each event is published only after the one before was seen.
    let reading: Task = Box::pin(async move {
        for n in 0..200 {
            publisher.producer().publish(Key::new(n), Note::new(n)).unwrap();
            let event = next(&mut feed).await.unwrap().unwrap();
            assert_eq!((event.meta().key, number(&event)), (Key::new(n), n));
        }
        publisher.producer().publish(Key::new(1_000), Note::new(7)).unwrap();
    });
    let waiting: Task = Box::pin(async move {
        let record = answer.next_async().await.unwrap().unwrap();
        assert_eq!(record.event.n.to_native(), 7);
    });
    assert_eq!(run_all(vec![reading, waiting], PATIENCE), 0, "a task was not woken");
}

#[test]
fn an_event_that_comes_while_a_task_begins_to_wait_is_not_missed() {
    const ROUNDS: u64 = 30_000;
    let dir = tempfile::tempdir().unwrap();
    let engine = EventLog::<Note>::open(os_cache(dir.path()).wait(Wait::SpinYield)).unwrap();
    let mut feed = engine.live().start().unwrap();
    let mut producer = engine.producer();
    let task: Task = Box::pin(async move {
        for round in 0..ROUNDS {
            drop(producer.publish(Key::new(1), Note::new(round)).unwrap());
            // The pause moves over the time that the shard needs, so that some events come at the worst moment.
            (0..round % 200).for_each(|_| std::hint::spin_loop());
            assert_eq!(number(&next(&mut feed).await.unwrap().unwrap()), round);
        }
    });
    assert_eq!(run_all(vec![task], PATIENCE / 4), 0, "a wake-up was missed");
}

#[test]
fn a_stream_of_batches_returns_every_event_once_and_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let engine = EventLog::<Note>::open(small(dir.path()).shards(2)).unwrap();
    publish(&engine, (0..5000).map(|n| (n % 16, n)));
    let mut feed = engine.live().from(LiveFrom::Beginning).start().unwrap();
    let mut all: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
    // Some events first one by one, in all three ways.
    let record = feed.next_until(Duration::ZERO).unwrap().unwrap();
    all.entry(record.meta.key.0).or_default().push(record.event.n.to_native());
    let counter = Arc::new(Counter::default());
    let Poll::Ready(Some(Ok(event))) = poll(&mut feed, &counter) else { panic!("there are more") };
    all.entry(event.meta().key.0).or_default().push(number(&event));
    let event = feed.into_iter().next().unwrap().unwrap();
    all.entry(event.meta().key.0).or_default().push(number(&event));
    engine.shutdown(soon()).unwrap();
    let mut batches = feed.batches();
    let read = async {
        while let Some(batch) = next(&mut batches).await {
            let batch = batch.unwrap();
            let records = batch.records();
            assert!((1..=256).contains(&records.len()));
            let mut shard = None;
            for record in records {
                assert_eq!(*shard.get_or_insert(record.meta.shard), record.meta.shard, "a batch is of one shard");
                all.entry(record.meta.key.0).or_default().push(record.event.n.to_native());
            }
        }
    };
    block_on_until(read, soon().unwrap()).expect("the stream ends");
    assert!(batches.is_terminated());
    for (key, numbers) in &all {
        assert!(*numbers == (0..5000).filter(|n| n % 16 == *key).collect::<Vec<_>>(), "key {key}");
    }
    assert_eq!(all.len(), 16);
}

#[test]
fn a_task_with_a_long_backlog_lets_other_tasks_run() {
    let dir = tempfile::tempdir().unwrap();
    let engine = EventLog::<Note>::open(os_cache(dir.path())).unwrap();
    publish(&engine, (0..20_000).map(|n| (n % 2, n)));
    for mut feed in [
        engine.live().from(LiveFrom::Beginning).start().unwrap(),
        // No event is wanted.
        engine.live().from(LiveFrom::Beginning).key(Key::new(77)).start().unwrap(),
    ] {
        let (counter, mut seen, mut yields) = (Arc::new(Counter::default()), 0, 0);
        while seen < 20_000 {
            match poll(&mut feed, &counter) {
                Poll::Ready(event) => assert_eq!(number(&event.unwrap().unwrap()), seen),
                Poll::Pending if counter.get() == yields => break,
                Poll::Pending => {
                    yields += 1;
                    assert_eq!(counter.get(), yields, "the task is woken at once");
                    continue;
                }
            }
            seen += 1;
        }
        assert!(yields >= 4, "{yields} pauses in {seen} events");
    }
}

#[test]
fn a_thousand_feeds_at_once_see_every_event() {
    let dir = tempfile::tempdir().unwrap();
    let engine = EventLog::<Note>::open(os_cache(dir.path()).shards(2)).unwrap();
    let seen = Arc::new(AtomicU64::new(0));
    let task = |n: u64| -> Task {
        let builder = engine.live();
        let mut feed =
            if n.is_multiple_of(2) { builder.start() } else { builder.key(Key::new(n % 10)).start() }.unwrap();
        let seen = Arc::clone(&seen);
        Box::pin(async move {
            let wanted = if n.is_multiple_of(2) { 100 } else { 10 };
            for _ in 0..wanted {
                let event = next(&mut feed).await.unwrap().unwrap();
                assert!(n.is_multiple_of(2) || event.meta().key == Key::new(n % 10));
                seen.fetch_add(1, Ordering::Relaxed);
            }
        })
    };
    let tasks: Vec<Task> = (0..1000).map(task).collect();
    thread::scope(|scope| {
        scope.spawn(|| {
            for n in 0..100 {
                publish(&engine, [(n % 10, n)]);
            }
        });
        assert_eq!(run_all(tasks, PATIENCE), 0);
    });
    assert_eq!(seen.load(Ordering::Relaxed), 500 * 100 + 500 * 10);
}

#[test]
fn a_feed_that_is_never_polled_costs_nothing_and_holds_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let engine = EventLog::<Note>::open(os_cache(dir.path()).retention(Retention::bytes(2 * SEGMENT))).unwrap();
    let counter = Arc::new(Counter::default());
    let mut feed = engine.live().start().unwrap();
    assert!(poll(&mut feed, &counter).is_pending());
    publish(&engine, [(1, 1)]);
    until("the task is woken", || counter.get() == 1);
    // The task is woken once, and not again before it polls.
    let mut producer = engine.producer();
    let mut n = 2;
    while engine.shard_metrics()[0].segments_freed < 3 {
        drop(producer.publish(Key::new(1), Note::sized(n, 2000)).unwrap());
        n += 1;
    }
    engine.flush(soon()).unwrap();
    assert_eq!(counter.get(), 1);
    let Poll::Ready(Some(Err(LiveError::Lagged { missed, .. }))) = poll(&mut feed, &counter) else { panic!("lagged") };
    let Poll::Ready(Some(Ok(event))) = poll(&mut feed, &counter) else { panic!("and continues") };
    assert_eq!((missed, event.meta().sequence.0), (number(&event) - 1, number(&event) - 1));
}

#[test]
fn shutdown_ends_waiting_tasks_and_threads() {
    let dir = tempfile::tempdir().unwrap();
    for is_dropped in [false, true] {
        let engine = EventLog::<Note>::open(small(dir.path()).shards(2)).unwrap();
        let feeds: Vec<_> = (0..8).map(|n| if n % 2 == 0 { engine.live() } else { engine.live().durable() }).collect();
        let mut feeds: Vec<_> = feeds.into_iter().map(|builder| builder.start().unwrap()).collect();
        let waiting: Vec<_> = feeds
            .drain(4..)
            .map(|mut feed| thread::spawn(move || feed.into_iter().filter(Result::is_ok).count()))
            .collect();
        let counted = Arc::new(AtomicU64::new(0));
        let tasks: Vec<Task> = feeds
            .into_iter()
            .map(|mut feed| -> Task {
                let counted = Arc::clone(&counted);
                Box::pin(async move {
                    while let Some(event) = next(&mut feed).await {
                        number(&event.unwrap());
                        counted.fetch_add(1, Ordering::Relaxed);
                    }
                    assert!(feed.is_terminated());
                    assert!(next(&mut feed).await.is_none(), "the end stays");
                })
            })
            .collect();
        let runtime = thread::spawn(move || run_all(tasks, PATIENCE));
        publish(&engine, (0..100).map(|n| (n, n)));
        // These may be appended and synced while the engine closes.
        let mut producer = engine.producer();
        (100..200).for_each(|n| drop(producer.publish(Key::new(n), Note::new(n)).unwrap()));
        if !is_dropped {
            engine.shutdown(soon()).unwrap();
        }
        drop(engine);
        assert_eq!(runtime.join().unwrap(), 0, "a task still waits");
        assert_eq!(counted.load(Ordering::Relaxed), 4 * 200);
        assert_eq!(waiting.into_iter().map(|thread| thread.join().unwrap()).sum::<usize>(), 4 * 200);
    }
}

#[test]
fn a_durable_feed_returns_an_event_only_after_its_sync() {
    let storage = FaultyStorage::new();
    let engine = open_on(&storage, small("/s")).unwrap();
    let mut durable = engine.live().durable().start().unwrap();
    let mut appended = engine.live().start().unwrap();
    let counter = Arc::new(Counter::default());
    // So that there is a segment when the disk hangs.
    publish(&engine, [(1, 4)]);
    assert_eq!(durable.next_until(Duration::ZERO).unwrap().unwrap().event.n.to_native(), 4);
    assert_eq!(appended.next_until(Duration::ZERO).unwrap().unwrap().event.n.to_native(), 4);
    assert!(poll(&mut durable, &counter).is_pending());
    storage.hold(true);
    let receipt = engine.producer().publish(Key::new(1), Note::new(5)).unwrap();
    receipt.appended().wait_until(soon().unwrap()).unwrap();
    assert_eq!(appended.next_until(Duration::ZERO).unwrap().unwrap().event.n.to_native(), 5);
    assert!(matches!(durable.next_until(Duration::from_millis(20)), Err(LiveError::Wait(WaitError::TimedOut))));
    assert!(poll(&mut durable, &counter).is_pending());
    assert_eq!(counter.get(), 0, "nothing is durable yet");
    storage.hold(false);
    until("the sync wakes the task", || counter.get() > 0);
    let Poll::Ready(Some(Ok(event))) = poll(&mut durable, &counter) else { panic!("the event is durable") };
    assert_eq!(number(&event), 5);
    assert!(receipt.is_durable());
}

/// Publishes until the shard has failed. Returns the number of events accepted.
fn publish_until_failed(engine: &EventLog<Note>) -> u64 {
    let mut producer = engine.producer();
    let mut n = 0;
    while engine.failures().is_empty() {
        n += u64::from(producer.publish(Key::new(n % 3), Note::new(n)).is_ok());
        thread::sleep(Duration::from_micros(100));
    }
    n
}

#[test]
fn a_failed_shard_ends_its_feeds_with_the_failure_after_everything_readable() {
    for n in 1..12 {
        let storage = FaultyStorage::new();
        let engine = open_on(&storage, small("/s")).unwrap();
        let count = |mut feed: Live<Note>| {
            let mut seen = 0;
            loop {
                match feed.next_until(PATIENCE) {
                    Ok(Some(record)) => {
                        assert_eq!(record.event.n.to_native(), seen);
                        seen += 1;
                    }
                    Err(LiveError::Wait(WaitError::ShardFailed(failure))) => {
                        assert!(feed.next_until(PATIENCE).unwrap().is_none(), "{failure}");
                        return seen;
                    }
                    other => panic!("after {seen} events: {other:?}"),
                }
            }
        };
        let feeds = [engine.live().start().unwrap(), engine.live().durable().start().unwrap()];
        let task = async {
            let mut feed = engine.live().start().unwrap();
            loop {
                match next(&mut feed).await {
                    Some(Ok(_)) => {}
                    Some(Err(error)) => break assert!(matches!(error, LiveError::Wait(WaitError::ShardFailed(_)))),
                    None => panic!("an end without the failure"),
                }
            }
            assert!(next(&mut feed).await.is_none());
        };
        storage.fail_sync(n);
        let [appended, durable] = thread::scope(|scope| {
            let counting = feeds.map(|feed| scope.spawn(move || count(feed)));
            scope.spawn(|| publish_until_failed(&engine));
            block_on_until(task, soon().unwrap()).expect("the task ends");
            counting.map(|thread| thread.join().unwrap())
        });
        let log = crate::common::numbers(&engine).len() as u64;
        assert_eq!(appended, log, "everything appended is returned");
        assert!(durable <= appended);
        // A feed that begins after the failure.
        let mut late = engine.live().from(LiveFrom::Beginning).start().unwrap();
        assert_eq!((&mut late).into_iter().filter(Result::is_ok).count() as u64, log);
    }
}

/// Reads a feed inside the shard.
struct Reading(Arc<Mutex<Option<Live<Note>>>>, Arc<Mutex<Vec<String>>>);

impl Handler<Note> for Reading {
    fn on_event(&mut self, _: &<Note as corelane::rkyv::Archive>::Archived, _: &Meta) -> Result<(), HandlerError> {
        if let Some(feed) = &mut *self.0.lock().unwrap() {
            let said = |outcome: Option<Result<u64, LiveError>>| match outcome {
                Some(Ok(n)) => n.to_string(),
                Some(Err(LiveError::Wait(error))) => format!("{error:?}"),
                other => format!("{other:?}"),
            };
            let mut all = self.1.lock().unwrap();
            let first = feed.next_until(soon()).map(|record| record.map(|record| record.event.n.to_native()));
            all.push(said(first.transpose()));
            let second = feed.next_until(soon()).map(|record| record.map(|record| record.event.n.to_native()));
            all.push(said(second.transpose()));
            all.extend(feed.into_iter().map(|event| said(Some(event.map(|event| number(&event))))));
        }
        Ok(())
    }
}

#[test]
fn a_feed_on_an_engines_own_thread_returns_what_is_there_and_never_waits() {
    let dir = tempfile::tempdir().unwrap();
    let (feed, said) = (Arc::default(), Arc::default());
    let handler = (Arc::clone(&feed), Arc::clone(&said));
    let engine = EventLog::<Note>::builder(small(dir.path()))
        .handler("reading", OnError::Halt, move |_| Reading(Arc::clone(&handler.0), Arc::clone(&handler.1)))
        .open()
        .unwrap();
    *feed.lock().unwrap() = Some(engine.live().start().unwrap());
    publish(&engine, [(1, 9)]);
    engine.shutdown(soon()).unwrap();
    assert_eq!(*said.lock().unwrap(), ["9", "OnEngineThread", "OnEngineThread"]);
}

#[test]
fn a_cancelled_wait_takes_no_event() {
    let dir = tempfile::tempdir().unwrap();
    let engine = EventLog::<Note>::open(small(dir.path()).shards(2)).unwrap();
    let mut feed = engine.live().start().unwrap();
    let counter = Arc::new(Counter::default());
    let waker = Waker::from(Arc::clone(&counter));
    let mut keys: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
    for n in 0..100 {
        {
            let mut waiting = Box::pin(feed.next_async());
            assert!(waiting.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
            publish(&engine, [(n % 4, n)]);
        }
        if n % 3 == 0 {
            let record = block_on_until(feed.next_async(), soon().unwrap()).unwrap().unwrap().unwrap();
            keys.entry(record.meta.key.0).or_default().push(record.event.n.to_native());
        }
        while let Ok(Some(record)) = feed.next_until(Duration::ZERO) {
            keys.entry(record.meta.key.0).or_default().push(record.event.n.to_native());
        }
    }
    for (key, numbers) in keys {
        assert_eq!(numbers, (0..100).filter(|n| n % 4 == key).collect::<Vec<_>>());
    }
}

#[test]
fn a_feed_or_stream_that_is_dropped_or_timed_out_leaves_no_waker_behind() {
    let dir = tempfile::tempdir().unwrap();
    let engine = EventLog::<Note>::open(small(dir.path()).shards(2)).unwrap();
    let counter = Arc::new(Counter::default());
    let mut feeds: Vec<_> = (0..10).map(|_| engine.live().start().unwrap()).collect();
    for feed in &mut feeds {
        assert!(poll(feed, &counter).is_pending());
        assert!(poll(feed, &counter).is_pending(), "a second poll replaces the first waker");
    }
    assert_eq!(Arc::strong_count(&counter), 1 + 10 * 2, "one per feed and shard");
    drop(feeds.split_off(3));
    assert_eq!(Arc::strong_count(&counter), 1 + 3 * 2);
    // Waiting as a thread takes the task's place.
    let timed_out = feeds[0].next_until(Duration::from_millis(1));
    assert!(matches!(timed_out, Err(LiveError::Wait(WaitError::TimedOut))));
    assert_eq!(Arc::strong_count(&counter), 1 + 2 * 2);
    drop(feeds);
    assert_eq!(Arc::strong_count(&counter), 1);
    let mut poller = poller(&engine);
    assert!(poll(&mut poller, &counter).is_pending());
    assert!(Arc::strong_count(&counter) > 1);
    drop(poller);
    until("the alarm's thread has ended", || Arc::strong_count(&counter) == 1);
    assert_eq!(counter.get(), 0);
}

fn poller(engine: &EventLog<Note>) -> Poller<Note> {
    let retry = Retry::fixed().base(Duration::from_millis(20)).jitter(1.0, 1.0).attempts(3);
    let health = HealthPolicy::default().consecutive_max(1_000);
    engine.consumer("c").concurrency(2).retry(retry).health(health).poller().unwrap()
}

#[test]
fn a_poller_is_a_stream_of_deliveries_that_ends_with_the_engine() {
    let dir = tempfile::tempdir().unwrap();
    let engine = EventLog::<Note>::open(small(dir.path()).shards(2)).unwrap();
    let mut poller = poller(&engine);
    let handled = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&handled);
    let task: Task = Box::pin(async move {
        while let Some(delivery) = next(&mut poller).await {
            let delivery = delivery.unwrap();
            let n = poller.event(&delivery).unwrap().0.n.to_native();
            // Every tenth event fails at first and is retried.
            if n.is_multiple_of(10) && delivery.attempt() == 1 {
                poller.failed(delivery, "not yet").unwrap();
                continue;
            }
            seen.lock().unwrap().push(n);
            poller.succeeded(delivery).unwrap();
        }
        assert_eq!(poller.report().waiting(), 0);
    });
    let runtime = thread::spawn(move || run_all(vec![task], PATIENCE));
    for n in 0..100 {
        publish(&engine, [(n, n)]);
    }
    engine.shutdown(soon()).unwrap();
    assert_eq!(runtime.join().unwrap(), 0, "the stream ends");
    let mut handled = std::mem::take(&mut *handled.lock().unwrap());
    handled.sort_unstable();
    assert!(handled == (0..100).collect::<Vec<_>>(), "{handled:?}");
}

#[test]
fn a_poller_whose_deliveries_are_all_in_flight_is_pending_and_continues_when_one_returns() {
    let dir = tempfile::tempdir().unwrap();
    let engine = EventLog::<Note>::open(small(dir.path())).unwrap();
    let mut poller = poller(&engine);
    publish(&engine, (0..5).map(|n| (n, n)));
    let counter = Arc::new(Counter::default());
    let take = |poller: &mut Poller<Note>| match poll(poller, &counter) {
        Poll::Ready(Some(Ok(delivery))) => Some(delivery),
        Poll::Ready(other) => panic!("{other:?}"),
        Poll::Pending => None,
    };
    let mut flying: Vec<_> = (0..2).map(|_| take(&mut poller).expect("two may be in flight")).collect();
    assert!(take(&mut poller).is_none());
    for left in (0..3).rev() {
        poller.succeeded(flying.remove(0)).unwrap();
        flying.push(take(&mut poller).expect("there is room again"));
        assert_eq!(flying.len(), 2, "{left} left");
    }
    flying.into_iter().for_each(|delivery| poller.succeeded(delivery).unwrap());
    assert!(take(&mut poller).is_none());
    assert_eq!(poller.report().handled, 5);
}

#[test]
fn a_pollers_stream_is_woken_by_a_retry_and_ends_only_after_it() {
    let dir = tempfile::tempdir().unwrap();
    let engine = EventLog::<Note>::open(small(dir.path())).unwrap();
    let mut poller = poller(&engine);
    publish(&engine, [(1, 7)]);
    let work = async {
        let first = next(&mut poller).await.unwrap().unwrap();
        poller.failed(first, "not yet").unwrap();
        // No event comes: only the retry wakes the task.
        let second = next(&mut poller).await.unwrap().unwrap();
        assert_eq!(second.attempt(), 2);
        poller.failed(second, "not yet").unwrap();
        engine.shutdown(soon()).unwrap();
        let third = next(&mut poller).await.expect("a retry is left").unwrap();
        assert_eq!(third.attempt(), 3);
        poller.succeeded(third).unwrap();
        assert!(next(&mut poller).await.is_none());
    };
    block_on_until(work, soon().unwrap()).expect("the task is woken");
}
