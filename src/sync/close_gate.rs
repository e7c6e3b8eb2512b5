//! Closing a lane without losing an accepted event.

use super::{AtomicU32, CachePadded, Ordering};

/// Counts who is publishing right now, so that a shard can close and still append whatever was
/// accepted: close first, wait until nobody is inside, then drain for the last time.
///
/// Closedness and count are one word, so that entering and closing have one order.
#[derive(Debug)]
pub(crate) struct CloseGate(CachePadded<AtomicU32>);

const CLOSED: u32 = 1 << 31;

/// Somebody is inside the gate.
#[derive(Debug)]
pub(crate) struct Inside<'a>(&'a CloseGate);

impl CloseGate {
    pub(crate) fn new() -> Self {
        Self(CachePadded::new(AtomicU32::new(0)))
    }

    /// `None` once the gate is closed.
    #[inline]
    pub(crate) fn enter(&self) -> Option<Inside<'_>> {
        let before = self.0.fetch_add(1, Ordering::AcqRel);
        let inside = Inside(self);
        if before & CLOSED == 0 { Some(inside) } else { None }
    }

    /// Lets nobody in from now on.
    pub(crate) fn close(&self) {
        self.0.fetch_or(CLOSED, Ordering::AcqRel);
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.0.load(Ordering::Acquire) & CLOSED != 0
    }

    /// After `close`: whether everything that was accepted is visible.
    pub(crate) fn is_empty(&self) -> bool {
        // Acquire: pairs with the Release in `Inside::drop`.
        self.0.load(Ordering::Acquire) & !CLOSED == 0
    }
}

impl Drop for Inside<'_> {
    #[inline]
    fn drop(&mut self) {
        // Release: what was pushed inside is visible to who sees the count at 0.
        self.0.0.fetch_sub(1, Ordering::Release);
    }
}

#[cfg(all(test, loom))]
mod models {
    use super::*;
    use crate::sync::thread;
    use loom::sync::Arc;
    use loom::sync::atomic::AtomicUsize;

    /// An event that was accepted is drained, whenever the shard closes.
    #[test]
    fn loom_gate_loses_nothing_accepted() {
        loom::model(|| {
            let shared = Arc::new((CloseGate::new(), AtomicUsize::new(0)));
            let other = Arc::clone(&shared);
            let producer = thread::spawn(move || match other.0.enter() {
                Some(_inside) => {
                    other.1.fetch_add(1, Ordering::Relaxed);
                    1
                }
                None => 0,
            });
            shared.0.close();
            while !shared.0.is_empty() {
                thread::yield_now();
            }
            let drained = shared.1.load(Ordering::Relaxed);
            assert_eq!(drained, producer.join().unwrap(), "accepted == drained");
        });
    }
}
