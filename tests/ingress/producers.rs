//! Producers: event sizes, refusals, shutdown, producers that are created and dropped while the engine runs, and
//! receipts.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use crate::common::{Note, env_number, numbers, open_on, os_cache, read_shard, small, soon};
use corelane::error::RejectedReason;
use corelane::testing::FaultyStorage;
use corelane::{Bounded, Deadline, Event, EventLog, EventType, EventTypeId, Key, Rejected, WaitError};
use rkyv::{Archive, Deserialize, Serialize};

#[test]
fn a_producer_thread_that_panics_loses_nothing_it_published() {
    let storage = FaultyStorage::new();
    let engine = open_on(&storage, small("/s")).unwrap();
    for round in 0..20_u64 {
        let mut producer = engine.producer();
        let died = std::thread::scope(|scope| {
            let thread = scope.spawn(move || {
                let mut batch: Vec<_> = (0..50).map(|n| (Key(round), Note::new(n))).collect();
                producer.publish_batch(&mut batch).unwrap();
                std::panic::resume_unwind(Box::new("mid-way"));
            });
            thread.join().is_err()
        });
        assert!(died);
    }
    engine.flush(soon()).unwrap();
    let all = read_shard(&engine, 0);
    assert_eq!(all.len(), 20 * 50);
    for key in 0..20 {
        let of_key: Vec<u64> = all.iter().filter(|held| held.key == key).map(|held| held.n).collect();
        assert_eq!(of_key, (0..50).collect::<Vec<_>>());
    }
    engine.shutdown(soon()).unwrap();
}

/// An event whose serializer panics.
#[derive(Archive, Serialize, Deserialize, Bounded, Debug)]
struct Treacherous {
    #[rkyv(with = Explosive)]
    fuse: u64,
    text: String,
}

#[derive(Debug)]
struct Explosive;
impl rkyv::with::ArchiveWith<u64> for Explosive {
    type Archived = rkyv::rend::u64_le;
    type Resolver = ();
    fn resolve_with(field: &u64, (): (), out: rkyv::Place<Self::Archived>) {
        out.write(rkyv::rend::u64_le::from_native(*field));
    }
}
impl<S: rkyv::rancor::Fallible + ?Sized> rkyv::with::SerializeWith<u64, S> for Explosive {
    fn serialize_with(field: &u64, _: &mut S) -> Result<(), S::Error> {
        assert_ne!(*field, 13, "boom");
        Ok(())
    }
}
impl<D: rkyv::rancor::Fallible + ?Sized> rkyv::with::DeserializeWith<rkyv::rend::u64_le, u64, D> for Explosive {
    fn deserialize_with(field: &rkyv::rend::u64_le, _: &mut D) -> Result<u64, D::Error> {
        Ok(field.to_native())
    }
}
impl Event for Treacherous {
    const TYPES: &'static [EventType] = &[EventType::new(1, "treacherous", 1)];
    fn event_type(&self) -> EventTypeId {
        EventTypeId(1)
    }
}

#[test]
fn an_event_that_panics_while_it_is_checked_affects_only_its_own_thread() {
    let storage = FaultyStorage::new();
    let engine = EventLog::<Treacherous>::builder(small("/s")).faulty_storage(&storage).open().unwrap();
    let mut producer = engine.producer();
    let event = |fuse| (Key(1), Treacherous { fuse, text: "t".into() });
    let mut batch = vec![event(1), event(13), event(3)];
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| producer.publish_batch(&mut batch)));
    assert!(outcome.is_err());
    producer.publish_batch(&mut vec![event(4), event(5)]).unwrap();
    engine.flush(soon()).unwrap();
    assert_eq!(engine.shard_metrics()[0].appended, 2, "no event of the batch that panicked, every event of the next");
    engine.shutdown(soon()).unwrap();
}

