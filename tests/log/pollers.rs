//! Pollers driven by a waiting thread, and by a task on any runtime.

use std::future::Future;
use std::thread;
use std::time::{Duration, Instant};

use crate::common::{Note, block_on_until, small, soon};
use corelane::consumer::{HealthPolicy, Poller, Retry};
use corelane::{EventLog, Key};

/// Runs a task on this thread, which sleeps until the task is woken. Returns `None` if no wake-up came in time.
fn run<T>(task: impl Future<Output = T>) -> Option<T> {
    block_on_until(task, soon().unwrap())
}

fn publish(engine: &EventLog<Note>, events: impl IntoIterator<Item = (u64, u64)>) {
    let mut producer = engine.producer();
    for (key, n) in events {
        drop(producer.publish(Key::new(key), Note::new(n)).unwrap());
    }
    engine.flush(soon()).unwrap();
}

fn poller(engine: &EventLog<Note>) -> Poller<Note> {
    let retry = Retry::fixed().base(Duration::from_millis(50)).jitter(1.0, 1.0).attempts(3);
    let health = HealthPolicy::default().consecutive_max(1_000);
    engine.consumer("c").concurrency(2).retry(retry).health(health).poller().unwrap()
}

#[test]
fn a_task_is_woken_by_an_event_and_by_a_retry_that_is_due() {
    let dir = tempfile::tempdir().unwrap();
    let engine = EventLog::<Note>::open(small(dir.path()).shards(2)).unwrap();
    let mut poller = poller(&engine);
    let mut began = Instant::now();
    thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(Duration::from_millis(50));
            publish(&engine, [(1, 7)]);
        });
        let delivery = run(poller.next_async()).expect("the event wakes the task").unwrap();
        assert_eq!((delivery.attempt(), poller.event(&delivery).unwrap().0.n.to_native()), (1, 7));
        began = Instant::now();
        poller.failed(delivery, "not yet").unwrap();
    });
    let delivery = run(poller.next_async()).expect("the due retry wakes the task").unwrap();
    assert_eq!(delivery.attempt(), 2);
    assert!(began.elapsed() >= Duration::from_millis(40), "not before the retry is due");
    poller.succeeded(delivery).unwrap();
    assert!(poller.next().unwrap().is_none());
    assert_eq!(poller.report().waiting(), 0);
}

#[test]
fn a_waiting_thread_returns_when_an_event_comes_or_at_the_deadline() {
    let dir = tempfile::tempdir().unwrap();
    let engine = EventLog::<Note>::open(small(dir.path())).unwrap();
    let mut poller = poller(&engine);
    assert!(poller.next().unwrap().is_none());
    // Returns at the deadline although no event comes.
    poller.wait(Some(Instant::now() + Duration::from_millis(30))).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(Duration::from_millis(50));
            publish(&engine, [(1, 1), (2, 2), (1, 3), (3, 4)]);
        });
        let end = soon().unwrap();
        let mut batch = poller.next_batch(10).unwrap();
        while batch.is_empty() {
            assert!(Instant::now() < end, "the thread was not woken");
            poller.wait(Some(end)).unwrap();
            batch = poller.next_batch(10).unwrap();
        }
        let numbers = |poller: &mut Poller<Note>, batch: &[_]| -> Vec<u64> {
            batch.iter().map(|delivery| poller.event(delivery).unwrap().0.n.to_native()).collect()
        };
        assert!(numbers(&mut poller, &batch).len() <= 2, "at most `concurrency` deliveries are in flight");
        let mut all = Vec::new();
        while all.len() < 4 {
            all.extend(numbers(&mut poller, &batch));
            batch.into_iter().try_for_each(|delivery| poller.succeeded(delivery)).unwrap();
            if poller.report().waiting() > 0 {
                poller.wait(Some(Instant::now() + Duration::from_millis(5))).unwrap();
            }
            batch = poller.next_batch(10).unwrap();
        }
        let of_key_1: Vec<u64> = all.into_iter().filter(|n| [1, 3].contains(n)).collect();
        assert_eq!(of_key_1, [1, 3]);
    });
    // A delivery in flight when the poller is dropped comes again.
    publish(&engine, [(5, 50)]);
    let out = poller.next().unwrap().expect("the new event");
    drop(poller);
    drop(out);
    let mut again = self::poller(&engine);
    let delivery = again.next().unwrap().expect("the unfinished delivery comes again");
    assert_eq!(again.event(&delivery).unwrap().0.n.to_native(), 50);
    again.succeeded(delivery).unwrap();
    assert!(again.next().unwrap().is_none(), "no finished event comes again");
}
