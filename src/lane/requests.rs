//! The mailboxes through which threads ask each other for work: for segments, for syncs, for checkpoints.
//!
//! A request only moves forward or is set once; the asked thread answers by what it publishes.

use std::sync::Arc;

use crate::clock::{Lateness, Nanos};
use crate::event::Offset;
use crate::sync::{AtomicBool, AtomicU64, Ordering, Signal, Waiters};

/// Requests to the keeper.
#[derive(Debug)]
pub(crate) struct KeeperRequests {
    /// Wakes it.
    pub(crate) signal: Arc<Signal>,
    /// The engine ends.
    pub(crate) ending: AtomicBool,
}

/// What other threads ask of a syncer.
#[derive(Debug)]
pub(crate) struct SyncRequests {
    /// Wakes the syncer.
    pub(crate) signal: Signal,
    /// Everything below this is to be synced whatever the mode says (flush).
    pub(crate) flush_to: AtomicU64,
    /// The shard has appended for the last time: sync it and end.
    pub(crate) ending: AtomicBool,
}

impl SyncRequests {
    pub(crate) fn new() -> Self {
        Self { signal: Signal::new(), flush_to: AtomicU64::new(0), ending: AtomicBool::new(false) }
    }

    /// Asks for everything below `offset` to be synced.
    pub(crate) fn flush(&self, offset: u64) {
        self.flush_to.fetch_max(offset, Ordering::SeqCst);
        self.signal.notify();
    }
}

/// A run of events with one publish time, so that publish→durable can be recorded when they are.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SyncMark {
    pub(crate) end: u64,
    pub(crate) published: Nanos,
    pub(crate) late: Option<Lateness>,
    pub(crate) events: u64,
}

const _: () = assert!(size_of::<SyncMark>() == 32);

/// What is asked of a shard, and what became of it. Shared by all who have to do with one shard's snapshots.
#[derive(Debug)]
pub(crate) struct CheckpointRequests {
    /// Somebody wants a checkpoint.
    wanted: AtomicBool,
    /// Everything below this is saved: a checkpoint that began there is whole and published.
    pub(crate) covered: AtomicU64,
    /// Where the newest one begins that is being made or was made.
    begun: AtomicU64,
    /// Checkpoints that were published or given up.
    pub(crate) settled: AtomicU64,
    /// Of those, the ones that failed.
    pub(crate) failed: AtomicU64,
    /// Snapshots that were not taken because the snapshotter was behind, or whose state is too large.
    pub(crate) skipped: AtomicU64,
    /// Who waits for a checkpoint.
    pub(crate) waiting: Waiters,
}

impl CheckpointRequests {
    pub(crate) fn new() -> Self {
        Self {
            wanted: AtomicBool::new(false),
            covered: AtomicU64::new(0),
            begun: AtomicU64::new(0),
            settled: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            skipped: AtomicU64::new(0),
            waiting: Waiters::new(),
        }
    }

    /// Asks for a checkpoint; the caller wakes the shard.
    pub(crate) fn ask(&self) {
        // Release: pairs with the Acquire in `is_wanted`.
        self.wanted.store(true, Ordering::Release);
    }

    #[inline]
    pub(crate) fn is_wanted(&self) -> bool {
        self.wanted.load(Ordering::Acquire)
    }

    /// The shard begins a checkpoint at `start`: the wish is fulfilled when that one is published.
    pub(crate) fn begin(&self, start: Offset) {
        self.wanted.store(false, Ordering::SeqCst);
        self.begun.store(start.0, Ordering::Release);
    }

    /// Where the newest checkpoint begins, whether it is whole yet or not.
    pub(crate) fn begun(&self) -> u64 {
        self.begun.load(Ordering::Acquire)
    }

    /// The newest one came to nothing. (Another may have begun meanwhile; retention then asks once more than it need.)
    pub(crate) fn given_up(&self) {
        self.failed.fetch_add(1, Ordering::Relaxed);
        self.begun.store(self.covered(), Ordering::Release);
    }

    /// Up to where everything is saved.
    pub(crate) fn covered(&self) -> u64 {
        // Acquire: pairs with the snapshotter's Release when it publishes a checkpoint.
        self.covered.load(Ordering::Acquire)
    }
}
