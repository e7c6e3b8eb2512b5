//! Receipts of a shared lane: the shard assigns their tickets.
//!
//! Writer of a ticket: the shard, once, when it takes the event out of the queue.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use super::counts::LaneShared;
use super::receipt::Receipt;
use crate::error::WaitError;
use crate::sync::{AtomicU64, Deadline, Ordering, Registration, block_until};

/// The value of the ticket until the shard takes the event out of the queue.
pub(crate) const UNASSIGNED: u64 = u64::MAX;

/// A receipt of a [`SharedProducer`](crate::SharedProducer). The shard assigns its ticket when it takes the event out of
/// the queue.
#[derive(Debug, Clone)]
pub struct SharedReceipt {
    lane: Arc<LaneShared>,
    ticket: Arc<AtomicU64>,
    /// The lane's count when the event was in the queue: the event is appended at the latest with the last of these.
    covered: u64,
}

impl SharedReceipt {
    /// Creates the receipt of an event that is in the queue.
    pub(crate) fn new(lane: &Arc<LaneShared>, ticket: Arc<AtomicU64>) -> Self {
        Self { lane: Arc::clone(lane), ticket, covered: lane.published.load(Ordering::SeqCst) }
    }

    /// Returns the plain receipt, or `None` until the shard has taken the event out of the queue.
    #[must_use]
    pub fn receipt(&self) -> Option<Receipt> {
        // Acquire: pairs with the shard's Release when it assigns the ticket.
        match self.ticket.load(Ordering::Acquire) {
            UNASSIGNED => None,
            ticket => Some(Receipt::new(Arc::clone(&self.lane), ticket)),
        }
    }

    /// Returns `true` if the event is in the log and visible to readers.
    #[must_use]
    pub fn is_appended(&self) -> bool {
        self.receipt().is_some_and(|receipt| receipt.is_appended())
    }

    /// Returns `true` if a sync that covers the event has returned.
    #[must_use]
    pub fn is_durable(&self) -> bool {
        self.receipt().is_some_and(|receipt| receipt.is_durable())
    }

    /// Returns a [`SharedPending`] that waits until the event is in the log: `.wait()`, `.wait_until()` or `.await`.
    pub fn appended(&self) -> SharedPending {
        SharedPending::new(self.clone(), false)
    }

    /// Returns a [`SharedPending`] that waits until the event is durable: `.wait()`, `.wait_until()` or `.await`.
    pub fn durable(&self) -> SharedPending {
        SharedPending::new(self.clone(), true)
    }
}

/// A wait until an event of a [`SharedProducer`](crate::SharedProducer) is appended or durable; as
/// [`Pending`](super::receipt::Pending). It returns the plain receipt.
///
/// Cancel safety: dropping it ends the wait and leaves nothing behind. The event is appended all the same.
#[derive(Debug)]
#[must_use = "nothing waits until `.wait()` or `.await`"]
pub struct SharedPending {
    receipt: SharedReceipt,
    durable: bool,
    registration: Registration,
}

impl SharedPending {
    fn new(receipt: SharedReceipt, durable: bool) -> Self {
        Self { receipt, durable, registration: Registration::default() }
    }

    /// Blocks the thread until the event is appended or durable, and returns the plain receipt.
    ///
    /// # Errors
    /// As [`Pending::wait`](super::receipt::Pending::wait).
    pub fn wait(&self) -> Result<Receipt, WaitError> {
        self.block(None)
    }

    /// Blocks the thread until the event is appended or durable, or `deadline` passes.
    ///
    /// # Errors
    /// As [`SharedPending::wait`]; also returns `TimedOut` after the deadline.
    pub fn wait_until(&self, deadline: impl Into<Deadline>) -> Result<Receipt, WaitError> {
        let deadline = deadline.into().instant();
        self.block(deadline)
    }

    fn block(&self, deadline: Option<Instant>) -> Result<Receipt, WaitError> {
        let lane = &self.receipt.lane;
        let receipt = block_until(
            deadline,
            |at, waker| lane.register_appended(at, self.receipt.covered, waker),
            || self.taken(),
        )?;
        let pending = if self.durable { receipt.durable() } else { receipt.appended() };
        pending.wait_until(Deadline::from(deadline))?;
        Ok(receipt)
    }

    /// Returns the plain receipt, once the shard has assigned it.
    fn taken(&self) -> Option<Result<Receipt, WaitError>> {
        match self.receipt.receipt() {
            Some(receipt) => Some(Ok(receipt)),
            None => self.receipt.lane.log.failure().map(|failure| Err(WaitError::from(failure.clone()))),
        }
    }
}

impl Future for SharedPending {
    type Output = Result<Receipt, WaitError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        let receipt = match this.taken() {
            Some(receipt) => receipt?,
            None => {
                let receipt = &this.receipt;
                receipt.lane.register_appended(&mut this.registration, receipt.covered, context.waker());
                // The shard may have taken the event between the check and the registration.
                match this.taken() {
                    Some(receipt) => receipt?,
                    None => return Poll::Pending,
                }
            }
        };
        let pending = if this.durable { receipt.durable() } else { receipt.appended() };
        pending.poll_with(&mut this.registration, context).map_ok(|()| receipt)
    }
}
