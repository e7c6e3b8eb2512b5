//! Tools beside an engine that writes and frees as fast as it can: a healthy store is never reported as damaged,
//! however slow the tool is.

use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::common::{Note, SEGMENT, os_cache, until};
use corelane::log::scan::{SegmentState, Store};
use corelane::{EventLog, Key, Retention, ShardId};

/// The bytes of a record of these tests, including padding.
const RECORD: u64 = 1072;

/// Calls `look` with the store while events are published.
fn beside_a_writer(look: impl Fn(&Path)) {
    let dir = tempfile::tempdir().unwrap();
    let keep = Retention::bytes(2 * SEGMENT);
    let engine = EventLog::<Note>::open(os_cache(dir.path()).retention(keep)).unwrap();
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut producer = engine.producer();
            let mut n = 0;
            while !is_over.load(Ordering::Relaxed) {
                drop(producer.publish(Key(n % 7), Note::sized(n, 1008)).unwrap());
                n += 1;
            }
        });
        until("retention frees", || engine.shard_metrics()[0].segments_freed > 3);
        let looked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| look(dir.path())));
        is_over.store(true, Ordering::Relaxed);
        looked.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
}

#[test]
fn a_scan_beside_fast_retention_finds_no_damage_and_counts_the_freed_events() {
    beside_a_writer(|dir| {
        for run in 0..30_u64 {
            let store = Store::open(dir).unwrap();
            let mut records = store.records(ShardId(0)).until(store.horizon(ShardId(0)).unwrap()).buffered(4096);
            let mut looks = 0;
            while let Some(record) = records.next().unwrap_or_else(|error| panic!("run {run}: {error}")) {
                assert!(record.body.len() as u64 <= RECORD);
                looks += 1;
                if looks % 16 == run % 16 {
                    std::thread::yield_now();
                }
            }
            for gap in records.gaps() {
                assert!(gap.events <= (gap.until.get() - gap.from.get()) / RECORD, "run {run}: {gap:?}");
            }
            let tail = records.tail().unwrap();
            assert!(tail.events == 0 && !tail.was_durable, "run {run}: {tail:?}");
            let files = store.shard(ShardId(0)).unwrap();
            let is_wrong = |state| matches!(state, SegmentState::Damaged(_) | SegmentState::Missing);
            assert!(files.segments.iter().all(|segment| !is_wrong(segment.state)), "run {run}: {files:?}");
        }
    });
}

#[test]
fn verify_beside_fast_retention_reports_no_damage() {
    beside_a_writer(|dir| {
        for command in ["verify", "verify", "inspect", "dump", "verify"] {
            let out = Command::new(env!("CARGO_BIN_EXE_corelane")).arg(command).arg(dir).output().unwrap();
            assert!(out.status.success(), "{command}: {out:?}");
            let (out, err) = (String::from_utf8_lossy(&out.stdout).into_owned(), out.stderr);
            let said = format!("{}{}", &out[..out.len().min(2000)], String::from_utf8_lossy(&err));
            assert!(!said.contains("PROBLEMS") && !said.contains("DAMAGED"), "{command}: {said}");
        }
    });
}
