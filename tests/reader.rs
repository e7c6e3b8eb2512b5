//! Reading in place: what a reader keeps others from doing, and what it says where there is nothing to read.
#![expect(clippy::unwrap_used, reason = "a test may unwrap")]

mod common;

use common::{Note, SEGMENT, numbers, os_cache, small, soon};
use corelane::testing::FaultyStorage;
use corelane::{
    Event, EventLog, EventType, EventTypeId, FailureCause, Key, Offset, OpenError, ReadError, Retention, ShardId,
    WaitError,
};
use rkyv::{Archive, Deserialize, Serialize};

#[test]
fn a_store_stays_locked_while_a_reader_of_a_gone_engine_lives() {
    let dir = tempfile::tempdir().unwrap();
    let engine = EventLog::<Note>::open(small(dir.path())).unwrap();
    engine.producer().publish(Key(1), Note::new(1)).unwrap();
    engine.flush(soon()).unwrap();
    let mut reader = engine.reader(ShardId(0));
    drop(engine);
    assert!(matches!(EventLog::<Note>::open(small(dir.path())), Err(OpenError::Locked { .. })));
    assert_eq!(reader.next().unwrap().unwrap().event.n.to_native(), 1, "what it stands in is still there");
    drop(reader);
    assert_eq!(numbers(&EventLog::<Note>::open(small(dir.path())).unwrap()), [1]);
}

#[test]
fn an_offset_inside_a_record_is_not_a_record_and_the_end_is_one() {
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
fn what_retention_freed_is_beyond_retention() {
    let dir = tempfile::tempdir().unwrap();
    let keep = Retention { bytes_max: Some(2 * SEGMENT), age_max: None };
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

/// An event that does not say which of its types it is.
#[derive(Archive, Serialize, Deserialize, Debug)]
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
fn an_undeclared_type_fails_the_shard_and_the_store_opens_again() {
    for id in [0, 2, 7, u16::MAX] {
        let storage = FaultyStorage::new();
        let open = || EventLog::<Undeclared>::builder(small("/s")).faulty_storage(&storage).open();
        let engine = open().unwrap();
        let mut producer = engine.producer();
        producer.publish(Key(1), Undeclared { id: 1 }).unwrap().durable().wait_until(soon().unwrap()).unwrap();
        let failed = producer.publish(Key(1), Undeclared { id }).unwrap().appended().wait_until(soon().unwrap());
        let Err(WaitError::ShardFailed(failure)) = failed else { panic!("type {id}: {failed:?}") };
        let FailureCause::UndeclaredType { event_type, .. } = failure.cause else { panic!("type {id}: {failure}") };
        assert_eq!(event_type.0, id);
        drop(engine);
        assert_eq!(open().unwrap().recovery().events(), 1, "type {id}");
    }
}
