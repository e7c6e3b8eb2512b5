//! Flush: waits until a shard's accepted events are durable and their receipts report it.
//!
//! A flush runs on the caller's thread. It asks the syncer for a sync, and reads the positions and counts that the
//! shard and the syncer publish.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::error::WaitError;
use crate::lane::counts::LaneShared;
use crate::lane::door::ShardDoor;
use crate::lane::requests::SyncRequests;
use crate::sync::block_until;

/// The time that a flush waits for a lane's durable count before it asks the syncer again.
const SETTLE_EVERY: Duration = Duration::from_millis(1);

/// Waits until the first `published` events of each lane are appended and durable. `lanes` holds lanes of the shard,
/// each with its `published`.
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
        block_until(deadline, |at, waker| lane.register_thread(at, published, waker), reached)?;
        counted.push((lane.appended_count(), lane));
    }
    let end = door.log.appended.get();
    syncer.flush(end);
    let reached = || if door.log.durable.get() >= end { Some(Ok(())) } else { failed() };
    block_until(deadline, |at, waker| door.lanes.waiting_flush().register_own(at, end, waker), reached)?;
    for (count, lane) in counted {
        // A sync may cover an event before its lane counts it. The next sync updates the lane; if nothing is left to
        // sync, the syncer updates it. The loop asks repeatedly, because a sync in progress may have read the counts
        // too early as well. The loop never asks beyond the appended end, because the syncer could not sleep until the
        // log reached that offset.
        while lane.durable_count() < count {
            syncer.flush(door.log.appended.get());
            let soon = Instant::now() + SETTLE_EVERY;
            let reached = || if lane.durable_count() >= count { Some(Ok(())) } else { failed() };
            let settled = block_until(
                Some(deadline.map_or(soon, |deadline| deadline.min(soon))),
                |at, waker| lane.register_durable(at, count, waker),
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
