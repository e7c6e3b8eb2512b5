//! The entry point for events: checks an event, routes its key to a shard, and pushes the event into the lane.
//!
//! One [`Producer`] owns one lane to every shard and belongs to one thread. Threads without a producer of their own
//! share a [`crate::SharedProducer`].

use std::cell::RefCell;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::clock::{Clock, Lateness, NOT_DUE, Nanos, lateness};
use crate::error::{Rejected, RejectedReason, WaitError};
use crate::event::{Event, Key, Offset, Router, Scratch, has_one_size, is_declared};
use crate::lane::counts::LaneShared;
use crate::lane::door::ShardDoor;
use crate::lane::ring::{Slot, free_slots, push_chunk};
use crate::sync::Wait;
use crate::sync::{Deadline, Idle, Ordering, Patience};

use crate::lane::receipt::OffsetWatch;
use crate::lane::receipt::Receipt;

/// The reason why a batch stopped early, and the number of events accepted until then.
#[derive(Debug, Clone, thiserror::Error)]
#[error("the batch stopped after {accepted} events: {reason}")]
#[non_exhaustive]
pub struct BatchRejected {
    /// The number of events of this batch that were accepted. These are no longer in the vector.
    pub accepted: usize,
    /// The reason why the first event left in the vector was refused.
    pub reason: RejectedReason,
}

/// The producer's end of its lane to one shard.
struct Lane<E> {
    ring: rtrb::Producer<Slot<E>>,
    shared: Arc<LaneShared>,
    door: Arc<ShardDoor>,
    /// The number of events accepted.
    published: u64,
    /// This shard's part of a batch; empty between calls.
    staged: Vec<Slot<E>>,
}

/// The parts of a lane's producing end.
pub(crate) type LaneParts<E> = (rtrb::Producer<Slot<E>>, Arc<LaneShared>, Arc<ShardDoor>);

/// Publishes the events of one thread, through an SPSC lane to every shard.
///
/// Events of one key that one producer publishes are appended in publish order.
/// [`Engine::producer`](crate::Engine::producer) returns a producer. A producer may outlive the engine; it then refuses
/// every event.
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
/// # let dir = std::env::temp_dir().join(format!("corelane-producer-{}", std::process::id()));
/// let engine = EventLog::<Moved>::open(Config::new(&dir).shards(2))?;
/// let mut producer = engine.producer();
///
/// // Waits while the lane is full.
/// let receipt = producer.publish(Key::new(42), Moved { x: 1.0 })?;
/// receipt.durable().wait()?;
///
/// // Hands the event back if the lane is full.
/// if let Err(refused) = producer.try_publish(Key::new(42), Moved { x: 2.0 }) {
///     eprintln!("not published: {}", refused.reason());
/// }
///
/// // Many at once: accepted events leave the vector.
/// let mut events: Vec<_> = (0..100).map(|user| (Key::new(user), Moved { x: 0.0 })).collect();
/// producer.publish_batch(&mut events)?;
/// assert!(events.is_empty());
/// # engine.shutdown(Deadline::NEVER)?;
/// # std::fs::remove_dir_all(&dir)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Producer<E: Event> {
    lanes: Vec<Lane<E>>,
    clock: Clock,
    wait: Wait,
    bounds: Bounds,
    router: Router,
}

impl<E: Event> std::fmt::Debug for Producer<E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Producer").field("shards", &self.lanes.len()).finish_non_exhaustive()
    }
}

/// Checks, before an event is accepted, that its type is declared and its archive is not too large.
#[derive(Debug)]
pub(crate) struct Bounds {
    bytes_max: usize,
    /// Memory for a trial archive; `None` for events of one size.
    trial: Option<(Box<[u8]>, Scratch)>,
}

impl Bounds {
    pub(crate) fn new<E: Event>(bytes_max: usize) -> Self {
        // Events of one size need no trial archive.
        if has_one_size::<E>() { Self { bytes_max, trial: None } } else { Self::with_trial(bytes_max) }
    }

