//! Keys numbered from 0 in the order in which they come: what values and memories of keys are found by.
//!
//! One writer, any readers. It is levels of open-addressing tables, each twice as large as the one before: new keys go
//! into the newest, so nothing is ever rehashed and an entry, once written, stays as it is. With the expected keys there
//! is one level.

use std::sync::OnceLock;

use crate::event::Key;
use crate::sync::{AtomicU64, Ordering, keyed, plant};

/// More than the address space holds.
const LEVELS: usize = 40;
const FIRST_MIN: usize = 1024;

/// From keys to numbers.
#[derive(Debug)]
pub(super) struct Index {
    levels: [OnceLock<Box<[Entry]>>; LEVELS],
    /// Entries of the first level, a power of two.
    first: usize,
    /// The newest level.
    newest: AtomicU64,
    /// Only the writer reads it.
    keys: AtomicU64,
}

/// Written once.
#[derive(Debug)]
struct Entry {
    key: AtomicU64,
    /// 1 + the key's number; 0: the entry is free.
    number: AtomicU64,
}

impl Index {
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

    /// Keys that are in.
    #[inline]
    pub(super) fn len(&self) -> usize {
        self.keys.load(Ordering::Relaxed) as usize
    }

    /// Gives the next number to a key that is not in, and returns it. Only the one writer calls this, after it has made
    /// everything that readers will look for under the number.
    pub(super) fn add(&self, key: Key) -> usize {
        let number = self.len();
        assert!(number < u32::MAX as usize, "more keys than numbers");
        let level = self.level_with_room(number);
        if let Err(free) = find(level, key) {
            level[free].key.store(key.0, Ordering::Relaxed);
            // Release: pairs with the Acquire in `find` below: who sees the number sees the key, and what was made.
            level[free].number.store(number as u64 + 1, Ordering::Release);
        }
        self.keys.store(number as u64 + 1, Ordering::Relaxed);
        number
    }

    /// The newest level; a new one when that is three quarters full.
    fn level_with_room(&self, keys: usize) -> &[Entry] {
        let newest = self.newest.load(Ordering::Relaxed) as usize;
        let before: usize = (0..newest).map(|number| room(self.first << number)).sum();
        if keys - before < room(self.first << newest) {
            return self.level(newest);
        }
        let level = self.level(newest + 1);
        // Release: pairs with the Acquire in `find`: who sees the newest's number sees the level.
        self.newest.store(newest as u64 + 1, Ordering::Release);
        level
    }
}

/// Keys that a level of so many entries takes.
fn room(entries: usize) -> usize {
    entries / 4 * 3
}

/// The number of `key` in a level that is never full, or the entry that is free for it.
#[inline]
fn find(level: &[Entry], key: Key) -> Result<usize, usize> {
    let mask = level.len() - 1;
    let mut at = keyed(key.0) as usize & mask;
    loop {
        // Acquire: pairs with the Release in `Index::add`.
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

    /// Entries that are looked at for all of these keys together, and for one of them at most.
    fn effort(keys: impl Iterator<Item = Key>) -> (usize, usize) {
        let index = Index::with_room(10_000);
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
    fn keys_chosen_by_the_public_hash_cost_what_random_ones_do() {
        let random = effort((0..10_000).map(|i: u64| key_routed_by(i.wrapping_mul(0x9e37_79b9_7f4a_7c15))));
        for chosen in [effort((0..10_000).map(|i| key_routed_by(i << 32))), effort((0..10_000).map(|i| Key(i << 24)))] {
            assert!(chosen.0 <= 5 * random.0 && chosen.1 <= 200, "{chosen:?}, random ones {random:?}");
        }
    }
}
