//! Events of older layouts: a current program opens a store of an older one and reads its events as current ones. A
//! store with unreadable events is refused unchanged.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::common::{os_cache, soon, tree};
use corelane::consumer::{HealthPolicy, LetterKind, LetterSelector, Retry};
use corelane::event::{Upcaster, deserialize};
use corelane::log::LiveFrom;
use corelane::{
    Aggregate, Bounded, Config, ConfigError, Durability, Emit, Engine, Event, EventLog, EventType, EventTypeId, Key,
    Meta, OpenError, ShardId, Stateless, Stored, Version,
};
use rkyv::{Archive, Deserialize, Serialize};

/// The event type of the older program.
#[derive(Archive, Serialize, Deserialize, Bounded, Debug, Clone, PartialEq)]
enum GameEventV1 {
    Moved { x: i32, y: i32 },
    Said { text: String, times: u32 },
}

impl Event for GameEventV1 {
    const TYPES: &'static [EventType] = &[EventType::new(1, "player_moved", 1), EventType::new(2, "player_said", 1)];

    fn event_type(&self) -> EventTypeId {
        EventTypeId(match self {
            Self::Moved { .. } => 1,
            Self::Said { .. } => 2,
        })
    }
}

/// The keys and events of the golden store, in log order.
fn golden_events() -> Vec<(u64, GameEventV1)> {
    let moved = |n: i32| GameEventV1::Moved { x: n * 37 - 500, y: -n };
    let said = |n: i32| GameEventV1::Said { text: format!("ho{n}"), times: [1, 3, 4000][n as usize % 3] };
    (0..36).map(|n| (n as u64 % 4, if n % 3 == 0 { said(n / 3) } else { moved(n) })).collect()
}

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/store-v3")
}

/// A store of an older format, which was never released.
fn older(version: u32) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/store-v{version}"))
}

/// An unpacked copy of the golden store. Its files are stored compressed, because they are mostly zeros.
fn golden_store() -> tempfile::TempDir {
    unpacked(&golden())
}

fn unpacked(golden: &Path) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let files = tree(golden);
    assert!(!files.is_empty(), "the golden store exists");
    for (path, compressed) in files {
        let target = dir.path().join(path.strip_prefix(golden).unwrap().with_extension(""));
        std::fs::create_dir_all(target.parent().unwrap()).unwrap();
        let mut content = Vec::new();
        flate2::read::GzDecoder::new(&compressed[..]).read_to_end(&mut content).unwrap();
        std::fs::write(target, content).unwrap();
    }
    dir
}

/// With `CORELANE_GOLDEN=write`, writes the golden store. It must never be written again: it stands for stores of older
/// programs.
#[test]
fn the_golden_store_holds_the_events_of_the_older_program() {
    if std::env::var("CORELANE_GOLDEN").is_ok_and(|what| what == "write") && !golden().exists() {
        let dir = tempfile::tempdir().unwrap();
        let engine = EventLog::<GameEventV1>::open(os_cache(dir.path())).unwrap();
        let mut producer = engine.producer();
        for (key, event) in golden_events() {
            producer.publish(Key(key), event).unwrap();
        }
        engine.shutdown(soon()).unwrap();
        drop((producer, engine));
        for (path, content) in tree(dir.path()) {
            let target = golden().join(path.strip_prefix(dir.path()).unwrap());
            let target = target.with_file_name(format!("{}.gz", target.file_name().unwrap().to_str().unwrap()));
            std::fs::create_dir_all(target.parent().unwrap()).unwrap();
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
            encoder.write_all(&content).unwrap();
            std::fs::write(target, encoder.finish().unwrap()).unwrap();
        }
    }
    let dir = golden_store();
    let engine = EventLog::<GameEventV1>::open(os_cache(dir.path())).unwrap();
    let mut reader = engine.reader(ShardId(0));
    let mut found = Vec::new();
    while let Some(record) = reader.next().unwrap() {
        assert_eq!(record.meta.schema_version, 1);
        found.push((record.meta.key.0, deserialize::<GameEventV1>(record.event).unwrap()));
    }
    assert_eq!(found, golden_events());
}

