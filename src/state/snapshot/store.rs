//! The saved states of one shard: files, and an index of them in memory.
//!
//! One writer: the snapshotter's thread, and before it runs, the thread that opens the store. Readers look up places
//! under a lock that no thread holds for long, and read files without a lock.

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

/// The place of a saved state, and its version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Saved {
    pub(crate) version: Version,
    /// The offset of that version's record.
    pub(crate) head: Offset,
    /// The latest time of the key's events up to it.
    pub(crate) time_max: Time,
    file: u32,
    /// Position in the file, in steps of 16 bytes.
    at: u32,
}

/// A file of saved states. It is opened only for a read: there may be more of them than a process may have open.
#[derive(Debug, Clone)]
pub(crate) struct SnapshotFile {
    pub(crate) number: u32,
    pub(crate) kind: Kind,
    pub(crate) path: PathBuf,
    pub(crate) start: Offset,
    /// The highest offset that an entry names.
    pub(crate) last_head: Offset,
    pub(crate) entries: u64,
    pub(crate) bytes: u64,
    /// A checkpoint's entries, sorted by key. Read when they are first needed: for a state that cannot be folded from
    /// the log, because the log has lost its beginning. Empty if the file proved unreadable.
    pub(crate) places: Arc<OnceLock<Vec<(Key, Saved)>>>,
}

#[derive(Debug, Default)]
struct SnapshotIndex {
    keys: HashMap<Key, Vec<Saved>, Keyed>,
    files: Vec<SnapshotFile>,
}

/// The saved states of one shard.
#[derive(Debug)]
pub(crate) struct SnapshotStore {
    index: Mutex<SnapshotIndex>,
    storage: Arc<dyn Storage>,
    /// Number of entries that could not be read, at the opening or later.
    pub(crate) unreadable: AtomicU64,
}

/// Statistics of saved states.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct SnapshotStats {
    /// Number of saved states, those of checkpoints included.
    pub count: u64,
    /// Average size of a saved state in bytes, headers included; 0 if there are none.
    pub bytes_average: u64,
    /// Bytes of all files.
    pub bytes: u64,
    /// Number of checkpoints held.
    pub checkpoints: u64,
    /// Number of saved states found unreadable since the engine was opened. Each was replaced by an earlier saved state
    /// or by the log.
    pub unreadable: u64,
    /// Number of snapshots that were not taken, because the disk was behind or the state was too large.
    pub skipped: u64,
    /// Number of checkpoints that could not be written.
    pub checkpoints_failed: u64,
}

const UNREADABLE: &str = "it cannot be read";

/// Entries added per lock of the index.
const ADDED_AT_A_TIME: usize = 1024;

impl SnapshotStore {
    pub(crate) fn new(storage: Arc<dyn Storage>) -> Self {
        Self { index: Mutex::new(SnapshotIndex::default()), storage, unreadable: AtomicU64::new(0) }
    }

