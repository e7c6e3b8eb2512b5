//! Wakers are the application's code. None runs in a shard's turn or in a syncer, and none is left behind.

use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use crate::common::bank::{Account, Money, Order};
use crate::common::{Note, open_on, small, soon, until};
use crate::executor::Counted;
use corelane::testing::FaultyStorage;
use corelane::{Durability, Engine, EventLog, Key, SharedClient, WaitError};

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

/// A thread that waits for a future of the engine must not depend on the wakers of tasks either.
#[test]
fn a_waker_that_blocks_delays_no_thread_that_flushes_saves_or_sends_commands() {
    let dir = tempfile::tempdir().unwrap();
    let engine = Engine::<Account>::open(small(dir.path()).ring_capacity(2)).unwrap();
    let (client, producer) = (engine.shared_client(), engine.shared_producer());
    let (go, waker) = blocking();
    let mut asked = Box::pin(engine.ask(Key(1), |_, _| std::thread::sleep(Duration::from_millis(20))));
    assert!(asked.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
    for _ in 0..20 {
        // The first commands find the lane full.
        let told: Vec<_> = (0..4)
            .map(|_| {
                let client = client.clone();
                std::thread::spawn(move || client.send(Key(1), Order::Deposit(1)).durable().wait_until(soon()))
            })
            .collect();
        told.into_iter().for_each(|told| drop(told.join().unwrap().unwrap()));
        let receipt = producer.publish(Key(1), Money::Deposited { cents: 1 }).with_receipt().wait().unwrap();
        receipt.durable().wait_until(soon()).unwrap();
        producer.publish(Key(1), Money::Deposited { cents: 1 }).wait().unwrap();
        engine.flush(soon()).unwrap();
        engine.checkpoint(soon()).unwrap();
    }
    drop(go);
    engine.shutdown(soon()).unwrap();
}

/// A waker that panics.
struct Panics;

impl Wake for Panics {
    fn wake(self: Arc<Self>) {
        panic!("in a waker");
    }
}

#[test]
fn a_waker_that_panics_keeps_no_other_task_asleep() {
    let storage = FaultyStorage::new();
    let engine = open_on(&storage, small("/s").durability(Durability::GroupCommit)).unwrap();
    let mut producer = engine.producer();
    producer.publish(Key(1), Note::new(0)).unwrap().durable().wait_until(soon()).unwrap();
    let waker = Arc::new(Counted::default());
    for n in 1..4 {
        storage.hold(true);
        let receipt = producer.publish(Key(1), Note::new(n)).unwrap();
        let (mut first, mut second) = (receipt.durable(), receipt.durable());
        let panics = Waker::from(Arc::new(Panics));
        assert!(Pin::new(&mut first).poll(&mut Context::from_waker(&panics)).is_pending());
        assert!(waker.poll(&mut second).is_pending());
        storage.hold(false);
        until("the other task is woken", || waker.wakes() == n as usize);
    }
    engine.shutdown(soon()).unwrap();
}

/// A waker whose drop calls the engine.
struct Calls(SharedClient<Account>, Arc<AtomicUsize>);

impl Wake for Calls {
    fn wake(self: Arc<Self>) {}
}

impl Drop for Calls {
    fn drop(&mut self) {
        drop(self.0.send(Key(1), Order::Nothing).try_submit());
        self.1.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
fn a_waker_whose_drop_calls_the_engine_is_dropped_outside_every_lock() {
    let dir = tempfile::tempdir().unwrap();
    let engine = Engine::<Account>::open(small(dir.path()).ring_capacity(2)).unwrap();
    let client = engine.shared_client();
    let dropped = Arc::new(AtomicUsize::new(0));
    let waker = || Waker::from(Arc::new(Calls(client.clone(), Arc::clone(&dropped))));
    let (go, gone) = channel::<()>();
    let (stopped_tx, stopped) = channel();
    let mut asked = Box::pin(engine.ask(Key(1), move |_, _| {
        stopped_tx.send(()).unwrap();
        gone.recv().unwrap_err();
    }));
    assert!(asked.as_mut().poll(&mut Context::from_waker(&waker())).is_pending());
    stopped.recv().unwrap();
    let mut answer = client.send(Key(1), Order::Deposit(1)).try_submit().unwrap();
    let other = client.send(Key(1), Order::Deposit(1)).try_submit().unwrap();
    let mut waiting: Vec<_> = (0..3).map(|_| client.send(Key(1), Order::Deposit(1)).submit()).collect();
    for round in 1..=3 {
        // Another waker each time: the earlier one is dropped.
        assert!(asked.as_mut().poll(&mut Context::from_waker(&waker())).is_pending());
        assert!(Pin::new(&mut answer).poll(&mut Context::from_waker(&waker())).is_pending());
        for waiting in &mut waiting {
            assert!(Pin::new(waiting).poll(&mut Context::from_waker(&waker())).is_pending());
        }
        assert_eq!(dropped.load(Ordering::SeqCst), 5 * (round - 1) + 1);
    }
    drop((waiting, answer, asked));
    assert_eq!(dropped.load(Ordering::SeqCst), 16, "every waker is dropped");
    drop(go);
    other.wait().unwrap();
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
