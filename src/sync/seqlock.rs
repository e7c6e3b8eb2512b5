//! Words that are read whole or not at all, while their one writer never waits.
//!
//! The writer makes the version odd, changes the words, and makes it even again. A reader that meets an odd version, or
//! another one afterwards, has read a mixture and reads again. Readers write nothing. The words are atomics, read and
//! written `Relaxed`: a torn read is thrown away, and is no data race either.

use super::{AtomicU64, Ordering, fence};

/// The version of some words. It stands beside them and does not own them.
#[derive(Debug)]
pub(crate) struct SeqLock(AtomicU64);

/// Looks between two yields while the writer is in the middle: it is so for nanoseconds, unless it lost its core.
const SPINS: u32 = 128;

impl SeqLock {
    pub(crate) fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// Changes the words. Only the one writer calls this; `change` does nothing else, for readers wait for its end.
    #[inline]
    pub(crate) fn write<R>(&self, change: impl FnOnce() -> R) -> R {
        let version = self.0.load(Ordering::Relaxed);
        self.0.store(version.wrapping_add(1), Ordering::Relaxed);
        // Release: pairs with the Acquire fence in `is_unchanged`: who read a new word sees that the version moved.
        fence(Ordering::Release);
        let changed = change();
        // Release: pairs with the Acquire in `begin`: who sees the version sees the words.
        self.0.store(version.wrapping_add(2), Ordering::Release);
        changed
    }

    /// The version to read under; `None` while the writer is in the middle.
    #[inline]
    pub(crate) fn begin(&self) -> Option<u64> {
        // Acquire: pairs with the last Release in `write`.
        let version = self.0.load(Ordering::Acquire);
        version.is_multiple_of(2).then_some(version)
    }

    /// Whether all that was read since `begin` is of one version.
    #[inline]
    pub(crate) fn is_unchanged(&self, version: u64) -> bool {
        // Acquire: pairs with the Release fence in `write`.
        fence(Ordering::Acquire);
        self.0.load(Ordering::Relaxed) == version
    }

    /// What `look` sees of one version. It may run several times, and see a mixture in all runs but the last.
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

// Loom goes on with another thread only when told that this one cannot.
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

        /// One look, so that loom has an end; `read` looks again.
        fn get(&self) -> Option<(u64, u64)> {
            let version = self.0.begin()?;
            let seen = (self.1.load(Ordering::Relaxed), self.2.load(Ordering::Relaxed));
            self.0.is_unchanged(version).then_some(seen)
        }
    }

    /// Two words are always of one write, and who saw a write never sees an older one.
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
                assert!(a >= newest, "went back");
                newest = a;
            }
            writer.join().unwrap();
            assert_eq!(pair.get(), Some((2, 2)));
        });
    }
}
