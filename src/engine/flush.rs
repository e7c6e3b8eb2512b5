//! Flush: waits until everything accepted is durable, on all shards.

use std::sync::Arc;

use super::Engine;
use super::handle::Handle;
use crate::error::WaitError;
use crate::lane::counts::LaneShared;
use crate::lane::door::ShardDoor;
use crate::lane::flush::{flush_shard, flush_shard_until};
use crate::lane::requests::SyncRequests;
use crate::state::aggregate::Aggregate;
use crate::sync::{Deadline, Ordering};

/// A shard that is flushed: its lanes, each with the number of events accepted.
struct Flushing {
    door: Arc<ShardDoor>,
    syncer: Arc<SyncRequests>,
    lanes: Vec<(Arc<LaneShared>, u64)>,
}

/// Combines the results of two shards. A failure takes precedence over a deadline, the first over later ones.
fn both_flushed(first: Result<(), WaitError>, then: Result<(), WaitError>) -> Result<(), WaitError> {
    match then {
        Err(WaitError::ShardFailed(_)) if !matches!(first, Err(WaitError::ShardFailed(_))) => then,
        _ => first.and(then),
    }
}

impl<A: Aggregate> Engine<A> {
    /// Waits until everything accepted before this call is appended and durable, in every durability mode. Whatever the
    /// events depend on becomes durable first: if retention has freed events in `OsCache` mode, this is the checkpoint
    /// that stands for them. If a shard fails, the others are still flushed.
    ///
    /// # Errors
    /// `ShardFailed` with the failure of the first shard that failed; `TimedOut` at `deadline`; `OnEngineThread` if
    /// something is not yet durable and the thread is one that an engine waits for.
    pub fn flush(&self, deadline: impl Into<Deadline>) -> Result<(), WaitError> {
        let deadline = deadline.into().instant();
        let mut outcome = Ok(());
        for Flushing { door, syncer, lanes } in self.begin_flush() {
            outcome = both_flushed(outcome, flush_shard_until(deadline, &door, &syncer, lanes));
        }
        outcome
    }

    /// As [`Engine::flush`], for tasks. The call itself decides what is covered, not the first poll.
    ///
    /// Cancel safety: dropping the future ends the wait; the sync that the call asked for is made all the same.
    ///
    /// # Errors
    /// `ShardFailed` with the failure of the first shard that failed.
    pub fn flush_async(&self) -> impl Future<Output = Result<(), WaitError>> + Send + use<A> {
        let shards = self.begin_flush();
        async move {
            let mut outcome = Ok(());
            for Flushing { door, syncer, lanes } in shards {
                outcome = both_flushed(outcome, flush_shard(&door, &syncer, lanes).await);
            }
            outcome
        }
    }

    /// Notes what has been accepted so far, and starts a sync of every shard: the caller then waits for the slowest
    /// shard, not for the sum.
    fn begin_flush(&self) -> Vec<Flushing> {
        let begin = |shard: &Handle<A>| {
            let lanes = shard.door.lanes.all().into_iter();
            let published = |lane: Arc<LaneShared>| {
                let published = lane.published.load(Ordering::SeqCst);
                (lane, published)
            };
            Flushing {
                door: Arc::clone(&shard.door),
                syncer: Arc::clone(&shard.syncer),
                lanes: lanes.map(published).collect(),
            }
        };
        let begun: Vec<_> = self.shards.iter().map(begin).collect();
        begun.iter().for_each(|shard| shard.syncer.flush(shard.door.log.appended.get()));
        begun
    }
}
