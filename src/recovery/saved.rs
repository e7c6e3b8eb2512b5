//! The index of the saved states in a shard's folder, built when a store is opened.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use crate::event::{Key, Offset};
use crate::recovery::load::{is_of, read_ends};
use crate::state::aggregate::Aggregate;
use crate::state::snapshot::format::{FILE_HEADER_BYTES, FileHeader, Kind, OTHER_STORE, Owner, entry_at};
use crate::state::snapshot::store::{Saved, SnapshotFile, SnapshotStore, file_name, file_number, whole};
use crate::storage::{Storage, replace};
use crate::sync::Ordering;

/// The saved states of a shard.
pub(crate) struct SavedFiles {
    pub(crate) store: SnapshotStore,
    pub(crate) next_number: u32,
    /// The newest usable checkpoint's start: the states of all events below it are saved.
    pub(crate) covered: Offset,
    /// Files with states of events that the log does not have. [`SavedFiles::repair`] removes them.
    remove: Vec<PathBuf>,
    /// Files that are valid only at the beginning, with that beginning. [`SavedFiles::repair`] shortens them.
    cut: Vec<(String, Vec<u8>)>,
    /// Checkpoints that may be the only record of the log's freed beginning.
    usable: Vec<PathBuf>,
}

/// The extent of the log that recovery found.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LogExtent {
    pub(crate) end: Offset,
    /// Number of events that the log ever had.
    pub(crate) events: u64,
}

impl SavedFiles {
    /// The saved states of a shard whose store is being created: none.
    pub(crate) fn nothing(storage: &Arc<dyn Storage>) -> Self {
        let store = SnapshotStore::new(Arc::clone(storage));
        Self { store, next_number: 0, covered: Offset(0), remove: Vec::new(), cut: Vec::new(), usable: Vec::new() }
    }

    /// Removes states of events that are gone: other events will get their places in the log. Call it only after all
    /// shards were found sound: a refused store must stay unchanged.
    pub(crate) fn repair(&mut self, storage: &dyn Storage, dir: &Path) -> io::Result<()> {
        for path in &self.remove {
            storage.remove(path)?;
        }
        for (name, content) in std::mem::take(&mut self.cut) {
            replace(storage, dir, &name, &content)?;
        }
        if std::mem::take(&mut self.remove).is_empty() { Ok(()) } else { storage.sync_dir(dir) }
    }

    /// Makes the checkpoints and the names in the shard's folder durable, its span and its segments included. A killed
    /// process may have renamed a file without a sync. Retention relies on such a checkpoint when it frees the log, and
    /// so would a receipt.
    pub(crate) fn make_durable(&self, storage: &dyn Storage, dir: &Path) -> io::Result<()> {
        for path in &self.usable {
            storage.open_side(path)?.sync()?;
        }
        storage.sync_dir(dir)
    }

    /// Builds the index. Changes no file. `usable` holds the numbers of the checkpoints of this log, `unreadable` the
    /// number of those that could not be read.
    pub(super) fn index<A: Aggregate>(
        storage: &Arc<dyn Storage>,
        dir: &Path,
        owner: Owner,
        log: LogExtent,
        usable: &[u32],
        unreadable: u64,
    ) -> io::Result<Self> {
        let mut saved = Self::nothing(storage);
        let storage = &**storage;
        saved.store.unreadable.store(unreadable, Ordering::Relaxed);
        let mut files: Vec<(Kind, u32)> = storage.list(dir)?.iter().filter_map(|name| file_number(name)).collect();
        files.sort_unstable_by_key(|(_, number)| *number);
        for (kind, number) in files {
            saved.next_number = saved.next_number.max(number + 1);
            let file = (dir, owner, number);
            match kind {
                Kind::Checkpoint if usable.contains(&number) => saved.add_checkpoint::<A>(storage, file)?,
                Kind::Checkpoint => saved.check_unused(storage, file, log)?,
                Kind::Snapshots => saved.add_snapshots::<A>(storage, file, log)?,
            }
        }
        Ok(saved)
    }

    /// Lists an unusable checkpoint for removal if it has events that are gone. A checkpoint that is damaged or of
    /// another state version stays: it may still be useful.
    fn check_unused(
        &mut self,
        storage: &dyn Storage,
        (dir, owner, number): (&Path, Owner, u32),
        log: LogExtent,
    ) -> io::Result<()> {
        if read_ends(storage, dir, owner, number)?.is_ok_and(|(_, end)| end.log_end > log.end) {
            let path = dir.join(file_name(Kind::Checkpoint, number));
            tracing::warn!(path = %path.display(), "a checkpoint of events that are gone is removed");
            self.remove.push(path);
        }
        Ok(())
    }

    fn add_checkpoint<A: Aggregate>(
        &mut self,
        storage: &dyn Storage,
        (dir, owner, number): (&Path, Owner, u32),
    ) -> io::Result<()> {
        let path = dir.join(file_name(Kind::Checkpoint, number));
        let bytes = storage.open_side(&path)?.len()?;
        let Ok((header, end)) = read_ends(storage, dir, owner, number)? else { return Ok(()) };
        let (kind, start, entries) = (Kind::Checkpoint, header.start, end.entries);
        self.covered = self.covered.max(start);
        self.usable.push(path.clone());
        // States of another layout are not looked up.
        let is_indexed = !header.is_of_another_layout::<A>();
        let places = Arc::new(if is_indexed { OnceLock::new() } else { OnceLock::from(Vec::new()) });
        self.store.add(SnapshotFile { number, kind, path, start, last_head: Offset(0), entries, bytes, places }, []);
        Ok(())
    }

