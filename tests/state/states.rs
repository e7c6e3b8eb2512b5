//! States: live, saved, rebuilt and historical, all computed by the same `evolve`.

use crate::common::bank::{Account, Money};
use crate::common::{SEGMENT, small, soon};
use corelane::error::HistoryError;
use corelane::state::AsOf;
use corelane::testing::FaultyStorage;
use corelane::{Config, Deadline, Durability, Engine, Key, OpenError, Retention, Time, Version};

fn open(config: Config) -> Engine<Account> {
    Engine::<Account>::open(config).unwrap()
}

/// Deposits 1, 2, 3, … to each of `keys`, in turn.
fn deposit(engine: &Engine<Account>, keys: u64, from: u64, until: u64) {
    let mut producer = engine.producer();
    for cents in from..until {
        for key in 0..keys {
            producer.publish(Key(key), Money::Deposited { cents }).unwrap();
        }
    }
    producer.receipts().iter().for_each(|receipt| receipt.appended().wait().unwrap());
}

fn sum(version: u64) -> u64 {
    version * (version + 1) / 2
}

#[test]
fn a_state_of_any_version_takes_the_nearest_snapshot_and_fewer_than_snapshot_every_events() {
    let dir = tempfile::tempdir().unwrap();
    for reopened in [false, true] {
        let engine = open(small(dir.path()).snapshot_every(10));
        if !reopened {
            // At most six snapshots are in flight and there are eight chunks, so none is skipped.
            for from in (1..1001).step_by(20) {
                deposit(&engine, 3, from, from + 20);
                // The idle shard sends its pending snapshots.
                let deadline = soon().unwrap();
                while engine.snapshot_stats().count < (from + 19) / 10 * 3 {
                    assert!(std::time::Instant::now() < deadline, "{:?}", engine.snapshot_stats());
                    std::thread::yield_now();
                }
            }
        }
        let stats = engine.snapshot_stats();
        assert_eq!((stats.count, stats.unreadable, stats.skipped), (300, 0, 0));
        assert!(stats.bytes_average >= 48 && stats.bytes_average < 160, "{stats:?}");
        for version in (0..=1000).rev() {
            let past = engine.state_at(Key(1), Version(version)).unwrap();
            assert_eq!((past.state.cents, past.version), (sum(version), Version(version)));
            assert!(past.applied < 10, "{past:?}");
            if version % 10 == 0 {
                assert_eq!(past.applied, 0, "the snapshot itself");
            }
        }
        let beyond = engine.state_at(Key(1), Version(1001));
        assert!(matches!(beyond, Err(HistoryError::NotYet { newest: Version(1000), .. })), "{beyond:?}");
        assert!(matches!(engine.state_at(Key(9), Version(1)), Err(HistoryError::NotYet { newest: Version(0), .. })));
        engine.shutdown(soon()).unwrap();
    }
}

#[test]
fn a_state_of_any_time_has_the_events_up_to_then() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(small(dir.path()).snapshot_every(7));
    deposit(&engine, 2, 1, 200);
    let mut times = vec![0];
    let mut stream = engine.stream(Key(1), Version(1)).unwrap();
    while let Some(record) = stream.next().unwrap() {
        times.push(record.meta.time.get());
    }
    assert_eq!(times.len(), 200);
    for (version, &time) in times.iter().enumerate().skip(1) {
        // Several events may have one time.
        let version = times.partition_point(|&other| other <= time).max(version + 1) - 1;
        let past = engine.state_at(Key(1), Time(time)).unwrap();
        assert_eq!((past.version.get(), past.state.cents), (version as u64, sum(version as u64)));
    }
    assert_eq!(engine.state_at(Key(1), AsOf::Time(Time(0))).unwrap().version, Version(0));
    assert_eq!(engine.state_at(Key(1), Time(u64::MAX)).unwrap().version, Version(199));
    assert_eq!(engine.state_at(Key(77), Time(u64::MAX)).unwrap().state, Account::default());
}

