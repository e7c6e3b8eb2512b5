//! Commands: what somebody wants to happen, on its way to the shard that decides, and the answer on its way back.
//!
//! One [`Client`] is one thread's own lanes: an SPSC ring of commands to every shard and an SPSC ring of answers from it.
//! A shard answers a lane's commands in their order, so a ticket is a number and the n-th answer belongs to the n-th command.

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

/// Each time so many orders were sent, as many are brought near beyond the next ones.
const NEAR_ORDERS: usize = 8;

/// What version a command wants its key to have. Against what others did meanwhile; against what this client did itself
/// nothing is needed, since its commands of one key are carried out in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ExpectedVersion {
    /// Whatever it is.
    #[default]
    Any,
    /// The key has no event yet.
    NoEvents,
    /// The key has events.
    Exists,
    /// Exactly this one.
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
    /// Whose command it was.
    pub key: Key,
    /// The key's version after it.
    pub version: Version,
    /// How many events it had; they end at `version`.
    pub events: u32,
    /// An earlier command with the same idempotency key had this outcome, and this one did nothing.
    pub repeated: bool,
    receipt: Receipt,
}

impl Outcome {
    /// The receipt of the command: its events are appended, and can be waited for to be durable.
    #[must_use]
    pub fn receipt(&self) -> &Receipt {
        &self.receipt
    }
}

/// Why a command was not carried out, or why nobody knows.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum CommandError<R> {
    /// The aggregate refused it. Nothing was appended.
    #[error("the command was rejected")]
    Rejected(R),
    /// The key does not have the version that was expected. Nothing was appended.
    #[error("the key has version {found}, expected was {expected:?}")]
    WrongVersion {
        /// What the command expected.
        expected: ExpectedVersion,
        /// What the key has.
        found: Version,
    },
    /// An event of the decision, or all of them together, cannot be appended. Nothing was.
    #[error("the command does not fit: an event, its rejection or all of it is larger than {bytes_max} bytes")]
    TooLarge {
        /// The limit: `event_bytes_max`, or what one segment holds.
        bytes_max: usize,
    },
    /// An event of the decision is of a type that `TYPES` does not declare. Nothing was appended.
    #[error("the decision's event is of type {event_type}, which its TYPES do not declare")]
    UndeclaredType {
        /// What `event_type()` returned.
        event_type: EventTypeId,
    },
    /// `decide` panicked. Nothing was appended, and the shard goes on.
    #[error("deciding on the command panicked: {0}")]
    Panicked(String),
    /// It was not sent.
    #[error("not sent: {0}")]
    NotSent(crate::error::RejectedReason),
    /// It was sent, and there is no answer: whether it was carried out is not known (an idempotency key makes it safe to repeat).
    #[error("sent, but without an answer: {0}")]
    Unanswered(WaitError),
    /// Its answer was given before, or it is another client's: there is one, for who sent the command.
    #[error("the answer was given before, or the ticket is another client's")]
    Claimed,
    /// It was carried out, but whether it is durable is not known.
    #[error("carried out, but not known to be durable: {0}")]
    NotDurable(WaitError),
}

/// A command in a lane.
#[derive(Debug)]
pub(crate) struct Order<C> {
    pub(crate) key: Key,
    pub(crate) hash: KeyHash,
    pub(crate) published: Nanos,
    pub(crate) expected: ExpectedVersion,
    pub(crate) idempotency: Option<u64>,
    pub(crate) command: C,
}

/// A look at the states of a shard, taken by the shard itself between two batches.
pub(crate) type Question<A> = Box<dyn FnOnce(&KeyTable<A>) + Send>;

/// What a shard says to a command.
#[derive(Debug)]
pub(crate) enum Verdict<R> {
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
    pub(crate) orders: rtrb::Consumer<Order<A::Command>>,
    pub(crate) answers: rtrb::Producer<Verdict<A::Rejection>>,
    pub(crate) shared: Arc<LaneShared>,
    /// Commands answered.
    pub(crate) answered: u64,
}

/// The client's end of it.
pub(crate) struct ClientLane<A: Aggregate> {
    orders: rtrb::Producer<Order<A::Command>>,
    answers: rtrb::Consumer<Verdict<A::Rejection>>,
    shared: Arc<LaneShared>,
    door: Arc<ShardDoor>,
    sent: u64,
    /// Answers taken out of the ring.
    arrived: u64,
    /// The commands behind `settled`, in order.
    pending: VecDeque<Waiting<A::Rejection>>,
    /// Commands that have left `pending`, in their order.
    settled: u64,
    /// Answers of settled commands that nobody has claimed yet: an answer that is claimed late does not delay later ones.
    kept: BTreeMap<u64, (ExpectedVersion, Verdict<A::Rejection>)>,
    /// How many commands `pending` may hold: what the lane holds, less what is kept.
    room: usize,
}

