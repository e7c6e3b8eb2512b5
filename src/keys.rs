//! The key table of one shard: per key its version and the head of its chain. One writer: the owning shard.
//!
//! 256 open-addressing parts, chosen by the hash's top byte, each at most half full, so that most keys are found at the first look. A part grows by
//! itself, so the longest pause of a growing table is 1/256 of a rehash. A turn first prefetches the
//! slots of a whole batch: with a million keys every look-up would otherwise wait for memory.

use crate::event::{Key, Offset, Version};
use crate::sync::prefetch;

const PARTS: usize = 256;
const SLOTS_MIN: usize = 8;

/// What a shard knows of a key. Two to a cache line.
#[derive(Debug, Clone, Copy)]
#[repr(align(32))]
pub(crate) struct Slot {
    key: Key,
    /// 0: the slot is free.
    pub(crate) version: Version,
    /// The key's newest record.
    pub(crate) head: Offset,
}

const _: () = assert!(size_of::<Slot>() == 32);

const FREE: Slot = Slot { key: Key(0), version: Version(0), head: Offset(0) };

#[derive(Debug)]
struct Part {
    slots: Box<[Slot]>,
    used: usize,
}

/// Versions and chain heads by key.
#[derive(Debug)]
pub(crate) struct KeyTable {
    parts: Box<[Part; PARTS]>,
}

impl KeyTable {
    /// A table that holds about `keys_expected` keys before parts grow.
    pub(crate) fn new(keys_expected: usize) -> Self {
        let per_part = keys_expected.div_ceil(PARTS);
        let slots = (per_part * 2 + 1).next_power_of_two().max(SLOTS_MIN);
        let part = || Part { slots: vec![FREE; slots].into_boxed_slice(), used: 0 };
        Self { parts: Box::new(std::array::from_fn(|_| part())) }
    }

    /// Asks for the slot of the key with this hash to be brought near.
    #[inline]
    pub(crate) fn prefetch(&self, hash: u64) {
        let part = &self.parts[part_of(hash)];
        prefetch(&part.slots[slot_of(hash, part.slots.len())]);
    }

    /// The place of `key`, which stays as it is until [`Entry::set`].
    #[inline]
    pub(crate) fn entry(&mut self, key: Key, hash: u64) -> Entry<'_> {
        let part = &mut self.parts[part_of(hash)];
        let first = slot_of(hash, part.slots.len());
        let at = if part.slots[first].key == key && part.slots[first].version.0 != 0 { first } else { part.find_or_make_room(key, hash) };
        Entry { slot: &mut part.slots[at], used: &mut part.used, key }
    }

    /// What is known of `key`.
    #[cfg(test)]
    #[inline]
    pub(crate) fn get(&self, key: Key) -> Option<&Slot> {
        let hash = key.hash();
        let part = &self.parts[part_of(hash)];
        let slot = &part.slots[part.find(key, hash)];
        (slot.version.0 != 0).then_some(slot)
    }

    /// Number of keys.
    pub(crate) fn len(&self) -> usize {
        self.parts.iter().map(|part| part.used).sum()
    }
}

/// The place of one key.
#[derive(Debug)]
pub(crate) struct Entry<'a> {
    slot: &'a mut Slot,
    used: &'a mut usize,
    key: Key,
}

impl Entry<'_> {
    /// The key's version; 0 where it has no event yet.
    #[inline]
    pub(crate) fn version(&self) -> Version {
        self.slot.version
    }

    /// The key's newest record; 0 where it has none.
    #[inline]
    pub(crate) fn head(&self) -> Offset {
        self.slot.head
    }

    /// A record of this key was appended.
    #[inline]
    pub(crate) fn set(self, version: Version, head: Offset) {
        debug_assert!(version.0 > 0);
        if self.slot.version.0 == 0 {
            *self.used += 1;
        }
        *self.slot = Slot { key: self.key, version, head };
    }
}

impl Part {
    /// Where `key` is, or the free slot where it belongs. A part is never full, so this ends.
    #[inline]
    fn find(&self, key: Key, hash: u64) -> usize {
        let mask = self.slots.len() - 1;
        let mut at = slot_of(hash, self.slots.len());
        loop {
            let slot = &self.slots[at];
            if slot.version.0 == 0 || slot.key == key {
                return at;
            }
            at = (at + 1) & mask;
        }
    }

    /// As `find`, for keys that may be new: where the part would be too full with one more, it grows first.
    #[inline(never)]
    fn find_or_make_room(&mut self, key: Key, hash: u64) -> usize {
        let at = self.find(key, hash);
        if self.slots[at].version.0 != 0 || (self.used + 1) * 2 <= self.slots.len() {
            return at;
        }
        self.grow();
        self.find(key, hash)
    }

    #[cold]
    fn grow(&mut self) {
        let bigger = vec![FREE; self.slots.len() * 2].into_boxed_slice();
        let old = std::mem::replace(&mut self.slots, bigger);
        for slot in old.iter().filter(|slot| slot.version.0 != 0) {
            let at = self.find(slot.key, slot.key.hash());
            self.slots[at] = *slot;
        }
    }
}

// The shard number takes the hash's top bits by multiply-high, so the part is taken from the lowest
// and the slot from the middle: independent of both the shard and the part.
#[inline]
fn part_of(hash: u64) -> usize {
    (hash & 0xff) as usize
}

#[inline]
fn slot_of(hash: u64, slots: usize) -> usize {
    ((hash >> 8) as usize) & (slots - 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    #[test]
    fn agrees_with_a_hash_map_while_growing() {
        let mut table = KeyTable::new(0);
        let mut model = HashMap::new();
        let mut x = 1_u64;
        for round in 0..200_000_u64 {
            x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            // Key 0 is a key like any other.
            let key = Key((x >> 33) % 50_000);
            let entry = table.entry(key, key.hash());
            let expected = model.entry(key).or_insert((0_u64, 0_u64));
            assert_eq!((entry.version().0, entry.head().0), *expected);
            *expected = (expected.0 + 1, round);
            entry.set(Version(expected.0), Offset(round));
        }
        assert_eq!(table.len(), model.len());
        for (key, (version, head)) in &model {
            let slot = table.get(*key).expect("every key is found");
            assert_eq!((slot.version.0, slot.head.0), (*version, *head));
        }
        assert!(table.get(Key(u64::MAX)).is_none());
    }
}
