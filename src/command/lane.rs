//! The lane of a client to one shard: an SPSC ring of commands and an SPSC ring of replies.
//!
//! Two sides, one thread each. The shard replies in order, so the n-th reply belongs to the n-th command.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use super::expected::ExpectedVersion;
use super::named::{Expected, NamedKeys};
use super::outcome::{CommandError, Outcome};
use crate::clock::Nanos;
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

/// Every `PREFETCH_COMMANDS` sends, the client prefetches another `PREFETCH_COMMANDS` slots, one block ahead.
const PREFETCH_COMMANDS: usize = 8;

/// One command in a lane.
#[derive(Debug)]
pub(crate) struct CommandSlot<C> {
    /// The key, or the first of several.
    pub(crate) key: Key,
    pub(crate) hash: KeyHash,
    pub(crate) published: Nanos,
    pub(crate) expected: Expected,
    pub(crate) idempotency: Option<u64>,
    pub(crate) command: C,
}

/// A function that the shard runs on its states, between two batches.
pub(crate) type Question<A> = Box<dyn FnOnce(&KeyTable<A>) + Send>;

/// A shard's reply to a command.
#[derive(Debug)]
pub(crate) enum Reply<R> {
    Done {
        version: Version,
        events: u32,
        repeated: bool,
    },
    Rejected(R),
    WrongVersion(Box<WrongVersion>),
    TooLarge {
        bytes_max: usize,
    },
    UndeclaredType(EventTypeId),
    Panicked(String),
    ForeignKey(Key),
    NotSupported,
    /// A command for several keys was carried out.
    DoneEach(Box<NamedKeys>),
}

/// A key that does not have the expected version.
#[derive(Debug)]
pub(crate) struct WrongVersion {
    pub(crate) key: Key,
    pub(crate) expected: ExpectedVersion,
    pub(crate) found: Version,
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
    pub(super) shared: Arc<LaneShared>,
    pub(super) door: Arc<ShardDoor>,
    /// The number of commands sent.
    pub(super) sent: u64,
    /// The number of replies taken out of the ring.
    pub(super) arrived: u64,
    /// The commands after the first `settled`, in order.
    open: VecDeque<OpenCommand<A::Rejection>>,
    /// The number of commands that have left `open`. They leave it in order.
    settled: u64,
    /// Unclaimed replies to settled commands, by command number. Kept apart, so an answer that is claimed late does not
    /// delay later ones.
    kept: BTreeMap<u64, Reply<A::Rejection>>,
    /// The largest length of `open`: the capacity of the lane, minus the number of kept replies if these take room.
    room: usize,
    /// `true` if kept replies take room, which bounds their number. The answers of a shared client do not: tasks that
    /// hold answers while they send further commands would wait for each other. Each kept reply has an owner there.
    kept_take_room: bool,
    /// The replies that nobody wants. A shared client drops them after its lock: a rejection is the application's, and its
    /// drop may call the client.
    pub(super) discarded: Vec<Reply<A::Rejection>>,
}

/// A command that was sent but is not settled.
#[derive(Debug)]
enum OpenCommand<R> {
    Unanswered,
    Answered(Reply<R>),
    /// Sent with `tell`, or forgotten: the reply is dropped when it arrives.
    Ignored,
    Claimed,
}

