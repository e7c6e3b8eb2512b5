//! What a producer has in hand for an event: proof that it was accepted, and the way to wait for it to be appended or durable.
//!
//! Writers: the shard and the syncer, who move the lane's two counts. A receipt only reads them.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::time::Instant;

use crate::error::WaitError;
use crate::event::{Offset, ShardId};
use crate::lane::counts::LaneShared;
use crate::sync::block_until;
use crate::sync::{AtomicU64, Deadline, Ordering, thread_waker};

/// Proof that an event was accepted, and the way to learn when it is appended and durable.
///
/// It is (lane, ticket): the lane counts, so no event costs anything to track.
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

    /// The shard that got the event.
    #[must_use]
    pub fn shard(&self) -> ShardId {
        self.lane.log.shard
    }

    /// Whether the event is in the log, visible to readers.
    #[must_use]
    pub fn is_appended(&self) -> bool {
        self.lane.appended.get() >= self.ticket
    }

    /// Whether the event is synced.
    #[must_use]
    pub fn is_durable(&self) -> bool {
        self.lane.durable.get() >= self.ticket
    }

    /// Waits (`.wait()`, `.wait_until()` or `.await`) until the event is in the log.
    pub fn appended(&self) -> Pending {
        Pending { receipt: self.clone(), durable: false }
    }

    /// Waits (`.wait()`, `.wait_until()` or `.await`) until the event is synced.
    pub fn durable(&self) -> Pending {
        Pending { receipt: self.clone(), durable: true }
    }
}

/// Something a receipt is waiting for. A future of any runtime, or a blocking wait.
#[derive(Debug)]
#[must_use = "nothing waits until `.wait()` or `.await`"]
pub struct Pending {
    receipt: Receipt,
    durable: bool,
}

impl Pending {
    /// The outcome, if it is known.
    pub(crate) fn outcome(&self) -> Option<Result<(), WaitError>> {
        let lane = &self.receipt.lane;
        // The failure first: what is reached before it is seen counts as reached.
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

    fn register(&self, waker: &std::task::Waker) {
        let lane = &self.receipt.lane;
        let waiters = if self.durable { &lane.waiting_durable } else { &lane.waiting_appended };
        waiters.register(self.receipt.ticket, waker);
    }

    /// Blocks the thread until it is so.
    ///
    /// # Errors
    /// `ShardFailed`, promptly when the shard fails; `NeverDurable` in `OsCache` mode.
    pub fn wait(&self) -> Result<(), WaitError> {
        self.block(None)
    }

    /// Blocks the thread until it is so, or `deadline`.
    ///
    /// # Errors
    /// As [`Pending::wait`], and `TimedOut`.
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
        block_until(deadline, |waker| self.register(waker), || self.outcome())
    }
}

impl Future for Pending {
    type Output = Result<(), WaitError>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        if let Some(outcome) = self.outcome() {
            return Poll::Ready(outcome);
        }
        self.register(context.waker());
        // Once more: it may have become so between the look and the registration.
        match self.outcome() {
            Some(outcome) => Poll::Ready(outcome),
            None => Poll::Pending,
        }
    }
}

/// Learns where the one event comes to lie that a lane has on its way: it is registered as a waiter before the event is published, and the
/// shard wakes it behind the batch of that event, before it appends anything else. So events that nobody asks about cost nothing.
pub(crate) struct Placing {
    lane: Arc<LaneShared>,
    ticket: u64,
    /// The log's end before the event was published.
    from: Offset,
    /// The log's end behind the event's batch; 0: it is on its way.
    end: AtomicU64,
    asker: Waker,
}

impl Wake for Placing {
    fn wake(self: Arc<Self>) {
        // A failure wakes too.
        if self.lane.appended.get() >= self.ticket {
            let end = self.lane.log.appended.get();
            // It is woken once, unless the shard fails, and then there is no place to tell.
            // Release: pairs with the Acquire in `wait`.
            self.end.store(end, Ordering::Release);
        }
        self.asker.wake_by_ref();
    }
}

impl Placing {
    /// Of the lane's next event, number `ticket`, before it is published on this thread. All before it must be appended.
    pub(crate) fn before(lane: &Arc<LaneShared>, ticket: u64) -> Arc<Self> {
        let (lane, from, end) = (Arc::clone(lane), Offset(lane.log.appended.get()), AtomicU64::new(0));
        let placing = Arc::new(Self { lane, ticket, from, end, asker: thread_waker() });
        placing.lane.waiting_appended.register(ticket, &Waker::from(Arc::clone(&placing)));
        placing
    }

    /// Waits on this thread until the event is appended. Where it lies; `None`: retention has freed it meanwhile.
    pub(crate) fn wait(&self, deadline: Option<Instant>) -> Result<Option<Offset>, WaitError> {
        let outcome = || match self.end.load(Ordering::Acquire) {
            0 => self.lane.log.failure().map(|failure| Err(WaitError::from(failure.clone()))),
            end => Some(Ok(Offset(end))),
        };
        let end = block_until(deadline, |_| {}, outcome)?;
        // A batch is of one lane, and of this lane there was nothing else: the event is the last one of its batch.
        Ok(self.lane.log.last_event_in(self.from, end))
    }
}
