//! One shard: takes events out of its lanes and makes them part of the log. `turn()` is bounded, never
//! waits, and returns the work done; the runner owns the thread and the waiting.
//!
//! One writer: this shard alone writes its log and its key table.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;

use crate::clock::{Clock, Nanos, wall_now};
use crate::error::FailureCause;
use crate::event::{Event, Meta, Offset, Sequence, ShardId, Version};
use crate::handler::{BatchEnd, HandlerError, OnError, Registered};
use crate::keys::KeyTable;
use crate::log::format::{RECORD_HEADER_BYTES, RecordHeader};
use crate::log::keeper::KeeperRequests;
use crate::log::segment::ShardLog;
use crate::log::storage::Storage;
use crate::log::syncer::{SyncMark, SyncRequests};
use crate::log::writer::{Refused, Writer};
use crate::metrics::{Counters, Recorder, Stage};
use crate::producer::LaneShared;
use crate::ring::{NOT_DUE, Slot};
use crate::shared::{SharedLane, SharedSlot};
use crate::sync::{Arc, Arrivals, Ordering};

/// The shard's end of a producer's lane.
#[derive(Debug)]
pub(crate) struct LaneEnd<E> {
    pub(crate) ring: rtrb::Consumer<Slot<E>>,
    pub(crate) shared: Arc<LaneShared>,
    pub(crate) appended: u64,
}

/// Everything a shard works with.
pub(crate) struct Shard<E: Event> {
    pub(crate) id: ShardId,
    pub(crate) clock: Clock,
    pub(crate) batch_max: usize,
    /// Lanes of new producers, to be adopted.
    pub(crate) arriving: std::sync::Arc<Arrivals<LaneEnd<E>>>,
    pub(crate) lanes: Vec<LaneEnd<E>>,
    pub(crate) shared_lane: std::sync::Arc<SharedLane<E>>,
    pub(crate) keys: KeyTable,
    pub(crate) writer: Writer,
    pub(crate) log: Arc<ShardLog>,
    pub(crate) syncer: std::sync::Arc<SyncRequests>,
    /// Whether anything is synced by itself.
    pub(crate) syncs: bool,
    /// `None` where nothing is synced by itself, so that nothing waits to be recorded.
    pub(crate) sync_marks: Option<rtrb::Producer<SyncMark>>,
    pub(crate) keeper: std::sync::Arc<KeeperRequests>,
    pub(crate) handlers: Vec<Registered<E>>,
    pub(crate) storage: std::sync::Arc<dyn Storage>,
    pub(crate) quarantine: PathBuf,
    pub(crate) recorder: Recorder,
    pub(crate) counters: std::sync::Arc<Counters>,
    pub(crate) work: Work<E>,
}

/// Memory a turn reuses.
#[derive(Debug)]
pub(crate) struct Work<E> {
    /// Runs of events of this batch with one publish time.
    runs: Vec<Run>,
    /// Where this batch's events lie; filled for handlers only.
    placed: Vec<(Meta, usize)>,
    /// A run that the syncer has not been told of, for lack of room.
    unmarked: Option<SyncMark>,
    /// Events taken out of the shared queue and not yet appended.
    taken: Vec<SharedSlot<E>>,
    /// Schema version by event type id, for ids below its length.
    schema_versions: Vec<Option<u16>>,
    appended_count_shared: u64,
    lane_next: usize,
    keeper_told_at: u64,
    stalled: bool,
}

