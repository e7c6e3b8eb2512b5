//! Opening a store: a cache is checked against the log before it is used, and a refused store stays unchanged.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use crate::common::bank::{Account, Logged, Money, folded, logged};
use crate::common::{PAGE, SEGMENT, open_on, os_cache, small, soon};
use corelane::error::HistoryError;
use corelane::testing::FaultyStorage;
use corelane::{Config, Engine, Event, EventLog, EventType, EventTypeId, Key, OpenError, Version};

type Files = BTreeMap<PathBuf, Vec<u8>>;

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// Stores the checksum of `bytes[from..until]` at `at`.
fn repair(bytes: &mut [u8], from: usize, until: usize, at: usize) {
    let crc = crc32c::crc32c(&bytes[from..until]);
    bytes[at..at + 4].copy_from_slice(&crc.to_le_bytes());
}

/// Repairs a file whose checksum is its last four bytes.
fn repair_last(bytes: &mut [u8]) {
    let end = bytes.len() - 4;
    repair(bytes, 0, end, end);
}

fn open_bank(storage: &FaultyStorage, config: Config) -> Result<Engine<Account>, OpenError> {
    Engine::<Account>::builder(config).faulty_storage(storage).open()
}

fn bank_config() -> Config {
    small("/s").snapshot_every(10).durability(corelane::Durability::OsCache)
}

const KEYS: u64 = 3;
const EVENTS: u64 = 84;
const CHECKPOINT: &str = "/s/shard-0000/checkpoint-";
const SNAPSHOTS: &str = "/s/shard-0000/snapshots-";

/// The files of a closed store of two segments with two checkpoints and events after each, and its events.
fn bank() -> (Files, Vec<Logged>) {
    let storage = FaultyStorage::new();
    let engine = open_bank(&storage, bank_config()).unwrap();
    let mut producer = engine.producer();
    for n in 1..=EVENTS {
        producer.publish(Key(n % KEYS), Money::Noted { text: "n".repeat(1000 + n as usize % 50) }).unwrap();
        if n % 35 == 0 {
            engine.flush(soon()).unwrap();
            engine.checkpoint(soon()).unwrap();
        }
    }
    engine.flush(soon()).unwrap();
    let events = logged(&engine, 0);
    engine.shutdown(soon()).unwrap();
    drop((producer, engine));
    let files = storage.files();
    assert_eq!(events.len() as u64, EVENTS);
    assert_eq!(named(&files, CHECKPOINT).len(), 2);
    assert!(!named(&files, SNAPSHOTS).is_empty());
    (files, events)
}

fn named(files: &Files, beginning: &str) -> Vec<PathBuf> {
    files.keys().filter(|path| path.to_str().unwrap().starts_with(beginning)).cloned().collect()
}

#[derive(Debug, PartialEq)]
enum Opened {
    Refused(String),
    /// With this number of unusable files of saved states.
    Right(u64),
}

/// Opens these files. Checks that the store is either refused and unchanged, or holds every durable event unchanged.
fn open_and_look(files: &Files, events: &[Logged], what: &str, states_too: bool) -> Opened {
    let storage = FaultyStorage::with_files(files.clone());
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        let engine = match open_bank(&storage, bank_config()) {
            Ok(engine) => engine,
            Err(error) => return Opened::Refused(error.to_string()),
        };
        assert_eq!(engine.recovery().shards[0].torn_tail, None, "{what}: no tail is torn");
        assert!(logged(&engine, 0) == events, "{what}: the log holds the written events");
        if states_too {
            for (key, (state, version)) in folded(events) {
                let found = engine.state(Key(key)).wait().unwrap();
                assert_eq!(found, Some((state, Version(version))), "{what}: key {key}");
            }
            assert!(engine.compare().unwrap().differing.is_empty(), "{what}");
        }
        for key in 0..KEYS {
            for version in [1, 17, EVENTS / KEYS] {
                // The right state or an error, and never a panic.
                drop(engine.state_at(Key(key), Version(version)));
            }
        }
        let unreadable = engine.snapshot_stats().unreadable;
        let producer = &mut engine.producer();
        for key in 0..KEYS {
            producer.publish(Key(key), Money::Deposited { cents: 1 }).unwrap();
        }
        engine.shutdown(soon()).unwrap();
        Opened::Right(unreadable)
    }));
    let Ok(outcome) = outcome else { panic!("{what}: opening panicked") };
    let after = storage.files();
    assert!(!after.keys().any(|path| path.starts_with("/s/quarantine")), "{what}: something was quarantined");
    match &outcome {
        Opened::Refused(why) => {
            assert!(after == *files, "{what}: refused ({why}) and changed");
        }
        Opened::Right(_) => {
            // The new events follow the durable ones, whose bytes are unchanged.
            let end = events.last().unwrap().offset;
            for (index, path) in named(files, "/s/shard-0000/0000").iter().enumerate() {
                let held = end.saturating_sub(index as u64 * SEGMENT).min(SEGMENT) as usize;
                assert!(files[path][..held] == after[path][..held], "{what}: {} changed", path.display());
            }
        }
    }
    outcome
}

