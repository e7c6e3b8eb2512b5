//! Consumers on a full disk: unsaved positions and records wait, then retention waits, and finally publishers wait.
//! When space returns, everything continues and no event is lost.

use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::common::{Note, SEGMENT, open_on, os_cache, read_shard, small, soon, until};
use corelane::consumer::{
    Consumer, ConsumerError, HealthPolicy, Judgement, LetterSelector, Retry, Start, WriteRefused,
};
use corelane::testing::FaultyStorage;
use corelane::{EventLog, Key, Rejected, Retention};

type Seen = Arc<Mutex<Vec<u64>>>;

fn retention() -> Retention {
    Retention::bytes(2 * SEGMENT)
}

/// Starts a consumer that records the events that it handles and, until `is_well`, parks those whose number ends with
/// 7.
fn start(engine: &EventLog<Note>, seen: &Seen, is_well: &Arc<AtomicBool>) -> Consumer<Note> {
    let (seen, is_well) = (Arc::clone(seen), Arc::clone(is_well));
    let builder = engine.consumer("c").checkpoint_every(Duration::from_millis(1));
    let builder = builder.health(HealthPolicy::default().consecutive_max(1_000_000).failure_percent_max(100));
    let builder = builder.retry(Retry::fixed().attempts(1)).judge(|_, _| Judgement::Park);
    let consumer = builder.start(move |event, _| {
        if event.n % 10 == 7 && !is_well.load(Ordering::SeqCst) {
            return Err("not this one".into());
        }
        seen.lock().unwrap().push(event.n.to_native());
        Ok(())
    });
    consumer.unwrap()
}

/// Publishes up to `count` events until the full disk refuses one. Returns the number after the last accepted one.
fn publish(engine: &EventLog<Note>, from: u64, count: u64) -> u64 {
    let mut producer = engine.producer();
    let mut n = from;
    while n < from + count {
        match producer.publish_until(Key(n % 10), Note::sized(n, 3000), Instant::now() + Duration::from_millis(250)) {
            Ok(_) => n += 1,
            Err(Rejected::StorageFull(_)) => break,
            // The machine is slow.
            Err(Rejected::Full(_)) => {}
            Err(other) => panic!("{other:?}"),
        }
    }
    n
}

fn sorted(seen: &Seen) -> Vec<u64> {
    let mut seen = seen.lock().unwrap().clone();
    seen.sort_unstable();
    seen
}

fn segments(engine: &EventLog<Note>) -> usize {
    engine.shard_metrics()[0].segments
}

#[test]
fn a_position_that_cannot_be_saved_blocks_retention_and_no_event() {
    let dir = tempfile::tempdir().unwrap();
    let engine = EventLog::<Note>::open(os_cache(dir.path()).retention(retention()).spares_max(1)).unwrap();
    let (seen, is_well) = (Seen::default(), Arc::new(AtomicBool::new(true)));
    let consumer = start(&engine, &seen, &is_well);
    let begun = consumer.report().positions[0];
    // A folder in place of the new file makes every save of the position fail.
    let obstacle = dir.path().join("consumers/c/checkpoint.new");
    // The consumer may be writing its first one there.
    until("the obstacle is in place", || std::fs::create_dir(&obstacle).is_ok());
    assert_eq!(publish(&engine, 0, 200), 200);
    engine.flush(soon()).unwrap();
    consumer.drain(soon()).unwrap();
    assert_eq!(sorted(&seen), (0..200).collect::<Vec<_>>(), "the consumer keeps handling events");
    until("failures are counted", || consumer.report().write_failures.0 > 3);
    let report = consumer.report();
    assert_eq!((report.positions[0], report.waiting(), report.write_failures.1), (begun, 0, 0));
    assert!(report.lag_bytes > 200 * 3000);
    assert!(segments(&engine) >= 9, "retention waits");
    std::fs::remove_dir(&obstacle).unwrap();
    until("retention continues", || segments(&engine) <= 3);
    assert!(consumer.report().positions[0] > begun);
    consumer.stop(soon()).unwrap();
}

#[test]
fn a_full_disk_is_backpressure_for_publishers_and_a_delay_for_consumers() {
    let storage = FaultyStorage::new();
    let engine = open_on(&storage, small("/s").retention(retention()).spares_max(1)).unwrap();
    let (seen, is_well) = (Seen::default(), Arc::new(AtomicBool::new(false)));
    let consumer = start(&engine, &seen, &is_well);
    let before = publish(&engine, 0, 24);
    engine.flush(soon()).unwrap();
    consumer.drain(soon()).unwrap();
    storage.refuse_files(true);
    // These fit into the active segment.
    let before = publish(&engine, before, 10);
    assert_eq!(before, 34);
    engine.flush(soon()).unwrap();
    storage.set_space(Some(2 * SEGMENT));
    let accepted = publish(&engine, before, 5000);
    assert!(accepted < 1000, "the publisher is refused");
    until("every appended event is handled", || consumer.report().unread == 0);
    let report = consumer.report();
    assert!(report.write_failures.0 > 0 && report.failure.is_none() && report.halted.is_none(), "{report:?}");
    assert!(report.unfinished > 0, "the key of a letter that cannot be written waits");
    until("the failed writes are counted", || consumer.report().write_failures.1 > 0);
    storage.refuse_files(false);
    storage.set_space(None);
    engine.flush(soon()).unwrap();
    assert!(consumer.drain(soon()).is_ok(), "{:?}", consumer.report());
    let is_letter = |n: &u64| n % 10 == 7;
    assert_eq!(sorted(&seen), (0..accepted).filter(|n| !is_letter(n)).collect::<Vec<_>>(), "each event once");
    assert_eq!(consumer.report().letters.letters, (0..accepted).filter(is_letter).count());
    until("retention continues", || segments(&engine) <= 3);
    is_well.store(true, Ordering::SeqCst);
    consumer.reprocess(LetterSelector::All).unwrap();
    until("letters are handled", || consumer.report().letters.letters == 0);
    assert_eq!(sorted(&seen), (0..accepted).collect::<Vec<_>>());
    let sevens: Vec<u64> = seen.lock().unwrap().iter().copied().filter(is_letter).collect();
    assert!(sevens.is_sorted(), "in order: {sevens:?}");
}

