//! An answer about an event concerns that event, whatever else is published to its key.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::common::{ArchivedNote, Note, open_on, small, soon};
use corelane::consumer::{Consumer, Exhausted, Handled, HealthPolicy, Judgement, Retry, Start};
use corelane::engine::PublishSyncError;
use corelane::event::EventId;
use corelane::testing::FaultyStorage;
use corelane::{EventLog, HandlerError, Key, Meta, Offset, OnError, ShardId, WaitError};

/// Starts a consumer that skips events with odd numbers.
fn skips_odd(engine: &EventLog<Note>, name: &str, every: Duration) -> Consumer<Note> {
    let even = |event: &ArchivedNote, _: &Meta| -> Result<(), HandlerError> {
        if event.n.to_native().is_multiple_of(2) { Ok(()) } else { Err("odd".into()) }
    };
    let health = HealthPolicy::default().consecutive_max(1_000_000).failure_percent_max(100);
    let builder = engine.consumer(name).before_durable().health(health).checkpoint_every(every);
    builder.retry(Retry::fixed().attempts(1)).when_exhausted(Exhausted::Skip).start(even).unwrap()
}

#[test]
fn publish_sync_answers_about_its_own_event() {
    let engine = open_on(&FaultyStorage::new(), small("/s").shards(2)).unwrap();
    // One consumer saves its position every millisecond and forgets the outcomes before it; the other keeps them.
    let often = skips_odd(&engine, "often", Duration::from_millis(1));
    let rarely = skips_odd(&engine, "rarely", Duration::from_secs(3_600));
    let (next, wrong) = (AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for thread in 0..3_u64 {
            let (engine, next, wrong) = (&engine, &next, &wrong);
            let (often, rarely) = (&often, &rarely);
            scope.spawn(move || {
                let mut producer = engine.producer();
                for round in 0..700 {
                    let n = next.fetch_add(1, Ordering::Relaxed);
                    if round % 7 == 0 {
                        // Earlier events of the same key and of others.
                        drop(producer.publish(Key(1), Note::new(n % 2 + 1)).unwrap());
                        drop(producer.publish(Key(thread), Note::new(n % 2 + 1)).unwrap());
                    }
                    let named: &[&Consumer<Note>] = if round % 2 == 0 { &[often] } else { &[rarely, often] };
                    let answer = engine.publish_sync(&mut producer, Key(1), Note::new(n), named, soon());
                    let is_right = match answer {
                        Ok(()) => n % 2 == 0,
                        Err(PublishSyncError::Recorded { .. }) => n % 2 == 1,
                        Err(error) => panic!("{n}: {error}"),
                    };
                    wrong.fetch_add(u64::from(!is_right), Ordering::Relaxed);
                }
            });
        }
    });
    assert_eq!(wrong.into_inner(), 0, "of {}", next.into_inner());
}

#[test]
fn an_event_that_the_consumer_has_forgotten_is_reported_as_unknown_not_as_handled() {
    let engine = open_on(&FaultyStorage::new(), small("/s")).unwrap();
    let mut producer = engine.producer();
    for n in 0..10 {
        producer.publish(Key(1), Note::new(n)).unwrap().appended().wait().unwrap();
    }
    let mut reader = engine.reader(ShardId(0));
    let mut ids = Vec::new();
    while let Some(record) = reader.next().unwrap() {
        ids.push(record.meta.id());
    }
    let ask = |consumer: &Consumer<Note>| -> Vec<Handled> {
        ids.iter().map(|id| consumer.wait_handled(Key(1), *id, soon()).unwrap()).collect()
    };
    let odd_recorded = |n: usize| if n.is_multiple_of(2) { Handled::Yes } else { Handled::Recorded };
    let rarely = skips_odd(&engine, "c", Duration::from_secs(3_600));
    assert_eq!(ask(&rarely), (0..10).map(odd_recorded).collect::<Vec<_>>());
    rarely.save().unwrap();
    // The save makes the consumer forget the outcome of the last event and of all before it.
    assert_eq!(ask(&rarely), [Handled::Unknown; 10]);
    rarely.stop(soon()).unwrap();
    let again = skips_odd(&engine, "c", Duration::from_secs(3_600));
    assert!(ask(&again).iter().all(|handled| *handled != Handled::Yes), "the events belong to an earlier run");

    let latest = engine.subscribe("latest").start(|_, _| Ok(())).unwrap();
    assert_eq!(ask(&latest), [Handled::Unknown; 10], "it starts after the events");
    let slow = engine.consumer("slow").before_durable().judge(|_, _| Judgement::RetryIn(Duration::from_secs(60)));
    let slow = slow.start(|_, _| Err("down".into())).unwrap();
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| slow.wait_handled(Key(1), ids[9], soon()));
        let id = EventId { shard: ShardId(0), offset: Offset(u64::MAX) };
        let late = slow.wait_handled(Key(1), id, Some(std::time::Instant::now() + Duration::from_millis(5)));
        assert!(late.is_err(), "no such event exists");
        slow.seek(Start::Latest).unwrap();
        assert_eq!(asked.join().unwrap().unwrap(), Handled::Unknown, "the seek skipped the event");
    });
}

#[test]
fn publish_sync_keeps_its_deadline_while_an_inline_handler_hangs() {
    let (go_on, waits) = std::sync::mpsc::channel::<()>();
    let waits = std::sync::Mutex::new(Some(waits));
    let builder = EventLog::<Note>::builder(small("/s")).faulty_storage(&FaultyStorage::new());
    let builder = builder.handler("hangs", OnError::Halt, move |_| {
        let waits = waits.lock().unwrap().take();
        move |_: &ArchivedNote, _: &Meta| {
            // Blocks until the sender is dropped.
            assert!(waits.iter().all(|waits| waits.recv().is_err()));
            Ok(())
        }
    });
    let engine = builder.open().unwrap();
    let (told, answer) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        let engine = &engine;
        scope.spawn(move || {
            let deadline = Some(std::time::Instant::now() + Duration::from_millis(50));
            told.send(engine.publish_sync(&mut engine.producer(), Key(1), Note::new(1), &[], deadline)).unwrap();
        });
        let answer = answer.recv_timeout(Duration::from_secs(10));
        drop(go_on);
        assert!(matches!(answer, Ok(Err(PublishSyncError::Wait(WaitError::TimedOut)))), "{answer:?}");
    });
    engine.publish_sync(&mut engine.producer(), Key(1), Note::new(2), &[], soon()).unwrap();
}
