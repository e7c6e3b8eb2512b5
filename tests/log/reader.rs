//! Readers in place: the lock they hold, invalid offsets, freed segments, and undeclared event types.

use crate::common::{Note, SEGMENT, numbers, os_cache, small, soon};
use corelane::error::{FailureCause, RejectedReason};
use corelane::testing::FaultyStorage;
use corelane::{
    Bounded, Event, EventLog, EventType, EventTypeId, Key, Offset, OpenError, ReadError, Retention, ShardId, WaitError,
};
use rkyv::{Archive, Deserialize, Serialize};

#[test]
fn a_store_stays_locked_while_a_reader_outlives_its_engine() {
    let dir = tempfile::tempdir().unwrap();
    let engine = EventLog::<Note>::open(small(dir.path())).unwrap();
    engine.producer().publish(Key(1), Note::new(1)).unwrap();
    engine.flush(soon()).unwrap();
    let mut reader = engine.reader(ShardId(0));
    drop(engine);
    assert!(matches!(EventLog::<Note>::open(small(dir.path())), Err(OpenError::Locked { .. })));
    assert_eq!(reader.next().unwrap().unwrap().event.n.to_native(), 1, "the reader's segment is still mapped");
    drop(reader);
    assert_eq!(numbers(&EventLog::<Note>::open(small(dir.path())).unwrap()), [1]);
}

#[test]
fn an_offset_inside_a_record_is_refused_and_the_end_of_the_log_is_accepted() {
    let dir = tempfile::tempdir().unwrap();
    let engine = EventLog::<Note>::open(small(dir.path())).unwrap();
    let mut producer = engine.producer();
    (0..3).for_each(|n| drop(producer.publish(Key(1), Note::new(n)).unwrap()));
    engine.flush(soon()).unwrap();
    let second = {
        let mut reader = engine.reader(ShardId(0));
        reader.next().unwrap();
        reader.offset()
    };
    let at = |offset| engine.reader_at(ShardId(0), offset);
    let mut reader = at(second).unwrap();
    let record = reader.next().unwrap().unwrap();
    assert_eq!((record.meta.sequence.0, record.event.n.to_native()), (1, 1));
    assert!(matches!(at(Offset(second.0 + 16)), Err(ReadError::NotARecord { .. })));
    let end = engine.shard_metrics()[0].appended_to;
    assert!(at(end).unwrap().next().unwrap().is_none());
    assert!(matches!(at(Offset(end.0 + 16)), Err(ReadError::NotARecord { .. })));
}

#[test]
fn reading_a_freed_offset_is_a_beyond_retention_error() {
    let dir = tempfile::tempdir().unwrap();
    let keep = Retention::bytes(2 * SEGMENT);
    let engine = EventLog::<Note>::open(os_cache(dir.path()).retention(keep)).unwrap();
    let mut producer = engine.producer();
    let waited = std::time::Instant::now();
    let mut n = 0;
    while engine.shard_metrics()[0].segments_freed == 0 {
        producer.publish(Key(1), Note::sized(n, 2000)).unwrap();
        n += 1;
        assert!(waited.elapsed().as_secs() < 20, "nothing was freed");
    }
    engine.flush(soon()).unwrap();
    let error = engine.reader_at(ShardId(0), Offset(4096)).unwrap_err();
    let ReadError::BeyondRetention { asked, earliest, .. } = error else { panic!("{error}") };
    assert!(asked < earliest, "{asked} {earliest}");
    let first = engine.reader(ShardId(0)).next().unwrap().unwrap().meta;
    assert!(first.offset >= earliest && first.version.0 > 1);
}

/// An event whose type id is a field, so that it may be undeclared.
#[derive(Archive, Serialize, Deserialize, Bounded, Debug)]
struct Undeclared {
    id: u16,
}

impl Event for Undeclared {
    const TYPES: &'static [EventType] = &[EventType::new(1, "declared", 1)];
    fn event_type(&self) -> EventTypeId {
        EventTypeId(self.id)
    }
}

