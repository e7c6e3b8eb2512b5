//! Files of a copy of a store that went on differently, or of another store, in the place of a store's own: nothing is taken from
//! them that this log does not say.
#![expect(clippy::unwrap_used, reason = "a test may unwrap")]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use common::{ArchivedNote, Note, open_on, os_cache, read_shard, small, soon};
use corelane::consumer::GatePolicy;
use corelane::testing::FaultyStorage;
use corelane::{Accepted, EventLog, GateOpenError, GatedProducer, Key, OpenError};

type Files = BTreeMap<PathBuf, Vec<u8>>;

const DIR: &str = "/s";
const SHARDS: u16 = 2;
/// Of events that come from elsewhere.
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

/// A life of a store with a gate: these sequences, each in an event of this size, among this many events from elsewhere.
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
fn a_gates_positions_of_another_history_are_counted_anew() {
    let base = life(&Files::new(), 0..10, 40, 5);
    for (bytes, others) in [(40, 300), (41, 300), (200, 300), (200, 0), (1000, 40)] {
        let (ahead, behind) = (life(&base, 10..40, 40, 20), life(&base, 10..15, bytes, others));
        for (files, other, expected) in [(&behind, &ahead, 15), (&ahead, &behind, 40)] {
            let what = format!("{bytes} bytes, {others} others, {expected}");
            // Put there while the store is closed, and while it is open.
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
fn a_gates_positions_of_this_history_are_used() {
    let base = life(&Files::new(), 0..10, 40, 5);
    let mut files = life(&base, 10..40, 40, 20);
    files.insert(gate_file("positions"), base[&gate_file("positions")].clone());
    // What was counted is not looked at again, so the source is not asked about it.
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
fn a_gates_positions_of_another_store_are_counted_anew_and_its_record_is_refused() {
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