/// The offsets of the log's records, each with the sequence of the next event there.
fn boundaries(files: &Files) -> Vec<(u64, u64)> {
    let (mut all, mut sequence) = (Vec::new(), 0);
    for (index, path) in named(files, "/s/shard-0000/0000").iter().enumerate() {
        let bytes = &files[path];
        if &bytes[..8] != b"corelseg" {
            continue;
        }
        let mut at = PAGE;
        while at + 48 <= bytes.len() && u32_at(bytes, at) != 0 {
            all.push((index as u64 * SEGMENT + at as u64, sequence));
            let is_event = bytes[at + 30..at + 32] != [0, 0];
            sequence += u64::from(is_event);
            at += (u32_at(bytes, at) as usize).next_multiple_of(16);
        }
    }
    all
}

#[test]
fn a_checkpoint_that_starts_at_no_record_is_not_used_and_no_event_is_lost() {
    let (files, events) = bank();
    assert_eq!(open_and_look(&files, &events, "undamaged", true), Opened::Right(0));
    let newest = named(&files, CHECKPOINT).pop().unwrap();
    let (start, sequence) = (u64_at(&files[&newest], 24), u64_at(&files[&newest], 32));
    let places = boundaries(&files);
    let here = places.iter().position(|(offset, _)| *offset == start).expect("the checkpoint begins at a record");
    let (before, behind) = (places[here - 1], places[here + 3]);
    let end = places.last().unwrap().0;
    let mut starts: Vec<(u64, u64)> = [
        0,
        1,
        15,
        16,
        17,
        48,
        4095,
        4096,
        4097,
        4112,
        start - 15,
        start - 1,
        start + 1,
        start - 16,
        start + 16,
        start - 48,
        start + 48,
        start + 1104,
        start - 1104,
        start | 1 << 63,
        start | 1 << 40,
        start + SEGMENT,
        SEGMENT,
        SEGMENT + 16,
        SEGMENT + 4080,
        SEGMENT - 16,
        before.0,
        behind.0,
        end,
        end + 48,
        end + 1,
        2 * SEGMENT + 4096,
        u64::MAX,
        u64::MAX - 15,
        (1 << 52) + 4096,
        (1 << 52) - 16,
    ]
    .into_iter()
    .map(|start| (start, sequence))
    .collect();
    // The right offset with a wrong sequence.
    starts.extend([0, 1, sequence - 1, sequence + 1, u64::MAX].map(|sequence| (start, sequence)));
    for (start, sequence) in starts {
        // With and without an older checkpoint, with and without the statement that the log was durable.
        for (alone, durable) in [(false, true), (true, true), (true, false)] {
            let mut files = files.clone();
            if alone {
                files.remove(&named(&files, CHECKPOINT)[0]);
            }
            let bytes = files.get_mut(&newest).unwrap();
            bytes[24..32].copy_from_slice(&start.to_le_bytes());
            bytes[32..40].copy_from_slice(&sequence.to_le_bytes());
            repair(bytes, 0, 72, 72);
            let end = bytes.len() - 48;
            bytes[end + 32] = u8::from(durable);
            bytes[end + 40..end + 48].fill(0);
            let len = bytes.len();
            repair(bytes, end + 8, len, end + 4);
            let what = format!("start {start}, sequence {sequence}, alone {alone}, durable {durable}");
            let opened = open_and_look(&files, &events, &what, true);
            assert!(matches!(opened, Opened::Right(unreadable) if unreadable > 0), "{what}: {opened:?}");
        }
    }
}

/// A field of a file.
struct Field {
    name: &'static str,
    at: usize,
    bytes: usize,
}

const fn field(name: &'static str, at: usize, bytes: usize) -> Field {
    Field { name, at, bytes }
}

/// Wrong values for a field: 0, 1, the largest, near misses, unaligned ones, and one other bit.
fn values(now: u64, bytes: usize) -> Vec<u64> {
    let max = if bytes == 8 { u64::MAX } else { (1 << (8 * bytes)) - 1 };
    let mut all = vec![0, 1, 4096, 4097, max, max - 15, max / 2 + 1];
    all.extend([1, 16].iter().flat_map(|by| [now.wrapping_add(*by), now.wrapping_sub(*by)]));
    all.push(now ^ 1 << (8 * bytes / 2));
    all.retain_mut(|value| {
        *value &= max;
        *value != now
    });
    all.sort_unstable();
    all.dedup();
    all
}

/// Sets a field and calls `repair`.
fn with_field(files: &Files, path: &Path, at: usize, bytes: usize, value: u64, repair: impl Fn(&mut [u8])) -> Files {
    let mut files = files.clone();
    let content = files.get_mut(path).unwrap();
    content[at..at + bytes].copy_from_slice(&value.to_le_bytes()[..bytes]);
    repair(content);
    files
}