/// A command on its way.
#[derive(Debug)]
enum Waiting<R> {
    Open(ExpectedVersion),
    Answered(ExpectedVersion, Verdict<R>),
    /// Nobody asks for its answer.
    Ignored,
    Claimed,
}

/// A command that was sent: which answer is its.
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use = "an answer that nobody claims takes a place in the lane; `forget` it, or send with `tell`"]
pub struct Ticket {
    key: Key,
    /// Which lane of which client: numbers of different ones say nothing to each other.
    client: usize,
    lane: usize,
    number: u64,
    durable: bool,
}

/// One thread's way to give commands: to every shard a lane there and one back. Made by [`crate::Engine::client`]; it may
/// outlive the engine's shutdown (it then refuses).
///
/// At most `ring_capacity` commands of a shard are on their way or have answers that nobody claimed. An answer takes its one
/// place until it is claimed or forgotten, however many commands are sent and answered meanwhile.
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

    /// A command for `key`: to be sent by [`Sending::wait`], `.await`, [`Sending::ticket`] or [`Sending::tell`].
    pub fn send(&mut self, key: Key, command: A::Command) -> Sending<'_, A> {
        Sending::new(self, key, command)
    }

    /// The answer to a command sent earlier: `.wait()`, `.wait_until()` or `.await`.
    pub fn answer(&mut self, ticket: Ticket) -> Answer<'_, A> {
        Answer::new(self, ticket)
    }

    /// The answer, if it is there. It is given once: later calls say [`CommandError::Claimed`].
    pub fn try_answer(&mut self, ticket: &Ticket) -> Option<Result<Outcome, CommandError<A::Rejection>>> {
        if !self.is_mine(ticket) {
            return Some(Err(CommandError::Claimed));
        }
        let lane = &mut self.lanes[ticket.lane];
        // These first: what is answered after they were looked at is found the next time.
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

    /// Whether the ticket is one of this client.
    fn is_mine(&self, ticket: &Ticket) -> bool {
        self.lanes.get(ticket.lane).is_some_and(|lane| lane.id() == ticket.client)
    }

    /// Gives up an answer.
    pub fn forget(&mut self, ticket: Ticket) {
        if self.is_mine(&ticket) {
            self.lanes[ticket.lane].forget(ticket.number);
        }
    }

    /// Commands that were sent and are not answered yet.
    #[must_use]
    pub fn on_their_way(&self) -> u64 {
        self.lanes.iter().map(|lane| lane.sent - lane.shared.appended_count()).sum()
    }
}

impl<A: Aggregate> ClientLane<A> {
    pub(crate) fn new(
        orders: rtrb::Producer<Order<A::Command>>,
        answers: rtrb::Consumer<Verdict<A::Rejection>>,
        shared: Arc<LaneShared>,
        door: Arc<ShardDoor>,
    ) -> Self {
        let room = orders.buffer().capacity();
        let (pending, kept) = (VecDeque::new(), BTreeMap::new());
        Self { orders, answers, shared, door, sent: 0, arrived: 0, pending, settled: 0, kept, room }
    }

    /// Tells this lane from all others that live.
    fn id(&self) -> usize {
        Arc::as_ptr(&self.shared).addr()
    }

    /// Takes answers out of the ring.
    fn receive(&mut self) {
        while let Ok(verdict) = self.answers.pop() {
            let at = (self.arrived - self.settled) as usize;
            self.arrived += 1;
            let waiting = &mut self.pending[at];
            *waiting = match waiting {
                Waiting::Open(expected) => Waiting::Answered(*expected, verdict),
                Waiting::Ignored | Waiting::Claimed | Waiting::Answered(..) => Waiting::Claimed,
            };
            self.settle();
        }
    }

    fn settle(&mut self) {
        while matches!(self.pending.front(), Some(Waiting::Claimed)) && self.settled < self.arrived {
            self.pending.pop_front();
            self.settled += 1;
        }
    }

    /// Makes room for one more command by keeping the oldest answers apart. Returns whether there is room now.
    #[cold]
    fn make_room(&mut self) -> bool {
        self.receive();
        while self.pending.len() >= self.room && self.settled < self.arrived {
            self.settled += 1;
            if let Some(Waiting::Answered(expected, verdict)) = self.pending.pop_front() {
                self.keep(self.settled, expected, verdict);
            }
        }
        self.settle();
        self.pending.len() < self.room
    }

    fn keep(&mut self, number: u64, expected: ExpectedVersion, verdict: Verdict<A::Rejection>) {
        self.kept.insert(number, (expected, verdict));
        self.room -= 1;
    }

