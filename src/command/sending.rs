//! A command about to be sent, with what it asks for.

use std::future::{Future, IntoFuture};
use std::pin::Pin;
use std::task::{Context, Poll};

use super::{Client, CommandError, ExpectedVersion, Order, Outcome, Ticket};
use crate::error::{Rejected, RejectedReason};
use crate::event::{Key, KeyHash};
use crate::state::aggregate::Aggregate;
use crate::sync::{Deadline, Patience, may_wait};

/// A command that is not sent yet.
#[must_use = "nothing is sent until `.wait()`, `.await`, `.ticket()` or `.tell()`"]
pub struct Sending<'c, A: Aggregate> {
    client: &'c mut Client<A>,
    order: Order<A::Command>,
    durable: bool,
}

impl<A: Aggregate> std::fmt::Debug for Sending<'_, A> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sending").field("key", &self.order.key).field("durable", &self.durable).finish_non_exhaustive()
    }
}

impl<'c, A: Aggregate> Sending<'c, A> {
    pub(super) fn new(client: &'c mut Client<A>, key: Key, command: A::Command) -> Self {
        let order = Order {
            key,
            hash: KeyHash::of(key),
            published: client.clock.now(),
            expected: ExpectedVersion::Any,
            idempotency: None,
            command,
        };
        Self { client, order, durable: false }
    }

    /// Only if the key has this version.
    pub fn expect(mut self, expected: ExpectedVersion) -> Self {
        self.order.expected = expected;
        self
    }

    /// At most once under this idempotency key: a repeat does nothing and is answered as the first was, also after a
    /// restart, for as long as it is among the key's newest (`Config::outcomes_kept`). What counts as an answer is the
    /// aggregate's own: carried out or rejected; other refusals are not remembered.
    ///
    /// A text is told from others by its 64-bit hash. Every number is a key of its own, 0 and the largest included.
    pub fn once(mut self, idempotency: impl Into<IdempotencyKey>) -> Self {
        self.order.idempotency = Some(idempotency.into().0);
        self
    }

    /// Answered when its events are durable, rather than when they are appended. (A rejection is answered at once.)
    pub fn durable(mut self) -> Self {
        self.durable = true;
        self
    }

    /// Sends it, waiting for room, and returns the ticket that [`Client::answer`] wants.
    ///
    /// # Errors
    /// The command and why it was refused. `Full` where as many answers as the lane holds have not been claimed.
    pub fn ticket(self) -> Result<Ticket, Rejected<A::Command>> {
        self.dispatch(true, Patience::Forever)
    }

    /// Sends it if there is room now.
    ///
    /// # Errors
    /// As [`Sending::ticket`].
    pub fn try_ticket(self) -> Result<Ticket, Rejected<A::Command>> {
        self.dispatch(true, Patience::None)
    }

    /// Sends it, waiting for room until `deadline`.
    ///
    /// # Errors
    /// As [`Sending::ticket`].
    pub fn ticket_until(self, deadline: impl Into<Deadline>) -> Result<Ticket, Rejected<A::Command>> {
        let deadline = deadline.into().instant();
        self.dispatch(true, Patience::until(deadline))
    }

    /// Sends it, waiting for room, and wants no answer. What is rejected is counted in the metrics.
    ///
    /// # Errors
    /// As [`Sending::ticket`].
    pub fn tell(self) -> Result<(), Rejected<A::Command>> {
        let ticket = self.dispatch(false, Patience::Forever)?;
        drop(ticket);
        Ok(())
    }

    /// Sends it and waits for the answer.
    ///
    /// # Errors
    /// Why it was not carried out.
    pub fn wait(self) -> Result<Outcome, CommandError<A::Rejection>> {
        let (client, ticket) = self.sent(Patience::Forever)?;
        client.answer(ticket).wait()
    }

    /// Sends it and waits for the answer until `deadline`. The answer is given up then.
    ///
    /// # Errors
    /// Why it was not carried out; `Unanswered` with `TimedOut`.
    pub fn wait_until(self, deadline: impl Into<Deadline>) -> Result<Outcome, CommandError<A::Rejection>> {
        let deadline = deadline.into().instant();
        let (client, ticket) = self.sent(Patience::until(deadline))?;
        client.answer(ticket).wait_until(deadline)
    }

