//! A store is the folder that was opened, even if the folder's path changes; an open store belongs to one engine.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::common::own_process::is_own_process;
use crate::common::{ArchivedNote, Note, SEGMENT, copy, numbers, small, soon, tree, until};
use corelane::consumer::outside::{self, DeadLetters};
use corelane::consumer::{Consumer, HealthPolicy, Request, Retry};
use corelane::ingress::{Accepted, GatePolicy, GatedProducer};
use corelane::log::scan::Store;
use corelane::{
    Config, EventLog, HandlerError, Key, Meta, Offset, OnError, OpenError, Retention, ShardId, Time, Version,
};

/// A store with every kind of file: two shards that recycle segments, checkpoints, a consumer with dead letters, a
/// gate, and an inline handler whose failures are recorded.
struct Busy {
    engine: EventLog<Note>,
    consumer: Consumer<Note>,
    gate: GatedProducer<Note>,
    next: u64,
}

fn config(dir: impl Into<PathBuf>) -> Config {
    small(dir).shards(2).retention(Retention::bytes(2 * SEGMENT))
}

impl Busy {
    fn open(dir: &Path) -> Self {
        let fails = |_: ShardId| {
            |event: &ArchivedNote, _: &Meta| -> Result<(), HandlerError> {
                if event.n.to_native() % 100 == 99 { Err("noted".into()) } else { Ok(()) }
            }
        };
        let engine = EventLog::<Note>::builder(config(dir)).handler("h", OnError::Quarantine, fails).open().unwrap();
        let once = Retry::fixed().base(Duration::from_millis(1)).jitter(1.0, 1.0).attempts(1);
        let patient = HealthPolicy::default().consecutive_max(1_000_000).failure_percent_max(100);
        let handle = |event: &ArchivedNote, _: &Meta| -> Result<(), HandlerError> {
            if event.n.to_native() % 50 == 7 { Err("parked".into()) } else { Ok(()) }
        };
        let consumer = engine.consumer("c").retry(once).health(patient).start(handle).unwrap();
        let policy = GatePolicy::default().gap_wait_max(Duration::from_millis(1));
        let gate = engine.gated("g", policy, |_| None).unwrap();
        Self { engine, consumer, gate, next: 0 }
    }

    /// Publishes 200 events of 2 KiB, each with its own key, waits until they are handled, and saves everything.
    fn work(&mut self) {
        let mut producer = self.engine.producer();
        for n in self.next..self.next + 200 {
            producer.publish(Key::new(n), Note::sized(n, 2048)).unwrap();
        }
        self.next += 200;
        self.engine.flush(soon()).unwrap();
        self.consumer.drain(soon()).unwrap();
        self.consumer.save().unwrap();
        // A gap of one sequence.
        let offered = self.gate.offer(1, self.next + 1, Key::new(1), Note::new(0)).unwrap();
        assert!(matches!(offered, Accepted::Buffered), "{offered:?}");
        until("the gap is closed", || {
            self.gate.pump().unwrap();
            self.gate.gaps().unwrap().len() as u64 == self.next / 200
        });
        self.gate.save(soon()).unwrap();
        self.engine.checkpoint(soon()).unwrap();
        assert_eq!(self.engine.failures().len(), 0);
    }

    fn end(self) {
        until("segments are recycled", || self.engine.shard_metrics().iter().all(|shard| shard.segments_freed > 0));
        let Self { engine, consumer, gate, .. } = self;
        drop((consumer, gate));
        engine.shutdown(soon()).unwrap();
    }
}

/// Checks that this folder holds the results of `rounds` rounds of work.
fn assert_worked(dir: &Path, rounds: u64, what: &str) {
    let store = Store::open(dir).unwrap();
    let letters = DeadLetters::open(&store, "c").unwrap();
    assert_eq!(letters.statistics().letters as u64, rounds * 4, "{what}");
    assert_eq!(outside::registered(&store, "c").unwrap().unwrap().positions.len(), 2, "{what}");
    let noted = fs::read_to_string(dir.join("quarantine/handlers.jsonl")).unwrap();
    assert_eq!(noted.lines().count() as u64, rounds * 2, "{what}");
    let engine = EventLog::<Note>::open(config(dir)).unwrap();
    let sequence: u64 = engine.shard_metrics().iter().map(|shard| shard.sequence.0).sum();
    assert_eq!(sequence, rounds * 201, "{what}");
    assert_eq!(engine.gaps("g").unwrap().len() as u64, rounds, "{what}");
}