    /// Checks one event with the trial memory of the current thread.
    pub(crate) fn check_once<E: Event>(event: E, bytes_max: usize) -> Result<E, Rejected<E>> {
        let event = declared(event)?;
        if has_one_size::<E>() && size_of::<E::Archived>() <= bytes_max {
            return Ok(event);
        }
        thread_local! {
            // Reused for all events of a thread, and replaced when the limit changes.
            static TRIAL: RefCell<Bounds> = const { RefCell::new(Bounds { bytes_max: 0, trial: None }) };
        }
        TRIAL.with_borrow_mut(|bounds| {
            if bounds.bytes_max != bytes_max {
                *bounds = Bounds::with_trial(bytes_max);
            }
            bounds.check(event)
        })
    }

    fn with_trial(bytes_max: usize) -> Self {
        Self {
            bytes_max,
            trial: Some((vec![0; bytes_max + 16].into_boxed_slice(), Scratch::new(4 * bytes_max.max(1024)))),
        }
    }

    /// Returns the number of leading events that can be accepted, and the reason why the next one cannot.
    #[inline]
    fn fitting<E: Event>(&mut self, events: &[(Key, E)]) -> (usize, Option<RejectedReason>) {
        let event_type = |at: usize| events[at].1.event_type();
        let undeclared = (0..events.len()).find(|&at| !is_declared::<E>(event_type(at)));
        let mut reason = undeclared.map(|at| RejectedReason::UndeclaredType { event_type: event_type(at) });
        let events = &events[..undeclared.unwrap_or(events.len())];
        let fitting = match &mut self.trial {
            None if size_of::<E::Archived>() <= self.bytes_max => events.len(),
            None => 0,
            Some((out, scratch)) => {
                let skip = out.as_ptr().align_offset(16);
                let unfit =
                    |(_, event): &(Key, E)| event.encode(&mut out[skip..skip + self.bytes_max], scratch).is_none();
                events.iter().position(unfit).unwrap_or(events.len())
            }
        };
        if fitting < events.len() {
            reason = Some(RejectedReason::TooLarge { bytes_max: self.bytes_max });
        }
        (fitting, reason)
    }

    /// Returns the event if it can be accepted.
    #[inline]
    pub(crate) fn check<E: Event>(&mut self, event: E) -> Result<E, Rejected<E>> {
        if self.accepts(&event) { Ok(event) } else { Err(self.refusal(event)) }
    }

    /// Returns `true` if the event's type is declared and its archive is not too large.
    #[inline(always)]
    fn accepts<E: Event>(&mut self, event: &E) -> bool {
        is_declared::<E>(event.event_type())
            && match &mut self.trial {
                None => size_of::<E::Archived>() <= self.bytes_max,
                Some((out, scratch)) => {
                    // Aligned to 16 bytes, as in the log, because the size depends on the alignment.
                    let skip = out.as_ptr().align_offset(16);
                    event.encode(&mut out[skip..skip + self.bytes_max], scratch).is_some()
                }
            }
    }

    /// Returns an event that was not accepted, with the reason.
    #[cold]
    fn refusal<E: Event>(&self, event: E) -> Rejected<E> {
        match declared(event) {
            Ok(event) => Rejected::TooLarge { event, bytes_max: self.bytes_max },
            Err(undeclared) => undeclared,
        }
    }
}

/// An event that was not pushed into a lane.
enum NotPushed<E> {
    /// The lane is closed.
    Closed(E),
    /// The lane is full.
    Full(Slot<E>),
}

/// Refuses an event whose type is not declared, because it could not be read again.
#[inline(always)]
fn declared<E: Event>(event: E) -> Result<E, Rejected<E>> {
    let event_type = event.event_type();
    if is_declared::<E>(event_type) { Ok(event) } else { Err(Rejected::UndeclaredType { event, event_type }) }
}

