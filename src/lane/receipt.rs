//! Receipts: proof that an event was accepted, and waits until it is appended or durable.
//!
//! Writers: the shard and the syncer write the lane's two counts. A receipt only reads them.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::time::Instant;

use crate::error::WaitError;
use crate::event::{Offset, ShardId};
use crate::lane::counts::LaneShared;
use crate::sync::block_until;
use crate::sync::{AtomicU64, Deadline, Ordering, Registration, Waiters, thread_waker};

/// Proof that an event was accepted. A receipt tells whether the event is appended and whether it is durable, and can
/// wait for either.
///
/// A receipt is a lane and a ticket, the event's number in the lane. The lane counts its events, so a receipt costs
/// nothing per event unless it is used.
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
/// # let dir = std::env::temp_dir().join(format!("corelane-receipt-{}", std::process::id()));
/// # let engine = EventLog::<Moved>::open(Config::new(&dir))?;
/// # let mut producer = engine.producer();
/// let receipt = producer.publish(Key::new(42), Moved { x: 1.0 })?;
/// receipt.appended().wait()?; // readers see the event
/// receipt.durable().wait()?; // a sync covers it; or `.await`
/// assert!(receipt.is_durable());
/// # engine.shutdown(Deadline::NEVER)?;
/// # std::fs::remove_dir_all(&dir)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct Receipt {
    lane: Arc<LaneShared>,
    ticket: u64,
}

impl std::fmt::Debug for Receipt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (appended, durable) = (self.is_appended(), self.is_durable());
        let mut shown = f.debug_struct("Receipt");
        shown.field("shard", &self.shard()).field("ticket", &self.ticket);
        shown.field("appended", &appended).field("durable", &durable).finish()
    }
}

impl Receipt {
    #[inline]
    pub(crate) fn new(lane: Arc<LaneShared>, ticket: u64) -> Self {
        Self { lane, ticket }
    }

    /// Returns the shard that accepted the event.
    #[must_use]
    pub fn shard(&self) -> ShardId {
        self.lane.log.shard
    }

    /// Returns `true` if the event is in the log and visible to readers.
    #[must_use]
    pub fn is_appended(&self) -> bool {
        self.lane.appended.get() >= self.ticket
    }

    /// Returns `true` if a sync that covers the event has returned.
    #[must_use]
    pub fn is_durable(&self) -> bool {
        self.lane.durable.get() >= self.ticket
    }

    /// Returns a [`Pending`] that waits until the event is in the log: `.wait()`, `.wait_until()` or `.await`.
    pub fn appended(&self) -> Pending {
        Pending { receipt: self.clone(), durable: false, registration: Registration::default() }
    }

    /// Returns a [`Pending`] that waits until the event is durable: `.wait()`, `.wait_until()` or `.await`.
    pub fn durable(&self) -> Pending {
        Pending { receipt: self.clone(), durable: true, registration: Registration::default() }
    }
}

/// A wait until an event is appended or durable: a future for any runtime, or a blocking wait.
///
/// Cancel safety: dropping it ends the wait and leaves nothing behind. The event is appended all the same.
#[derive(Debug)]
#[must_use = "nothing waits until `.wait()` or `.await`"]
pub struct Pending {
    receipt: Receipt,
    durable: bool,
    /// The task's place among the waiters.
    registration: Registration,
}

impl Pending {
    /// Returns the outcome if it is known.
    pub(crate) fn outcome(&self) -> Option<Result<(), WaitError>> {
        let lane = &self.receipt.lane;
        // The failure is read first, because a count that was reached before the failure must win.
        let failure = lane.log.failure();
        let reached = if self.durable { self.receipt.is_durable() } else { self.receipt.is_appended() };
        if reached {
            return Some(Ok(()));
        }
        if let Some(failure) = failure {
            return Some(Err(WaitError::from(failure.clone())));
        }
        (self.durable && !lane.syncs).then_some(Err(WaitError::NeverDurable))
    }

    fn waiters(&self) -> &Waiters {
        let lane = &self.receipt.lane;
        if self.durable { &lane.waiting_durable } else { &lane.waiting_appended }
    }

    /// Blocks the thread until the event is appended or durable.
    ///
    /// # Errors
    /// Returns `ShardFailed` as soon as the shard fails, `NeverDurable` in `OsCache` mode if no flush has covered the
    /// event, and `OnEngineThread` on a thread that an engine waits for.
    pub fn wait(&self) -> Result<(), WaitError> {
        self.block(None)
    }

