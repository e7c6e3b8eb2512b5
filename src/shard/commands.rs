//! Commands on the shard: decided against the state as it is, carried out as one group of records, answered in order.
//!
//! Nothing comes between a decision and its events. Where no segment has room for them yet, they are held, and the shard
//! appends nothing else before them.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use super::Shard;
use super::batch::{Batch, Run, batch, record};
use crate::command::{ClientEnd, Order, Verdict};
use crate::error::FailureCause;
use crate::error::panic_text;
use crate::event::{Correlation, Event as _, Key, KeyHash, Root, Sequence, Version};
use crate::log::format::{Ending, RECORD_HEADER_BYTES, RecordHeader};
use crate::log::writer::GROUP;
use crate::state::aggregate::{Aggregate, Emit};
use crate::state::outcomes::{Outcomes, Remembered};
use crate::storage::memory::padded;

/// What the shard says to a command.
pub(super) type Answered<A> = Verdict<<A as Aggregate>::Rejection>;

/// A decision that is still to be written.
pub(crate) struct Held<A: Aggregate> {
    /// The number of the client in the shard's list. No client leaves the list while a decision is held.
    client: usize,
    decided: Decided<A::Rejection>,
}

/// What was decided on a command; its events lie in the shard's `emit`.
struct Decided<R> {
    key: Key,
    hash: KeyHash,
    published: u64,
    idempotency: Option<u64>,
    /// Only what carries an idempotency key is written although it was rejected.
    rejection: Option<R>,
}

impl<A: Aggregate> Shard<A> {
    /// One batch of commands of one client. Returns how many were answered.
    pub(super) fn drain_client(&mut self, at: usize) -> Result<usize, FailureCause> {
        let ready = self.clients[at].orders.slots().min(self.batch_max);
        if ready == 0 || self.work.held.is_some() {
            return Ok(0);
        }
        let Ok(chunk) = self.clients[at].orders.read_chunk(ready) else { return Ok(0) };
        let (front, back) = chunk.as_slices();
        front.iter().chain(back).for_each(|order| {
            self.keys.look(order.hash);
        });
        let mut batch = batch!(self);
        let now = batch.now;
        let (mut events, mut answered) = (0, 0);
        // What is not taken stays in the lane.
        for order in chunk {
            let verdict = match batch.decide(order, &mut self.work.emit, &self.outcomes) {
                Ok(verdict) => verdict,
                Err(decided) => match batch.carry_out(decided, &mut self.work.emit, &mut self.outcomes) {
                    Ok(verdict) => verdict,
                    Err(decided) => {
                        self.work.held = Some(Held { client: at, decided });
                        break;
                    }
                },
            };
            if let Verdict::Done { events: count, repeated: false, .. } = verdict {
                events += count as usize;
            }
            answered += 1;
            self.work.answers.push(verdict);
        }
        let bytes = batch.bytes;
        self.stalled(self.work.held.is_some());
        self.answer(at, now, events, bytes)?;
        Ok(answered)
    }

    /// Tries again to append what was decided. Whether it is done.
    pub(super) fn append_held(&mut self) -> Result<bool, FailureCause> {
        let Some(Held { client, decided }) = self.work.held.take() else { return Ok(true) };
        let mut batch = batch!(self);
        let now = batch.now;
        match batch.carry_out(decided, &mut self.work.emit, &mut self.outcomes) {
            Ok(verdict) => {
                let bytes = batch.bytes;
                let events = if let Verdict::Done { events, .. } = verdict { events as usize } else { 0 };
                self.work.answers.push(verdict);
                self.answer(client, now, events, bytes)?;
                Ok(true)
            }
            Err(decided) => {
                self.work.held = Some(Held { client, decided });
                self.stalled(true);
                Ok(false)
            }
        }
    }

    /// Publishes what a batch of commands appended, and then its answers.
    fn answer(&mut self, at: usize, now: u64, events: usize, bytes: u64) -> Result<(), FailureCause> {
        let ClientEnd { orders, shared, answered, .. } = &mut self.clients[at];
        *answered += self.work.answers.len() as u64;
        let (count, shared, depth) = (*answered, Arc::clone(shared), orders.slots());
        for verdict in &self.work.answers {
            match verdict {
                Verdict::Done { repeated, .. } => self.counters.repeated.add(u64::from(*repeated)),
                _ => self.counters.rejected.add(1),
            }
        }
        self.counters.commands.add(self.work.answers.len() as u64);
        let mut clients = std::mem::take(&mut self.clients);
        let answers = &mut clients[at].answers;
        let published = self.publish(now, events, bytes, depth, |work| {
            let answered = work.answers.len();
            let Ok(chunk) = answers.write_chunk_uninit(answered) else {
                unreachable!("a client has no more commands on their way than answers have room")
            };
            chunk.fill_from_iter(work.answers.drain(..));
            shared.appended_reached(count);
        });
        self.clients = clients;
        shared.space.notify();
        published
    }

    /// Lets everybody who asked look at the states. Returns how many there were.
    pub(super) fn answer_questions(&mut self) -> usize {
        if self.questions.is_empty() {
            return 0;
        }
        let questions = self.questions.take();
        let count = questions.len();
        for question in questions {
            // What a question does wrong is its asker's to know.
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| question(&self.keys))) {
                tracing::warn!(shard = self.id.0, panic = panic_text(&*panic), "a question to a state panicked");
            }
        }
        count
    }
}

