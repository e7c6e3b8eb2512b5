//! Shared by the tests: a plain event, small stores, and a whole log as a list.
#![allow(dead_code, clippy::unwrap_used, reason = "each test binary uses a part of this; a test may unwrap")]

pub(crate) mod bank;
pub(crate) mod killed;
pub(crate) mod log;
pub(crate) mod own_process;

use std::collections::BTreeMap;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use corelane::testing::FaultyStorage;
use corelane::{
    Bounded, Config, Durability, Event, EventLog, EventType, EventTypeId, Key, OpenError, Pin, Rejected, ShardId, Time,
};
use rkyv::{Archive, Deserialize, Serialize};

/// The bytes of a segment.
pub(crate) const SEGMENT: u64 = 64 << 10;
/// The bytes of a segment's header page.
pub(crate) const PAGE: usize = 4096;

/// An event of any size.
#[derive(Archive, Serialize, Deserialize, Bounded, Debug, Clone, PartialEq)]
pub(crate) struct Note {
    pub(crate) n: u64,
    pub(crate) text: String,
}

impl Note {
    pub(crate) fn new(n: u64) -> Self {
        Self { n, text: String::new() }
    }

    pub(crate) fn sized(n: u64, bytes: usize) -> Self {
        Self { n, text: "x".repeat(bytes) }
    }
}

impl Event for Note {
    const TYPES: &'static [EventType] = &[EventType::new(1, "note", 1)];
    fn event_type(&self) -> EventTypeId {
        EventTypeId(1)
    }
}

/// An event with a time of its own, which need not rise.
#[derive(Archive, Serialize, Deserialize, Bounded, Debug, Clone)]
pub(crate) struct Said {
    pub(crate) at: u64,
}

impl Event for Said {
    const TYPES: &'static [EventType] = &[EventType::new(1, "said", 1)];
    fn event_type(&self) -> EventTypeId {
        EventTypeId(1)
    }
    fn time(&self) -> Option<Time> {
        Some(Time(self.at))
    }
}

/// An event in the log.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct LoggedNote {
    pub(crate) key: u64,
    pub(crate) version: u64,
    pub(crate) n: u64,
    pub(crate) bytes: usize,
    pub(crate) offset: u64,
    pub(crate) sequence: u64,
    pub(crate) previous: Option<u64>,
}

/// The time limit of a wait, for a busy machine. Only a hanging test waits this long.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

pub(crate) fn soon() -> Option<Instant> {
    Some(Instant::now() + PATIENCE)
}

/// A small store: 64 KiB segments, small rings, no histograms, no pinning.
pub(crate) fn small(dir: impl Into<PathBuf>) -> Config {
    Config::new(dir).segment_bytes(SEGMENT).ring_capacity(64).keys_expected(16).latency(false).pin(Pin::None)
}

pub(crate) fn os_cache(dir: impl Into<PathBuf>) -> Config {
    small(dir).durability(Durability::OsCache)
}

pub(crate) fn open_on(storage: &FaultyStorage, config: Config) -> Result<EventLog<Note>, OpenError> {
    EventLog::<Note>::builder(config).faulty_storage(storage).open()
}

/// Reads one shard's whole log and checks its sequences.
pub(crate) fn read_shard(engine: &EventLog<Note>, shard: u16) -> Vec<LoggedNote> {
    let mut reader = engine.reader(ShardId(shard));
    let mut all: Vec<LoggedNote> = Vec::new();
    while let Some(record) = reader.next().expect("the log reads") {
        let meta = record.meta;
        if let Some(last) = all.last() {
            assert_eq!(meta.sequence.0, last.sequence + 1, "sequences have no holes");
        }
        all.push(LoggedNote {
            key: meta.key.0,
            version: meta.version.0,
            n: record.event.n.to_native(),
            bytes: record.event.text.len(),
            offset: meta.offset.0,
            sequence: meta.sequence.0,
            previous: meta.previous.map(|offset| offset.0),
        });
    }
    all
}

/// The numbers of shard 0's events in log order.
pub(crate) fn numbers(engine: &EventLog<Note>) -> Vec<u64> {
    read_shard(engine, 0).iter().map(|held| held.n).collect()
}

/// Reads every file below `dir`.
pub(crate) fn tree(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let content = std::fs::read(&path).unwrap();
                files.insert(path, content);
            }
        }
    }
    files
}

/// Copies a store.
pub(crate) fn copy(from: &Path, to: &Path) {
    for (path, content) in tree(from) {
        let target = to.join(path.strip_prefix(from).unwrap());
        std::fs::create_dir_all(target.parent().unwrap()).unwrap();
        std::fs::write(target, content).unwrap();
    }
}

/// The path of a segment of shard 0.
pub(crate) fn segment_path(dir: &Path, index: u64) -> PathBuf {
    dir.join("shard-0000").join(format!("{index:012}.seg"))
}

/// The number in an environment variable, or `default`.
pub(crate) fn env_number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

struct Unpark(std::thread::Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Runs a future on this thread, which sleeps until the future is woken.
pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> T {
    block_on_until(future, Instant::now() + Duration::from_secs(600)).expect("woken within ten minutes")
}

/// Like [`block_on`]; returns `None` if the future is not done at `end`.
pub(crate) fn block_on_until<T>(future: impl Future<Output = T>, end: Instant) -> Option<T> {
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut future = pin!(future);
    loop {
        if let Poll::Ready(value) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
            return Some(value);
        }
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return None;
        }
        std::thread::park_timeout(left);
    }
}

/// Waits until `is_so` returns `true`, at most [`PATIENCE`].
pub(crate) fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Waits until this disk has had no sync for 50 ms, so that every thread of the engine has done its work.
pub(crate) fn settle(storage: &FaultyStorage) {
    let mut syncs = storage.syncs();
    loop {
        std::thread::sleep(Duration::from_millis(50));
        if std::mem::replace(&mut syncs, storage.syncs()) == storage.syncs() {
            break;
        }
    }
}

/// Publishes events of 3,000 bytes from number `from` on until the disk is full. Returns the number of the refused one.
pub(crate) fn fill(engine: &EventLog<Note>, from: u64) -> u64 {
    let mut producer = engine.producer();
    let mut n = from;
    loop {
        match producer.publish_until(Key(n % 5), Note::sized(n, 3000), Instant::now() + Duration::from_millis(250)) {
            Ok(_) => n += 1,
            Err(Rejected::StorageFull(event)) => {
                assert_eq!((event.n, event.text.len()), (n, 3000), "the event comes back");
                return n;
            }
            // The shard has not caught up yet.
            Err(Rejected::Full(_)) => {}
            Err(other) => panic!("{other:?}"),
        }
        assert!(n < from + 20_000, "the disk is not full");
    }
}

/// Polls a future once without a waker.
pub(crate) fn poll_once<F: Future>(future: &mut std::pin::Pin<Box<F>>) -> Option<F::Output> {
    match future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => Some(value),
        Poll::Pending => None,
    }
}
