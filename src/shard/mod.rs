//! One shard: takes events out of its lanes and makes them part of the log. `turn()` is bounded, never
//! waits, and returns the work done; the runner owns the thread and the waiting.
//!
//! One writer: this shard alone writes its log, its key table and the states in it.

mod batch;
mod commands;
pub(crate) mod handler;
mod handling;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use crate::clock::wall_time;
use crate::clock::{Clock, Nanos, wall_now};
use crate::command::{ClientEnd, Question};
use crate::error::FailureCause;
use crate::event::{Meta, Offset, Schemas, Sequence, ShardId};
use crate::ingress::shared::{SharedLane, SharedSlot};
use crate::lane::counts::LaneShared;
use crate::lane::requests::KeeperRequests;
use crate::lane::requests::{SyncMark, SyncRequests};
use crate::lane::ring::Slot;
use crate::log::segment::ShardLog;
use crate::log::writer::Writer;
use crate::metrics::{Counters, Recorder, Stage};
use crate::shard::handler::Registered;
use crate::state::aggregate::{Aggregate, Emit};
use crate::state::keys::KeyTable;
use crate::state::outcomes::Outcomes;
use crate::state::snapshot::taker::Taker;
use crate::state::view::{Position, ViewWriter};
use crate::storage::Storage;
use crate::sync::{Arrivals, Ordering};
use batch::{Run, batch};
use commands::{Answered, Held};

/// The shard's end of a producer's lane.
#[derive(Debug)]
pub(crate) struct LaneEnd<E> {
    pub(crate) ring: rtrb::Consumer<Slot<E>>,
    pub(crate) shared: Arc<LaneShared>,
    pub(crate) appended: u64,
}

/// Everything a shard works with.
pub(crate) struct Shard<A: Aggregate> {
    pub(crate) id: ShardId,
    pub(crate) clock: Clock,
    pub(crate) batch_max: usize,
    /// Lanes of new producers, to be adopted.
    pub(crate) arriving: Arc<Arrivals<LaneEnd<A::Event>>>,
    pub(crate) lanes: Vec<LaneEnd<A::Event>>,
    pub(crate) shared_lane: Arc<SharedLane<A::Event>>,
    /// Lanes of new clients, to be adopted.
    pub(crate) arriving_clients: Arc<Arrivals<ClientEnd<A>>>,
    pub(crate) clients: Vec<ClientEnd<A>>,
    /// Who wants to look at states.
    pub(crate) questions: Arc<Arrivals<Question<A>>>,
    pub(crate) keys: KeyTable<A>,
    /// What became of commands with idempotency keys.
    pub(crate) outcomes: Outcomes<A::Rejection>,
    pub(crate) views: Vec<Box<dyn ViewWriter<A>>>,
    pub(crate) taker: Taker,
    pub(crate) writer: Writer,
    pub(crate) log: Arc<ShardLog>,
    pub(crate) syncer: Arc<SyncRequests>,
    /// Whether anything is synced by itself.
    pub(crate) syncs: bool,
    /// `None` where nothing is synced by itself, so that nothing waits to be recorded.
    pub(crate) sync_marks: Option<rtrb::Producer<SyncMark>>,
    pub(crate) keeper: Arc<KeeperRequests>,
    pub(crate) handlers: Vec<Registered<A::Event>>,
    pub(crate) storage: Arc<dyn Storage>,
    pub(crate) quarantine: PathBuf,
    pub(crate) recorder: Recorder,
    pub(crate) counters: Arc<Counters>,
    pub(crate) work: Work<A>,
}

/// Memory a turn reuses.
pub(crate) struct Work<A: Aggregate> {
    /// Runs of events of this batch with one publish time.
    runs: Vec<Run>,
    /// Where this batch's events lie; filled for handlers only.
    placed: Vec<(Meta, usize)>,
    /// A run that the syncer has not been told of, for lack of room.
    unmarked: Option<SyncMark>,
    /// Events taken out of the shared queue and not yet appended.
    taken: Vec<SharedSlot<A::Event>>,
    /// Where decisions put their events.
    emit: Emit<A::Event>,
    /// A decision that no segment has room for yet. Nothing else is appended before it.
    held: Option<Held<A>>,
    /// Answers of this batch, not yet sent.
    answers: Vec<Answered<A>>,
    schemas: Schemas,
    appended_count_shared: u64,
    lane_next: usize,
    client_next: usize,
    keeper_told_at: u64,
    stalled: bool,
    /// Notes of handlers' failures that are not in their file yet. Nothing is appended before they are.
    notes: Vec<u8>,
    /// When writing them is tried again, after the storage had no room.
    notes_at: Option<Instant>,
}

impl<A: Aggregate> Work<A> {
    pub(crate) fn new(batch_max: usize) -> Self {
        Self {
            runs: Vec::with_capacity(batch_max),
            placed: Vec::with_capacity(batch_max),
            unmarked: None,
            taken: Vec::with_capacity(batch_max),
            emit: Emit::new(),
            held: None,
            answers: Vec::with_capacity(batch_max),
            schemas: Schemas::of::<A::Event>(),
            appended_count_shared: 0,
            lane_next: 0,
            client_next: 0,
            keeper_told_at: 0,
            stalled: false,
            notes: Vec::new(),
            notes_at: None,
        }
    }
}

/// The keeper is told of progress each time this many bytes were appended.
const KEEPER_STEP_BYTES: u64 = 4 << 20;

impl<A: Aggregate> std::fmt::Debug for Shard<A> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shard").field("id", &self.id).field("lanes", &self.lanes.len()).finish_non_exhaustive()
    }
}