#[test]
fn an_open_store_stays_the_same_folder_when_its_path_leads_elsewhere() {
    type Move = fn(&Path) -> PathBuf;
    // Each changes a folder with `in/store`, to which `in/link` leads, and a second store `in/other`. Returns the
    // store's new path.
    let moves: [(&str, &str, Move); 5] = [
        ("renamed", "in/store", |at| {
            fs::rename(at.join("in/store"), at.join("in/away")).unwrap();
            at.join("in/away")
        }),
        ("replaced", "in/store", |at| {
            fs::rename(at.join("in/store"), at.join("in/away")).unwrap();
            fs::rename(at.join("in/other"), at.join("in/store")).unwrap();
            at.join("in/away")
        }),
        ("a parent renamed", "in/store", |at| {
            fs::rename(at.join("in"), at.join("out")).unwrap();
            at.join("out/store")
        }),
        ("a parent replaced", "in/store", |at| {
            fs::rename(at.join("in"), at.join("out")).unwrap();
            fs::create_dir(at.join("in")).unwrap();
            fs::rename(at.join("out/other"), at.join("in/store")).unwrap();
            at.join("out/store")
        }),
        ("a link pointed elsewhere", "in/link", |at| {
            fs::remove_file(at.join("in/link")).unwrap();
            symlink("other", at.join("in/link")).unwrap();
            at.join("in/store")
        }),
    ];
    let original = tempfile::tempdir().unwrap();
    let mut other = Busy::open(original.path());
    other.work();
    other.end();
    for (what, name, change) in moves {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path();
        fs::create_dir_all(at.join("in/store")).unwrap();
        symlink("store", at.join("in/link")).unwrap();
        copy(original.path(), &at.join("in/other"));
        let before: BTreeSet<Vec<u8>> = tree(&at.join("in/other")).into_values().collect();

        let mut busy = Busy::open(&at.join(name));
        busy.work();
        let place = change(at);
        busy.work();
        // A new consumer, whose folders are created now.
        let late = busy.engine.consumer("late").start(|_: &ArchivedNote, _: &Meta| Ok(())).unwrap();
        late.drain(soon()).unwrap();
        drop(late);
        assert!(matches!(EventLog::<Note>::open(config(&place)), Err(OpenError::Locked { .. })), "{what}: one engine");
        busy.end();

        assert_worked(&place, 2, what);
        assert!(outside::registered(&Store::open(&place).unwrap(), "late").unwrap().is_some(), "{what}");
        let left = fs::read_dir(at).unwrap().flatten().map(|entry| entry.path().join("other"));
        let other = left.chain([at.join("in/store")]).find(|path| path.is_dir() && *path != place);
        match other {
            Some(other) => {
                let after: BTreeSet<Vec<u8>> = tree(&other).into_values().collect();
                assert!(after == before, "{what}: the other store is untouched");
                assert_worked(&other, 1, what);
            }
            None => panic!("{what}: the other store is gone"),
        }
        assert!(what != "renamed" || !at.join("in/store").exists(), "no folder is created at the old path");
        assert!(what != "a parent renamed" || !at.join("in").exists(), "no folder is created at the old path");
    }
}

#[test]
fn a_store_opened_by_a_relative_path_stays_in_place_when_the_working_directory_changes() {
    if !is_own_process(
        "opened_store::a_store_opened_by_a_relative_path_stays_in_place_when_the_working_directory_changes",
    ) {
        return;
    }
    for has_other in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        fs::create_dir(&a).unwrap();
        fs::create_dir(&b).unwrap();
        if has_other {
            let mut other = Busy::open(&b.join("store"));
            other.work();
            other.end();
        }
        let before = tree(&b);
        std::env::set_current_dir(&a).unwrap();
        let mut busy = Busy::open(Path::new("store"));
        busy.work();
        std::env::set_current_dir(&b).unwrap();
        busy.work();
        busy.end();
        std::env::set_current_dir("/").unwrap();
        assert!(tree(&b) == before && b.join("store").exists() == has_other, "the other directory is unchanged");
        assert_worked(&a.join("store"), 2, "the first directory");
    }
}