impl<E: Event> Producer<E> {
    pub(crate) fn new(
        lanes: Vec<LaneParts<E>>,
        clock: Clock,
        wait: Wait,
        event_bytes_max: usize,
        router: Router,
    ) -> Self {
        let lanes = lanes
            .into_iter()
            .map(|(ring, shared, door)| Lane { ring, shared, door, published: 0, staged: Vec::new() })
            .collect();
        Self { lanes, clock, wait, bounds: Bounds::new::<E>(event_bytes_max), router }
    }

    /// Publishes an event, waiting for room with the configured wait strategy.
    ///
    /// # Errors
    /// Returns the event with the reason: the engine is closed, the shard has failed, or the event is too large or of
    /// an undeclared type.
    #[inline]
    pub fn publish(&mut self, key: Key, event: E) -> Result<Receipt, Rejected<E>> {
        let published = self.clock.now();
        self.send(key, event, published, NOT_DUE, Patience::Forever)
    }

    /// Publishes an event if the lane has room for it now.
    ///
    /// # Errors
    /// As [`Producer::publish`]; also returns `Full` or `StorageFull`.
    #[inline]
    pub fn try_publish(&mut self, key: Key, event: E) -> Result<Receipt, Rejected<E>> {
        let published = self.clock.now();
        self.send(key, event, published, NOT_DUE, Patience::None)
    }

    /// Publishes an event, waiting for room until `deadline`.
    ///
    /// # Errors
    /// As [`Producer::try_publish`].
    pub fn publish_until(&mut self, key: Key, event: E, deadline: impl Into<Deadline>) -> Result<Receipt, Rejected<E>> {
        let deadline = deadline.into().instant();
        let published = self.clock.now();
        self.send(key, event, published, NOT_DUE, Patience::until(deadline))
    }

    /// Publishes an event that was due `late` ago, for open-loop load generators.
    ///
    /// The `*Due` histograms measure from the event's due time, so they show stalls of the engine in full (no
    /// coordinated omission). Lateness is recorded to within 0.05 %, up to 26 days.
    ///
    /// # Errors
    /// As [`Producer::publish`].
    pub fn publish_due(&mut self, key: Key, event: E, late: Duration) -> Result<Receipt, Rejected<E>> {
        let published = self.clock.now();
        self.send(key, event, published, lateness(late), Patience::Forever)
    }

    #[inline]
    fn send(
        &mut self,
        key: Key,
        event: E,
        published: Nanos,
        late: Lateness,
        patience: Patience,
    ) -> Result<Receipt, Rejected<E>> {
        if !self.bounds.accepts(&event) {
            return Err(self.bounds.refusal(event));
        }
        self.push_checked(key, event, published, late, patience)
    }

    /// Returns the event if it can be accepted.
    #[inline]
    pub(crate) fn check(&mut self, event: E) -> Result<E, Rejected<E>> {
        self.bounds.check(event)
    }

    /// Publishes an event that `check` has accepted.
    #[inline]
    pub(crate) fn push(
        &mut self,
        key: Key,
        event: E,
        published: Nanos,
        patience: Patience,
    ) -> Result<Receipt, Rejected<E>> {
        self.push_checked(key, event, published, NOT_DUE, patience)
    }

    #[inline]
    fn push_checked(
        &mut self,
        key: Key,
        event: E,
        published: Nanos,
        late: Lateness,
        patience: Patience,
    ) -> Result<Receipt, Rejected<E>> {
        // A single shard needs no routing.
        let shard = if let [_] = &self.lanes[..] { 0 } else { self.router.index(key) };
        let lane = &mut self.lanes[shard];
        match lane.try_push(Slot::new(key, published, late, event)) {
            Ok(receipt) => Ok(receipt),
            Err(NotPushed::Closed(event)) => Err(lane.door.refusal(event)),
            Err(NotPushed::Full(slot)) => lane.push_when_there_is_room(slot, self.wait, patience),
        }
    }