/// Opens the store with every wrong value of every field. Returns the number of refused and of opened stores.
fn try_fields(
    (files, events): (&Files, &[Logged]),
    path: &Path,
    base: usize,
    fields: &[Field],
    states_too: bool,
    repair: impl Fn(&mut [u8]) + Copy,
) -> (u64, u64) {
    let (mut refused, mut right) = (0, 0);
    for Field { name, at, bytes } in fields {
        let at = base + at;
        let mut now = [0; 8];
        now[..*bytes].copy_from_slice(&files[path][at..at + bytes]);
        for value in values(u64::from_le_bytes(now), *bytes) {
            if *name == "first" && value <= 2 {
                // The span defines the start of the log. With a valid checksum, a later start is one that retention
                // made.
                continue;
            }
            let changed = with_field(files, path, at, *bytes, value, repair);
            let what = format!("{} of {}: {value:#x}", name, path.display());
            match open_and_look(&changed, events, &what, states_too) {
                Opened::Refused(_) => refused += 1,
                Opened::Right(_) => right += 1,
            }
        }
    }
    (refused, right)
}

#[test]
fn no_field_of_a_file_of_saved_states_makes_opening_lose_or_change_an_event() {
    let (files, events) = bank();
    let all = (&files, &events[..]);
    let header = [
        field("format", 8, 4),
        field("archive", 12, 4),
        field("kind", 16, 2),
        field("shard", 18, 2),
        field("state version", 20, 2),
        field("zero", 22, 2),
        field("start", 24, 8),
        field("sequence", 32, 8),
        field("time", 40, 8),
        field("state size", 48, 4),
        field("state alignment", 52, 2),
        field("zero", 54, 2),
        field("store", 56, 8),
        field("check", 64, 4),
        field("zero", 68, 4),
    ];
    let entry = [
        field("length", 0, 4),
        field("key", 8, 8),
        field("version", 16, 6),
        field("state version", 22, 2),
        field("head", 24, 8),
        field("latest time", 32, 8),
        field("state bytes", 40, 4),
        field("outcomes", 44, 4),
    ];
    let end = [
        field("entries", 8, 8),
        field("log end", 24, 8),
        field("durable", 32, 4),
        field("check", 36, 4),
        field("boot", 40, 8),
    ];
    let newest = named(&files, CHECKPOINT).pop().unwrap();
    let snapshots = named(&files, SNAPSHOTS).pop().unwrap();
    // The states are right with any value in a header or an end.
    for path in [&newest, &snapshots] {
        try_fields(all, path, 0, &header, true, |bytes| repair(bytes, 0, 72, 72));
    }
    let base = files[&newest].len() - 48;
    try_fields(all, &newest, base, &end, true, |bytes| {
        let len = bytes.len();
        repair(bytes, base + 8, len, base + 4);
    });
    // A forged state with a valid checksum is accepted as a state; the log stays unchanged.
    for path in [&newest, &snapshots] {
        try_fields(all, path, 80, &entry, false, |bytes| {
            let len = (u32_at(bytes, 80) as usize).clamp(8, bytes.len() - 80);
            repair(bytes, 80 + 8, 80 + len, 80 + 4);
        });
    }
}

#[test]
fn no_field_of_the_manifest_span_or_segment_header_makes_opening_panic_or_change_an_event() {
    let (mut files, events) = bank();
    // Without saved states, opening reads the whole log.
    files.retain(|path, _| path.extension().is_none_or(|extension| extension != "snp"));
    let all = (&files, &events[..]);
    let manifest = [
        field("format", 8, 4),
        field("archive", 12, 4),
        field("shards", 16, 2),
        field("root's alignment", 18, 2),
        field("segment bytes", 24, 8),
        field("types", 32, 4),
        field("root's bytes", 36, 4),
        field("store id", 40, 8),
        field("a type's id", 48, 2),
        field("its schema version", 50, 2),
        field("its name's length", 52, 2),
    ];
    try_fields(all, Path::new("/s/manifest"), 0, &manifest, true, repair_last);
    let span = [field("format", 8, 4), field("first", 12, 8), field("last", 20, 8)];
    // A span that ends before a prepared but unused segment is equivalent.
    let (refused, right) = try_fields(all, Path::new("/s/shard-0000/span"), 0, &span, true, repair_last);
    assert!(refused > 15 && right <= 1, "{refused} refused, {right} opened");
    let header = [
        field("format", 8, 4),
        field("byte order", 12, 4),
        field("archive", 16, 4),
        field("shard", 24, 2),
        field("index", 32, 8),
        field("segment bytes", 40, 8),
        field("first sequence", 56, 8),
    ];
    for index in 0..2 {
        let path = PathBuf::from(format!("/s/shard-0000/{index:012}.seg"));
        try_fields(all, &path, 0, &header, true, |bytes| repair(bytes, 0, 76, 76));
    }
}

/// An event of the store with several shards.
fn text(n: u64) -> crate::common::Note {
    crate::common::Note::sized(n, 700)
}

const SHARDS: u16 = 3;

fn shards_config() -> Config {
    os_cache("/s").shards(SHARDS)
}

fn partition(event: &crate::common::ArchivedNote) -> Option<(u64, u64)> {
    Some((0, event.n.to_native()))
}

