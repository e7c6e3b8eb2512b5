//! A producer behind a sequence gate: what comes out of order is published in order, over restarts too.
//!
//! One writer: whoever owns it. Of each partition events are published by rising sequence and each at most once; a gap is passed only
//! when its record is durable. Where a partition stands is told by the log itself: what a crash took is expected again.
//!
//! ```text
//!  offer ─▶ SequenceGate ─▶ front (at most one) ─▶ Producer ─▶ shards' logs ─┐ counted at the next opening
//!                │                 ▲                                         ▼
//!                └─▶ GapClosed, starts ─▶ gates/NAME/gaps (synced)      gates/NAME/positions (a cache)
//! ```
//!
//! The front is what has left the gate and could not be published. While it stands there nothing is taken from the gate, so nothing
//! overtakes it.

mod answer;
mod files;
mod record;
mod recovered;

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::clock::{Clock, Nanos, wall_now};
use crate::error::{GateError, OpenError, Rejected};
use crate::event::{Event, Key};
use crate::ingress::producer::Producer;
use crate::ingress::sequence_gate::SequenceGate;
use crate::ingress::sequence_gate::answer::{GateStatistics, Offered, Released};
use crate::ingress::sequence_gate::partition::Ahead;
#[expect(unused_imports, reason = "named by the documentation")]
use crate::ingress::sequence_gate::policy::GateStart;
use crate::lane::door::ShardDoor;
use crate::lane::flush::flush_shard;
use crate::lane::receipt::Receipt;
use crate::lane::requests::KeeperRequests;
use crate::lane::requests::SyncRequests;
use crate::log::position::Position;
use crate::log::reader::Reader;
use crate::storage::Lock;
use crate::sync::{Deadline, Mutex, Patience, lock};

pub use answer::{Accepted, GateRefused, LateEvent};
pub(crate) use files::{GateFiles, Positions, Recorded, Standing, gates_dir};
pub use record::Gap;
pub(crate) use record::{Entry, Start};
pub(crate) use recovered::{Counts, Recovered, Uncounted};

/// The names of an engine's gates that are open.
pub(crate) type OpenGates = Arc<Mutex<HashSet<String>>>;

/// A name that is taken as long as this lives.
#[derive(Debug)]
pub(crate) struct TakenName {
    name: String,
    open: OpenGates,
}

impl TakenName {
    /// `None` where it is taken already.
    pub(crate) fn take(open: &OpenGates, name: &str) -> Option<Self> {
        let is_free = lock(open).insert(name.to_owned());
        is_free.then(|| Self { name: name.to_owned(), open: Arc::clone(open) })
    }
}

impl Drop for TakenName {
    fn drop(&mut self) {
        lock(&self.open).remove(&self.name);
    }
}

/// What has left the gate and is not published.
enum Front<E> {
    Event { partition: u64, sequence: u64, key: Key, event: E },
    Gap(Gap),
}

/// What a gate needs of a shard.
pub(crate) struct GatedShard<E: Event> {
    pub(crate) door: Arc<ShardDoor>,
    pub(crate) syncer: Arc<SyncRequests>,
    /// Moves over what is durable whenever positions are saved.
    pub(crate) trail: Reader<E>,
    /// Where it stood the last time. Retention frees nothing behind it, so the trail always reads on.
    pub(crate) counted: Position,
}

/// A gate's connections.
pub(crate) struct Parts<E: Event> {
    pub(crate) producer: Producer<E>,
    pub(crate) gate: SequenceGate<u64, (Key, E)>,
    pub(crate) files: GateFiles,
    pub(crate) name: TakenName,
    pub(crate) shards: Vec<GatedShard<E>>,
    pub(crate) clock: Clock,
    pub(crate) keeper: Arc<KeeperRequests>,
    /// The gate writes files of the store, also when its engine is gone.
    pub(crate) _lock: Arc<dyn Lock>,
}

