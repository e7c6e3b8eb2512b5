//! One turn of a shard: from the inbox through the core, in bounded steps that never wait.
//!
//! One writer: the shard's thread.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use super::commands::Commands;
use super::core::Core;
use super::handler::Registered;
use super::handling::Handlers;
use super::inbox::{Inbox, LaneEnd};
use super::syncer_link::SyncerLink;
use crate::clock::{Clock, wall_now};
use crate::command::{ClientEnd, Question};
use crate::error::{FailureCause, WaitError};
use crate::event::{Schemas, ShardId};
use crate::lane::registry::LaneRegistry;
use crate::lane::requests::KeeperRequests;
use crate::lane::requests::{SyncRequests, UnsyncedRun};
use crate::lane::shared::SharedLane;
use crate::log::segment::ShardLog;
use crate::log::writer::Writer;
use crate::metrics::{Counters, Recorder, Stage};
use crate::state::aggregate::Aggregate;
use crate::state::keys::KeyTable;
use crate::state::outcomes::Outcomes;
use crate::state::snapshot::taker::Taker;
use crate::state::view::ViewWriter;
use crate::storage::Storage;
use crate::sync::{Arrivals, Ordering, block_own};

/// Everything that a shard is built from.
pub(crate) struct ShardParts<A: Aggregate> {
    pub(crate) id: ShardId,
    pub(crate) clock: Clock,
    pub(crate) batch_max: usize,
    /// Lanes of new producers.
    pub(crate) arriving: Arc<Arrivals<LaneEnd<A::Event>>>,
    pub(crate) shared_lane: Arc<SharedLane<A::Event>>,
    /// Lanes of new clients.
    pub(crate) arriving_clients: Arc<Arrivals<ClientEnd<A>>>,
    pub(crate) questions: Arc<Arrivals<Question<A>>>,
    pub(crate) keys: KeyTable<A>,
    /// Outcomes of commands with idempotency keys.
    pub(crate) outcomes: Outcomes<A::Rejection>,
    pub(crate) views: Vec<Box<dyn ViewWriter<A>>>,
    pub(crate) taker: Taker,
    pub(crate) writer: Writer,
    pub(crate) log: Arc<ShardLog>,
    pub(crate) syncer: Arc<SyncRequests>,
    /// `true` if the syncer syncs without being asked.
    pub(crate) syncs: bool,
    /// `None` if the latency to durable is not recorded.
    pub(crate) unsynced_runs: Option<rtrb::Producer<UnsyncedRun>>,
    pub(crate) keeper: Arc<KeeperRequests>,
    pub(crate) handlers: Vec<Registered<A::Event>>,
    pub(crate) storage: Arc<dyn Storage>,
    /// The folder for notes of handler failures.
    pub(crate) quarantine: PathBuf,
    pub(crate) recorder: Recorder,
    pub(crate) counters: Arc<Counters>,
}

/// A shard: its inbox, the core that its turns change, and its commands.
pub(crate) struct Shard<A: Aggregate> {
    inbox: Inbox<A>,
    core: Core<A>,
    commands: Commands<A>,
}

impl<A: Aggregate> std::fmt::Debug for Shard<A> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (id, lanes) = (&self.core.id, &self.inbox.lanes.len());
        f.debug_struct("Shard").field("id", id).field("lanes", lanes).finish_non_exhaustive()
    }
}

impl<A: Aggregate> Shard<A> {
    pub(crate) fn new(parts: ShardParts<A>) -> Self {
        let (id, batch_max) = (parts.id, parts.batch_max);
        let handlers = Handlers::new(
            id,
            parts.handlers,
            batch_max,
            Arc::clone(&parts.log),
            Arc::clone(&parts.counters),
            parts.storage,
            parts.quarantine,
        );
        Self {
            inbox: Inbox::new(batch_max, parts.arriving, parts.shared_lane, parts.arriving_clients, parts.questions),
            core: Core {
                id,
                clock: parts.clock,
                keys: parts.keys,
                views: parts.views,
                taker: parts.taker,
                writer: parts.writer,
                log: parts.log,
                handlers,
                syncer: SyncerLink::new(parts.syncer, parts.syncs, parts.unsynced_runs),
                keeper: parts.keeper,
                keeper_woken_at: 0,
                recorder: parts.recorder,
                counters: parts.counters,
                schemas: Schemas::of::<A::Event>(),
                runs: Vec::with_capacity(batch_max),
                is_stalled: false,
            },
            commands: Commands::new(parts.outcomes, batch_max),
        }
    }

