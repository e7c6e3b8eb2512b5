//! A journal of moves: tells a reader of many places which items moved while it read.
//!
//! One writer: it notes each item before moving the item, and settles the journal afterwards. A reader takes the
//! journal's position, reads the places, and asks for the items noted since: they include every item that the reader
//! may have missed or met twice. The ring keeps only the newest notes; `since` reports that the writer has lapped the
//! reader.

use super::{AtomicU32, AtomicU64, CachePadded, Ordering, fence};

/// A ring of the newest moves.
#[derive(Debug)]
pub(crate) struct Journal {
    /// The number of moves noted, and how many of these have ended. `settled <= noted`.
    noted: CachePadded<AtomicU64>,
    settled: CachePadded<AtomicU64>,
    /// Move `n` is at `n % ring.len()`, a power of two.
    ring: Box<[AtomicU32]>,
}

impl Journal {
    pub(crate) fn new(entries: usize) -> Self {
        assert!(entries.is_power_of_two(), "a journal of {entries} entries");
        Self {
            noted: CachePadded::new(AtomicU64::new(0)),
            settled: CachePadded::new(AtomicU64::new(0)),
            ring: (0..entries).map(|_| AtomicU32::new(0)).collect(),
        }
    }

    /// Notes that `item` is about to move. Only the one writer calls this, before any effect of the move is visible.
    #[inline]
    pub(crate) fn note(&self, item: u32) {
        let number = self.noted.load(Ordering::Relaxed);
        // Release: pairs with the Acquire fence in `since`: a reader that sees this entry instead of the overwritten
        // one also sees that all earlier moves were noted.
        fence(Ordering::Release);
        self.entry(number).store(item, Ordering::Relaxed);
        // Release: pairs with the Acquire in `since`: a reader that sees the number sees the entry.
        self.noted.store(number + 1, Ordering::Release);
    }

    /// Marks every noted move as ended.
    #[inline]
    pub(crate) fn settle(&self) {
        // Release: pairs with the Acquire in `start`: a reader that sees the number sees the moves.
        self.settled.store(self.noted.load(Ordering::Relaxed), Ordering::Release);
    }

    /// Returns the position to pass to `since`. Call this before reading: the reader sees all moves below that position
    /// completely.
    #[inline]
    pub(crate) fn start(&self) -> u64 {
        // Acquire: pairs with the Release in `settle`.
        self.settled.load(Ordering::Acquire)
    }

    /// Adds to `items` every item whose move the reader may have seen in part. Call this after reading. A reader that
    /// sees an effect of a move must also see its note; reading under a [`super::SeqLock`] ensures this.
    ///
    /// Returns `false` if the writer has lapped the reader; the added items are then meaningless.
    #[inline]
    pub(crate) fn since(&self, start: u64, items: &mut Vec<u32>) -> bool {
        // Acquire: pairs with the Release in `note`.
        let noted = self.noted.load(Ordering::Acquire);
        if noted == start {
            return true;
        }
        if noted - start >= self.ring.len() as u64 {
            return false;
        }
        items.extend((start..noted).map(|number| self.entry(number).load(Ordering::Relaxed)));
        // Acquire: pairs with the Release fence in `note`.
        fence(Ordering::Acquire);
        // Strictly less, because the move that is being noted may already have overwritten an entry.
        self.noted.load(Ordering::Relaxed) - start < self.ring.len() as u64
    }

    #[inline]
    fn entry(&self, number: u64) -> &AtomicU32 {
        &self.ring[number as usize & (self.ring.len() - 1)]
    }
}

#[cfg(all(test, loom))]
mod models {
    use super::super::{SeqLock, thread};
    use super::*;
    use loom::sync::Arc;

    /// A slot that holds one item, or 0 for none.
    struct Slot(SeqLock, AtomicU32);

    impl Slot {
        fn new(item: u32) -> Self {
            Self(SeqLock::new(), AtomicU32::new(item))
        }

        fn set(&self, item: u32) {
            self.0.write(|| self.1.store(item, Ordering::Relaxed));
        }

        fn get(&self) -> u32 {
            self.0.read(|| self.1.load(Ordering::Relaxed))
        }
    }

    const ITEM: u32 = 7;

    /// An item that moves while the slots are being read one by one is met once, or is reported as moved.
    #[test]
    fn loom_a_moving_item_is_neither_missed_nor_doubled() {
        loom::model(|| {
            let shared = Arc::new((Journal::new(4), Slot::new(ITEM), Slot::new(0)));
            let other = Arc::clone(&shared);
            // The reader is the spawned thread, because loom then starts it at every step of the writer.
            let reader = thread::spawn(move || {
                let start = other.0.start();
                let met = [other.2.get(), other.1.get()].iter().filter(|item| **item == ITEM).count();
                let mut again = Vec::new();
                assert!(other.0.since(start, &mut again), "the ring is long enough");
                assert!(met == 1 || again == [ITEM], "met {met} times, noted {again:?}");
            });
            shared.0.note(ITEM);
            shared.1.set(0);
            shared.2.set(ITEM);
            shared.0.settle();
            reader.join().unwrap();
        });
    }

    /// `since` returns the entries of the requested moves, or reports that they were overwritten.
    #[test]
    fn loom_an_overwritten_entry_is_never_passed_off_as_an_old_one() {
        loom::model(|| {
            let journal = Arc::new(Journal::new(2));
            let other = Arc::clone(&journal);
            let writer = thread::spawn(move || {
                for item in 1..=3 {
                    other.note(item);
                    other.settle();
                }
            });
            let start = journal.start();
            let mut items = Vec::new();
            if journal.since(start, &mut items) {
                let first = start as u32 + 1;
                assert!(items.iter().copied().eq(first..first + items.len() as u32), "from {start}: {items:?}");
            }
            writer.join().unwrap();
        });
    }
}
