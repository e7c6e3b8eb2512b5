//! The saved states of one shard: files, and an index of them in memory.
//!
//! One writer: the snapshotter's thread (before it runs, whoever opens the store). Readers look up places under a lock
//! that nobody holds for long, and read files without one.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::OnceLock;

use hashbrown::HashMap;
use rkyv::util::AlignedVec;

use crate::error::ReadError;
use crate::event::{Key, Offset, Time, Version};
use crate::state::snapshot::format::{ENTRY_HEADER_BYTES, Entry, FILE_HEADER_BYTES, Kind, entry_at};
use crate::storage::framed::u32_at;
use crate::storage::memory::{ALIGN, padded};
use crate::storage::{SideFile, Storage, is_exhausted};
use crate::sync::{AtomicU64, Keyed, Mutex, Ordering, lock};

/// Where a state is saved, and which.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Saved {
    pub(crate) version: Version,
    /// The record of that version.
    pub(crate) head: Offset,
    /// The latest time of the key's events up to it.
    pub(crate) time_max: Time,
    file: u32,
    /// Position in the file, in steps of 16 bytes.
    at: u32,
}

/// A file, which is opened when it is read: there may be more of them than a process may have open.
#[derive(Debug, Clone)]
pub(crate) struct Held {
    pub(crate) number: u32,
    pub(crate) kind: Kind,
    pub(crate) path: PathBuf,
    pub(crate) start: Offset,
    /// The furthest record that an entry names.
    pub(crate) last_head: Offset,
    pub(crate) entries: u64,
    pub(crate) bytes: u64,
    /// Of a checkpoint: where each key's entry is, in the order of the keys. Made when it is first asked for, which is when
    /// somebody looks back to where the log has lost its beginning; empty where the file turned out to be unreadable.
    pub(crate) places: Arc<OnceLock<Vec<(Key, Saved)>>>,
}

#[derive(Debug, Default)]
struct Index {
    keys: HashMap<Key, Vec<Saved>, Keyed>,
    files: Vec<Held>,
}

/// What is saved of one shard.
#[derive(Debug)]
pub(crate) struct SnapshotStore {
    index: Mutex<Index>,
    storage: Arc<dyn Storage>,
    /// Entries that could not be read when they were wanted, or when the store was opened.
    pub(crate) unreadable: AtomicU64,
}

/// Figures of saved states.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct SnapshotStats {
    /// Saved states, those of checkpoints included.
    pub count: u64,
    /// Their average size in bytes, headers included; 0 where there are none.
    pub bytes_average: u64,
    /// Bytes of all files.
    pub bytes: u64,
    /// Checkpoints that are held.
    pub checkpoints: u64,
    /// Saved states that were found unreadable, since the engine was opened. What they saved was taken from an earlier one or from the log.
    pub unreadable: u64,
    /// Snapshots that were not taken: the disk was behind, or the state too large.
    pub skipped: u64,
    /// Checkpoints that could not be written.
    pub checkpoints_failed: u64,
}

const UNREADABLE: &str = "it cannot be read";

/// Entries that are added under one lock.
const ADDED_AT_A_TIME: usize = 1024;

impl SnapshotStore {
    pub(crate) fn new(storage: Arc<dyn Storage>) -> Self {
        Self { index: Mutex::new(Index::default()), storage, unreadable: AtomicU64::new(0) }
    }

    /// Takes in a file and what it holds; entries of a key come in the order of their versions.
    pub(crate) fn add(&self, held: Held, saved: impl IntoIterator<Item = (Key, Saved)>) {
        let mut index = lock(&self.index);
        match index.files.iter_mut().find(|file| file.number == held.number) {
            Some(file) => *file = held,
            None => index.files.push(held),
        }
        drop(index);
        let mut saved = saved.into_iter().peekable();
        // A checkpoint has all keys: readers are let in between.
        while saved.peek().is_some() {
            let mut index = lock(&self.index);
            for (key, saved) in saved.by_ref().take(ADDED_AT_A_TIME) {
                let of_key = index.keys.entry(key).or_default();
                let at = of_key.partition_point(|other| other.version < saved.version);
                if of_key.get(at).is_none_or(|other| other.version != saved.version) {
                    of_key.insert(at, saved);
                }
            }
        }
    }

