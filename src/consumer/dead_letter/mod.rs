//! Dead letters: the durable records of one consumer. What it set aside, what it skipped, and what became of them.
//!
//! One writer: the consumer's driver thread. What a write said is durable is there after any crash, and a batch is there
//! whole or not at all. Bytes whose fate is unknown are never written behind, and no sync is tried twice.
//!
//! ```text
//!  Parked ─▶ a letter waits ─▶ FailedAgain ─▶ still waits
//!                 │  └─▶ Handled
//!                 └────▶ Discarded, by somebody or to make room
//! ```
//!
//! Memory, measured with a million letters: 52 to 67 bytes a letter, its place only; 37 more while the checkpoint is not
//! past it, as for every skipped event; and as much as a letter again for one that failed again. Nothing of an error or
//! an archive.

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

use answer::{DeadLetter, DeadLetterPolicy, Entry, LetterStatistics, LettersError, WriteRefused, Written};
pub(super) use files::is_letters_name;
use files::{Access, Held, ReadFault, load, path, read_entry};
pub(super) use format::FileEnd;
use format::{EntryBatch, FileHeader, StoredEntry};
use index::{Index, Name, Noted, Place};

/// A longer file is not written on.
const FILE_BYTES_MAX: u64 = 1 << 30;

/// Archives are handed out at addresses that their types may need.
pub(crate) type Archive = AlignedVec<16>;

/// The letters of one consumer.
#[derive(Debug)]
pub(crate) struct Letters {
    storage: Arc<dyn Storage>,
    dir: PathBuf,
    policy: DeadLetterPolicy,
    index: Index,
    /// Files that count, by number.
    files: BTreeMap<u32, Held>,
    /// The file that may be written on: of this life, and without a failed write.
    tail: Option<Tail>,
    /// Letters are durable up to here.
    durable: FileEnd,
    next_number: u32,
    /// The next letters to make room, oldest first. Some may be gone.
    oldest: VecDeque<Name>,
}

#[derive(Debug, Clone, Copy)]
struct Tail {
    number: u32,
    /// Of the next batch.
    batch: u32,
}

/// What of a batch is written, and what goes for it.
#[derive(Debug, Default)]
struct Plan<'a> {
    entries: Vec<Entry<'a>>,
    overflowed: Vec<(Key, EventId)>,
    /// Events that get their first entry.
    recorded: BTreeSet<EventId>,
    /// Letters that go.
    ended: BTreeSet<Name>,
    letters_added: usize,
    bytes_added: u64,
    bytes_ended: u64,
    time: Time,
}

impl Letters {
    /// Opens the letters in `dir` of a store with `shards` shards; they must reach to `known`. Creates nothing where there are none yet.
    pub(crate) fn open(
        storage: Arc<dyn Storage>,
        dir: &Path,
        policy: DeadLetterPolicy,
        known: FileEnd,
        shards: usize,
    ) -> Result<Self, OpenError> {
        policy.check()?;
        Self::load(storage, dir, policy, known, shards, Access::Own)
    }

    fn load(
        storage: Arc<dyn Storage>,
        dir: &Path,
        policy: DeadLetterPolicy,
        known: FileEnd,
        shards: usize,
        access: Access,
    ) -> Result<Self, OpenError> {
        let mut index = Index::default();
        let mut strange = None;
        let loaded = load(&*storage, dir, access, known, |noted| {
            if usize::from(noted.id.shard.0) >= shards {
                strange.get_or_insert(noted.place);
            }
            index.apply(noted);
        })?;
        if let Some(place) = strange {
            let (path, at) = (path(dir, place.file), place.at());
            return Err(OpenError::DamagedFile { path, at, why: "an entry of a shard that the store does not have" });
        }
        let (durable, files::Loaded { files, next_number }) = (loaded.end(), loaded);
        let dir = dir.to_owned();
        Ok(Self { storage, dir, policy, index, files, tail: None, durable, next_number, oldest: VecDeque::new() })
    }

