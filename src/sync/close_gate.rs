//! Closing a lane without losing an accepted event.

use super::{AtomicU32, CachePadded, Ordering};

/// Counts the publishers that are inside a lane. A shard can therefore close the lane and still append every accepted
/// event: the shard closes the gate, waits until no publisher is inside, and then drains the lane for the last time.
///
/// The closed flag and the count share one word, which gives entering and closing one total order.
#[derive(Debug)]
pub(crate) struct CloseGate(CachePadded<AtomicU32>);

const CLOSED: u32 = 1 << 31;

/// Proof that a publisher is inside the close gate. Dropping it leaves the gate.
#[derive(Debug)]
pub(crate) struct Inside<'a>(&'a CloseGate);

impl CloseGate {
    pub(crate) fn new() -> Self {
        Self(CachePadded::new(AtomicU32::new(0)))
    }

    /// Enters the close gate. Returns `None` if the gate is closed.
    #[inline]
    pub(crate) fn enter(&self) -> Option<Inside<'_>> {
        // AcqRel: one word has one order of entries and closes. Pairs with the AcqRel in `close`.
        let before = self.0.fetch_add(1, Ordering::AcqRel);
        let inside = Inside(self);
        if before & CLOSED == 0 { Some(inside) } else { None }
    }

    /// Makes every later `enter` fail.
    pub(crate) fn close(&self) {
        // AcqRel: pairs with the AcqRel in `enter`.
        self.0.fetch_or(CLOSED, Ordering::AcqRel);
    }

    pub(crate) fn is_closed(&self) -> bool {
        // Acquire: pairs with the AcqRel in `close`.
        self.0.load(Ordering::Acquire) & CLOSED != 0
    }

    /// Returns `true` if no publisher is inside. After `close`, every accepted event is then visible.
    pub(crate) fn is_empty(&self) -> bool {
        // Acquire: pairs with the Release in `Inside::drop`.
        self.0.load(Ordering::Acquire) & !CLOSED == 0
    }
}

impl Drop for Inside<'_> {
    #[inline]
    fn drop(&mut self) {
        // Release: pairs with the Acquire in `is_empty`: a thread that sees the count at 0 sees everything pushed
        // inside.
        self.0.0.fetch_sub(1, Ordering::Release);
    }
}

#[cfg(all(test, loom))]
mod models {
    use super::*;
    use crate::sync::thread;
    use loom::sync::Arc;
    use loom::sync::atomic::AtomicUsize;

    /// Every accepted event is drained, no matter when the shard closes the lane.
    #[test]
    fn loom_close_gate_loses_no_accepted_event() {
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