#[test]
fn an_event_larger_than_the_limit_comes_back_and_one_at_the_limit_is_accepted() {
    let storage = FaultyStorage::new();
    let engine = open_on(&storage, small("/s").event_bytes_max(1024)).unwrap();
    let mut producer = engine.producer();
    let shared = engine.shared_producer();
    // The fixed part of a note takes 16 bytes. A text of more than 8 bytes precedes it, padded to a multiple of 8.
    let fits = Note::sized(1, 1024 - 16);
    let too_large = Note::sized(2, 1024 - 15);
    producer.publish(Key(1), fits.clone()).unwrap();
    shared.publish(Key(1), fits.clone()).wait().unwrap();
    for rejected in [
        producer.publish(Key(1), too_large.clone()).unwrap_err(),
        shared.publish(Key(1), too_large.clone()).wait().unwrap_err(),
    ] {
        assert!(matches!(rejected.reason(), RejectedReason::TooLarge { bytes_max: 1024 }));
        assert_eq!(rejected.into_event(), too_large, "the event comes back");
    }
    let mut batch = vec![(Key(1), fits.clone()), (Key(2), too_large), (Key(3), fits)];
    let rejected = producer.publish_batch(&mut batch).unwrap_err();
    assert_eq!((rejected.accepted, batch.len()), (1, 2));
    assert!(matches!(rejected.reason, RejectedReason::TooLarge { .. }));
    engine.flush(soon()).unwrap();
    assert_eq!(numbers(&engine), [1, 1, 1]);
    assert!(engine.failures().is_empty());
}

/// A plain event larger than the limit.
#[derive(Archive, Serialize, Deserialize, Bounded, Debug)]
struct Block([u64; 32]);
impl Event for Block {
    const TYPES: &'static [EventType] = &[EventType::new(1, "block", 1)];
    fn event_type(&self) -> EventTypeId {
        EventTypeId(1)
    }
}

#[test]
fn an_oversized_plain_event_comes_back_too() {
    let storage = FaultyStorage::new();
    let engine = EventLog::<Block>::builder(small("/s").event_bytes_max(255)).faulty_storage(&storage).open().unwrap();
    let mut producer = engine.producer();
    assert!(matches!(producer.publish(Key(1), Block([1; 32])), Err(Rejected::TooLarge { .. })));
    assert!(matches!(engine.shared_producer().publish(Key(1), Block([1; 32])).wait(), Err(Rejected::TooLarge { .. })));
    let mut batch = vec![(Key(1), Block([1; 32]))];
    assert_eq!(producer.publish_batch(&mut batch).unwrap_err().accepted, 0);
    engine.shutdown(soon()).unwrap();
}

#[test]
fn after_shutdown_everything_is_refused_and_nothing_accepted_is_lost() {
    let storage = FaultyStorage::new();
    let engine = open_on(&storage, os_cache("/s").shards(2)).unwrap();
    let (mut producer, shared) = (engine.producer(), engine.shared_producer());
    for n in 0..40 {
        producer.publish(Key(n), Note::new(n)).unwrap();
        shared.publish(Key(n), Note::new(n)).wait().unwrap();
    }
    let receipts = producer.receipts();
    engine.shutdown(soon()).unwrap();
    engine.shutdown(Deadline::NEVER).unwrap();
    assert!(
        receipts.iter().all(|receipt| receipt.is_appended() && receipt.is_durable()),
        "shutdown syncs, in OsCache mode too"
    );
    assert!(matches!(producer.publish(Key(1), Note::new(7)), Err(Rejected::Closed(event)) if event.n == 7));
    assert!(matches!(producer.try_publish(Key(1), Note::new(7)), Err(Rejected::Closed(_))));
    assert!(matches!(shared.publish(Key(1), Note::new(7)).wait(), Err(Rejected::Closed(_))));
    let mut batch = vec![(Key(1), Note::new(1)), (Key(2), Note::new(2))];
    let rejected = producer.publish_batch(&mut batch).unwrap_err();
    assert!(matches!(rejected.reason, RejectedReason::Closed));
    assert_eq!((rejected.accepted, batch.len()), (0, 2));
    assert!(
        matches!(engine.producer().publish(Key(1), Note::new(7)), Err(Rejected::Closed(_))),
        "a producer created after the shutdown"
    );
    engine.flush(soon()).unwrap();
    drop(engine);
    assert!(
        matches!(producer.publish(Key(1), Note::new(7)), Err(Rejected::Closed(_))),
        "a producer that outlives the engine"
    );
    drop(producer);
    assert_eq!(open_on(&storage, os_cache("/s").shards(2)).unwrap().recovery().events(), 80);
}

