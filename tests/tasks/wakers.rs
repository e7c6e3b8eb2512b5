//! Wakers are the application's code. None runs in a shard's turn or in a syncer, and none is left behind.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, channel};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use crate::common::{Note, open_on, small, soon, until};
use crate::executor::Counted;
use corelane::testing::FaultyStorage;
use corelane::{Durability, EventLog, Key, WaitError};

/// A waker that blocks its thread until the sender is dropped.
struct Blocking(Mutex<Receiver<()>>);

impl Wake for Blocking {
    fn wake(self: Arc<Self>) {
        self.0.lock().unwrap().recv().unwrap_err();
    }
}

fn blocking() -> (std::sync::mpsc::Sender<()>, Waker) {
    let (go, gone) = channel();
    (go, Waker::from(Arc::new(Blocking(Mutex::new(gone)))))
}

#[test]
fn a_waker_that_blocks_delays_neither_shards_nor_syncers_nor_threads() {
    let dir = tempfile::tempdir().unwrap();
    let engine = EventLog::<Note>::open(small(dir.path()).durability(Durability::GroupCommit)).unwrap();
    let mut producer = engine.producer();
    let (go, waker) = blocking();
    // One that is not appended yet when it is polled.
    let mut pending = loop {
        let receipt = producer.publish(Key(1), Note::new(0)).unwrap();
        let mut pending = Box::pin(receipt.durable());
        if pending.as_mut().poll(&mut Context::from_waker(&waker)).is_pending() {
            break pending;
        }
    };
    for n in 1..200 {
        let receipt = producer.publish(Key(1), Note::new(n)).unwrap();
        receipt.appended().wait_until(soon()).unwrap();
        receipt.durable().wait_until(soon()).unwrap();
    }
    assert!(pending.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_ready());
    // Everything is saved, but the thread that calls wakers cannot end.
    assert!(matches!(engine.shutdown(Duration::from_millis(200)), Err(WaitError::TimedOut)));
    drop(go);
    engine.shutdown(soon()).unwrap();
}

#[test]
fn an_engine_that_is_dropped_while_a_waker_blocks_closes_when_it_returns() {
    let dir = tempfile::tempdir().unwrap();
    let engine = EventLog::<Note>::open(small(dir.path())).unwrap();
    let (go, waker) = blocking();
    let mut asked = Box::pin(engine.ask(Key(1), |_, _| std::thread::sleep(Duration::from_millis(50))));
    assert!(asked.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
    std::thread::sleep(Duration::from_millis(100));
    drop(asked);
    let receipt = engine.producer().publish(Key(1), Note::new(1)).unwrap();
    receipt.durable().wait_until(soon()).unwrap();
    // Gives up after ten seconds, because the waker never returns.
    drop(engine);
    assert!(EventLog::<Note>::open(small(dir.path())).is_err(), "the store is still locked");
    drop(go);
    until("the store is closed", || EventLog::<Note>::open(small(dir.path())).is_ok());
}

#[test]
fn twenty_thousand_cancelled_waits_leave_nothing_behind() {
    let storage = FaultyStorage::new();
    let engine = open_on(&storage, small("/s").durability(Durability::GroupCommit)).unwrap();
    let (mut producer, shared) = (engine.producer(), engine.shared_producer());
    producer.publish(Key(1), Note::new(0)).unwrap().durable().wait_until(soon()).unwrap();
    storage.hold(true);
    let receipt = producer.publish(Key(1), Note::new(1)).unwrap();
    let of_shared = shared.publish(Key(1), Note::new(2)).with_receipt().wait().unwrap();
    of_shared.appended().wait_until(soon()).unwrap();
    let waker = Arc::new(Counted::default());
    for _ in 0..10_000 {
        let (mut one, mut other) = (receipt.durable(), of_shared.durable());
        assert!(waker.poll(&mut one).is_pending());
        assert!(waker.poll(&mut other).is_pending());
        assert!(waker.wakers() <= 2, "a cancelled wait has left its waker");
        // A thread that gives up leaves nothing either.
        assert!(matches!(receipt.durable().wait_until(Duration::ZERO), Err(WaitError::TimedOut)));
    }
    assert_eq!(waker.wakers(), 0);
    let mut waits: Vec<_> = (0..1000).map(|_| receipt.durable()).collect();
    for wait in &mut waits {
        // Polling again with the same waker, or another one, does not register again.
        assert!(waker.poll(wait).is_pending());
        assert!(waker.poll(wait).is_pending());
    }
    assert_eq!(waker.wakers(), 1000);
    storage.hold(false);
    receipt.durable().wait_until(soon()).unwrap();
    until("all are woken", || waker.wakes() == 1000);
    assert_eq!(waker.wakers(), 0);
    assert!(waits.iter_mut().all(|wait| matches!(waker.poll(wait), Poll::Ready(Ok(())))));
}
