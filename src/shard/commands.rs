//! Commands on the shard: decides them against the current state, appends their events, and replies in order.
//!
//! The events of one command are appended together, all or none. Nothing is appended between a decision and its events.
//! While no segment has room for them, the decision is held, and the shard appends nothing else.

use std::panic::{AssertUnwindSafe, catch_unwind};

use super::batch::{Batch, Run, record};
use super::core::Core;
use super::targets::{Each, One, Targets};
use crate::command::{ClientEnd, CommandSlot, Expected, NamedKeys, Reply};
use crate::error::FailureCause;
use crate::error::panic_text;
use crate::event::{Correlation, Event as _, Key, KeyHash, Root, Sequence, Version};
use crate::log::format::{Ending, OTHER_KEY_BYTES, OtherKeys, RECORD_HEADER_BYTES, RecordHeader};
use crate::log::writer::{Appender, GROUP};
use crate::state::aggregate::{Aggregate, Emit, Fault, Stored};
use crate::state::outcomes::{Outcomes, Remembered};
use crate::storage::memory::padded;

/// The reply to a command of `A`.
pub(super) type ReplyOf<A> = Reply<<A as Aggregate>::Rejection>;
/// The decision on a command of `A`.
pub(super) type DecisionOf<A> = Decision<<A as Aggregate>::Rejection>;

/// A decision that no segment has room for yet.
struct HeldDecision<A: Aggregate> {
    /// The client's index in the shard's list. No client leaves the list while a decision is held.
    client: usize,
    decision: DecisionOf<A>,
}

