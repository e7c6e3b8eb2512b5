//! The index of the letters: the place of each letter's entries, and the events that had an entry.
//!
//! Only entries change the index: in the same way when they are written and when they are read at opening.

use std::collections::{BTreeMap, BTreeSet};

use crate::event::{EventId, Key, Offset, ShardId};

use super::answer::LetterStatistics;
use super::format::{ALIGN, Change, ENTRY_BYTES, StoredEntry, Totals};

/// The place of an entry in the files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct EntryPlace {
    pub(super) file: u32,
    /// The offset in units of [`ALIGN`], enough for files of 32 GiB.
    step: u32,
    pub(super) bytes: u32,
}

impl EntryPlace {
    pub(super) fn new(file: u32, at: u64, bytes: usize) -> Self {
        let step = u32::try_from(at / ALIGN as u64).expect("files are far shorter than 32 GiB");
        Self { file, step, bytes: bytes as u32 }
    }

    pub(super) fn at(self) -> u64 {
        u64::from(self.step) * ALIGN as u64
    }
}

/// An entry without its content.
#[derive(Debug, Clone, Copy)]
pub(super) struct EntrySummary {
    pub(super) change: Change,
    pub(super) id: EventId,
    key: Key,
    pub(super) place: EntryPlace,
}

impl EntrySummary {
    pub(super) fn new(entry: &StoredEntry<'_>, file: u32, at: u64) -> Self {
        let StoredEntry { change, id, key, .. } = *entry;
        Self { change, id, key, place: EntryPlace::new(file, at, entry.len()) }
    }
}

/// Identifies a letter. Letters of one key are ordered as in the log.
pub(super) type LetterName = (Key, Offset);

#[derive(Debug, Default)]
pub(super) struct LetterIndex {
    letters: BTreeMap<LetterName, (EntryPlace, ShardId)>,
    /// The newest entry of each letter that failed again.
    again: BTreeMap<LetterName, EntryPlace>,
    /// Events at or above the consumer's saved position that have an entry.
    known: BTreeSet<EventId>,
    /// Each shard's last event whose entry was forgotten.
    forgotten: BTreeMap<ShardId, Offset>,
    totals: Totals,
    letter_bytes: u64,
    again_bytes: u64,
}

impl LetterIndex {
    pub(super) fn apply(&mut self, entry: &EntrySummary) {
        let name = (entry.key, entry.id.offset);
        match entry.change {
            Change::Parked => self.park(name, entry),
            Change::Skipped => {
                self.known.insert(entry.id);
                self.totals.skipped += 1;
            }
            Change::FailedAgain if self.letters.contains_key(&name) => {
                self.again_bytes += u64::from(entry.place.bytes);
                let replaced = self.again.insert(name, entry.place);
                self.again_bytes -= replaced.map_or(0, |place| u64::from(place.bytes));
            }
            Change::Handled => self.totals.handled += u64::from(self.end(name)),
            Change::Discarded { is_overflow } => {
                let ended = u64::from(self.end(name));
                self.totals.discarded += ended;
                self.totals.overflowed += if is_overflow { ended } else { 0 };
            }
            Change::Known => drop(self.known.insert(entry.id)),
            Change::Totals(totals) => self.totals = totals,
            Change::FailedAgain => {}
        }
    }

    /// Adds a letter. A repeated first entry changes nothing.
    fn park(&mut self, name: LetterName, entry: &EntrySummary) {
        self.known.insert(entry.id);
        self.letters.entry(name).or_insert_with(|| {
            self.totals.parked += 1;
            self.letter_bytes += u64::from(entry.place.bytes);
            (entry.place, entry.id.shard)
        });
    }

    /// Removes a letter. Returns `false` if there is none.
    fn end(&mut self, name: LetterName) -> bool {
        let Some((place, _)) = self.letters.remove(&name) else { return false };
        self.letter_bytes -= u64::from(place.bytes);
        self.again_bytes -= self.again.remove(&name).map_or(0, |place| u64::from(place.bytes));
        true
    }

    pub(super) fn knows(&self, id: EventId) -> bool {
        self.known.contains(&id)
    }

    pub(super) fn knows_any(&self) -> bool {
        !self.known.is_empty()
    }

    pub(super) fn forget_below(&mut self, shard: ShardId, offset: Offset) {
        let below = EventId { shard, offset: Offset(0) }..EventId { shard, offset };
        while let Some(&id) = self.known.range(below.clone()).next() {
            self.known.remove(&id);
            self.forget(id);
        }
    }

