//! Commands: a client sends them to the shard that decides, and receives its replies.
//!
//! One [`Client`] owns, for every shard, an SPSC ring of commands and an SPSC ring of replies. A shard replies to the commands of a
//! lane in their order, so a ticket is a number: the n-th reply belongs to the n-th command.

mod answer;
mod sending;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use crate::clock::{Clock, Nanos};
use crate::error::{Rejected, WaitError};
use crate::event::{EventTypeId, Key, KeyHash, Version};
use crate::lane::counts::LaneShared;
use crate::lane::door::ShardDoor;
use crate::lane::receipt::Receipt;
use crate::state::aggregate::Aggregate;
use crate::state::keys::KeyTable;
use crate::sync::Wait;
use crate::sync::block_until;
use crate::sync::{Idle, Ordering, Patience, may_wait, prefetch_to_write};

pub use answer::Answer;
pub use sending::{IdempotencyKey, Sending};

/// Every `PREFETCH_COMMANDS` sends, the client prefetches another `PREFETCH_COMMANDS` slots, one block ahead.
const PREFETCH_COMMANDS: usize = 8;

/// The version that a key must have for a command to be carried out.
///
/// It protects against changes by others. A client needs none against its own commands: those of one key are carried out in the
/// order in which it sent them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum ExpectedVersion {
    /// Any version.
    #[default]
    Any,
    /// The key has no event yet.
    NoEvents,
    /// The key has events.
    Exists,
    /// The key has exactly this version.
    Exact(Version),
}

impl ExpectedVersion {
    pub(crate) fn holds(self, version: Version) -> bool {
        match self {
            Self::Any => true,
            Self::NoEvents => version.0 == 0,
            Self::Exists => version.0 > 0,
            Self::Exact(expected) => version == expected,
        }
    }
}

/// A command that was carried out.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Outcome {
    /// The key of the command.
    pub key: Key,
    /// The key's version after the command.
    pub version: Version,
    /// The number of its events. The last one has `version`.
    pub events: u32,
    /// `true` if this is the outcome of an earlier command with the same idempotency key; the command itself did nothing.
    pub repeated: bool,
    receipt: Receipt,
}

impl Outcome {
    /// Returns the receipt of the command. Its events are appended; the receipt can wait until they are durable.
    #[must_use]
    pub fn receipt(&self) -> &Receipt {
        &self.receipt
    }
}

/// Why a command was not carried out, or why that is not known.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum CommandError<R> {
    /// The aggregate rejected the command. Nothing was appended.
    #[error("the command was rejected")]
    Rejected(R),
    /// The key does not have the version that was expected. Nothing was appended.
    #[error("the key has version {found}, but the command expected {expected:?}")]
    WrongVersion {
        /// The version that the command expected.
        expected: ExpectedVersion,
        /// The key's version.
        found: Version,
    },
    /// An event of the decision, its rejection, or the whole decision is too large. Nothing was appended.
    #[error("the command is too large: an event, its rejection or the whole decision exceeds {bytes_max} bytes")]
    TooLarge {
        /// The limit in bytes: `event_bytes_max`, or the room in one segment.
        bytes_max: usize,
    },
    /// `TYPES` does not declare the type of one of the decision's events. Nothing was appended.
    #[error("an event of the decision has type {event_type}, which its TYPES do not declare")]
    UndeclaredType {
        /// The id that `event_type()` returned.
        event_type: EventTypeId,
    },
    /// `decide` panicked. Nothing was appended, and the shard continues.
    #[error("`decide` panicked: {0}")]
    Panicked(String),
    /// The command was not sent.
    #[error("the command was not sent: {0}")]
    NotSent(crate::error::RejectedReason),
    /// The command was sent, but no answer came. Whether it was carried out is not known; an idempotency key makes it safe to repeat.
    #[error("the command was sent, but no answer came: {0}")]
    Unanswered(WaitError),
    /// The answer was claimed before, or the ticket belongs to another client. Each answer is given once, to the client that sent
    /// the command.
    #[error("the answer was claimed before, or the ticket belongs to another client")]
    Claimed,
    /// The command was carried out, but whether it is durable is not known.
    #[error("the command was carried out, but may not be durable: {0}")]
    NotDurable(WaitError),
}

