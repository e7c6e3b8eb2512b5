//! The shared producer: an entry point for many threads, with one bounded queue per shard.
//!
//! Events of one key published by one thread keep their order, because the queue is first in, first out.

use std::sync::Arc;

use super::producer::Bounds;
use super::publishing::Publishing;
use crate::clock::{Clock, NOT_DUE};
use crate::error::Rejected;
use crate::event::{Event, Key, Router};
use crate::lane::ring::Slot;
use crate::lane::shared::SharedLane;
use crate::sync::Wait;

/// Publishes events of any number of threads, which clone it or share it by reference.
///
/// In tasks, `.await` in place of `.wait()` never blocks the runtime's thread.
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
///         scope.spawn(move || producer.publish(Key::new(user), Moved { x: 1.0 }).wait().expect("the engine is open"));
///     }
/// });
///
/// let receipt = producer.publish(Key::new(42), Moved { x: 2.0 }).with_receipt().wait()?; // or `.await`
/// receipt.durable().wait()?;
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

    /// Prepares to publish an event. [`Publishing::wait`] and `.await` publish it, waiting for room.
    pub fn publish(&self, key: Key, event: E) -> Publishing<'_, E> {
        let event = Bounds::check_once(event, self.event_bytes_max);
        let slot = event.map(|event| Slot::new(key, self.clock.now(), NOT_DUE, event));
        let lane = &*self.lanes[self.router.index(key)];
        Publishing::new(lane, self.wait, slot)
    }

    /// Publishes an event if the lane has room for it now.
    ///
    /// # Errors
    /// As [`crate::Producer::try_publish`].
    pub fn try_publish(&self, key: Key, event: E) -> Result<(), Rejected<E>> {
        self.publish(key, event).now()
    }
}