#[test]
fn a_drop_without_shutdown_keeps_everything_accepted() {
    let storage = FaultyStorage::new();
    for round in 1..=10 {
        let engine = open_on(&storage, os_cache("/s")).unwrap();
        let mut producer = engine.producer();
        for n in 0..50 {
            producer.publish(Key(n), Note::new(n)).unwrap();
        }
        drop(engine);
        storage.crash(corelane::testing::Unsynced::Lost);
        assert_eq!(open_on(&storage, os_cache("/s")).unwrap().recovery().events(), round * 50);
    }
}

#[test]
fn a_shutdown_during_publishing_keeps_exactly_the_accepted_events() {
    for _ in 0..20 {
        let storage = FaultyStorage::new();
        let engine = open_on(&storage, small("/s").shards(2)).unwrap();
        let accepted = std::thread::scope(|scope| {
            let engine = &engine;
            let own: Vec<_> = (0..2)
                .map(|t| {
                    scope.spawn(move || {
                        let mut producer = engine.producer();
                        (0..u64::MAX).take_while(|n| producer.publish(Key(t), Note::new(*n)).is_ok()).count()
                    })
                })
                .collect();
            let shared = engine.shared_producer();
            let others: Vec<_> = (2..4)
                .map(|t| {
                    let shared = shared.clone();
                    scope.spawn(move || {
                        (0..u64::MAX).take_while(|n| shared.publish(Key(t), Note::new(*n)).wait().is_ok()).count()
                    })
                })
                .collect();
            std::thread::sleep(Duration::from_millis(10));
            engine.shutdown(soon()).unwrap();
            own.into_iter().chain(others).map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
        });
        for (key, count) in accepted.iter().enumerate() {
            let shard = Key(key as u64).shard(2).0;
            let found: Vec<u64> =
                read_shard(&engine, shard).iter().filter(|held| held.key == key as u64).map(|held| held.n).collect();
            assert_eq!(found, (0..*count as u64).collect::<Vec<_>>(), "key {key}");
        }
    }
}

#[test]
fn producers_come_and_go_while_the_engine_runs() {
    let storage = FaultyStorage::new();
    let engine = open_on(&storage, small("/s").shards(2)).unwrap();
    std::thread::scope(|scope| {
        for t in 0..4_u64 {
            let engine = &engine;
            scope.spawn(move || {
                for n in 0..100 {
                    let mut producer = engine.producer();
                    producer.publish(Key(t), Note::new(n)).unwrap();
                    if n % 10 == 0 {
                        producer.publish(Key(t), Note::new(1000)).unwrap().durable().wait().unwrap();
                    }
                    // The shard decides the order across two producers of one thread. Waiting makes it the publish
                    // order.
                    producer.receipts().iter().for_each(|receipt| receipt.appended().wait().unwrap());
                }
            });
        }
    });
    engine.flush(soon()).unwrap();
    let all: Vec<_> = (0..2).flat_map(|shard| read_shard(&engine, shard)).collect();
    for t in 0..4 {
        let of_key: Vec<u64> = all.iter().filter(|held| held.key == t && held.n < 1000).map(|held| held.n).collect();
        assert_eq!(of_key, (0..100).collect::<Vec<_>>());
    }
    let published: u64 = engine.shard_metrics().iter().map(|shard| shard.published).sum();
    assert_eq!(published, 4 * 110, "events of closed lanes stay counted");
}

#[test]
fn a_shared_producer_keeps_the_order_of_every_thread() {
    let storage = FaultyStorage::new();
    let engine = open_on(&storage, small("/s")).unwrap();
    let shared = engine.shared_producer();
    std::thread::scope(|scope| {
        for t in 0..6_u64 {
            let shared = shared.clone();
            scope.spawn(move || {
                for n in 0..200 {
                    shared.publish(Key(t), Note::new(n)).wait().unwrap();
                }
                let receipt = shared.publish(Key(t), Note::new(200)).with_receipt().wait().unwrap();
                receipt.durable().wait().unwrap();
            });
        }
    });
    let all = read_shard(&engine, 0);
    for t in 0..6 {
        assert_eq!(
            all.iter().filter(|held| held.key == t).map(|held| held.n).collect::<Vec<_>>(),
            (0..=200).collect::<Vec<_>>()
        );
    }
}

