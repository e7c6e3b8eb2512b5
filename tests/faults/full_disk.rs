//! A full disk is backpressure: refusals return the event, no acknowledged event is lost, and publishing continues when
//! space returns.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::common::{Note, fill, numbers, open_on, os_cache, small, soon};
use corelane::testing::FaultyStorage;
use corelane::{Durability, EventLog, Key, Rejected};

#[test]
fn a_disk_that_fills_at_any_segment_is_backpressure_until_space_returns() {
    for segments in 0..6_u64 {
        let storage = FaultyStorage::new();
        storage.set_space(Some(segments * crate::common::SEGMENT));
        let engine = open_on(&storage, small("/s")).unwrap();
        let accepted = fill(&engine, 0);
        assert!(engine.shard_metrics()[0].storage_full);
        let appended = numbers(&engine);
        assert!(appended.len() as u64 <= accepted);
        assert_eq!(appended.is_empty(), segments == 0);
        storage.set_space(None);
        engine.flush(soon()).unwrap();
        assert_eq!(numbers(&engine), (0..accepted).collect::<Vec<_>>(), "{segments} segments: every accepted event");
        assert!(!engine.shard_metrics()[0].storage_full);
        engine.shutdown(soon()).unwrap();
        drop(engine);
        assert_eq!(numbers(&open_on(&storage, small("/s")).unwrap()).len() as u64, accepted);
    }
}

#[test]
fn a_publisher_that_waits_for_a_full_disk_continues_when_space_returns() {
    let storage = FaultyStorage::new();
    storage.set_space(Some(2 * crate::common::SEGMENT));
    let engine = open_on(&storage, small("/s")).unwrap();
    std::thread::scope(|scope| {
        let publisher = scope.spawn(|| {
            let mut producer = engine.producer();
            for n in 0..200 {
                producer.publish(Key(n), Note::sized(n, 3000)).unwrap();
            }
        });
        std::thread::sleep(Duration::from_millis(100));
        assert!(!publisher.is_finished(), "200 events do not fit");
        storage.set_space(None);
        publisher.join().unwrap();
    });
    engine.flush(soon()).unwrap();
    assert_eq!(numbers(&engine).len(), 200);
}

fn sh(script: &str) -> bool {
    Command::new("sh").args(["-c", script]).output().is_ok_and(|output| output.status.success())
}

/// Fills a small real file system that holds a ballast file, restarts while it is full, removes the ballast, and
/// continues.
fn on_real_disk(dir: &Path, durability: Durability) {
    let (store, ballast) = (dir.join("store"), dir.join("ballast"));
    let config = || small(&store).durability(durability);
    let engine = EventLog::<Note>::open(config()).unwrap();
    std::fs::write(&ballast, vec![1; 1 << 20]).unwrap();
    let accepted = fill(&engine, 0);
    let appended = numbers(&engine).len() as u64;
    assert!(appended > 0);
    // The drop gives up accepted events without space, and reports them; appended events stay.
    drop(engine);
    let engine = EventLog::<Note>::open(config()).unwrap();
    let kept = numbers(&engine).len() as u64;
    assert!(kept >= appended && kept <= accepted, "{appended} <= {kept} <= {accepted}");
    let accepted = fill(&engine, kept);
    std::fs::remove_file(&ballast).unwrap();
    engine.flush(soon()).unwrap();
    assert_eq!(numbers(&engine), (0..accepted).collect::<Vec<_>>());
    engine.shutdown(soon()).unwrap();
    drop(engine);
    let engine = EventLog::<Note>::open(config()).unwrap();
    assert_eq!(numbers(&engine), (0..accepted).collect::<Vec<_>>());
}

#[test]
fn a_small_tmpfs_fills_up_and_continues_when_space_returns() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().display();
    if !sh(&format!("mount -t tmpfs -o size=3m tmpfs {at}")) {
        eprintln!("skipped: mounting needs root");
        return;
    }
    let outcome = std::panic::catch_unwind(|| on_real_disk(dir.path(), Durability::OsCache));
    assert!(sh(&format!("umount {at}")));
    outcome.unwrap();
}

#[test]
fn a_small_ext4_fills_up_and_continues_when_space_returns() {
    let dir = tempfile::tempdir().unwrap();
    let (image, at) = (dir.path().join("image"), dir.path().join("mnt"));
    std::fs::create_dir(&at).unwrap();
    let made = sh(&format!(
        "truncate -s 8M {0} && mkfs.ext4 -q -m 0 {0} && mount -o loop {0} {1}",
        image.display(),
        at.display()
    ));
    if !made {
        eprintln!("skipped: no loop mount of ext4 here");
        return;
    }
    let outcome = std::panic::catch_unwind(|| on_real_disk(&at, Durability::GroupCommit));
    assert!(sh(&format!("umount {}", at.display())));
    outcome.unwrap();
}

#[test]
fn a_store_on_a_full_disk_opens_and_refuses_events_until_space_returns() {
    let storage = FaultyStorage::new();
    storage.set_space(Some(0));
    let engine = open_on(&storage, os_cache("/s")).unwrap();
    let mut producer = engine.producer();
    let mut refused = None;
    for n in 0..1000 {
        if let Err(rejected) = producer.try_publish(Key(1), Note::new(n)) {
            refused = Some(rejected);
            break;
        }
    }
    let refused = refused.unwrap();
    assert!(matches!(refused, Rejected::StorageFull(_) | Rejected::Full(_)), "{refused:?}");
    storage.set_space(None);
    engine.flush(soon()).unwrap();
    assert_eq!(numbers(&engine).len(), 64, "the capacity of the ring");
}