impl<A: Aggregate> Batch<'_, A> {
    /// Decides on a command. `Ok`: there is nothing to append. `Err`: what is to be appended.
    fn decide(
        &mut self,
        order: Order<A::Command>,
        emit: &mut Emit<A::Event>,
        outcomes: &Outcomes<A::Rejection>,
    ) -> Result<Answered<A>, Decided<A::Rejection>> {
        let Order { key, hash, published, expected, idempotency, command } = order;
        if let Some(idempotency) = idempotency
            && let Some(outcome) = outcomes.find(key, idempotency)
        {
            return Ok(match outcome {
                &Remembered::Done { version, events } => Verdict::Done { version, events, repeated: true },
                Remembered::Rejected(rejection) => Verdict::Rejected(rejection.clone()),
            });
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
            return Ok(Verdict::WrongVersion(version));
        }
        emit.begin(key, version, time);
        let decision = match catch_unwind(AssertUnwindSafe(|| state.decide(command, emit))) {
            Ok(decision) => decision,
            Err(panic) => return Ok(Verdict::Panicked(panic_text(&*panic))),
        };
        let decided = |rejection| Decided { key, hash, published, idempotency, rejection };
        match decision {
            Err(rejection) if idempotency.is_none() => Ok(Verdict::Rejected(rejection)),
            Err(rejection) => {
                emit.events.clear();
                Err(decided(Some(rejection)))
            }
            Ok(()) if emit.events.is_empty() && idempotency.is_none() => {
                Ok(Verdict::Done { version, events: 0, repeated: false })
            }
            Ok(()) => {
                for event in &emit.events {
                    if self.schemas.current(event.event_type()).is_none() {
                        return Ok(Verdict::UndeclaredType(event.event_type()));
                    }
                }
                Err(decided(None))
            }
        }
    }

    /// Appends what was decided, all of it or nothing. `Err`: no segment has room for it yet.
    fn carry_out(
        &mut self,
        decided: Decided<A::Rejection>,
        emit: &mut Emit<A::Event>,
        outcomes: &mut Outcomes<A::Rejection>,
    ) -> Result<Answered<A>, Decided<A::Rejection>> {
        let &Decided { key, hash, published, idempotency, ref rejection } = &decided;
        let needed = match self.needed(emit, rejection.as_ref(), idempotency) {
            Ok(needed) => needed,
            Err(too_large) => return Ok(too_large),
        };
        let room = self.writer.room();
        let time = self.time();
        if needed > room && self.writer.roll(time).is_err() {
            return Err(decided);
        }
        let first_sequence = self.writer.sequence();
        let mut staged = [0; GROUP];
        let mut appender = self.writer.appender(&mut staged);
        let begun = appender.offset().0;
        let (count, noted) = (emit.events.len(), idempotency.is_some());
        for (i, event) in emit.events.drain(..).enumerate() {
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
                schema_version: self.schemas.current(event_type).expect("looked at when it was decided"),
                more: noted || i + 1 < count,
            };
            let (shard, offset) = (self.shard, appender.offset());
            let meta = || header.meta(shard, offset, Sequence(first_sequence + i as u64));
            let len = record(&mut appender, &header, &event, meta, known, self.views, self.taker);
            let len = len.expect("there is room for all events of a command, or none was begun");
            if let Some(placed) = &mut self.placed {
                placed.push((meta(), len));
            }
        }
        let version = self.keys.get(key).map_or(Version(0), |known| known.version);
        let events = count as u32;
        if let Some(idempotency) = idempotency {
            let ending = match rejection {
                Some(_) => Ending::Rejected(Root::of::<A::Rejection>()),
                None => Ending::Done { events },
            };
            let header = RecordHeader::outcome(key, idempotency, version, ending, emit.now);
            let noted = match rejection {
                Some(rejection) => appender.append(&header, rejection).map(|_| ()),
                None => appender.append_empty(&header),
            };
            noted.expect("there is room for the outcome too");
        }
        let end = appender.finish();
        self.bytes += end.0 - begun;
        if count > 0 {
            self.runs.push(Run { published, late: None, events, end: end.0 });
        }
        self.writer.advance(end, count as u64);
        let Decided { rejection, .. } = decided;
        if let Some(idempotency) = idempotency {
            let outcome = match &rejection {
                Some(rejection) => Remembered::Rejected(rejection.clone()),
                None => Remembered::Done { version, events },
            };
            outcomes.remember(key, version, idempotency, outcome);
        }
        Ok(match rejection {
            Some(rejection) => Verdict::Rejected(rejection),
            None => Verdict::Done { version, events, repeated: false },
        })
    }

    /// The bytes that a decision takes in a segment, or why it can never be appended.
    fn needed(
        &mut self,
        emit: &Emit<A::Event>,
        rejection: Option<&A::Rejection>,
        idempotency: Option<u64>,
    ) -> Result<usize, Answered<A>> {
        let mut needed = 0;
        let event_bytes_max = self.writer.event_bytes_max();
        for event in &emit.events {
            let bytes = self.writer.measure(event);
            if bytes > event_bytes_max {
                return Err(Verdict::TooLarge { bytes_max: event_bytes_max });
            }
            needed += padded(RECORD_HEADER_BYTES + bytes);
        }
        if idempotency.is_some() {
            let bytes = rejection.map_or(0, |rejection| self.writer.measure(rejection));
            if bytes > event_bytes_max {
                return Err(Verdict::TooLarge { bytes_max: event_bytes_max });
            }
            needed += padded(RECORD_HEADER_BYTES + bytes);
        }
        let bytes_max = self.writer.room_of_a_segment();
        if needed > bytes_max { Err(Verdict::TooLarge { bytes_max }) } else { Ok(needed) }
    }
}