impl<A: Aggregate> Shard<A> {
    /// One batch from every lane. Returns how much there was to do.
    pub(crate) fn turn(&mut self) -> Result<usize, FailureCause> {
        self.adopt();
        let began = self.clock.now();
        self.work.stalled = false;
        if !self.write_notes()? {
            let looked = self.answer_questions();
            self.save(false);
            self.recorder.exchange();
            return Ok(looked);
        }
        if self.work.held.is_some() && !self.append_held()? {
            // What was decided rests on the state as it is now: nothing may come in between. But the segment it waits for may
            // be one that retention frees once the states are saved, and who only looks need not wait.
            let looked = self.answer_questions();
            self.save(false);
            self.recorder.exchange();
            return Ok(looked);
        }
        let mut work = 0;
        // Round robin, so that with little room left no lane is always first.
        let lanes = self.lanes.len();
        for i in 0..lanes {
            work += self.drain_lane((self.work.lane_next + i) % lanes)?;
        }
        self.work.lane_next = self.work.lane_next.wrapping_add(1);
        work += self.drain_shared()?;
        let clients = self.clients.len();
        for i in 0..clients {
            work += self.drain_client((self.work.client_next + i) % clients)?;
        }
        self.work.client_next = self.work.client_next.wrapping_add(1);
        work += self.answer_questions();
        work += usize::from(self.save(work > 0));
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
            || !self.arriving_clients.is_empty()
            || !self.questions.is_empty()
            || self.recorder.exchange_handle().is_wanted()
            || self.writer.wants_idle_mark()
            || self.taker.has_work()
            || (!self.is_stalled() && self.has_events())
    }

    /// Whether events wait to be appended.
    pub(crate) fn has_events(&self) -> bool {
        !self.work.taken.is_empty()
            || self.work.held.is_some()
            || !self.work.notes.is_empty()
            || !self.shared_lane.queue.is_empty()
            || self.lanes.iter().any(|lane| !lane.ring.is_empty())
            || self.clients.iter().any(|client| !client.orders.is_empty())
    }

    /// Whether the last turn had to leave events because no segment was ready, and none is now; or because notes of failures
    /// cannot be written before a later time. Looked at before sleeping: the keeper may have handed one over, and notified,
    /// between the turn and the sleep.
    pub(crate) fn is_stalled(&self) -> bool {
        (self.work.stalled && !self.writer.segment_ready()) || self.work.notes_at.is_some_and(|at| Instant::now() < at)
    }

    /// When there is something to do again, if nothing else happens.
    pub(crate) fn wake_at(&self) -> Option<Instant> {
        let saving = self.taker.rest().map(|rest| Instant::now() + rest);
        saving.into_iter().chain(self.work.notes_at).min()
    }

    /// Saves states, if it is time to.
    #[inline]
    fn save(&mut self, is_busy: bool) -> bool {
        let now = self.clock.now();
        let time = wall_time(now, self.clock.wall_offset());
        let at = (Offset(self.log.appended.get()), Sequence(self.writer.sequence()), time);
        self.taker.step(&self.keys, &self.outcomes, at, now, is_busy)
    }

    /// Takes in the lanes of new producers.
    fn adopt(&mut self) {
        if !self.arriving.is_empty() {
            self.lanes.extend(self.arriving.take());
        }
        if !self.arriving_clients.is_empty() {
            self.clients.extend(self.arriving_clients.take());
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
        if self.work.held.is_some() {
            // A decision that waits for a segment knows its client by its place in the list.
            return;
        }
        self.clients.retain(|client| {
            let over = client.orders.is_abandoned() && client.orders.is_empty();
            if over {
                client.shared.retire();
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
        let mut batch = batch!(self);
        let (now, (front, back)) = (batch.now, chunk.as_slices());
        let mut appended = batch.append(front)?;
        if appended == front.len() {
            appended += batch.append(back)?;
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
        let mut batch = batch!(self);
        let now = batch.now;
        let appended = batch.append(&self.work.taken)?;
        let bytes = batch.bytes;
        let lane = Arc::clone(&self.shared_lane);
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

    /// Everything after the appending: views and watermarks, then who waits, then handlers, then figures.
    #[inline]
    fn publish(
        &mut self,
        now: Nanos,
        appended: usize,
        bytes: u64,
        queue_depth: usize,
        reached: impl FnOnce(&mut Work<A>),
    ) -> Result<(), FailureCause> {
        if bytes == 0 {
            reached(&mut self.work);
            // What appended nothing is as durable as what came before it, and a syncer that is done may be asleep over that.
            if self.syncs && self.log.durable.get() >= self.log.appended.get() {
                self.syncer.signal.notify();
            }
            return Ok(());
        }
        // Before the watermarks, so that who has seen an event appended finds it counted.
        self.counters.appended.add(appended as u64);
        self.counters.appended_bytes.add(bytes);
        let before = self.log.appended.get();
        if !self.views.is_empty() {
            // Before the watermark: who has seen an event appended finds it in the views.
            let (sequence, time) = (Sequence(self.writer.sequence()), wall_time(now, self.clock.wall_offset()));
            self.views.iter_mut().for_each(|view| view.publish(Position { sequence, time }));
        }
        let end = self.writer.publish();
        reached(&mut self.work);
        self.log.grown.reached(end);
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
        if appended == 0 {
            return Ok(());
        }
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
            let events = u64::from(run.events);
            let mark = SyncMark { end: run.end, published: run.published, late: run.late, events };
            pending = Some(match pending {
                // To within a microsecond, and to the earlier time and the longer lateness, so that no latency is flattered.
                Some(mut before)
                    if (run.late == before.late && run.published.abs_diff(before.published) < 1_000)
                        || marks.is_full() =>
                {
                    before.end = run.end;
                    before.late = before.late.max(run.late);
                    before.events += events;
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
}
