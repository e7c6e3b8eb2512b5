//! An event on its way into a shared lane.
//!
//! Threads that wait for room poll and yield the core. Tasks wait for appends, which free room: each for another one, so
//! that an append does not wake them all.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use crate::error::Rejected;
use crate::event::Event;
use crate::lane::ring::Slot;
use crate::lane::shared::{SharedLane, SharedSlot};
use crate::lane::shared_receipt::{SharedReceipt, UNASSIGNED};
use crate::sync::{AtomicU64, Deadline, Idle, Ordering, Patience, Registration, Wait};

/// An event that is not published yet. [`Publishing::wait`] publishes it and blocks the thread while there is no room;
/// `.await` does the same for tasks.
///
/// Cancel safety: a future that is dropped before it completes has not published the event.
#[must_use = "nothing is published until `.wait()` or `.await`"]
pub struct Publishing<'p, E: Event> {
    lane: &'p SharedLane<E>,
    wait: Wait,
    /// `None` once the event is published or refused.
    event: Option<Result<Slot<E>, Rejected<E>>>,
    /// The place for the event's ticket, if a receipt is wanted.
    ticket: Option<Arc<AtomicU64>>,
    waiting: Option<WaitingTask<'p, E>>,
}

/// A task that waits for room.
struct WaitingTask<'p, E> {
    lane: &'p SharedLane<E>,
    registration: Registration,
}

impl<'p, E> WaitingTask<'p, E> {
    fn new(lane: &'p SharedLane<E>) -> Self {
        lane.tasks_waiting.fetch_add(1, Ordering::Relaxed);
        Self { lane, registration: Registration::default() }
    }
}

impl<E> Drop for WaitingTask<'_, E> {
    fn drop(&mut self) {
        self.lane.tasks_waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

impl<E: Event> std::fmt::Debug for Publishing<'_, E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Publishing").field("shard", &self.lane.door.log.shard).finish_non_exhaustive()
    }
}

impl<'p, E: Event> Publishing<'p, E> {
    pub(super) fn new(lane: &'p SharedLane<E>, wait: Wait, event: Result<Slot<E>, Rejected<E>>) -> Self {
        Self { lane, wait, event: Some(event), ticket: None, waiting: None }
    }

    /// Asks for a receipt, which allocates a few bytes for the ticket that the shard assigns.
    pub fn with_receipt(self) -> PublishingWithReceipt<'p, E> {
        let ticket = Arc::new(AtomicU64::new(UNASSIGNED));
        PublishingWithReceipt(Self { ticket: Some(ticket), ..self })
    }

    /// Publishes the event. Blocks the thread while there is no room.
    ///
    /// # Errors
    /// As [`crate::Producer::publish`].
    pub fn wait(self) -> Result<(), Rejected<E>> {
        self.send(Patience::Forever).map(drop)
    }

    /// Publishes the event. Blocks the thread while there is no room, until `deadline`.
    ///
    /// # Errors
    /// As [`crate::Producer::publish_until`].
    pub fn wait_until(self, deadline: impl Into<Deadline>) -> Result<(), Rejected<E>> {
        let deadline = deadline.into().instant();
        self.send(Patience::until(deadline)).map(drop)
    }

    pub(super) fn now(self) -> Result<(), Rejected<E>> {
        self.send(Patience::None).map(drop)
    }

    fn send(mut self, patience: Patience) -> Result<Option<SharedReceipt>, Rejected<E>> {
        let mut idle = Idle::new(self.wait);
        loop {
            match self.attempt() {
                Attempt::Published(receipt) => return Ok(receipt),
                Attempt::Refused(refused) => return Err(refused),
                Attempt::Full(event) if patience.is_over() => return Err(self.lane.door.full(event.event)),
                Attempt::Full(event) => self.event = Some(Ok(event)),
            }
            // A signal has one sleeper, but several threads may wait for room here.
            idle.poll(patience.deadline());
        }
    }

    /// Tries to publish the event.
    fn attempt(&mut self) -> Attempt<E> {
        let slot = match self.event.take().expect("a future is not polled after it has completed") {
            Ok(slot) => SharedSlot { slot, ticket: self.ticket.clone() },
            Err(refused) => return Attempt::Refused(refused),
        };
        match self.lane.try_push(slot) {
            Ok(()) => {
                Attempt::Published(self.ticket.take().map(|ticket| SharedReceipt::new(&self.lane.shared, ticket)))
            }
            Err(Rejected::Full(slot) | Rejected::StorageFull(slot)) => Attempt::Full(slot.slot),
            Err(refused) => Attempt::Refused(refused.map(|slot| slot.slot.event)),
        }
    }

    fn poll_publish(&mut self, context: &mut Context<'_>) -> Poll<Result<Option<SharedReceipt>, Rejected<E>>> {
        for registered in [false, true] {
            match self.attempt() {
                Attempt::Published(receipt) => {
                    self.waiting = None;
                    return Poll::Ready(Ok(receipt));
                }
                Attempt::Refused(refused) => return Poll::Ready(Err(refused)),
                Attempt::Full(event) => self.event = Some(Ok(event)),
            }
            if !registered {
                // An append may have made room before the registration, so the event is tried once more.
                self.register(context);
            }
        }
        Poll::Pending
    }

    /// Registers the task for an append of its own: the next one that no other waiting task is registered for. The
    /// queue is full, so there are appends to come; a task beyond them waits for the last.
    fn register(&mut self, context: &mut Context<'_>) {
        let (lane, shared) = (self.lane, &self.lane.shared);
        let waiting = self.waiting.get_or_insert_with(|| WaitingTask::new(lane));
        let next = shared.appended_count() + 1;
        let turn = next.saturating_add(lane.tasks_waiting.load(Ordering::Relaxed).saturating_sub(1));
        // At most for the last one in the queue.
        shared.register_appended(&mut waiting.registration, turn, context.waker());
    }
}

/// The result of an attempt to publish.
enum Attempt<E> {
    Published(Option<SharedReceipt>),
    Refused(Rejected<E>),
    Full(Slot<E>),
}

// No field is pinned, because events are moved.
impl<E: Event> Unpin for Publishing<'_, E> {}

impl<E: Event> Future for Publishing<'_, E> {
    type Output = Result<(), Rejected<E>>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        self.poll_publish(context).map_ok(drop)
    }
}

/// An event that is not published yet, and whose publisher wants a receipt; see [`Publishing`].
#[derive(Debug)]
#[must_use = "nothing is published until `.wait()` or `.await`"]
pub struct PublishingWithReceipt<'p, E: Event>(Publishing<'p, E>);

impl<E: Event> PublishingWithReceipt<'_, E> {
    /// As [`Publishing::wait`]; returns the receipt.
    ///
    /// # Errors
    /// As [`crate::Producer::publish`].
    pub fn wait(self) -> Result<SharedReceipt, Rejected<E>> {
        self.0.send(Patience::Forever).map(expected)
    }

    /// As [`Publishing::wait_until`]; returns the receipt.
    ///
    /// # Errors
    /// As [`crate::Producer::publish_until`].
    pub fn wait_until(self, deadline: impl Into<Deadline>) -> Result<SharedReceipt, Rejected<E>> {
        let deadline = deadline.into().instant();
        self.0.send(Patience::until(deadline)).map(expected)
    }
}

fn expected(receipt: Option<SharedReceipt>) -> SharedReceipt {
    receipt.expect("`with_receipt` asked for it")
}

impl<E: Event> Future for PublishingWithReceipt<'_, E> {
    type Output = Result<SharedReceipt, Rejected<E>>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.poll_publish(context).map_ok(expected)
    }
}