/// The files of a store of three shards with consumers "a" and "b", a gate and checkpoints, in which opening repairs
/// every part: a torn tail in every shard, positions of a consumer and of a gate beyond the log, and saved states of
/// lost events.
fn damaged_everywhere() -> Files {
    let storage = FaultyStorage::new();
    let engine = open_on(&storage, shards_config()).unwrap();
    let mut gated = engine.gated("in", corelane::ingress::GatePolicy::default(), partition).unwrap();
    for n in 0..150 {
        drop(gated.offer(0, n, Key(n % 11), text(n)).unwrap());
    }
    gated.save(soon()).unwrap();
    drop(gated);
    for name in ["a", "b"] {
        let consumer =
            engine.consumer(name).start(|_: &crate::common::ArchivedNote, _: &corelane::Meta| Ok(())).unwrap();
        consumer.drain(soon()).unwrap();
        consumer.stop(soon()).unwrap();
    }
    engine.flush(soon()).unwrap();
    engine.checkpoint(soon()).unwrap();
    engine.shutdown(soon()).unwrap();
    drop(engine);
    let mut files = storage.files();
    for shard in 0..SHARDS {
        let dir = format!("/s/shard-{shard:04}/");
        let last = named(&files, &dir).into_iter().filter(|path| {
            path.extension().is_some_and(|extension| extension == "seg") && &files[path][..8] == b"corelseg"
        });
        let last = last.max().unwrap();
        let bytes = files.get_mut(&last).unwrap();
        let mut at = PAGE;
        while u32_at(bytes, at) != 0 {
            at += (u32_at(bytes, at) as usize).next_multiple_of(16);
        }
        // A partial record after the final mark.
        bytes[at..at + 200].fill(0x33);
        bytes[at..at + 4].copy_from_slice(&100_u32.to_le_bytes());
        // A checkpoint beyond the end of the log.
        let checkpoint = named(&files, &format!("{dir}checkpoint-")).pop().unwrap();
        let bytes = files.get_mut(&checkpoint).unwrap();
        let end = bytes.len() - 48;
        let beyond = u64_at(bytes, end + 24) + (1 << 20);
        bytes[end + 24..end + 32].copy_from_slice(&beyond.to_le_bytes());
        let len = bytes.len();
        repair(bytes, end + 8, len, end + 4);
    }
    let consumer = files.get_mut(Path::new("/s/consumers/a/checkpoint")).unwrap();
    let (position, read) = (u64_at(consumer, POSITION), u64_at(consumer, POSITION + 8));
    consumer[POSITION..POSITION + 8].copy_from_slice(&(position + (1 << 20)).to_le_bytes());
    consumer[POSITION + 8..POSITION + 16].copy_from_slice(&(read + (1 << 20)).to_le_bytes());
    repair_last(consumer);
    let gate = files.get_mut(Path::new("/s/gates/in/positions")).unwrap();
    let counted = u64_at(gate, 32);
    gate[32..40].copy_from_slice(&(counted + (1 << 20)).to_le_bytes());
    repair_last(gate);
    files
}

/// The offset of the first shard's position in the file of a consumer's position.
const POSITION: usize = 16;

/// The event of a program that declares one more type, so that opening extends the manifest.
#[derive(rkyv::Archive, rkyv::Serialize, rkyv::Deserialize, corelane::Bounded, Debug)]
struct More {
    n: u64,
    text: String,
}

impl Event for More {
    const TYPES: &'static [EventType] = &[EventType::new(1, "note", 1), EventType::new(2, "more", 1)];
    fn event_type(&self) -> EventTypeId {
        EventTypeId(1)
    }
}

fn open_more(storage: &FaultyStorage) -> Result<EventLog<More>, OpenError> {
    EventLog::<More>::builder(shards_config()).faulty_storage(storage).open()
}