impl<E: Event> Work<E> {
    pub(crate) fn new(batch_max: usize) -> Self {
        let mut schema_versions = vec![None; E::TYPES.iter().map(|t| usize::from(t.id.0) + 1).max().unwrap_or(0)];
        for t in E::TYPES {
            schema_versions[usize::from(t.id.0)] = Some(t.schema_version);
        }
        Self {
            runs: Vec::with_capacity(batch_max),
            placed: Vec::with_capacity(batch_max),
            unmarked: None,
            taken: Vec::with_capacity(batch_max),
            schema_versions,
            appended_count_shared: 0,
            lane_next: 0,
            keeper_told_at: 0,
            stalled: false,
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct Run {
    published: Nanos,
    late: Option<u32>,
    events: u32,
    end: u64,
}

/// A run of which the end is not known yet.
#[derive(Debug, Clone, Copy)]
struct RunBegun {
    published: Nanos,
    late: u32,
    first: usize,
}

impl RunBegun {
    /// The run without event number `next`, whose record begins at `end`; nothing if that leaves none.
    fn until(&self, next: usize, end: Offset) -> Option<Run> {
        let late = (self.late != NOT_DUE).then_some(self.late);
        let run = Run { published: self.published, late, events: (next - self.first) as u32, end: end.0 };
        (run.events > 0).then_some(run)
    }
}

/// How many events ahead the key table is prefetched: a trip to memory is about this many appends long.
const PREFETCH_AHEAD: usize = 16;

/// The keeper is told of progress each time this many bytes were appended.
const KEEPER_STEP_BYTES: u64 = 4 << 20;

impl<E: Event> std::fmt::Debug for Shard<E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shard").field("id", &self.id).field("lanes", &self.lanes.len()).finish_non_exhaustive()
    }
}

impl<E: Event> Shard<E> {
    /// One batch from every lane. Returns the number of events appended.
    pub(crate) fn turn(&mut self) -> Result<usize, FailureCause> {
        self.adopt();
        let began = self.clock.now();
        self.work.stalled = false;
        let mut work = 0;
        // Round robin, so that with little room left no lane is always first.
        let lanes = self.lanes.len();
        for i in 0..lanes {
            work += self.drain_lane((self.work.lane_next + i) % lanes)?;
        }
        self.work.lane_next = self.work.lane_next.wrapping_add(1);
        work += self.drain_shared()?;
        if work > 0 {
            self.counters.turns.add(1);
            self.recorder.record(Stage::Turn, self.clock.now() - began, 1);
        } else {
            self.retire_lanes();
            if self.writer.wants_idle_mark() {
                // Not published, so that it wants no sync of its own: a mark that is lost costs nothing but its news.
                self.writer.mark_now(wall_now());
            }
        }
        self.recorder.exchange();
        Ok(work)
    }

    /// Whether a turn would find something to do. Looked at before sleeping, so it must see whatever was made visible before a wake-up.
    pub(crate) fn has_work(&self) -> bool {
        !self.arriving.is_empty()
            || self.recorder.exchange_handle().is_wanted()
            || self.writer.wants_idle_mark()
            || (!self.is_stalled() && self.has_events())
    }

    /// Whether events wait to be appended.
    pub(crate) fn has_events(&self) -> bool {
        !self.work.taken.is_empty()
            || !self.shared_lane.queue.is_empty()
            || self.lanes.iter().any(|lane| !lane.ring.is_empty())
    }

    /// Whether the last turn had to leave events because no segment was ready, and none is now. Looked at before
    /// sleeping: the keeper may have handed one over, and notified, between the turn and the sleep.
    pub(crate) fn is_stalled(&self) -> bool {
        self.work.stalled && !self.writer.segment_ready()
    }

    /// Takes in the lanes of new producers.
    fn adopt(&mut self) {
        if !self.arriving.is_empty() {
            self.lanes.extend(self.arriving.take());
        }
    }

    /// Lets go of lanes whose producers are gone and that are empty.
    fn retire_lanes(&mut self) {
        self.lanes.retain(|lane| {
            // In this order: what an abandoned ring holds was all there before it was abandoned.
            let over = lane.ring.is_abandoned() && lane.ring.is_empty();
            if over {
                lane.shared.retire();
            }
            !over
        });
    }

    #[inline]
    fn drain_lane(&mut self, at: usize) -> Result<usize, FailureCause> {
        let lane = &mut self.lanes[at];
        let ready = lane.ring.slots().min(self.batch_max);
        if ready == 0 {
            return Ok(0);
        }
        let Ok(chunk) = lane.ring.read_chunk(ready) else { return Ok(0) };
        let mut batch = Batch {
            writer: &mut self.writer,
            keys: &mut self.keys,
            runs: &mut self.work.runs,
            placed: if self.handlers.is_empty() { None } else { Some(&mut self.work.placed) },
            schema_versions: &self.work.schema_versions,
            shard: self.id,
            now: self.clock.now(),
            wall_offset: self.clock.wall_offset(),
            bytes: 0,
        };
        batch.mark();
        let (now, (front, back)) = (batch.now, chunk.as_slices());
        let mut appended = batch.append(front.iter())?;
        if appended == front.len() {
            appended += batch.append(back.iter())?;
        }
        let bytes = batch.bytes;
        chunk.commit(appended);
        lane.appended += appended as u64;
        let (count, shared, depth) = (lane.appended, Arc::clone(&lane.shared), lane.ring.cached_slots());
        self.stalled(appended < ready);
        self.publish(now, appended, bytes, depth, |_| shared.appended_reached(count))?;
        shared.space.notify();
        Ok(appended)
    }