#[test]
fn a_store_of_an_older_format_is_refused_and_stays_unchanged() {
    for version in [1, 2] {
        let dir = unpacked(&older(version));
        let before = tree(dir.path());
        let refused = EventLog::<GameEventV1>::open(os_cache(dir.path())).err();
        assert!(
            matches!(&refused, Some(OpenError::UnknownFormat { found, known: 3, .. }) if *found == version),
            "{refused:?}"
        );
        assert_eq!(tree(dir.path()), before);
    }
}

/// A current program: always the same layout, with the given upcasters.
macro_rules! today {
    ($module:ident, $upcasters:expr) => {
        mod $module {
            use super::*;

            #[derive(Archive, Serialize, Deserialize, Bounded, Debug, Clone, PartialEq)]
            pub(super) enum GameEvent {
                Moved { x: f64, y: f64, running: bool },
                Said { text: String },
                Fought { with: u64, for_ms: u64, left: [u32; 4] },
            }

            impl Event for GameEvent {
                const TYPES: &'static [EventType] = &[
                    EventType::new(1, "player_moved", 2),
                    EventType::new(2, "player_said", 3),
                    EventType::new(3, "player_fought", 1),
                ];
                const UPCASTERS: &'static [Upcaster<Self>] = $upcasters;

                fn event_type(&self) -> EventTypeId {
                    EventTypeId(match self {
                        Self::Moved { .. } => 1,
                        Self::Said { .. } => 2,
                        Self::Fought { .. } => 3,
                    })
                }
            }

            #[derive(Archive, Serialize, Deserialize, Bounded, Debug, Clone, Default, PartialEq)]
            pub(super) struct Player {
                pub(super) x: f64,
                pub(super) y: f64,
                pub(super) said_bytes: u64,
                pub(super) fights: u64,
                pub(super) order: u64,
            }

            impl Player {
                fn mix(&mut self, n: u64, version: u64) {
                    self.order = (self.order ^ n ^ version << 40).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
                }

                /// The same fold on owned events.
                pub(super) fn apply(&mut self, event: &GameEvent, version: u64) {
                    match event {
                        GameEvent::Moved { x, y, .. } => {
                            (self.x, self.y) = (self.x + x, self.y + y);
                            self.mix(x.to_bits(), version);
                        }
                        GameEvent::Said { text } => {
                            self.said_bytes += text.len() as u64;
                            self.mix(text.bytes().map(u64::from).sum(), version);
                        }
                        GameEvent::Fought { with, .. } => {
                            self.fights += 1;
                            self.mix(*with, version);
                        }
                    }
                }
            }

            impl Aggregate for Player {
                type Event = GameEvent;
                type Command = GameEvent;
                type Rejection = ();

                fn evolve(&mut self, event: &ArchivedGameEvent, meta: &Meta) {
                    self.apply(&deserialize::<GameEvent>(event).unwrap(), meta.version.0);
                }

                fn decide(&self, event: GameEvent, emit: &mut Emit<GameEvent>) -> Result<(), ()> {
                    emit.event(event);
                    Ok(())
                }
            }

            impl GameEvent {
                pub(super) fn from_v1(archive: &[u8]) -> Result<Self, rkyv::rancor::Error> {
                    Ok(match GameEventV1::decode(archive)? {
                        GameEventV1::Moved { x, y } => GameEvent::Moved { x: x.into(), y: y.into(), running: false },
                        GameEventV1::Said { text, times } => GameEvent::Said { text: text.repeat(times as usize) },
                    })
                }
            }
        }
    };
}