    /// Publishes an event and waits until it is in the log or `deadline` passes. Returns its offset, `None` if
    /// retention has freed the event, or the reason why the offset is not known.
    ///
    /// # Errors
    /// As [`Producer::publish_until`]; returns `Full` also if earlier events are not appended by the deadline.
    pub(crate) fn publish_placed(
        &mut self,
        key: Key,
        event: E,
        deadline: Option<Instant>,
    ) -> Result<Result<Option<Offset>, WaitError>, Rejected<E>> {
        let event = self.bounds.check(event)?;
        let lane = &self.lanes[self.router.index(key)];
        let before = lane.receipt().appended();
        match deadline.map_or_else(|| before.wait(), |at| before.wait_until(at)) {
            Ok(()) => {}
            Err(WaitError::TimedOut) => return Err(lane.door.full(event)),
            Err(_) => return Err(lane.door.refusal(event)),
        }
        let watch = OffsetWatch::before(&lane.shared, lane.published + 1);
        let (published, patience) = (self.clock.now(), Patience::until(deadline));
        drop(self.push_checked(key, event, published, NOT_DUE, patience)?);
        Ok(watch.wait(deadline))
    }

    /// Publishes events in order, waiting for room. Slots are claimed and made visible in chunks.
    ///
    /// Removes accepted events from `events`. After an error the other events stay, with each key's events in order.
    ///
    /// # Errors
    /// Returns the number of accepted events, and the reason why the next one was refused.
    pub fn publish_batch(&mut self, events: &mut Vec<(Key, E)>) -> Result<(), BatchRejected> {
        self.batch(events, Patience::Forever)
    }

    /// As [`Producer::publish_batch`], but without waiting for room.
    ///
    /// # Errors
    /// As [`Producer::publish_batch`]; also returns `Full` or `StorageFull`.
    pub fn try_publish_batch(&mut self, events: &mut Vec<(Key, E)>) -> Result<(), BatchRejected> {
        self.batch(events, Patience::None)
    }

    /// As [`Producer::publish_batch`], but waits for room only until `deadline`.
    ///
    /// # Errors
    /// As [`Producer::try_publish_batch`].
    pub fn publish_batch_until(
        &mut self,
        events: &mut Vec<(Key, E)>,
        deadline: impl Into<Deadline>,
    ) -> Result<(), BatchRejected> {
        let deadline = deadline.into().instant();
        self.batch(events, Patience::until(deadline))
    }

    fn batch(&mut self, events: &mut Vec<(Key, E)>, patience: Patience) -> Result<(), BatchRejected> {
        let total = events.len();
        let published = self.clock.now();
        let (fitting, mut refused) = self.bounds.fitting(events);
        let slot = |(key, event)| Slot::new(key, published, NOT_DUE, event);
        if let [lane] = &mut self.lanes[..] {
            if let Err(reason) = lane.push_all(events, fitting, slot, self.wait, patience) {
                refused = Some(reason);
            }
        } else {
            let router = self.router;
            // A placement that panics loses no event.
            router.try_all(events[..fitting].iter().map(|(key, _)| *key));
            for event in events.drain(..fitting) {
                self.lanes[router.index(event.0)].staged.push(slot(event));
            }
            let mut rest = Vec::new();
            for lane in &mut self.lanes {
                let mut staged = std::mem::take(&mut lane.staged);
                let count = staged.len();
                if let Err(reason) = lane.push_all(&mut staged, count, |slot| slot, self.wait, patience) {
                    refused.get_or_insert(reason);
                    rest.extend(staged.drain(..).map(|slot| (slot.key, slot.event)));
                }
                lane.staged = staged;
            }
            events.splice(..0, rest);
        }
        match refused {
            None => Ok(()),
            Some(reason) => Err(BatchRejected { accepted: total - events.len(), reason }),
        }
    }

