//! The shared client: the commands of many threads and tasks, through one lane to every shard.
//!
//! A mutex guards each lane. It is held for one push, or for taking the replies that have arrived; the shard never takes
//! it. Callers that wait for room form a queue (`room`).

use std::future::{Future, IntoFuture};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use super::expected::ExpectedVersion;
use super::lane::{ClientLane, CommandSlot, Ticket};
use super::outcome::{CommandError, Outcome};
use super::prepared::Prepared;
use super::room::RoomQueue;
use super::sending::IdempotencyKey;
use crate::clock::Clock;
use crate::error::{KeysError, Rejected, RejectedReason, WaitError};
use crate::event::{Key, Router};
use crate::lane::counts::LaneShared;
use crate::lane::door::ShardDoor;
use crate::lane::receipt::Pending;
use crate::state::aggregate::Aggregate;
use crate::sync::{Deadline, GaveUp, Mutex, Registration, block_on, lock, may_wait, wake};

/// Sends commands from any number of threads and tasks, which clone it or share it by reference.
///
/// Commands of all clones are pipelined through one lane to every shard, which holds up to `ring_capacity` commands in
/// flight. While it is full, callers wait. Commands for one key are carried out in the order in which they were sent;
/// a task that awaits [`SharedSending::submit`] before it submits the next command keeps its order.
///
/// [`Engine::shared_client`](crate::Engine::shared_client) returns a shared client. It may outlive the engine; it then
/// refuses every command. A [`Client`](crate::Client) of its own is faster for a thread that sends many commands.
///
/// ```
/// # use corelane::{
/// #     Aggregate, Bounded, CommandError, Config, Deadline, Emit, Engine, Event, EventType, EventTypeId, Key, Meta,
/// # };
/// # use rkyv::{Archive, Deserialize, Serialize};
/// # #[derive(Archive, Serialize, Deserialize, Bounded)]
/// # struct Deposited { cents: u64 }
/// # impl Event for Deposited {
/// #     const TYPES: &'static [EventType] = &[EventType::new(1, "deposited", 1)];
/// #     fn event_type(&self) -> EventTypeId { EventTypeId(1) }
/// # }
/// # #[derive(Archive, Serialize, Deserialize, Bounded, Clone, Default)]
/// # struct Account { cents: u64 }
/// # struct Deposit(u64);
/// # #[derive(Archive, Serialize, Deserialize, Bounded, Clone, Debug, PartialEq)]
/// # struct Nothing;
/// # impl Aggregate for Account {
/// #     type Event = Deposited;
/// #     type Command = Deposit;
/// #     type Rejection = Nothing;
/// #     fn evolve(&mut self, event: &ArchivedDeposited, _meta: &Meta) { self.cents += event.cents.to_native(); }
/// #     fn decide(&self, deposit: Deposit, emit: &mut Emit<Deposited>) -> Result<(), Nothing> {
/// #         if deposit.0 == 0 { return Err(Nothing) }
/// #         emit.event(Deposited { cents: deposit.0 });
/// #         Ok(())
/// #     }
/// # }
/// # let dir = std::env::temp_dir().join(format!("corelane-shared-client-{}", std::process::id()));
/// let engine = Engine::<Account>::open(Config::new(&dir))?;
/// let client = engine.shared_client();
///
/// // In a task: sends, and waits for the answer. The future owns everything it needs.
/// let deposit = { let client = client.clone(); async move { client.send(Key::new(42), Deposit(100)).durable().await } };
/// // In a thread.
/// let outcome = client.send(Key::new(42), Deposit(5)).once("payment-17").wait()?;
/// # drop(deposit);
/// assert_eq!(outcome.version.0, 1);
/// assert!(matches!(client.send(Key::new(42), Deposit(0)).wait(), Err(CommandError::Rejected(Nothing))));
/// # engine.shutdown(Deadline::NEVER)?;
/// # std::fs::remove_dir_all(&dir)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct SharedClient<A: Aggregate>(Arc<Shared<A>>);