#[test]
fn a_stream_returns_the_events_of_a_key_in_order_from_any_version() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(small(dir.path()).segment_bytes(1 << 20));
    deposit(&engine, 2, 1, 3001);
    for from in [0, 1, 2, 1000, 1023, 1024, 1025, 2048, 2999, 3000, 3001, 5000] {
        let mut stream = engine.stream(Key(1), Version(from)).unwrap();
        let mut version = from.max(1);
        while let Some(record) = stream.next().unwrap() {
            assert_eq!((record.meta.key, record.meta.version), (Key(1), Version(version)));
            version += 1;
        }
        assert_eq!(version, from.max(3001));
    }
    let counts = engine.counts().unwrap();
    assert_eq!((counts.events, counts.by_type[0].1, counts.by_type[1].1), (6000, 6000, 0));
    assert!(engine.stream(Key(5), Version(1)).unwrap().next().unwrap().is_none());
}

#[test]
fn events_between_two_times_come_in_time_order() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(small(dir.path()).shards(3));
    deposit(&engine, 9, 1, 101);
    let all = |from, until| {
        let mut between = engine.events_between(from, until);
        let mut times = Vec::new();
        while let Some(record) = between.next().unwrap() {
            times.push(record.meta.time);
        }
        times
    };
    let times = all(Time(0), Time(u64::MAX));
    assert_eq!(times.len(), 900);
    // Each batch reads the wall clock, so times may step back a little if a shard loses its core in between.
    let steps_back = times.windows(2).map(|pair| pair[0].get().saturating_sub(pair[1].get())).max().unwrap();
    assert!(steps_back < 100_000_000, "{steps_back} ns");
    let (from, until) = (times[200], times[700]);
    let mut expected: Vec<_> = times.iter().copied().filter(|time| (from..until).contains(time)).collect();
    let mut found = all(from, until);
    expected.sort_unstable();
    found.sort_unstable();
    assert_eq!(found, expected);
    assert!(all(times[700].max(times[200]), times[200].min(times[700])).is_empty());
}

#[test]
fn opening_from_the_newest_checkpoint_gives_the_same_states() {
    let dir = tempfile::tempdir().unwrap();
    let config = || small(dir.path()).shards(2).snapshot_every(50);
    let engine = open(config());
    deposit(&engine, 20, 1, 301);
    engine.checkpoint(soon()).unwrap();
    assert_eq!(engine.snapshot_stats().checkpoints, 2);
    deposit(&engine, 25, 301, 321);
    engine.shutdown(soon()).unwrap();
    drop(engine);
    let engine = open(config());
    assert_eq!(engine.recovery().events(), 20 * 300 + 25 * 20);
    for key in 0..20 {
        let (state, version) = engine.state(Key(key)).wait().unwrap().unwrap();
        assert_eq!((state.cents, version), (sum(320), Version(320)));
    }
    let comparison = engine.compare().unwrap();
    assert_eq!((comparison.keys, comparison.differing.len()), (25, 0));
    // The back-links continue across the checkpoint.
    assert_eq!(engine.rebuild(Key(3)).unwrap().0.cents, sum(320));
}