    /// Records a batch: all of it is durable then. Entries that say nothing new are left out: of an event that is known,
    /// or of a letter that is not there.
    ///
    /// # Errors
    /// Nothing of the batch counts. After a further write it does not count after a restart either; before one, it may be
    /// there after a restart, whole.
    pub(crate) fn write(&mut self, entries: &[Entry<'_>]) -> Result<Written, WriteRefused> {
        let mut plan = Plan::default();
        for entry in entries {
            self.accept(&mut plan, entry);
        }
        let written = self.make_room(&mut plan).and_then(|()| self.put(&plan));
        if written.is_err() {
            // Some were taken from it and are still there.
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
                assert!(!plan.recorded.contains(&id), "a letter is dealt with when it is durable");
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

    /// Writes and syncs what was planned; then it counts.
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
                let (number, held) = self.begin_file()?;
                (number, EntryBatch::new(number, 0, 0, &self.header(number).encode()), Some(held))
            }
        };
        for &(key, id) in &plan.overflowed {
            batch.add_overflowed(id, key, plan.time);
        }
        for entry in &plan.entries {
            batch.add(entry);
        }
        let is_fresh = fresh.is_some();
        let held = fresh.as_ref().unwrap_or_else(|| &self.files[&number]);
        let io = |action, path| move |source| WriteRefused::Io { action, path, source };
        held.handle.append(batch.seal()).map_err(io("writing", path(&self.dir, number)))?;
        held.handle.sync().map_err(io("syncing", path(&self.dir, number)))?;
        if is_fresh {
            self.storage.sync_dir(&self.dir).map_err(io("syncing", self.dir.clone()))?;
        }
        self.files.extend(fresh.map(|held| (number, held)));
        for (at, entry) in batch.entries() {
            self.index.apply(&Noted::new(&entry, number, at));
        }
        let held = self.files.get_mut(&number).expect("written to");
        held.bytes += batch.len() as u64;
        self.tail = Some(Tail { number, batch: batch.number() + 1 });
        self.durable = FileEnd { number, bytes: held.bytes };
        Ok(())
    }

    /// An empty file. Its number is used, whatever becomes of it.
    fn begin_file(&mut self) -> Result<(u32, Held), WriteRefused> {
        let number = self.next_number;
        let io = |action, path| move |source| WriteRefused::Io { action, path, source };
        self.storage.create_dir(&self.dir).map_err(io("creating", self.dir.clone()))?;
        let path = path(&self.dir, number);
        let handle = self.storage.create_side(&path).map_err(io("creating", path))?;
        self.next_number += 1;
        Ok((number, Held { handle, bytes: 0 }))
    }

    /// The header of a file that goes on from what counts now.
    fn header(&self, number: u32) -> FileHeader {
        let before = self.files.last_key_value().map(|(&number, held)| FileEnd { number, bytes: held.bytes });
        FileHeader { number, before, is_complete: false }
    }

    /// Whether the key's event is a letter now, or has an entry (as parked or skipped, dealt with or not) that nobody has forgotten:
    /// it is not to be offered, after a restart or where a consumer was set back.
    pub(crate) fn has(&self, key: Key, id: EventId) -> bool {
        self.index.knows(id) || self.waits(key, id)
    }

    /// Whether there is any event that [`Letters::has`].
    pub(crate) fn has_any(&self) -> bool {
        self.index.knows_any() || self.len() > 0
    }

    /// Whether the event is a letter that waits.
    pub(crate) fn waits(&self, key: Key, id: EventId) -> bool {
        self.index.bytes_of((key, id.offset)).is_some()
    }

    /// Whether the event may have had an entry that is forgotten.
    pub(crate) fn may_have_forgotten(&self, id: EventId) -> bool {
        self.index.may_have_forgotten(id)
    }

    /// The consumer's checkpoint is durable at `offset`: nobody will ask about events below.
    pub(crate) fn forget_below(&mut self, shard: ShardId, offset: Offset) {
        self.index.forget_below(shard, offset);
    }

    /// The consumer is set elsewhere, and its checkpoint is durable: only letters that wait are known of from here on, also after a
    /// restart. What was handled, discarded or skipped may be offered and recorded again.
    ///
    /// # Errors
    /// They are known again after a restart.
    pub(crate) fn forget_ended(&mut self) -> Result<(), LettersError> {
        let LetterStatistics { handled, discarded, skipped, .. } = self.statistics();
        self.index.forget_ended();
        if handled + discarded + skipped > 0 {
            // A new file has nothing of them but their counts.
            self.compact()?;
        }
        Ok(())
    }

