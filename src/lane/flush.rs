//! Flush: waits until a shard's accepted events are durable and their receipts report it.
//!
//! A flush runs on the caller's thread or task. It asks the syncer for a sync, and reads the positions and counts that
//! the shard and the syncer publish.

use std::pin::pin;
use std::sync::Arc;
use std::time::Instant;

use crate::error::WaitError;
use crate::lane::counts::LaneShared;
use crate::lane::door::ShardDoor;
use crate::lane::requests::SyncRequests;
use crate::sync::{block_on, until};

/// Blocks until the first `published` events of each lane are appended and durable; see [`flush_shard`].
pub(crate) fn flush_shard_until(
    deadline: Option<Instant>,
    door: &ShardDoor,
    syncer: &SyncRequests,
    lanes: Vec<(Arc<LaneShared>, u64)>,
) -> Result<(), WaitError> {
    block_on(deadline, &mut pin!(flush_shard(door, syncer, lanes)))?
}

/// Waits until the first `published` events of each lane are appended and durable. `lanes` holds lanes of the shard,
/// each with its `published`.
pub(crate) async fn flush_shard(
    door: &ShardDoor,
    syncer: &SyncRequests,
    lanes: Vec<(Arc<LaneShared>, u64)>,
) -> Result<(), WaitError> {
    let log = &*door.log;
    let unless_failed = |is_reached: bool| match log.failure() {
        _ if is_reached => Some(Ok(())),
        failure => failure.map(|failure| Err(WaitError::from(failure.clone()))),
    };
    let mut counted = Vec::with_capacity(lanes.len());
    for (lane, published) in lanes {
        let reached = || unless_failed(lane.is_appended(published));
        until(|[at], waker| lane.register_appended(at, published, waker), reached).await?;
        counted.push((lane.appended_count(), lane));
    }
    let end = log.appended.get();
    syncer.flush(end);
    let reached = || unless_failed(log.durable.get() >= end);
    until(|[at], waker| door.lanes.waiting_flush().register(at, end, waker), reached).await?;
    for (count, lane) in counted {
        // A sync may cover an event before its lane counts it. The next sync raises the lane's count; if nothing is left
        // to sync, the syncer raises it. So this asks again whenever the log has grown, because no further sync may be
        // due, and whenever what it asked for is synced, because that sync may have read the counts too early as well. It
        // never asks beyond the appended end, because the syncer could not sleep until the log reached that offset.
        while lane.durable_count() < count {
            let end = log.appended.get();
            let durable = log.durable.get();
            syncer.flush(end);
            let is_changed = || log.appended.get() > end || log.durable.get() > durable;
            let reached = || unless_failed(lane.durable_count() >= count || is_changed());
            let register = |[counted, grown, synced]: &mut [_; 3], waker: &_| {
                lane.register_durable(counted, count, waker);
                log.grown.register(grown, end + 1, waker);
                log.synced.register(synced, durable + 1, waker);
            };
            until(register, reached).await?;
        }
    }
    Ok(())
}
