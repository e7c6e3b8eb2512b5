//! The shard's thread never waits for the disk or for readers, and a full lane refuses events.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::common::{Note, SEGMENT, numbers, open_on, os_cache, small, soon};
use corelane::error::{FailureCause, RejectedReason};
use corelane::testing::FaultyStorage;
use corelane::{
    Bounded, Durability, Event, EventLog, EventType, EventTypeId, Handler, HandlerError, Key, Meta, OnError, Rejected,
    ShardId, WaitError,
};
use rkyv::rancor::{Fallible, Source};
use rkyv::ser::Writer;
use rkyv::string::{ArchivedString, StringResolver};
use rkyv::{Archive, Place, Serialize};

#[test]
fn no_turn_waits_for_the_disk_or_for_a_reader() {
    for durability in [Durability::GroupCommit, Durability::Periodic(Duration::from_millis(1)), Durability::OsCache] {
        let storage = FaultyStorage::new();
        let engine = open_on(&storage, small("/s").durability(durability)).unwrap();
        let mut producer = engine.producer();
        // Begins the first segment and waits until the second is prepared.
        producer.publish(Key(0), Note::new(0)).unwrap().appended().wait().unwrap();
        engine.flush(soon()).unwrap();
        crate::common::settle(&storage);
        let mut reader = engine.reader(ShardId(0));
        assert!(reader.next().unwrap().is_some());
        // From here on the syncer and the keeper hang in disk calls, the reader holds the active segment, and a thread
        // waits in `flush`.
        storage.hold(true);
        std::thread::scope(|scope| {
            let flusher = scope.spawn(|| engine.flush(soon()));
            let mut receipts = Vec::new();
            for n in 1..=25 {
                let receipt = producer.try_publish(Key(n), Note::sized(n, 3000)).unwrap();
                receipt.appended().wait_until(soon().unwrap()).unwrap();
                receipts.push(receipt);
            }
            assert_eq!(numbers(&engine), (0..=25).collect::<Vec<_>>(), "{durability:?}");
            assert!(
                engine.shard_metrics()[0].segments == 2 && 26 * 3000 > SEGMENT,
                "the events cross the end of a segment"
            );
            assert!(receipts.iter().all(|receipt| !receipt.is_durable()), "{durability:?}: no event was synced");
            storage.hold(false);
            flusher.join().unwrap().unwrap();
            engine.flush(soon()).unwrap();
            assert!(receipts.iter().all(corelane::Receipt::is_durable), "{durability:?}");
        });
    }
}

/// Blocks the shard while the test holds the lock.
struct Slow(Arc<Mutex<()>>);
impl Handler<Note> for Slow {
    fn on_event(&mut self, _event: &<Note as Archive>::Archived, _meta: &Meta) -> Result<(), HandlerError> {
        drop(self.0.lock().unwrap());
        Ok(())
    }
}