    fn drain_shared(&mut self) -> Result<usize, FailureCause> {
        while self.work.taken.len() < self.batch_max {
            let Some(slot) = self.shared_lane.queue.pop() else { break };
            self.work.taken.push(slot);
        }
        if self.work.taken.is_empty() {
            return Ok(0);
        }
        let mut batch = Batch {
            writer: &mut self.writer,
            keys: &mut self.keys,
            runs: &mut self.work.runs,
            placed: if self.handlers.is_empty() { None } else { Some(&mut self.work.placed) },
            schema_versions: &self.work.schema_versions,
            shard: self.id,
            now: self.clock.now(),
            wall_offset: self.clock.wall_offset(),
            bytes: 0,
        };
        batch.mark();
        let now = batch.now;
        let appended = batch.append(self.work.taken.iter().map(|taken| &taken.slot))?;
        let bytes = batch.bytes;
        let lane = std::sync::Arc::clone(&self.shared_lane);
        let stalled = appended < self.work.taken.len();
        self.stalled(stalled);
        let base = self.work.appended_count_shared;
        self.work.appended_count_shared += appended as u64;
        let depth = lane.queue.len();
        self.publish(now, appended, bytes, depth, |work| {
            for (i, taken) in work.taken.drain(..appended).enumerate() {
                if let Some(ticket) = taken.ticket {
                    // Release: pairs with the Acquire in `SharedReceipt::receipt`.
                    ticket.store(base + i as u64 + 1, Ordering::Release);
                }
            }
            lane.shared.appended_reached(work.appended_count_shared);
        })?;
        Ok(appended)
    }

    /// Everything after the appending: watermarks, then who waits, then handlers, then figures.
    #[inline]
    fn publish(
        &mut self,
        now: Nanos,
        appended: usize,
        bytes: u64,
        queue_depth: usize,
        reached: impl FnOnce(&mut Work<E>),
    ) -> Result<(), FailureCause> {
        if appended == 0 {
            return Ok(());
        }
        // Before the watermarks, so that who has seen an event appended finds it counted.
        self.counters.appended.add(appended as u64);
        self.counters.appended_bytes.add(bytes);
        let before = self.log.appended.get();
        let end = self.writer.publish();
        reached(&mut self.work);
        // A syncer that is behind looks again by itself; one that was done may be asleep.
        if self.syncs && self.log.durable.get() >= before {
            self.syncer.signal.notify();
        }
        let rolled = self.writer.take_rolled();
        if rolled || end.saturating_sub(self.work.keeper_told_at) >= KEEPER_STEP_BYTES {
            self.counters.segments_begun.add(u64::from(rolled));
            self.work.keeper_told_at = end;
            self.keeper.signal.notify();
        }
        let visible = self.clock.now();
        let handled = if self.handlers.is_empty() {
            visible
        } else {
            self.handle(queue_depth)?;
            self.clock.now()
        };
        self.counters.handled.add(appended as u64);
        self.counters.keys.set(self.keys.len() as u64);
        self.recorder.record(Stage::Batch, appended as u64, 1);
        for run in &self.work.runs {
            let (late, events) = (run.late, u64::from(run.events));
            self.recorder.latency(Stage::Ring, Stage::RingDue, now.saturating_sub(run.published), late, events);
            self.recorder.latency(
                Stage::Appended,
                Stage::AppendedDue,
                visible.saturating_sub(run.published),
                late,
                events,
            );
            self.recorder.latency(
                Stage::Handled,
                Stage::HandledDue,
                handled.saturating_sub(run.published),
                late,
                events,
            );
        }
        self.tell_syncer();
        self.work.runs.clear();
        Ok(())
    }

    fn stalled(&mut self, stalled: bool) {
        if stalled {
            if !self.work.stalled {
                self.counters.segment_waits.add(1);
            }
            self.work.stalled = true;
            self.keeper.signal.notify();
        }
    }

