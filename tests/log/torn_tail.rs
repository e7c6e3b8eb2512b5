//! A torn tail is cut at the last valid record; the cut bytes are quarantined and reported.

use crate::common::{Note, PAGE, SEGMENT, env_number, numbers, open_on, os_cache, read_shard, small, soon};
use corelane::testing::{FaultyStorage, Unsynced};
use corelane::{Durability, EventLog, Key};
use std::path::Path;

const EVENTS: u64 = 8;

/// The files of a store with eight events that were never synced, the positions of its last three records, and its end.
fn torn_store() -> (std::collections::BTreeMap<std::path::PathBuf, Vec<u8>>, [usize; 3], usize) {
    let storage = FaultyStorage::new();
    let engine = open_on(&storage, os_cache("/s")).unwrap();
    let mut producer = engine.producer();
    for n in 0..EVENTS {
        producer.publish(Key(n % 3), Note::sized(n, 20 + n as usize)).unwrap().appended().wait().unwrap();
    }
    let offsets: Vec<usize> = read_shard(&engine, 0).iter().map(|held| held.offset as usize).collect();
    let mut reader = engine.reader(corelane::ShardId(0));
    while reader.next().unwrap().is_some() {}
    let end = reader.offset().0 as usize;
    (storage.files(), [offsets[5], offsets[6], offsets[7]], end)
}

fn check(
    how: &str,
    at: usize,
    bytes: &[u8],
    files: &std::collections::BTreeMap<std::path::PathBuf, Vec<u8>>,
    last: [usize; 3],
    end: usize,
) {
    let segment = Path::new("/s/shard-0000/000000000000.seg");
    let mut files = files.clone();
    let before = files[segment].clone();
    files.insert(segment.to_owned(), bytes.to_vec());
    let disk = FaultyStorage::with_files(files);
    let whole = 5 + last.iter().filter(|&&offset| offset <= at).count() as u64 - 1;
    let changed = before != bytes;
    let engine = open_on(&disk, os_cache("/s")).unwrap_or_else(|error| panic!("{how} at {at}: {error}"));
    let found = numbers(&engine);
    // A record survives if the bytes from `at` on happen to be unchanged.
    let expected: Vec<u64> = (0..if changed { whole.max(found.len() as u64).min(EVENTS) } else { EVENTS }).collect();
    assert_eq!(found, expected, "{how} at {at}");
    let cut = last.iter().copied().chain([end]).nth(found.len() - 5).unwrap();
    assert_eq!(bytes[..cut], before[..cut], "{how} at {at}: only unchanged bytes are kept");
    match &engine.recovery().shards[0].torn_tail {
        Some(tail) => {
            assert_eq!(tail.offset.0 as usize, cut, "{how} at {at}");
            let kept = &disk.files()[&tail.quarantined];
            assert_eq!(kept.len() as u64, tail.bytes);
            assert_eq!(kept[..], bytes[cut..cut + kept.len()], "{how} at {at}: the quarantined bytes");
            assert!(
                bytes[cut + kept.len()..].iter().all(|&byte| byte == 0),
                "{how} at {at}: only zeros follow the cut"
            );
        }
        None => assert!(bytes[cut..].iter().all(|&byte| byte == 0) || !changed, "{how} at {at}: cut without a report"),
    }
    let mut producer = engine.producer();
    producer.publish(Key(1), Note::new(100)).unwrap();
    engine.flush(soon()).unwrap();
    drop((producer, engine));
    let engine = open_on(&disk, os_cache("/s")).unwrap();
    assert!(engine.recovery().shards[0].torn_tail.is_none(), "{how} at {at}: opens clean the second time");
    assert_eq!(numbers(&engine), [expected, vec![100]].concat(), "{how} at {at}");
}

#[test]
fn a_torn_tail_is_cut_at_the_last_valid_record() {
    let (files, last, end) = torn_store();
    let content = files[Path::new("/s/shard-0000/000000000000.seg")].clone();
    // `CORELANE_TORN_ALL=1` tears in each way at every byte. By default the ways take turns.
    let all = env_number("CORELANE_TORN_ALL", 0) == 1;
    for at in last[0]..end {
        let ways = if all { 0..3 } else { at % 3..at % 3 + 1 };
        let mut zeroed = content.clone();
        zeroed[at..].fill(0);
        let mut garbled = content.clone();
        for (i, byte) in garbled[at..end].iter_mut().enumerate() {
            *byte = !*byte ^ (i as u8).wrapping_mul(31);
        }
        let mut flipped = content.clone();
        flipped[at] ^= 0x10;
        for (how, bytes) in [("zeroed", &zeroed), ("garbled", &garbled), ("one byte", &flipped)][ways].iter() {
            check(how, at, bytes, &files, last, end);
        }
    }
}