    fn add_snapshots<A: Aggregate>(
        &mut self,
        storage: &dyn Storage,
        (dir, owner, number): (&Path, Owner, u32),
        log: LogExtent,
    ) -> io::Result<()> {
        let kind = Kind::Snapshots;
        let path = dir.join(file_name(kind, number));
        let bytes = whole(&*storage.open_side(&path)?)?;
        let scanned = match FileHeader::decode(&bytes, owner) {
            Ok(header) if header.kind != kind => Scanned { why: Some("it is a checkpoint"), ..Scanned::default() },
            Ok(header) => scan::<A>(&bytes, &header, number, log),
            Err(why) => Scanned { why: Some(why), ..Scanned::default() },
        };
        if let Some(why) = scanned.why {
            let kept = scanned.entries;
            tracing::warn!(path = %path.display(), why, kept, "saved states are unreadable or of events that are gone");
            self.store.unreadable.fetch_add(1, Ordering::Relaxed);
        }
        // A file of another store is not ours to remove.
        if scanned.why == Some(OTHER_STORE) {
            return Ok(());
        }
        if scanned.end < bytes.len() {
            if scanned.entries == 0 {
                self.remove.push(path);
                return Ok(());
            }
            self.cut.push((file_name(kind, number), bytes[..scanned.end].to_vec()));
        }
        let held = SnapshotFile {
            number,
            kind,
            path,
            start: Offset(0),
            last_head: scanned.last_head,
            entries: scanned.entries,
            bytes: scanned.end as u64,
            places: Arc::default(),
        };
        self.store.add(held, scanned.saved);
        Ok(())
    }
}

/// The valid beginning of a file of snapshots.
#[derive(Default)]
struct Scanned {
    saved: Vec<(Key, Saved)>,
    entries: u64,
    last_head: Offset,
    /// The end of the valid entries.
    end: usize,
    /// The reason why they end there, unless the file ends there too.
    why: Option<&'static str>,
}

fn scan<A: Aggregate>(bytes: &[u8], header: &FileHeader, number: u32, log: LogExtent) -> Scanned {
    // States of another version are indexed if the application can read them: the first one decides.
    let mut indexed = match size_of::<A>() {
        0 => Some(false),
        _ if header.is_of_another_layout::<A>() => {
            let (shard, stored) = (header.shard.0, header.state);
            tracing::warn!(shard, number, %stored, "saved states of another layout are ignored: the state version is the same");
            Some(false)
        }
        _ => (header.state_version == A::STATE_VERSION).then_some(true),
    };
    let mut scanned = Scanned { end: FILE_HEADER_BYTES, ..Scanned::default() };
    loop {
        let entry = match entry_at(bytes, scanned.end) {
            Ok(None) => return scanned,
            Ok(Some(entry)) if !is_of(&entry, log.end) || entry.version.0 > log.events => {
                scanned.why = Some("of an event that is gone or never existed");
                return scanned;
            }
            Ok(Some(entry)) => entry,
            Err(why) => {
                scanned.why = Some(why);
                return scanned;
            }
        };
        if !entry.is_end() {
            scanned.entries += 1;
            scanned.last_head = scanned.last_head.max(entry.head);
            if entry.version.0 > 0 && *indexed.get_or_insert_with(|| entry.state::<A>().is_ok()) {
                scanned.saved.extend(Saved::new(&entry, number, scanned.end as u64).map(|saved| (entry.key, saved)));
            }
        }
        scanned.end += entry.bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::envelope::Envelope;
    use crate::event::{Root, Sequence, ShardId, Time};
    use crate::state::aggregate::Stateless;
    use crate::state::snapshot::format::End;
    use crate::testing::FaultyStorage;

    #[test]
    fn a_checkpoint_covers_the_log_up_to_the_offset_where_it_began() {
        let (storage, dir) = (FaultyStorage::new(), Path::new("/s/shard-0000"));
        let (start, sequence) = (Offset(5_008), Sequence(3));
        let (kind, store, shard, check) = (Kind::Checkpoint, 7, ShardId(0), 0);
        let (state_version, state) = (0, Root::default());
        let header = FileHeader { kind, store, shard, state_version, state, start, sequence, check, time: Time(0) };
        let end = End { entries: 0, log_end: Offset(100_000), check, durable: true, boot: 0 };
        let content = [&header.encode()[..], &end.encode()].concat();
        storage.create_dir(dir).expect("a folder");
        replace(&storage, dir, &file_name(kind, 4), &content).expect("written");
        let storage: Arc<dyn Storage> = Arc::new(storage);
        let log = LogExtent { end: Offset(200_000), events: 9 };
        let saved = SavedFiles::index::<Stateless<Envelope>>(&storage, dir, (store, shard), log, &[4], 0);
        let saved = saved.expect("readable");
        assert_eq!((saved.covered, saved.next_number), (start, 5));
    }
}
