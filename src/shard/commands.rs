//! Commands on the shard: decides them against the current state, appends their events, and replies in order.
//!
//! The events of one command are appended together, all or none. Nothing is appended between a decision and its events.
//! While no segment has room for them, the decision is held, and the shard appends nothing else.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::batch::{Batch, Run, record};
use super::core::Core;
use super::targets::{Each, One, Targets};
use crate::command::{ClientEnd, CommandSlot, Expected, ExpectedVersion, NamedKeys, Reply, WrongVersion};
use crate::error::FailureCause;
use crate::error::panic_text;
use crate::event::{Correlation, Event as _, Key, Root, Sequence, Version};
use crate::log::format::{Ending, RECORD_HEADER_BYTES, RecordHeader};
use crate::log::other_keys::OtherKeys;
use crate::log::writer::{Appender, GROUP};
use crate::state::aggregate::{Aggregate, Emit, Fault, Stored};
use crate::state::keys::KeyTable;
use crate::state::outcomes::{Outcomes, Remembered};
use crate::storage::memory::padded;

/// The reply to a command of `A`.
pub(super) type ReplyOf<A> = Reply<<A as Aggregate>::Rejection>;
/// The decision on a command of `A` with these keys.
pub(super) type DecisionOf<A, T> = Decision<<A as Aggregate>::Rejection, T>;

/// A decision that no segment has room for yet.
struct HeldDecision<A: Aggregate> {
    /// The client's index in the shard's list. No client leaves the list while a decision is held.
    client: usize,
    decision: Undone<A>,
}

/// A decision that is not appended yet.
enum Undone<A: Aggregate> {
    One(DecisionOf<A, One>),
    Each(DecisionOf<A, Each>),
}

/// A decision that must be appended. Its events are in `Commands::emit`.
pub(super) struct Decision<R, T> {
    pub(super) targets: T,
    pub(super) published: u64,
    pub(super) idempotency: Option<u64>,
    /// `Some` only with an idempotency key: other rejections are not appended.
    pub(super) rejection: Option<R>,
}

impl<A: Aggregate> From<DecisionOf<A, One>> for Undone<A> {
    fn from(decision: DecisionOf<A, One>) -> Self {
        Self::One(decision)
    }
}

impl<A: Aggregate> From<DecisionOf<A, Each>> for Undone<A> {
    fn from(decision: DecisionOf<A, Each>) -> Self {
        Self::Each(decision)
    }
}

/// The state for deciding commands: remembered outcomes, the held decision, and buffers of one batch.
pub(super) struct Commands<A: Aggregate> {
    /// Outcomes of commands with idempotency keys.
    pub(super) outcomes: Outcomes<A::Rejection>,
    /// The buffer for the events of a decision; reused.
    emit: Emit<A::Event>,
    held: Option<HeldDecision<A>>,
    /// Replies of the current batch, not yet sent; reused.
    replies: Vec<ReplyOf<A>>,
}

impl<A: Aggregate> Commands<A> {
    pub(super) fn new(outcomes: Outcomes<A::Rejection>, batch_max: usize) -> Self {
        Self { outcomes, emit: Emit::new(), held: None, replies: Vec::with_capacity(batch_max) }
    }

    /// Returns `true` if a decision waits for a segment.
    pub(super) fn is_holding(&self) -> bool {
        self.held.is_some()
    }

    /// Decides one batch of commands of the client at index `at`. Returns the number of replies.
    pub(super) fn drain(
        &mut self,
        core: &mut Core<A>,
        client: &mut ClientEnd<A>,
        at: usize,
        batch_max: usize,
    ) -> Result<usize, FailureCause> {
        let ready = client.commands.slots().min(batch_max);
        if ready == 0 || self.held.is_some() {
            return Ok(0);
        }
        let Ok(chunk) = client.commands.read_chunk(ready) else { return Ok(0) };
        let (front, back) = chunk.as_slices();
        front.iter().chain(back).for_each(|command| {
            core.keys.look(command.hash);
            if let Expected::Each(named) = &command.expected {
                look_each(&core.keys, named);
            }
        });
        let mut batch = core.begin_batch();
        let now = batch.now;
        let (mut tally, mut replied) = (Tally::default(), 0);
        // Commands that the loop does not reach stay in the lane.
        for command in chunk {
            let reply = match batch.answer(command, &mut self.emit, &mut self.outcomes) {
                Ok(reply) => reply,
                Err(decision) => {
                    self.held = Some(HeldDecision { client: at, decision });
                    break;
                }
            };
            tally.add(&reply);
            replied += 1;
            self.replies.push(reply);
        }
        let bytes = batch.bytes;
        core.note_stall(self.held.is_some());
        self.reply(core, client, now, tally, bytes)?;
        Ok(replied)
    }

