//! The smallest and largest ids, keys, times, versions and offsets are ordinary values, or are refused.

use std::convert::Infallible;

use crate::common::bank::{Account, Order, Refused};
use crate::common::{small, soon};
use corelane::command::ExpectedVersion;
use corelane::consumer::Retry;
use corelane::error::HistoryError;
use corelane::event::{Correlation, EventId};
use corelane::testing::FaultyStorage;
use corelane::view::{ById, Leaderboard};
use corelane::{
    Aggregate, Bounded, CommandError, Emit, Engine, Event, EventType, EventTypeId, Key, Meta, Offset, ShardId, Time,
    Version,
};
use rkyv::{Archive, Deserialize, Serialize};

const KEYS: [Key; 4] = [Key(0), Key(1), Key(u64::MAX - 1), Key(u64::MAX)];

/// An event with its own time and correlation, under the largest type id and schema version.
#[derive(Archive, Serialize, Deserialize, Bounded, Debug, Clone)]
struct Said {
    time: u64,
    correlation: u64,
}

impl Event for Said {
    const TYPES: &'static [EventType] = &[EventType::new(u16::MAX, "said", u16::MAX)];

    fn event_type(&self) -> EventTypeId {
        EventTypeId(u16::MAX)
    }

    fn time(&self) -> Option<Time> {
        Some(Time(self.time))
    }

    fn correlation(&self) -> Correlation {
        Correlation(self.correlation)
    }
}

#[derive(Archive, Serialize, Deserialize, Bounded, Debug, Clone, Default, PartialEq)]
struct Heard {
    events: u64,
    score: i64,
}

impl Aggregate for Heard {
    type Event = Said;
    type Command = Infallible;
    type Rejection = ();

    const STATE_VERSION: u16 = u16::MAX;

    fn evolve(&mut self, event: &ArchivedSaid, meta: &Meta) {
        self.events += 1;
        self.score = if meta.key == KEYS[3] { i64::MIN } else { event.time.to_native().cast_signed() };
    }

    fn decide(&self, command: Infallible, _: &mut Emit<Said>) -> Result<(), ()> {
        match command {}
    }
}

/// Opens a store of three events per key, at times 0, 1 and the last possible one.
fn heard(storage: &FaultyStorage) -> Engine<Heard> {
    let open = || Engine::<Heard>::builder(small("/s").snapshot_every(2)).faulty_storage(storage).open().unwrap();
    let engine = open();
    let mut producer = engine.producer();
    for time in [0, 1, u64::MAX] {
        for key in KEYS {
            producer.publish(key, Said { time, correlation: u64::MAX - time }).unwrap();
        }
    }
    engine.flush(soon()).unwrap();
    engine.checkpoint(soon()).unwrap();
    engine.shutdown(soon()).unwrap();
    drop((engine, producer));
    open()
}

#[test]
fn the_smallest_and_largest_keys_are_ordinary_keys() {
    let storage = FaultyStorage::new();
    drop(heard(&storage));
    let values = ById::<Heard, u64>::new(64, |heard: &Heard| heard.events);
    let best = Leaderboard::new(10, |heard: &Heard| heard.score);
    let builder = Engine::<Heard>::builder(small("/s").snapshot_every(2)).faulty_storage(&storage);
    let engine = builder.view(&values).view(&best).open().unwrap();
    for key in KEYS {
        let (state, version) = engine.state(key).wait().unwrap().unwrap();
        assert_eq!((state.events, version.0), (3, 3), "{key}");
        for version in 0..=3 {
            assert_eq!(engine.state_at(key, Version(version)).unwrap().state.events, version, "{key}");
        }
        let mut stream = engine.stream(key, Version(1)).unwrap();
        for version in 1..=3 {
            let meta = stream.next().unwrap().unwrap().meta;
            assert_eq!((meta.key, meta.version.0, meta.previous.is_none()), (key, version, version == 1));
            let type_ends = (meta.event_type.0, meta.schema_version);
            assert_eq!(type_ends, (u16::MAX, u16::MAX), "the largest type id and schema version");
            assert_eq!(meta.correlation.0, u64::MAX - meta.time.0);
        }
        assert_eq!(values.get(key).unwrap(), Some(3), "{key}");
    }
    let mut ranked: Vec<_> = best.top(10).iter().map(|ranked| ranked.key).collect();
    assert_eq!(ranked.pop(), Some(Key(u64::MAX)), "the last key has the lowest score");
    ranked.sort();
    assert_eq!(ranked, KEYS[..3]);

    let consumer = engine.consumer("c").retry(Retry::fixed().attempts(1)).start(|_, _| Err("no".into())).unwrap();
    consumer.drain(soon()).unwrap();
    let mut letters = Vec::new();
    while let Some(letter) = consumer.dead_letters(letters.last().copied(), 1).unwrap().pop() {
        letters.push((letter.key, letter.id.offset));
    }
    assert_eq!(letters.len(), 12);
    assert!(KEYS.iter().all(|key| letters.iter().filter(|(of, _)| of == key).count() == 3));
}

