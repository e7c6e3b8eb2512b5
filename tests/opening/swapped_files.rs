//! Files of another history of the store, or of another store, in place of a store's own: they are used only if they
//! contradict nothing in the log.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use crate::common::bank::{Account, Order};
use crate::common::{ArchivedNote, Note, SEGMENT, open_on, os_cache, read_shard, small, soon};
use corelane::error::GateOpenError;
use corelane::ingress::{Accepted, GatePolicy, GatedProducer};
use corelane::testing::FaultyStorage;
use corelane::{Config, Durability, Engine, EventLog, Key, OpenError, Retention};

type Files = BTreeMap<PathBuf, Vec<u8>>;

const DIR: &str = "/s";
const SHARDS: u16 = 2;
/// The header's length in a file of saved states.
const HEADER_BYTES: usize = 80;
/// The partition of events that do not come through the gate.
const NO_PARTITION: u64 = 9;

fn open(files: &Files) -> (FaultyStorage, EventLog<Note>) {
    let storage = FaultyStorage::with_files(files.clone());
    let engine = open_on(&storage, small(DIR).shards(SHARDS)).unwrap();
    (storage, engine)
}

fn gate(engine: &EventLog<Note>) -> Result<GatedProducer<Note>, GateOpenError> {
    let source = |note: &ArchivedNote| {
        let n = note.n.to_native();
        (n >> 32 != NO_PARTITION).then_some((n >> 32, n & 0xffff_ffff))
    };
    engine.gated("in", GatePolicy::default(), source)
}

fn offer(gate: &mut GatedProducer<Note>, sequences: impl Iterator<Item = u64>, bytes: usize) {
    for sequence in sequences {
        let accepted = gate.offer(0, sequence, Key(sequence % 5), Note::sized(sequence, bytes)).unwrap();
        assert!(matches!(accepted, Accepted::Published(_) | Accepted::Buffered), "{sequence}: {accepted:?}");
    }
}

/// Runs a store with a gate: offers these sequences in events of `bytes` bytes and publishes `others` other events.
/// Returns its files.
fn life(files: &Files, sequences: std::ops::Range<u64>, bytes: usize, others: u64) -> Files {
    let (storage, engine) = open(files);
    let mut gate = gate(&engine).unwrap();
    let mut producer = engine.producer();
    offer(&mut gate, sequences, bytes);
    for n in 0..others {
        drop(producer.publish(Key(n), Note::new(NO_PARTITION << 32 | n)).unwrap());
    }
    gate.close(soon()).unwrap();
    engine.shutdown(soon()).unwrap();
    drop(engine);
    storage.files()
}

fn gate_file(name: &str) -> PathBuf {
    Path::new(DIR).join("gates/in").join(name)
}

fn with(files: &Files, other: &Files, names: &[PathBuf]) -> Files {
    let mut files = files.clone();
    for name in names {
        files.insert(name.clone(), other[name].clone());
    }
    files
}

/// The sequences of the gate's partition that the log holds.
fn held(engine: &EventLog<Note>) -> Vec<u64> {
    engine.flush(soon()).unwrap();
    let all = (0..SHARDS).flat_map(|shard| read_shard(engine, shard));
    let mut sequences: Vec<u64> = all.map(|held| held.n).filter(|n| n >> 32 != NO_PARTITION).collect();
    sequences.sort_unstable();
    sequences
}

#[test]
fn gate_positions_of_another_history_are_rebuilt_from_the_log() {
    let base = life(&Files::new(), 0..10, 40, 5);
    for (bytes, others) in [(40, 300), (41, 300), (200, 300), (200, 0), (1000, 40)] {
        let (ahead, behind) = (life(&base, 10..40, 40, 20), life(&base, 10..15, bytes, others));
        for (files, other, expected) in [(&behind, &ahead, 15), (&ahead, &behind, 40)] {
            let what = format!("{bytes} bytes, {others} others, {expected}");
            // Replaces the file while the store is closed, and while it is open.
            let mixed = with(files, other, &[gate_file("positions")]);
            let (_, closed) = open(&mixed);
            let dir = tempfile::tempdir().unwrap();
            for (path, content) in files {
                let target = dir.path().join(path.strip_prefix(DIR).unwrap());
                std::fs::create_dir_all(target.parent().unwrap()).unwrap();
                std::fs::write(target, content).unwrap();
            }
            let running = EventLog::open(os_cache(dir.path()).shards(SHARDS)).unwrap();
            std::fs::write(dir.path().join("gates/in/positions"), &other[&gate_file("positions")]).unwrap();
            for engine in [&closed, &running] {
                let mut gate = gate(engine).unwrap();
                assert_eq!(gate.expected(0), Some(expected), "{what}");
                offer(&mut gate, expected..60, 40);
                assert_eq!(held(engine), Vec::from_iter(0..60), "{what}");
                gate.close(soon()).unwrap();
            }
        }
    }
}