#[test]
fn dead_letters_that_cannot_be_written_keep_their_keys_waiting_and_are_written_later() {
    for restarts in [false, true] {
        let storage = FaultyStorage::new();
        let engine = open_on(&storage, small("/s")).unwrap();
        let (seen, is_well) = (Seen::default(), Arc::new(AtomicBool::new(false)));
        let mut consumer = start(&engine, &seen, &is_well);
        storage.refuse_side_files(true);
        publish(&engine, 0, 100);
        until("the other keys are handled", || seen.lock().unwrap().len() == 90);
        until("the failed writes are counted", || consumer.report().write_failures.1 > 1);
        let report = consumer.report();
        assert_eq!((report.letters.letters, report.parked, report.unfinished), (0, 0, 10));
        let first = read_shard(&engine, 0).iter().find(|held| held.n == 7).unwrap().offset;
        assert!(report.positions[0].0 <= first, "the position stays before the unrecorded event");
        if restarts {
            let stopped = consumer.stop(soon());
            let Err(ConsumerError::Ended { failure: Some(failure) }) = stopped else { panic!("{stopped:?}") };
            assert!(matches!(failure.error(), ConsumerError::Records(WriteRefused::Io { .. })), "{failure}");
            consumer = start(&engine, &seen, &is_well);
            until("the consumer tries again", || consumer.report().write_failures.1 > 0);
        }
        storage.refuse_side_files(false);
        consumer.drain(soon()).unwrap();
        let letters = consumer.dead_letters(None, 100).unwrap();
        assert_eq!(letters.len(), 10, "every event of key 7");
        assert!(letters.iter().map(|letter| letter.id.offset).is_sorted());
        assert_eq!(letters.iter().map(|letter| letter.attempts).collect::<Vec<_>>(), [1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(seen.lock().unwrap().len(), 90, "no event was handled twice");
    }
}

#[test]
fn a_consumer_created_while_segments_are_freed_starts_at_an_existing_one() {
    let dir = tempfile::tempdir().unwrap();
    let engine = EventLog::<Note>::open(os_cache(dir.path()).retention(retention()).spares_max(1)).unwrap();
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut producer = engine.producer();
            for n in 0.. {
                if is_over.load(Ordering::SeqCst) {
                    break;
                }
                drop(producer.publish(Key(n % 10), Note::sized(n, 3000)));
            }
        });
        let end = Instant::now() + Duration::from_secs(3);
        let mut came = 0;
        while Instant::now() < end {
            let name = format!("c-{came}");
            let mut poller = engine.consumer(&name).before_durable().poller().unwrap_or_else(|error| {
                is_over.store(true, Ordering::SeqCst);
                panic!("consumer {came}: {error}");
            });
            let sought =
                poller.seek(Start::Latest).and_then(|()| poller.save()).and_then(|()| poller.seek(Start::Beginning));
            is_over.store(sought.is_err(), Ordering::SeqCst);
            sought.unwrap();
            drop(poller);
            engine.remove_consumer(&name).unwrap();
            came += 1;
        }
        is_over.store(true, Ordering::SeqCst);
        assert!(came > 5, "{came}");
    });
}

fn sh(script: &str) -> bool {
    Command::new("sh").args(["-c", script]).output().is_ok_and(|output| output.status.success())
}

fn on_real_disk(dir: &Path) {
    let (store, ballast) = (dir.join("store"), dir.join("ballast"));
    let config = || small(&store).retention(retention()).spares_max(1);
    let (seen, is_well) = (Seen::default(), Arc::new(AtomicBool::new(false)));
    let engine = EventLog::<Note>::open(config()).unwrap();
    let consumer = start(&engine, &seen, &is_well);
    let before = publish(&engine, 0, 40);
    engine.flush(soon()).unwrap();
    consumer.drain(soon()).unwrap();
    // Fills the disk to the last byte.
    drop(std::fs::write(&ballast, vec![1; 16 << 20]));
    let accepted = publish(&engine, before, 5000);
    assert!(accepted < 5000, "the publisher is refused");
    until("every appended event is handled", || consumer.report().unread == 0);
    assert!(consumer.report().failure.is_none());
    std::fs::remove_file(&ballast).unwrap();
    engine.flush(soon()).unwrap();
    assert!(consumer.drain(soon()).is_ok(), "{:?}", consumer.report());
    is_well.store(true, Ordering::SeqCst);
    consumer.reprocess(LetterSelector::All).unwrap();
    until("letters are handled", || consumer.report().letters.letters == 0);
    assert_eq!(sorted(&seen), (0..accepted).collect::<Vec<_>>(), "each event once");
    until("retention continues", || segments(&engine) <= 3);
    consumer.stop(soon()).unwrap();
}

#[test]
fn consumers_continue_after_a_small_tmpfs_was_full() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().display();
    if !sh(&format!("mount -t tmpfs -o size=3m tmpfs {at}")) {
        eprintln!("skipped: mounting needs root");
        return;
    }
    let outcome = std::panic::catch_unwind(|| on_real_disk(dir.path()));
    assert!(sh(&format!("umount {at}")));
    outcome.unwrap();
}
