//! A reader in order stays at the item that it cannot read: asked again it returns the same error, or the item once the
//! cause is gone, and never the next item.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use crate::common::{soon, until};
use corelane::consumer::{Batch, ConsumerError, Sink, Start};
use corelane::event::Upcaster;
use corelane::log::Position;
use corelane::{
    Bounded, Event, EventLog, EventType, EventTypeId, HandlerError, Key, ReadError, ShardId, Stored, Time, Version,
};
use rkyv::rancor::{Error as Refusal, Source};
use rkyv::{Archive, Deserialize, Serialize};

/// The event as it was written.
#[derive(Archive, Serialize, Deserialize, Bounded, Clone)]
struct Old {
    n: u64,
}

impl Event for Old {
    const TYPES: &'static [EventType] = &[EventType::new(1, "number", 1)];
    fn event_type(&self) -> EventTypeId {
        EventTypeId(1)
    }
}

/// Declares the event as it is read: through an upcaster that refuses 14 while `$refuses` is set.
macro_rules! reading {
    ($name:ident, $refuses:ident) => {
        static $refuses: AtomicBool = AtomicBool::new(true);

        #[derive(Archive, Serialize, Deserialize, Bounded)]
        struct $name {
            n: u64,
        }

        impl Event for $name {
            const TYPES: &'static [EventType] = &[EventType::new(1, "number", 2)];
            const UPCASTERS: &'static [Upcaster<Self>] = &[Upcaster::new(1, 1, |archive| {
                let n = Old::decode(archive)?.n;
                if n == 14 && $refuses.load(Ordering::SeqCst) {
                    return Err(<Refusal as Source>::new(std::io::Error::other("14 is refused")));
                }
                Ok(Self { n })
            })];
            fn event_type(&self) -> EventTypeId {
                EventTypeId(1)
            }
        }
    };
}

/// A store with the events 1, 14, 2 and 3 of one key.
fn store() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let engine = EventLog::<Old>::open(crate::common::small(dir.path())).unwrap();
    let mut producer = engine.producer();
    for n in [1, 14, 2, 3] {
        drop(producer.publish(Key(1), Old { n }).unwrap());
    }
    engine.shutdown(soon()).unwrap();
    dir
}

fn open<E: Event>(dir: &Path) -> EventLog<E> {
    EventLog::<E>::open(crate::common::small(dir)).unwrap()
}

/// Calls `next` until the end. Notes errors as `None`, and removes their cause after the third.
fn ask(mut next: impl FnMut() -> Result<Option<u64>, ReadError>, refuses: &AtomicBool) -> Vec<Option<u64>> {
    refuses.store(true, Ordering::SeqCst);
    let mut got = Vec::new();
    loop {
        match next() {
            Ok(None) => return got,
            Ok(item) => got.push(item),
            Err(ReadError::Corruption(_)) => {
                got.push(None);
                refuses.store(got.iter().filter(|item| item.is_none()).count() < 3, Ordering::SeqCst);
            }
            Err(error) => panic!("{error}"),
        }
    }
}

const STAYED: [Option<u64>; 7] = [Some(1), None, None, None, Some(14), Some(2), Some(3)];

reading!(Streamed, STREAM_REFUSES);

#[test]
fn a_stream_stays_at_an_event_that_cannot_be_read() {
    let dir = store();
    let engine = open::<Streamed>(dir.path());
    let mut stream = engine.stream(Key(1), Version(1)).unwrap();
    let next = || Ok(stream.next()?.map(|record| record.event.n.to_native()));
    assert_eq!(ask(next, &STREAM_REFUSES), STAYED);
    let mut stream = engine.stream(Key(1), Version(2)).unwrap();
    STREAM_REFUSES.store(true, Ordering::SeqCst);
    for _ in 0..3 {
        assert!(stream.next().is_err());
        assert_eq!(stream.version(), Version(2));
    }
}

reading!(Read, READER_REFUSES);

#[test]
fn a_reader_stays_at_an_event_that_cannot_be_read() {
    let dir = store();
    let engine = open::<Read>(dir.path());
    let mut reader = engine.reader(ShardId(0));
    assert_eq!(ask(|| Ok(reader.next()?.map(|record| record.event.n.to_native())), &READER_REFUSES), STAYED);
}

reading!(Timed, BETWEEN_REFUSES);