#[derive(Default)]
struct Count(AtomicUsize);
impl Wake for Count {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
fn a_receipt_can_be_awaited_without_any_runtime() {
    let storage = FaultyStorage::new();
    storage.set_space(Some(0));
    let engine = open_on(&storage, small("/s")).unwrap();
    let mut producer = engine.producer();
    let receipt = producer.publish(Key(1), Note::new(1)).unwrap();
    let (appended, durable) = (Arc::new(Count::default()), Arc::new(Count::default()));
    let (mut first, mut second) = (pin!(receipt.appended()), pin!(receipt.durable()));
    let wakers = [Waker::from(Arc::clone(&appended)), Waker::from(Arc::clone(&durable))];
    assert!(first.as_mut().poll(&mut Context::from_waker(&wakers[0])).is_pending());
    assert!(second.as_mut().poll(&mut Context::from_waker(&wakers[1])).is_pending());
    let began = Instant::now();
    assert!(matches!(
        receipt.durable().wait_until(Instant::now() + Duration::from_millis(50)),
        Err(WaitError::TimedOut)
    ));
    assert!(began.elapsed() >= Duration::from_millis(50));
    assert_eq!(durable.0.load(Ordering::SeqCst), 0);
    storage.set_space(None);
    receipt.durable().wait_until(soon().unwrap()).unwrap();
    let deadline = soon().unwrap();
    while appended.0.load(Ordering::SeqCst) == 0 || durable.0.load(Ordering::SeqCst) == 0 {
        assert!(Instant::now() < deadline, "a task was never woken");
        std::thread::yield_now();
    }
    assert!(matches!(first.as_mut().poll(&mut Context::from_waker(&wakers[0])), Poll::Ready(Ok(()))));
    assert!(matches!(second.as_mut().poll(&mut Context::from_waker(&wakers[1])), Poll::Ready(Ok(()))));
}

/// `CORELANE_ALONE` sets the number of events. A wake-up that was once missed needed a million of them; a unit test of
/// the syncer forces that moment.
#[test]
fn every_event_waited_for_alone_becomes_durable() {
    // No event is published before the previous one is durable, so no later event can hide a missed wake-up.
    let storage = FaultyStorage::new();
    let engine = open_on(&storage, small("/s").segment_bytes(4 << 20)).unwrap();
    let mut producer = engine.producer();
    for n in 0..env_number("CORELANE_ALONE", 20_000) {
        let receipt = producer.publish(Key(n % 3), Note::new(n)).unwrap();
        receipt.durable().wait_until(soon().unwrap()).unwrap_or_else(|error| panic!("event {n}: {error}"));
    }
    engine.shutdown(soon()).unwrap();
}

#[test]
fn a_flush_covers_the_events_that_its_own_thread_published_through_a_shared_producer() {
    // With a ring of two slots most attempts are refused, and each refusal takes its count back.
    for ring in [2, 64] {
        let storage = FaultyStorage::new();
        let engine = open_on(&storage, os_cache("/s").ring_capacity(ring)).unwrap();
        let producer = engine.shared_producer();
        std::thread::scope(|scope| {
            for thread in 0..4_u64 {
                let (engine, producer) = (&engine, producer.clone());
                scope.spawn(move || {
                    for n in 0..env_number("CORELANE_FLUSHES", 300) {
                        let receipt = loop {
                            if n % 2 == 0 {
                                break producer.publish(Key(thread), Note::new(n)).with_receipt().wait().unwrap();
                            }
                            if producer.try_publish(Key(thread), Note::new(n)).is_ok() {
                                break producer.publish(Key(thread), Note::new(n)).with_receipt().wait().unwrap();
                            }
                        };
                        engine.flush(soon()).expect("flushed");
                        let receipt = receipt.receipt().expect("appended");
                        assert!(receipt.is_appended() && receipt.is_durable(), "event {n} of thread {thread}");
                    }
                });
            }
        });
        let metrics = engine.metrics(soon());
        assert_eq!(metrics.shards[0].published, metrics.shards[0].appended, "refusals are not counted");
    }
}
