//! The shared producer: an entry point for many threads, with one bounded queue per shard.
//!
//! Events of one key published by one thread keep their order, because the queue is first in, first out.

use std::borrow::Borrow;
use std::sync::Arc;

use crossbeam::queue::ArrayQueue;

use crate::clock::{Clock, NOT_DUE};
use crate::error::{Rejected, WaitError};
use crate::event::{Event, Key, Router};
use crate::ingress::producer::Bounds;
use crate::lane::counts::LaneShared;
use crate::lane::door::ShardDoor;
use crate::lane::receipt::Receipt;
use crate::lane::ring::Slot;
use crate::sync::Wait;
use crate::sync::{AtomicU64, Deadline, Idle, Ordering, Patience};

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
}

/// Publishes events of any number of threads, which clone it or share it by reference.
///
/// A shared producer is slower than a [`Producer`](crate::Producer): its lanes are bounded multi-producer queues, and
/// each publish is one queue operation. [`Engine::shared_producer`](crate::Engine::shared_producer) returns a shared
/// producer.
///
/// ```
/// # use corelane::{Bounded, Config, Deadline, Event, EventLog, EventType, EventTypeId, Key};
/// # use rkyv::{Archive, Deserialize, Serialize};
/// # #[derive(Archive, Serialize, Deserialize, Bounded)]
/// # struct Moved { x: f64 }
/// # impl Event for Moved {
/// #     const TYPES: &'static [EventType] = &[EventType::new(1, "moved", 1)];
/// #     fn event_type(&self) -> EventTypeId { EventTypeId(1) }
/// # }
/// # let dir = std::env::temp_dir().join(format!("corelane-shared-{}", std::process::id()));
/// let engine = EventLog::<Moved>::open(Config::new(&dir).shards(2))?;
/// let producer = engine.shared_producer();
/// std::thread::scope(|scope| {
///     for user in 0..4 {
///         let producer = producer.clone();
///         scope.spawn(move || producer.publish(Key::new(user), Moved { x: 1.0 }).expect("the engine is open"));
///     }
/// });
///
/// let receipt = producer.publish_with_receipt(Key::new(42), Moved { x: 2.0 })?;
/// receipt.wait_appended()?.durable().wait()?;
/// # engine.shutdown(Deadline::NEVER)?;
/// # std::fs::remove_dir_all(&dir)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct SharedProducer<E: Event> {
    lanes: Arc<[Arc<SharedLane<E>>]>,
    clock: Clock,
    wait: Wait,
    event_bytes_max: usize,
    router: Router,
}

impl<E: Event> Clone for SharedProducer<E> {
    fn clone(&self) -> Self {
        Self {
            lanes: Arc::clone(&self.lanes),
            clock: self.clock.clone(),
            wait: self.wait,
            event_bytes_max: self.event_bytes_max,
            router: self.router,
        }
    }
}

impl<E: Event> std::fmt::Debug for SharedProducer<E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SharedProducer").field("shards", &self.lanes.len()).finish_non_exhaustive()
    }
}

impl<E: Event> SharedProducer<E> {
    pub(crate) fn new(
        lanes: Arc<[Arc<SharedLane<E>>]>,
        clock: Clock,
        wait: Wait,
        event_bytes_max: usize,
        router: Router,
    ) -> Self {
        Self { lanes, clock, wait, event_bytes_max, router }
    }

    /// Publishes an event, waiting for room.
    ///
    /// # Errors
    /// As [`crate::Producer::publish`].
    pub fn publish(&self, key: Key, event: E) -> Result<(), Rejected<E>> {
        self.send(key, event, None, Patience::Forever).map(drop)
    }

    /// Publishes an event if the lane has room for it now.
    ///
    /// # Errors
    /// As [`crate::Producer::try_publish`].
    pub fn try_publish(&self, key: Key, event: E) -> Result<(), Rejected<E>> {
        self.send(key, event, None, Patience::None).map(drop)
    }

    /// Publishes an event, waiting for room until `deadline`.
    ///
    /// # Errors
    /// As [`crate::Producer::publish_until`].
    pub fn publish_until(&self, key: Key, event: E, deadline: impl Into<Deadline>) -> Result<(), Rejected<E>> {
        let deadline = deadline.into().instant();
        self.send(key, event, None, Patience::until(deadline)).map(drop)
    }

    /// Publishes an event, waiting for room, and returns a receipt. Each receipt allocates a few bytes, in which the
    /// shard stores the event's ticket.
    ///
    /// # Errors
    /// As [`crate::Producer::publish`].
    pub fn publish_with_receipt(&self, key: Key, event: E) -> Result<SharedReceipt, Rejected<E>> {
        let ticket = Arc::new(AtomicU64::new(UNASSIGNED));
        let lane = self.send(key, event, Some(Arc::clone(&ticket)), Patience::Forever)?;
        Ok(SharedReceipt { lane: Arc::clone(&lane.shared), ticket })
    }

    fn send(
        &self,
        key: Key,
        event: E,
        ticket: Option<Arc<AtomicU64>>,
        patience: Patience,
    ) -> Result<&SharedLane<E>, Rejected<E>> {
        let event = Bounds::check_once(event, self.event_bytes_max)?;
        let lane = &*self.lanes[self.router.index(key)];
        let mut slot = SharedSlot { slot: Slot::new(key, self.clock.now(), NOT_DUE, event), ticket };
        let mut idle = Idle::new(self.wait);
        loop {
            let Some(inside) = lane.shared.enter() else { return Err(lane.door.refusal(slot.slot.event)) };
            // The event is counted before it is visible. So the count that a publisher reads covers every event before
            // its own in the queue.
            lane.shared.published.fetch_add(1, Ordering::SeqCst);
            match lane.queue.push(slot) {
                Ok(()) => {
                    drop(inside);
                    lane.door.signal.notify();
                    return Ok(lane);
                }
                Err(back) => slot = back,
            }
            lane.shared.unpublish();
            drop(inside);
            if patience.is_over() {
                return Err(lane.door.full(slot.slot.event));
            }
            // A signal has one sleeper, but several threads may wait for room here, so they poll and yield the core.
            idle.poll(patience.deadline());
        }
    }
}

/// The value of the ticket until the shard takes the event out of the queue.
pub(crate) const UNASSIGNED: u64 = u64::MAX;

/// A receipt of a [`SharedProducer`]. The shard assigns its ticket when it takes the event out of the queue.
#[derive(Debug, Clone)]
pub struct SharedReceipt {
    lane: Arc<LaneShared>,
    ticket: Arc<AtomicU64>,
}

impl SharedReceipt {
    /// Returns the plain receipt, or `None` until the shard has taken the event out of the queue.
    #[must_use]
    pub fn receipt(&self) -> Option<Receipt> {
        // Acquire: pairs with the shard's Release when it assigns the ticket.
        match self.ticket.load(Ordering::Acquire) {
            UNASSIGNED => None,
            ticket => Some(Receipt::new(Arc::clone(&self.lane), ticket)),
        }
    }

    /// Blocks until the event is in the log, then returns the plain receipt.
    ///
    /// # Errors
    /// Returns `ShardFailed` if the shard fails before that.
    pub fn wait_appended(&self) -> Result<Receipt, WaitError> {
        let receipt = crate::sync::block_until(
            None,
            |waker| self.lane.register_any(waker),
            || match self.receipt() {
                Some(receipt) => Some(Ok(receipt)),
                None => self.lane.log.failure().map(|failure| Err(WaitError::from(failure.clone()))),
            },
        )?;
        receipt.appended().wait()?;
        Ok(receipt)
    }
}
