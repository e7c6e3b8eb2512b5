//! Waits until what one shard has accepted is durable, and until everybody who can ask knows it.
//!
//! Runs on the caller's thread; it asks the syncer and watches what the shard and the syncer publish.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::error::WaitError;
use crate::lane::counts::LaneShared;
use crate::lane::door::ShardDoor;
use crate::lane::requests::SyncRequests;
use crate::sync::block_until;

/// How long a flush waits for a lane to be told, before it asks again.
const SETTLE_EVERY: Duration = Duration::from_millis(1);

/// Waits until so many events of each of a shard's lanes are appended and durable.
pub(crate) fn flush_shard(
    door: &ShardDoor,
    syncer: &SyncRequests,
    lanes: Vec<(Arc<LaneShared>, u64)>,
    deadline: Option<Instant>,
) -> Result<(), WaitError> {
    let failed = || door.log.failure().map(|failure| Err(WaitError::from(failure.clone())));
    let mut counted = Vec::with_capacity(lanes.len());
    for (lane, published) in lanes {
        let reached = || if lane.is_appended(published) { Some(Ok(())) } else { failed() };
        block_until(deadline, |waker| lane.register_appended(published, waker), reached)?;
        counted.push((lane.appended_count(), lane));
    }
    let end = door.log.appended.get();
    syncer.flush(end);
    let reached = || if door.log.durable.get() >= end { Some(Ok(())) } else { failed() };
    block_until(deadline, |waker| door.lanes.waiting_flush().register(end, waker), reached)?;
    for (count, lane) in counted {
        // A sync may have covered an event before its lane counted it; the next one tells the lane, or the syncer where
        // nothing is left to sync. Asked for again and again: the one under way may have looked at the lanes too early
        // as well. Never beyond what is appended: a syncer that waits for that could not sleep.
        while lane.durable_count() < count {
            syncer.flush(door.log.appended.get());
            let soon = Instant::now() + SETTLE_EVERY;
            let reached = || if lane.durable_count() >= count { Some(Ok(())) } else { failed() };
            let settled = block_until(
                Some(deadline.map_or(soon, |deadline| deadline.min(soon))),
                |waker| lane.register_durable(count, waker),
                reached,
            );
            match settled {
                Err(WaitError::TimedOut) if deadline.is_none_or(|deadline| Instant::now() < deadline) => {}
                settled => settled?,
            }
        }
    }
    Ok(())
}
