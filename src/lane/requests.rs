//! Mailboxes: how threads ask each other for segments, syncs and checkpoints.
//!
//! A request is a flag, or an offset that only grows. The receiving thread answers through the positions that it
//! publishes.
//!
//! `SeqCst` throughout, where no comment says otherwise: every store pairs with the load of the same word, and stands before
//! the `Signal` or `Waiters` that wakes its reader. None of it is on the path of an event.

use std::sync::Arc;
use std::task::Waker;

use crate::clock::{Lateness, Nanos};
use crate::event::Offset;
use crate::sync::{AtomicBool, AtomicU64, Notifier, Ordering, Registration, Signal, Waiters};

/// Requests to the keeper.
#[derive(Debug)]
pub(crate) struct KeeperRequests {
    /// Wakes the keeper.
    pub(crate) signal: Arc<Signal>,
    ending: AtomicBool,
}

impl KeeperRequests {
    pub(crate) fn new() -> Self {
        Self { signal: Arc::new(Signal::new()), ending: AtomicBool::new(false) }
    }

    /// Tells the keeper to end.
    pub(crate) fn end(&self) {
        self.ending.store(true, Ordering::SeqCst);
        self.signal.notify();
    }

    pub(crate) fn is_ending(&self) -> bool {
        self.ending.load(Ordering::SeqCst)
    }
}

/// Requests to a shard's syncer.
#[derive(Debug)]
pub(crate) struct SyncRequests {
    /// Wakes the syncer.
    pub(crate) signal: Signal,
    flush_target: AtomicU64,
    ending: AtomicBool,
}

impl SyncRequests {
    pub(crate) fn new() -> Self {
        Self { signal: Signal::new(), flush_target: AtomicU64::new(0), ending: AtomicBool::new(false) }
    }

    /// Asks for a sync of everything below `offset`, in every durability mode.
    pub(crate) fn flush(&self, offset: u64) {
        self.flush_target.fetch_max(offset, Ordering::SeqCst);
        self.signal.notify();
    }

    /// Returns the highest offset that a flush has asked for.
    pub(crate) fn flush_target(&self) -> u64 {
        self.flush_target.load(Ordering::SeqCst)
    }

    /// Tells the syncer to sync the rest of the log and to end. The shard appends nothing afterwards.
    pub(crate) fn end(&self) {
        self.ending.store(true, Ordering::SeqCst);
        self.signal.notify();
    }

    pub(crate) fn is_ending(&self) -> bool {
        self.ending.load(Ordering::SeqCst)
    }
}

/// A run of events that are appended but not yet durable. Once they are durable, the syncer records their latency.
#[derive(Debug, Clone, Copy)]
pub(crate) struct UnsyncedRun {
    pub(crate) end: u64,
    pub(crate) published: Nanos,
    pub(crate) late: Option<Lateness>,
    pub(crate) events: u64,
}

const _: () = assert!(size_of::<UnsyncedRun>() == 32);

/// Requests for checkpoints of one shard, and their results. Shared by the shard, the snapshotter, the keeper and all
/// callers.
#[derive(Debug)]
pub(crate) struct CheckpointRequests {
    is_requested: AtomicBool,
    /// The start of the newest published checkpoint.
    covered: AtomicU64,
    /// The start of the newest checkpoint, complete or not.
    begun: AtomicU64,
    /// The number of checkpoints that were published or have failed.
    settled: AtomicU64,
    /// The number of checkpoints that have failed.
    failed: AtomicU64,
    skipped: AtomicU64,
    /// Waiters for `settled`.
    waiting: Waiters,
}

impl CheckpointRequests {
    /// Creates a mailbox without a request. The newest published checkpoint starts at `covered`.
    pub(crate) fn new(covered: Offset, notifier: &Arc<Notifier>) -> Self {
        Self {
            is_requested: AtomicBool::new(false),
            covered: AtomicU64::new(covered.0),
            begun: AtomicU64::new(0),
            settled: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            skipped: AtomicU64::new(0),
            waiting: Waiters::new(notifier),
        }
    }

    /// Asks for a checkpoint. The caller wakes the shard.
    pub(crate) fn ask(&self) {
        // Release: pairs with the Acquire in `is_requested`.
        self.is_requested.store(true, Ordering::Release);
    }

    #[inline]
    pub(crate) fn is_requested(&self) -> bool {
        // Acquire: pairs with the Release in `ask`.
        self.is_requested.load(Ordering::Acquire)
    }

    /// Records that the shard begins a checkpoint at `start`, which answers all earlier requests.
    pub(crate) fn begin(&self, start: Offset) {
        self.is_requested.store(false, Ordering::SeqCst);
        // Release: pairs with the Acquire in `begun`.
        self.begun.store(start.0, Ordering::Release);
    }

    /// Returns the start of the newest checkpoint, complete or not.
    pub(crate) fn begun(&self) -> u64 {
        // Acquire: pairs with the Releases in `begin` and `fail`.
        self.begun.load(Ordering::Acquire)
    }

    /// Records that the snapshotter has published the checkpoint that starts at `start`.
    pub(crate) fn publish(&self, start: Offset) {
        // Release: pairs with the Acquire in `covered`.
        self.covered.fetch_max(start.0, Ordering::Release);
        self.settle();
    }

    /// Records that the snapshotter could not write the newest checkpoint. (If another one has begun meanwhile,
    /// retention asks once more than necessary.)
    pub(crate) fn fail(&self) {
        self.failed.fetch_add(1, Ordering::Relaxed);
        self.begun.store(self.covered(), Ordering::Release);
        self.settle();
    }

    fn settle(&self) {
        let settled = self.settled.fetch_add(1, Ordering::SeqCst) + 1;
        self.waiting.reached(settled);
    }

    /// Returns the offset below which published checkpoints cover every event.
    pub(crate) fn covered(&self) -> u64 {
        // Acquire: pairs with the Release in `publish`.
        self.covered.load(Ordering::Acquire)
    }

    /// Returns the number of checkpoints that have failed.
    pub(crate) fn failures(&self) -> u64 {
        self.failed.load(Ordering::SeqCst)
    }

    /// Counts snapshots that are not saved because the snapshotter is behind or cannot write, or because the state is
    /// too large.
    pub(crate) fn skip(&self, snapshots: u64) {
        self.skipped.fetch_add(snapshots, Ordering::Relaxed);
    }

    /// Returns the number of snapshots that were not saved.
    pub(crate) fn skipped(&self) -> u64 {
        self.skipped.load(Ordering::Relaxed)
    }

    /// Registers a task for the next time a checkpoint is published or fails.
    pub(crate) fn register(&self, registration: &mut Registration, waker: &Waker) {
        self.waiting.register(registration, self.settled.load(Ordering::SeqCst) + 1, waker);
    }

    /// Makes all waiters check again, because no further checkpoint may come.
    pub(crate) fn wake_all(&self) {
        self.waiting.wake_all();
    }
}
