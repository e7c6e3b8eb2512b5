//! A list that grows without moving its items, so that other threads can read it meanwhile.
//!
//! One writer makes items, in any order; no item is ever removed. The list consists of levels, each twice as long as
//! the one before. A level is allocated with its first item.

use std::sync::OnceLock;

const FIRST: usize = 64;
/// Levels for far more items than fit into memory.
const LEVELS: usize = 28;

#[derive(Debug)]
pub(super) struct Grow<T> {
    levels: [OnceLock<Box<[OnceLock<T>]>>; LEVELS],
}

impl<T> Grow<T> {
    pub(super) fn new() -> Self {
        Self { levels: std::array::from_fn(|_| OnceLock::new()) }
    }

    #[inline]
    pub(super) fn get(&self, index: usize) -> Option<&T> {
        let (level, at) = place(index);
        self.levels[level].get()?[at].get()
    }

    /// Returns an item, and makes it first if need be. Only the writer calls this, so it never waits for another
    /// `make`.
    #[inline]
    pub(super) fn get_or_make(&self, index: usize, make: impl FnOnce() -> T) -> &T {
        let (level, at) = place(index);
        let items = self.levels[level].get_or_init(|| (0..FIRST << level).map(|_| OnceLock::new()).collect());
        items[at].get_or_init(make)
    }
}

#[inline]
fn place(index: usize) -> (usize, usize) {
    let level = (index / FIRST + 1).ilog2();
    (level as usize, index - FIRST * ((1 << level) - 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_index_has_its_own_place() {
        let mut expected = (0, 0);
        for index in 0..10_000 {
            assert_eq!(place(index), expected, "index {index}");
            expected.1 += 1;
            if expected.1 == FIRST << expected.0 {
                expected = (expected.0 + 1, 0);
            }
        }
    }

    #[test]
    fn items_stay_and_missing_ones_are_none() {
        let list = Grow::new();
        assert_eq!(list.get(5_000), None);
        assert_eq!(*list.get_or_make(5_000, || 1), 1);
        assert_eq!(*list.get_or_make(5_000, || 2), 1, "made once");
        assert_eq!(list.get(4_999), None);
    }
}
