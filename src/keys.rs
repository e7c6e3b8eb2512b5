//! The key table of one shard: per key its version, the head of its chain, and its state. One writer: the owning shard.
//!
//! 64 open-addressing parts, chosen by the hash's low bits, each at most half full. A part grows by
//! itself, so the longest pause of a growing table is 1/64 of a rehash. A bucket is two slots: one cache line where there
//! is no state, two where a state takes up to 32 bytes, so that nearly every key is found where it is looked for first. A turn prefetches the
//! buckets of later events while it appends earlier ones: with a million keys every look-up would
//! otherwise wait for memory.

use crate::event::{Key, KeyHash, Offset, Time, Version};
use crate::sync::prefetch;

const PARTS: usize = 64;
const PART_BITS: u32 = PARTS.trailing_zeros();
const BUCKETS_MIN: usize = 4;

/// What a shard knows of a key.
#[derive(Debug, Clone, Default)]
#[repr(align(32))]
pub(crate) struct Slot<S> {
    pub(crate) key: Key,
    /// 0: the slot is free.
    pub(crate) version: Version,
    /// The key's newest record.
    pub(crate) head: Offset,
    /// The latest time of its events. Kept where there is a state.
    pub(crate) time_max: Time,
    pub(crate) state: S,
}

#[derive(Debug, Clone, Default)]
#[repr(align(64))]
struct Bucket<S>([Slot<S>; 2]);

const _: () = assert!(size_of::<Bucket<()>>() == 64);
const _: () = assert!(size_of::<Bucket<[u64; 4]>>() == 128);

type Part<S> = Box<[Bucket<S>]>;

fn part<S: Default>(buckets: usize) -> Part<S> {
    std::iter::repeat_with(Bucket::default).take(buckets).collect()
}

/// Versions, chain heads and states by key.
#[derive(Debug)]
pub(crate) struct KeyTable<S> {
    parts: Box<[Part<S>; PARTS]>,
    used: Box<[usize; PARTS]>,
}

/// A place in a part: bucket and slot.
#[derive(Debug, Clone, Copy)]
struct Place(usize, usize);

impl<S: Default> KeyTable<S> {
    /// A table that holds about `keys_expected` keys before parts grow.
    pub(crate) fn new(keys_expected: usize) -> Self {
        // Two slots a bucket and half of them full: a bucket per key.
        let buckets = (keys_expected.div_ceil(PARTS) + 1).next_power_of_two().max(BUCKETS_MIN);
        Self { parts: Box::new(std::array::from_fn(|_| part(buckets))), used: Box::new([0; PARTS]) }
    }

    /// Asks for the bucket of the key with this hash to be brought near.
    #[inline]
    pub(crate) fn prefetch(&self, hash: KeyHash) {
        let part = &self.parts[part_of(hash)];
        let Bucket([first, second]) = &part[bucket_of(hash, part.len())];
        prefetch(first);
        if size_of::<Bucket<S>>() > 64 {
            prefetch(second);
        }
    }

    /// The place of `key`, which stays as it is until [`Entry::set`].
    #[inline]
    pub(crate) fn entry(&mut self, key: Key, hash: KeyHash) -> Entry<'_, S> {
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
    pub(crate) fn get(&self, key: Key) -> Option<&Slot<S>> {
        let hash = KeyHash::of(key);
        let part = &self.parts[part_of(hash)];
        let place = find(part, key, hash);
        let slot = &part[place.0].0[place.1];
        (slot.version.0 != 0).then_some(slot)
    }

    /// Every key, in no order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Slot<S>> {
        self.parts.iter().flat_map(|part| slots(part))
    }

    /// The keys of `count` buckets from `at` on, and where to go on; `None` where the table ends. A table that is gone over in
    /// such steps while it grows is gone over whole: a part that has grown meanwhile is begun anew, so its keys may come twice.
    pub(crate) fn walk(&self, at: Walk, count: usize) -> (impl Iterator<Item = &Slot<S>>, Option<Walk>) {
        let part = &self.parts[at.part];
        let from = if at.buckets == part.len() { at.at } else { 0 };
        let to = (from + count).min(part.len());
        let next = if to < part.len() {
            Some(Walk { part: at.part, at: to, buckets: part.len() })
        } else {
            (at.part + 1 < PARTS).then_some(Walk { part: at.part + 1, at: 0, buckets: 0 })
        };
        (slots(&part[from..to]), next)
    }

    /// Number of keys.
    pub(crate) fn len(&self) -> usize {
        self.used.iter().sum()
    }
}