#[test]
fn a_full_lane_refuses_at_once_or_at_the_deadline_and_accepts_again_later() {
    let storage = FaultyStorage::new();
    let gate = Arc::new(Mutex::new(()));
    let theirs = Arc::clone(&gate);
    let builder = EventLog::<Note>::builder(os_cache("/s").ring_capacity(8)).faulty_storage(&storage);
    let engine = builder.handler("slow", OnError::Halt, move |_| Slow(Arc::clone(&theirs))).open().unwrap();
    let (mut producer, shared) = (engine.producer(), engine.shared_producer());
    let held = gate.lock().unwrap();
    let refused = |n: u64, rejected: Rejected<Note>| {
        assert!(matches!(rejected, Rejected::Full(_)), "{rejected:?}");
        assert_eq!(rejected.into_event(), Note::new(n), "the event comes back");
    };
    let mut accepted = Vec::new();
    let full = (0..).find_map(|n| match producer.try_publish(Key(1), Note::new(n)) {
        Ok(_) => {
            accepted.push(n);
            // Lets the shard take the event before it blocks in the handler.
            std::thread::sleep(Duration::from_millis(5));
            None
        }
        Err(rejected) => Some((n, rejected)),
    });
    let (n, rejected) = full.unwrap();
    refused(n, rejected);
    assert!((8..100).contains(&accepted.len()), "{accepted:?}");
    let began = Instant::now();
    refused(n, producer.publish_until(Key(1), Note::new(n), began + Duration::from_millis(50)).unwrap_err());
    assert!(began.elapsed() >= Duration::from_millis(50), "not before the deadline");
    let mut batch = vec![(Key(1), Note::new(n)), (Key(1), Note::new(n + 1))];
    let error = producer.try_publish_batch(&mut batch).unwrap_err();
    assert!(error.accepted == 0 && matches!(error.reason, RejectedReason::Full), "{error}");
    assert_eq!(batch.len(), 2);
    let mut through_shared = 0;
    let rejected = loop {
        match shared.try_publish(Key(1), Note::new(1000)) {
            Ok(()) => through_shared += 1,
            Err(rejected) => break rejected,
        }
        assert!(through_shared <= 8, "more events than the queue has slots");
    };
    refused(1000, rejected);
    drop(held);
    // The lane has room again.
    producer.publish_batch(&mut batch).unwrap();
    engine.flush(soon()).unwrap();
    accepted.extend([n, n + 1]);
    let found = numbers(&engine);
    assert_eq!(found.iter().copied().filter(|&n| n < 1000).collect::<Vec<_>>(), accepted);
    assert_eq!(found.len(), accepted.len() + through_shared);
}

/// A text that is longer on the shard's thread than on the producer's.
#[derive(Bounded, Debug)]
struct Swelling;

fn swelling_text() -> String {
    let on_shard = std::thread::current().name().is_some_and(|name| name.starts_with("corelane-shard"));
    "x".repeat(if on_shard { 2000 } else { 10 })
}

impl Archive for Swelling {
    type Archived = ArchivedString;
    type Resolver = StringResolver;
    fn resolve(&self, resolver: StringResolver, out: Place<ArchivedString>) {
        ArchivedString::resolve_from_str(&swelling_text(), resolver, out);
    }
}

impl<S: Fallible<Error: Source> + Writer + ?Sized> Serialize<S> for Swelling {
    fn serialize(&self, serializer: &mut S) -> Result<StringResolver, S::Error> {
        ArchivedString::serialize_from_str(&swelling_text(), serializer)
    }
}

#[derive(Archive, Serialize, Bounded, Debug)]
enum Text {
    Plain(String),
    Swelling(Swelling),
}

impl Event for Text {
    const TYPES: &'static [EventType] = &[EventType::new(1, "text", 1)];
    fn event_type(&self) -> EventTypeId {
        EventTypeId(1)
    }
}

#[test]
fn an_event_that_grows_after_it_was_accepted_fails_its_shard_and_leaves_the_log_whole() {
    let storage = FaultyStorage::new();
    let open = || EventLog::<Text>::builder(small("/s").event_bytes_max(1024)).faulty_storage(&storage).open().unwrap();
    let engine = open();
    let mut producer = engine.producer();
    producer.publish(Key(1), Text::Plain("before".into())).unwrap().durable().wait().unwrap();
    let receipt = producer.publish(Key(7), Text::Swelling(Swelling)).unwrap();
    let Err(WaitError::ShardFailed(failure)) = receipt.appended().wait() else { panic!("appended") };
    assert!(matches!(failure.cause, FailureCause::EventTooLarge { key: 7, bytes_max: 1024 }), "{failure}");
    let rejected = producer.publish(Key(1), Text::Plain("after".into())).unwrap_err();
    assert!(matches!(rejected, Rejected::ShardFailed(..)), "{rejected:?}");
    assert!(engine.shutdown(soon()).is_err());
    drop((producer, engine));
    let engine = open();
    assert_eq!(engine.recovery().events(), 1);
    assert!(engine.recovery().shards[0].torn_tail.is_none());
}