#[test]
fn a_torn_tail_in_real_files_is_cut_at_the_last_valid_record() {
    let dir = tempfile::tempdir().unwrap();
    let engine = EventLog::<Note>::open(os_cache(dir.path().join("a"))).unwrap();
    let mut producer = engine.producer();
    for n in 0..EVENTS {
        producer.publish(Key(n % 3), Note::sized(n, 20)).unwrap().appended().wait().unwrap();
    }
    let last = read_shard(&engine, 0)[7].offset as usize;
    // A copy made while the engine runs has the state that a kill leaves.
    let torn = dir.path().join("b");
    crate::common::copy(&dir.path().join("a"), &torn);
    let segment = crate::common::segment_path(&torn, 0);
    let mut bytes = std::fs::read(&segment).unwrap();
    bytes[last + 50] ^= 1;
    std::fs::write(&segment, &bytes).unwrap();
    let engine = EventLog::<Note>::open(os_cache(&torn)).unwrap();
    assert_eq!(numbers(&engine), (0..7).collect::<Vec<_>>());
    let tail = engine.recovery().shards[0].torn_tail.clone().unwrap();
    assert_eq!(tail.offset.0 as usize, last);
    let kept = std::fs::read(&tail.quarantined).unwrap();
    assert_eq!(kept[..], bytes[last..last + kept.len()]);
}

#[test]
fn a_power_cut_that_tears_several_segments_loses_no_durable_event() {
    // Headers of later segments may reach the disk before the earlier tail.
    for seed in 1..=env_number("CORELANE_POWER_CUTS", 60) {
        let storage = FaultyStorage::new();
        let engine = open_on(&storage, os_cache("/s")).unwrap();
        let mut producer = engine.producer();
        let durable = 20 + seed % 30;
        for n in 0..durable {
            producer.publish(Key(n % 3), Note::sized(n, 3000)).unwrap();
        }
        engine.flush(soon()).unwrap();
        // A mark needs a later batch.
        for n in durable..durable + 60 {
            producer.publish(Key(n % 3), Note::sized(n, 3000)).unwrap().appended().wait().unwrap();
        }
        let disk = storage.after_crash(Unsynced::Random(seed * 7919));
        let engine = open_on(&disk, os_cache("/s")).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        let found = numbers(&engine);
        assert_eq!(found, (0..found.len() as u64).collect::<Vec<_>>(), "seed {seed}: a prefix");
        assert!(found.len() as u64 >= durable, "seed {seed}: {} of {durable} durable events", found.len());
        let mut producer = engine.producer();
        for n in found.len() as u64..found.len() as u64 + 60 {
            producer.publish(Key(n % 3), Note::sized(n, 3000)).unwrap();
        }
        engine.shutdown(soon()).unwrap();
        drop(engine);
        let engine = open_on(&disk, os_cache("/s")).unwrap();
        assert!(engine.recovery().shards[0].torn_tail.is_none(), "seed {seed}");
        assert_eq!(numbers(&engine), (0..found.len() as u64 + 60).collect::<Vec<_>>(), "seed {seed}");
    }
}

#[test]
fn a_power_cut_before_the_first_sync_loses_only_events_that_were_not_durable() {
    let storage = FaultyStorage::new();
    let engine = open_on(&storage, os_cache("/s")).unwrap();
    let mut producer = engine.producer();
    for n in 0..30 {
        producer.publish(Key(1), Note::sized(n, 3000)).unwrap().appended().wait().unwrap();
    }
    let disk = storage.after_crash(Unsynced::Lost);
    for round in 0..3_u64 {
        let engine = open_on(&disk, small("/s").durability(Durability::GroupCommit)).unwrap();
        assert_eq!(numbers(&engine), (0..round * 60).collect::<Vec<_>>(), "round {round}");
        let mut producer = engine.producer();
        for n in round * 60..(round + 1) * 60 {
            producer.publish(Key(1), Note::sized(n, 3000)).unwrap();
        }
        engine.shutdown(soon()).unwrap();
    }
    assert!(
        disk.files().keys().filter(|path| path.extension().is_some_and(|extension| extension == "seg")).count() >= 8
    );
    assert_eq!(PAGE as u64 * 16, SEGMENT);
}