    /// How many letters of a key wait. Counts them.
    #[cfg(test)]
    pub(crate) fn letters_of(&self, key: Key) -> u32 {
        self.index.letters_of(key).count() as u32
    }

    /// The keys that have letters, with their shard and how many wait.
    pub(crate) fn keys(&self) -> impl Iterator<Item = (Key, ShardId, u32)> {
        self.index.keys()
    }

    /// A key's letters, oldest first.
    pub(crate) fn ids_of(&self, key: Key) -> impl Iterator<Item = EventId> {
        self.index.letters_of(key)
    }

    /// The letter of a key that is to be dealt with first.
    pub(crate) fn oldest_of(&self, key: Key) -> Option<EventId> {
        self.index.letters_of(key).next()
    }

    /// Up to where letters are durable: what is less at another opening has lost some.
    pub(crate) fn durable(&self) -> FileEnd {
        self.durable
    }

    /// How many letters wait.
    pub(crate) fn len(&self) -> usize {
        self.index.len()
    }

    pub(crate) fn statistics(&self) -> LetterStatistics {
        self.index.statistics()
    }

    /// Up to `max` letters by key, and by offset in each, from behind `after` on.
    pub(crate) fn list(&self, after: Option<(Key, Offset)>, max: usize) -> Result<Vec<DeadLetter>, LettersError> {
        let mut entry = Vec::new();
        self.index.names_after(after).take(max).map(|name| self.letter(name, &mut entry)).collect()
    }

    /// As [`Letters::list`], with their archives.
    pub(crate) fn list_with_archives(
        &self,
        after: Option<(Key, Offset)>,
        max: usize,
    ) -> Result<Vec<(DeadLetter, Archive)>, LettersError> {
        let mut entry = Vec::new();
        let letter = |name| Ok((self.letter(name, &mut entry)?, archive_in(&entry)));
        self.index.names_after(after).take(max).map(letter).collect()
    }

    /// One letter with its archive.
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

    /// A letter that is there, as it is after its last attempt. Its first entry is left in `entry`.
    fn letter(&self, name: Name, entry: &mut Vec<u8>) -> Result<DeadLetter, LettersError> {
        let (place, again) = self.index.places(name).expect("a letter that is there");
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
        place: Place,
        entry: &mut Vec<u8>,
        decode: impl FnOnce(&StoredEntry<'_>) -> Result<T, &'static str>,
    ) -> Result<T, LettersError> {
        let Place { file, bytes, .. } = place;
        read_entry(&self.files[&file], file, place.at(), entry, bytes as usize)
            .and_then(|()| StoredEntry::decode(entry).and_then(|stored| decode(&stored)).map_err(ReadFault::Damaged))
            .map_err(|fault| fault.of(path(&self.dir, file), place.at()))
    }
}

/// The archive in the entry of a letter that was read.
fn archive_in(entry: &[u8]) -> Archive {
    let bytes = StoredEntry::decode(entry).expect("it was read").archive();
    // Without memory of its own it would not be aligned.
    let mut archive = Archive::with_capacity(bytes.len().max(1));
    archive.extend_from_slice(bytes);
    archive
}

/// The letters in a folder that somebody else may be writing to. Nothing is changed, and nothing may be written. What is `known` to
/// have been durable was asked before.
pub(crate) fn open_outside(
    storage: &Arc<dyn Storage>,
    dir: &Path,
    known: FileEnd,
    shards: usize,
) -> Result<Letters, OpenError> {
    /// While it looks, files may be replaced by a smaller one.
    const TRIES: usize = 8;
    let mut tries = 0;
    loop {
        tries += 1;
        match Letters::load(Arc::clone(storage), dir, DeadLetterPolicy::default(), known, shards, Access::Outside) {
            Err(OpenError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound && tries < TRIES => {}
            letters => return letters,
        }
    }
}

/// Statistics of the letters in a folder that has no writer. Changes nothing.
pub(super) fn statistics_of(
    storage: &Arc<dyn Storage>,
    dir: &Path,
    known: FileEnd,
    shards: usize,
) -> Result<LetterStatistics, OpenError> {
    let letters = Letters::load(Arc::clone(storage), dir, DeadLetterPolicy::default(), known, shards, Access::Outside)?;
    Ok(letters.statistics())
}

#[cfg(test)]
mod tests;
