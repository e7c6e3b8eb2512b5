//! The log ends with an error before an offset that a back-link cannot express.

use std::path::{Path, PathBuf};

use crate::common::{Note, SEGMENT, numbers, open_on, os_cache, soon, until};
use corelane::error::FailureCause;
use corelane::testing::FaultyStorage;
use corelane::{Key, OpenError, Rejected, WaitError};

/// The largest number of segments of a log.
const SEGMENTS: u64 = (1 << 52) / SEGMENT;

/// A store whose only segment has number `index` and holds no record.
fn store_at(index: u64) -> FaultyStorage {
    let storage = FaultyStorage::new();
    let engine = open_on(&storage, os_cache("/s")).unwrap();
    let is_segment = |path: &PathBuf| path.extension().is_some_and(|end| end == "seg");
    until("the first segment is prepared", || storage.files().keys().any(is_segment));
    drop(engine);
    let mut files = storage.files();
    let shard = Path::new("/s/shard-0000");
    let names: Vec<PathBuf> = files.keys().filter(|path| is_segment(path)).cloned().collect();
    let segment = files[&names[0]].clone();
    names.iter().for_each(|name| drop(files.remove(name)));
    files.insert(shard.join(format!("{index:012}.seg")), segment);
    let span = files.get_mut(&shard.join("span")).unwrap();
    span[12..20].copy_from_slice(&index.to_le_bytes());
    span[20..28].copy_from_slice(&index.to_le_bytes());
    let crc = crc32c::crc32c(&span[..28]);
    span[28..32].copy_from_slice(&crc.to_le_bytes());
    FaultyStorage::with_files(files)
}

#[test]
fn a_log_at_its_last_offset_fails_its_shard_and_stays_readable() {
    let disk = store_at(SEGMENTS - 3);
    let engine = open_on(&disk, os_cache("/s")).unwrap();
    let mut producer = engine.producer();
    let mut appended = Vec::new();
    let failure = loop {
        let n = appended.len() as u64;
        match producer.publish(Key(1), Note::sized(n, 3000)) {
            Ok(receipt) => match receipt.appended().wait() {
                Ok(()) => appended.push(n),
                Err(WaitError::ShardFailed(failure)) => break failure,
                Err(other) => panic!("{other}"),
            },
            Err(Rejected::ShardFailed(_, failure)) => break failure,
            Err(other) => panic!("{other:?}"),
        }
        assert!(n < 1000, "the log does not end");
    };
    assert!(matches!(failure.cause, FailureCause::OffsetsExhausted { .. }), "{failure}");
    assert!(appended.len() > 10, "{}: the log ends too early", appended.len());
    assert!(matches!(engine.shutdown(soon()), Err(WaitError::ShardFailed(_))));
    drop((producer, engine));
    // The back-links are correct up to the end.
    let engine = open_on(&disk, os_cache("/s")).unwrap();
    let found = crate::common::read_shard(&engine, 0);
    assert!(found.len() >= appended.len());
    for pair in found.windows(2) {
        assert_eq!(pair[1].previous, Some(pair[0].offset));
    }
    assert_eq!(numbers(&engine)[..appended.len()], appended);
}

#[test]
fn a_span_beyond_the_last_offset_is_refused() {
    let error = open_on(&store_at(SEGMENTS), os_cache("/s")).expect_err("opened");
    assert!(matches!(&error, OpenError::ForeignFile { why, .. } if why.contains("last offset")), "{error}");
}