    /// Tries again to append the held decision. Returns `true` if none is held any more.
    pub(super) fn append_held(
        &mut self,
        core: &mut Core<A>,
        clients: &mut [ClientEnd<A>],
    ) -> Result<bool, FailureCause> {
        let Some(HeldDecision { client, decision }) = self.held.take() else { return Ok(true) };
        let mut batch = core.begin_batch();
        let now = batch.now;
        let done = match decision {
            Undone::One(decision) => batch.complete(decision, &mut self.emit, &mut self.outcomes),
            Undone::Each(decision) => batch.complete(decision, &mut self.emit, &mut self.outcomes),
        };
        match done {
            Ok(reply) => {
                let bytes = batch.bytes;
                let mut tally = Tally::default();
                tally.add(&reply);
                self.replies.push(reply);
                self.reply(core, &mut clients[client], now, tally, bytes)?;
                Ok(true)
            }
            Err(decision) => {
                self.held = Some(HeldDecision { client, decision });
                core.note_stall(true);
                Ok(false)
            }
        }
    }

    /// Publishes the events of a batch of commands, and then sends the replies.
    fn reply(
        &mut self,
        core: &mut Core<A>,
        client: &mut ClientEnd<A>,
        now: u64,
        tally: Tally,
        bytes: u64,
    ) -> Result<(), FailureCause> {
        let (pending, ClientEnd { commands, replies, shared, replied }) = (&mut self.replies, client);
        *replied += pending.len() as u64;
        core.counters.repeated.add(tally.repeated);
        core.counters.rejected.add(tally.rejected);
        core.counters.commands.add(pending.len() as u64);
        let published = core.publish(now, tally.events, bytes, commands.slots(), || {
            let Ok(chunk) = replies.write_chunk_uninit(pending.len()) else {
                unreachable!("a client sends no more commands than the ring of replies has slots")
            };
            chunk.fill_from_iter(pending.drain(..));
            shared.appended_reached(*replied);
        });
        shared.space.notify();
        published
    }
}

/// The results of a batch of commands.
#[derive(Default)]
struct Tally {
    /// Events appended.
    events: usize,
    /// Commands that were repeats.
    repeated: u64,
    /// Commands that were not carried out.
    rejected: u64,
}

impl Tally {
    #[inline]
    fn add<R>(&mut self, reply: &Reply<R>) {
        let (events, is_repeat) = match reply {
            Reply::Done { events, repeated, .. } => (*events, *repeated),
            Reply::DoneEach(named) => (named.events, named.repeated),
            _ => {
                self.rejected += 1;
                return;
            }
        };
        if is_repeat {
            self.repeated += 1;
        } else {
            self.events += events as usize;
        }
    }
}

