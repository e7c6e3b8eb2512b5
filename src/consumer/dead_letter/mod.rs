//! Dead letters: the durable records of one consumer, about the events that it parked or skipped, and about the end of
//! each parked event.
//!
//! One writer: the consumer's driver thread. A write that succeeded survives any crash, and a batch is written as a
//! whole or not at all. No byte is written after bytes whose fate is unknown, and no sync is repeated.
//!
//! ```text
//!  Parked ─▶ a letter waits ─▶ FailedAgain ─▶ still waits
//!                 │  └─▶ Handled
//!                 └────▶ Discarded, on request or to make room
//! ```
//!
//! Memory, measured with a million letters: 52 to 67 bytes per letter, for its place; 37 more until the consumer's
//! saved position is past it, as for every skipped event. A letter that failed again takes twice as much. Errors and
//! archives stay on disk.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rkyv::util::AlignedVec;

use crate::error::OpenError;
use crate::event::{EventId, Key, Offset, ShardId, Time};
use crate::storage::Storage;

pub(super) mod answer;
mod compaction;
mod files;
mod format;
mod index;
mod room;
pub(super) mod selector;

use answer::{DeadLetter, DeadLetterPolicy, Entry, LetterStatistics, LettersError, WriteRefused, Written};
pub(super) use files::is_letters_name;
use files::{LetterFile, OpenMode, ReadFault, load, path, read_entry};
pub(super) use format::FileEnd;
use format::{EntryBatch, FileHeader, StoredEntry};
use index::{EntryPlace, EntrySummary, LetterIndex, LetterName};

/// A file of this length is not continued.
const FILE_BYTES_MAX: u64 = 1 << 30;

/// Archives are returned at addresses aligned for their types.
pub(crate) type Archive = AlignedVec<16>;

/// The letters of one consumer.
#[derive(Debug)]
pub(crate) struct LetterStore {
    storage: Arc<dyn Storage>,
    dir: PathBuf,
    policy: DeadLetterPolicy,
    index: LetterIndex,
    /// The files that count, by number.
    files: BTreeMap<u32, LetterFile>,
    /// The file that the next batch goes to: begun in this run, and without a failed write.
    tail: Option<Tail>,
    /// The end of the durable letters.
    durable: FileEnd,
    next_number: u32,
    /// The next letters to discard if there is no room, oldest first. Some may be gone.
    oldest: VecDeque<LetterName>,
}

#[derive(Debug, Clone, Copy)]
struct Tail {
    number: u32,
    /// The number of the next batch.
    batch: u32,
}

/// The entries of a batch to write, and the letters that it ends.
#[derive(Debug, Default)]
struct Plan<'a> {
    entries: Vec<Entry<'a>>,
    overflowed: Vec<(Key, EventId)>,
    /// Events that get their first entry.
    recorded: BTreeSet<EventId>,
    /// Letters that end.
    ended: BTreeSet<LetterName>,
    letters_added: usize,
    bytes_added: u64,
    bytes_ended: u64,
    time: Time,
}

impl LetterStore {
    /// Opens the letters in `dir` of a store with `shards` shards. They must reach to `known`. Creates nothing if there
    /// are none yet.
    pub(crate) fn open(
        storage: Arc<dyn Storage>,
        dir: &Path,
        policy: DeadLetterPolicy,
        known: FileEnd,
        shards: usize,
    ) -> Result<Self, OpenError> {
        policy.check()?;
        Self::load(storage, dir, policy, known, shards, OpenMode::Own)
    }

    fn load(
        storage: Arc<dyn Storage>,
        dir: &Path,
        policy: DeadLetterPolicy,
        known: FileEnd,
        shards: usize,
        mode: OpenMode,
    ) -> Result<Self, OpenError> {
        let mut index = LetterIndex::default();
        let mut strange = None;
        let loaded = load(&*storage, dir, mode, known, |entry| {
            if usize::from(entry.id.shard.0) >= shards {
                strange.get_or_insert(entry.place);
            }
            index.apply(entry);
        })?;
        if let Some(place) = strange {
            let (path, at) = (path(dir, place.file), place.at());
            return Err(OpenError::DamagedFile { path, at, why: "an entry of a shard that the store does not have" });
        }
        let (durable, files::Loaded { files, next_number }) = (loaded.end(), loaded);
        let dir = dir.to_owned();
        Ok(Self { storage, dir, policy, index, files, tail: None, durable, next_number, oldest: VecDeque::new() })
    }

