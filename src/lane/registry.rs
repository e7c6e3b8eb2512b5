//! The lanes of one shard, as every thread but the shard's own sees them.

use std::sync::Arc;

use super::counts::LaneShared;
use crate::sync::{AtomicU64, Mutex, Ordering, Waiters, lock};

/// The lanes of one shard, for whoever is not the shard. Locked when lanes come and go and once a sync; never per event.
#[derive(Debug, Default)]
pub(crate) struct LaneRegistry {
    lanes: Mutex<Vec<Arc<LaneShared>>>,
    waiting_flush: Flush,
    /// Events of lanes that are no longer listed.
    retired_events: AtomicU64,
}

#[derive(Debug)]
struct Flush(Waiters);

impl Default for Flush {
    fn default() -> Self {
        Self(Waiters::new())
    }
}

impl LaneRegistry {
    pub(crate) fn register(&self, lane: &Arc<LaneShared>) {
        let mut lanes = lock(&self.lanes);
        self.forget_retired(&mut lanes);
        lanes.push(Arc::clone(lane));
    }

    /// Every lane with the number of its events that are appended. Forgets lanes nobody can ask about any more.
    pub(crate) fn appended_counts(&self) -> Vec<(Arc<LaneShared>, u64)> {
        let mut lanes = lock(&self.lanes);
        self.forget_retired(&mut lanes);
        lanes.iter().map(|lane| (Arc::clone(lane), lane.appended.get())).collect()
    }

    /// Whether a lane counts events as appended and not as durable.
    pub(crate) fn is_behind(&self) -> bool {
        lock(&self.lanes).iter().any(|lane| lane.durable.get() < lane.appended.get())
    }

    fn forget_retired(&self, lanes: &mut Vec<Arc<LaneShared>>) {
        lanes.retain(|lane| {
            // Where nobody holds a receipt any more, nobody can ask whether the rest is durable.
            let settled = lane.durable.get() == lane.appended.get() || Arc::strong_count(lane) == 1;
            let over = lane.retired.load(Ordering::Acquire) && settled;
            if over && !lane.of_commands {
                self.retired_events.fetch_add(lane.appended.get(), Ordering::Relaxed);
            }
            !over
        });
    }

    /// Events of lanes that came and went.
    pub(crate) fn retired_events(&self) -> u64 {
        self.retired_events.load(Ordering::Relaxed)
    }

    /// A copy of the list.
    pub(crate) fn all(&self) -> Vec<Arc<LaneShared>> {
        lock(&self.lanes).clone()
    }

    /// Everything below `offset` is durable.
    pub(crate) fn flushed(&self, offset: u64) {
        self.waiting_flush.0.reached(offset);
    }

    pub(crate) fn waiting_flush(&self) -> &Waiters {
        &self.waiting_flush.0
    }

    /// Makes everyone who waits look again (after a failure or at the end).
    pub(crate) fn wake_all(&self) {
        self.all().iter().for_each(|lane| lane.wake_all());
        self.waiting_flush.0.reached(u64::MAX);
    }
}