#[test]
fn gate_positions_of_this_history_are_used() {
    let base = life(&Files::new(), 0..10, 40, 5);
    let mut files = life(&base, 10..40, 40, 20);
    files.insert(gate_file("positions"), base[&gate_file("positions")].clone());
    // The gate reads no counted event again, so it does not call the source for it.
    let (_, engine) = open(&files);
    let asked = std::sync::Mutex::new(BTreeSet::new());
    let source = |note: &ArchivedNote| {
        let n = note.n.to_native();
        asked.lock().unwrap().insert(n);
        (n >> 32 != NO_PARTITION).then_some((n >> 32, n & 0xffff_ffff))
    };
    let gate = engine.gated("in", GatePolicy::default(), source).unwrap();
    assert_eq!(gate.expected(0), Some(40));
    let asked = asked.into_inner().unwrap();
    assert!((10..40).all(|n| asked.contains(&n)) && (0..10).all(|n| !asked.contains(&n)), "{asked:?}");
}

#[test]
fn gate_positions_of_another_store_are_rebuilt_and_its_gap_records_are_refused() {
    let (own, other) = (life(&Files::new(), 0..10, 40, 5), life(&Files::new(), 0..30, 40, 0));
    let (_, engine) = open(&with(&own, &other, &[gate_file("positions")]));
    let mut gated = gate(&engine).unwrap();
    assert_eq!(gated.expected(0), Some(10));
    offer(&mut gated, 10..20, 40);
    assert_eq!(held(&engine), Vec::from_iter(0..20));
    for names in [&["gaps"][..], &["witness"], &["gaps", "witness"], &["gaps", "witness", "positions"]] {
        let names: Vec<PathBuf> = names.iter().map(|name| gate_file(name)).collect();
        let (storage, engine) = open(&with(&own, &other, &names));
        let before = storage.files();
        let refused = gate(&engine);
        let Err(GateOpenError::File(OpenError::ForeignFile { path, .. })) = refused else { panic!("{refused:?}") };
        assert!(names.contains(&path), "{}", path.display());
        assert!(matches!(engine.gaps("in"), Err(GateOpenError::File(OpenError::ForeignFile { .. }))));
        for name in &names {
            assert_eq!(storage.files().get(name), before.get(name), "{}", name.display());
        }
    }
}

/// Runs a store with states: deposits, and a checkpoint at the end. Keys and event sizes are always the same. Returns
/// its files and states.
fn bank(files: &Files, config: &Config, cents: u64, events: u64) -> (Files, Vec<Account>) {
    let storage = FaultyStorage::with_files(files.clone());
    let engine = Engine::<Account>::builder(config.clone()).faulty_storage(&storage).open().unwrap();
    let mut client = engine.client();
    for n in 0..events {
        client.send(Key(n % KEYS), Order::Deposit(cents + n)).wait().unwrap();
    }
    engine.checkpoint(soon()).unwrap();
    let states = (0..KEYS).map(|key| engine.state(Key(key)).wait().unwrap().unwrap().0).collect();
    engine.shutdown(soon()).unwrap();
    drop(engine);
    (storage.files(), states)
}

const KEYS: u64 = 4;

fn bank_config(keeps: Option<u64>) -> Config {
    let retention = keeps.map_or_else(Retention::default, |segments| Retention::bytes(segments * SEGMENT));
    small(DIR).snapshot_every(6).retention(retention)
}

fn saved(files: &Files, kind: &str) -> Vec<PathBuf> {
    let is_saved = |path: &&PathBuf| path.file_name().unwrap().to_string_lossy().starts_with(kind);
    files.keys().filter(is_saved).filter(|path| path.extension().is_some_and(|end| end == "snp")).cloned().collect()
}