impl<A: Aggregate> Batch<'_, A> {
    /// Decides a command and appends its events. Returns the reply, or `Err` with the decision if no segment has room
    /// for it yet.
    #[inline]
    fn answer(
        &mut self,
        command: CommandSlot<A::Command>,
        emit: &mut Emit<A::Event>,
        outcomes: &mut Outcomes<A::Rejection>,
    ) -> Result<ReplyOf<A>, Undone<A>> {
        let CommandSlot { key, hash, published, expected, idempotency, command } = command;
        match expected {
            Expected::One(expected) => {
                let decision = Decision { targets: One { key, hash }, published, idempotency, rejection: None };
                match self.decide(decision, expected, command, emit, outcomes) {
                    Ok(reply) => Ok(reply),
                    Err(decision) => self.complete(decision, emit, outcomes),
                }
            }
            Expected::Each(named) => {
                let decision = Decision { targets: Each::new(named), published, idempotency, rejection: None };
                match self.decide_many(decision, command, emit, outcomes) {
                    Ok(reply) => Ok(reply),
                    Err(decision) => self.complete(decision, emit, outcomes),
                }
            }
        }
    }

    /// Decides a command for one key. Returns `Ok` if there is nothing to append, and `Err` with a decision that must be
    /// appended.
    #[inline]
    fn decide(
        &mut self,
        decision: DecisionOf<A, One>,
        expected: ExpectedVersion,
        command: A::Command,
        emit: &mut Emit<A::Event>,
        outcomes: &Outcomes<A::Rejection>,
    ) -> Result<ReplyOf<A>, DecisionOf<A, One>> {
        let Decision { targets: One { key, hash }, idempotency, .. } = decision;
        if let Some(idempotency) = idempotency
            && let Some(outcome) = outcomes.find(key, idempotency)
        {
            return Ok(repeat::<A>(key, outcome));
        }
        let time = self.time();
        let fresh;
        let (version, state) = match self.keys.get_hashed(key, hash) {
            Some(known) => (known.version, &known.state),
            None => {
                fresh = A::default();
                (Version(0), &fresh)
            }
        };
        if !expected.holds(version) {
            return Ok(Reply::WrongVersion(Box::new(WrongVersion { key, expected, found: version })));
        }
        emit.begin(key, version, time);
        let decided = match catch_unwind(AssertUnwindSafe(|| state.decide(command, emit))) {
            Ok(decided) => decided,
            Err(panic) => return Ok(panicked::<A>(emit, &*panic)),
        };
        self.judge(decision, decided, version, emit)
    }

    /// Returns the decision if something must be appended, and otherwise the reply.
    #[inline]
    pub(super) fn judge<T: Targets>(
        &self,
        mut decision: DecisionOf<A, T>,
        decided: Result<(), A::Rejection>,
        version: Version,
        emit: &mut Emit<A::Event>,
    ) -> Result<ReplyOf<A>, DecisionOf<A, T>> {
        if let Some(fault) = emit.fault {
            return Ok(faulty::<A>(emit, fault));
        }
        match decided {
            Err(rejection) if decision.idempotency.is_none() => Ok(Reply::Rejected(rejection)),
            Err(rejection) => {
                emit.events.clear();
                decision.rejection = Some(rejection);
                Err(decision)
            }
            Ok(()) if emit.events.is_empty() && decision.idempotency.is_none() => Ok(decision.targets.done(version, 0)),
            Ok(()) => match self.undeclared(emit) {
                Some(reply) => Ok(reply),
                None => Err(decision),
            },
        }
    }

    /// Returns the reply to a decision with an event of an undeclared type.
    #[inline]
    fn undeclared(&self, emit: &Emit<A::Event>) -> Option<ReplyOf<A>> {
        let mut types = emit.events.iter().map(|event| event.event_type());
        types.find(|event_type| self.schemas.current(*event_type).is_none()).map(Reply::UndeclaredType)
    }

    /// Appends a decision and returns the reply, or `Err` with the decision if no segment has room for it yet.
    #[inline]
    fn complete<T: Targets>(
        &mut self,
        decision: DecisionOf<A, T>,
        emit: &mut Emit<A::Event>,
        outcomes: &mut Outcomes<A::Rejection>,
    ) -> Result<ReplyOf<A>, Undone<A>>
    where
        Undone<A>: From<DecisionOf<A, T>>,
    {
        self.carry_out(decision, emit, outcomes).map_err(Undone::from)
    }

    /// Appends a decision, all of it or nothing, and remembers its outcome. Returns `Err` if no segment has room for it
    /// yet.
    fn carry_out<T: Targets>(
        &mut self,
        mut decision: DecisionOf<A, T>,
        emit: &mut Emit<A::Event>,
        outcomes: &mut Outcomes<A::Rejection>,
    ) -> Result<ReplyOf<A>, DecisionOf<A, T>> {
        let needed = match self.bytes_needed(&decision, emit) {
            Ok(needed) => needed,
            Err(too_large) => return Ok(too_large),
        };
        let room = self.writer.room();
        let time = self.time();
        if needed > room && self.writer.roll(time).is_err() {
            return Err(decision);
        }
        let events = emit.events.len() as u32;
        let version = self.append_decision(&mut decision, emit);
        let Decision { targets, idempotency, rejection, .. } = decision;
        if let Some(idempotency) = idempotency {
            let outcome = match &rejection {
                Some(rejection) => Remembered::Rejected(rejection.clone()),
                None => Remembered::Done { version, events, others: targets.others() },
            };
            outcomes.remember(targets.owner(), version, idempotency, outcome);
        }
        Ok(match rejection {
            Some(rejection) => Reply::Rejected(rejection),
            None => targets.done(version, events),
        })
    }

    /// The bytes that a decision takes in a segment, or the reply to one that no segment can hold.
    fn bytes_needed<T: Targets>(
        &mut self,
        decision: &DecisionOf<A, T>,
        emit: &Emit<A::Event>,
    ) -> Result<usize, ReplyOf<A>> {
        let mut needed = 0;
        let event_bytes_max = self.writer.event_bytes_max();
        for event in &emit.events {
            let bytes = self.writer.measure(event);
            if bytes > event_bytes_max {
                return Err(Reply::TooLarge { bytes_max: event_bytes_max });
            }
            needed += padded(RECORD_HEADER_BYTES + bytes);
        }
        if decision.idempotency.is_some() {
            let body = decision.targets.body_bytes();
            let bytes = decision.rejection.as_ref().map_or(body, |rejection| self.writer.measure(rejection));
            if bytes > event_bytes_max {
                return Err(Reply::TooLarge { bytes_max: event_bytes_max });
            }
            needed += padded(RECORD_HEADER_BYTES + bytes);
        }
        let bytes_max = self.writer.room_of_a_segment();
        if needed > bytes_max { Err(Reply::TooLarge { bytes_max }) } else { Ok(needed) }
    }

    /// Appends the events of a decision and, with an idempotency key, its outcome. The segment must have room for all
    /// of them. Returns the key's version afterwards; of several keys, that of the first.
    fn append_decision<T: Targets>(&mut self, decision: &mut DecisionOf<A, T>, emit: &mut Emit<A::Event>) -> Version {
        let Decision { targets, published, idempotency, rejection } = decision;
        let Emit { events: emitted, others, now, correlation, .. } = emit;
        let first_sequence = self.writer.sequence();
        let mut staged = [0; GROUP];
        let mut appender = self.writer.appender(&mut staged);
        let begun = appender.offset().0;
        let (count, has_outcome) = (emitted.len(), idempotency.is_some());
        let mut last = None;
        for (i, event) in emitted.drain(..).enumerate() {
            let (key, hash) = targets.of_event(i, others);
            let seen = self.keys.look(hash);
            let known = self.keys.slot(key, hash, seen);
            let event_type = event.event_type();
            let own = event.correlation();
            let header = RecordHeader {
                time: event.time().unwrap_or(*now),
                key,
                previous: known.head,
                event_type,
                correlation: if own == Correlation(0) { *correlation } else { own },
                version: Version(known.version.0 + 1),
                schema_version: self.schemas.current(event_type).expect("`decide` checked the event's type"),
                more: has_outcome || i + 1 < count,
            };
            last = Some(header.version);
            let (shard, offset) = (self.shard, appender.offset());
            let meta = || header.meta(shard, offset, Sequence(first_sequence + i as u64));
            let len = record(&mut appender, &header, &event, meta, known, self.views, self.taker);
            let len = len.expect("the segment has room for all events of the command");
            if let Some(placed) = &mut self.placed {
                placed.push((meta(), len));
            }
        }
        let version = targets.version(last, self.keys);
        let events = count as u32;
        if let Some(idempotency) = *idempotency {
            let others = targets.others();
            let ending = match rejection {
                Some(_) => Ending::Rejected(Root::of::<A::Rejection>()),
                None => Ending::Done { events, others: OtherKeys::count(others.as_deref()) },
            };
            let header = RecordHeader::outcome(targets.owner(), idempotency, version, ending, *now);
            append_outcome(&mut appender, &header, rejection.as_ref(), others.as_deref());
        }
        let end = appender.finish();
        self.bytes += end.0 - begun;
        if count > 0 {
            self.runs.push(Run { published: *published, late: None, events, end: end.0 });
        }
        self.writer.advance(end, count as u64);
        version
    }
}