/// Publishes events in the order of their sequences, each once, whatever the order in which they are offered.
///
/// Made by [`crate::Engine::gated`]. While it lives the store stays locked. Retention frees nothing that it has not counted: call
/// [`GatedProducer::save`] now and then.
pub struct GatedProducer<E: Event> {
    parts: Parts<E>,
    front: Option<Front<E>>,
    /// The last call could not publish all that was ready.
    is_behind: bool,
    /// Time that tests have let pass.
    passed: Duration,
}

impl<E: Event> std::fmt::Debug for GatedProducer<E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GatedProducer").field("name", &self.parts.name.name).field("gate", &self.parts.gate).finish()
    }
}

impl<E: Event> GatedProducer<E> {
    pub(crate) fn new(parts: Parts<E>) -> Self {
        Self { parts, front: None, is_behind: false, passed: Duration::ZERO }
    }

    /// Takes an event in. What becomes ready by it is published at once, waiting for room as [`Producer::publish`] does; gaps that are
    /// due are closed, each with a sync of its record. With [`GateStart::FirstSeen`] the first event of a partition is published
    /// when its start is recorded, with a sync likewise.
    ///
    /// # Errors
    /// The event, and why it was refused. Where the disk has no space for a record, `StorageFull` is answered without waiting; once
    /// there is space, the next call goes on.
    #[inline]
    pub fn offer(&mut self, partition: u64, sequence: u64, key: Key, event: E) -> Result<Accepted<E>, GateRefused<E>> {
        self.offer_with(partition, sequence, key, event, Patience::Forever)
    }

    /// As [`GatedProducer::offer`], without waiting for room.
    ///
    /// # Errors
    /// As there, and `Full` (or `StorageFull`) when what stands in front does not fit.
    #[inline]
    pub fn try_offer(
        &mut self,
        partition: u64,
        sequence: u64,
        key: Key,
        event: E,
    ) -> Result<Accepted<E>, GateRefused<E>> {
        self.offer_with(partition, sequence, key, event, Patience::None)
    }

    #[inline]
    fn offer_with(
        &mut self,
        partition: u64,
        sequence: u64,
        key: Key,
        event: E,
        patience: Patience,
    ) -> Result<Accepted<E>, GateRefused<E>> {
        // Before it is in the gate: one that never fits would stand in front for ever.
        let event = self.parts.producer.check(event).map_err(GateRefused::Publish)?;
        let clock = self.parts.clock.now();
        if self.is_behind
            && let Err(why) = self.drain(clock, patience)
        {
            return Err(GateRefused::because(why, event));
        }
        if self.parts.gate.would_start(&partition, sequence)
            && let Err(why) = self.parts.files.add(&Entry::Start(Start { partition, sequence, time: wall_now() }))
        {
            return Err(GateRefused::because(why, event));
        }
        let offered = self.parts.gate.offer(partition, sequence, (key, event), self.gate_time(clock));
        let late = |(key, event)| LateEvent { partition, sequence, key, event };
        let answer = match offered {
            Ok(Offered::Passed((key, event))) => {
                Ok(match self.publish(partition, sequence, key, event, clock, patience) {
                    Ok(receipt) => Accepted::Published(receipt),
                    Err(_) => Accepted::Waiting,
                })
            }
            Ok(Offered::Buffered) => Ok(Accepted::Buffered),
            Ok(Offered::Duplicate) => Ok(Accepted::Duplicate),
            Ok(Offered::Late(item)) => Ok(Accepted::Late(late(item))),
            Ok(Offered::TooOld(item)) => Ok(Accepted::TooOld(late(item))),
            Err(refused) => Err(GateRefused::Gate(refused.map(|(_, event)| event))),
        };
        // What stops it is met again, and told, by the next call. What was refused just now is not tried twice: it is `Waiting`.
        self.is_behind = self.front.is_some() || self.drain(clock, patience).is_err();
        answer
    }

    /// Closes gaps that are due, and publishes what waits behind them and what was refused before, waiting for room. Returns the
    /// number of events published and gaps closed. Call it when [`GatedProducer::next_due`] says so.
    ///
    /// # Errors
    /// The reason why it stopped. Nothing is lost or overtaken: the next call goes on there. A full disk is `StorageFull`, without
    /// waiting where a gap's record has no space.
    pub fn pump(&mut self) -> Result<u64, GateError> {
        self.pump_with(Patience::Forever)
    }