#[test]
fn retention_frees_only_events_whose_states_are_saved_and_history_reports_its_earliest_version() {
    let dir = tempfile::tempdir().unwrap();
    let config = || small(dir.path()).snapshot_every(10).retention(Retention::bytes(3 * SEGMENT));
    let mut until = 1;
    for _ in 0..3 {
        let engine = open(config());
        // One key gets no further events; the others fill the log.
        if until == 1 {
            deposit(&engine, 9, 1, 6);
            until = 6;
        }
        deposit(&engine, 8, until, until + 1500);
        until += 1500;
        engine.flush(soon()).unwrap();
        let deadline = soon().unwrap();
        while engine.shard_metrics()[0].segments > 4 {
            assert!(std::time::Instant::now() < deadline, "retention does not continue");
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        let newest = until - 1;
        assert_eq!(engine.state(Key(8)).wait().unwrap().unwrap().0.cents, sum(5), "a key whose events are all freed");
        assert_eq!(engine.state(Key(3)).wait().unwrap().unwrap().0.cents, sum(newest));
        let gone = engine.state_at(Key(3), Version(3));
        let Err(HistoryError::BeyondRetention { earliest, .. }) = gone else { panic!("{gone:?}") };
        for version in earliest.get()..=newest {
            match engine.state_at(Key(3), Version(version)) {
                Ok(past) => assert_eq!(past.state.cents, sum(version)),
                // Retention may free more in the meantime.
                Err(HistoryError::BeyondRetention { earliest, .. }) => assert!(earliest.get() > version),
                Err(error) => panic!("{error}"),
            }
        }
        assert_eq!(engine.rebuild(Key(3)).unwrap().0.cents, sum(newest));
        assert!(engine.compare().unwrap().differing.is_empty());
        engine.shutdown(soon()).unwrap();
    }
    // New events of the old key continue its version.
    let engine = open(config());
    deposit(&engine, 9, 6, 7);
    let (_, version) = engine.state(Key(8)).wait().unwrap().unwrap();
    assert_eq!(version, Version(6));
}

#[test]
fn a_store_that_lost_its_beginning_is_refused_without_its_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let config = || small(dir.path()).retention(Retention::bytes(2 * SEGMENT));
    let engine = open(config());
    deposit(&engine, 8, 1, 1000);
    engine.flush(soon()).unwrap();
    engine.shutdown(soon()).unwrap();
    drop(engine);
    let shard = dir.path().join("shard-0000");
    let mut removed = 0;
    for entry in std::fs::read_dir(&shard).unwrap() {
        let path = entry.unwrap().path();
        if path.file_name().unwrap().to_str().unwrap().starts_with("checkpoint-") {
            std::fs::remove_file(path).unwrap();
            removed += 1;
        }
    }
    assert!(removed > 0);
    let refused = Engine::<Account>::open(config());
    assert!(matches!(refused, Err(OpenError::StatesLost { .. })), "{refused:?}");
}

#[test]
fn damaged_snapshots_are_skipped_and_reported() {
    let dir = tempfile::tempdir().unwrap();
    let config = || small(dir.path()).snapshot_every(10);
    let engine = open(config());
    deposit(&engine, 1, 1, 301);
    engine.checkpoint(soon()).unwrap();
    engine.shutdown(soon()).unwrap();
    drop(engine);
    let shard = dir.path().join("shard-0000");
    for entry in std::fs::read_dir(&shard).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "snp") {
            let mut bytes = std::fs::read(&path).unwrap();
            let middle = bytes.len() / 2;
            bytes[middle] ^= 0x10;
            std::fs::write(&path, bytes).unwrap();
        }
    }
    let engine = open(config());
    assert_eq!(engine.state(Key(0)).wait().unwrap().unwrap().0.cents, sum(300));
    assert!(engine.snapshot_stats().unreadable > 0);
    for version in [5, 150, 155, 299, 300] {
        assert_eq!(engine.state_at(Key(0), Version(version)).unwrap().state.cents, sum(version));
    }
}

#[test]
fn snapshots_of_events_lost_in_a_power_cut_are_forgotten() {
    let storage = FaultyStorage::new();
    let config = || small("/s").durability(Durability::OsCache).snapshot_every(10);
    let engine = Engine::<Account>::builder(config()).faulty_storage(&storage).open().unwrap();
    deposit(&engine, 1, 1, 101);
    engine.flush(soon()).unwrap();
    deposit(&engine, 1, 101, 201);
    let deadline = soon().unwrap();
    while engine.snapshot_stats().count < 20 {
        assert!(std::time::Instant::now() < deadline);
        std::thread::yield_now();
    }
    for seed in 1..20 {
        // All snapshots may have reached the disk, but no unsynced part of the log.
        let mut files = storage.files();
        let cut = storage.after_crash(corelane::testing::Unsynced::Lost).files();
        files.retain(|path, _| path.extension().is_some_and(|extension| extension == "snp"));
        files.extend(cut.into_iter().filter(|(path, _)| path.extension().is_none_or(|extension| extension != "snp")));
        let disk = FaultyStorage::with_files(files);
        let engine = Engine::<Account>::builder(config()).faulty_storage(&disk).open().unwrap();
        assert_eq!(engine.state(Key(0)).wait().unwrap().unwrap().1, Version(100));
        // Other events take the offsets of the lost ones.
        let mut producer = engine.producer();
        for _ in 0..100 {
            producer.publish(Key(0), Money::Deposited { cents: seed }).unwrap();
        }
        producer.receipts()[0].appended().wait().unwrap();
        for version in 100..=200 {
            let past = engine.state_at(Key(0), Version(version)).unwrap();
            assert_eq!(past.state.cents, sum(100) + (version - 100) * seed, "version {version}");
        }
        engine.shutdown(soon()).unwrap();
    }
}