    /// Records a batch; it is durable when this returns. Redundant entries are left out: a repeated first entry of an
    /// event, or an entry for a letter that is not waiting.
    ///
    /// # Errors
    /// No entry of the batch counts. If no later write succeeds before a restart, the restart may still find the batch,
    /// as a whole; after a later write, it never takes effect.
    pub(crate) fn write(&mut self, entries: &[Entry<'_>]) -> Result<Written, WriteRefused> {
        let mut plan = Plan::default();
        for entry in entries {
            self.accept(&mut plan, entry);
        }
        let written = self.make_room(&mut plan).and_then(|()| self.put(&plan));
        if written.is_err() {
            // The refused plan has taken letters from the list that still wait, so the list is rebuilt.
            self.oldest.clear();
        }
        written.map(|()| Written { overflowed: plan.overflowed })
    }

    fn accept<'a>(&self, plan: &mut Plan<'a>, entry: &Entry<'a>) {
        let is_new = match *entry {
            Entry::Parked { letter, archive } => {
                let is_new = self.is_unrecorded(letter) && plan.recorded.insert(letter.id);
                if is_new {
                    plan.letters_added += 1;
                    plan.bytes_added += format::letter_bytes(letter, archive) as u64;
                    plan.time = plan.time.max(letter.last_failed);
                }
                is_new
            }
            Entry::Skipped { letter, .. } => self.is_unrecorded(letter) && plan.recorded.insert(letter.id),
            Entry::FailedAgain { id, key, .. } => {
                let name = (key, id.offset);
                self.index.bytes_of(name).is_some() && !plan.ended.contains(&name)
            }
            Entry::Handled { id, key, .. } | Entry::Discarded { id, key, .. } => {
                assert!(!plan.recorded.contains(&id), "a letter ends in a later batch than it begins");
                let name = (key, id.offset);
                let bytes = self.index.bytes_of(name);
                plan.bytes_ended += bytes.filter(|_| !plan.ended.contains(&name)).unwrap_or(0);
                bytes.is_some() && plan.ended.insert(name)
            }
        };
        if is_new {
            plan.entries.push(*entry);
        }
    }

    fn is_unrecorded(&self, letter: &DeadLetter) -> bool {
        !self.has(letter.key, letter.id)
    }

    /// Writes and syncs the planned entries, then applies them to the index.
    fn put(&mut self, plan: &Plan<'_>) -> Result<(), WriteRefused> {
        if plan.entries.is_empty() {
            return Ok(());
        }
        let tail = self.tail.take().filter(|tail| self.files[&tail.number].bytes < FILE_BYTES_MAX);
        let (number, mut batch, fresh) = match tail {
            Some(Tail { number, batch }) => {
                (number, EntryBatch::new(number, self.files[&number].bytes, batch, &[]), None)
            }
            None => {
                let (number, file) = self.begin_file()?;
                (number, EntryBatch::new(number, 0, 0, &self.header(number).encode()), Some(file))
            }
        };
        for &(key, id) in &plan.overflowed {
            batch.add_overflowed(id, key, plan.time);
        }
        for entry in &plan.entries {
            batch.add(entry);
        }
        let is_fresh = fresh.is_some();
        let file = fresh.as_ref().unwrap_or_else(|| &self.files[&number]);
        let io = |action, path| move |source| WriteRefused::Io { action, path, source };
        file.handle.append(batch.seal()).map_err(io("writing", path(&self.dir, number)))?;
        file.handle.sync().map_err(io("syncing", path(&self.dir, number)))?;
        if is_fresh {
            self.storage.sync_dir(&self.dir).map_err(io("syncing", self.dir.clone()))?;
        }
        self.files.extend(fresh.map(|file| (number, file)));
        for (at, entry) in batch.entries() {
            self.index.apply(&EntrySummary::new(&entry, number, at));
        }
        let file = self.files.get_mut(&number).expect("a batch was written to it");
        file.bytes += batch.len() as u64;
        self.tail = Some(Tail { number, batch: batch.number() + 1 });
        self.durable = FileEnd { number, bytes: file.bytes };
        Ok(())
    }

