//! The gated producer: a sequence gate in front of a producer. It publishes unordered input in order, even across
//! restarts.
//!
//! One writer: its owner. The events of a partition are published by rising sequence, each at most once. The gate
//! passes a gap only after the gap's record is durable. The progress of each partition is derived from the log itself,
//! so events lost in a crash are expected again.
//!
//! ```text
//!  offer ─▶ SequenceGate ─▶ front (at most one) ─▶ Producer ─▶ shards' logs ─┐ counted at the next opening
//!                │                 ▲                                         ▼
//!                └─▶ GapClosed, starts ─▶ gates/NAME/gaps (synced)      gates/NAME/positions (a cache)
//! ```
//!
//! The front is an event or a gap that has left the gate but could not be published or recorded. While there is a
//! front, nothing is taken from the gate, so nothing overtakes the front.

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
use crate::lane::door::ShardDoor;
use crate::lane::flush::flush_shard_until;
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

/// The names of an engine's open gates.
pub(crate) type OpenGates = Arc<Mutex<HashSet<String>>>;

/// The exclusive use of a gate's name; dropping it releases the name.
#[derive(Debug)]
pub(crate) struct TakenName {
    name: String,
    open: OpenGates,
}

impl TakenName {
    /// Takes the name. Returns `None` if an open gate has the name.
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

/// An event or a gap that has left the gate but is not published or recorded yet.
enum Front<E> {
    Event { partition: u64, sequence: u64, key: Key, event: E },
    Gap(Gap),
}

/// A gate's connection to one shard.
pub(crate) struct GatedShard<E: Event> {
    pub(crate) door: Arc<ShardDoor>,
    pub(crate) syncer: Arc<SyncRequests>,
    /// Reads up to the durable end whenever positions are saved.
    pub(crate) trail: Reader<E>,
    /// The position of `trail` after the last save. Retention frees nothing above this position, so `trail` can always
    /// continue.
    pub(crate) counted: Position,
}

/// A gated producer's connections.
pub(crate) struct Parts<E: Event> {
    pub(crate) producer: Producer<E>,
    pub(crate) gate: SequenceGate<u64, (Key, E)>,
    pub(crate) files: GateFiles,
    pub(crate) name: TakenName,
    pub(crate) shards: Vec<GatedShard<E>>,
    pub(crate) clock: Clock,
    pub(crate) keeper: Arc<KeeperRequests>,
    /// Kept because the gate writes files of the store, even after its engine is dropped.
    pub(crate) _lock: Arc<dyn Lock>,
}

/// Publishes events in the order of their sequence numbers, each once, no matter in which order they are offered.
///
/// [`Engine::gated`](crate::Engine::gated) returns a gated producer. The store stays locked while it exists. Retention
/// frees no event that the gate has not counted, so call [`GatedProducer::save`] regularly.
///
/// ```
/// # use corelane::ingress::{Accepted, GatePolicy};
/// # use corelane::{Bounded, Config, Deadline, Event, EventLog, EventType, EventTypeId, Key};
/// # use rkyv::{Archive, Deserialize, Serialize};
/// # let dir = std::env::temp_dir().join(format!("corelane-gated-{}", std::process::id()));
/// // The event contains its partition and sequence, so the log does too.
/// #[derive(Archive, Serialize, Deserialize, Bounded)]
/// struct Sale { seller: u64, number: u64 }
/// # impl Event for Sale {
/// #     const TYPES: &'static [EventType] = &[EventType::new(1, "sale", 1)];
/// #     fn event_type(&self) -> EventTypeId { EventTypeId(1) }
/// # }
///
/// let engine = EventLog::<Sale>::open(Config::new(&dir))?;
/// let source = |sale: &ArchivedSale| Some((sale.seller.to_native(), sale.number.to_native()));
/// let mut sales = engine.gated("sales", GatePolicy::default(), source)?;
/// let mut offer = |number| sales.offer(7, number, Key::new(1), Sale { seller: 7, number });
/// assert!(matches!(offer(1)?, Accepted::Buffered));
/// assert!(matches!(offer(0)?, Accepted::Published(_))); // and then number 1
/// assert!(matches!(offer(1)?, Accepted::Duplicate));
/// sales.close(Deadline::NEVER)?;
/// # engine.shutdown(Deadline::NEVER)?;
/// # std::fs::remove_dir_all(&dir)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct GatedProducer<E: Event> {
    parts: Parts<E>,
    front: Option<Front<E>>,
    /// `true` if the last call could not publish everything that was ready.
    is_behind: bool,
    /// Simulated time, for tests.
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