/// Opens the store and checks its states, also against the log. Returns the number of unusable files, or `None` if the
/// store is refused.
fn check_states(files: Files, config: &Config, states: &[Account], what: &str) -> Option<u64> {
    let storage = FaultyStorage::with_files(files);
    let engine = match Engine::<Account>::builder(config.clone()).faulty_storage(&storage).open() {
        Ok(engine) => engine,
        Err(OpenError::StatesLost { .. }) => return None,
        Err(error) => panic!("{what}: {error}"),
    };
    for (key, state) in (0..).map(Key).zip(states) {
        let (held, version) = engine.state(key).wait().unwrap().unwrap();
        assert_eq!(&held, state, "{what}: {key:?}");
        assert_eq!(&engine.state_at(key, version).unwrap().state, state, "{what}: {key:?}");
    }
    assert!(engine.compare().unwrap().differing.is_empty(), "{what}");
    let unreadable = engine.snapshot_stats().unreadable;
    engine.shutdown(soon()).unwrap();
    Some(unreadable)
}

#[test]
fn a_checkpoint_of_another_history_is_not_used() {
    for (keeps, events) in [(None, 30), (None, 1200), (Some(2), 3000)] {
        let config = bank_config(keeps);
        let (base, _) = bank(&Files::new(), &config, 1000, events);
        let (one, states) = bank(&base, &config, 5000, events);
        let (two, _) = bank(&base, &config, 7000, events);
        let own = check_states(one.clone(), &config, &states, "its own").expect("the store opens");
        assert_eq!(own, 0);
        let newest = saved(&one, "checkpoint").pop().unwrap();
        assert_eq!(Some(&newest), saved(&two, "checkpoint").last());
        // In place of the store's own checkpoint, and as the only one.
        let what = format!("{keeps:?}, {events} events");
        let mixed = with(&one, &two, std::slice::from_ref(&newest));
        let unreadable = check_states(mixed.clone(), &config, &states, &what);
        assert!(unreadable.is_none_or(|unreadable| unreadable > 0), "{what}: {unreadable:?}");
        let mut alone = mixed.clone();
        alone.retain(|path, _| !saved(&one, "checkpoint").contains(path) || *path == newest);
        let unreadable = check_states(alone, &config, &states, &what);
        assert_eq!(unreadable.is_none(), keeps.is_some(), "{what}: refused if the beginning of the log is freed");
        // With a foreign newest checkpoint, the older one is used.
        let mut both = one.clone();
        both.insert(newest.with_file_name("checkpoint-000000090.snp"), two[&newest].clone());
        assert_eq!(check_states(both, &config, &states, &what), Some(1));
    }
}

#[test]
fn a_checkpoint_that_spans_the_split_of_two_histories_is_not_used() {
    // Without marks, the events of both histories have the same offsets.
    let config = bank_config(None).durability(Durability::OsCache);
    let (base, _) = bank(&Files::new(), &config, 1000, 30);
    let (one, states) = bank(&base, &config, 5000, 30);
    let (two, others) = bank(&base, &config, 7000, 60);
    let (begun, ended) = (saved(&base, "checkpoint").pop().unwrap(), saved(&two, "checkpoint").pop().unwrap());
    // A checkpoint begun where the histories split, whose states were saved while events came.
    let spliced = |files: &Files| [&files[&begun][..HEADER_BYTES], &files[&ended][HEADER_BYTES..]].concat();
    for (files, states, from) in [(&one, &states, &one), (&two, &others, &two)] {
        let mut files = files.clone();
        files.insert(ended.clone(), spliced(from));
        assert_eq!(check_states(files, &config, states, "of this history"), Some(0));
    }
    // In the longer log, whose length fits the checkpoint.
    let mut mixed = two.clone();
    mixed.insert(ended.clone(), spliced(&one));
    assert_eq!(check_states(mixed, &config, &others, "of another history"), Some(1));
}

#[test]
fn saved_states_of_another_store_are_not_used() {
    let config = bank_config(None);
    let (one, states) = bank(&Files::new(), &config, 5000, 60);
    let (two, _) = bank(&Files::new(), &config, 7000, 60);
    for kind in ["checkpoint", "snapshots"] {
        let names = saved(&two, kind);
        assert!(!names.is_empty());
        let mixed = with(&one, &two, &names);
        assert_eq!(check_states(mixed.clone(), &config, &states, kind), Some(names.len() as u64), "{kind}");
        let storage = FaultyStorage::with_files(mixed);
        drop(Engine::<Account>::builder(config.clone()).faulty_storage(&storage).open().unwrap());
        assert!(names.iter().all(|name| storage.files()[name] == two[name]), "{kind}: the files stay unchanged");
    }
}