/// Prefetches the slots of a command's keys.
#[cold]
#[inline(never)]
fn look_each<S: Default>(keys: &KeyTable<S>, named: &NamedKeys) {
    named.keys.iter().for_each(|named| {
        keys.look(named.hash);
    });
}

/// Returns the reply to a repeat of a command with this outcome; `key` owns the outcome.
pub(super) fn repeat<A: Aggregate>(key: Key, outcome: &Remembered<A::Rejection>) -> ReplyOf<A> {
    match outcome {
        &Remembered::Done { version, events, others: None } => Reply::Done { version, events, repeated: true },
        &Remembered::Done { version, events, others: Some(ref others) } => {
            Reply::DoneEach(Box::new(NamedKeys::remembered((key, version), others, events)))
        }
        Remembered::Rejected(rejection) => Reply::Rejected(rejection.clone()),
    }
}

/// Returns the reply to a decision that panicked.
#[cold]
pub(super) fn panicked<A: Aggregate>(emit: &mut Emit<A::Event>, panic: &(dyn Any + Send)) -> ReplyOf<A> {
    emit.fault = None;
    Reply::Panicked(panic_text(panic))
}

/// Returns the reply to a decision with a mistake in its code.
#[cold]
fn faulty<A: Aggregate>(emit: &mut Emit<A::Event>, fault: Fault) -> ReplyOf<A> {
    emit.fault = None;
    match fault {
        Fault::ForeignKey(key) => Reply::ForeignKey(key),
        Fault::NotSupported => Reply::NotSupported,
    }
}

/// Appends the outcome of a command with an idempotency key.
fn append_outcome<R: Stored>(
    appender: &mut Appender<'_, '_>,
    header: &RecordHeader,
    rejection: Option<&R>,
    others: Option<&OtherKeys>,
) {
    let appended = match rejection {
        Some(rejection) => appender.append(header, rejection).map(|_| ()),
        None => appender.append_bytes(header, &OtherKeys::encode(others)),
    };
    appended.expect("the segment has room for the outcome too");
}
