//! Publishing from tasks: nothing blocks the executor's thread, and nothing is lost or published twice.

use std::sync::Arc;
use std::time::Duration;

use crate::common::{Note, block_on, numbers, open_on, os_cache, read_shard, soon};
use crate::executor::{Counted, run, task};
use corelane::testing::FaultyStorage;
use corelane::{Key, Rejected, WaitError};

#[test]
fn tasks_that_wait_for_room_publish_everything_in_order() {
    for (ring, threads) in [(2, 1), (2, 3), (64, 2)] {
        let storage = FaultyStorage::new();
        let engine = open_on(&storage, os_cache("/s").ring_capacity(ring).keys_expected(1000)).unwrap();
        let producer = engine.shared_producer();
        let tasks = (0..300_u64).map(|key| {
            let producer = producer.clone();
            task(async move {
                for n in 0..20 {
                    if n % 7 == 0 {
                        let receipt = producer.publish(Key(key), Note::new(n)).with_receipt().await.unwrap();
                        assert!(receipt.appended().await.unwrap().is_appended());
                    } else {
                        producer.publish(Key(key), Note::new(n)).await.unwrap();
                    }
                }
            })
        });
        run(threads, tasks.collect::<Vec<_>>());
        engine.flush(soon()).unwrap();
        let all = read_shard(&engine, 0);
        assert_eq!(all.len(), 6000);
        for key in 0..300 {
            let of_key: Vec<_> = all.iter().filter(|note| note.key == key).map(|note| note.n).collect();
            assert_eq!(of_key, (0..20).collect::<Vec<_>>(), "key {key}");
        }
        let metrics = engine.shard_metrics();
        assert_eq!(metrics[0].published, 6000, "attempts without room are not counted");
    }
}

#[test]
fn a_publish_that_is_dropped_while_it_waits_publishes_nothing_and_loses_no_wake_up() {
    let storage = FaultyStorage::new();
    let engine = open_on(&storage, os_cache("/s").ring_capacity(2)).unwrap();
    let producer = engine.shared_producer();
    let (go, gone) = std::sync::mpsc::channel::<()>();
    let (stopped_tx, stopped) = std::sync::mpsc::channel();
    let mut asked = Box::pin(engine.ask(Key(1), move |_, _| {
        stopped_tx.send(()).unwrap();
        gone.recv().unwrap_err();
    }));
    assert!(crate::common::poll_once(&mut asked).is_none());
    stopped.recv().unwrap();
    producer.publish(Key(1), Note::new(1)).wait().unwrap();
    producer.publish(Key(1), Note::new(2)).wait().unwrap();
    let waker = Arc::new(Counted::default());
    let mut dropped: Vec<_> = (0..10).map(|_| producer.publish(Key(1), Note::new(99))).collect();
    let mut kept: Vec<_> = (3..9).map(|n| producer.publish(Key(1), Note::new(n))).collect();
    for publishing in dropped.iter_mut().chain(&mut kept) {
        assert!(waker.poll(publishing).is_pending());
    }
    match producer.try_publish(Key(1), Note::new(98)) {
        Err(Rejected::Full(note)) => assert_eq!(note.n, 98),
        other => panic!("{other:?}"),
    }
    assert!(producer.publish(Key(1), Note::new(98)).wait_until(Duration::from_millis(5)).is_err());
    drop(dropped);
    drop(go);
    for publishing in kept {
        block_on(publishing).unwrap();
    }
    engine.flush(soon()).unwrap();
    let mut published = numbers(&engine);
    published.sort_unstable();
    assert_eq!(published, (1..9).collect::<Vec<_>>());
    assert_eq!(waker.wakers(), 0);
}

