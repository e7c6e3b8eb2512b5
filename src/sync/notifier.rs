//! The notifier: calls the wakers of tasks.
//!
//! A waker is the application's code: it may be slow, block or panic. So shards and syncers only note what is due, and
//! one thread of the engine calls the wakers.

use std::sync::Arc;
use std::task::Waker;

use super::{Arrivals, AtomicBool, Ordering, Signal};

/// The queue of the thread that calls the wakers of tasks. Many threads add to it; one thread runs it.
#[derive(Debug)]
pub(crate) struct Notifier {
    due: Arrivals<Due>,
    signal: Signal,
    ending: AtomicBool,
}

/// Wakers of which some are due.
pub(super) trait Wakers: std::fmt::Debug + Send + Sync {
    /// Calls the wakers that are due.
    fn wake_due(&self);
}

/// Wakers that must be called.
#[derive(Debug)]
enum Due {
    Some(Arc<dyn Wakers>),
    One(Waker),
}

impl Due {
    fn wake(self) {
        match self {
            Self::Some(wakers) => wakers.wake_due(),
            Self::One(waker) => wake(waker),
        }
    }
}

impl Default for Notifier {
    fn default() -> Self {
        Self { due: Arrivals::new(), signal: Signal::new(), ending: AtomicBool::new(false) }
    }
}

impl Notifier {
    /// Calls the wakers that are due soon.
    pub(super) fn wake_some(&self, wakers: Arc<dyn Wakers>) {
        self.add(Due::Some(wakers));
    }

    /// Calls `waker` soon.
    pub(crate) fn wake(&self, waker: Waker) {
        self.add(Due::One(waker));
    }

    fn add(&self, due: Due) {
        match self.due.push(due) {
            Ok(()) => self.signal.notify(),
            // The engine has ended, so this is no shard: its thread may call the waker.
            Err(due) => due.wake(),
        }
    }

    /// Calls wakers until [`Notifier::end`]. Afterwards each publisher calls its wakers itself.
    pub(crate) fn run(&self) {
        // Acquire: pairs with the Release in `end`.
        while !self.ending.load(Ordering::Acquire) {
            self.wake_due();
            self.signal.sleep(None, || !self.due.is_empty() || self.ending.load(Ordering::Acquire));
        }
        self.due.close().into_iter().for_each(Due::wake);
    }

    /// Calls the wakers that are due now.
    pub(super) fn wake_due(&self) {
        self.due.take().into_iter().for_each(Due::wake);
    }

    /// Tells the thread to end. No shard may run any more.
    pub(crate) fn end(&self) {
        // Release: pairs with the Acquire in `run`.
        self.ending.store(true, Ordering::Release);
        self.signal.notify();
    }
}

/// Calls the waker and catches its panic: a waker is application code, and the calling thread has other wakers to call.
pub(crate) fn wake(waker: Waker) {
    if std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| waker.wake())).is_err() {
        tracing::error!("a waker panicked");
    }
}