/// Identifies a command that was sent, to claim its answer.
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use = "an unclaimed answer takes a slot of the lane; `forget` it, or send with `tell`"]
pub struct Ticket {
    pub(super) key: Key,
    /// The client's lane, as `ClientLane::id`. Tickets of other lanes do not match.
    pub(super) client: usize,
    /// The lane's index in the client.
    pub(super) lane: usize,
    /// The number of the command in its lane, from 1.
    pub(super) number: u64,
    pub(super) durable: bool,
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
        Self {
            commands,
            replies,
            shared,
            door,
            sent: 0,
            arrived: 0,
            open,
            settled: 0,
            kept,
            room,
            kept_take_room: true,
            discarded: Vec::new(),
        }
    }

    /// Makes this the lane of a shared client.
    pub(super) fn shared(mut self) -> Self {
        self.kept_take_room = false;
        self
    }

    /// Identifies this lane among all that exist.
    pub(super) fn id(&self) -> usize {
        Arc::as_ptr(&self.shared).addr()
    }

    /// Returns the number of commands that can be sent now. For the lane of a shared client.
    pub(super) fn free(&mut self) -> usize {
        self.receive();
        self.room.saturating_sub((self.sent - self.arrived) as usize)
    }

    /// Returns the number of answered commands at which half of those in flight are answered, at least one.
    pub(super) fn half_answered(&self) -> u64 {
        self.arrived + (self.sent - self.arrived).div_ceil(2).max(1)
    }

    /// Takes replies out of the ring.
    pub(super) fn receive(&mut self) {
        while let Ok(reply) = self.replies.pop() {
            let at = (self.arrived - self.settled) as usize;
            self.arrived += 1;
            let command = &mut self.open[at];
            match command {
                OpenCommand::Unanswered => *command = OpenCommand::Answered(reply),
                OpenCommand::Ignored | OpenCommand::Claimed | OpenCommand::Answered(..) => {
                    *command = OpenCommand::Claimed;
                    self.discard(reply);
                    self.settle();
                }
            }
        }
    }

    /// Removes claimed commands from the front.
    #[inline]
    fn settle(&mut self) {
        while matches!(self.open.front(), Some(OpenCommand::Claimed)) && self.settled < self.arrived {
            self.open.pop_front();
            self.settled += 1;
        }
    }

    /// Makes room for one more command by moving the oldest replies to `kept`. Returns `true` if there is now room.
    #[cold]
    fn make_room(&mut self) -> bool {
        self.receive();
        while self.open.len() >= self.room && self.settled < self.arrived {
            self.settled += 1;
            if let Some(OpenCommand::Answered(reply)) = self.open.pop_front() {
                self.keep(self.settled, reply);
            }
        }
        self.settle();
        self.open.len() < self.room
    }

    fn keep(&mut self, number: u64, reply: Reply<A::Rejection>) {
        self.kept.insert(number, reply);
        self.room -= usize::from(self.kept_take_room);
    }

    /// Takes the reply to a settled command, if it is unclaimed.
    fn take_kept(&mut self, number: u64) -> Option<Reply<A::Rejection>> {
        let kept = self.kept.remove(&number)?;
        self.room += usize::from(self.kept_take_room);
        Some(kept)
    }

    /// Returns the command with this number, or `None` if it is settled or not sent.
    fn open(&mut self, number: u64) -> Option<&mut OpenCommand<A::Rejection>> {
        self.open.get_mut(usize::try_from(number.checked_sub(self.settled + 1)?).ok()?)
    }

    /// Takes the answer to a ticket's command, if its reply has arrived and is unclaimed.
    pub(super) fn claim(&mut self, ticket: &Ticket) -> Option<Result<Outcome, CommandError<A::Rejection>>> {
        let receipt = Receipt::new(Arc::clone(&self.shared), ticket.number);
        let reply = match self.open(ticket.number) {
            None => self.take_kept(ticket.number)?,
            Some(command) if matches!(command, OpenCommand::Answered(..)) => {
                let OpenCommand::Answered(reply) = std::mem::replace(command, OpenCommand::Claimed) else {
                    return None;
                };
                self.settle();
                reply
            }
            Some(_) => return None,
        };
        Some(match reply {
            Reply::Done { version, events, repeated } => {
                Ok(Outcome { key: ticket.key, version, events, repeated, named: None, receipt })
            }
            Reply::Rejected(rejection) => Err(CommandError::Rejected(rejection)),
            Reply::DoneEach(named) => Ok(Outcome::of_several(named, receipt)),
            Reply::WrongVersion(wrong) => {
                let WrongVersion { key, expected, found } = *wrong;
                Err(CommandError::WrongVersion { key, expected, found })
            }
            Reply::TooLarge { bytes_max } => Err(CommandError::TooLarge { bytes_max }),
            Reply::UndeclaredType(event_type) => Err(CommandError::UndeclaredType { event_type }),
            Reply::Panicked(text) => Err(CommandError::Panicked(text)),
            Reply::ForeignKey(key) => Err(CommandError::ForeignKey { key }),
            Reply::NotSupported => Err(CommandError::NotSupported),
        })
    }

    /// Puts back an answer that must not be given yet.
    pub(super) fn put_back(&mut self, ticket: &Ticket, claimed: Result<Outcome, CommandError<A::Rejection>>) {
        let Ok(outcome) = claimed else { return };
        let Outcome { version, events, repeated, named, .. } = outcome;
        let reply = match named {
            Some(named) => Reply::DoneEach(named),
            None => Reply::Done { version, events, repeated },
        };
        match self.open(ticket.number) {
            Some(command) => *command = OpenCommand::Answered(reply),
            // Claiming settled the command.
            None => self.keep(ticket.number, reply),
        }
    }

    /// Discards the answer to a command.
    pub(super) fn forget(&mut self, number: u64) {
        let has_arrived = number <= self.arrived;
        let reply = match self.open(number) {
            Some(command) => {
                let forgotten = if has_arrived { OpenCommand::Claimed } else { OpenCommand::Ignored };
                match std::mem::replace(command, forgotten) {
                    OpenCommand::Answered(reply) => Some(reply),
                    OpenCommand::Unanswered | OpenCommand::Ignored | OpenCommand::Claimed => None,
                }
            }
            None => self.take_kept(number),
        };
        reply.into_iter().for_each(|reply| self.discard(reply));
        self.settle();
    }

    fn discard(&mut self, reply: Reply<A::Rejection>) {
        if !self.kept_take_room {
            self.discarded.push(reply);
        }
    }

    /// Sends a command if there is room for it and for its reply. Returns its number. `wanted` says that the caller
    /// will claim the answer.
    pub(super) fn try_send(
        &mut self,
        command: CommandSlot<A::Command>,
        wanted: bool,
    ) -> Result<u64, Rejected<CommandSlot<A::Command>>> {
        if self.open.len() >= self.room && !self.make_room() {
            // No reply makes room any more if the lane is closed.
            let is_closed = self.shared.enter().is_none();
            return Err(if is_closed { self.door.refusal(command) } else { self.door.full(command) });
        }
        self.prefetch();
        let Some(inside) = self.shared.enter() else { return Err(self.door.refusal(command)) };
        match self.commands.push(command) {
            Ok(()) => {
                self.sent += 1;
                self.shared.published.store(self.sent, Ordering::Relaxed);
                drop(inside);
                self.door.signal.notify();
                self.open.push_back(if wanted { OpenCommand::Unanswered } else { OpenCommand::Ignored });
                Ok(self.sent)
            }
            Err(rtrb::PushError::Full(command)) => Err(self.door.full(command)),
        }
    }

    /// Prefetches slots of later commands, because their cache lines are on the shard's core and a store would wait for
    /// them.
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

    /// Sends a command, waiting for room. Unclaimed answers also take room, which waiting does not free.
    pub(super) fn send(
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
    pub(super) fn await_answer(&self, number: u64, wait: Wait, deadline: Option<Instant>) -> Result<(), WaitError> {
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
                return block_until(deadline, |at, waker| self.shared.register_appended(at, number, waker), answered);
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