    /// Leaves the publish times of this batch for the syncer to record when they are durable.
    #[inline]
    fn tell_syncer(&mut self) {
        let Some(marks) = &mut self.sync_marks else { return };
        let mut pending = self.work.unmarked.take();
        for run in &self.work.runs {
            let mark = SyncMark { end: run.end, published: run.published, late: run.late, events: run.events };
            pending = Some(match pending {
                // To within a microsecond, and to the earlier time, so that no latency is flattered.
                Some(mut before) if run.published.abs_diff(before.published) < 1_000 || marks.is_full() => {
                    before.end = run.end;
                    before.events = before.events.saturating_add(run.events);
                    before
                }
                Some(before) => {
                    if marks.push(before).is_err() {
                        unreachable!("the ring was not full, and only we push");
                    }
                    mark
                }
                None => mark,
            });
        }
        if let Some(mark) = pending
            && marks.push(mark).is_err()
        {
            self.work.unmarked = Some(mark);
        }
    }

    /// Runs every inline handler over this batch.
    fn handle(&mut self, queue_depth: usize) -> Result<(), FailureCause> {
        let placed = std::mem::take(&mut self.work.placed);
        let end = BatchEnd { shard: self.id, events: placed.len(), queue_depth };
        let mut handlers = std::mem::take(&mut self.handlers);
        let outcome = handlers.iter_mut().try_for_each(|handler| self.run_handler(handler, &placed, &end));
        self.handlers = handlers;
        self.work.placed = placed;
        self.work.placed.clear();
        outcome
    }

    fn run_handler(
        &self,
        registered: &mut Registered<E>,
        placed: &[(Meta, usize)],
        end: &BatchEnd,
    ) -> Result<(), FailureCause> {
        let mut next = 0;
        while next < placed.len() {
            // One catch per batch, not per event; `next` says where it stopped.
            let outcome = catch_unwind(AssertUnwindSafe(|| -> Result<(), HandlerError> {
                while let Some((meta, len)) = placed.get(next) {
                    let Some(memory) = self.memory_of(meta.offset) else {
                        return Err("the event's segment is gone".into());
                    };
                    let at = (meta.offset.0 % self.log.segment_bytes) as usize + RECORD_HEADER_BYTES;
                    let Some(event) = memory.archived::<E>(at, len - RECORD_HEADER_BYTES) else {
                        return Err("the archive is not valid".into());
                    };
                    registered.handler.on_event(event, meta)?;
                    next += 1;
                }
                Ok(())
            }));
            let error = match outcome {
                Ok(Ok(())) => continue,
                Ok(Err(error)) => error.to_string(),
                Err(panic) => format!("panic: {}", panic_text(&*panic)),
            };
            self.on_handler_error(registered, Some(&placed[next].0), error)?;
            next += 1;
        }
        let error = match catch_unwind(AssertUnwindSafe(|| registered.handler.on_batch_end(end))) {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(error)) => error.to_string(),
            Err(panic) => format!("panic: {}", panic_text(&*panic)),
        };
        self.on_handler_error(registered, None, error)
    }

    #[cold]
    fn on_handler_error(
        &self,
        registered: &Registered<E>,
        meta: Option<&Meta>,
        error: String,
    ) -> Result<(), FailureCause> {
        let offset = meta.map_or(Offset(self.log.appended.get()), |meta| meta.offset);
        tracing::warn!(
            handler = registered.name,
            shard = self.id.0,
            offset = offset.0,
            error,
            "an inline handler failed"
        );
        match registered.on_error {
            OnError::Halt => Err(FailureCause::Handler { handler: registered.name.clone(), offset, error }),
            OnError::Quarantine => {
                self.counters.quarantined.add(1);
                let event_id = meta.map(|meta| meta.id().to_string());
                let line = serde_json::json!({ "handler": registered.name, "event_id": event_id, "shard": self.id.0, "offset": offset.0, "error": error });
                let file = self.quarantine.join("handlers.jsonl");
                self.storage
                    .create_dir(&self.quarantine)
                    .and_then(|()| self.storage.append(&file, format!("{line}\n").as_bytes()))
                    .map_err(|source| FailureCause::Storage {
                        action: "noting a quarantined event",
                        source: std::sync::Arc::new(source),
                    })
            }
        }
    }