struct Shared<A: Aggregate> {
    lanes: Vec<SharedLane<A>>,
    clock: Clock,
    router: Router,
}

/// A lane, its counts and its door, which are read without the lock.
struct SharedLane<A: Aggregate> {
    locked: Mutex<Locked<A>>,
    counts: Arc<LaneShared>,
    door: Arc<ShardDoor>,
}

struct Locked<A: Aggregate> {
    lane: ClientLane<A>,
    queue: RoomQueue,
}

impl<A: Aggregate> Clone for SharedClient<A> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<A: Aggregate> std::fmt::Debug for SharedClient<A> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SharedClient").field("shards", &self.0.lanes.len()).finish_non_exhaustive()
    }
}

impl<A: Aggregate> SharedClient<A> {
    pub(crate) fn new(lanes: Vec<ClientLane<A>>, clock: Clock, router: Router) -> Self {
        let shared = |lane: ClientLane<A>| {
            let lane = lane.shared();
            let (counts, door) = (Arc::clone(&lane.shared), Arc::clone(&lane.door));
            let locked = Mutex::new(Locked { lane, queue: RoomQueue::default() });
            SharedLane { locked, counts, door }
        };
        Self(Arc::new(Shared { lanes: lanes.into_iter().map(shared).collect(), clock, router }))
    }

    /// Prepares a command for `key`. `.await`, [`SharedSending::wait`], [`SharedSending::submit`] or
    /// [`SharedSending::tell`] sends it.
    pub fn send(&self, key: Key, command: A::Command) -> SharedSending<A> {
        let command = Prepared::one(key, self.0.clock.now(), command);
        SharedSending { shared: Arc::clone(&self.0), command, durable: false }
    }

    /// Prepares a command for several keys of one shard, as [`Client::send_many`](super::Client::send_many).
    ///
    /// # Panics
    /// If the application's placement panics. Nothing is sent then.
    pub fn send_many(&self, keys: &[Key], command: A::Command) -> SharedSending<A> {
        let command = Prepared::many(keys, self.0.router, self.0.clock.now(), command);
        SharedSending { shared: Arc::clone(&self.0), command, durable: false }
    }
}

impl<A: Aggregate> SharedLane<A> {
    /// Runs `work` under the lock. What it discards is dropped afterwards: see `ClientLane::discarded`.
    fn locked<T>(&self, work: impl FnOnce(&mut ClientLane<A>, &mut RoomQueue) -> T) -> T {
        let mut locked = lock(&self.locked);
        let Locked { lane, queue } = &mut *locked;
        let done = work(lane, queue);
        let discarded = std::mem::take(&mut lane.discarded);
        drop(locked);
        drop(discarded);
        done
    }

    /// Discards an answer.
    fn forget(&self, number: u64) {
        self.locked(|lane, _| lane.forget(number));
    }

    /// Claims the answer to a command that the shard has replied to.
    fn claim(&self, ticket: &Ticket) -> Result<Outcome, CommandError<A::Rejection>> {
        let claimed = self.locked(|lane, _| {
            lane.receive();
            lane.claim(ticket)
        });
        claimed.unwrap_or(Err(CommandError::Claimed))
    }

    /// Takes a caller out of the queue for room.
    fn leave_queue(&self, number: u64) {
        let (own, wakers) = self.locked(|lane, queue| queue.leave(number, lane.free()));
        // Outside the lock: wakers are application code, whose drop may call the engine.
        drop(own);
        wakers.into_iter().for_each(wake);
    }
}

/// A command of a shared client that is not sent yet.
#[must_use = "nothing is sent until `.await`, `.wait()`, `.submit()` or `.tell()`"]
pub struct SharedSending<A: Aggregate> {
    shared: Arc<Shared<A>>,
    command: Prepared<A::Command>,
    durable: bool,
}

impl<A: Aggregate> std::fmt::Debug for SharedSending<A> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SharedSending").field("key", &self.command.key()).finish_non_exhaustive()
    }
}