/// One command in a lane.
#[derive(Debug)]
pub(crate) struct CommandSlot<C> {
    pub(crate) key: Key,
    pub(crate) hash: KeyHash,
    pub(crate) published: Nanos,
    pub(crate) expected: ExpectedVersion,
    pub(crate) idempotency: Option<u64>,
    pub(crate) command: C,
}

/// A function that the shard runs on its states, between two batches.
pub(crate) type Question<A> = Box<dyn FnOnce(&KeyTable<A>) + Send>;

/// A shard's reply to a command.
#[derive(Debug)]
pub(crate) enum Reply<R> {
    Done { version: Version, events: u32, repeated: bool },
    Rejected(R),
    WrongVersion(Version),
    TooLarge { bytes_max: usize },
    UndeclaredType(EventTypeId),
    Panicked(String),
}

/// The shard's end of a client's lane.
#[derive(Debug)]
pub(crate) struct ClientEnd<A: Aggregate> {
    pub(crate) commands: rtrb::Consumer<CommandSlot<A::Command>>,
    pub(crate) replies: rtrb::Producer<Reply<A::Rejection>>,
    pub(crate) shared: Arc<LaneShared>,
    /// The number of commands that the shard has replied to.
    pub(crate) replied: u64,
}

impl<A: Aggregate> ClientEnd<A> {
    pub(crate) fn new(
        commands: rtrb::Consumer<CommandSlot<A::Command>>,
        replies: rtrb::Producer<Reply<A::Rejection>>,
        shared: Arc<LaneShared>,
    ) -> Self {
        Self { commands, replies, shared, replied: 0 }
    }
}

/// The client's end of its lane to one shard.
pub(crate) struct ClientLane<A: Aggregate> {
    commands: rtrb::Producer<CommandSlot<A::Command>>,
    replies: rtrb::Consumer<Reply<A::Rejection>>,
    shared: Arc<LaneShared>,
    door: Arc<ShardDoor>,
    /// The number of commands sent.
    sent: u64,
    /// The number of replies taken out of the ring.
    arrived: u64,
    /// The commands after the first `settled`, in order.
    open: VecDeque<OpenCommand<A::Rejection>>,
    /// The number of commands that have left `open`. They leave it in order.
    settled: u64,
    /// Unclaimed replies to settled commands, by command number: an answer that is claimed late does not delay later ones.
    kept: BTreeMap<u64, (ExpectedVersion, Reply<A::Rejection>)>,
    /// The largest length of `open`: the capacity of the lane minus the number of kept replies.
    room: usize,
}

/// A command that was sent and is not settled.
#[derive(Debug)]
enum OpenCommand<R> {
    Unanswered(ExpectedVersion),
    Answered(ExpectedVersion, Reply<R>),
    /// Sent with `tell`, or forgotten: its reply is dropped when it arrives.
    Ignored,
    Claimed,
}

/// Identifies a command that was sent, to claim its answer.
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use = "an unclaimed answer takes a slot of the lane; `forget` it, or send with `tell`"]
pub struct Ticket {
    key: Key,
    /// The client's lane, as `ClientLane::id`: tickets of other lanes do not match.
    client: usize,
    /// The lane's index in the client.
    lane: usize,
    /// The number of the command in its lane, from 1.
    number: u64,
    durable: bool,
}

