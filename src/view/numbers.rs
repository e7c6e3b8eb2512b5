//! Keys numbered from 0 in the order in which they come: what a writer finds its own memory of a key by.
//!
//! Private to one writer. It grows as the shard's own table of keys does: amortised, and not at all up to the number
//! of keys expected.

use hashbrown::HashTable;

use crate::event::Key;

#[derive(Debug)]
pub(super) struct Numbers(HashTable<(Key, u32)>);

impl Numbers {
    pub(super) fn with_room(keys: usize) -> Self {
        Self(HashTable::with_capacity(keys))
    }

    #[inline]
    pub(super) fn find(&self, key: Key) -> Option<u32> {
        self.0.find(hash(key), |(known, _)| *known == key).map(|(_, number)| *number)
    }

    /// Gives the next number to a key that has none.
    pub(super) fn add(&mut self, key: Key) -> u32 {
        assert!(self.0.len() < u32::MAX as usize, "more keys than numbers");
        let number = self.0.len() as u32;
        self.0.insert_unique(hash(key), (key, number), |(known, _)| hash(*known));
        number
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (Key, u32)> + '_ {
        self.0.iter().copied()
    }
}

/// Keys of one shard have the uppermost bits in common, and those are what the table tells neighbours apart by.
#[inline]
fn hash(key: Key) -> u64 {
    key.hash().rotate_left(32)
}
