//! What is known of the letters without reading them: where each stands, and which events had an entry.
//!
//! It changes by entries alone, the same when they are written and when they are read at opening.

use std::collections::{BTreeMap, BTreeSet};

use crate::event::{EventId, Key, Offset, ShardId};

use super::answer::LetterStatistics;
use super::format::{ALIGN, Change, ENTRY_BYTES, StoredEntry, Totals};

/// Where an entry stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    pub(super) file: u32,
    /// In steps of [`ALIGN`]: a file of 32 GiB can be named.
    step: u32,
    pub(super) bytes: u32,
}

impl Place {
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
pub(super) struct Noted {
    pub(super) change: Change,
    pub(super) id: EventId,
    key: Key,
    pub(super) place: Place,
}

impl Noted {
    pub(super) fn new(entry: &StoredEntry<'_>, file: u32, at: u64) -> Self {
        let StoredEntry { change, id, key, .. } = *entry;
        Self { change, id, key, place: Place::new(file, at, entry.len()) }
    }
}

/// A letter's name here: within a key letters stand in the order of the log.
pub(super) type Name = (Key, Offset);

#[derive(Debug, Default)]
pub(super) struct Index {
    letters: BTreeMap<Name, (Place, ShardId)>,
    /// Of letters that failed again: where the newest entry says so.
    again: BTreeMap<Name, Place>,
    /// Events at or above the checkpoint that have an entry.
    known: BTreeSet<EventId>,
    /// The last event of a shard of which an entry was forgotten.
    forgotten: BTreeMap<ShardId, Offset>,
    totals: Totals,
    letter_bytes: u64,
    again_bytes: u64,
}

impl Index {
    pub(super) fn apply(&mut self, noted: &Noted) {
        let name = (noted.key, noted.id.offset);
        match noted.change {
            Change::Parked => self.park(name, noted),
            Change::Skipped => {
                self.known.insert(noted.id);
                self.totals.skipped += 1;
            }
            Change::FailedAgain if self.letters.contains_key(&name) => {
                self.again_bytes += u64::from(noted.place.bytes);
                let replaced = self.again.insert(name, noted.place);
                self.again_bytes -= replaced.map_or(0, |place| u64::from(place.bytes));
            }
            Change::Handled => self.totals.handled += u64::from(self.end(name)),
            Change::Discarded { is_overflow } => {
                let ended = u64::from(self.end(name));
                self.totals.discarded += ended;
                self.totals.overflowed += if is_overflow { ended } else { 0 };
            }
            Change::Known => drop(self.known.insert(noted.id)),
            Change::Totals(totals) => self.totals = totals,
            Change::FailedAgain => {}
        }
    }

    /// The first entry of a letter stays.
    fn park(&mut self, name: Name, noted: &Noted) {
        self.known.insert(noted.id);
        self.letters.entry(name).or_insert_with(|| {
            self.totals.parked += 1;
            self.letter_bytes += u64::from(noted.place.bytes);
            (noted.place, noted.id.shard)
        });
    }

    /// A letter goes. `false` where there is none.
    fn end(&mut self, name: Name) -> bool {
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

    /// Of events that had an entry, only letters that wait are known still.
    pub(super) fn forget_ended(&mut self) {
        let id = |(&(_, offset), &(_, shard)): (&Name, &(Place, ShardId))| EventId { shard, offset };
        let letters = self.letters.iter().map(id).collect();
        for id in std::mem::replace(&mut self.known, letters) {
            if !self.known.contains(&id) {
                self.forget(id);
            }
        }
    }

    /// A letter's bytes, if it is one that waits.
    pub(super) fn bytes_of(&self, name: Name) -> Option<u64> {
        self.letters.get(&name).map(|(place, _)| u64::from(place.bytes))
    }

    pub(super) fn shard_of(&self, name: Name) -> Option<ShardId> {
        self.letters.get(&name).map(|&(_, shard)| shard)
    }

    /// Where a letter stands, and where what it came to since.
    pub(super) fn places(&self, name: Name) -> Option<(Place, Option<Place>)> {
        let (place, _) = self.letters.get(&name)?;
        Some((*place, self.again.get(&name).copied()))
    }

    pub(super) fn letters_of(&self, key: Key) -> impl Iterator<Item = EventId> {
        let letters = self.letters.range((key, Offset(0))..=(key, Offset(u64::MAX)));
        letters.map(|(&(_, offset), &(_, shard))| EventId { shard, offset })
    }

    /// Each key with its letters' shard and number.
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

    pub(super) fn names_after(&self, after: Option<Name>) -> impl Iterator<Item = Name> {
        use std::ops::Bound::{Excluded, Unbounded};
        let from = after.map_or(Unbounded, Excluded);
        self.letters.range((from, Unbounded)).map(|(&name, _)| name)
    }

    /// Every letter with its place, which is also its age: what was written first stands first.
    pub(super) fn by_place(&self) -> impl Iterator<Item = (Place, Name)> {
        self.letters.iter().map(|(&name, &(place, _))| (place, name))
    }

    /// Events at or above the checkpoint that had an entry and are no letters any more, in order.
    pub(super) fn known_only(&self) -> Vec<EventId> {
        let id = |(&(_, offset), &(_, shard)): (&Name, &(Place, ShardId))| EventId { shard, offset };
        let mut letters: Vec<EventId> = self.letters.iter().map(id).collect();
        letters.sort_unstable();
        self.known.iter().copied().filter(|id| letters.binary_search(id).is_err()).collect()
    }

    /// Takes over the places of the same letters in another file. What is known stays.
    pub(super) fn move_to(&mut self, moved: Self) {
        assert!(self.letters.keys().eq(moved.letters.keys()), "moving letters loses none");
        assert_eq!(self.totals, moved.totals);
        let (known, forgotten) = (std::mem::take(&mut self.known), std::mem::take(&mut self.forgotten));
        *self = Self { known, forgotten, ..moved };
    }

    pub(super) fn len(&self) -> usize {
        self.letters.len()
    }

    /// Bytes that the files must keep, about: a letter above the checkpoint counts a little more than it takes.
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