#[test]
fn a_refused_store_stays_unchanged_whatever_opening_would_have_repaired() {
    let files = damaged_everywhere();
    // Without a fault the store opens, and opening repairs every part.
    {
        let storage = FaultyStorage::with_files(files.clone());
        let engine = open_more(&storage).unwrap();
        assert!(engine.recovery().shards.iter().all(|shard| shard.torn_tail.is_some()), "{:?}", engine.recovery());
        assert_eq!(engine.recovery().events(), 150);
        engine.shutdown(soon()).unwrap();
        drop(engine);
        let after = storage.files();
        assert_eq!(named(&after, "/s/quarantine/").len(), usize::from(SHARDS));
        for path in ["/s/consumers/a/checkpoint", "/s/gates/in/positions", "/s/manifest"].map(Path::new) {
            assert!(files.get(path) != after.get(path), "{}: not repaired", path.display());
        }
    }
    let mut faults: Vec<(String, Files)> = Vec::new();
    let mut fault = |name: String, change: &dyn Fn(&mut Files)| {
        let mut files = files.clone();
        change(&mut files);
        faults.push((name, files));
    };
    for shard in 0..SHARDS {
        let dir = PathBuf::from(format!("/s/shard-{shard:04}"));
        let (segment, span) = (dir.join("000000000000.seg"), dir.join("span"));
        fault(format!("a damaged record in shard {shard}"), &|files| files.get_mut(&segment).unwrap()[PAGE + 60] ^= 1);
        fault(format!("a missing segment in shard {shard}"), &|files| drop(files.remove(&segment)));
        fault(format!("a damaged header in shard {shard}"), &|files| files.get_mut(&segment).unwrap()[40] ^= 1);
        fault(format!("a damaged span in shard {shard}"), &|files| files.get_mut(&span).unwrap()[13] ^= 1);
        fault(format!("a missing span in shard {shard}"), &|files| drop(files.remove(&span)));
        fault(format!("a stray segment in shard {shard}"), &|files| {
            files.insert(dir.join("backup.seg"), vec![1; 10]);
        });
    }
    for name in ["a", "b"] {
        let path = PathBuf::from(format!("/s/consumers/{name}/checkpoint"));
        let letters = PathBuf::from(format!("/s/consumers/{name}/letters-000001.log"));
        fault(format!("a damaged position of {name}"), &|files| files.get_mut(&path).unwrap()[17] ^= 1);
        fault(format!("a position of {name} of a newer version"), &|files| {
            let bytes = files.get_mut(&path).unwrap();
            bytes[8] = 9;
            repair_last(bytes);
        });
        fault(format!("letters of {name} without a position"), &|files| {
            files.remove(&path);
            files.insert(letters.clone(), vec![0; 64]);
        });
    }
    fault("gate positions of a newer version".into(), &|files| {
        let bytes = files.get_mut(Path::new("/s/gates/in/positions")).unwrap();
        bytes[8] = 9;
        repair_last(bytes);
    });
    fault("a damaged manifest".into(), &|files| files.get_mut(Path::new("/s/manifest")).unwrap()[30] ^= 1);
    let mut refused = 0;
    for (name, files) in faults {
        let storage = FaultyStorage::with_files(files.clone());
        let outcome = open_more(&storage).map(drop);
        if name.starts_with("gate positions") && outcome.is_ok() {
            continue;
        }
        let error = outcome.expect_err(&name);
        assert!(storage.files() == files, "{name}: refused ({error}) and changed");
        refused += 1;
    }
    assert!(refused >= 25, "{refused}");
}

#[test]
fn a_store_whose_threads_cannot_be_started_stays_unchanged() {
    let files = damaged_everywhere();
    let mut refused = 0;
    for threads in 0..32 {
        let storage = FaultyStorage::with_files(files.clone());
        let builder = EventLog::<More>::builder(shards_config()).faulty_storage(&storage).threads_max(threads);
        match builder.open() {
            Ok(engine) => {
                assert!(threads >= 2 + 2 * usize::from(SHARDS));
                return drop(engine);
            }
            Err(OpenError::Io { action, .. }) => assert!(action.contains("thread"), "{action}"),
            Err(error) => panic!("{error}"),
        }
        assert!(storage.files() == files, "{threads} threads: refused and changed");
        refused += 1;
    }
    panic!("every one of {refused} attempts was refused");
}

#[test]
fn a_new_store_that_cannot_be_opened_is_not_created() {
    let storage = FaultyStorage::new();
    let opened = EventLog::<More>::builder(shards_config()).faulty_storage(&storage).threads_max(3).open();
    assert!(matches!(opened, Err(OpenError::Io { .. })), "{opened:?}");
    assert!(storage.files().is_empty(), "{:?}", storage.files().keys());
    open_more(&storage).unwrap();
}

mod panicking {
    use std::sync::atomic::{AtomicU8, Ordering};

    use corelane::event::Upcaster;
    use corelane::view::{Place, Position, View, ViewWriter};
    use corelane::{Aggregate, Emit, Event, EventType, EventTypeId, Key, Meta};
    use rkyv::{Archive, Deserialize, Serialize};

    pub(crate) const NOTHING: u8 = 0;
    pub(crate) const EVOLVE: u8 = 1;
    pub(crate) const UPCASTER: u8 = 2;
    pub(crate) const DEFAULT: u8 = 3;
    pub(crate) const UPGRADE: u8 = 4;
    pub(crate) const LOAD: u8 = 5;
    pub(crate) const WRITER: u8 = 6;
    pub(crate) const FACTORY: u8 = 7;

    /// The code that panics at present. All tests of the process share this variable, so they take turns (`TURN`).
    pub(crate) static PANICS: AtomicU8 = AtomicU8::new(NOTHING);
    pub(crate) static TURN: std::sync::Mutex<()> = std::sync::Mutex::new(());

    pub(crate) fn panic_if_chosen(what: u8) {
        assert_ne!(PANICS.load(Ordering::SeqCst), what, "a panic on purpose");
    }

    #[derive(Archive, Serialize, Deserialize, corelane::Bounded, Debug, Clone)]
    pub(crate) struct Added<const VERSION: u16> {
        pub(crate) n: u64,
    }