    /// Creates an empty file. Its number is used up even if writing fails.
    fn begin_file(&mut self) -> Result<(u32, LetterFile), WriteRefused> {
        let number = self.next_number;
        let io = |action, path| move |source| WriteRefused::Io { action, path, source };
        self.storage.create_dir(&self.dir).map_err(io("creating", self.dir.clone()))?;
        let path = path(&self.dir, number);
        let handle = self.storage.create_side(&path).map_err(io("creating", path))?;
        self.next_number += 1;
        Ok((number, LetterFile { handle, bytes: 0 }))
    }

    /// Returns the header of a file that continues the files that count.
    fn header(&self, number: u32) -> FileHeader {
        let before = self.files.last_key_value().map(|(&number, file)| FileEnd { number, bytes: file.bytes });
        FileHeader { number, before, is_complete: false }
    }

    /// Returns `true` if the event is a letter, or has an entry (parked or skipped, ended or not) that is not
    /// forgotten. Such an event must not be offered again after a restart or a seek.
    pub(crate) fn has(&self, key: Key, id: EventId) -> bool {
        self.index.knows(id) || self.waits(key, id)
    }

    /// Returns `true` if there is an event for which [`LetterStore::has`] is `true`.
    pub(crate) fn has_any(&self) -> bool {
        self.index.knows_any() || self.len() > 0
    }

    /// Returns `true` if the event is a waiting letter.
    pub(crate) fn waits(&self, key: Key, id: EventId) -> bool {
        self.index.bytes_of((key, id.offset)).is_some()
    }

    /// Returns `true` if the event may have had an entry that is forgotten.
    pub(crate) fn may_have_forgotten(&self, id: EventId) -> bool {
        self.index.may_have_forgotten(id)
    }

    /// Forgets entries of events below the consumer's durable position `offset`, except waiting letters. The position
    /// says that they are done.
    pub(crate) fn forget_below(&mut self, shard: ShardId, offset: Offset) {
        self.index.forget_below(shard, offset);
    }

    /// Forgets all entries except waiting letters, also for later restarts. Call it after the consumer was set to
    /// another position and that position is durable. Events that were handled, discarded or skipped may be offered and
    /// recorded again.
    ///
    /// # Errors
    /// After a restart the entries are known again.
    pub(crate) fn forget_ended(&mut self) -> Result<(), LettersError> {
        let LetterStatistics { handled, discarded, skipped, .. } = self.statistics();
        self.index.forget_ended();
        if handled + discarded + skipped > 0 {
            // A new file holds nothing of the ended letters but their counts.
            self.compact()?;
        }
        Ok(())
    }

    /// Counts the waiting letters of a key.
    #[cfg(test)]
    pub(crate) fn letters_of(&self, key: Key) -> u32 {
        self.index.letters_of(key).count() as u32
    }

    /// Returns the keys that have letters, each with its shard and the number waiting.
    pub(crate) fn keys(&self) -> impl Iterator<Item = (Key, ShardId, u32)> {
        self.index.keys()
    }

    /// Returns a key's letters, oldest first.
    pub(crate) fn ids_of(&self, key: Key) -> impl Iterator<Item = EventId> {
        self.index.letters_of(key)
    }

    /// Returns the oldest letter of a key.
    pub(crate) fn oldest_of(&self, key: Key) -> Option<EventId> {
        self.index.letters_of(key).next()
    }

    /// Returns the end of the durable letters. If the next opening finds less, letters were lost.
    pub(crate) fn durable(&self) -> FileEnd {
        self.durable
    }

    /// Returns the number of waiting letters.
    pub(crate) fn len(&self) -> usize {
        self.index.len()
    }

    pub(crate) fn statistics(&self) -> LetterStatistics {
        self.index.statistics()
    }

