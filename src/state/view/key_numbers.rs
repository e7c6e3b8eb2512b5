//! Numbers for keys, from 0 in the order in which they are added. Views store their values by number.
//!
//! One writer, any number of readers. The levels are open-addressing tables, each twice as large as the one before. New
//! keys go into the newest level, so nothing is ever rehashed and a written entry never changes. As long as no more
//! keys come than were expected, there is one level.

use std::sync::OnceLock;

use crate::event::Key;
use crate::sync::{AtomicU64, Ordering, keyed, plant};

/// More levels than the address space can hold.
const LEVELS: usize = 40;
const FIRST_MIN: usize = 1024;

/// Maps keys to numbers.
#[derive(Debug)]
pub(super) struct KeyNumbers {
    levels: [OnceLock<Box<[Entry]>>; LEVELS],
    /// Entries of the first level, a power of two.
    first: usize,
    /// The newest level.
    newest: AtomicU64,
    /// Number of keys. Only the writer reads it.
    keys: AtomicU64,
}

/// A key and its number, written once.
#[derive(Debug)]
struct Entry {
    key: AtomicU64,
    /// The key's number plus 1; 0 for a free entry.
    number: AtomicU64,
}

impl KeyNumbers {
    pub(super) fn with_room(keys: usize) -> Self {
        plant();
        let first = (keys + keys / 2).next_power_of_two().max(FIRST_MIN);
        let index = Self {
            levels: [const { OnceLock::new() }; LEVELS],
            first,
            newest: AtomicU64::new(0),
            keys: AtomicU64::new(0),
        };
        index.level(0);
        index
    }

    fn level(&self, number: usize) -> &[Entry] {
        let free = || Entry { key: AtomicU64::new(0), number: AtomicU64::new(0) };
        self.levels[number].get_or_init(|| (0..self.first << number).map(|_| free()).collect())
    }

    #[inline]
    pub(super) fn find(&self, key: Key) -> Option<usize> {
        // Acquire: pairs with the Release in `level_with_room`.
        let newest = self.newest.load(Ordering::Acquire) as usize;
        let mut levels = self.levels[..=newest].iter().rev().filter_map(OnceLock::get);
        levels.find_map(|level| find(level, key).ok())
    }

    /// Returns the number of keys.
    #[inline]
    pub(super) fn len(&self) -> usize {
        self.keys.load(Ordering::Relaxed) as usize
    }

    /// Adds a new key and returns its number. Only the writer calls this, after it has made everything that readers
    /// find under the number.
    pub(super) fn add(&self, key: Key) -> usize {
        let number = self.len();
        assert!(number < u32::MAX as usize, "more keys than numbers");
        let level = self.level_with_room(number);
        if let Err(free) = find(level, key) {
            level[free].key.store(key.0, Ordering::Relaxed);
            // Release: pairs with the Acquire in `find` below: a reader that sees the number also sees
            // the key and everything that the writer made for it.
            level[free].number.store(number as u64 + 1, Ordering::Release);
        }
        self.keys.store(number as u64 + 1, Ordering::Relaxed);
        number
    }

    /// Returns the newest level, or a new one if the newest is three quarters full.
    fn level_with_room(&self, keys: usize) -> &[Entry] {
        let newest = self.newest.load(Ordering::Relaxed) as usize;
        let before: usize = (0..newest).map(|number| room(self.first << number)).sum();
        if keys - before < room(self.first << newest) {
            return self.level(newest);
        }
        let level = self.level(newest + 1);
        // Release: pairs with the Acquire in `find`: a reader that sees the new count also sees the level.
        self.newest.store(newest as u64 + 1, Ordering::Release);
        level
    }
}

/// Returns the number of keys that fit into a level of `entries` entries.
fn room(entries: usize) -> usize {
    entries / 4 * 3
}

/// Returns the number of `key`, or `Err` with the free entry for it. A level is never full, so the search ends.
#[inline]
fn find(level: &[Entry], key: Key) -> Result<usize, usize> {
    let mask = level.len() - 1;
    let mut at = keyed(key.0) as usize & mask;
    loop {
        // Acquire: pairs with the Release in `KeyNumbers::add`.
        match level[at].number.load(Ordering::Acquire) {
            0 => return Err(at),
            number if level[at].key.load(Ordering::Relaxed) == key.0 => return Ok(number as usize - 1),
            _ => at = (at + 1) & mask,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::key_routed_by;

    /// Returns the number of entries that look-ups of these keys visit: in total, and at most for one key.
    fn effort(keys: impl Iterator<Item = Key>) -> (usize, usize) {
        let index = KeyNumbers::with_room(10_000);
        let keys: Vec<Key> = keys.collect();
        keys.iter().for_each(|key| assert!(index.add(*key) < keys.len()));
        let level = index.level(0);
        let looks = keys.iter().map(|key| {
            let start = keyed(key.0) as usize & (level.len() - 1);
            let at = (0..level.len()).find(|step| {
                let entry = &level[(start + step) & (level.len() - 1)];
                entry.number.load(Ordering::Relaxed) != 0 && entry.key.load(Ordering::Relaxed) == key.0
            });
            at.expect("it is in the first level") + 1
        });
        (looks.clone().sum(), looks.max().unwrap_or(0))
    }

    #[test]
    fn keys_chosen_by_the_public_hash_cost_as_much_as_random_ones() {
        let random = effort((0..10_000).map(|i: u64| key_routed_by(i.wrapping_mul(0x9e37_79b9_7f4a_7c15))));
        for chosen in [effort((0..10_000).map(|i| key_routed_by(i << 32))), effort((0..10_000).map(|i| Key(i << 24)))] {
            assert!(chosen.0 <= 5 * random.0 && chosen.1 <= 200, "{chosen:?}, random keys {random:?}");
        }
    }
}
