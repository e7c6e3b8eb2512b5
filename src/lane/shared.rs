//! The shared lane: one bounded queue of many producers to one shard.

use std::borrow::Borrow;
use std::sync::Arc;

use crossbeam::queue::ArrayQueue;

use super::counts::LaneShared;
use super::door::ShardDoor;
use super::ring::Slot;
use crate::error::Rejected;
use crate::sync::{AtomicU64, Ordering};

/// One event in a shared lane, with the place for its ticket if the publisher asked for a receipt.
#[derive(Debug)]
pub(crate) struct SharedSlot<E> {
    pub(crate) slot: Slot<E>,
    pub(crate) ticket: Option<Arc<AtomicU64>>,
}

impl<E> Borrow<Slot<E>> for SharedSlot<E> {
    fn borrow(&self) -> &Slot<E> {
        &self.slot
    }
}

/// The state that both ends of a shared lane hold.
#[derive(Debug)]
pub(crate) struct SharedLane<E> {
    pub(crate) queue: ArrayQueue<SharedSlot<E>>,
    pub(crate) shared: Arc<LaneShared>,
    pub(crate) door: Arc<ShardDoor>,
    /// The number of tasks that wait for room.
    pub(crate) tasks_waiting: AtomicU64,
}

impl<E> SharedLane<E> {
    pub(crate) fn new(queue: ArrayQueue<SharedSlot<E>>, shared: Arc<LaneShared>, door: Arc<ShardDoor>) -> Self {
        Self { queue, shared, door, tasks_waiting: AtomicU64::new(0) }
    }

    /// Pushes an event into the queue. Returns it as `Full` if there is no room now.
    pub(crate) fn try_push(&self, slot: SharedSlot<E>) -> Result<(), Rejected<SharedSlot<E>>> {
        let Some(inside) = self.shared.enter() else { return Err(self.door.refusal(slot)) };
        // Looked at before counting: taking an event back makes all waiters check again.
        if self.queue.is_full() {
            return Err(self.door.full(slot));
        }
        // The event is counted before it is visible. So the count that a publisher reads covers every event before its
        // own in the queue.
        self.shared.published.fetch_add(1, Ordering::SeqCst);
        match self.queue.push(slot) {
            Ok(()) => {
                drop(inside);
                self.door.signal.notify();
                Ok(())
            }
            Err(slot) => {
                self.shared.unpublish();
                Err(self.door.full(slot))
            }
        }
    }
}