#[test]
fn the_folders_of_shards_consumers_and_gates_stay_the_opened_ones() {
    let dir = tempfile::tempdir().unwrap();
    let (store, away) = (dir.path().join("store"), dir.path().join("away"));
    let mut busy = Busy::open(&store);
    busy.work();
    for folder in ["shard-0000", "consumers/c", "gates/g"] {
        let moved = away.join(folder);
        fs::create_dir_all(moved.parent().unwrap()).unwrap();
        fs::rename(store.join(folder), moved).unwrap();
        copy(&away.join(folder), &store.join(folder));
    }
    let before = tree(&store.join("shard-0000"));
    busy.work();
    busy.end();
    assert!(tree(&store.join("shard-0000")) == before, "a copy is another folder");
    for folder in ["shard-0000", "consumers/c", "gates/g"] {
        fs::remove_dir_all(store.join(folder)).unwrap();
        fs::rename(away.join(folder), store.join(folder)).unwrap();
    }
    assert_worked(&store, 2, "moved back");
}

#[test]
fn no_file_that_is_removed_or_replaced_lets_a_second_engine_in() {
    let dir = tempfile::tempdir().unwrap();
    let (store, link) = (dir.path().join("store"), dir.path().join("link"));
    symlink("store", &link).unwrap();
    let engine = EventLog::<Note>::open(small(&store)).unwrap();
    let refused = |name: &Path, what: &str| {
        let error = EventLog::<Note>::open(small(name)).expect_err(what);
        assert!(matches!(error, OpenError::Locked { .. }), "{what}: {error}");
        assert!(outside::is_open(&Store::open(name).unwrap()).unwrap(), "{what}");
    };
    refused(&store, "unchanged");
    refused(&link, "through a link");
    fs::write(store.join("lock"), b"").unwrap();
    refused(&store, "with a file called lock");
    fs::remove_file(store.join("lock")).unwrap();
    let manifest = fs::read(store.join("manifest")).unwrap();
    fs::remove_file(store.join("manifest")).unwrap();
    fs::write(store.join("manifest"), manifest).unwrap();
    refused(&store, "with another manifest");
    fs::rename(&store, dir.path().join("away")).unwrap();
    refused(&dir.path().join("away"), "renamed");
    drop(engine);
    assert!(!outside::is_open(&Store::open(dir.path().join("away")).unwrap()).unwrap());
}

#[test]
fn a_shards_folder_that_two_stores_share_through_a_link_belongs_to_one_engine() {
    let dir = tempfile::tempdir().unwrap();
    let (first, second) = (dir.path().join("first"), dir.path().join("second"));
    let engine = EventLog::<Note>::open(small(&first)).unwrap();
    engine.producer().publish(Key(1), Note::new(1)).unwrap();
    engine.flush(soon()).unwrap();
    fs::create_dir(&second).unwrap();
    fs::copy(first.join("manifest"), second.join("manifest")).unwrap();
    symlink("../first/shard-0000", second.join("shard-0000")).unwrap();
    let error = EventLog::<Note>::open(small(&second)).expect_err("shared");
    assert!(matches!(&error, OpenError::Locked { dir } if dir.ends_with("second/shard-0000")), "{error}");
    drop(engine);
    let engine = EventLog::<Note>::open(small(&second)).unwrap();
    assert_eq!(numbers(&engine), [1]);
    assert!(matches!(EventLog::<Note>::open(small(&first)), Err(OpenError::Locked { .. })));
}