#[test]
fn a_recycled_segment_never_replays_its_old_records() {
    // Records of one size, so that old ones lie exactly where the next new one would begin.
    let retention = corelane::Retention::bytes(2 * SEGMENT);
    let config = || small("/s").retention(retention).spares_max(4);
    let storage = FaultyStorage::new();
    let engine = open_on(&storage, config()).unwrap();
    let mut producer = engine.producer();
    let mut published = 0;
    for round in 0..env_number("CORELANE_RECYCLED_ROUNDS", 40) {
        for _ in 0..37 {
            producer.publish(Key(1), Note::sized(published, 1000)).unwrap();
            published += 1;
        }
        engine.flush(soon()).unwrap();
        let disk = storage.after_crash(Unsynced::Lost);
        let after = open_on(&disk, config()).unwrap_or_else(|error| panic!("round {round}: {error}"));
        let found = numbers(&after);
        let first = found.first().copied().unwrap_or(published);
        assert_eq!(
            found,
            (first..published).collect::<Vec<_>>(),
            "round {round}: old records came back, or new ones are missing"
        );
    }
    assert!(engine.shard_metrics()[0].segments_freed > 10, "segments were recycled");
}

#[test]
fn a_crash_at_any_point_of_preparing_a_segment_is_no_corruption() {
    let retention = corelane::Retention::bytes(2 * SEGMENT);
    for n in 1..=env_number("CORELANE_PREPARING_CRASHES", 60) {
        let storage = FaultyStorage::new();
        let engine = open_on(&storage, os_cache("/s").retention(retention).spares_max(1)).unwrap();
        let mut producer = engine.producer();
        // Enough events that the first segments are freed and reused.
        for i in 0..60 {
            producer.publish(Key(1), Note::sized(i, 3000)).unwrap().appended().wait().unwrap();
        }
        // In half of the runs a sync fails, in the other half another operation.
        if n % 2 == 0 {
            storage.fail_operation(n / 2 + 1)
        } else {
            storage.fail_sync(n / 2 + 1)
        }
        for i in 60..200 {
            let Ok(receipt) = producer.publish(Key(1), Note::sized(i, 3000)) else { break };
            if receipt.appended().wait().is_err() {
                break;
            }
        }
        drop((producer, engine));
        let cut = storage.after_crash(Unsynced::Random(n * 7919));
        let killed = FaultyStorage::with_files(storage.files());
        for (how, disk) in [("killed", killed), ("power cut", cut)] {
            let engine = open_on(&disk, os_cache("/s")).unwrap_or_else(|error| panic!("{how}, {n}: {error}"));
            let mut producer = engine.producer();
            let found = numbers(&engine).len();
            for i in 0..60 {
                producer.publish(Key(1), Note::sized(i, 3000)).unwrap();
            }
            engine.shutdown(soon()).unwrap();
            assert_eq!(numbers(&engine).len(), found + 60, "{how}, {n}");
        }
    }
}

#[test]
fn a_tail_torn_again_at_the_same_place_does_not_replace_the_first_quarantine() {
    let segment = Path::new("/s/shard-0000/000000000000.seg");
    let (mut files, last, _) = torn_store();
    let mut kept = Vec::new();
    for n in 0..3 {
        // A byte of the record's key; from the second round on, of the mark at that place.
        files.get_mut(segment).unwrap()[last[2] + 20] ^= 1;
        let disk = FaultyStorage::with_files(files);
        let engine = open_on(&disk, os_cache("/s")).unwrap();
        let tail = engine.recovery().shards[0].torn_tail.clone().unwrap();
        assert_eq!(tail.offset.0 as usize, last[2]);
        kept.push((tail.quarantined.clone(), disk.files()[&tail.quarantined].clone()));
        engine.producer().publish(Key(1), Note::sized(100 + n, 30)).unwrap().appended().wait().unwrap();
        files = disk.files();
    }
    for (i, (path, content)) in kept.iter().enumerate() {
        assert!(files[path] == *content, "{} is unchanged", path.display());
        assert!(kept[..i].iter().all(|(other, others)| other != path && others != content));
    }
}
