//! A published position: one thread moves it forward, any thread reads it.
//!
//! One writer. Everything written before `publish` is visible to a thread that reads the new position.

use super::{AtomicU64, CachePadded, Ordering};

/// A position that one thread moves forward and other threads read. A thread that sees the position also sees
/// everything written before [`Watermark::publish`].
#[derive(Debug)]
pub(crate) struct Watermark(CachePadded<AtomicU64>);

impl Watermark {
    pub(crate) fn new(at: u64) -> Self {
        Self(CachePadded::new(AtomicU64::new(at)))
    }

    /// Publishes `at`. Only the one writer calls this. A position that stands for progress never falls; a hold on the
    /// log may be lowered.
    #[inline]
    pub(crate) fn publish(&self, at: u64) {
        // Release: pairs with the Acquire in `get`.
        self.0.store(at, Ordering::Release);
    }

    #[inline]
    pub(crate) fn get(&self) -> u64 {
        // Acquire: pairs with the Release in `publish`.
        self.0.load(Ordering::Acquire)
    }
}

#[cfg(all(test, loom))]
mod models {
    use super::*;
    use crate::sync::thread;
    use loom::sync::Arc;
    use loom::sync::atomic::AtomicUsize;

    /// A thread that sees the watermark sees everything written before it.
    #[test]
    fn loom_watermark_publishes_everything_below_it() {
        loom::model(|| {
            let shared = Arc::new((Watermark::new(0), AtomicUsize::new(0)));
            let other = Arc::clone(&shared);
            let writer = thread::spawn(move || {
                other.1.store(7, Ordering::Relaxed);
                other.0.publish(1);
            });
            if shared.0.get() == 1 {
                assert_eq!(shared.1.load(Ordering::Relaxed), 7);
            }
            writer.join().unwrap();
        });
    }
}