#[test]
fn a_store_opened_by_a_tool_stays_the_same_folder() {
    let dir = tempfile::tempdir().unwrap();
    let (name, away) = (dir.path().join("store"), dir.path().join("away"));
    for (path, n) in [(&name, 1), (&away, 2)] {
        let engine = EventLog::<Note>::open(small(path)).unwrap();
        (0..n).for_each(|n| drop(engine.producer().publish(Key(1), Note::new(n)).unwrap()));
        drop(engine.consumer("c").start(|_: &ArchivedNote, _: &Meta| Ok(())).unwrap());
        engine.flush(soon()).unwrap();
    }
    let store = Store::open(&name).unwrap();
    fs::rename(&name, dir.path().join("first")).unwrap();
    fs::rename(&away, &name).unwrap();
    let mut records = store.records(ShardId(0));
    assert!(records.next().unwrap().is_some() && records.next().unwrap().is_none(), "one event");
    assert!(!store.shard(ShardId(0)).unwrap().segments.is_empty());
    let all = corelane::consumer::LetterSelector::All;
    outside::ask(&store, "c", Request::Reprocess(all)).unwrap();
    let asked = |dir: &Path| fs::read_dir(dir.join("consumers/c")).unwrap().count();
    assert_eq!(asked(&dir.path().join("first")), asked(&name) + 1, "the request is in the opened folder");
}

#[test]
fn readers_and_gates_that_outlive_their_engine_keep_the_store_locked_and_keep_working() {
    /// Uses something that outlives its engine, and returns `true` if it works.
    type Left = Box<dyn FnMut() -> bool>;
    type Leave = fn(&EventLog<Note>) -> Left;
    let left: [(&str, Leave); 6] = [
        ("a reader", |engine| {
            let mut reader = engine.reader(ShardId(0));
            Box::new(move || reader.next().unwrap().is_some())
        }),
        ("a reader at an offset", |engine| {
            let mut reader = engine.reader_at(ShardId(0), Offset(4096)).unwrap();
            Box::new(move || reader.next().unwrap().is_some())
        }),
        ("a stream", |engine| {
            let mut stream = engine.stream(Key(1), Version(1)).unwrap();
            Box::new(move || stream.next().unwrap().is_some())
        }),
        ("events between times", |engine| {
            let mut between = engine.events_between(Time(0), Time(u64::MAX));
            Box::new(move || between.next().unwrap().is_some())
        }),
        ("a poller", |engine| {
            let mut poller = engine.consumer("p").poller().unwrap();
            Box::new(move || {
                let delivery = poller.next().unwrap().unwrap();
                let is_there = poller.event(&delivery).is_some();
                poller.succeeded(delivery).unwrap();
                poller.save().unwrap();
                is_there
            })
        }),
        ("a gated producer", |engine| {
            let mut gate = engine.gated("g", GatePolicy::default(), |_| None).unwrap();
            // The shards have ended, so nothing can be published, but the gate's files are usable.
            Box::new(move || gate.save(soon()).is_ok() && gate.gaps().unwrap().is_empty())
        }),
    ];
    for (what, leave) in left {
        let dir = tempfile::tempdir().unwrap();
        let (store, away) = (dir.path().join("store"), dir.path().join("away"));
        let engine = EventLog::<Note>::open(small(&store)).unwrap();
        engine.producer().publish(Key(1), Note::new(1)).unwrap();
        engine.flush(soon()).unwrap();
        let mut left = leave(&engine);
        drop(engine);
        assert!(matches!(EventLog::<Note>::open(small(&store)), Err(OpenError::Locked { .. })), "{what}");
        fs::rename(&store, &away).unwrap();
        assert!(matches!(EventLog::<Note>::open(small(&away)), Err(OpenError::Locked { .. })), "{what}, renamed");
        assert!(left(), "{what} keeps working");
        assert!(!store.exists(), "{what}");
        drop(left);
        assert_eq!(numbers(&EventLog::<Note>::open(small(&away)).unwrap()), [1], "{what}");
    }
}

#[test]
fn a_new_store_is_not_created_before_its_shards_folders_are_locked() {
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path().join("store");
    let shard = store.join("shard-0001");
    fs::create_dir_all(&shard).unwrap();
    let other = fs::File::open(&shard).unwrap();
    other.try_lock().unwrap();
    let error = EventLog::<Note>::open(small(&store).shards(2)).expect_err("shared");
    assert!(matches!(&error, OpenError::Locked { dir } if *dir == shard), "{error}");
    assert!(tree(&store).is_empty(), "no file was written");
    drop(other);
    EventLog::<Note>::open(small(&store).shards(2)).unwrap();
}
