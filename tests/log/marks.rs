//! A shard at rest writes one mark to its log: everything before it is synced.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::common::{Note, numbers, open_on, read_shard, settle, small, soon};
use corelane::testing::FaultyStorage;
use corelane::{Durability, EventLog, Key, OpenError};

const SEGMENT: &str = "/s/shard-0000/000000000000.seg";

/// The lengths and types of the records from `at` to the end.
fn records(bytes: &[u8], mut at: usize) -> Vec<(usize, u16)> {
    let mut found = Vec::new();
    loop {
        let len = u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
        if len == 0 {
            return found;
        }
        found.push((len, u16::from_le_bytes(bytes[at + 30..at + 32].try_into().unwrap())));
        at += len.next_multiple_of(16);
    }
}

fn last_event(engine: &EventLog<Note>) -> usize {
    read_shard(engine, 0).last().unwrap().offset as usize
}

/// Waits for the mark after the last event and returns the files.
fn at_rest(storage: &FaultyStorage, last: usize) -> std::collections::BTreeMap<std::path::PathBuf, Vec<u8>> {
    let deadline = soon().unwrap();
    loop {
        let files = storage.files();
        let found = records(&files[Path::new(SEGMENT)], last);
        if found.len() > 1 {
            assert_eq!(found[1..], [(48, 0)], "one mark");
            return files;
        }
        assert!(Instant::now() < deadline, "the idle shard writes no mark");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn damage_to_the_last_events_before_a_rest_is_corruption_after_a_kill() {
    for durability in [Durability::GroupCommit, Durability::Periodic(Duration::from_millis(5)), Durability::OsCache] {
        let storage = FaultyStorage::new();
        let config = || small("/s").durability(durability);
        let engine = open_on(&storage, config()).unwrap();
        let mut producer = engine.producer();
        for rest in 0..3 {
            for n in 0..5 {
                producer.publish(Key(n), Note::sized(5 * rest + n, 20)).unwrap();
            }
            if rest == 0 || durability == Durability::OsCache {
                engine.flush(soon()).unwrap();
            }
            let deadline = soon().unwrap();
            while numbers(&engine).len() as u64 != 5 * rest + 5 {
                assert!(Instant::now() < deadline);
            }
            let last = last_event(&engine);
            let mut files = at_rest(&storage, last);
            // The files as a kill leaves them, then damaged.
            files.get_mut(Path::new(SEGMENT)).unwrap()[last + 50] ^= 1;
            let error = open_on(&FaultyStorage::with_files(files), config()).expect_err("opened");
            assert!(matches!(&error, OpenError::Corruption(at) if at.offset.0 as usize == last), "{error}");
        }
        engine.shutdown(soon()).unwrap();
        drop((producer, engine));
        let engine = open_on(&storage, config()).unwrap();
        assert!(engine.recovery().shards[0].torn_tail.is_none());
        assert_eq!(numbers(&engine), (0..15).collect::<Vec<_>>());
    }
}

#[test]
fn a_shard_at_rest_writes_one_mark_and_syncs_nothing_for_it() {
    let storage = FaultyStorage::new();
    let engine = open_on(&storage, small("/s")).unwrap();
    let mut producer = engine.producer();
    for n in 0..5 {
        producer.publish(Key(n), Note::new(n)).unwrap().durable().wait().unwrap();
        let files = at_rest(&storage, last_event(&engine));
        // Waits until the keeper has synced the segment that it prepares.
        settle(&storage);
        let syncs = storage.syncs();
        std::thread::sleep(Duration::from_millis(30));
        assert!(storage.files() == files, "event {n}: the idle log does not grow");
        assert_eq!(storage.syncs(), syncs, "event {n}");
    }
    let before = storage.files()[Path::new(SEGMENT)].clone();
    engine.shutdown(soon()).unwrap();
    assert!(storage.files()[Path::new(SEGMENT)] == before, "the shutdown writes no further mark");
}