    /// The newest saved state that `reaches` accepts (it accepts a beginning of the list), and the one after it.
    pub(crate) fn around(&self, key: Key, reaches: impl Fn(&Saved) -> bool) -> (Option<Saved>, Option<Saved>) {
        let index = lock(&self.index);
        let Some(of_key) = index.keys.get(&key) else { return (None, None) };
        let at = of_key.partition_point(reaches);
        (at.checked_sub(1).map(|at| of_key[at]), of_key.get(at).copied())
    }

    /// As [`SnapshotStore::around`], with the states that checkpoints saved. The first call after a new one reads its file.
    pub(crate) fn around_with_checkpoints(
        &self,
        key: Key,
        reaches: impl Fn(&Saved) -> bool,
    ) -> Result<(Option<Saved>, Option<Saved>), ReadError> {
        let (mut before, mut behind) = self.around(key, &reaches);
        let checkpoints: Vec<Held> =
            lock(&self.index).files.iter().filter(|file| file.kind == Kind::Checkpoint).cloned().collect();
        for held in checkpoints {
            let places = match held.places.get() {
                Some(places) => places,
                None => {
                    let places = self.places(&held)?;
                    held.places.get_or_init(|| places)
                }
            };
            let Ok(at) = places.binary_search_by_key(&key, |(key, _)| *key) else { continue };
            let saved = places[at].1;
            if reaches(&saved) {
                before = before.filter(|other| other.version >= saved.version).or(Some(saved));
            } else {
                behind = behind.filter(|other| other.version <= saved.version).or(Some(saved));
            }
        }
        Ok((before, behind))
    }

    /// Where the entries of a checkpoint are.
    fn places(&self, held: &Held) -> Result<Vec<(Key, Saved)>, ReadError> {
        let mut places = Vec::new();
        let read = self.open(held)?.and_then(|file| whole(&*file).map_err(|_| UNREADABLE)).and_then(|bytes| {
            let mut at = FILE_HEADER_BYTES;
            while let Some(entry) = entry_at(&bytes, at)? {
                if entry.version.0 > 0 {
                    places.extend(Saved::new(&entry, held.number, at as u64).map(|saved| (entry.key, saved)));
                }
                at += entry.bytes;
            }
            Ok(())
        });
        if let Err(why) = read {
            tracing::warn!(path = %held.path.display(), why, "a checkpoint is unreadable");
            self.unreadable.fetch_add(1, Ordering::Relaxed);
            return Ok(Vec::new());
        }
        // A part of the table that grew while it was saved comes twice; the later entry is no older.
        places.sort_by_key(|(key, saved)| (*key, std::cmp::Reverse(saved.version)));
        places.dedup_by_key(|(key, _)| *key);
        Ok(places)
    }