impl<A: Aggregate> SharedSending<A> {
    /// Carries the command out only if the key has this version; of several keys, only if each of them has it.
    pub fn expect(mut self, expected: ExpectedVersion) -> Self {
        self.command.expect(expected);
        self
    }

    /// Carries the command out only if `key`, one of the keys that the command names, has this version.
    pub fn expect_of(mut self, key: Key, expected: ExpectedVersion) -> Self {
        self.command.expect_of(key, expected);
        self
    }

    /// Carries the command out at most once under this idempotency key; see [`Sending::once`](super::Sending::once).
    pub fn once(mut self, idempotency: impl Into<IdempotencyKey>) -> Self {
        self.command.once(idempotency.into().0);
        self
    }

    /// Delays the answer until the command's events are durable instead of appended. (A rejection is answered at once.)
    pub fn durable(mut self) -> Self {
        self.durable = true;
        self
    }

    /// Sends the command, waiting for room. Resolves to the answer, another future. This is how one task pipelines
    /// commands.
    ///
    /// Cancel safety: if the future is dropped before it completes, the command was not sent.
    pub fn submit(self) -> Submitting<A> {
        let Self { shared, command, durable } = self;
        let (command, fault) = command.into_parts();
        let lane = shared.router.index(command.key);
        let (shared, command) = (Some(shared), Some(command));
        Submitting { shared, lane, command, fault, is_wanted: true, durable, place: Place::default() }
    }

    /// Sends the command, waiting for room, and drops its answer. The metrics count rejections.
    ///
    /// Cancel safety: if the future is dropped before it completes, the command was not sent.
    ///
    /// # Errors
    /// Returns the command with the reason.
    pub async fn tell(self) -> Result<(), Rejected<A::Command>> {
        let mut submitting = self.submit();
        submitting.is_wanted = false;
        submitting.await.map(drop)
    }

    /// Sends the command if there is room now.
    ///
    /// # Errors
    /// Returns the command with the reason.
    pub fn try_submit(self) -> Result<SharedAnswer<A>, Rejected<A::Command>> {
        let mut submitting = self.submit();
        let command = submitting.command.take().expect("it is not sent yet");
        if let Some(fault) = submitting.fault.take() {
            return Err(Rejected::Keys(command.command, *fault));
        }
        let (shared, at) = (Arc::clone(shared_of(&submitting.shared)), submitting.lane);
        let key = command.key;
        let to = &shared.lanes[at];
        let sent = to.locked(|lane, queue| match queue.lets_in(|| lane.free()) {
            true => lane.try_send(command, true),
            // The callers that wait are refused too, but may not know it yet.
            false if to.counts.enter().is_none() => Err(to.door.refusal(command)),
            false => Err(to.door.full(command)),
        });
        sent.map_err(|rejected| rejected.map(|slot| slot.command)).map(|number| submitting.answer(key, number))
    }

    /// Sends the command and blocks the thread until the answer comes.
    ///
    /// # Errors
    /// Returns the reason why the command was not carried out.
    pub fn wait(self) -> Result<Outcome, CommandError<A::Rejection>> {
        self.block(Deadline::NEVER)
    }

    /// Sends the command and blocks the thread until the answer comes or `deadline` passes. After the deadline, a command
    /// that was sent is carried out, and its answer is discarded.
    ///
    /// # Errors
    /// Returns the reason why the command was not carried out. After the deadline: `NotSent(Full)` or
    /// `NotSent(StorageFull)` if it was not sent, `Unanswered(TimedOut)` if it was not answered, `NotDurable(TimedOut)` if
    /// it was carried out.
    pub fn wait_until(self, deadline: impl Into<Deadline>) -> Result<Outcome, CommandError<A::Rejection>> {
        self.block(deadline.into())
    }