    fn forget(&mut self, id: EventId) {
        let last = self.forgotten.entry(id.shard).or_insert(id.offset);
        *last = id.offset.max(*last);
    }

    pub(super) fn may_have_forgotten(&self, id: EventId) -> bool {
        self.forgotten.get(&id.shard).is_some_and(|last| id.offset <= *last)
    }

    /// Forgets all events that had an entry, except waiting letters.
    pub(super) fn forget_ended(&mut self) {
        let id = |(&(_, offset), &(_, shard)): (&LetterName, &(EntryPlace, ShardId))| EventId { shard, offset };
        let letters = self.letters.iter().map(id).collect();
        for id in std::mem::replace(&mut self.known, letters) {
            if !self.known.contains(&id) {
                self.forget(id);
            }
        }
    }

    /// Returns the size of a letter's entry, if the letter is waiting.
    pub(super) fn bytes_of(&self, name: LetterName) -> Option<u64> {
        self.letters.get(&name).map(|(place, _)| u64::from(place.bytes))
    }

    pub(super) fn shard_of(&self, name: LetterName) -> Option<ShardId> {
        self.letters.get(&name).map(|&(_, shard)| shard)
    }

    /// Returns the places of a letter's first entry and of its newest one, if it failed again.
    pub(super) fn places(&self, name: LetterName) -> Option<(EntryPlace, Option<EntryPlace>)> {
        let (place, _) = self.letters.get(&name)?;
        Some((*place, self.again.get(&name).copied()))
    }

    pub(super) fn letters_of(&self, key: Key) -> impl Iterator<Item = EventId> {
        let letters = self.letters.range((key, Offset(0))..=(key, Offset(u64::MAX)));
        letters.map(|(&(_, offset), &(_, shard))| EventId { shard, offset })
    }

    /// Returns each key with its shard and its number of letters.
    pub(super) fn keys(&self) -> impl Iterator<Item = (Key, ShardId, u32)> {
        let mut letters = self.letters.iter().map(|(&(key, _), &(_, shard))| (key, shard)).peekable();
        std::iter::from_fn(move || {
            let (key, shard) = letters.next()?;
            let mut count = 1;
            while letters.next_if(|(next, _)| *next == key).is_some() {
                count += 1;
            }
            Some((key, shard, count))
        })
    }

    pub(super) fn names_after(&self, after: Option<LetterName>) -> impl Iterator<Item = LetterName> {
        use std::ops::Bound::{Excluded, Unbounded};
        let from = after.map_or(Unbounded, Excluded);
        self.letters.range((from, Unbounded)).map(|(&name, _)| name)
    }

    /// Returns every letter with its place. Places are ordered by age: entries are appended.
    pub(super) fn by_place(&self) -> impl Iterator<Item = (EntryPlace, LetterName)> {
        self.letters.iter().map(|(&name, &(place, _))| (place, name))
    }

    /// Returns the events at or above the saved position that had an entry and are no longer letters, in order.
    pub(super) fn known_only(&self) -> Vec<EventId> {
        let id = |(&(_, offset), &(_, shard)): (&LetterName, &(EntryPlace, ShardId))| EventId { shard, offset };
        let mut letters: Vec<EventId> = self.letters.iter().map(id).collect();
        letters.sort_unstable();
        self.known.iter().copied().filter(|id| letters.binary_search(id).is_err()).collect()
    }

    /// Replaces the places of all letters by those of the same letters in another file. The known events stay.
    pub(super) fn move_to(&mut self, moved: Self) {
        assert!(self.letters.keys().eq(moved.letters.keys()), "moving letters loses none");
        assert_eq!(self.totals, moved.totals);
        let (known, forgotten) = (std::mem::take(&mut self.known), std::mem::take(&mut self.forgotten));
        *self = Self { known, forgotten, ..moved };
    }

    pub(super) fn len(&self) -> usize {
        self.letters.len()
    }

    /// Estimates the bytes that the files must keep. A letter above the saved position counts a little more than it
    /// takes.
    pub(super) fn needed_bytes(&self) -> u64 {
        self.letter_bytes + self.again_bytes + (self.known.len() * ENTRY_BYTES) as u64
    }

    pub(super) fn totals(&self) -> Totals {
        self.totals
    }

    pub(super) fn statistics(&self) -> LetterStatistics {
        let Totals { parked, handled, discarded, overflowed, skipped } = self.totals;
        let (letters, bytes) = (self.letters.len(), self.letter_bytes);
        LetterStatistics { letters, bytes, parked, handled, discarded, overflowed, skipped }
    }
}
