//! The shard's door: what a producer or client needs of a shard.

use std::sync::Arc;

use super::registry::LaneRegistry;
use crate::error::Rejected;
use crate::log::segment::ShardLog;
use crate::sync::{AtomicBool, Signal};

/// What a producer needs of a shard.
#[derive(Debug)]
pub(crate) struct ShardDoor {
    pub(crate) log: Arc<ShardLog>,
    /// Wakes the shard.
    pub(crate) signal: Arc<Signal>,
    /// The engine no longer takes events.
    pub(crate) closing: AtomicBool,
    /// The shard takes no further turn: no code of the application runs on its thread any more.
    pub(crate) turns_ended: AtomicBool,
    pub(crate) lanes: Arc<LaneRegistry>,
}

impl ShardDoor {
    /// Why this shard takes nothing (more) now.
    pub(crate) fn refusal<E>(&self, event: E) -> Rejected<E> {
        match self.log.failure() {
            Some(failure) => Rejected::ShardFailed(event, failure.clone()),
            None => Rejected::Closed(event),
        }
    }

    pub(crate) fn full<E>(&self, event: E) -> Rejected<E> {
        if self.log.is_storage_full() { Rejected::StorageFull(event) } else { Rejected::Full(event) }
    }
}