    /// Returns one receipt per shard, which covers everything that this producer published before this call.
    #[must_use]
    pub fn receipts(&self) -> Vec<Receipt> {
        self.lanes.iter().map(Lane::receipt).collect()
    }

    /// Returns this producer's lane to every shard, with the number of events accepted there.
    pub(crate) fn lanes(&self) -> impl Iterator<Item = (Arc<LaneShared>, u64)> + '_ {
        self.lanes.iter().map(|lane| (Arc::clone(&lane.shared), lane.published))
    }

    /// Returns the number of events that this producer has accepted.
    #[must_use]
    pub fn published(&self) -> u64 {
        self.lanes.iter().map(|lane| lane.published).sum()
    }
}

impl<E> Lane<E> {
    /// Moves the first `count` items of `source` into the ring, in order, in chunks that each become visible at once.
    /// Items that were not accepted stay in `source`.
    fn push_all<T>(
        &mut self,
        source: &mut Vec<T>,
        count: usize,
        slot: impl Fn(T) -> Slot<E>,
        wait: Wait,
        patience: Patience,
    ) -> Result<(), RejectedReason> {
        let mut left = count;
        let mut idle = Idle::new(wait);
        while left > 0 {
            let Some(inside) = self.shared.enter() else { return Err(self.door.refusal(()).reason()) };
            let room = free_slots(&self.ring, left);
            if room > 0 {
                let pushed = push_chunk(&mut self.ring, room, source.drain(..room).map(&slot));
                debug_assert_eq!(pushed, room);
                left -= pushed;
                self.published += pushed as u64;
                self.shared.published.store(self.published, Ordering::Relaxed);
                drop(inside);
                self.door.signal.notify();
                idle.reset();
            } else if patience.is_over() {
                return Err(self.door.full(()).reason());
            } else {
                drop(inside);
                self.await_room(&mut idle, patience);
            }
        }
        Ok(())
    }

    #[inline]
    fn receipt(&self) -> Receipt {
        Receipt::new(Arc::clone(&self.shared), self.published)
    }

    #[inline(always)]
    fn try_push(&mut self, slot: Slot<E>) -> Result<Receipt, NotPushed<E>> {
        let Some(inside) = self.shared.enter() else { return Err(NotPushed::Closed(slot.event)) };
        match self.ring.push(slot) {
            Ok(()) => {
                self.published += 1;
                self.shared.published.store(self.published, Ordering::Relaxed);
                drop(inside);
                self.door.signal.notify();
                Ok(self.receipt())
            }
            Err(rtrb::PushError::Full(slot)) => Err(NotPushed::Full(slot)),
        }
    }

    #[cold]
    #[inline(never)]
    fn push_when_there_is_room(
        &mut self,
        mut slot: Slot<E>,
        wait: Wait,
        patience: Patience,
    ) -> Result<Receipt, Rejected<E>> {
        let mut idle = Idle::new(wait);
        loop {
            if patience.is_over() {
                return Err(self.door.full(slot.event));
            }
            self.await_room(&mut idle, patience);
            slot = match self.try_push(slot) {
                Ok(receipt) => return Ok(receipt),
                Err(NotPushed::Closed(event)) => return Err(self.door.refusal(event)),
                Err(NotPushed::Full(slot)) => slot,
            };
        }
    }

    #[cold]
    fn await_room(&mut self, idle: &mut Idle, patience: Patience) {
        let Lane { ring, shared, door, .. } = self;
        idle.step(&shared.space, patience.deadline(), || {
            ring.slots() > 0 || shared.close_gate.is_closed() || door.log.failure().is_some()
        });
    }
}

impl<E> Drop for Lane<E> {
    fn drop(&mut self) {
        // The shard notices an abandoned lane only during a turn. (The ring's own end is dropped after this call, so
        // the turn may come too early; the shard checks again before it next sleeps.)
        self.door.signal.notify();
    }
}