    /// Appends one batch from every lane. Returns the amount of work done.
    pub(crate) fn turn(&mut self) -> Result<usize, FailureCause> {
        self.inbox.adopt();
        let began = self.core.clock.now();
        self.core.is_stalled = false;
        if !self.core.handlers.write_notes()? || !self.append_held()? {
            // Nothing may be appended now, but questions need not wait. Saving continues too: the held decision may
            // wait for a segment that retention frees only once the states are saved.
            let answered = self.answer_questions();
            self.core.save(&self.commands.outcomes, false);
            self.core.recorder.exchange();
            return Ok(answered);
        }
        let mut work = self.drain()?;
        work += self.answer_questions();
        work += usize::from(self.core.save(&self.commands.outcomes, work > 0));
        if work > 0 {
            self.core.counters.turns.add(1);
            self.core.recorder.record(Stage::Turn, self.core.clock.now() - began, 1);
        } else {
            self.inbox.retire_lanes();
            // A held decision names its client by its index in the list.
            if !self.commands.is_holding() {
                self.inbox.retire_clients();
            }
            if self.core.writer.wants_idle_mark() {
                // The mark is not published, so it causes no sync of its own. A lost mark loses no event.
                self.core.writer.mark_now(wall_now());
            }
        }
        self.core.recorder.exchange();
        Ok(work)
    }

    /// Appends a batch from every lane. Returns the number of events and commands.
    fn drain(&mut self) -> Result<usize, FailureCause> {
        let mut work = 0;
        // Round robin: when little room is left in the segment, no lane is always first.
        let lanes = self.inbox.lanes.len();
        for i in 0..lanes {
            work += self.drain_lane((self.inbox.lane_next + i) % lanes)?;
        }
        self.inbox.lane_next = self.inbox.lane_next.wrapping_add(1);
        work += self.drain_shared()?;
        let clients = self.inbox.clients.len();
        for i in 0..clients {
            work += self.drain_client((self.inbox.client_next + i) % clients)?;
        }
        self.inbox.client_next = self.inbox.client_next.wrapping_add(1);
        Ok(work)
    }

    #[inline]
    fn drain_lane(&mut self, at: usize) -> Result<usize, FailureCause> {
        let (lane, core) = (&mut self.inbox.lanes[at], &mut self.core);
        let ready = lane.ring.slots().min(self.inbox.batch_max);
        if ready == 0 {
            return Ok(0);
        }
        let Ok(chunk) = lane.ring.read_chunk(ready) else { return Ok(0) };
        let mut batch = core.begin_batch();
        let (now, (front, back)) = (batch.now, chunk.as_slices());
        let mut appended = batch.append(front)?;
        if appended == front.len() {
            appended += batch.append(back)?;
        }
        let bytes = batch.bytes;
        chunk.commit(appended);
        lane.appended += appended as u64;
        let (count, shared, depth) = (lane.appended, &lane.shared, lane.ring.cached_slots());
        core.note_stall(appended < ready);
        core.publish(now, appended, bytes, depth, || shared.appended_reached(count))?;
        shared.space.notify();
        Ok(appended)
    }

    fn drain_shared(&mut self) -> Result<usize, FailureCause> {
        self.inbox.fill_taken();
        let (core, Inbox { taken, shared_lane, shared_appended, .. }) = (&mut self.core, &mut self.inbox);
        if taken.is_empty() {
            return Ok(0);
        }
        let mut batch = core.begin_batch();
        let now = batch.now;
        let appended = batch.append(taken)?;
        let bytes = batch.bytes;
        core.note_stall(appended < taken.len());
        let base = *shared_appended;
        *shared_appended += appended as u64;
        let depth = shared_lane.queue.len();
        core.publish(now, appended, bytes, depth, || {
            for (i, taken) in taken.drain(..appended).enumerate() {
                if let Some(ticket) = taken.ticket {
                    // Release: pairs with the Acquire in `SharedReceipt::receipt`.
                    ticket.store(base + i as u64 + 1, Ordering::Release);
                }
            }
            shared_lane.shared.appended_reached(*shared_appended);
        })?;
        Ok(appended)
    }