today!(now, &[Upcaster::new(1, 1, GameEvent::from_v1), Upcaster::new(2, 1, GameEvent::from_v1)]);
today!(forgetful, &[Upcaster::new(1, 1, GameEvent::from_v1)]);
today!(
    refusing,
    &[
        Upcaster::new(1, 1, GameEvent::from_v1),
        Upcaster::new(2, 1, |archive| match GameEvent::from_v1(archive)? {
            // The upcaster of a program that refuses this event.
            GameEvent::Said { text } if text == "ho4ho4ho4" => GameEvent::from_v1(&[]),
            event => Ok(event),
        }),
    ]
);

use now::{GameEvent, Player};

/// The golden events in their current form, by rules independent of the upcasters.
fn expected() -> Vec<(u64, u16, GameEvent)> {
    let today = |event| match event {
        GameEventV1::Moved { x, y } => GameEvent::Moved { x: f64::from(x), y: f64::from(y), running: false },
        GameEventV1::Said { text, times } => GameEvent::Said { text: (0..times).map(|_| &text[..]).collect() },
    };
    golden_events().into_iter().map(|(key, event)| (key, 1, today(event))).collect()
}

fn found(engine: &Engine<Player>) -> Vec<(u64, u16, GameEvent)> {
    let mut reader = engine.reader(ShardId(0));
    let mut found = Vec::new();
    while let Some(record) = reader.next().unwrap() {
        let event = deserialize::<GameEvent>(record.event).unwrap();
        assert_eq!(record.meta.event_type, event.event_type());
        found.push((record.meta.key.0, record.meta.schema_version, event));
    }
    let mut feed = engine.live().from(LiveFrom::Beginning).start().unwrap();
    for (n, event) in (&mut feed).into_iter().take(found.len()).enumerate() {
        let (event, meta) =
            event.map(|event| (deserialize::<GameEvent>(event.event()).unwrap(), event.meta())).unwrap();
        assert!(found[n] == (meta.key.0, meta.schema_version, event), "a feed sees event {n} as a reader does");
    }
    found
}

fn check(engine: &Engine<Player>, expected: &[(u64, u16, GameEvent)]) {
    assert_eq!(
        found(engine),
        expected,
        "readers see current events with the schema versions under which they were written"
    );
    let mut states: HashMap<u64, (Player, u64)> = HashMap::new();
    for (key, _, event) in expected {
        let (state, version) = states.entry(*key).or_default();
        *version += 1;
        state.apply(event, *version);
    }
    for (key, (state, version)) in states {
        assert_eq!(engine.state(Key(key)).wait().unwrap(), Some((state, Version(version))), "key {key}");
    }
}