/// Sends the commands of one thread: one lane to every shard, and one back.
///
/// [`Engine::client`](crate::Engine::client) returns one. A client may outlive the engine; it then refuses every command.
///
/// Each shard's lane holds `ring_capacity` commands that are in flight or have an unclaimed answer. An unclaimed answer takes one
/// slot until it is claimed or forgotten, however many commands are sent and answered meanwhile.
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
/// # let dir = std::env::temp_dir().join(format!("corelane-client-{}", std::process::id()));
/// let engine = Engine::<Account>::open(Config::new(&dir))?;
/// let mut client = engine.client();
/// let account = Key::new(42);
///
/// // One at a time: sends, and waits for the answer.
/// let outcome = client.send(account, Deposit(100)).wait()?;
/// assert_eq!((outcome.version.0, outcome.events), (1, 1));
/// assert!(matches!(client.send(account, Deposit(0)).wait(), Err(CommandError::Rejected(Nothing))));
///
/// // Pipelined: sends now, and claims the answer later.
/// let ticket = client.send(account, Deposit(5)).once("payment-17").ticket().map_err(|refused| refused.reason())?;
/// let outcome = client.answer(ticket).wait()?;
/// outcome.receipt().durable().wait()?;
/// # engine.shutdown(Deadline::NEVER)?;
/// # std::fs::remove_dir_all(&dir)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Client<A: Aggregate> {
    lanes: Vec<ClientLane<A>>,
    clock: Clock,
    wait: Wait,
}

impl<A: Aggregate> std::fmt::Debug for Client<A> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").field("shards", &self.lanes.len()).finish_non_exhaustive()
    }
}

impl<A: Aggregate> Client<A> {
    pub(crate) fn new(lanes: Vec<ClientLane<A>>, clock: Clock, wait: Wait) -> Self {
        Self { lanes, clock, wait }
    }

    /// Prepares a command for `key`. [`Sending::wait`], `.await`, [`Sending::ticket`] or [`Sending::tell`] sends it.
    pub fn send(&mut self, key: Key, command: A::Command) -> Sending<'_, A> {
        Sending::new(self, key, command)
    }

    /// Returns the answer to a command sent earlier, for `.wait()`, `.wait_until()` or `.await`.
    pub fn answer(&mut self, ticket: Ticket) -> Answer<'_, A> {
        Answer::new(self, ticket)
    }

    /// Returns the answer if it has come. Each answer is given once: later calls return [`CommandError::Claimed`].
    pub fn try_answer(&mut self, ticket: &Ticket) -> Option<Result<Outcome, CommandError<A::Rejection>>> {
        if !self.is_mine(ticket) {
            return Some(Err(CommandError::Claimed));
        }
        let lane = &mut self.lanes[ticket.lane];
        // Before the replies: a reply that comes after these reads is found by the next call.
        let failure = lane.door.log.failure().cloned();
        let is_answered = lane.shared.appended_count() >= ticket.number;
        lane.receive();
        let Some(claimed) = lane.claim(ticket) else {
            return match failure {
                _ if is_answered => Some(Err(CommandError::Claimed)),
                Some(failure) => Some(Err(CommandError::Unanswered(failure.into()))),
                None => None,
            };
        };
        match claimed {
            Ok(outcome) if ticket.durable => match outcome.receipt.durable().outcome() {
                Some(Ok(())) => Some(Ok(outcome)),
                Some(Err(error)) => Some(Err(CommandError::NotDurable(error))),
                None => {
                    lane.put_back(ticket, Ok(outcome));
                    None
                }
            },
            claimed => Some(claimed),
        }
    }

    /// Returns `true` if this client issued the ticket.
    fn is_mine(&self, ticket: &Ticket) -> bool {
        self.lanes.get(ticket.lane).is_some_and(|lane| lane.id() == ticket.client)
    }

    /// Gives an answer up, and frees its slot in the lane.
    pub fn forget(&mut self, ticket: Ticket) {
        if self.is_mine(&ticket) {
            self.lanes[ticket.lane].forget(ticket.number);
        }
    }

    /// Returns the number of commands in flight: sent and not answered yet.
    #[must_use]
    pub fn on_their_way(&self) -> u64 {
        self.lanes.iter().map(|lane| lane.sent - lane.shared.appended_count()).sum()
    }
}

