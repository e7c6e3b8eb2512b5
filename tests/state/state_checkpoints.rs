//! Kills and power cuts: checkpoints written while events are appended, and commands cut in the middle.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::common::bank::{Account, Money, Order};
use crate::common::{os_cache, small, soon};
use corelane::testing::{FaultyStorage, Unsynced};
use corelane::{Config, Durability, Engine, Key, Version};

fn open(storage: &FaultyStorage, config: Config) -> Engine<Account> {
    Engine::<Account>::builder(config).faulty_storage(storage).open().unwrap()
}

/// The active segment, and the end of its records.
fn last_segment(files: &BTreeMap<PathBuf, Vec<u8>>, end: u64) -> (PathBuf, usize) {
    let path = PathBuf::from(format!("/s/shard-0000/{:012}.seg", end / crate::common::SEGMENT));
    assert!(files.contains_key(&path), "{path:?}");
    (path, (end % crate::common::SEGMENT) as usize)
}

const KEYS: u64 = 8_000;

#[test]
fn a_checkpoint_written_while_events_are_appended_gives_the_right_states() {
    for round in 0..3_u64 {
        let storage = FaultyStorage::new();
        let durability = if round == 2 { Durability::GroupCommit } else { Durability::OsCache };
        let config = || small("/s").durability(durability).snapshot_every(50).keys_expected(KEYS as usize);
        let engine = open(&storage, config());
        let mut producer = engine.producer();
        let mut batch: Vec<_> = (0..KEYS).map(|key| (Key(key), Money::Deposited { cents: key })).collect();
        producer.publish_batch(&mut batch).unwrap();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for n in 1.. {
                    if stop.load(Ordering::SeqCst) {
                        break;
                    }
                    // Some keys change often, so that most states change while the checkpoint is written.
                    let key = if n % 2 == 0 { n % 50 } else { n * 7919 % (KEYS + 500) };
                    producer.publish(Key(key), Money::Deposited { cents: n }).unwrap();
                }
                producer.receipts().iter().for_each(|receipt| receipt.appended().wait().unwrap());
            });
            for _ in 0..2 {
                engine.checkpoint(soon()).unwrap();
            }
            stop.store(true, Ordering::SeqCst);
        });
        let live: Vec<_> = (0..KEYS + 500).map(|key| engine.state(Key(key)).wait().unwrap()).collect();
        if durability == Durability::OsCache {
            cut_everywhere(&storage.files(), config);
        }
        let killed = FaultyStorage::with_files(storage.files());
        let mut disks = vec![killed.clone()];
        if durability == Durability::OsCache {
            // All of it had reached the disk when the machine went down, which opening cannot know.
            killed.crash(Unsynced::Lost);
            disks.push(killed);
        }
        for disk in disks {
            let again = open(&disk, config());
            for (key, live) in (0..).zip(&live) {
                assert_eq!(&again.state(Key(key)).wait().unwrap(), live, "key {key}");
            }
            assert!(again.compare().unwrap().differing.is_empty());
            again.shutdown(soon()).unwrap();
        }
    }
}

/// Cuts the log before the end of the checkpoint and checks that the states come from the log, not from the checkpoint.
fn cut_everywhere(files: &BTreeMap<PathBuf, Vec<u8>>, config: impl Fn() -> Config) {
    let segments: Vec<_> = files.keys().filter(|path| path.extension().is_some_and(|end| end == "seg")).collect();
    for path in segments.iter().skip(1).step_by(segments.len() / 16 + 1) {
        let mut cut = files.clone();
        cut.get_mut(*path).unwrap()[30_000..].fill(0);
        let disk = FaultyStorage::with_files(cut);
        disk.crash(Unsynced::Lost);
        let again = open(&disk, config());
        assert!(again.compare().unwrap().differing.is_empty(), "cut in {}", path.display());
    }
}