    /// As [`GatedProducer::pump`], without waiting for room.
    ///
    /// # Errors
    /// As there, and `Full` (or `StorageFull`).
    pub fn try_pump(&mut self) -> Result<u64, GateError> {
        self.pump_with(Patience::None)
    }

    fn pump_with(&mut self, patience: Patience) -> Result<u64, GateError> {
        let pumped = self.drain(self.parts.clock.now(), patience);
        self.is_behind = pumped.is_err();
        pumped
    }

    /// No more is to come: closes all gaps and publishes all that is buffered. From now on no gap is waited for.
    ///
    /// # Errors
    /// As [`GatedProducer::pump`].
    pub fn finish(&mut self) -> Result<u64, GateError> {
        self.parts.gate.end();
        self.pump()
    }

    /// In what time [`GatedProducer::pump`] may have something to do without a further offer; `None`: not before one.
    #[must_use]
    pub fn next_due(&self) -> Option<Duration> {
        if self.is_behind {
            return Some(Duration::ZERO);
        }
        let due = self.parts.gate.next_due()?;
        Some(due.saturating_sub(self.gate_time(self.parts.clock.now())))
    }

    /// Publishes an event that came too late, out of order: behind what had to come after it. A gap it belongs to stays in the list.
    /// After a restart the gate does not remember that it was published; offered again it is `TooOld`.
    ///
    /// # Errors
    /// As [`Producer::publish`].
    ///
    /// # Panics
    /// When it was handed back by another gate, and is still to come here.
    pub fn publish_late(&mut self, late: LateEvent<E>) -> Result<Receipt, Rejected<E>> {
        let LateEvent { partition, sequence, key, event } = late;
        let is_over = self.parts.gate.is_over(&partition, sequence);
        assert!(is_over, "sequence {sequence} of partition {partition} is still to come");
        self.parts.producer.publish(key, event)
    }

    /// Waits until everything published here is durable, in every mode, and saves how far that is: the next opening counts only what
    /// comes behind it, and retention may free what lies before it.
    ///
    /// # Errors
    /// `Wait` where a shard failed or the deadline passed; `Positions` where they could not be written, `Read` where the log could not
    /// be read. The older ones stay.
    pub fn save(&mut self, deadline: impl Into<Deadline>) -> Result<(), GateError> {
        let deadline = deadline.into().instant();
        self.flush(deadline)?;
        for shard in &mut self.parts.shards {
            while shard.trail.ahead(|_| false).map_err(GateError::Read)?.is_some() {}
            shard.counted = shard.trail.position_after(&shard.counted);
        }
        self.save_counted()
    }

    /// Saves where the partitions stand, all of it being in the log before the shards' positions, or in gaps.
    pub(crate) fn save_counted(&mut self) -> Result<(), GateError> {
        let counted = self.parts.shards.iter().map(|shard| shard.counted).collect();
        let positions = Positions { counted, standings: self.standings() };
        self.parts.files.save(&positions).map_err(GateError::Positions)?;
        for shard in &self.parts.shards {
            let (holds, name) = (&shard.door.log.holds, hold_name(&self.parts.name.name));
            holds.hold(&name, shard.counted.offset(), &self.parts.keeper.signal);
        }
        Ok(())
    }

    /// Saves, and ends. What is buffered is dropped: its source has to offer it again, as after a crash.
    ///
    /// # Errors
    /// As [`GatedProducer::save`].
    pub fn close(mut self, deadline: impl Into<Deadline>) -> Result<(), GateError> {
        let deadline = deadline.into().instant();
        self.save(deadline)
    }

    /// The gaps that were closed, in the order in which they were.
    ///
    /// # Errors
    /// What reading their file found.
    pub fn gaps(&self) -> Result<Vec<Gap>, OpenError> {
        self.parts.files.gaps()
    }