impl<A: Aggregate> ClientLane<A> {
    pub(crate) fn new(
        commands: rtrb::Producer<CommandSlot<A::Command>>,
        replies: rtrb::Consumer<Reply<A::Rejection>>,
        shared: Arc<LaneShared>,
        door: Arc<ShardDoor>,
    ) -> Self {
        let room = commands.buffer().capacity();
        let (open, kept) = (VecDeque::new(), BTreeMap::new());
        Self { commands, replies, shared, door, sent: 0, arrived: 0, open, settled: 0, kept, room }
    }

    /// Identifies this lane among all that exist.
    fn id(&self) -> usize {
        Arc::as_ptr(&self.shared).addr()
    }

    /// Takes replies out of the ring.
    fn receive(&mut self) {
        while let Ok(reply) = self.replies.pop() {
            let at = (self.arrived - self.settled) as usize;
            self.arrived += 1;
            let command = &mut self.open[at];
            *command = match command {
                OpenCommand::Unanswered(expected) => OpenCommand::Answered(*expected, reply),
                OpenCommand::Ignored | OpenCommand::Claimed | OpenCommand::Answered(..) => OpenCommand::Claimed,
            };
            self.settle();
        }
    }

    /// Removes claimed commands from the front.
    fn settle(&mut self) {
        while matches!(self.open.front(), Some(OpenCommand::Claimed)) && self.settled < self.arrived {
            self.open.pop_front();
            self.settled += 1;
        }
    }

    /// Makes room for one more command by moving the oldest replies to `kept`. Returns `true` if there is room now.
    #[cold]
    fn make_room(&mut self) -> bool {
        self.receive();
        while self.open.len() >= self.room && self.settled < self.arrived {
            self.settled += 1;
            if let Some(OpenCommand::Answered(expected, reply)) = self.open.pop_front() {
                self.keep(self.settled, expected, reply);
            }
        }
        self.settle();
        self.open.len() < self.room
    }

    fn keep(&mut self, number: u64, expected: ExpectedVersion, reply: Reply<A::Rejection>) {
        self.kept.insert(number, (expected, reply));
        self.room -= 1;
    }

    /// Takes the reply to a settled command, if it is unclaimed.
    fn take_kept(&mut self, number: u64) -> Option<(ExpectedVersion, Reply<A::Rejection>)> {
        let kept = self.kept.remove(&number)?;
        self.room += 1;
        Some(kept)
    }

    /// The command with this number; `None` if it is settled or not sent.
    fn open(&mut self, number: u64) -> Option<&mut OpenCommand<A::Rejection>> {
        self.open.get_mut(usize::try_from(number.checked_sub(self.settled + 1)?).ok()?)
    }

    /// Takes the answer to a ticket's command, if its reply has arrived and is unclaimed.
    fn claim(&mut self, ticket: &Ticket) -> Option<Result<Outcome, CommandError<A::Rejection>>> {
        let receipt = Receipt::new(Arc::clone(&self.shared), ticket.number);
        let (expected, reply) = match self.open(ticket.number) {
            None => self.take_kept(ticket.number)?,
            Some(command) if matches!(command, OpenCommand::Answered(..)) => {
                let OpenCommand::Answered(expected, reply) = std::mem::replace(command, OpenCommand::Claimed) else {
                    return None;
                };
                self.settle();
                (expected, reply)
            }
            Some(_) => return None,
        };
        Some(match reply {
            Reply::Done { version, events, repeated } => {
                Ok(Outcome { key: ticket.key, version, events, repeated, receipt })
            }
            Reply::Rejected(rejection) => Err(CommandError::Rejected(rejection)),
            Reply::WrongVersion(found) => Err(CommandError::WrongVersion { expected, found }),
            Reply::TooLarge { bytes_max } => Err(CommandError::TooLarge { bytes_max }),
            Reply::UndeclaredType(event_type) => Err(CommandError::UndeclaredType { event_type }),
            Reply::Panicked(text) => Err(CommandError::Panicked(text)),
        })
    }