#[test]
fn events_between_times_stay_at_an_event_that_cannot_be_read() {
    let dir = store();
    let engine = open::<Timed>(dir.path());
    let mut events = engine.events_between(Time(0), Time(u64::MAX));
    assert_eq!(ask(|| Ok(events.next()?.map(|record| record.event.n.to_native())), &BETWEEN_REFUSES), STAYED);
}

reading!(Sunk, SINK_REFUSES);

/// A sink that keeps calling its batch after an error and ignores the error.
#[derive(Clone, Default)]
struct Careless(Arc<Mutex<(Vec<u64>, Option<Position>)>>);

impl Sink<Sunk> for Careless {
    fn position(&mut self, _: ShardId) -> Result<Option<Position>, HandlerError> {
        Ok(self.0.lock().unwrap().1)
    }

    fn apply(&mut self, batch: &mut Batch<'_, Sunk>) -> Result<(), HandlerError> {
        let mut kept = self.0.lock().unwrap();
        for _ in 0..10 {
            if let Ok(Some(record)) = batch.next() {
                kept.0.push(record.event.n.to_native());
            }
        }
        kept.1 = Some(batch.end());
        Ok(())
    }
}

#[test]
fn a_sink_never_gets_an_event_after_one_that_cannot_be_read() {
    let dir = store();
    let engine = open::<Sunk>(dir.path());
    let kept = Careless::default();
    let sink = engine.consumer("sink").start_at(Start::Beginning).start_sink(10, kept.clone()).unwrap();
    until("the sink has ended", || engine.consumers()[0].failure.is_some());
    let drained = engine.drain_consumers(soon());
    assert!(matches!(drained, Err(ConsumerError::Ended { failure: Some(_) })), "{drained:?}");
    assert_eq!(kept.0.lock().unwrap().0, [1]);
    drop(sink);
    // Without the cause, the sink continues where it stopped.
    SINK_REFUSES.store(false, Ordering::SeqCst);
    let sink = engine.consumer("sink").start_sink(10, kept.clone()).unwrap();
    sink.drain(soon()).unwrap();
    assert_eq!(kept.0.lock().unwrap().0, [1, 14, 2, 3]);
    assert!(engine.consumers()[0].failure.is_none());
}

reading!(Gated, GATE_REFUSES);

#[test]
fn a_gate_does_not_skip_an_event_that_cannot_be_read() {
    let dir = store();
    let engine = open::<Gated>(dir.path());
    let policy = corelane::ingress::GatePolicy::default;
    for _ in 0..2 {
        let opened = engine.gated("in", policy(), |event| Some((event.n.to_native(), 0)));
        assert!(matches!(opened, Err(corelane::error::GateOpenError::Read(ReadError::Corruption(_)))));
    }
    GATE_REFUSES.store(false, Ordering::SeqCst);
    let gate = engine.gated("in", policy(), |event| Some((event.n.to_native(), 0))).unwrap();
    assert!([1, 14, 2, 3].iter().all(|partition| gate.expected(*partition) == Some(1)));
}

reading!(ForTasks, TASKS_REFUSE);

#[test]
fn an_asynchronous_handler_gets_upcasted_events_and_an_undecodable_one_is_parked() {
    let dir = store();
    let engine = open::<ForTasks>(dir.path());
    let seen = Arc::new(Mutex::new(Vec::new()));
    let saw = Arc::clone(&seen);
    tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(async {
        let consumer = engine.consumer("c").concurrency(2).start_async(move |event| {
            let saw = Arc::clone(&saw);
            async move {
                tokio::task::yield_now().await;
                saw.lock().unwrap().push(event.event().n.to_native());
                Ok(())
            }
        });
        let consumer = consumer.unwrap();
        consumer.drain_async(soon()).await.unwrap();
        assert_eq!((consumer.report().handled, consumer.report().parked), (1, 3), "14, and two events behind it");
        TASKS_REFUSE.store(false, Ordering::SeqCst);
        consumer.reprocess_async(corelane::consumer::LetterSelector::All).await.unwrap();
        while consumer.report().letters.letters > 0 {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
        consumer.stop_async(soon()).await.unwrap();
    });
    assert_eq!(*seen.lock().unwrap(), [1, 14, 2, 3]);
    engine.shutdown(soon()).unwrap();
}
