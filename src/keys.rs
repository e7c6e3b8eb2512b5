//! The key table of one shard: per key its version and the head of its chain. One writer: the owning shard.
//!
//! 64 open-addressing parts, chosen by the hash's low bits, each at most half full. A part grows by
//! itself, so the longest pause of a growing table is 1/64 of a rehash. A bucket is one cache line of
//! two slots, so that nearly every key is found in the first line looked at. A turn prefetches the
//! buckets of later events while it appends earlier ones: with a million keys every look-up would
//! otherwise wait for memory.

use crate::event::{Key, KeyHash, Offset, Version};
use crate::sync::prefetch;

const PARTS: usize = 64;
const PART_BITS: u32 = PARTS.trailing_zeros();
const BUCKETS_MIN: usize = 4;

/// What a shard knows of a key.
#[derive(Debug, Clone, Copy)]
#[repr(align(32))]
pub(crate) struct Slot {
    key: Key,
    /// 0: the slot is free.
    version: Version,
    /// The key's newest record.
    head: Offset,
}

const FREE: Slot = Slot { key: Key(0), version: Version(0), head: Offset(0) };

/// One cache line.
#[derive(Debug, Clone, Copy)]
#[repr(align(64))]
struct Bucket([Slot; 2]);

const _: () = assert!(size_of::<Bucket>() == 64);

type Part = Box<[Bucket]>;

/// Versions and chain heads by key.
#[derive(Debug)]
pub(crate) struct KeyTable {
    parts: Box<[Part; PARTS]>,
    used: Box<[usize; PARTS]>,
}

/// A place in a part: bucket and slot.
#[derive(Debug, Clone, Copy)]
struct Place(usize, usize);

impl KeyTable {
    /// A table that holds about `keys_expected` keys before parts grow.
    pub(crate) fn new(keys_expected: usize) -> Self {
        // Two slots a bucket and half of them full: a bucket per key.
        let buckets = (keys_expected.div_ceil(PARTS) + 1).next_power_of_two().max(BUCKETS_MIN);
        Self {
            parts: Box::new(std::array::from_fn(|_| vec![Bucket([FREE; 2]); buckets].into())),
            used: Box::new([0; PARTS]),
        }
    }

    /// Asks for the bucket of the key with this hash to be brought near.
    #[inline]
    pub(crate) fn prefetch(&self, hash: KeyHash) {
        let part = &self.parts[part_of(hash)];
        prefetch(&part[bucket_of(hash, part.len())]);
    }

    /// The place of `key`, which stays as it is until [`Entry::set`].
    #[inline]
    pub(crate) fn entry(&mut self, key: Key, hash: KeyHash) -> Entry<'_> {
        let number = part_of(hash);
        let part = &self.parts[number];
        let at = bucket_of(hash, part.len());
        let [first, second] = &part[at].0;
        // Without a branch between the two: which it is cannot be foreseen.
        let is_second = usize::from(first.key != key);
        let candidate = if is_second == 1 { second } else { first };
        let place = if candidate.key == key && candidate.version.0 != 0 {
            Place(at, is_second)
        } else {
            self.find_or_make_room(key, hash)
        };
        let (part, used) = (&mut self.parts[number], &mut self.used[number]);
        Entry { slot: &mut part[place.0].0[place.1], used, key }
    }

    /// Finds keys that are not where they are looked for first, and places for new ones: where the part
    /// would be too full with one more, it grows first.
    #[inline(never)]
    fn find_or_make_room(&mut self, key: Key, hash: KeyHash) -> Place {
        let number = part_of(hash);
        let part = &mut self.parts[number];
        let place = find(part, key, hash);
        if part[place.0].0[place.1].version.0 != 0 || self.used[number] < part.len() {
            return place;
        }
        grow(part);
        find(part, key, hash)
    }

    /// What is known of `key`.
    #[cfg(test)]
    pub(crate) fn get(&self, key: Key) -> Option<(Version, Offset)> {
        let hash = KeyHash::of(key);
        let part = &self.parts[part_of(hash)];
        let place = find(part, key, hash);
        let slot = &part[place.0].0[place.1];
        (slot.version.0 != 0).then_some((slot.version, slot.head))
    }

    /// Number of keys.
    pub(crate) fn len(&self) -> usize {
        self.used.iter().sum()
    }
}

/// Where `key` is, or the free slot where it belongs. A part is never full, so this ends.
fn find(part: &Part, key: Key, hash: KeyHash) -> Place {
    let mut at = bucket_of(hash, part.len());
    loop {
        for (i, slot) in part[at].0.iter().enumerate() {
            if slot.version.0 == 0 || slot.key == key {
                return Place(at, i);
            }
        }
        at = (at + 1) & (part.len() - 1);
    }
}

#[cold]
fn grow(part: &mut Part) {
    let bigger: Part = vec![Bucket([FREE; 2]); part.len() * 2].into();
    let old = std::mem::replace(part, bigger);
    for slot in old.iter().flat_map(|bucket| &bucket.0).filter(|slot| slot.version.0 != 0) {
        let place = find(part, slot.key, KeyHash::of(slot.key));
        part[place.0].0[place.1] = *slot;
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

// The shard takes the hash's top bits (by multiply-high), the table its low half: the part the lowest of them and
// the bucket those above, all independent of each other. That is enough for 2²⁶ buckets a part.
#[inline]
fn part_of(hash: KeyHash) -> usize {
    hash.0 as usize % PARTS
}

#[inline]
fn bucket_of(hash: KeyHash, buckets: usize) -> usize {
    (hash.0 >> PART_BITS) as usize & (buckets - 1)
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
            let entry = table.entry(key, KeyHash::of(key));
            let expected = model.entry(key).or_insert((0_u64, 0_u64));
            assert_eq!((entry.version().0, entry.head().0), *expected);
            *expected = (expected.0 + 1, round);
            entry.set(Version(expected.0), Offset(round));
        }
        assert_eq!(table.len(), model.len());
        for (key, (version, head)) in &model {
            let (found_version, found_head) = table.get(*key).expect("every key is found");
            assert_eq!((found_version.0, found_head.0), (*version, *head));
        }
        assert!(table.get(Key(u64::MAX)).is_none());
    }
}
