//! What a reader of many places must look at again, because it moved from one to another meanwhile.
//!
//! One writer, which notes an item before it moves it and settles afterwards. A reader takes a start, reads the places,
//! and asks for what was noted since: every item that it may have missed or met twice is among them. The ring keeps the
//! newest notes only; a reader that was too slow for it is told so.

use super::{AtomicU32, AtomicU64, CachePadded, Ordering, fence};

/// The newest moves.
#[derive(Debug)]
pub(crate) struct Journal {
    /// Moves noted, and those of them that are over. `settled <= noted`.
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

    /// Says that `item` is about to move. Only the one writer calls this, before anything of the move can be seen.
    #[inline]
    pub(crate) fn note(&self, item: u32) {
        let number = self.noted.load(Ordering::Relaxed);
        // Release: pairs with the Acquire fence in `since`: who reads this entry instead of the one it takes the place
        // of, sees that all moves before it were noted.
        fence(Ordering::Release);
        self.entry(number).store(item, Ordering::Relaxed);
        // Release: pairs with the Acquire in `since`: who sees the number sees the entry.
        self.noted.store(number + 1, Ordering::Release);
    }

    /// Says that every noted move is over.
    #[inline]
    pub(crate) fn settle(&self) {
        // Release: pairs with the Acquire in `start`: who sees the number sees the moves.
        self.settled.store(self.noted.load(Ordering::Relaxed), Ordering::Release);
    }

    /// To be called before reading: all moves below this number are seen whole.
    #[inline]
    pub(crate) fn start(&self) -> u64 {
        // Acquire: pairs with the Release in `settle`.
        self.settled.load(Ordering::Acquire)
    }

    /// To be called after reading: adds the items whose moves may have been seen in part. What was read must have been
    /// read so that seeing an effect of a move makes its note visible (a [`super::SeqLock`] does).
    ///
    /// `false`: the ring has gone round meanwhile, and what was added means nothing.
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
        // Strictly less: the move that is being noted may already have overwritten an entry.
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

    /// A place that holds an item or does not.
    struct Place(SeqLock, AtomicU32);

    impl Place {
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

    /// An item that moves while the places are read one after the other is met once, or is looked at again.
    #[test]
    fn loom_a_moving_item_is_neither_missed_nor_doubled() {
        loom::model(|| {
            let shared = Arc::new((Journal::new(4), Place::new(ITEM), Place::new(0)));
            let other = Arc::clone(&shared);
            // The reader is the one that is started: loom then begins it at every moment of the writer.
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

    /// Entries are those of the moves asked for, or the reader is told that they are gone.
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