    fn drain_client(&mut self, at: usize) -> Result<usize, FailureCause> {
        let Inbox { clients, batch_max, .. } = &mut self.inbox;
        self.commands.drain(&mut self.core, &mut clients[at], at, *batch_max)
    }

    /// Tries again to append the held decision. Returns `true` if none is held any more.
    fn append_held(&mut self) -> Result<bool, FailureCause> {
        if !self.commands.is_holding() {
            return Ok(true);
        }
        self.commands.append_held(&mut self.core, &mut self.inbox.clients)
    }

    /// Answers the questions that have arrived. Returns their number.
    fn answer_questions(&mut self) -> usize {
        let questions = self.inbox.take_questions();
        self.core.answer(questions)
    }

    /// Returns `true` if a turn would find work. Called before sleeping, so it must see everything that was made
    /// visible before a wake-up.
    pub(crate) fn has_work(&self) -> bool {
        self.inbox.has_arrivals()
            || self.core.recorder.exchange_handle().is_wanted()
            || self.core.writer.wants_idle_mark()
            || self.core.taker.has_work()
            || self.can_append()
    }

    /// Returns `true` if accepted events or commands are not appended yet.
    pub(crate) fn has_events(&self) -> bool {
        self.inbox.has_events() || self.commands.is_holding() || self.core.handlers.has_notes()
    }

    /// Returns `true` if there are events to append and nothing keeps the shard from it.
    fn can_append(&self) -> bool {
        !self.is_stalled() && self.has_events()
    }

    /// Returns `true` if the last turn left events because no segment was ready and none is ready now, or if notes of
    /// handler failures cannot be written before a later time. Called before sleeping: the keeper may have handed over
    /// a segment, and notified, between the turn and the sleep.
    pub(crate) fn is_stalled(&self) -> bool {
        (self.core.is_stalled && !self.core.writer.segment_ready()) || self.core.handlers.is_waiting_for_storage()
    }

    /// Returns `true` if a closed shard has work: events that it can append, or states to save.
    pub(crate) fn has_work_to_finish(&self) -> bool {
        // The events may wait for a segment that retention frees only once the states are saved.
        self.can_append() || self.core.taker.has_work()
    }

    /// Returns the time of the next work, unless something else happens before.
    pub(crate) fn wake_at(&self) -> Option<Instant> {
        let saving = self.core.taker.rest().map(|rest| Instant::now() + rest);
        saving.into_iter().chain(self.core.handlers.retry_at()).min()
    }

    /// Closes every lane. Afterwards the lanes hold every accepted event and command, and accept no more.
    pub(crate) fn close(&mut self) {
        self.inbox.close();
    }

    /// Sends the snapshots of the last events. Returns `false` if the snapshotter has no room for them yet. It will
    /// make room, since it ends after the shards.
    pub(crate) fn send_last_snapshots(&mut self) -> bool {
        self.core.taker.send_last()
    }

    /// Waits until everything appended is durable, and appends a mark that says so. Called once, after the last turn.
    pub(crate) fn finish(&mut self, lanes: &LaneRegistry) -> Result<(), FailureCause> {
        let Core { log, writer, syncer, .. } = &mut self.core;
        let end = log.appended.get();
        syncer.flush(end);
        let synced = block_own(
            |at, waker| lanes.waiting_flush().register_own(at, end, waker),
            || {
                let failure = log.failure().map(|failure| Err(WaitError::from(failure.clone())));
                if log.durable.get() >= end { Some(Ok(())) } else { failure }
            },
        );
        if synced.is_err() {
            let cause = log.failure().map(|failure| failure.cause.clone());
            return Err(cause.unwrap_or_else(|| FailureCause::Panic("the syncer is gone".into())));
        }
        if writer.mark_now(wall_now()) {
            writer.publish();
        }
        Ok(())
    }

    /// Makes `cause` the shard's failure, unless it has failed before.
    pub(crate) fn fail(&self, cause: FailureCause) {
        self.core.log.fail(cause);
    }

    /// Ends the syncer, and wakes all threads that wait for this shard.
    pub(crate) fn end(&self, lanes: &LaneRegistry) {
        self.core.syncer.end();
        self.core.log.end();
        lanes.wake_all();
        self.core.taker.end();
    }
}