    impl<const VERSION: u16> Event for Added<VERSION> {
        const TYPES: &'static [EventType] = &[EventType::new(9, "added", VERSION)];
        const UPCASTERS: &'static [Upcaster<Self>] = if VERSION > 1 {
            &[Upcaster::new(9, 1, |bytes| {
                panic_if_chosen(UPCASTER);
                Ok(Self { n: <Added<1> as corelane::Stored>::decode(bytes)?.n })
            })]
        } else {
            &[]
        };
        fn event_type(&self) -> EventTypeId {
            EventTypeId(9)
        }
    }

    #[derive(Archive, Serialize, Deserialize, corelane::Bounded, Debug, Clone, PartialEq)]
    pub(crate) struct Sum<const VERSION: u16> {
        pub(crate) sum: u64,
    }

    impl<const VERSION: u16> Default for Sum<VERSION> {
        fn default() -> Self {
            panic_if_chosen(DEFAULT);
            Self { sum: 0 }
        }
    }

    impl<const VERSION: u16> Aggregate for Sum<VERSION> {
        type Event = Added<VERSION>;
        type Command = ();
        type Rejection = ();

        const STATE_VERSION: u16 = VERSION;

        fn evolve(&mut self, event: &ArchivedAdded<VERSION>, _: &Meta) {
            let n = event.n.to_native();
            if n == 30 {
                panic_if_chosen(EVOLVE);
            }
            self.sum += n;
        }

        fn decide(&self, (): (), _: &mut Emit<Added<VERSION>>) -> Result<(), ()> {
            Ok(())
        }

        fn upgrade(_: u16, archived: &[u8]) -> Option<Self> {
            panic_if_chosen(UPGRADE);
            <Sum<1> as corelane::Stored>::decode(archived).ok().map(|Sum { sum }| Self { sum })
        }
    }

    #[derive(Debug, Clone)]
    pub(crate) struct Shown;

    impl<const VERSION: u16> View<Sum<VERSION>> for Shown {
        fn writer(&self, _: &Place) -> Box<dyn ViewWriter<Sum<VERSION>>> {
            panic_if_chosen(WRITER);
            Box::new(Self)
        }
    }

    impl<const VERSION: u16> ViewWriter<Sum<VERSION>> for Shown {
        fn load(&mut self, _: Key, _: &Sum<VERSION>) {
            panic_if_chosen(LOAD);
        }
        fn changed(&mut self, _: Key, _: &Sum<VERSION>, _: &Meta) {}
        fn publish(&mut self, _: Position) {}
    }
}

/// The files of a closed store of events of the first version, with a checkpoint and events after it.
fn sums() -> Files {
    let storage = FaultyStorage::new();
    let engine = Engine::<panicking::Sum<1>>::builder(shards_config()).faulty_storage(&storage).open().unwrap();
    let mut producer = engine.producer();
    for n in 0..60 {
        producer.publish(Key(n % 7), panicking::Added { n }).unwrap();
        if n == 20 {
            engine.flush(soon()).unwrap();
            engine.checkpoint(soon()).unwrap();
        }
    }
    engine.shutdown(soon()).unwrap();
    drop((producer, engine));
    storage.files()
}

fn open_sums<const VERSION: u16>(storage: &FaultyStorage) -> Result<Engine<panicking::Sum<VERSION>>, OpenError> {
    let factory = |_| {
        panicking::panic_if_chosen(panicking::FACTORY);
        |_: &panicking::ArchivedAdded<VERSION>, _: &corelane::Meta| -> Result<(), corelane::HandlerError> { Ok(()) }
    };
    let builder = Engine::<panicking::Sum<VERSION>>::builder(shards_config()).faulty_storage(storage);
    builder.view(&panicking::Shown).handler("h", corelane::OnError::Halt, factory).open()
}

#[test]
fn application_code_that_panics_during_opening_is_an_error_and_leaves_the_store_unchanged() {
    use panicking::{DEFAULT, EVOLVE, FACTORY, LOAD, NOTHING, PANICS, UPCASTER, UPGRADE, WRITER};
    use std::sync::atomic::Ordering;
    let _turn = panicking::TURN.lock().unwrap();
    let files = sums();
    for (what, code) in [
        (EVOLVE, "evolve or an upcaster"),
        (UPCASTER, "evolve or an upcaster"),
        (DEFAULT, "program"),
        (UPGRADE, "upgrade"),
        (LOAD, "a view"),
        (WRITER, "a view"),
        (FACTORY, "the factory of a handler"),
    ] {
        let storage = FaultyStorage::with_files(files.clone());
        PANICS.store(what, Ordering::SeqCst);
        let opened = open_sums::<2>(&storage).map(drop);
        PANICS.store(NOTHING, Ordering::SeqCst);
        let Err(OpenError::Panicked(panic)) = opened else { panic!("{code}: {opened:?}") };
        assert!(what == DEFAULT || panic.code == code, "{panic}");
        assert!(panic.message.contains("a panic on purpose"), "{panic}");
        if what == EVOLVE {
            let event = panic.event.expect("the panic names its event");
            assert_eq!((event.key, event.event_type), (Key(30 % 7), EventTypeId(9)));
            assert_eq!(panic.shard, event.key.shard(SHARDS));
            assert!(panic.to_string().contains(&event.offset.to_string()), "{panic}");
        }
        assert!(storage.files() == files, "{code}: refused and changed");
        let engine = open_sums::<2>(&storage).unwrap();
        let sums = (0..7).map(|key| engine.state(Key(key)).wait().unwrap().unwrap().0.sum);
        assert_eq!(sums.sum::<u64>(), (0..60).sum::<u64>());
    }
}