#[test]
fn a_full_storage_makes_tasks_wait_until_there_is_space_again() {
    let storage = FaultyStorage::new();
    let engine = open_on(&storage, os_cache("/s").ring_capacity(4)).unwrap();
    let producer = engine.shared_producer();
    storage.set_space(Some(0));
    let blocked = crate::common::fill(&engine, 0);
    let waker = Arc::new(Counted::default());
    let mut waiting: Vec<_> =
        (blocked..blocked + 2000).map(|n| producer.publish(Key(1), Note::sized(n, 3000))).collect();
    waiting.retain_mut(|publishing| waker.poll(publishing).is_pending());
    assert!(waiting.len() > 1000, "the lane holds four events, and the shard one batch");
    storage.set_space(None);
    for publishing in waiting {
        block_on(publishing).unwrap();
    }
    engine.flush(soon()).unwrap();
    assert!(numbers(&engine).len() as u64 >= blocked);
}

#[test]
fn a_shutdown_refuses_the_waiting_tasks_and_keeps_what_was_accepted() {
    let storage = FaultyStorage::new();
    let engine = Arc::new(open_on(&storage, os_cache("/s").ring_capacity(2)).unwrap());
    let producer = engine.shared_producer();
    let (go, gone) = std::sync::mpsc::channel::<()>();
    let mut asked = Box::pin(engine.ask(Key(1), move |_, _| gone.recv().unwrap_err()));
    assert!(crate::common::poll_once(&mut asked).is_none());
    let (said_tx, said) = std::sync::mpsc::channel();
    let mut tasks: Vec<_> = (0..20_u64)
        .map(|n| {
            let (producer, said) = (producer.clone(), said_tx.clone());
            task(async move {
                let sent = producer.publish(Key(1), Note::new(n)).with_receipt().await;
                let appended = match sent {
                    Ok(receipt) => receipt.appended().await.map(|_| n),
                    Err(Rejected::Closed(note)) => {
                        assert_eq!(note.n, n, "the event comes back");
                        Err(WaitError::Closed)
                    }
                    Err(other) => panic!("{other:?}"),
                };
                said.send(appended).unwrap();
            })
        })
        .collect();
    drop(said_tx);
    let closing = Arc::clone(&engine);
    let (closed_tx, closed) = std::sync::mpsc::channel();
    tasks.push(task(async move {
        std::thread::spawn(move || closed_tx.send(closing.shutdown(soon())).unwrap());
        std::thread::sleep(Duration::from_millis(20));
        drop(go);
    }));
    run(1, tasks);
    closed.recv().unwrap().unwrap();
    let said: Vec<_> = said.iter().collect();
    assert_eq!(said.len(), 20);
    let mut accepted: Vec<_> = said.into_iter().flatten().collect();
    accepted.sort_unstable();
    drop(asked);
    drop(engine);
    let engine = open_on(&storage, os_cache("/s")).unwrap();
    let mut held = numbers(&engine);
    held.sort_unstable();
    assert_eq!(held, accepted, "exactly the accepted events are in the log");
}

#[test]
fn an_awaited_flush_covers_what_was_accepted_before_the_call() {
    let storage = FaultyStorage::new();
    let engine = Arc::new(open_on(&storage, os_cache("/s").shards(2)).unwrap());
    let producer = engine.shared_producer();
    let tasks = (0..8_u64).map(|key| {
        let (engine, producer) = (Arc::clone(&engine), producer.clone());
        task(async move {
            for n in 0..100 {
                let receipt = producer.publish(Key(key), Note::new(n)).with_receipt().await.unwrap();
                engine.flush_async().await.unwrap();
                assert!(receipt.is_durable(), "event {n} of key {key}");
                if n == 50 {
                    engine.checkpoint_async().await.unwrap();
                }
            }
        })
    });
    run(2, tasks.collect::<Vec<_>>());
    assert!(engine.snapshot_stats().checkpoints > 0);
    let waker = Arc::new(Counted::default());
    storage.hold(true);
    producer.publish(Key(1), Note::new(100)).wait().unwrap();
    let mut flushing = Box::pin(engine.flush_async());
    assert!(waker.poll(&mut flushing).is_pending());
    drop(flushing);
    assert_eq!(waker.wakers(), 0, "a dropped wait leaves its waker");
    storage.hold(false);
    engine.shutdown(soon()).unwrap();
    assert!(matches!(block_on(engine.checkpoint_async()), Ok(()) | Err(WaitError::Closed)));
}
