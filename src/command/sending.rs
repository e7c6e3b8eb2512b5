//! A command before it is sent, with its options.

use std::future::{Future, IntoFuture};
use std::pin::Pin;
use std::task::{Context, Poll};

use super::client::Client;
use super::expected::ExpectedVersion;
use super::lane::{CommandSlot, Ticket};
use super::outcome::{CommandError, Outcome};
use super::prepared::Prepared;
use crate::error::{KeysError, Rejected, RejectedReason};
use crate::event::Key;
use crate::state::aggregate::Aggregate;
use crate::sync::{Deadline, Patience, Registration, may_wait};

impl<A: Aggregate> Client<A> {
    /// Prepares a command for `key`. [`Sending::wait`], `.await`, [`Sending::ticket`] or [`Sending::tell`] sends it.
    pub fn send(&mut self, key: Key, command: A::Command) -> Sending<'_, A> {
        let prepared = Prepared::one(key, self.clock.now(), command);
        Sending::new(self, prepared)
    }

    /// Prepares a command for several keys of one shard. [`Aggregate::decide_many`] decides it: it sees the states of
    /// all of them and emits events for any of them, which are appended together, all or none.
    ///
    /// Keys share a shard if the store has one shard, or if its [`Placement`](crate::Placement) gives them the same
    /// value. A command names 1 to [`KEYS_MAX`](super::KEYS_MAX) different keys. Otherwise nothing is sent:
    /// [`Rejected::Keys`], or [`CommandError::NotSent`] with [`RejectedReason::Keys`], says which key is wrong.
    ///
    /// The first key owns the outcome under an idempotency key ([`Sending::once`]).
    ///
    /// # Panics
    /// If the application's placement panics. Nothing is sent then.
    pub fn send_many(&mut self, keys: &[Key], command: A::Command) -> Sending<'_, A> {
        let prepared = Prepared::many(keys, self.router, self.clock.now(), command);
        Sending::new(self, prepared)
    }
}

/// A command that is not sent yet.
#[must_use = "nothing is sent until `.wait()`, `.await`, `.ticket()` or `.tell()`"]
pub struct Sending<'c, A: Aggregate> {
    client: &'c mut Client<A>,
    command: Prepared<A::Command>,
    durable: bool,
}

impl<A: Aggregate> std::fmt::Debug for Sending<'_, A> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sending")
            .field("key", &self.command.key())
            .field("durable", &self.durable)
            .finish_non_exhaustive()
    }
}

impl<'c, A: Aggregate> Sending<'c, A> {
    fn new(client: &'c mut Client<A>, command: Prepared<A::Command>) -> Self {
        Self { client, command, durable: false }
    }

    /// Carries the command out only if the key has this version; of several keys, only if each of them has it.
    pub fn expect(mut self, expected: ExpectedVersion) -> Self {
        self.command.expect(expected);
        self
    }

    /// Carries the command out only if `key`, one of the keys that the command names, has this version. A command that
    /// does not name the key is not sent ([`KeysError::NotNamed`]).
    pub fn expect_of(mut self, key: Key, expected: ExpectedVersion) -> Self {
        self.command.expect_of(key, expected);
        self
    }

    /// Carries the command out at most once under this idempotency key.
    ///
    /// A repeat does nothing and gets the answer of the first command, even after a restart. The shard remembers the
    /// newest `Config::outcomes_kept` outcomes of each key: commands that were carried out, and rejections by the
    /// aggregate. It does not remember other errors.
    ///
    /// The first key of a command for several keys owns its outcome. A repeat with the same first key gets the first
    /// outcome with the versions of all keys that the first command named, whichever other keys the repeat names.
    ///
    /// A text is identified by its 64-bit hash. Every number is a separate idempotency key, including 0 and `u64::MAX`.
    pub fn once(mut self, idempotency: impl Into<IdempotencyKey>) -> Self {
        self.command.once(idempotency.into().0);
        self
    }

    /// Delays the answer until the command's events are durable instead of appended. (A rejection is answered at once.)
    pub fn durable(mut self) -> Self {
        self.durable = true;
        self
    }

    /// Sends the command, waiting for room, and returns the ticket for [`Client::answer`].
    ///
    /// # Errors
    /// Returns the command with the reason. The reason is `Full` if the lane is full of unclaimed answers.
    pub fn ticket(self) -> Result<Ticket, Rejected<A::Command>> {
        self.dispatch(true, Patience::Forever)
    }

    /// Sends the command if there is room now.
    ///
    /// # Errors
    /// As [`Sending::ticket`].
    pub fn try_ticket(self) -> Result<Ticket, Rejected<A::Command>> {
        self.dispatch(true, Patience::None)
    }

    /// Sends the command, waiting for room until `deadline`.
    ///
    /// # Errors
    /// As [`Sending::ticket`].
    pub fn ticket_until(self, deadline: impl Into<Deadline>) -> Result<Ticket, Rejected<A::Command>> {
        let deadline = deadline.into().instant();
        self.dispatch(true, Patience::until(deadline))
    }