    fn block(self, deadline: Deadline) -> Result<Outcome, CommandError<A::Rejection>> {
        if !may_wait() {
            // Checked before sending, because this thread could not wait for the answer.
            return Err(CommandError::NotSent(RejectedReason::OnEngineThread));
        }
        let mut submitting = self.submit();
        let answer = match block_on(deadline.instant(), &mut submitting) {
            Ok(sent) => sent.map_err(|refused| CommandError::NotSent(refused.reason()))?,
            Err(GaveUp::TimedOut) => return Err(CommandError::NotSent(submitting.why_full())),
            Err(GaveUp::OnEngineThread) => return Err(CommandError::NotSent(RejectedReason::OnEngineThread)),
        };
        answer.wait_until(deadline)
    }
}

impl<A: Aggregate> IntoFuture for SharedSending<A> {
    type Output = Result<Outcome, CommandError<A::Rejection>>;
    type IntoFuture = SharedOutcome<A>;

    fn into_future(self) -> SharedOutcome<A> {
        SharedOutcome(Stage::Sending(self.submit()))
    }
}

/// A caller's place in the queue for room.
#[derive(Debug, Default)]
struct Place {
    number: Option<u64>,
    /// For replies, while the caller watches the lane.
    registration: Registration,
}

/// A future that sends a command, waiting for room. It resolves to the answer.
#[must_use = "nothing is sent until `.await`"]
pub struct Submitting<A: Aggregate> {
    /// `None` once the command is sent: the answer has it.
    shared: Option<Arc<Shared<A>>>,
    lane: usize,
    /// `None` once the command is sent or refused.
    command: Option<CommandSlot<A::Command>>,
    /// The fault of the command's keys, for which it is not sent.
    fault: Option<Box<KeysError>>,
    is_wanted: bool,
    durable: bool,
    place: Place,
}

impl<A: Aggregate> std::fmt::Debug for Submitting<A> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Submitting").field("lane", &self.lane).finish_non_exhaustive()
    }
}

/// Returns the client of a command that is not sent yet.
fn shared_of<A: Aggregate>(shared: &Option<Arc<Shared<A>>>) -> &Arc<Shared<A>> {
    shared.as_ref().expect("a future is not polled after it has completed")
}

// No field is pinned, because commands are moved.
impl<A: Aggregate> Unpin for Submitting<A> {}

impl<A: Aggregate> Submitting<A> {
    fn lane(&self) -> &SharedLane<A> {
        &shared_of(&self.shared).lanes[self.lane]
    }

    fn why_full(&self) -> RejectedReason {
        self.lane().door.full(()).reason()
    }

    /// Returns the answer to the command, which was sent as number `number` of the lane.
    fn answer(&mut self, key: Key, number: u64) -> SharedAnswer<A> {
        let (client, durable) = (Arc::as_ptr(&self.lane().counts).addr(), self.durable);
        let ticket = Ticket { key, client, lane: self.lane, number, durable };
        let (shared, registration) = (self.shared.take().expect("it was just sent"), Registration::default());
        SharedAnswer { shared, state: Answering::Sent(ticket), registration }
    }

    /// Sends the command if there is room. Otherwise puts the caller to sleep, with the waker if there is one.
    fn attempt(&mut self, waker: Option<Waker>) -> Attempt<A::Command> {
        let command = self.command.take().expect("a future is not polled after it has completed");
        if let Some(fault) = self.fault.take() {
            return Attempt::Refused(Rejected::Keys(command.command, *fault));
        }
        let to = &shared_of(&self.shared).lanes[self.lane];
        let (place, is_wanted) = (&mut self.place.number, self.is_wanted);
        let (slept, back) = to.locked(|lane, queue| {
            let command = if place.is_some() || queue.lets_in(|| lane.free()) {
                match lane.try_send(command, is_wanted) {
                    Ok(number) => return (Err(Attempt::Sent(number)), None),
                    Err(Rejected::Full(command) | Rejected::StorageFull(command)) => command,
                    Err(refused) => return (Err(Attempt::Refused(refused.map(|slot| slot.command))), None),
                }
            } else {
                command
            };
            let Some(waker) = waker else { return (Err(Attempt::NoRoom), Some(command)) };
            (Ok((queue.sleep(place, waker), lane.half_answered())), Some(command))
        });
        self.command = back;
        let ((must_watch, replaced), half) = match slept {
            Ok(slept) => slept,
            Err(attempt) => return attempt,
        };
        // As in `leave_queue`.
        drop(replaced);
        if must_watch { Attempt::Watches(half) } else { Attempt::Sleeps }
    }

