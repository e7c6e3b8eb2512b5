//! What a producer has in hand for an event: proof that it was accepted, and the way to wait for it to be appended or durable.
//!
//! Writers: the shard and the syncer, who move the lane's two counts. A receipt only reads them.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Instant;

use super::LaneShared;
use crate::error::WaitError;
use crate::event::ShardId;
use crate::promise::block_until;
use crate::sync::Arc;

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
            return Some(Err(failure.clone().into()));
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
    pub fn wait_until(&self, deadline: Instant) -> Result<(), WaitError> {
        self.block(Some(deadline))
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