#[test]
fn no_segment_is_freed_while_no_checkpoint_can_be_written() {
    let storage = FaultyStorage::new();
    let config = || small("/s").snapshot_every(0).retention(Retention::bytes(2 * SEGMENT));
    let open = || Engine::<Account>::builder(config()).faulty_storage(&storage).open().unwrap();
    let engine = open();
    storage.refuse_side_files(true);
    deposit(&engine, 5, 1, 1501);
    engine.flush(soon()).unwrap();
    let deadline = soon().unwrap();
    while engine.snapshot_stats().checkpoints_failed == 0 {
        assert!(std::time::Instant::now() < deadline, "retention asked for no checkpoint");
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    let held = engine.shard_metrics()[0].clone();
    assert_eq!(held.segments_freed, 0, "events are freed whose states are not saved");
    assert!(held.segments > 6, "{} segments", held.segments);
    engine.shutdown(soon()).unwrap();
    drop(engine);
    storage.refuse_side_files(false);
    let engine = open();
    for key in 0..5 {
        assert_eq!(engine.state(Key(key)).wait().unwrap().unwrap().0.cents, sum(1500));
    }
}

#[test]
fn waiting_for_a_checkpoint_ends_when_the_shard_fails() {
    let storage = FaultyStorage::new();
    let engine = Engine::<Account>::builder(small("/s")).faulty_storage(&storage).open().unwrap();
    deposit(&engine, 3, 1, 101);
    engine.flush(soon()).unwrap();
    storage.fail_sync(1);
    deposit(&engine, 3, 101, 102);
    // There is no deadline, so a missed failure would hang here.
    let failed = engine.checkpoint(Deadline::NEVER);
    assert!(matches!(failed, Err(corelane::WaitError::ShardFailed(_))), "{failed:?}");
}

#[test]
fn all_states_are_rebuilt_without_changing_the_live_ones() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(small(dir.path()).shards(2));
    deposit(&engine, 40, 1, 31);
    let mut rebuilt = 0;
    engine
        .rebuild_all(|key, state, version| {
            assert!(key.get() < 40 && (state.cents, version) == (sum(30), Version(30)));
            rebuilt += 1;
        })
        .unwrap();
    assert_eq!(rebuilt, 40);
}

#[test]
fn a_refused_store_keeps_its_saved_states_unchanged() {
    let dir = tempfile::tempdir().unwrap();
    let config = || small(dir.path()).shards(2).snapshot_every(10);
    let engine = open(config());
    deposit(&engine, 20, 1, 101);
    engine.flush(soon()).unwrap();
    engine.shutdown(soon()).unwrap();
    drop(engine);
    // One shard's snapshots end within an entry, which the next opening repairs …
    let snapshots = std::fs::read_dir(dir.path().join("shard-0000")).unwrap().map(|entry| entry.unwrap().path());
    let torn = snapshots.filter(|path| path.extension().is_some_and(|extension| extension == "snp")).max().unwrap();
    let whole = std::fs::read(&torn).unwrap();
    std::fs::write(&torn, &whole[..whole.len() - 20]).unwrap();
    // … unless opening is refused because of the other shard.
    let log = dir.path().join("shard-0001/000000000000.seg");
    let sound = std::fs::read(&log).unwrap();
    let mut damaged = sound.clone();
    damaged[crate::common::PAGE + 60] ^= 1;
    std::fs::write(&log, &damaged).unwrap();
    let before = crate::common::tree(dir.path());
    let refused = Engine::<Account>::open(config());
    assert!(matches!(refused, Err(OpenError::Corruption(_))), "{refused:?}");
    assert!(crate::common::tree(dir.path()) == before, "the refused store was changed");
    std::fs::write(&log, &sound).unwrap();
    let engine = open(config());
    assert_eq!(engine.snapshot_stats().unreadable, 1);
    assert_eq!(engine.state_at(Key(3), Version(55)).unwrap().state.cents, sum(55));
    assert!(std::fs::metadata(&torn).unwrap().len() < whole.len() as u64 - 20, "the file is cut to its valid entries");
}