#[test]
fn an_evolve_that_panics_while_history_is_read_is_an_error_that_names_the_event() {
    use panicking::{EVOLVE, NOTHING, PANICS};
    use std::sync::atomic::Ordering;
    let _turn = panicking::TURN.lock().unwrap();
    let storage = FaultyStorage::with_files(sums());
    let engine = open_sums::<1>(&storage).unwrap();
    let key = Key(30 % 7);
    PANICS.store(EVOLVE, Ordering::SeqCst);
    let asked = [
        engine.state_at(key, Version(6)).map(drop),
        engine.rebuild(key).map(drop),
        engine.compare().map(drop),
        engine.rebuild_all(|_, _, _| ()),
    ];
    PANICS.store(NOTHING, Ordering::SeqCst);
    for asked in asked {
        let Err(HistoryError::Panicked(panic)) = asked else { panic!("{asked:?}") };
        let event = panic.event.expect("the panic names its event");
        assert_eq!((event.key, panic.shard), (key, key.shard(SHARDS)));
        assert!(panic.message.contains("a panic on purpose"), "{panic}");
    }
    assert_eq!(engine.rebuild(key).unwrap().0, engine.state(key).wait().unwrap().unwrap().0);
}

/// The files that a process leaves when it is killed before it stores byte `stored` of the last segment's header. At 72
/// all fields are stored, at 80 also the word that commits them. After the header's page come records of the file's
/// earlier use.
fn killed_while_beginning(files: &Files, stored: usize, is_ended: bool) -> Files {
    let mut files = files.clone();
    let last = PathBuf::from("/s/shard-0000/000000000002.seg");
    let before = &files[Path::new("/s/shard-0000/000000000001.seg")];
    let mut end = PAGE;
    while u32_at(before, end) != 0 {
        end += (u32_at(before, end) as usize).next_multiple_of(16);
    }
    let mut header = before[..80].to_vec();
    header[28..32].copy_from_slice(&before[72..76]);
    header[32..40].copy_from_slice(&2_u64.to_le_bytes());
    header[48..56].copy_from_slice(&(SEGMENT + end as u64).to_le_bytes());
    header[56..64].copy_from_slice(&EVENTS.to_le_bytes());
    header[72..76].copy_from_slice(&0x0bad_cafe_u32.to_le_bytes());
    repair(&mut header, 0, 76, 76);
    // A prepared page holds only the salt and a checksum.
    let mut bytes = before.clone();
    bytes[..PAGE].fill(0);
    bytes[72..76].copy_from_slice(&0x0bad_cafe_u32.to_le_bytes());
    repair(&mut bytes, 0, 76, 76);
    bytes[..stored].copy_from_slice(&header[..stored]);
    if is_ended {
        bytes[PAGE..PAGE + 4].fill(0);
    }
    files.insert(last, bytes);
    let span = files.get_mut(Path::new("/s/shard-0000/span")).unwrap();
    span[20..28].copy_from_slice(&2_u64.to_le_bytes());
    repair_last(span);
    files
}

#[test]
fn a_process_killed_at_any_store_of_a_new_segments_header_leaves_a_store_that_opens() {
    let (files, events) = bank();
    for stored in (0..=72).chain([80]) {
        // The word after the page is zeroed first. A power cut may lose that write and keep the page.
        for is_ended in [true, false] {
            if stored == 80 && !is_ended {
                continue;
            }
            let files = killed_while_beginning(&files, stored, is_ended);
            let what = format!("{stored} bytes stored, ended {is_ended}");
            assert_eq!(open_and_look(&files, &events, &what, true), Opened::Right(0), "{what}");
        }
    }
}

