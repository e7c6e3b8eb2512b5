//! Stored archives can be read back: size and alignment of the root, length and depth are checked, and unreadable ones
//! are refused.

use std::collections::BTreeMap;

use crate::common::{SEGMENT, small, soon};
use corelane::error::RejectedReason;
use corelane::event::{DEPTH_MAX, Encode, Scratch};
use corelane::testing::FaultyStorage;
use corelane::{
    Aggregate, Bounded, CommandError, Config, Durability, Emit, Engine, Event, EventLog, EventType, EventTypeId, Key,
    Meta, Offset, OpenError, ReadError, Retention, ShardId, Stored, Version,
};
use rkyv::{Archive, Deserialize, Serialize};

fn open<A: Aggregate>(storage: &FaultyStorage, config: Config) -> Result<Engine<A>, OpenError> {
    Engine::<A>::builder(config).faulty_storage(storage).open()
}

fn config(keeps: Option<u64>) -> Config {
    let retention = keeps.map_or_else(Retention::default, |segments| Retention::bytes(segments * SEGMENT));
    small("/s").snapshot_every(4).durability(Durability::OsCache).retention(retention)
}

#[derive(Archive, Serialize, Deserialize, Bounded, Debug, Clone)]
struct Paid {
    cents: u64,
    text: String,
}

impl Event for Paid {
    const TYPES: &'static [EventType] = &[EventType::new(1, "paid", 1)];

    fn event_type(&self) -> EventTypeId {
        EventTypeId(1)
    }
}

fn paid(cents: u64) -> Paid {
    Paid { cents, text: "x".repeat(1000) }
}