    /// Opens a file. One that no descriptor is left for is not unreadable: that is an error, and it can be read later.
    fn open(&self, held: &Held) -> Result<Result<Box<dyn SideFile>, &'static str>, ReadError> {
        match self.storage.open_side(&held.path) {
            Err(source) if is_exhausted(&source) => {
                Err(ReadError::Io { action: "reading", path: held.path.clone(), source })
            }
            file => Ok(file.map_err(|_| UNREADABLE)),
        }
    }

    /// Reads one entry, as it lies in its file, and shows it. An unreadable one is forgotten and counted.
    pub(crate) fn read<T>(
        &self,
        key: Key,
        saved: &Saved,
        show: impl FnOnce(&Entry<'_>) -> Result<T, &'static str>,
    ) -> Result<Option<T>, ReadError> {
        let held = lock(&self.index).files.iter().find(|file| file.number == saved.file).cloned();
        let Some(held) = held else { return Ok(None) };
        let shown = self.open(&held)?.and_then(|file| read_entry(&*file, saved.position())).and_then(|bytes| {
            let entry = entry_at(&bytes, 0)?.filter(|entry| entry.key == key && entry.version == saved.version);
            show(&entry.ok_or("an entry of another key")?)
        });
        let shown = shown
            .map_err(|why| {
                tracing::warn!(path = %held.path.display(), %key, version = %saved.version, why, "a saved state is unreadable");
                self.unreadable.fetch_add(1, Ordering::Relaxed);
                let mut index = lock(&self.index);
                if let Some(of_key) = index.keys.get_mut(&key) {
                    of_key.retain(|other| other != saved);
                }
                // A checkpoint is no longer asked.
                for file in index.files.iter_mut().filter(|file| file.number == saved.file) {
                    file.places = Arc::new(OnceLock::from(Vec::new()));
                }
            })
            .ok();
        Ok(shown)
    }

    /// Files of which nothing will be wanted any more: nothing before `earliest` is held of the log.
    pub(crate) fn take_useless(&self, earliest: Offset, has_lost_the_beginning: bool) -> Vec<PathBuf> {
        let mut index = lock(&self.index);
        let checkpoints = || index.files.iter().filter(|file| file.kind == Kind::Checkpoint);
        let newest: Vec<u32> = {
            let mut numbers: Vec<u32> = checkpoints().map(|file| file.number).collect();
            numbers.sort_unstable();
            numbers.split_off(numbers.len().saturating_sub(2))
        };
        // Where the log has lost its beginning, the oldest checkpoint from which it can be followed is where time travel begins.
        let base =
            checkpoints().filter(|file| has_lost_the_beginning && file.start >= earliest).map(|file| file.number).min();
        let base_start = base.and_then(|base| checkpoints().find(|file| file.number == base)).map(|file| file.start);
        let is_useless = |file: &Held| match file.kind {
            Kind::Checkpoint => !newest.contains(&file.number) && Some(file.number) != base,
            Kind::Snapshots => base_start.is_some_and(|start| file.last_head < start),
        };
        let (useless, kept): (Vec<Held>, Vec<Held>) =
            std::mem::take(&mut index.files).into_iter().partition(is_useless);
        index.files = kept;
        // Of checkpoints the index knows nothing.
        if useless.iter().any(|file| file.kind == Kind::Snapshots) {
            let is_gone = |saved: &Saved| useless.iter().any(|file| file.number == saved.file);
            index.keys.retain(|_, of_key| {
                of_key.retain(|saved| !is_gone(saved));
                !of_key.is_empty()
            });
        }
        useless.into_iter().map(|file| file.path).collect()
    }

    /// Count and size of what is saved.
    pub(crate) fn stats(&self) -> SnapshotStats {
        let index = lock(&self.index);
        let (count, bytes) = index.files.iter().fold((0, 0), |(n, b), file| (n + file.entries, b + file.bytes));
        SnapshotStats {
            count,
            bytes_average: bytes.checked_div(count).unwrap_or(0),
            bytes,
            checkpoints: index.files.iter().filter(|file| file.kind == Kind::Checkpoint).count() as u64,
            unreadable: self.unreadable.load(Ordering::Relaxed),
            ..SnapshotStats::default()
        }
    }
}

impl Saved {
    /// The place of `entry`, which lies at `at` in file `file`.
    ///
    /// `None` where that is beyond the first 64 GiB, as only a checkpoint can be; the log has what was saved there.
    pub(crate) fn new(entry: &Entry<'_>, file: u32, at: u64) -> Option<Self> {
        let at = u32::try_from(at / ALIGN as u64).ok()?;
        Some(Self { version: entry.version, head: entry.head, time_max: entry.time_max, file, at })
    }

    fn position(&self) -> u64 {
        u64::from(self.at) * ALIGN as u64
    }
}

/// All of a file.
pub(crate) fn whole(file: &dyn SideFile) -> std::io::Result<AlignedVec<ALIGN>> {
    let mut bytes = AlignedVec::new();
    bytes.resize(usize::try_from(file.len()?).map_err(std::io::Error::other)?, 0);
    file.read_at(0, &mut bytes)?;
    Ok(bytes)
}

fn read_entry(file: &dyn SideFile, at: u64) -> Result<AlignedVec<ALIGN>, &'static str> {
    let mut head = [0; ENTRY_HEADER_BYTES];
    file.read_at(at, &mut head).map_err(|_| "it cannot be read")?;
    let len = u32_at(&head, 0) as usize;
    if !(ENTRY_HEADER_BYTES..=ENTRY_BYTES_MAX).contains(&len) {
        return Err("an entry's length is out of range");
    }
    let mut bytes = AlignedVec::with_capacity(padded(len));
    bytes.resize(len, 0);
    file.read_at(at, &mut bytes).map_err(|_| "it cannot be read")?;
    Ok(bytes)
}