#[test]
fn an_event_of_an_undeclared_type_comes_back_and_no_other_event_is_lost() {
    for id in [0, 2, 7, u16::MAX] {
        let storage = FaultyStorage::new();
        let open = || EventLog::<Undeclared>::builder(small("/s")).faulty_storage(&storage).open();
        let engine = open().unwrap();
        let (mut producer, shared) = (engine.producer(), engine.shared_producer());
        let (good, bad) = (|| (Key(1), Undeclared { id: 1 }), || (Key(1), Undeclared { id }));
        for refused in [
            producer.publish(Key(1), Undeclared { id }).unwrap_err(),
            producer.try_publish(Key(1), Undeclared { id }).unwrap_err(),
            shared.publish(Key(1), Undeclared { id }).wait().unwrap_err(),
        ] {
            let RejectedReason::UndeclaredType { event_type } = refused.reason() else { panic!("{refused}") };
            assert_eq!((event_type.0, refused.into_event().id), (id, id));
        }
        let mut batch = vec![good(), good(), bad(), good()];
        let refused = producer.publish_batch(&mut batch).unwrap_err();
        assert!(matches!(refused.reason, RejectedReason::UndeclaredType { .. }), "{refused}");
        assert_eq!((refused.accepted, batch.len(), batch[0].1.id), (2, 2, id));
        producer.publish(Key(1), good().1).unwrap();
        engine.flush(soon()).unwrap();
        engine.shutdown(soon()).unwrap();
        drop((engine, producer, shared));
        assert_eq!(open().unwrap().recovery().events(), 3, "type {id}");
    }
}

/// Types whose ids are not consecutive.
#[derive(Archive, Serialize, Deserialize, Bounded, Debug)]
struct Sparse {
    id: u16,
}

impl Event for Sparse {
    const TYPES: &'static [EventType] =
        &[EventType::new(900, "c", 1), EventType::new(3, "a", 1), EventType::new(u16::MAX, "d", 1)];
    fn event_type(&self) -> EventTypeId {
        EventTypeId(self.id)
    }
}

#[test]
fn ids_between_the_declared_type_ids_are_refused() {
    let storage = FaultyStorage::new();
    let engine = EventLog::<Sparse>::builder(small("/s")).faulty_storage(&storage).open().unwrap();
    let mut producer = engine.producer();
    let declared = (0..=u16::MAX).filter(|&id| producer.publish(Key(1), Sparse { id }).is_ok());
    assert_eq!(declared.collect::<Vec<_>>(), [3, 900, u16::MAX]);
}

/// An event that returns another type id on each call.
#[derive(Archive, Serialize, Deserialize, Bounded, Debug)]
struct Fickle {
    asked: u8,
    #[rkyv(with = rkyv::with::Skip)]
    #[bounded(depth = 0)]
    times: std::sync::Mutex<u16>,
}

impl Event for Fickle {
    const TYPES: &'static [EventType] = &[EventType::new(1, "fickle", 1)];
    fn event_type(&self) -> EventTypeId {
        let mut times = self.times.lock().unwrap();
        *times += 1;
        EventTypeId(*times)
    }
}

#[test]
fn an_event_that_changes_its_type_after_the_check_fails_the_shard_and_the_store_opens_again() {
    let storage = FaultyStorage::new();
    let open = || EventLog::<Fickle>::builder(small("/s")).faulty_storage(&storage).open();
    let engine = open().unwrap();
    let event = Fickle { asked: 0, times: std::sync::Mutex::new(0) };
    let failed = engine.producer().publish(Key(1), event).unwrap().appended().wait_until(soon().unwrap());
    let Err(WaitError::ShardFailed(failure)) = failed else { panic!("{failed:?}") };
    assert!(matches!(failure.cause, FailureCause::UndeclaredType { .. }), "{failure}");
    drop(engine);
    assert_eq!(open().unwrap().recovery().events(), 0);
}