/// How far a table has been gone over.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Walk {
    part: usize,
    at: usize,
    /// How large the part was then.
    buckets: usize,
}

fn slots<S>(buckets: &[Bucket<S>]) -> impl Iterator<Item = &Slot<S>> {
    buckets.iter().flat_map(|bucket| &bucket.0).filter(|slot| slot.version.0 != 0)
}

/// Where `key` is, or the free slot where it belongs. A part is never full, so this ends.
fn find<S>(part: &Part<S>, key: Key, hash: KeyHash) -> Place {
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
fn grow<S: Default>(grown: &mut Part<S>) {
    let bigger = part(grown.len() * 2);
    let old = std::mem::replace(grown, bigger);
    for slot in old.into_iter().flat_map(|bucket| bucket.0).filter(|slot| slot.version.0 != 0) {
        let place = find(grown, slot.key, KeyHash::of(slot.key));
        grown[place.0].0[place.1] = slot;
    }
}

/// The place of one key.
#[derive(Debug)]
pub(crate) struct Entry<'a, S> {
    slot: &'a mut Slot<S>,
    used: &'a mut usize,
    key: Key,
}

impl<S> Entry<'_, S> {
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

    /// All that is known of the key.
    pub(crate) fn slot(&self) -> &Slot<S> {
        self.slot
    }

    /// The key's state, as its events have made it.
    #[inline]
    pub(crate) fn state(&mut self) -> &mut S {
        &mut self.slot.state
    }

    /// A record of this key was appended.
    #[inline]
    pub(crate) fn set(&mut self, version: Version, head: Offset, time: Time) {
        debug_assert!(version.0 > 0);
        if self.slot.version.0 == 0 {
            *self.used += 1;
        }
        self.slot.key = self.key;
        self.slot.version = version;
        self.slot.head = head;
        if size_of::<S>() > 0 {
            self.slot.time_max = self.slot.time_max.max(time);
        }
    }

    /// What is known of the key, as a checkpoint has it.
    pub(crate) fn restore(self, slot: Slot<S>) {
        debug_assert!(slot.version.0 > 0 && slot.key == self.key);
        if self.slot.version.0 == 0 {
            *self.used += 1;
        }
        *self.slot = slot;
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
        let mut table = KeyTable::<()>::new(0);
        let mut model = HashMap::new();
        let mut x = 1_u64;
        for round in 0..200_000_u64 {
            x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            // Key 0 is a key like any other.
            let key = Key((x >> 33) % 50_000);
            let mut entry = table.entry(key, KeyHash::of(key));
            let expected = model.entry(key).or_insert((0_u64, 0_u64));
            assert_eq!((entry.version().0, entry.head().0), *expected);
            *expected = (expected.0 + 1, round);
            entry.set(Version(expected.0), Offset(round), Time(0));
        }
        assert_eq!(table.len(), model.len());
        for (key, (version, head)) in &model {
            let found = table.get(*key).expect("every key is found");
            assert_eq!((found.version.0, found.head.0), (*version, *head));
        }
        assert!(table.get(Key(u64::MAX)).is_none());
    }

    #[test]
    fn a_walk_over_a_growing_table_misses_no_key_that_was_there_when_it_began() {
        let mut table = KeyTable::<u64>::new(0);
        let put = |table: &mut KeyTable<u64>, key: u64| {
            table.entry(Key(key), KeyHash::of(Key(key))).set(Version(1), Offset(16), Time(0));
        };
        (0..500).for_each(|key| put(&mut table, key));
        let (mut seen, mut at, mut next) = (std::collections::HashSet::new(), Some(Walk::default()), 500);
        while let Some(walk) = at {
            let (slots, then) = table.walk(walk, 3);
            seen.extend(slots.map(|slot| slot.key.0));
            at = then;
            (next..next + 7).for_each(|key| put(&mut table, key));
            next += 7;
        }
        assert!((0..500).all(|key| seen.contains(&key)));
        assert_eq!(table.iter().count(), table.len());
    }
}
