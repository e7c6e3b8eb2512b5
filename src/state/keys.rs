//! The key table of one shard: each key's version, the head of its chain, and its state. One writer: the owning shard.
//!
//! The table has 64 open-addressing parts, chosen by the hash's low bits. Each part grows alone, so the longest pause
//! of a growing table is 1/64 of a rehash. A part's slots form groups of eight. A separate array holds one word of tags
//! per group: eight bits of the hash of each slot in use. The tags of a million keys fit into a core's cache, and they
//! identify the one slot worth loading from memory. So a key costs one cache line: its slot takes 32 bytes without a
//! state, and 64 with a state of 32 bytes.
//!
//! A turn looks up the tags of later events ([`KeyTable::look`]) before it appends earlier ones, which prefetches their
//! slots: with a million keys the turn would otherwise wait for every slot.

use crate::event::{Key, KeyHash, Offset, Time, Version};
use crate::sync::{plant, prefetch_at};

const PARTS: usize = 64;
const PART_BITS: u32 = PARTS.trailing_zeros();
/// Slots per group: the number of tags in a word.
const GROUP: usize = 8;

/// The entry of one key.
#[derive(Debug, Clone, Default)]
#[repr(align(32))]
pub(crate) struct Slot<S> {
    pub(crate) key: Key,
    /// 0: the slot is free.
    pub(crate) version: Version,
    /// The key's newest record.
    pub(crate) head: Offset,
    /// The latest time of its events. Kept only for keys with a state.
    pub(crate) time_max: Time,
    pub(crate) state: S,
}

/// Adjacent slots. A group begins at a cache line, so no slot of up to 64 bytes crosses two lines.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Group<S>([Slot<S>; GROUP]);

const _: () = assert!(size_of::<Slot<()>>() == 32);
const _: () = assert!(size_of::<Slot<[u64; 4]>>() == 64);

/// One part; its header is a cache line.
#[derive(Debug)]
#[repr(align(64))]
struct Part<S> {
    /// One tag per byte, the first slot's in the lowest; 0 for a free slot.
    tags: Box<[u64]>,
    groups: Box<[Group<S>]>,
    used: usize,
}

impl<S: Default> Part<S> {
    fn new(groups: usize) -> Self {
        let slots = std::iter::repeat_with(|| Group(std::array::from_fn(|_| Slot::default())));
        Self { tags: vec![0; groups].into(), groups: slots.take(groups).collect(), used: 0 }
    }
}

impl<S> Part<S> {
    /// Returns `true` if three quarters of the slots are in use. Below that, keys that overflow their group are rare.
    fn is_full(&self) -> bool {
        self.used >= self.groups.len() * (GROUP / 4 * 3)
    }

    fn claim(&mut self, at: Seen, hash: KeyHash) {
        self.tags[at.group()] |= tag_of(hash) << (at.within() * 8);
        self.used += 1;
    }

    #[inline(always)]
    fn slot(&self, at: Seen) -> Option<&Slot<S>> {
        self.groups.get(at.group()).map(|group| &group.0[at.within()])
    }
}

/// Versions, chain heads and states, by key.
#[derive(Debug)]
pub(crate) struct KeyTable<S>(Box<[Part<S>; PARTS]>);

/// A hint at a key's slot in its part. It may be wrong: check the slot's key.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Seen(pub(crate) u32);

impl Seen {
    #[inline]
    fn new(group: usize, within: usize) -> Self {
        Self((group * GROUP + within) as u32)
    }

    #[inline]
    fn group(self) -> usize {
        self.0 as usize / GROUP
    }

    #[inline]
    fn within(self) -> usize {
        self.0 as usize % GROUP
    }
}

impl<S: Default> KeyTable<S> {
    /// Creates a table that holds about `keys_expected` keys before its parts grow.
    pub(crate) fn new(keys_expected: usize) -> Self {
        plant();
        let of_a_part = keys_expected.div_ceil(PARTS) + 1;
        let groups = of_a_part.div_ceil(GROUP / 4 * 3);
        Self(Box::new(std::array::from_fn(|_| Part::new(groups))))
    }

    /// Returns the probable slot of the key with this hash, and prefetches that slot.
    #[inline]
    pub(crate) fn look(&self, hash: KeyHash) -> Seen {
        let part = &self.0[part_of(hash)];
        let group = group_of(hash, part.tags.len());
        let within = equal_tags(part.tags[group], tag_of(hash)).trailing_zeros() as usize / GROUP % GROUP;
        prefetch_at(part.groups.as_ptr().wrapping_add(group).cast::<Slot<S>>().wrapping_add(within));
        Seen::new(group, within)
    }

