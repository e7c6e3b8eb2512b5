//! A sequence lock: a group of words that is read consistently or not at all, while its one writer never waits.
//!
//! The writer makes the version odd, changes the words, and makes the version even again. A reader that sees an odd
//! version, or a different version afterwards, has read a mixture and reads again. Readers write nothing. The words are
//! atomics, accessed `Relaxed`, so a torn read is not a data race; the reader discards it.

use super::{AtomicU64, Ordering, fence};

/// The version of a group of words. The words are stored beside it; it does not own them.
#[derive(Debug)]
pub(crate) struct SeqLock(AtomicU64);

/// The number of checks between two yields while the writer is inside `write`. A write takes nanoseconds unless the
/// writer loses its core.
const SPINS: u32 = 128;

impl SeqLock {
    pub(crate) fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// Changes the words. Only the one writer calls this. `change` must do nothing else, because readers wait until it
    /// returns.
    #[inline]
    pub(crate) fn write<R>(&self, change: impl FnOnce() -> R) -> R {
        let version = self.0.load(Ordering::Relaxed);
        self.0.store(version.wrapping_add(1), Ordering::Relaxed);
        // Release: pairs with the Acquire fence in `is_unchanged`: a reader that sees a new word sees the version
        // change.
        fence(Ordering::Release);
        let changed = change();
        // Release: pairs with the Acquire in `begin`: a reader that sees the version sees the words.
        self.0.store(version.wrapping_add(2), Ordering::Release);
        changed
    }

    /// Returns the version to read under, or `None` while the writer is inside `write`.
    #[inline]
    pub(crate) fn begin(&self) -> Option<u64> {
        // Acquire: pairs with the last Release in `write`.
        let version = self.0.load(Ordering::Acquire);
        version.is_multiple_of(2).then_some(version)
    }

    /// Returns `true` if everything read since `begin` belongs to `version`.
    #[inline]
    pub(crate) fn is_unchanged(&self, version: u64) -> bool {
        // Acquire: pairs with the Release fence in `write`.
        fence(Ordering::Acquire);
        self.0.load(Ordering::Relaxed) == version
    }

    /// Returns what `look` reads under one version. `look` may run several times, and every run but the last may see a
    /// mixture.
    #[inline]
    pub(crate) fn read<R>(&self, mut look: impl FnMut() -> R) -> R {
        let mut spins = 0;
        loop {
            if let Some(version) = self.begin() {
                let seen = look();
                if self.is_unchanged(version) {
                    return seen;
                }
            }
            pause(&mut spins);
        }
    }
}

#[cfg(not(loom))]
#[cold]
fn pause(spins: &mut u32) {
    *spins += 1;
    if spins.is_multiple_of(SPINS) {
        super::thread::yield_now();
    } else {
        std::hint::spin_loop();
    }
}

// Loom schedules another thread only if this one yields.
#[cfg(loom)]
fn pause(_spins: &mut u32) {
    super::thread::yield_now();
}

#[cfg(all(test, loom))]
mod models {
    use super::super::thread;
    use super::*;
    use loom::sync::Arc;

    struct Pair(SeqLock, AtomicU64, AtomicU64);

    impl Pair {
        fn set(&self, value: u64) {
            self.0.write(|| {
                self.1.store(value, Ordering::Relaxed);
                self.2.store(value, Ordering::Relaxed);
            });
        }

        /// Reads once, so that loom terminates; `read` would retry.
        fn get(&self) -> Option<(u64, u64)> {
            let version = self.0.begin()?;
            let seen = (self.1.load(Ordering::Relaxed), self.2.load(Ordering::Relaxed));
            self.0.is_unchanged(version).then_some(seen)
        }
    }

    /// Both words always come from the same write, and a reader never sees an older write after a newer one.
    #[test]
    fn loom_seqlock_never_shows_a_mixture() {
        loom::model(|| {
            let pair = Arc::new(Pair(SeqLock::new(), AtomicU64::new(0), AtomicU64::new(0)));
            let other = Arc::clone(&pair);
            let writer = thread::spawn(move || {
                other.set(1);
                other.set(2);
            });
            let mut newest = 0;
            for (a, b) in [pair.get(), pair.get()].into_iter().flatten() {
                assert_eq!(a, b, "torn");
                assert!(a >= newest, "an older write after a newer one");
                newest = a;
            }
            writer.join().unwrap();
            assert_eq!(pair.get(), Some((2, 2)));
        });
    }
}