    /// Gives the answer to a command up.
    fn forget(&mut self, number: u64) {
        let has_arrived = number <= self.arrived;
        match self.open(number) {
            Some(command) => *command = if has_arrived { OpenCommand::Claimed } else { OpenCommand::Ignored },
            None => drop(self.take_kept(number)),
        }
        self.settle();
    }

    /// Sends a command if there is room for it and for its reply. Returns its number. `wanted`: the caller will claim the answer.
    fn try_send(
        &mut self,
        command: CommandSlot<A::Command>,
        wanted: bool,
    ) -> Result<u64, Rejected<CommandSlot<A::Command>>> {
        if self.open.len() >= self.room && !self.make_room() {
            return Err(self.door.full(command));
        }
        self.prefetch();
        let Some(inside) = self.shared.enter() else { return Err(self.door.refusal(command)) };
        let expected = command.expected;
        match self.commands.push(command) {
            Ok(()) => {
                self.sent += 1;
                self.shared.published.store(self.sent, Ordering::Relaxed);
                drop(inside);
                self.door.signal.notify();
                self.open.push_back(if wanted { OpenCommand::Unanswered(expected) } else { OpenCommand::Ignored });
                Ok(self.sent)
            }
            Err(rtrb::PushError::Full(command)) => Err(self.door.full(command)),
        }
    }

    /// Prefetches slots of later commands: their cache lines are on the shard's core, and a store would wait for them.
    #[inline]
    fn prefetch(&mut self) {
        if !self.sent.is_multiple_of(PREFETCH_COMMANDS as u64) {
            return;
        }
        let free = self.commands.cached_slots().min(2 * PREFETCH_COMMANDS);
        if let Ok(mut chunk) = self.commands.write_chunk_uninit(free) {
            let (first, second) = chunk.as_mut_slices();
            first.iter().chain(&*second).skip(PREFETCH_COMMANDS).for_each(|slot| prefetch_to_write(slot));
        }
    }

    /// Sends a command, waiting for room. Unclaimed answers take room too, and waiting does not free it.
    fn send(
        &mut self,
        mut command: CommandSlot<A::Command>,
        wanted: bool,
        wait: Wait,
        patience: Patience,
    ) -> Result<u64, Rejected<CommandSlot<A::Command>>> {
        let mut idle = Idle::new(wait);
        loop {
            command = match self.try_send(command, wanted) {
                Err(Rejected::Full(command) | Rejected::StorageFull(command)) => {
                    let all_answered = self.arrived == self.sent;
                    if all_answered || patience.is_over() {
                        return Err(self.door.full(command));
                    }
                    command
                }
                sent => return sent,
            };
            let Self { shared, door, replies, .. } = self;
            idle.step(&shared.space, patience.deadline(), || {
                !replies.is_empty() || shared.close_gate.is_closed() || door.log.failure().is_some()
            });
        }
    }

    /// Waits until the shard has replied to command `number`.
    #[inline]
    fn await_answer(&self, number: u64, wait: Wait, deadline: Option<Instant>) -> Result<(), WaitError> {
        if self.shared.appended_count() >= number { Ok(()) } else { self.wait_for_answer(number, wait, deadline) }
    }

    #[cold]
    fn wait_for_answer(&self, number: u64, wait: Wait, deadline: Option<Instant>) -> Result<(), WaitError> {
        let answered = || match self.shared.appended_count() >= number {
            true => Some(Ok(())),
            false => self.door.log.failure().map(|failure| Err(WaitError::from(failure.clone()))),
        };
        if let Some(outcome) = answered() {
            return outcome;
        }
        if !may_wait() {
            return Err(WaitError::OnEngineThread);
        }
        let mut idle = Idle::new(wait);
        loop {
            if let Some(outcome) = answered() {
                return outcome;
            }
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return Err(WaitError::TimedOut);
            }
            if !idle.awake() {
                return block_until(deadline, |waker| self.shared.register_appended(number, waker), answered);
            }
        }
    }
}

impl<A: Aggregate> Drop for ClientLane<A> {
    fn drop(&mut self) {
        // The shard notices an abandoned lane only during a turn.
        self.door.signal.notify();
    }
}