/// Declares an aggregate that sums its events, with the given state and rejection.
macro_rules! summing {
    ($(#[$attr:meta])* $state:ident { $($field:ident: $ty:ty),* }, $version:expr, $rejection:ty, |$no:ident| $refusal:expr
        $(, $name:ident = $upgrade:expr)*) => {
        #[derive(Archive, Serialize, Deserialize, Bounded, Debug, Clone, Default, PartialEq)]
        $(#[$attr])*
        struct $state {
            sum: u64,
            $($field: $ty,)*
        }

        impl Aggregate for $state {
            type Event = Paid;
            type Command = u64;
            type Rejection = $rejection;

            const STATE_VERSION: u16 = $version;

            fn evolve(&mut self, event: &ArchivedPaid, _: &Meta) {
                self.sum += event.cents.to_native();
            }

            fn decide(&self, cents: u64, emit: &mut Emit<Paid>) -> Result<(), $rejection> {
                if cents == 0 {
                    let $no = self.sum;
                    return Err($refusal);
                }
                emit.event(paid(cents));
                Ok(())
            }

            $(summing!(@$name $upgrade);)*
        }
    };
    (@upgrade $upgrade:expr) => {
        fn upgrade(state_version: u16, archived: &[u8]) -> Option<Self> {
            ($upgrade)(state_version, archived)
        }
    };
    (@upgrade_rejection $upgrade:expr) => {
        fn upgrade_rejection(archived: &[u8]) -> Option<Self::Rejection> {
            ($upgrade)(archived)
        }
    };
}

#[derive(Archive, Serialize, Deserialize, Bounded, Debug, Clone, PartialEq)]
struct Narrow {
    code: u64,
}

#[derive(Archive, Serialize, Deserialize, Bounded, Debug, Clone, PartialEq)]
struct Wide {
    text: u64,
    code: u64,
}

summing!(Counted { events: u64 }, 1, Narrow, |sum| Narrow { code: sum });
summing!(Plain {}, 1, Narrow, |sum| Narrow { code: sum });
summing!(
    /// The size of `Counted` with another alignment.
    #[rkyv(attr(repr(C, align(16))))]
    Aligned { events: u64 },
    1,
    Narrow,
    |sum| Narrow { code: sum }
);
summing!(
    Raised {},
    2,
    Narrow,
    |sum| Narrow { code: sum },
    upgrade = |version, archived: &[u8]| {
        assert_eq!(version, 1);
        let Counted { sum, .. } = Counted::decode(archived).ok()?;
        Some(Raised { sum })
    }
);
summing!(Other { events: u64 }, 1, Wide, |sum| Wide { text: 0, code: sum });
summing!(
    OtherReads { events: u64 },
    1,
    Wide,
    |sum| Wide { text: 0, code: sum },
    upgrade_rejection = |archived: &[u8]| {
        let Narrow { code } = Narrow::decode(archived).ok()?;
        Some(Wide { text: 7, code })
    }
);

const KEYS: u64 = 3;
const EVENTS: u64 = 250;

/// A store of `Counted` with snapshots and checkpoints; each event adds 1,000 to its key.
fn store(keeps: Option<u64>) -> FaultyStorage {
    let storage = FaultyStorage::new();
    let engine = open::<Counted>(&storage, config(keeps)).unwrap();
    let mut client = engine.client();
    for n in 1..=EVENTS {
        for key in 0..KEYS {
            client.send(Key(key), 1000).wait().unwrap();
        }
        if n % 100 == 0 {
            engine.checkpoint(soon()).unwrap();
        }
    }
    engine.checkpoint(soon()).unwrap();
    if keeps.is_some() {
        let has_freed = || engine.reader_at(ShardId(0), Offset(4096)).is_err();
        let deadline = soon().unwrap();
        while !has_freed() {
            assert!(std::time::Instant::now() < deadline, "no segment was freed");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }
    engine.shutdown(soon()).unwrap();
    FaultyStorage::with_files(storage.files())
}

#[test]
fn states_of_another_size_under_the_same_state_version_are_folded_again() {
    let storage = store(None);
    let engine = open::<Plain>(&storage, config(None)).unwrap();
    for key in 0..KEYS {
        assert_eq!(engine.state(Key(key)).wait().unwrap().unwrap().0, Plain { sum: 1000 * EVENTS });
        for version in 0..=EVENTS {
            let past = engine.state_at(Key(key), Version(version)).unwrap();
            assert_eq!(past.state, Plain { sum: 1000 * version }, "key {key} at {version}");
        }
    }
    assert!(engine.snapshot_stats().unreadable > 0, "unusable files are counted");
    engine.checkpoint(soon()).unwrap();
    drop(engine);
    // The newest checkpoint has the new layout; the others are still in the folder.
    let engine = open::<Plain>(&storage, config(None)).unwrap();
    for version in 0..=EVENTS {
        assert_eq!(engine.state_at(Key(1), Version(version)).unwrap().state, Plain { sum: 1000 * version });
    }
}

#[test]
fn states_of_another_alignment_under_the_same_state_version_are_folded_again() {
    let storage = store(None);
    let engine = open::<Aligned>(&storage, config(None)).unwrap();
    assert!(engine.snapshot_stats().unreadable > 0, "the checkpoints are skipped");
    assert_eq!(engine.state(Key(1)).wait().unwrap().unwrap().0.sum, 1000 * EVENTS);
    let past = engine.state_at(Key(1), Version(77)).unwrap();
    assert_eq!((past.state.sum, past.applied), (77_000, 77), "the snapshots are skipped");
}

#[test]
fn states_of_another_layout_whose_events_are_freed_need_an_upgrade() {
    let storage = store(Some(2));
    let refused = open::<Plain>(&storage, config(Some(2)));
    let Err(OpenError::StateLayout { stored: 16, declared: 8, .. }) = refused else { panic!("{refused:?}") };
    let engine = open::<Raised>(&storage, config(Some(2))).unwrap();
    assert_eq!(engine.state(Key(2)).wait().unwrap().unwrap().0, Raised { sum: 1000 * EVENTS });
}

#[test]
fn rejections_of_another_layout_are_upgraded_or_refused() {
    for has_checkpoint in [false, true] {
        let storage = FaultyStorage::new();
        let engine = open::<Counted>(&storage, config(None)).unwrap();
        let mut client = engine.client();
        client.send(Key(1), 5).once(1).wait().unwrap();
        let rejected = client.send(Key(1), 0).once(2).wait();
        assert!(matches!(rejected, Err(CommandError::Rejected(Narrow { code: 5 }))), "{rejected:?}");
        if has_checkpoint {
            engine.checkpoint(soon()).unwrap();
        }
        engine.shutdown(soon()).unwrap();
        let storage = FaultyStorage::with_files(storage.files());
        let refused = open::<Other>(&storage, config(None));
        let Err(OpenError::RejectionLayout { stored: 8, declared: 16, .. }) = refused else { panic!("{refused:?}") };
        for _ in 0..2 {
            let engine = open::<OtherReads>(&storage, config(None)).unwrap();
            let repeated = engine.client().send(Key(1), 0).once(2).wait();
            let Err(CommandError::Rejected(wide)) = repeated else { panic!("{repeated:?}") };
            assert_eq!(wide, Wide { text: 7, code: 5 });
            engine.checkpoint(soon()).unwrap();
        }
    }
}

/// An event without owned memory whose archive is longer than its value.
#[derive(Archive, Serialize, Bounded, Debug, Clone, Copy)]
struct Named {
    #[rkyv(with = rkyv::with::InlineAsBox)]
    name: &'static str,
}

impl Event for Named {
    const TYPES: &'static [EventType] = &[EventType::new(1, "named", 1)];

    fn event_type(&self) -> EventTypeId {
        EventTypeId(1)
    }
}

#[test]
fn an_event_whose_archive_is_longer_than_its_value_is_measured_when_it_is_published() {
    let storage = FaultyStorage::new();
    let config = small("/s").event_bytes_max(1024);
    let engine = EventLog::<Named>::builder(config).faulty_storage(&storage).open().unwrap();
    let (mut producer, shared) = (engine.producer(), engine.shared_producer());
    let (short, long) = (Named { name: "short" }, Named { name: "n".repeat(100_000).leak() });
    let is_too_large = |reason| matches!(reason, RejectedReason::TooLarge { bytes_max: 1024 });
    assert!(is_too_large(producer.publish(Key(1), long).unwrap_err().reason()));
    assert!(is_too_large(producer.try_publish(Key(1), long).unwrap_err().reason()));
    assert!(is_too_large(shared.publish(Key(1), long).wait().unwrap_err().reason()));
    let mut batch = vec![(Key(1), short), (Key(1), short), (Key(1), long), (Key(1), short)];
    let refused = producer.publish_batch(&mut batch).unwrap_err();
    assert!(refused.accepted == 2 && is_too_large(refused.reason.clone()), "{refused}");
    assert_eq!(batch.len(), 2, "the refused event and those after it stay in the batch");
    shared.publish(Key(1), short).wait().unwrap();
    engine.flush(soon()).unwrap();
    assert_eq!(engine.shard_metrics()[0].appended, 3);
    engine.shutdown(soon()).unwrap();
}

/// An event of any depth that declares depth 1.
#[derive(Archive, Serialize, Deserialize, Debug, Clone)]
#[rkyv(serialize_bounds(__S: rkyv::ser::Writer, __S::Error: rkyv::rancor::Source))]
#[rkyv(deserialize_bounds(__D::Error: rkyv::rancor::Source))]
#[rkyv(bytecheck(bounds(__C: rkyv::validation::ArchiveContext, __C::Error: rkyv::rancor::Source)))]
struct Nested {
    #[rkyv(omit_bounds)]
    inner: Option<Box<Nested>>,
}

impl Bounded for Nested {
    const DEPTH: u32 = 1;
}

impl Nested {
    fn of(levels: usize) -> Self {
        (0..levels).fold(Self { inner: None }, |inner, _| Self { inner: Some(Box::new(inner)) })
    }
}

impl Event for Nested {
    const TYPES: &'static [EventType] = &[EventType::new(1, "nested", 1)];

    fn event_type(&self) -> EventTypeId {
        EventTypeId(1)
    }
}

#[test]
fn archives_are_read_up_to_the_depth_limit() {
    let mut bytes = rkyv::util::AlignedVec::<16>::new();
    for (levels, holds) in [(0, true), (DEPTH_MAX as usize, true), (DEPTH_MAX as usize + 1, false), (1000, false)] {
        bytes.resize(1 << 16, 0);
        let len = Nested::of(levels).encode(&mut bytes, &mut Scratch::new(1 << 16)).unwrap();
        assert_eq!(Nested::access(&bytes[..len]).is_ok(), holds, "{levels} levels");
        assert_eq!(Nested::decode(&bytes[..len]).is_ok(), holds, "{levels} levels");
    }
}

#[derive(Archive, Serialize, Deserialize, Bounded, Debug, Clone, Default)]
struct Levels {
    events: u64,
}

impl Aggregate for Levels {
    type Event = Nested;
    type Command = std::convert::Infallible;
    type Rejection = ();

    fn evolve(&mut self, _: &ArchivedNested, _: &Meta) {
        self.events += 1;
    }

    fn decide(&self, command: std::convert::Infallible, _: &mut Emit<Nested>) -> Result<(), ()> {
        match command {}
    }
}

#[test]
fn a_stored_event_that_is_too_deep_is_an_error_for_every_reader() {
    let storage = FaultyStorage::new();
    let log = || EventLog::<Nested>::builder(small("/s")).faulty_storage(&storage);
    let engine = log().open().unwrap();
    let mut producer = engine.producer();
    producer.publish(Key(1), Nested::of(2)).unwrap();
    producer.publish(Key(1), Nested::of(500)).unwrap().durable().wait_until(soon().unwrap()).unwrap();
    engine.shutdown(soon()).unwrap();
    drop((engine, producer));
    let refused = open::<Levels>(&storage, small("/s"));
    assert!(matches!(refused, Err(OpenError::Corruption(_))), "{refused:?}");
    let engine = log().open().unwrap();
    let mut reader = engine.reader(ShardId(0));
    assert!(reader.next().unwrap().is_some());
    let error = reader.next().unwrap_err();
    assert!(matches!(error, ReadError::Corruption(_)), "{error}");
    // A consumer cannot read the event, so it becomes a dead letter.
    let consumer = engine.consumer("c").start(|_, _| Ok(())).unwrap();
    let deadline = soon().unwrap();
    while consumer.report().parked == 0 {
        assert!(std::time::Instant::now() < deadline, "{:?}", consumer.report());
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

#[test]
fn a_large_map_is_well_below_the_depth_limit() {
    let map: BTreeMap<u64, u64> = (0..50_000).map(|n| (n, n)).collect();
    let mut bytes = rkyv::util::AlignedVec::<16>::new();
    bytes.resize(4 << 20, 0);
    let len = map.encode(&mut bytes, &mut Scratch::new(1 << 20)).unwrap();
    assert_eq!(BTreeMap::<u64, u64>::decode(&bytes[..len]).unwrap(), map);
}