    /// Blocks the thread until the event is appended or durable, or `deadline` passes.
    ///
    /// # Errors
    /// As [`Pending::wait`]; also returns `TimedOut` after the deadline.
    pub fn wait_until(&self, deadline: impl Into<Deadline>) -> Result<(), WaitError> {
        let deadline = deadline.into().instant();
        self.block(deadline)
    }

    fn block(&self, deadline: Option<Instant>) -> Result<(), WaitError> {
        for _ in 0..64 {
            if let Some(outcome) = self.outcome() {
                return outcome;
            }
            std::hint::spin_loop();
        }
        let (waiters, ticket) = (self.waiters(), self.receipt.ticket);
        block_until(deadline, |at, waker| waiters.register_own(at, ticket, waker), || self.outcome())
    }
}

impl Future for Pending {
    type Output = Result<(), WaitError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let mut registration = std::mem::take(&mut self.registration);
        let outcome = self.poll_with(&mut registration, context);
        self.registration = registration;
        outcome
    }
}

impl Pending {
    /// Polls the wait. While it is pending, the task is registered at `registration`, which the caller keeps.
    pub(crate) fn poll_with(
        &self,
        registration: &mut Registration,
        context: &mut Context<'_>,
    ) -> Poll<Result<(), WaitError>> {
        if let Some(outcome) = self.outcome() {
            return Poll::Ready(outcome);
        }
        self.waiters().register(registration, self.receipt.ticket, context.waker());
        // Check once more: the count may have been reached between the check and the registration.
        match self.outcome() {
            Some(outcome) => Poll::Ready(outcome),
            None => Poll::Pending,
        }
    }
}

/// Finds the offset of the only event in flight in a lane.
///
/// An `OffsetWatch` registers as a waiter before the event is published. The shard wakes it after the batch of that
/// event and before it appends anything else. Other events cost nothing.
pub(crate) struct OffsetWatch {
    lane: Arc<LaneShared>,
    ticket: u64,
    /// The log's end before the event is published.
    from: Offset,
    /// The log's end after the event's batch; 0 while the event is in flight.
    end: AtomicU64,
    waiter: Waker,
}

impl Wake for OffsetWatch {
    fn wake(self: Arc<Self>) {
        // A failure of the shard also calls this.
        if self.lane.appended.get() >= self.ticket {
            let end = self.lane.log.appended.get();
            // This runs once, unless the shard fails; then there is no offset.
            // Release: pairs with the Acquire in `wait`.
            self.end.store(end, Ordering::Release);
        }
        self.waiter.wake_by_ref();
    }
}

impl OffsetWatch {
    /// Watches the lane's next event, number `ticket`, which this thread is about to publish. All earlier events must
    /// be appended.
    pub(crate) fn before(lane: &Arc<LaneShared>, ticket: u64) -> Watching {
        let (lane, from, end) = (Arc::clone(lane), Offset(lane.log.appended.get()), AtomicU64::new(0));
        let watch = Arc::new(Self { lane, ticket, from, end, waiter: thread_waker() });
        let mut registration = Registration::default();
        watch.lane.waiting_appended.register_own(&mut registration, ticket, &Waker::from(Arc::clone(&watch)));
        Watching { watch, _registration: registration }
    }

    /// See [`Watching::wait`].
    fn wait(&self, deadline: Option<Instant>) -> Result<Option<Offset>, WaitError> {
        // Acquire: pairs with the Release in `wake`.
        let outcome = || match self.end.load(Ordering::Acquire) {
            0 => self.lane.log.failure().map(|failure| Err(WaitError::from(failure.clone()))),
            end => Some(Ok(Offset(end))),
        };
        let end = block_until(deadline, |_, _| {}, outcome)?;
        // A batch takes events from one lane, and this lane held no other event, so the event is the last one of its
        // batch.
        Ok(self.lane.log.last_event_in(self.from, end))
    }
}

/// A watch that is registered. Dropping it ends the watch.
pub(crate) struct Watching {
    watch: Arc<OffsetWatch>,
    _registration: Registration,
}

impl Watching {
    /// Blocks this thread until the event is appended. Returns its offset, or `None` if retention has freed the event
    /// meanwhile.
    pub(crate) fn wait(&self, deadline: Option<Instant>) -> Result<Option<Offset>, WaitError> {
        self.watch.wait(deadline)
    }
}