/// A decision that must be appended. Its events are in `Commands::emit`.
pub(super) struct Decision<R> {
    /// The key, or the first of several.
    pub(super) key: Key,
    pub(super) hash: KeyHash,
    pub(super) published: u64,
    pub(super) idempotency: Option<u64>,
    /// `Some` only with an idempotency key: other rejections are not appended.
    pub(super) rejection: Option<R>,
    /// All keys of a command for several keys.
    pub(super) named: Option<Box<NamedKeys>>,
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
                named.keys.iter().for_each(|other| {
                    core.keys.look(other.hash);
                });
            }
        });
        let mut batch = core.begin_batch();
        let now = batch.now;
        let (mut events, mut replied) = (0, 0);
        // Commands that the loop does not reach stay in the lane.
        for command in chunk {
            let reply = match batch.decide(command, &mut self.emit, &self.outcomes) {
                Ok(reply) => reply,
                Err(decision) => match batch.carry_out(decision, &mut self.emit, &mut self.outcomes) {
                    Ok(reply) => reply,
                    Err(decision) => {
                        self.held = Some(HeldDecision { client: at, decision });
                        break;
                    }
                },
            };
            events += reply.appended().unwrap_or(0) as usize;
            replied += 1;
            self.replies.push(reply);
        }
        let bytes = batch.bytes;
        core.note_stall(self.held.is_some());
        self.reply(core, client, now, events, bytes)?;
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
        match batch.carry_out(decision, &mut self.emit, &mut self.outcomes) {
            Ok(reply) => {
                let bytes = batch.bytes;
                let events = reply.appended().unwrap_or(0) as usize;
                self.replies.push(reply);
                self.reply(core, &mut clients[client], now, events, bytes)?;
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
        events: usize,
        bytes: u64,
    ) -> Result<(), FailureCause> {
        let (pending, ClientEnd { commands, replies, shared, replied }) = (&mut self.replies, client);
        *replied += pending.len() as u64;
        for reply in &*pending {
            match reply {
                Reply::Done { .. } | Reply::DoneEach(_) => core.counters.repeated.add(u64::from(reply.is_repeat())),
                _ => core.counters.rejected.add(1),
            }
        }
        core.counters.commands.add(pending.len() as u64);
        let published = core.publish(now, events, bytes, commands.slots(), || {
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

impl<A: Aggregate> Batch<'_, A> {
    /// Decides a command. Returns `Ok` if there is nothing to append, and `Err` with a decision that must be appended.
    fn decide(
        &mut self,
        command: CommandSlot<A::Command>,
        emit: &mut Emit<A::Event>,
        outcomes: &Outcomes<A::Rejection>,
    ) -> Result<ReplyOf<A>, DecisionOf<A>> {
        let CommandSlot { key, hash, published, expected, idempotency, command } = command;
        let expected = match expected {
            Expected::One(expected) => expected,
            Expected::Each(named) => return self.decide_many(named, published, idempotency, command, emit, outcomes),
        };
        if let Some(idempotency) = idempotency
            && let Some(outcome) = outcomes.find(key, idempotency)
        {
            return Ok(repeat::<A>(key, outcome));
        }
        let time = self.time();
        let fresh;
        let (version, state) = match self.keys.get(key) {
            Some(known) => (known.version, &known.state),
            None => {
                fresh = A::default();
                (Version(0), &fresh)
            }
        };
        if !expected.holds(version) {
            return Ok(Reply::WrongVersion(version));
        }
        emit.begin(key, version, time);
        let decided = match catch_unwind(AssertUnwindSafe(|| state.decide(command, emit))) {
            Ok(decided) => decided,
            Err(panic) => return Ok(Reply::Panicked(panic_text(&*panic))),
        };
        if let Some(fault) = emit.fault {
            return Ok(faulty::<A>(fault));
        }
        let decision = |rejection| Decision { key, hash, published, idempotency, rejection, named: None };
        match decided {
            Err(rejection) if idempotency.is_none() => Ok(Reply::Rejected(rejection)),
            Err(rejection) => {
                emit.events.clear();
                Err(decision(Some(rejection)))
            }
            Ok(()) if emit.events.is_empty() && idempotency.is_none() => {
                Ok(Reply::Done { version, events: 0, repeated: false })
            }
            Ok(()) => match self.undeclared(emit) {
                Some(reply) => Ok(reply),
                None => Err(decision(None)),
            },
        }
    }

    /// Returns the reply to a decision with an event of an undeclared type.
    #[inline]
    pub(super) fn undeclared(&self, emit: &Emit<A::Event>) -> Option<ReplyOf<A>> {
        let mut types = emit.events.iter().map(|event| event.event_type());
        types.find(|event_type| self.schemas.current(*event_type).is_none()).map(Reply::UndeclaredType)
    }

    /// Appends a decision, all of it or nothing, and remembers its outcome. Returns `Err` if no segment has room for it
    /// yet.
    fn carry_out(
        &mut self,
        mut decision: DecisionOf<A>,
        emit: &mut Emit<A::Event>,
        outcomes: &mut Outcomes<A::Rejection>,
    ) -> Result<ReplyOf<A>, DecisionOf<A>> {
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
        let version = match decision.named.take() {
            None => self.append_decision(&decision, One(decision.key, decision.hash), emit),
            Some(mut named) => {
                // The list goes back for reuse.
                let others = std::mem::take(&mut emit.others);
                let version = self.append_decision(&decision, Each::new(&mut named, &others), emit);
                emit.others = others;
                named.events = events;
                decision.named = Some(named);
                version
            }
        };
        let Decision { key, idempotency, rejection, named, .. } = decision;
        if let Some(idempotency) = idempotency {
            let outcome = match &rejection {
                Some(rejection) => Remembered::Rejected(rejection.clone()),
                None => Remembered::Done { version, events, others: named.as_ref().and_then(|named| named.others()) },
            };
            outcomes.remember(key, version, idempotency, outcome);
        }
        Ok(match (rejection, named) {
            (Some(rejection), _) => Reply::Rejected(rejection),
            (None, None) => Reply::Done { version, events, repeated: false },
            (None, Some(named)) => Reply::DoneEach(named),
        })
    }

    /// The bytes that a decision takes in a segment, or the reply to one that no segment can hold.
    fn bytes_needed(&mut self, decision: &DecisionOf<A>, emit: &Emit<A::Event>) -> Result<usize, ReplyOf<A>> {
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
            let others = decision.named.as_ref().map_or(0, |named| (named.keys.len() - 1) * OTHER_KEY_BYTES);
            let bytes = decision.rejection.as_ref().map_or(others, |rejection| self.writer.measure(rejection));
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
    fn append_decision(
        &mut self,
        decision: &DecisionOf<A>,
        mut targets: impl Targets,
        emit: &mut Emit<A::Event>,
    ) -> Version {
        let &Decision { published, idempotency, ref rejection, .. } = decision;
        let first_sequence = self.writer.sequence();
        let mut staged = [0; GROUP];
        let mut appender = self.writer.appender(&mut staged);
        let begun = appender.offset().0;
        let (count, has_outcome) = (emit.events.len(), idempotency.is_some());
        for (i, event) in emit.events.drain(..).enumerate() {
            let (key, hash) = targets.next();
            let seen = self.keys.look(hash);
            let known = self.keys.slot(key, hash, seen);
            let event_type = event.event_type();
            let own = event.correlation();
            let header = RecordHeader {
                time: event.time().unwrap_or(emit.now),
                key,
                previous: known.head,
                event_type,
                correlation: if own == Correlation(0) { emit.correlation } else { own },
                version: Version(known.version.0 + 1),
                schema_version: self.schemas.current(event_type).expect("`decide` checked the event's type"),
                more: has_outcome || i + 1 < count,
            };
            let (shard, offset) = (self.shard, appender.offset());
            let meta = || header.meta(shard, offset, Sequence(first_sequence + i as u64));
            let len = record(&mut appender, &header, &event, meta, known, self.views, self.taker);
            let len = len.expect("the segment has room for all events of the command");
            if let Some(placed) = &mut self.placed {
                placed.push((meta(), len));
            }
        }
        let version = targets.version(self.keys);
        let events = count as u32;
        if let Some(idempotency) = idempotency {
            let others = targets.others();
            let ending = match rejection {
                Some(_) => Ending::Rejected(Root::of::<A::Rejection>()),
                None => Ending::Done { events, others: OtherKeys::count(others.as_deref()) },
            };
            let header = RecordHeader::outcome(decision.key, idempotency, version, ending, emit.now);
            append_outcome(&mut appender, &header, rejection.as_ref(), others.as_deref());
        }
        let end = appender.finish();
        self.bytes += end.0 - begun;
        if count > 0 {
            self.runs.push(Run { published, late: None, events, end: end.0 });
        }
        self.writer.advance(end, count as u64);
        version
    }
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

/// Returns the reply to a decision with a mistake in its code.
#[cold]
pub(super) fn faulty<A: Aggregate>(fault: Fault) -> ReplyOf<A> {
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