    /// The sequence that a partition waits for; `None` when nothing of it is known.
    #[must_use]
    pub fn expected(&self, partition: u64) -> Option<u64> {
        self.parts.gate.expected(&partition)
    }

    /// Counts since it was opened.
    #[must_use]
    pub fn statistics(&self) -> GateStatistics {
        self.parts.gate.statistics()
    }

    /// A receipt per shard for everything published here so far.
    #[must_use]
    pub fn receipts(&self) -> Vec<Receipt> {
        self.parts.producer.receipts()
    }

    /// Simulates that `by` has passed.
    #[cfg(any(test, feature = "test-util"))]
    pub fn pass_time(&mut self, by: Duration) {
        self.passed += by;
    }

    fn gate_time(&self, clock: Nanos) -> Duration {
        Duration::from_nanos(clock) + self.passed
    }

    /// Publishes what stands in front and what the gate releases, until there is nothing or something refuses.
    #[inline]
    fn drain(&mut self, clock: Nanos, patience: Patience) -> Result<u64, GateError> {
        let now = self.gate_time(clock);
        let mut done = 0;
        loop {
            let released = match self.front.take() {
                Some(front) => front,
                None => match self.parts.gate.next(now) {
                    None => return Ok(done),
                    Some(Released::Item { partition, sequence, item: (key, event) }) => {
                        Front::Event { partition, sequence, key, event }
                    }
                    Some(Released::GapClosed { partition, from, to, waited }) => {
                        Front::Gap(Gap::new(partition, from, to, waited, wall_now()))
                    }
                },
            };
            match released {
                Front::Event { partition, sequence, key, event } => {
                    self.publish(partition, sequence, key, event, clock, patience)?;
                }
                Front::Gap(gap) => {
                    let recorded = self.parts.files.add(&Entry::Gap(gap));
                    recorded.inspect_err(|_| self.front = Some(Front::Gap(gap)))?;
                }
            }
            done += 1;
        }
    }

    /// Publishes one, or puts it in front.
    #[inline]
    fn publish(
        &mut self,
        partition: u64,
        sequence: u64,
        key: Key,
        event: E,
        clock: Nanos,
        patience: Patience,
    ) -> Result<Receipt, GateError> {
        self.parts.producer.push(key, event, clock, patience).map_err(|rejected| {
            let reason = rejected.reason();
            self.front = Some(Front::Event { partition, sequence, key, event: rejected.into_event() });
            GateError::Publish(reason)
        })
    }

    fn flush(&self, deadline: Option<Instant>) -> Result<(), GateError> {
        for (shard, own) in self.parts.shards.iter().zip(self.parts.producer.lanes()) {
            flush_shard(&shard.door, &shard.syncer, vec![own], deadline).map_err(GateError::Wait)?;
        }
        Ok(())
    }

    /// Where every partition stands: what is below is in the log or in a gap.
    fn standings(&self) -> Vec<Standing> {
        let front = self.front.as_ref().map(|front| match front {
            Front::Event { partition, sequence, .. } => (*partition, *sequence, *sequence),
            Front::Gap(gap) => (gap.partition, gap.from, gap.to),
        });
        let mut standings = Vec::new();
        for (partition, expected, ahead) in self.parts.gate.standings() {
            let mut standing = Standing { partition: *partition, expected, runs: Vec::new() };
            if let Some((_, first, last)) = front.filter(|(of, ..)| of == partition) {
                // The gate is past it already, and past what an earlier life had published behind it.
                standing.expected = first;
                standing.runs.extend((last + 1 < expected).then(|| (last + 1, expected - 1)));
            }
            let passed = ahead.filter(|(.., what)| *what == Ahead::Passed);
            standing.runs.extend(passed.map(|(from, to, _)| (from, to)));
            standings.push(standing);
        }
        standings.sort_by_key(|standing| standing.partition);
        standings
    }
}

/// The name under which a gate keeps retention from what it has not counted. Consumers may have the same names.
pub(crate) fn hold_name(gate: &str) -> String {
    format!("gate {gate}")
}