    /// Offers an event. Publishes every event that is now ready, waiting for room as [`Producer::publish`] does.
    ///
    /// Closes the gaps that are due; each gap needs a sync of its record. With [`GateStart::FirstSeen`], the first
    /// event of a partition is published after a sync of the partition's start.
    ///
    /// [`GateStart::FirstSeen`]: crate::ingress::GateStart::FirstSeen
    ///
    /// # Errors
    /// Returns the event with the reason. If the disk has no space for a record, the call returns `StorageFull` without
    /// waiting; when there is space again, the next call continues.
    #[inline]
    pub fn offer(&mut self, partition: u64, sequence: u64, key: Key, event: E) -> Result<Accepted<E>, GateRefused<E>> {
        self.offer_with(partition, sequence, key, event, Patience::Forever)
    }

    /// As [`GatedProducer::offer`], but without waiting for room.
    ///
    /// # Errors
    /// As [`GatedProducer::offer`]; also returns `Full` or `StorageFull` if there is no room for an earlier event that
    /// is ready.
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
        // Checked before the gate, because an event that never fits would block the front for ever.
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
        // If `drain` stops, the next call returns the error. An event that was just refused is not tried again: the
        // answer is `Waiting`.
        self.is_behind = self.front.is_some() || self.drain(clock, patience).is_err();
        answer
    }

    /// Closes the gaps that are due, and publishes every event that is ready, waiting for room. Returns the number of
    /// events published and gaps closed. Call this after the time that [`GatedProducer::next_due`] returns.
    ///
    /// # Errors
    /// Returns the reason why the gate stopped. Nothing is lost or overtaken, and the next call continues at the same
    /// event or gap. If the disk is full, the reason is `StorageFull`; the call does not wait for space for a gap's
    /// record.
    pub fn pump(&mut self) -> Result<u64, GateError> {
        self.pump_with(Patience::Forever)
    }

    /// As [`GatedProducer::pump`], but without waiting for room.
    ///
    /// # Errors
    /// As [`GatedProducer::pump`]; also returns `Full` or `StorageFull`.
    pub fn try_pump(&mut self) -> Result<u64, GateError> {
        self.pump_with(Patience::None)
    }

    fn pump_with(&mut self, patience: Patience) -> Result<u64, GateError> {
        let pumped = self.drain(self.parts.clock.now(), patience);
        self.is_behind = pumped.is_err();
        pumped
    }

    /// Ends the input: closes all gaps and publishes all buffered events. From now on, gaps are closed without waiting.
    ///
    /// # Errors
    /// As [`GatedProducer::pump`].
    pub fn finish(&mut self) -> Result<u64, GateError> {
        self.parts.gate.end();
        self.pump()
    }

    /// Returns the time until [`GatedProducer::pump`] may have work, or `None` if it has none before the next offer.
    #[must_use]
    pub fn next_due(&self) -> Option<Duration> {
        if self.is_behind {
            return Some(Duration::ZERO);
        }
        let due = self.parts.gate.next_due()?;
        Some(due.saturating_sub(self.gate_time(self.parts.clock.now())))
    }

    /// Publishes a late event out of order, after the events that should have followed it. Its gap stays in the list of
    /// gaps. After a restart the gate does not remember that the event was published; if it is offered again, it is
    /// `TooOld`.
    ///
    /// # Errors
    /// As [`Producer::publish`].
    ///
    /// # Panics
    /// Panics if another gate returned the event and this gate still expects it.
    pub fn publish_late(&mut self, late: LateEvent<E>) -> Result<Receipt, Rejected<E>> {
        let LateEvent { partition, sequence, key, event } = late;
        let is_over = self.parts.gate.is_over(&partition, sequence);
        assert!(is_over, "sequence {sequence} of partition {partition} is still expected");
        self.parts.producer.publish(key, event)
    }

    /// Waits until everything that this gate has published is durable, in every durability mode, and saves the
    /// positions. The next opening counts only later events, and retention may free earlier ones.
    ///
    /// # Errors
    /// Returns `Wait` if a shard failed or the deadline passed, `Positions` if the positions could not be written, and
    /// `Read` if the log could not be read. The previously saved positions stay valid.
    pub fn save(&mut self, deadline: impl Into<Deadline>) -> Result<(), GateError> {
        let deadline = deadline.into().instant();
        self.flush(deadline)?;
        for shard in &mut self.parts.shards {
            while shard.trail.ahead(|_| false).map_err(GateError::Read)?.is_some() {}
            shard.counted = shard.trail.position_after(&shard.counted);
        }
        self.save_counted()
    }

    /// Saves the progress of each partition. All sequences that it covers are in the log below the shards' positions,
    /// or in gaps.
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

    /// Saves the positions and closes the gate. Buffered events are dropped: their source must offer them again, as
    /// after a crash.
    ///
    /// # Errors
    /// As [`GatedProducer::save`].
    pub fn close(mut self, deadline: impl Into<Deadline>) -> Result<(), GateError> {
        let deadline = deadline.into().instant();
        self.save(deadline)
    }

    /// Returns the gaps, in the order in which they were closed.
    ///
    /// # Errors
    /// Returns the reason why the file of gaps cannot be read.
    pub fn gaps(&self) -> Result<Vec<Gap>, OpenError> {
        self.parts.files.gaps()
    }

    /// Returns the next sequence that a partition expects, or `None` if the partition is unknown.
    #[must_use]
    pub fn expected(&self, partition: u64) -> Option<u64> {
        self.parts.gate.expected(&partition)
    }

    /// Returns the counts since the gate was opened.
    #[must_use]
    pub fn statistics(&self) -> GateStatistics {
        self.parts.gate.statistics()
    }

    /// Returns one receipt per shard, which covers everything that this gate published before this call.
    #[must_use]
    pub fn receipts(&self) -> Vec<Receipt> {
        self.parts.producer.receipts()
    }

    /// Advances the gate's clock by `by`, for tests.
    #[cfg(any(test, feature = "test-util"))]
    pub fn pass_time(&mut self, by: Duration) {
        self.passed += by;
    }

    fn gate_time(&self, clock: Nanos) -> Duration {
        Duration::from_nanos(clock) + self.passed
    }

    /// Publishes the front and everything that the gate releases, until nothing is left or an error stops it.
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

    /// Publishes one event, or makes it the front.
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
            flush_shard_until(deadline, &shard.door, &shard.syncer, vec![own]).map_err(GateError::Wait)?;
        }
        Ok(())
    }

    /// Returns the progress of each partition.
    fn standings(&self) -> Vec<Standing> {
        let front = self.front.as_ref().map(|front| match front {
            Front::Event { partition, sequence, .. } => (*partition, *sequence, *sequence),
            Front::Gap(gap) => (gap.partition, gap.from, gap.to),
        });
        let mut standings = Vec::new();
        for (partition, expected, ahead) in self.parts.gate.standings() {
            let mut standing = Standing { partition: *partition, expected, runs: Vec::new() };
            if let Some((_, first, last)) = front.filter(|(of, ..)| of == partition) {
                // The gate is already past the front, and past higher sequences that were published before a restart.
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

/// Returns the name of a gate's retention hold. The prefix distinguishes it from the hold of a consumer with the same
/// name.
pub(crate) fn hold_name(gate: &str) -> String {
    format!("gate {gate}")
}