    /// Adds a file and its entries; a key's entries come in the order of their versions.
    pub(crate) fn add(&self, file: SnapshotFile, saved: impl IntoIterator<Item = (Key, Saved)>) {
        let mut index = lock(&self.index);
        match index.files.iter_mut().find(|known| known.number == file.number) {
            Some(known) => *known = file,
            None => index.files.push(file),
        }
        drop(index);
        let mut saved = saved.into_iter().peekable();
        // A checkpoint has all keys: release the lock now and then, for readers.
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

    /// Returns the newest saved state that `reaches` accepts, and the one after it. If `reaches` accepts a state, it
    /// must accept all older ones.
    pub(crate) fn around(&self, key: Key, reaches: impl Fn(&Saved) -> bool) -> (Option<Saved>, Option<Saved>) {
        let index = lock(&self.index);
        let Some(of_key) = index.keys.get(&key) else { return (None, None) };
        let at = of_key.partition_point(reaches);
        (at.checked_sub(1).map(|at| of_key[at]), of_key.get(at).copied())
    }

    /// Does the same as [`SnapshotStore::around`], with the states that checkpoints saved. The first call after a new
    /// checkpoint reads its file.
    pub(crate) fn around_with_checkpoints(
        &self,
        key: Key,
        reaches: impl Fn(&Saved) -> bool,
    ) -> Result<(Option<Saved>, Option<Saved>), ReadError> {
        let (mut before, mut behind) = self.around(key, &reaches);
        let checkpoints: Vec<SnapshotFile> =
            lock(&self.index).files.iter().filter(|file| file.kind == Kind::Checkpoint).cloned().collect();
        for file in checkpoints {
            let places = match file.places.get() {
                Some(places) => places,
                None => {
                    let places = self.places(&file)?;
                    file.places.get_or_init(|| places)
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

    /// Reads the places of a checkpoint's entries.
    fn places(&self, checkpoint: &SnapshotFile) -> Result<Vec<(Key, Saved)>, ReadError> {
        let mut places = Vec::new();
        let read = self.open(checkpoint)?.and_then(|file| whole(&*file).map_err(|_| UNREADABLE)).and_then(|bytes| {
            let mut at = FILE_HEADER_BYTES;
            while let Some(entry) = entry_at(&bytes, at)? {
                if entry.version.0 > 0 {
                    places.extend(Saved::new(&entry, checkpoint.number, at as u64).map(|saved| (entry.key, saved)));
                }
                at += entry.bytes;
            }
            Ok(())
        });
        if let Err(why) = read {
            tracing::warn!(path = %checkpoint.path.display(), why, "a checkpoint is unreadable");
            self.unreadable.fetch_add(1, Ordering::Relaxed);
            return Ok(Vec::new());
        }
        // Keys of a part that grew during the checkpoint can occur twice; the later entry is never older.
        places.sort_by_key(|(key, saved)| (*key, std::cmp::Reverse(saved.version)));
        places.dedup_by_key(|(key, _)| *key);
        Ok(places)
    }

    /// Opens a file. A lack of file descriptors is an error of this read; it does not make the file unreadable.
    fn open(&self, file: &SnapshotFile) -> Result<Result<Box<dyn SideFile>, &'static str>, ReadError> {
        match self.storage.open_side(&file.path) {
            Err(source) if is_exhausted(&source) => {
                Err(ReadError::Io { action: "reading", path: file.path.clone(), source })
            }
            file => Ok(file.map_err(|_| UNREADABLE)),
        }
    }

    /// Reads one entry from its file and passes it to `show`. Counts an unreadable entry and removes it from the index.
    pub(crate) fn read<T>(
        &self,
        key: Key,
        saved: &Saved,
        show: impl FnOnce(&Entry<'_>) -> Result<T, &'static str>,
    ) -> Result<Option<T>, ReadError> {
        let file = lock(&self.index).files.iter().find(|file| file.number == saved.file).cloned();
        let Some(file) = file else { return Ok(None) };
        let shown = self.open(&file)?.and_then(|file| read_entry(&*file, saved.position())).and_then(|bytes| {
            let entry = entry_at(&bytes, 0)?.filter(|entry| entry.key == key && entry.version == saved.version);
            show(&entry.ok_or("the entry is not of this key and version")?)
        });
        let shown = shown
            .map_err(|why| {
                let (path, version) = (file.path.display(), saved.version);
                tracing::warn!(%path, %key, %version, why, "a saved state is unreadable");
                self.unreadable.fetch_add(1, Ordering::Relaxed);
                let mut index = lock(&self.index);
                if let Some(of_key) = index.keys.get_mut(&key) {
                    of_key.retain(|other| other != saved);
                }
                // Look up nothing more in a checkpoint with a damaged entry.
                for file in index.files.iter_mut().filter(|file| file.number == saved.file) {
                    file.places = Arc::new(OnceLock::from(Vec::new()));
                }
            })
            .ok();
        Ok(shown)
    }

    /// Removes the files that nothing needs any more from the index, and returns their paths. The log begins at
    /// `earliest`.
    pub(crate) fn take_useless(&self, earliest: Offset, has_lost_the_beginning: bool) -> Vec<PathBuf> {
        let mut index = lock(&self.index);
        let checkpoints = || index.files.iter().filter(|file| file.kind == Kind::Checkpoint);
        let newest: Vec<u32> = {
            let mut numbers: Vec<u32> = checkpoints().map(|file| file.number).collect();
            numbers.sort_unstable();
            numbers.split_off(numbers.len().saturating_sub(2))
        };
        // If the log has lost its beginning, time travel starts from the oldest checkpoint whose start the log still
        // holds.
        let base =
            checkpoints().filter(|file| has_lost_the_beginning && file.start >= earliest).map(|file| file.number).min();
        let base_start = base.and_then(|base| checkpoints().find(|file| file.number == base)).map(|file| file.start);
        let is_useless = |file: &SnapshotFile| match file.kind {
            Kind::Checkpoint => !newest.contains(&file.number) && Some(file.number) != base,
            Kind::Snapshots => base_start.is_some_and(|start| file.last_head < start),
        };
        let (useless, kept): (Vec<SnapshotFile>, Vec<SnapshotFile>) =
            std::mem::take(&mut index.files).into_iter().partition(is_useless);
        index.files = kept;
        // The index has no entries of checkpoints.
        if useless.iter().any(|file| file.kind == Kind::Snapshots) {
            let is_gone = |saved: &Saved| useless.iter().any(|file| file.number == saved.file);
            index.keys.retain(|_, of_key| {
                of_key.retain(|saved| !is_gone(saved));
                !of_key.is_empty()
            });
        }
        useless.into_iter().map(|file| file.path).collect()
    }

    /// Returns the count and size of the saved states.
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
    /// The place of `entry`, which is at position `at` of file `file`. Returns `None` beyond the first 64 GiB, which
    /// only a checkpoint can reach; the log has the states saved there.
    pub(crate) fn new(entry: &Entry<'_>, file: u32, at: u64) -> Option<Self> {
        let at = u32::try_from(at / ALIGN as u64).ok()?;
        Some(Self { version: entry.version, head: entry.head, time_max: entry.time_max, file, at })
    }

    fn position(&self) -> u64 {
        u64::from(self.at) * ALIGN as u64
    }
}

/// Reads a whole file.
pub(crate) fn whole(file: &dyn SideFile) -> std::io::Result<AlignedVec<ALIGN>> {
    let mut bytes = AlignedVec::new();
    bytes.resize(usize::try_from(file.len()?).map_err(std::io::Error::other)?, 0);
    file.read_at(0, &mut bytes)?;
    Ok(bytes)
}

fn read_entry(file: &dyn SideFile, at: u64) -> Result<AlignedVec<ALIGN>, &'static str> {
    let mut head = [0; ENTRY_HEADER_BYTES];
    file.read_at(at, &mut head).map_err(|_| UNREADABLE)?;
    let len = u32_at(&head, 0) as usize;
    if !(ENTRY_HEADER_BYTES..=ENTRY_BYTES_MAX).contains(&len) {
        return Err("an entry's length is out of range");
    }
    let mut bytes = AlignedVec::with_capacity(padded(len));
    bytes.resize(len, 0);
    file.read_at(at, &mut bytes).map_err(|_| UNREADABLE)?;
    Ok(bytes)
}

/// The largest entry: a state and its key's outcomes.
const ENTRY_BYTES_MAX: usize = 64 << 20;

/// Returns the name of file `number`.
pub(crate) fn file_name(kind: Kind, number: u32) -> String {
    match kind {
        Kind::Snapshots => format!("snapshots-{number:09}.snp"),
        Kind::Checkpoint => format!("checkpoint-{number:09}.snp"),
    }
}

/// File numbers are below this.
pub(crate) const NUMBERS_END: u32 = 1 << 31;

/// Returns the kind and number that a file's name states.
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
    // New files get the highest number plus one, so a file with a number that no count reaches is not ours.
    let number = digits.parse().ok().filter(|&number: &u32| number < NUMBERS_END)?;
    (file_name(kind, number) == name).then_some((kind, number))
}

/// The path at which a checkpoint is written before it is renamed.
pub(crate) fn fresh_path(dir: &Path) -> PathBuf {
    dir.join("checkpoint.new")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::FaultyStorage;

    fn file(kind: Kind, number: u32, start: u64, last_head: u64) -> SnapshotFile {
        let (path, places) = (PathBuf::from(file_name(kind, number)), Arc::default());
        let (start, last_head) = (Offset(start), Offset(last_head));
        SnapshotFile { number, kind, path, start, last_head, entries: 1, bytes: 64, places }
    }

    #[test]
    fn every_file_number_is_read_back_from_its_name() {
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
    fn the_two_newest_checkpoints_and_the_base_of_time_travel_stay() {
        let store = SnapshotStore::new(Arc::new(FaultyStorage::new()));
        // Files of snapshots, each with a checkpoint after it.
        for n in 1..=5_u32 {
            let at = u64::from(n) * 1_000;
            store.add(file(Kind::Snapshots, 2 * n, 0, at - 100), []);
            store.add(file(Kind::Checkpoint, 2 * n + 1, at, 0), []);
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
        store.add(file(Kind::Checkpoint, 5, 2_000, 0), []);
        store.add(file(Kind::Checkpoint, 7, 3_000, 0), []);
        assert_eq!(useless(1_500, true), [checkpoint(3), snapshots(1), snapshots(2)], "from the second on");
        assert_eq!(useless(2_001, true), [checkpoint(2), snapshots(3), snapshots(4)], "from the fourth on");
        assert_eq!(store.stats().checkpoints, 2);
        assert!(useless(9_000, true).is_empty(), "none to begin from");
    }
}