#[test]
fn the_smallest_and_largest_times_are_ordinary_times() {
    let storage = FaultyStorage::new();
    let engine = heard(&storage);
    let counted = |from, until| {
        let mut between = engine.events_between(Time(from), Time(until));
        std::iter::from_fn(|| between.next().unwrap().map(|_| ())).count()
    };
    assert_eq!((counted(0, 1), counted(0, 2), counted(1, 2)), (4, 8, 4));
    assert_eq!((counted(2, u64::MAX), counted(u64::MAX, u64::MAX)), (4, 4), "the last time is included");
    assert_eq!(counted(0, u64::MAX - 1), 8);
    for (time, events) in [(0, 1), (1, 2), (u64::MAX - 1, 2), (u64::MAX, 3)] {
        assert_eq!(engine.state_at(Key(1), Time(time)).unwrap().state.events, events, "at {time}");
    }
}

#[test]
fn versions_and_offsets_beyond_the_log_are_errors_without_overflow() {
    let storage = FaultyStorage::new();
    let engine = heard(&storage);
    for version in [4, u64::MAX - 1, u64::MAX] {
        let error = engine.state_at(Key(0), Version(version)).unwrap_err();
        assert!(matches!(error, HistoryError::NotYet { newest: Version(3), .. }), "{error}");
        assert!(engine.stream(Key(0), Version(version)).unwrap().next().unwrap().is_none());
    }
    for offset in [1, 4097, u64::MAX - 15, u64::MAX] {
        // Between records, or beyond the log: an error from `reader_at` or from the first `next`, or no event.
        if let Ok(mut reader) = engine.reader_at(ShardId(0), Offset(offset)) {
            assert!(!matches!(reader.next(), Ok(Some(_))), "offset {offset}");
        }
    }
    let consumer = engine.consumer("c").start(|_, _| Ok(())).unwrap();
    for offset in [0, u64::MAX] {
        let id = EventId { shard: ShardId(0), offset: Offset(offset) };
        let _outcome = consumer.wait_handled(Key(0), id, Some(std::time::Instant::now()));
    }
    consumer.drain(soon()).unwrap();
}

#[test]
fn idempotency_keys_and_expected_versions_have_no_special_values() {
    let storage = FaultyStorage::new();
    for round in 0..3 {
        let engine = Engine::<Account>::builder(small("/s")).faulty_storage(&storage).open().unwrap();
        let mut client = engine.client();
        for id in [0, 1, u64::MAX] {
            let done = client.send(Key(1), Order::Deposit(10)).once(id).wait().unwrap();
            assert_eq!(done.repeated, round > 0, "idempotency key {id}");
            let rejected = client.send(Key(2), Order::Withdraw(id + u64::from(id == 0))).once(id).wait();
            assert!(matches!(rejected, Err(CommandError::Rejected(Refused::NotEnough { .. }))), "{rejected:?}");
        }
        let state = engine.state(Key(1)).wait().unwrap().unwrap().0;
        assert_eq!(state.cents, 30, "each deposit counts once");
        let refused = client.send(Key(1), Order::Deposit(1)).expect(ExpectedVersion::Exact(Version(u64::MAX))).wait();
        assert!(matches!(refused, Err(CommandError::WrongVersion { .. })), "{refused:?}");
        if round == 1 {
            engine.checkpoint(soon()).unwrap();
        }
        engine.shutdown(soon()).unwrap();
    }
}