    fn leave_queue(&mut self) {
        self.place.registration.leave();
        if let Some(number) = self.place.number.take() {
            self.lane().leave_queue(number);
        }
    }
}

/// The result of an attempt to send a command.
enum Attempt<C> {
    Sent(u64),
    Refused(Rejected<C>),
    NoRoom,
    /// The caller watches the lane until this number of its commands is answered.
    Watches(u64),
    Sleeps,
}

impl<A: Aggregate> Future for Submitting<A> {
    type Output = Result<SharedAnswer<A>, Rejected<A::Command>>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        let key = this.command.as_ref().map_or(Key(0), |command| command.key);
        let waker = context.waker();
        let mut attempt = this.attempt(None);
        // A registration is followed by another attempt: the replies may have come before it.
        let mut is_registered = false;
        let mut watches = false;
        let sent = loop {
            let counts = &shared_of(&this.shared).lanes[this.lane].counts;
            match attempt {
                Attempt::Sent(number) => break Ok(number),
                Attempt::Refused(refused) => break Err(refused),
                Attempt::NoRoom => {}
                Attempt::Watches(answered) if !watches => {
                    counts.register_appended(&mut this.place.registration, answered, waker);
                    (is_registered, watches) = (true, true);
                }
                // The caller that watches may never be polled again: a closed lane must not wait for it.
                Attempt::Sleeps if !is_registered => {
                    counts.register_end(&mut this.place.registration, waker);
                    is_registered = true;
                    // It is the turn of others, unless the lane has closed meanwhile.
                    if counts.enter().is_some() {
                        return Poll::Pending;
                    }
                }
                Attempt::Watches(_) | Attempt::Sleeps => return Poll::Pending,
            }
            attempt = this.attempt(Some(waker.clone()));
        };
        this.leave_queue();
        Poll::Ready(sent.map(|number| this.answer(key, number)))
    }
}

impl<A: Aggregate> Drop for Submitting<A> {
    fn drop(&mut self) {
        self.leave_queue();
    }
}

/// The answer to a command of a shared client: a future that owns everything it needs, or a blocking wait.
///
/// Cancel safety: if it is dropped before it completes, the command is carried out, and its answer is discarded.
#[must_use = "the answer is discarded unless it is awaited"]
pub struct SharedAnswer<A: Aggregate> {
    shared: Arc<Shared<A>>,
    state: Answering,
    registration: Registration,
}

enum Answering {
    Sent(Ticket),
    /// Carried out; waits until it is durable.
    Appended(Outcome, Pending),
    Claimed,
}

impl<A: Aggregate> std::fmt::Debug for SharedAnswer<A> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SharedAnswer").finish_non_exhaustive()
    }
}

impl<A: Aggregate> SharedAnswer<A> {
    /// Blocks the thread until the answer comes.
    ///
    /// # Errors
    /// Returns the reason why the command was not carried out.
    pub fn wait(self) -> Result<Outcome, CommandError<A::Rejection>> {
        self.wait_until(Deadline::NEVER)
    }