    fn dispatch(self, wanted: bool, patience: Patience) -> Result<Ticket, Rejected<A::Command>> {
        self.send(wanted, patience).map(|(_, ticket)| ticket)
    }

    fn sent(self, patience: Patience) -> Result<(&'c mut Client<A>, Ticket), CommandError<A::Rejection>> {
        if !may_wait() {
            // Before it is sent: its answer could not be waited for.
            return Err(CommandError::NotSent(RejectedReason::OnEngineThread));
        }
        self.send(true, patience).map_err(|rejected| CommandError::NotSent(rejected.reason()))
    }

    fn send(self, wanted: bool, patience: Patience) -> Result<(&'c mut Client<A>, Ticket), Rejected<A::Command>> {
        let Self { client, order, durable } = self;
        let key = order.key;
        // Where there is one, nothing is routed.
        let lane = if let [_] = &client.lanes[..] { 0 } else { usize::from(key.shard(client.lanes.len() as u16).0) };
        let wait = client.wait;
        match client.lanes[lane].send(order, wanted, wait, patience) {
            Ok(number) => {
                let ticket = Ticket { key, client: client.lanes[lane].id(), lane, number, durable };
                Ok((client, ticket))
            }
            Err(rejected) => Err(rejected.map(|order| order.command)),
        }
    }
}

impl<'c, A: Aggregate> IntoFuture for Sending<'c, A> {
    type Output = Result<Outcome, CommandError<A::Rejection>>;
    type IntoFuture = SendingFuture<'c, A>;

    fn into_future(self) -> SendingFuture<'c, A> {
        let Self { client, order, durable } = self;
        SendingFuture { client, order: Some(order), durable, ticket: None }
    }
}

/// A command that is sent when the future is polled, and its answer.
pub struct SendingFuture<'c, A: Aggregate> {
    client: &'c mut Client<A>,
    order: Option<Order<A::Command>>,
    durable: bool,
    ticket: Option<Ticket>,
}

impl<A: Aggregate> std::fmt::Debug for SendingFuture<'_, A> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SendingFuture").field("ticket", &self.ticket).finish_non_exhaustive()
    }
}

// Nothing in it is pinned: commands are moved.
impl<A: Aggregate> Unpin for SendingFuture<'_, A> {}

impl<A: Aggregate> Future for SendingFuture<'_, A> {
    type Output = Result<Outcome, CommandError<A::Rejection>>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        let mut registered = false;
        while let Some(order) = this.order.take() {
            let key = order.key;
            let lane = usize::from(key.shard(this.client.lanes.len() as u16).0);
            match this.client.lanes[lane].try_send(order, true) {
                Ok(number) => {
                    let client = this.client.lanes[lane].id();
                    this.ticket = Some(Ticket { key, client, lane, number, durable: this.durable });
                }
                Err(Rejected::Full(order) | Rejected::StorageFull(order)) => {
                    let lane = &this.client.lanes[lane];
                    if lane.arrived == lane.sent {
                        return Poll::Ready(Err(CommandError::NotSent(lane.door.full(()).reason())));
                    }
                    this.order = Some(order);
                    if registered {
                        return Poll::Pending;
                    }
                    // Room comes with the next answer. Once more: it may have come before this was registered.
                    lane.shared.register_any(context.waker());
                    registered = true;
                }
                Err(rejected) => return Poll::Ready(Err(CommandError::NotSent(rejected.reason()))),
            }
        }
        match &this.ticket {
            Some(ticket) => {
                let outcome = this.client.poll_answer(ticket, context);
                if outcome.is_ready() {
                    this.ticket = None;
                }
                outcome
            }
            None => Poll::Ready(Err(CommandError::Claimed)),
        }
    }
}

impl<A: Aggregate> Drop for SendingFuture<'_, A> {
    /// Dropped before it was answered: nobody asks any more.
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket.take() {
            self.client.forget(ticket);
        }
    }
}

/// Names a command, so that it is carried out once however often it is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct IdempotencyKey(pub(crate) u64);

impl From<u64> for IdempotencyKey {
    fn from(number: u64) -> Self {
        Self(number)
    }
}

impl From<&str> for IdempotencyKey {
    fn from(text: &str) -> Self {
        Self(Key::of(text).0)
    }
}