/// No entry is longer: the largest state, and outcomes.
const ENTRY_BYTES_MAX: usize = 64 << 20;

/// The name of file `number`.
pub(crate) fn file_name(kind: Kind, number: u32) -> String {
    match kind {
        Kind::Snapshots => format!("snapshots-{number:09}.snp"),
        Kind::Checkpoint => format!("checkpoint-{number:09}.snp"),
    }
}

/// Files of saved states are numbered below this.
pub(crate) const NUMBERS_END: u32 = 1 << 31;

/// What a file is by its name.
pub(crate) fn file_number(name: &str) -> Option<(Kind, u32)> {
    let stem = name.strip_suffix(".snp")?;
    let (kind, digits) = match stem.split_once('-')? {
        ("snapshots", digits) => (Kind::Snapshots, digits),
        ("checkpoint", digits) => (Kind::Checkpoint, digits),
        _ => return None,
    };
    if digits.len() < 9 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    // Counted on from the highest: a name beyond what is ever counted to is not one of saved states.
    let number = digits.parse().ok().filter(|&number: &u32| number < NUMBERS_END)?;
    (file_name(kind, number) == name).then_some((kind, number))
}

/// Where a checkpoint is made before it gets its name.
pub(crate) fn fresh_path(dir: &Path) -> PathBuf {
    dir.join("checkpoint.new")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::FaultyStorage;

    fn held(kind: Kind, number: u32, start: u64, last_head: u64) -> Held {
        let (path, places) = (PathBuf::from(file_name(kind, number)), Arc::default());
        let (start, last_head) = (Offset(start), Offset(last_head));
        Held { number, kind, path, start, last_head, entries: 1, bytes: 64, places }
    }

    #[test]
    fn every_number_that_is_counted_to_has_a_name_that_is_read_back() {
        for kind in [Kind::Snapshots, Kind::Checkpoint] {
            for number in [0, 1, 999_999_999, 1_000_000_000, (1 << 31) - 1] {
                assert_eq!(file_number(&file_name(kind, number)), Some((kind, number)));
            }
        }
        for name in
            ["snapshots-4294967295.snp", "checkpoint-2147483648.snp", "checkpoint-0000000001.snp", "checkpoint-1.snp"]
        {
            assert_eq!(file_number(name), None, "{name}");
        }
    }

    #[test]
    fn what_time_travel_begins_from_and_the_newest_two_checkpoints_stay() {
        let store = SnapshotStore::new(Arc::new(FaultyStorage::new()));
        // A file of snapshots, and a checkpoint behind it, by turns.
        for n in 1..=5_u32 {
            let at = u64::from(n) * 1_000;
            store.add(held(Kind::Snapshots, 2 * n, 0, at - 100), []);
            store.add(held(Kind::Checkpoint, 2 * n + 1, at, 0), []);
        }
        let useless = |earliest, has_lost| {
            let mut paths = store.take_useless(Offset(earliest), has_lost);
            paths.sort();
            paths
        };
        let (snapshots, checkpoint) = (
            |n: u32| PathBuf::from(file_name(Kind::Snapshots, 2 * n)),
            |n: u32| PathBuf::from(file_name(Kind::Checkpoint, 2 * n + 1)),
        );
        assert_eq!(useless(64, false), [checkpoint(1), checkpoint(2), checkpoint(3)], "the log has everything");
        store.add(held(Kind::Checkpoint, 5, 2_000, 0), []);
        store.add(held(Kind::Checkpoint, 7, 3_000, 0), []);
        assert_eq!(useless(1_500, true), [checkpoint(3), snapshots(1), snapshots(2)], "from the second on");
        assert_eq!(useless(2_001, true), [checkpoint(2), snapshots(3), snapshots(4)], "from the fourth on");
        assert_eq!(store.stats().checkpoints, 2);
        assert!(useless(9_000, true).is_empty(), "none to begin from");
    }
}