#[test]
fn no_field_of_a_consumers_or_a_gates_position_makes_opening_panic_or_change_an_event() {
    let storage = FaultyStorage::new();
    let engine = open_on(&storage, shards_config()).unwrap();
    let mut gated = engine.gated("in", corelane::ingress::GatePolicy::default(), partition).unwrap();
    for n in (0..40).chain([50, 51, 60]) {
        drop(gated.offer(0, n, Key(n % 11), text(n)).unwrap());
    }
    gated.save(soon()).unwrap();
    drop(gated);
    let consumer = engine.consumer("a").start(|_: &crate::common::ArchivedNote, _: &corelane::Meta| Ok(())).unwrap();
    consumer.drain(soon()).unwrap();
    consumer.stop(soon()).unwrap();
    engine.shutdown(soon()).unwrap();
    drop(engine);
    let files = storage.files();
    let log = |storage: &FaultyStorage| {
        let segments = storage.files().into_iter().filter(|(path, _)| path.to_str().unwrap().contains("/s/shard-"));
        segments.collect::<Files>()
    };
    let position = [
        field("format", 8, 4),
        field("shards", 12, 2),
        field("position", 16, 8),
        field("read", 24, 8),
        field("effects from", 32, 8),
        field("position where it began", 40, 8),
        field("unfinished", 48, 4),
        field("store", 56, 8),
        field("seen", 64, 8),
        field("position of shard 1", 96, 8),
    ];
    let gate = [
        field("format", 8, 4),
        field("shards", 12, 2),
        field("partitions", 16, 8),
        field("store", 24, 8),
        field("counted", 32, 8),
        field("last", 40, 8),
        field("sequence", 48, 8),
        field("check", 56, 4),
        field("shard", 60, 2),
        field("version", 62, 2),
        field("counted of shard 1", 72, 8),
    ];
    let paths = [Path::new("/s/consumers/a/checkpoint"), Path::new("/s/gates/in/positions")];
    let (mut unaligned, mut opened) = (0, 0);
    for (path, fields) in paths.into_iter().zip([&position[..], &gate[..]]) {
        for Field { name, at, bytes } in fields {
            let mut now = [0; 8];
            now[..*bytes].copy_from_slice(&files[path][*at..at + bytes]);
            for value in values(u64::from_le_bytes(now), *bytes) {
                let what = format!("{name} of {}: {value:#x}", path.display());
                let files = with_field(&files, path, *at, *bytes, value, repair_last);
                let storage = FaultyStorage::with_files(files.clone());
                let before = log(&storage);
                let engine = catch_unwind(|| open_on(&storage, shards_config())).unwrap_or_else(|_| panic!("{what}"));
                match engine {
                    Ok(engine) => {
                        assert_eq!(engine.recovery().events(), 40, "{what}");
                        drop(engine.gated("in", corelane::ingress::GatePolicy::default(), partition));
                        opened += 1;
                    }
                    Err(error) => {
                        assert!(storage.files() == files, "{what}: refused ({error}) and changed");
                        unaligned += u64::from(value % 16 != 0 && name.starts_with("position"));
                    }
                }
                let after = log(&storage);
                assert!(before.keys().all(|path| after.contains_key(path)), "{what}");
            }
        }
    }
    assert!(unaligned >= 10 && opened > 20, "{unaligned} unaligned, {opened} opened");
}

#[test]
fn an_unused_page_of_an_earlier_build_before_old_records_counts_as_blank() {
    let (files, events) = bank();
    // In earlier builds such a page was zero, and its magic was stored last.
    for stored in 0..=80 {
        let mut files = killed_while_beginning(&files, stored, false);
        let bytes = files.get_mut(Path::new("/s/shard-0000/000000000002.seg")).unwrap();
        bytes[..8].fill(0);
        if stored < 80 {
            bytes[72..80].fill(0);
        }
        let what = format!("{stored} bytes stored");
        assert_eq!(open_and_look(&files, &events, &what, true), Opened::Right(0), "{what}");
    }
}

#[test]
fn a_zeroed_page_before_a_segments_own_records_is_damage_and_stays_unchanged() {
    let (files, events) = bank();
    for checkpoints in [true, false] {
        let mut files = files.clone();
        files.retain(|path, _| checkpoints || path.extension().is_none_or(|extension| extension != "snp"));
        files.get_mut(Path::new("/s/shard-0000/000000000001.seg")).unwrap()[..PAGE].fill(0);
        let opened = open_and_look(&files, &events, "the last header is zeroed", true);
        assert!(matches!(&opened, Opened::Refused(why) if why.contains("magic")), "{opened:?}");
    }
}

#[test]
fn damage_before_the_start_of_a_checkpoint_is_corruption_even_without_a_mark() {
    // Without a flush the log has no mark. The system has not restarted, so the checkpoint is trusted.
    let storage = FaultyStorage::new();
    let engine = open_bank(&storage, bank_config()).unwrap();
    let mut producer = engine.producer();
    let publish = |producer: &mut corelane::Producer<Money>, from: u64| {
        for n in from..from + 10 {
            producer.publish(Key(n % KEYS), Money::Deposited { cents: n }).unwrap().appended().wait().unwrap();
        }
    };
    publish(&mut producer, 0);
    engine.checkpoint(soon()).unwrap();
    publish(&mut producer, 10);
    let files = storage.files();
    let undamaged = FaultyStorage::with_files(files.clone());
    assert_eq!(open_bank(&undamaged, bank_config()).unwrap().recovery().events(), 20);
    // A byte of the first record, and its length, with which the log seems to end there.
    for at in [PAGE + 60, PAGE] {
        let mut damaged = files.clone();
        let byte = &mut damaged.get_mut(Path::new("/s/shard-0000/000000000000.seg")).unwrap()[at];
        *byte = if at == PAGE { 0 } else { *byte ^ 1 };
        let storage = FaultyStorage::with_files(damaged.clone());
        let opened = open_bank(&storage, bank_config()).map(drop);
        assert!(matches!(&opened, Err(OpenError::Corruption(at)) if at.offset.get() == PAGE as u64), "{opened:?}");
        assert!(storage.files() == damaged, "refused and changed");
    }
}