    /// Sends the command, waiting for room, and drops its answer. The metrics count rejections.
    ///
    /// # Errors
    /// As [`Sending::ticket`].
    pub fn tell(self) -> Result<(), Rejected<A::Command>> {
        let ticket = self.dispatch(false, Patience::Forever)?;
        drop(ticket);
        Ok(())
    }

    /// Sends the command and waits for the answer.
    ///
    /// # Errors
    /// Returns the reason why the command was not carried out.
    pub fn wait(self) -> Result<Outcome, CommandError<A::Rejection>> {
        let (client, ticket) = self.sent(Patience::Forever)?;
        client.answer(ticket).wait()
    }

    /// Sends the command and waits for the answer until `deadline`. After the deadline, the answer is discarded when it
    /// arrives.
    ///
    /// # Errors
    /// Returns the reason why the command was not carried out. After the deadline: `NotSent(Full)` or
    /// `NotSent(StorageFull)` if it was not sent, `Unanswered(TimedOut)` if it was not answered, `NotDurable(TimedOut)` if
    /// it was carried out.
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
            // Checked before sending, because this thread could not wait for the answer.
            return Err(CommandError::NotSent(RejectedReason::OnEngineThread));
        }
        self.send(true, patience).map_err(|rejected| CommandError::NotSent(rejected.reason()))
    }

    fn send(self, wanted: bool, patience: Patience) -> Result<(&'c mut Client<A>, Ticket), Rejected<A::Command>> {
        let Self { client, command, durable } = self;
        let (command, refused) = command.into_parts();
        if let Some(fault) = refused {
            return Err(Rejected::Keys(command.command, *fault));
        }
        let key = command.key;
        let lane = client.lane_of(key);
        let wait = client.wait;
        match client.lanes[lane].send(command, wanted, wait, patience) {
            Ok(number) => {
                let ticket = Ticket { key, client: client.lanes[lane].id(), lane, number, durable };
                Ok((client, ticket))
            }
            Err(rejected) => Err(rejected.map(|slot| slot.command)),
        }
    }
}

impl<'c, A: Aggregate> IntoFuture for Sending<'c, A> {
    type Output = Result<Outcome, CommandError<A::Rejection>>;
    type IntoFuture = SendingFuture<'c, A>;

    fn into_future(self) -> SendingFuture<'c, A> {
        let Self { client, command, durable } = self;
        let (command, refused) = command.into_parts();
        let registration = Registration::default();
        SendingFuture { client, unsent: Some(command), refused, durable, ticket: None, registration }
    }
}

/// A future that sends a command when it is polled, and resolves to the answer.
///
/// Cancel safety: dropped before it has sent the command, it sends nothing. Dropped later, it discards the answer; the
/// command is carried out all the same.
pub struct SendingFuture<'c, A: Aggregate> {
    client: &'c mut Client<A>,
    unsent: Option<CommandSlot<A::Command>>,
    /// The fault of the command's keys, for which it is not sent.
    refused: Option<Box<KeysError>>,
    durable: bool,
    ticket: Option<Ticket>,
    /// The task's place among the waiters.
    registration: Registration,
}

impl<A: Aggregate> std::fmt::Debug for SendingFuture<'_, A> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SendingFuture").field("ticket", &self.ticket).finish_non_exhaustive()
    }
}

// No field is pinned, because commands are moved.
impl<A: Aggregate> Unpin for SendingFuture<'_, A> {}

impl<A: Aggregate> Future for SendingFuture<'_, A> {
    type Output = Result<Outcome, CommandError<A::Rejection>>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        if let Some(fault) = this.refused.take() {
            this.unsent = None;
            return Poll::Ready(Err(CommandError::NotSent(RejectedReason::Keys(*fault))));
        }
        let mut registered = false;
        while let Some(command) = this.unsent.take() {
            let key = command.key;
            let lane = this.client.lane_of(key);
            match this.client.lanes[lane].try_send(command, true) {
                Ok(number) => {
                    let client = this.client.lanes[lane].id();
                    this.ticket = Some(Ticket { key, client, lane, number, durable: this.durable });
                }
                Err(Rejected::Full(command) | Rejected::StorageFull(command)) => {
                    let lane = &this.client.lanes[lane];
                    if lane.arrived == lane.sent {
                        return Poll::Ready(Err(CommandError::NotSent(lane.door.full(()).reason())));
                    }
                    this.unsent = Some(command);
                    if registered {
                        return Poll::Pending;
                    }
                    // The next reply frees room. Try once more, because the reply may have come before the
                    // registration.
                    lane.shared.register_any(&mut this.registration, context.waker());
                    registered = true;
                }
                Err(rejected) => return Poll::Ready(Err(CommandError::NotSent(rejected.reason()))),
            }
        }
        match &this.ticket {
            Some(ticket) => {
                let outcome = this.client.poll_answer(ticket, &mut this.registration, context);
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
    /// Discards the answer if the command was sent but is not answered.
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket.take() {
            self.client.forget(ticket);
        }
    }
}

/// Identifies a command that may be sent several times but must be carried out only once.
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