    fn memory_of(&self, offset: Offset) -> Option<std::sync::Arc<crate::log::mmap::Memory>> {
        match self.writer.current_memory() {
            Some((base, memory)) if offset.0 >= base => Some(std::sync::Arc::clone(memory)),
            _ => self.log.segment(self.log.segment_of(offset)).map(|segment| segment.memory),
        }
    }
}

/// The appending of one batch: what it touches and nothing else.
struct Batch<'a> {
    writer: &'a mut Writer,
    keys: &'a mut KeyTable,
    runs: &'a mut Vec<Run>,
    placed: Option<&'a mut Vec<(Meta, usize)>>,
    schema_versions: &'a [Option<u16>],
    shard: ShardId,
    now: Nanos,
    wall_offset: u64,
    bytes: u64,
}

impl Batch<'_> {
    /// Notes in the log how far it had been synced.
    #[inline]
    fn mark(&mut self) {
        let time = crate::producer::wall_time(self.now, self.wall_offset);
        self.writer.mark(self.now, time);
    }

    /// Appends slots until one finds no room and there is no new segment yet. Returns how many it appended.
    #[inline]
    fn append<'s, E: Event>(
        &mut self,
        slots: impl ExactSizeIterator<Item = &'s Slot<E>> + Clone,
    ) -> Result<usize, FailureCause> {
        let total = slots.len();
        let mut appended = 0;
        loop {
            let mut rest = slots.clone();
            if appended > 0 {
                rest.nth(appended - 1);
            }
            appended += self.append_to_segment(rest)?;
            let wall_time = crate::producer::wall_time(self.now, self.wall_offset);
            if appended == total || self.writer.roll(wall_time).is_err() {
                return Ok(appended);
            }
        }
    }

    /// Appends slots until the current segment is full. Returns how many it appended.
    #[inline]
    fn append_to_segment<'s, E: Event>(
        &mut self,
        slots: impl Iterator<Item = &'s Slot<E>> + Clone,
    ) -> Result<usize, FailureCause> {
        // The table's slots of later keys are brought near while earlier events are appended.
        let mut ahead = slots.clone();
        ahead.by_ref().take(PREFETCH_AHEAD).for_each(|slot| self.keys.prefetch(slot.hash));
        let first_sequence = self.writer.sequence();
        let mut appender = self.writer.appender();
        let begun = appender.offset().0;
        let mut run = RunBegun { published: 0, late: NOT_DUE, first: 0 };
        let (mut appended, mut refused) = (0, None);
        for slot in slots {
            if let Some(later) = ahead.next() {
                self.keys.prefetch(later.hash);
            }
            let event_type = slot.event.event_type();
            let Some(&Some(schema_version)) = self.schema_versions.get(usize::from(event_type.0)) else {
                refused = Some(FailureCause::UndeclaredType { key: slot.key.0, event_type });
                break;
            };
            let offset = appender.offset();
            if run.published != slot.published || run.late != slot.late {
                self.runs.extend(run.until(appended, offset));
                run = RunBegun { published: slot.published, late: slot.late, first: appended };
            }
            let known = self.keys.entry(slot.key, slot.hash);
            let version = Version(known.version().0 + 1);
            let header = RecordHeader {
                time: slot.event.time().unwrap_or_else(|| crate::producer::wall_time(slot.published, self.wall_offset)),
                key: slot.key,
                previous: known.head(),
                event_type,
                correlation: slot.event.correlation(),
                version,
                schema_version,
            };
            let len = match appender.append(&header, &slot.event) {
                Ok(len) => len,
                Err(Refused::NeedsSegment) => break,
                Err(Refused::TooLarge { bytes_max }) => {
                    refused = Some(FailureCause::EventTooLarge { key: slot.key.0, bytes_max });
                    break;
                }
            };
            known.set(version, offset);
            if let Some(placed) = &mut self.placed {
                placed.push((header.meta(self.shard, offset, Sequence(first_sequence + appended as u64)), len));
            }
            appended += 1;
        }
        let end = appender.finish();
        self.runs.extend(run.until(appended, end));
        self.bytes += end.0 - begun;
        self.writer.advance(end, appended as u64);
        refused.map_or(Ok(appended), Err)
    }
}

/// What a panic said.
pub(crate) fn panic_text(panic: &(dyn Any + Send)) -> String {
    panic
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "no text".to_owned())
}