    /// Returns the slot of `key` for its next event; a new key's slot has version 0. `seen` is the result of
    /// [`KeyTable::look`].
    #[inline(always)]
    pub(crate) fn slot(&mut self, key: Key, hash: KeyHash, seen: Seen) -> &mut Slot<S> {
        let number = part_of(hash);
        if self.0[number].slot(seen).is_some_and(|slot| slot.key == key && slot.version.0 != 0) {
            return &mut self.0[number].groups[seen.group()].0[seen.within()];
        }
        self.find_or_claim(key, hash)
    }

    /// Finds a key that is not at its probable slot, or claims a slot for a new key. A full part grows first.
    #[inline(never)]
    fn find_or_claim(&mut self, key: Key, hash: KeyHash) -> &mut Slot<S> {
        let part = &mut self.0[part_of(hash)];
        let mut found = find(part, key, hash);
        if found.is_err() && part.is_full() {
            grow(part);
            found = find(part, key, hash);
        }
        if let Err(free) = found {
            part.claim(free, hash);
        }
        let (Ok(at) | Err(at)) = found;
        let slot = &mut part.groups[at.group()].0[at.within()];
        slot.key = key;
        slot
    }

    /// Returns the slot of `key`, if the key has an event.
    pub(crate) fn get(&self, key: Key) -> Option<&Slot<S>> {
        self.get_hashed(key, KeyHash::of(key))
    }

    /// Returns the slot of `key`, which has this hash, if the key has an event.
    pub(crate) fn get_hashed(&self, key: Key, hash: KeyHash) -> Option<&Slot<S>> {
        let part = &self.0[part_of(hash)];
        // A slot claimed for an event that was then not appended has no version yet.
        find(part, key, hash).ok().and_then(|seen| part.slot(seen)).filter(|slot| slot.version.0 != 0)
    }

    /// Iterates over all keys, in no particular order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Slot<S>> {
        self.0.iter().flat_map(|part| slots(part, 0, part.groups.len() * GROUP))
    }

    /// Returns the keys in the next `count` slots of a walk, and the rest of the walk; `None` at the table's end. A
    /// walk visits every key even if the table grows meanwhile: it starts over in a part that has grown, so the keys of
    /// that part may be visited twice.
    pub(crate) fn walk(&self, at: Walk, count: usize) -> (impl Iterator<Item = &Slot<S>>, Option<Walk>) {
        let part = &self.0[at.part];
        let all = part.groups.len() * GROUP;
        let from = if at.slots == all { at.at } else { 0 };
        let to = (from + count).min(all);
        let next = if to < all {
            Some(Walk { part: at.part, at: to, slots: all })
        } else {
            (at.part + 1 < PARTS).then_some(Walk { part: at.part + 1, at: 0, slots: 0 })
        };
        (slots(part, from, to), next)
    }

    /// Returns the number of keys.
    pub(crate) fn len(&self) -> usize {
        self.0.iter().map(|part| part.used).sum()
    }
}

/// The position of a walk over a table.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Walk {
    part: usize,
    at: usize,
    /// The part's number of slots at the last step of the walk.
    slots: usize,
}

/// Iterates over the slots in use among `from..to`.
fn slots<S>(part: &Part<S>, from: usize, to: usize) -> impl Iterator<Item = &Slot<S>> {
    // The tags tell which slots are free, so the memory of free slots is not read.
    let is_used = |at: &usize| part.tags[at / GROUP] >> (at % GROUP * 8) & 0xff != 0;
    (from..to).filter(is_used).filter_map(|at| part.slot(Seen(at as u32))).filter(|slot| slot.version.0 != 0)
}

/// Returns the slot of `key`, or `Err` with the free slot where it belongs. A part is never full, so the search ends.
fn find<S>(part: &Part<S>, key: Key, hash: KeyHash) -> Result<Seen, Seen> {
    let mut group = group_of(hash, part.tags.len());
    loop {
        let tags = part.tags[group];
        let mut equal = equal_tags(tags, tag_of(hash));
        while equal != 0 {
            let within = equal.trailing_zeros() as usize / GROUP;
            if part.groups[group].0[within].key == key {
                return Ok(Seen::new(group, within));
            }
            equal &= equal - 1;
        }
        // Slots are claimed in order and never freed: a key overflows to a later group only if this one is full.
        let free = equal_tags(tags, 0);
        if free != 0 {
            return Err(Seen::new(group, free.trailing_zeros() as usize / GROUP));
        }
        group = if group + 1 == part.tags.len() { 0 } else { group + 1 };
    }
}