#[test]
fn a_checkpoint_beyond_the_end_of_the_log_is_not_used() {
    let storage = FaultyStorage::new();
    let engine = open(&storage, os_cache("/s").snapshot_every(3));
    let mut client = engine.client();
    let mut states = vec![Account::default()];
    for n in 1..=60 {
        client.send(Key(1), Order::Deposit(n)).wait().unwrap();
        states.push(engine.state(Key(1)).wait().unwrap().unwrap().0);
        if n % 20 == 0 {
            engine.checkpoint(soon()).unwrap();
        }
    }
    let files = storage.files();
    let (path, end) = last_segment(&files, engine.shard_metrics()[0].appended_to.get());
    let mut seen = 0;
    for from in (4096..end).step_by(16 * 5).chain([end]) {
        let mut cut = files.clone();
        cut.get_mut(&path).unwrap()[from..].fill(0);
        let disk = FaultyStorage::with_files(cut);
        // The machine restarts, so unsynced bytes may be lost.
        disk.crash(Unsynced::Lost);
        let again = open(&disk, os_cache("/s").snapshot_every(3));
        let version = again.state(Key(1)).wait().unwrap().map_or(0, |(_, version)| version.get());
        assert!(version >= seen, "a longer log has an earlier version: {version} after {seen}");
        assert!((from - 4096) / 64 >= version as usize, "{version} events in {} bytes", from - 4096);
        seen = version;
        for version in 0..=version {
            let past = again.state_at(Key(1), Version(version)).unwrap();
            assert_eq!(past.state, states[version as usize], "cut at {from}, version {version}");
        }
        assert!(again.compare().unwrap().differing.is_empty());
        // Other events take the offsets of the lost ones.
        again.client().send(Key(1), Order::Deposit(7000)).wait().unwrap();
        let newest = again.state_at(Key(1), Version(version + 1)).unwrap();
        assert_eq!(newest.state.cents, states[version as usize].cents + 7000);
    }
    assert_eq!(seen, 60);
}

#[test]
fn a_torn_command_is_kept_whole_with_its_outcome_or_not_at_all() {
    let storage = FaultyStorage::new();
    let engine = open(&storage, os_cache("/s").snapshot_every(1));
    let mut client = engine.client();
    client.send(Key(1), Order::Deposit(100)).wait().unwrap();
    let begin = engine.shard_metrics()[0].appended_to.get() as usize;
    client.send(Key(1), Order::Notes { count: 3, bytes: 100 }).once(5).wait().unwrap();
    let done = engine.state(Key(1)).wait().unwrap().unwrap();
    assert_eq!(done.1, Version(4));
    let files = storage.files();
    let (path, end) = last_segment(&files, engine.shard_metrics()[0].appended_to.get());
    for from in (begin..=end).step_by(8) {
        let mut cut = files.clone();
        cut.get_mut(&path).unwrap()[from..].fill(0);
        let again = open(&FaultyStorage::with_files(cut), os_cache("/s").snapshot_every(1));
        let (state, version) = again.state(Key(1)).wait().unwrap().unwrap();
        let is_whole = from >= end;
        assert_eq!(version, if is_whole { Version(4) } else { Version(1) }, "cut at {from} of {begin}..{end}");
        let mut reader = again.reader(corelane::ShardId(0));
        let mut read = 0;
        while reader.next().unwrap().is_some() {
            read += 1;
        }
        assert_eq!(read, version.get(), "a reader returns the events of the state");
        assert_eq!((state.cents, state.notes), (100, version.get() - 1));
        let outcome = again.client().send(Key(1), Order::Notes { count: 3, bytes: 100 }).once(5).wait().unwrap();
        assert_eq!((outcome.version, outcome.repeated), (Version(4), is_whole), "cut at {from}");
        assert_eq!(again.state(Key(1)).wait().unwrap().unwrap().0.notes, 3);
        assert_eq!(again.state_at(Key(1), Version(4)).unwrap().state.notes, 3);
    }
}