    /// Blocks the thread until the answer comes or `deadline` passes. After the deadline, the answer is discarded when it
    /// arrives.
    ///
    /// # Errors
    /// Returns the reason why the command was not carried out; `Unanswered(TimedOut)` after the deadline, or
    /// `NotDurable(TimedOut)` if the command was carried out by then.
    pub fn wait_until(mut self, deadline: impl Into<Deadline>) -> Result<Outcome, CommandError<A::Rejection>> {
        match block_on(deadline.into().instant(), &mut self) {
            Ok(outcome) => outcome,
            Err(gave_up) if matches!(self.state, Answering::Appended(..)) => {
                Err(CommandError::NotDurable(WaitError::from(gave_up)))
            }
            Err(gave_up) => Err(CommandError::Unanswered(WaitError::from(gave_up))),
        }
    }

    /// Polls until the shard has replied to the command.
    fn poll_reply(&mut self, context: &mut Context<'_>) -> Poll<Result<Option<Outcome>, CommandError<A::Rejection>>> {
        let Answering::Sent(ticket) = &self.state else { return Poll::Ready(Ok(None)) };
        let lane = &self.shared.lanes[ticket.lane];
        if lane.counts.appended_count() < ticket.number {
            lane.counts.register_appended(&mut self.registration, ticket.number, context.waker());
            // The reply may have come before the registration.
            if lane.counts.appended_count() < ticket.number {
                return match lane.door.log.failure() {
                    Some(failure) => Poll::Ready(Err(CommandError::Unanswered(failure.clone().into()))),
                    None => Poll::Pending,
                };
            }
        }
        let claimed = lane.claim(ticket);
        let durable = ticket.durable;
        self.state = Answering::Claimed;
        let outcome = claimed?;
        if durable {
            let pending = outcome.receipt.durable();
            self.state = Answering::Appended(outcome, pending);
            return Poll::Ready(Ok(None));
        }
        Poll::Ready(Ok(Some(outcome)))
    }
}

// No field is pinned.
impl<A: Aggregate> Unpin for SharedAnswer<A> {}

impl<A: Aggregate> Future for SharedAnswer<A> {
    type Output = Result<Outcome, CommandError<A::Rejection>>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        if let Some(outcome) = std::task::ready!(self.poll_reply(context))? {
            return Poll::Ready(Ok(outcome));
        }
        let Answering::Appended(_, pending) = &mut self.state else { return Poll::Ready(Err(CommandError::Claimed)) };
        let durable = std::task::ready!(Pin::new(pending).poll(context));
        let Answering::Appended(outcome, _) = std::mem::replace(&mut self.state, Answering::Claimed) else {
            return Poll::Ready(Err(CommandError::Claimed));
        };
        Poll::Ready(durable.map(|()| outcome).map_err(CommandError::NotDurable))
    }
}

impl<A: Aggregate> Drop for SharedAnswer<A> {
    /// Discards the answer if it is not claimed.
    fn drop(&mut self) {
        self.registration.leave();
        if let Answering::Sent(ticket) = &self.state {
            self.shared.lanes[ticket.lane].forget(ticket.number);
        }
    }
}

/// A future that sends a command of a shared client and resolves to its outcome.
///
/// Cancel safety: if it is dropped before the command is sent, the command is not carried out. If it is dropped
/// afterwards, the command is carried out, and its answer is discarded. An idempotency key ([`SharedSending::once`])
/// makes it safe to repeat the command in either case.
#[derive(Debug)]
#[must_use = "nothing is sent until `.await`"]
pub struct SharedOutcome<A: Aggregate>(Stage<A>);

#[derive(Debug)]
enum Stage<A: Aggregate> {
    Sending(Submitting<A>),
    Sent(SharedAnswer<A>),
}

impl<A: Aggregate> Future for SharedOutcome<A> {
    type Output = Result<Outcome, CommandError<A::Rejection>>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        if let Stage::Sending(submitting) = &mut self.0 {
            let answer = std::task::ready!(Pin::new(submitting).poll(context));
            self.0 = Stage::Sent(answer.map_err(|refused| CommandError::NotSent(refused.reason()))?);
        }
        let Stage::Sent(answer) = &mut self.0 else { return Poll::Ready(Err(CommandError::Claimed)) };
        Pin::new(answer).poll(context)
    }
}