#[cold]
fn grow<S: Default>(part: &mut Part<S>) {
    let old = std::mem::replace(part, Part::new(part.groups.len() * 2));
    for slot in old.groups.into_iter().flat_map(|group| group.0).filter(|slot| slot.version.0 != 0) {
        let hash = KeyHash::of(slot.key);
        let (Ok(seen) | Err(seen)) = find(part, slot.key, hash);
        part.groups[seen.group()].0[seen.within()] = slot;
        part.claim(seen, hash);
    }
}

// The part uses the lowest bits of the hash, the tag the eight above, and the group, by multiply-high, the highest.
// They are independent of each other up to 2²⁷ keys per shard. The hash is keyed: the routing hash is public, and with
// it an attacker could choose keys that collide.
#[inline]
fn part_of(hash: KeyHash) -> usize {
    hash.0 as usize % PARTS
}

#[inline]
fn group_of(hash: KeyHash, groups: usize) -> usize {
    ((u64::from(hash.0) * groups as u64) >> 32) as usize
}

/// Returns the tag of a hash. It is never 0, the tag of a free slot.
#[inline]
fn tag_of(hash: KeyHash) -> u64 {
    u64::from((hash.0 >> PART_BITS & 0xff).max(1))
}

/// Returns the high bit of every byte of `tags` that equals `tag`. A byte above an equal one may be a false match.
#[inline]
fn equal_tags(tags: u64, tag: u64) -> u64 {
    const LOW: u64 = u64::MAX / 0xff;
    let differing = tags ^ (LOW * tag);
    differing.wrapping_sub(LOW) & !differing & (LOW << 7)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    #[test]
    fn a_growing_table_agrees_with_a_hash_map() {
        let mut table = KeyTable::<()>::new(0);
        let mut model = HashMap::new();
        let mut x = 1_u64;
        for round in 0..200_000_u64 {
            x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            // Key 0 has no special meaning.
            let key = Key((x >> 33) % 50_000);
            let hash = KeyHash::of(key);
            let seen = table.look(hash);
            let slot = table.slot(key, hash, seen);
            let expected = model.entry(key).or_insert((0_u64, 0_u64));
            assert_eq!((slot.version.0, slot.head.0), *expected);
            *expected = (expected.0 + 1, round);
            (slot.version, slot.head) = (Version(expected.0), Offset(round));
        }
        assert_eq!(table.len(), model.len());
        for (key, (version, head)) in &model {
            let found = table.get(*key).expect("every key is found");
            assert_eq!((found.version.0, found.head.0), (*version, *head));
        }
        assert!(table.get(Key(u64::MAX)).is_none());
    }

    #[test]
    fn keys_with_one_group_and_one_tag_are_distinct_even_when_they_overflow_the_group() {
        let mut table = KeyTable::<()>::new(10_000);
        let hash = KeyHash::of(Key(0));
        let groups = table.0[part_of(hash)].groups.len();
        let like = |&key: &Key| {
            let other = KeyHash::of(key);
            part_of(other) == part_of(hash)
                && group_of(other, groups) == group_of(hash, groups)
                && tag_of(other) == tag_of(hash)
        };
        let alike: Vec<Key> = (0..).map(Key).filter(like).take(2 * GROUP + 1).collect();
        for (i, &key) in alike.iter().enumerate() {
            let seen = table.look(hash);
            let slot = table.slot(key, hash, seen);
            assert_eq!(slot.version, Version(0), "new");
            slot.version = Version(i as u64 + 1);
        }
        for (i, &key) in alike.iter().enumerate() {
            assert_eq!(table.get(key).map(|slot| slot.version.0), Some(i as u64 + 1));
        }
        assert_eq!(table.0[part_of(hash)].groups.len(), groups, "the part did not grow");
        assert_eq!(table.len(), alike.len());
    }

    /// Returns the number of groups and slots that a look-up of `key` visits.
    fn looks(table: &KeyTable<()>, key: Key) -> usize {
        let hash = KeyHash::of(key);
        let part = &table.0[part_of(hash)];
        let (mut group, mut looks) = (group_of(hash, part.tags.len()), 0);
        loop {
            let equal = equal_tags(part.tags[group], tag_of(hash));
            looks += 1 + equal.count_ones() as usize;
            let is_here = (0..GROUP)
                .any(|within| equal >> (within * GROUP + 7) & 1 == 1 && part.groups[group].0[within].key == key);
            if is_here {
                return looks;
            }
            group = (group + 1) % part.tags.len();
        }
    }

    /// Returns the mean and the maximum of [`looks`] over these keys.
    fn effort(keys: impl Iterator<Item = Key>) -> (usize, usize) {
        let mut table = KeyTable::<()>::new(0);
        let keys: Vec<Key> = keys.collect();
        for &key in &keys {
            let hash = KeyHash::of(key);
            let seen = table.look(hash);
            table.slot(key, hash, seen).version = Version(1);
        }
        let looks = keys.iter().map(|key| looks(&table, *key));
        (looks.clone().sum::<usize>() / keys.len(), looks.max().unwrap_or(0))
    }

    #[test]
    fn keys_chosen_by_the_public_hash_cost_as_much_as_random_ones() {
        // Enough keys that the cheap look-ups of an almost empty table do not hide a bad hash.
        let of = |hash: fn(u64) -> u64| effort((0..20_000).map(move |i| crate::event::key_routed_by(hash(i))));
        let (mean, most) = of(|i| i.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        assert!(mean <= 3 && most <= 60, "random keys: {mean}, at most {most}");
        // All keys share the hash's low half, then its high half, then everything but its middle.
        for chosen in [of(|i| i << 32 | 7), of(|i| 7 << 32 | i), of(|i| i << 20)] {
            assert!(chosen.0 <= 3 && chosen.1 <= 60, "{chosen:?}");
        }
        // Keys as applications choose them.
        for plain in [1, 8, 1 << 12, 1 << 22, 1 << 40] {
            let effort = effort((0..20_000).map(|i| Key(i * plain)));
            assert!(effort.0 <= 3 && effort.1 <= 60, "steps of {plain}: {effort:?}");
        }
    }

    #[test]
    fn a_new_key_whose_event_was_not_appended_is_unknown_and_keeps_its_slot() {
        let mut table = KeyTable::<u64>::new(0);
        for key in (0..1000).map(Key) {
            let hash = KeyHash::of(key);
            let seen = table.look(hash);
            assert_eq!(table.slot(key, hash, seen).version, Version(0));
            assert!(table.get(key).is_none());
            assert_eq!(table.iter().count() as u64, key.0);
            let seen = table.look(hash);
            let slot = table.slot(key, hash, seen);
            (slot.version, slot.state) = (Version(1), key.0);
            assert_eq!(table.len() as u64, key.0 + 1, "one slot");
        }
        assert!((0..1000).all(|key| table.get(Key(key)).is_some_and(|slot| slot.state == key)));
    }

    #[test]
    fn a_walk_over_a_growing_table_visits_every_key_that_it_had_at_the_start() {
        let mut table = KeyTable::<u64>::new(0);
        let put = |table: &mut KeyTable<u64>, key: u64| {
            table.slot(Key(key), KeyHash::of(Key(key)), Seen::default()).version = Version(1);
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

    #[test]
    fn a_walk_visits_every_key_of_a_part_that_doubles_during_the_walk() {
        // A checkpoint walks over large states one slot at a time.
        for (first, steps) in (0..400_u64).map(|round| (round * 1_000, 1 + round as usize % 6)) {
            let mut table = KeyTable::<u64>::new(0);
            let put = |table: &mut KeyTable<u64>, key: u64| {
                table.slot(Key(key), KeyHash::of(Key(key)), Seen::default()).version = Version(1);
            };
            (first..first + 350).for_each(|key| put(&mut table, key));
            let (mut seen, mut at) = (std::collections::HashSet::new(), Some(Walk::default()));
            for step in 0.. {
                let Some(walk) = at else { break };
                let (slots, then) = table.walk(walk, 1);
                seen.extend(slots.map(|slot| slot.key.0));
                at = then;
                if step + 1 == steps {
                    (first + 350..first + 700).for_each(|key| put(&mut table, key));
                }
            }
            assert!((first..first + 350).all(|key| seen.contains(&key)), "from {first}, after {steps} steps");
        }
    }
}