    /// The answer to a settled command, if nobody has claimed it.
    fn take_kept(&mut self, number: u64) -> Option<(ExpectedVersion, Verdict<A::Rejection>)> {
        let kept = self.kept.remove(&number)?;
        self.room += 1;
        Some(kept)
    }

    fn waiting(&mut self, number: u64) -> Option<&mut Waiting<A::Rejection>> {
        self.pending.get_mut(usize::try_from(number.checked_sub(self.settled + 1)?).ok()?)
    }

    /// Takes the answer to command `ticket.number`, if it has arrived.
    fn claim(&mut self, ticket: &Ticket) -> Option<Result<Outcome, CommandError<A::Rejection>>> {
        let receipt = Receipt::new(Arc::clone(&self.shared), ticket.number);
        let (expected, verdict) = match self.waiting(ticket.number) {
            None => self.take_kept(ticket.number)?,
            Some(waiting) if matches!(waiting, Waiting::Answered(..)) => {
                let Waiting::Answered(expected, verdict) = std::mem::replace(waiting, Waiting::Claimed) else {
                    return None;
                };
                self.settle();
                (expected, verdict)
            }
            Some(_) => return None,
        };
        Some(match verdict {
            Verdict::Done { version, events, repeated } => {
                Ok(Outcome { key: ticket.key, version, events, repeated, receipt })
            }
            Verdict::Rejected(rejection) => Err(CommandError::Rejected(rejection)),
            Verdict::WrongVersion(found) => Err(CommandError::WrongVersion { expected, found }),
            Verdict::TooLarge { bytes_max } => Err(CommandError::TooLarge { bytes_max }),
            Verdict::UndeclaredType(event_type) => Err(CommandError::UndeclaredType { event_type }),
            Verdict::Panicked(text) => Err(CommandError::Panicked(text)),
        })
    }

    fn forget(&mut self, number: u64) {
        let has_arrived = number <= self.arrived;
        match self.waiting(number) {
            Some(waiting) => *waiting = if has_arrived { Waiting::Claimed } else { Waiting::Ignored },
            None => drop(self.take_kept(number)),
        }
        self.settle();
    }

    /// Sends a command if there is room for it and for its answer.
    fn try_send(&mut self, order: Order<A::Command>, wanted: bool) -> Result<u64, Rejected<Order<A::Command>>> {
        if self.pending.len() >= self.room && !self.make_room() {
            return Err(self.door.full(order));
        }
        self.bring_near();
        let Some(inside) = self.shared.enter() else { return Err(self.door.refusal(order)) };
        let expected = order.expected;
        match self.orders.push(order) {
            Ok(()) => {
                self.sent += 1;
                self.shared.published.store(self.sent, Ordering::Relaxed);
                drop(inside);
                self.door.signal.notify();
                self.pending.push_back(if wanted { Waiting::Open(expected) } else { Waiting::Ignored });
                Ok(self.sent)
            }
            Err(rtrb::PushError::Full(order)) => Err(self.door.full(order)),
        }
    }

    /// Asks for the memory of later orders: its lines are the shard's, and a store has to wait until they are not.
    #[inline]
    fn bring_near(&mut self) {
        if !self.sent.is_multiple_of(NEAR_ORDERS as u64) {
            return;
        }
        let free = self.orders.cached_slots().min(2 * NEAR_ORDERS);
        if let Ok(mut chunk) = self.orders.write_chunk_uninit(free) {
            let (first, second) = chunk.as_mut_slices();
            first.iter().chain(&*second).skip(NEAR_ORDERS).for_each(|order| prefetch_to_write(order));
        }
    }

    /// Sends a command, waiting for room. Answers that nobody has claimed take room too, and no waiting makes any.
    fn send(
        &mut self,
        mut order: Order<A::Command>,
        wanted: bool,
        wait: Wait,
        patience: Patience,
    ) -> Result<u64, Rejected<Order<A::Command>>> {
        let mut idle = Idle::new(wait);
        loop {
            order = match self.try_send(order, wanted) {
                Err(Rejected::Full(order) | Rejected::StorageFull(order)) => {
                    let unclaimed = self.arrived == self.sent;
                    if unclaimed || patience.is_over() {
                        return Err(self.door.full(order));
                    }
                    order
                }
                sent => return sent,
            };
            let Self { shared, door, answers, .. } = self;
            idle.step(&shared.space, patience.deadline(), || {
                !answers.is_empty() || shared.close_gate.is_closed() || door.log.failure().is_some()
            });
        }
    }

    /// Waits until command `number` is answered.
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
        // The shard notices an abandoned lane only when it looks.
        self.door.signal.notify();
    }
}