    /// Returns up to `max` letters that follow `after`, ordered by key and offset.
    pub(crate) fn list(&self, after: Option<(Key, Offset)>, max: usize) -> Result<Vec<DeadLetter>, LettersError> {
        let mut entry = Vec::new();
        self.index.names_after(after).take(max).map(|name| self.letter(name, &mut entry)).collect()
    }

    /// Does the same as [`LetterStore::list`], with the archives.
    pub(crate) fn list_with_archives(
        &self,
        after: Option<(Key, Offset)>,
        max: usize,
    ) -> Result<Vec<(DeadLetter, Archive)>, LettersError> {
        let mut entry = Vec::new();
        let letter = |name| Ok((self.letter(name, &mut entry)?, archive_in(&entry)));
        self.index.names_after(after).take(max).map(letter).collect()
    }

    /// Returns one letter with its archive.
    pub(crate) fn show(&self, key: Key, id: EventId) -> Result<Option<(DeadLetter, Archive)>, LettersError> {
        let name = (key, id.offset);
        if self.index.bytes_of(name).is_none() {
            return Ok(None);
        }
        let mut entry = Vec::new();
        let letter = self.letter(name, &mut entry)?;
        if letter.id != id {
            return Ok(None);
        }
        Ok(Some((letter, archive_in(&entry))))
    }

    /// Reads a waiting letter, as of its last attempt. Leaves its first entry in `entry`.
    fn letter(&self, name: LetterName, entry: &mut Vec<u8>) -> Result<DeadLetter, LettersError> {
        let (place, again) = self.index.places(name).expect("the letter is waiting");
        let mut changes = None;
        if let Some(again) = again {
            changes = Some(self.read(again, entry, |stored| Ok((stored.attempts()?, stored.time())))?);
        }
        let mut letter = self.read(place, entry, |stored| stored.letter())?;
        if let Some(((attempts, error), time)) = changes {
            (letter.attempts, letter.error, letter.last_failed) = (attempts, error, time);
        }
        Ok(letter)
    }

    fn read<T>(
        &self,
        place: EntryPlace,
        entry: &mut Vec<u8>,
        decode: impl FnOnce(&StoredEntry<'_>) -> Result<T, &'static str>,
    ) -> Result<T, LettersError> {
        let EntryPlace { file, bytes, .. } = place;
        read_entry(&self.files[&file], file, place.at(), entry, bytes as usize)
            .and_then(|()| StoredEntry::decode(entry).and_then(|stored| decode(&stored)).map_err(ReadFault::Damaged))
            .map_err(|fault| fault.of(path(&self.dir, file), place.at()))
    }
}

/// Returns the archive in the entry of a letter that was read.
fn archive_in(entry: &[u8]) -> Archive {
    let bytes = StoredEntry::decode(entry).expect("the entry was decoded before").archive();
    // An empty vector without an allocation would not be aligned.
    let mut archive = Archive::with_capacity(bytes.len().max(1));
    archive.extend_from_slice(bytes);
    archive
}

/// Opens the letters in a folder read-only, while another process may be writing to it. The caller must have read
/// `known`, the end of the durable letters, before this call.
pub(crate) fn open_outside(
    storage: &Arc<dyn Storage>,
    dir: &Path,
    known: FileEnd,
    shards: usize,
) -> Result<LetterStore, OpenError> {
    /// Number of tries: compaction may replace the files during a try.
    const TRIES: usize = 8;
    let mut tries = 0;
    loop {
        tries += 1;
        match LetterStore::load(Arc::clone(storage), dir, DeadLetterPolicy::default(), known, shards, OpenMode::Outside)
        {
            Err(OpenError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound && tries < TRIES => {}
            letters => return letters,
        }
    }
}

/// Returns statistics of the letters in a folder that has no writer. Changes nothing.
pub(super) fn statistics_of(
    storage: &Arc<dyn Storage>,
    dir: &Path,
    known: FileEnd,
    shards: usize,
) -> Result<LetterStatistics, OpenError> {
    let letters =
        LetterStore::load(Arc::clone(storage), dir, DeadLetterPolicy::default(), known, shards, OpenMode::Outside)?;
    Ok(letters.statistics())
}

#[cfg(test)]
mod tests;