#[test]
fn a_store_of_older_events_opens_as_if_the_current_program_had_written_it() {
    let dir = golden_store();
    let config = || os_cache(dir.path());
    let mut expected = expected();
    assert!(expected.iter().any(|(_, _, event)| matches!(event, GameEvent::Said { text } if text.len() > 8 << 10)));
    let engine = Engine::<Player>::open(config()).unwrap();
    assert_eq!(engine.recovery().events(), 36);
    check(&engine, &expected);

    // New events have the current versions, and one has a type that the older program did not have.
    let news = [
        (0, 2, GameEvent::Moved { x: 0.5, y: -0.25, running: true }),
        (1, 3, GameEvent::Said { text: "new".into() }),
        (9, 1, GameEvent::Fought { with: 1, for_ms: 20, left: [1, 2, 3, 4] }),
    ];
    let mut client = engine.client();
    let mut producer = engine.producer();
    for (i, (key, _, event)) in news.iter().enumerate() {
        match i % 2 {
            0 => drop(client.send(Key(*key), event.clone()).wait().unwrap()),
            _ => producer.publish(Key(*key), event.clone()).unwrap().appended().wait().unwrap(),
        }
    }
    expected.extend(news);
    check(&engine, &expected);
    engine.shutdown(soon()).unwrap();
    drop((engine, client, producer));

    for _ in 0..2 {
        let engine = Engine::<Player>::open(config()).unwrap();
        check(&engine, &expected);
    }
    // An engine without states reads the events as well.
    let log = EventLog::<GameEvent>::open(config()).unwrap();
    let mut reader = log.reader(ShardId(0));
    let mut count = 0;
    while let Some(record) = reader.next().unwrap() {
        assert_eq!(deserialize::<GameEvent>(record.event).unwrap(), expected[count].2);
        count += 1;
    }
    assert_eq!(count, expected.len());
    // The older program refuses the store, because it cannot read the new events.
    drop((log, reader));
    match EventLog::<GameEventV1>::open(config()).unwrap_err() {
        OpenError::UnknownEventType { event_type, name, schema_version, .. } => {
            assert_eq!((event_type, &name[..], schema_version), (EventTypeId(1), "player_moved", 2));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_older_version_without_an_upcaster_is_refused_before_any_byte_changes() {
    let dir = golden_store();
    let before = tree(dir.path());
    let refused = [
        Engine::<forgetful::Player>::open(os_cache(dir.path())).map(drop).unwrap_err(),
        EventLog::<forgetful::GameEvent>::open(os_cache(dir.path())).map(drop).unwrap_err(),
    ];
    for error in refused {
        match error {
            OpenError::UnknownEventType { shard: ShardId(0), event_type, name, schema_version } => {
                assert_eq!((event_type, &name[..], schema_version), (EventTypeId(2), "player_said", 1));
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(tree(dir.path()) == before, "no file was changed, created or removed");
}

#[test]
fn an_older_version_without_an_upcaster_is_refused_even_if_a_checkpoint_covers_it() {
    let dir = golden_store();
    let engine = Engine::<Player>::open(os_cache(dir.path())).unwrap();
    engine.flush(soon()).unwrap();
    engine.checkpoint(soon()).unwrap();
    engine.shutdown(soon()).unwrap();
    drop(engine);
    let before = tree(dir.path());
    let error = EventLog::<forgetful::GameEvent>::open(os_cache(dir.path())).map(drop).unwrap_err();
    assert!(matches!(error, OpenError::UnknownEventType { .. }), "{error:?}");
    assert!(tree(dir.path()) == before, "no file was changed, created or removed");
}

#[test]
fn a_failing_upcaster_is_an_error_that_names_the_event() {
    let dir = golden_store();
    let before = tree(dir.path());
    let nth = expected().iter().position(|(.., event)| *event == GameEvent::Said { text: "ho4".repeat(3) }).unwrap();
    let at = {
        let engine = Engine::<Player>::open(os_cache(dir.path())).unwrap();
        let mut reader = engine.reader(ShardId(0));
        (0..nth).for_each(|_| assert!(reader.next().unwrap().is_some()));
        reader.offset()
    };
    let dir = golden_store();
    match Engine::<refusing::Player>::open(os_cache(dir.path())).map(drop).unwrap_err() {
        OpenError::Corruption(corruption) => {
            assert_eq!((corruption.shard, corruption.segment), (ShardId(0), 0));
            assert!(corruption.offset >= at, "the error names the record: {corruption}");
        }
        other => panic!("{other:?}"),
    }
    let after = tree(dir.path());
    assert_eq!(
        after.keys().map(|path| path.file_name()).collect::<Vec<_>>(),
        before.keys().map(|path| path.file_name()).collect::<Vec<_>>()
    );
    assert!(after.values().eq(before.values()), "no file was changed");

    // Without states opening folds nothing, and the reader reports the error.
    let log = EventLog::<refusing::GameEvent>::open(os_cache(dir.path())).unwrap();
    let mut reader = log.reader(ShardId(0));
    (0..nth).for_each(|_| assert!(reader.next().unwrap().is_some()));
    for _ in 0..2 {
        match reader.next().map(drop).unwrap_err() {
            corelane::ReadError::Corruption(corruption) => assert_eq!(corruption.offset, at),
            other => panic!("{other:?}"),
        }
    }
}

/// Declares an event with type 1 in version 3, type 2 in version 1, and these upcasters.
macro_rules! declaring {
    ($name:ident, $upcasters:expr) => {
        #[derive(Archive, Serialize, Deserialize, Bounded)]
        struct $name;

        impl Event for $name {
            const TYPES: &'static [EventType] = &[EventType::new(1, "a", 3), EventType::new(2, "b", 1)];
            const UPCASTERS: &'static [Upcaster<Self>] = $upcasters;

            fn event_type(&self) -> EventTypeId {
                EventTypeId(1)
            }
        }
    };
}

declaring!(
    Fine,
    &[Upcaster::new(1, 1, |_| Ok(Fine)), Upcaster::new(1, 2, |_| Ok(Fine)), Upcaster::new(2, 0, |_| Ok(Fine))]
);
declaring!(Undeclared, &[Upcaster::new(3, 1, |_| Ok(Undeclared))]);
declaring!(OfToday, &[Upcaster::new(1, 1, |_| Ok(OfToday)), Upcaster::new(1, 3, |_| Ok(OfToday))]);
declaring!(OfTheFuture, &[Upcaster::new(2, 2, |_| Ok(OfTheFuture))]);
declaring!(
    Twice,
    &[Upcaster::new(1, 2, |_| Ok(Twice)), Upcaster::new(1, 1, |_| Ok(Twice)), Upcaster::new(1, 2, |_| Ok(Twice))]
);

#[test]
fn an_upcaster_that_no_stored_version_needs_is_refused() {
    fn refused<E: Event>(config: Config) -> (u16, u16) {
        match EventLog::<E>::open(config).map(drop) {
            Err(OpenError::Config(ConfigError::UselessUpcaster { event_type, schema_version })) => {
                (event_type.0, schema_version)
            }
            other => panic!("{other:?}"),
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let config = || os_cache(dir.path()).durability(Durability::OsCache);
    // For a store that does not exist yet, and for one that does.
    for _ in 0..2 {
        assert_eq!(refused::<Undeclared>(config()), (3, 1));
        assert_eq!(refused::<OfToday>(config()), (1, 3));
        assert_eq!(refused::<OfTheFuture>(config()), (2, 2));
        assert_eq!(refused::<Twice>(config()), (1, 2));
        drop(Engine::<Stateless<Fine>>::open(config()).unwrap());
    }
}

static PANICS: AtomicBool = AtomicBool::new(false);

today!(
    panicking,
    &[
        Upcaster::new(1, 1, GameEvent::from_v1),
        Upcaster::new(2, 1, |archive| {
            assert!(!PANICS.load(Ordering::SeqCst), "a panic on purpose");
            GameEvent::from_v1(archive)
        })
    ]
);

#[test]
fn a_consumer_survives_a_panicking_upcaster() {
    for concurrency in [1, 3] {
        let dir = golden_store();
        let engine = EventLog::<panicking::GameEvent>::open(os_cache(dir.path())).unwrap();
        PANICS.store(true, Ordering::SeqCst);
        let retry = Retry::fixed().base(Duration::from_millis(1)).attempts(2);
        let health = HealthPolicy::default().consecutive_max(1_000).failure_percent_max(100);
        let consumer = engine.consumer("c").concurrency(concurrency).retry(retry).health(health);
        let consumer = consumer.start(|_, _| Ok(())).unwrap();
        consumer.drain(soon()).unwrap();
        let letters = consumer.dead_letters(None, 100).unwrap();
        let failed = letters.iter().find(|letter| letter.why == LetterKind::Failed).unwrap();
        assert!(failed.error.contains("a panic on purpose"), "{}", failed.error);
        PANICS.store(false, Ordering::SeqCst);
        consumer.reprocess(LetterSelector::All).unwrap();
        while consumer.report().letters.letters > 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
        let report = consumer.report();
        assert_eq!(report.handled + report.letters.handled, golden_events().len() as u64);
        consumer.stop(soon()).unwrap();
    }
}
