//! The door: the state that producers and clients share with a shard.

use std::sync::Arc;

use super::registry::LaneRegistry;
use crate::error::Rejected;
use crate::log::segment::ShardLog;
use crate::sync::{AtomicBool, Signal};

/// The state that producers and clients share with a shard.
#[derive(Debug)]
pub(crate) struct ShardDoor {
    pub(crate) log: Arc<ShardLog>,
    /// Wakes the shard.
    pub(crate) signal: Arc<Signal>,
    /// `true` once the engine refuses further events.
    pub(crate) closing: AtomicBool,
    /// `true` once the shard takes no further turn; its thread then runs no more application code.
    pub(crate) turns_ended: AtomicBool,
    pub(crate) lanes: Arc<LaneRegistry>,
}

impl ShardDoor {
    /// Returns the event with the reason why this shard refuses it: the shard has failed, or the engine is closed.
    pub(crate) fn refusal<E>(&self, event: E) -> Rejected<E> {
        match self.log.failure() {
            Some(failure) => Rejected::ShardFailed(event, failure.clone()),
            None => Rejected::Closed(event),
        }
    }

    /// Returns the event with the reason why there is no room for it: the storage or the lane is full.
    pub(crate) fn full<E>(&self, event: E) -> Rejected<E> {
        if self.log.is_storage_full() { Rejected::StorageFull(event) } else { Rejected::Full(event) }
    }
}
