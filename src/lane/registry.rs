//! The registry: the lanes of one shard, for all threads except the shard's own.

use std::sync::Arc;

use super::counts::LaneShared;
use crate::sync::{AtomicU64, Mutex, Notifier, Ordering, Waiters, lock};

/// The lanes of one shard. Locked when a lane is added or removed, and once per sync, but never per event.
#[derive(Debug)]
pub(crate) struct LaneRegistry {
    lanes: Mutex<Vec<Arc<LaneShared>>>,
    /// Waiters for the durable end of the log.
    waiting_flush: Waiters,
    /// The number of events of lanes that were removed from the list.
    retired_events: AtomicU64,
}

impl LaneRegistry {
    pub(crate) fn new(notifier: &Arc<Notifier>) -> Self {
        Self { lanes: Mutex::default(), waiting_flush: Waiters::new(notifier), retired_events: AtomicU64::new(0) }
    }

    pub(crate) fn register(&self, lane: &Arc<LaneShared>) {
        let mut lanes = lock(&self.lanes);
        self.forget_retired(&mut lanes);
        lanes.push(Arc::clone(lane));
    }

    /// Returns every lane with the number of its appended events. Removes retired lanes whose counts no longer matter.
    pub(crate) fn appended_counts(&self) -> Vec<(Arc<LaneShared>, u64)> {
        let mut lanes = lock(&self.lanes);
        self.forget_retired(&mut lanes);
        lanes.iter().map(|lane| (Arc::clone(lane), lane.appended.get())).collect()
    }

    /// Returns `true` if a lane has events that are appended but not yet counted as durable.
    pub(crate) fn is_behind(&self) -> bool {
        lock(&self.lanes).iter().any(|lane| lane.durable.get() < lane.appended.get())
    }

    fn forget_retired(&self, lanes: &mut Vec<Arc<LaneShared>>) {
        lanes.retain(|lane| {
            // Without receipts, no caller can ask whether the rest is durable.
            let settled = lane.durable.get() == lane.appended.get() || Arc::strong_count(lane) == 1;
            // Acquire: pairs with the Release in `LaneShared::retire`.
            let over = lane.retired.load(Ordering::Acquire) && settled;
            if over && !lane.of_commands {
                self.retired_events.fetch_add(lane.appended.get(), Ordering::Relaxed);
            }
            !over
        });
    }

    /// Returns the number of events of lanes that were removed.
    pub(crate) fn retired_events(&self) -> u64 {
        self.retired_events.load(Ordering::Relaxed)
    }

    /// Returns a copy of the list.
    pub(crate) fn all(&self) -> Vec<Arc<LaneShared>> {
        lock(&self.lanes).clone()
    }

    /// Wakes the waiters for a durable end up to `offset`.
    pub(crate) fn flushed(&self, offset: u64) {
        self.waiting_flush.reached(offset);
    }

    pub(crate) fn waiting_flush(&self) -> &Waiters {
        &self.waiting_flush
    }

    /// Makes all waiters check again, after a failure or at the end.
    pub(crate) fn wake_all(&self) {
        self.all().iter().for_each(|lane| lane.wake_all());
        self.waiting_flush.wake_all();
    }
}
