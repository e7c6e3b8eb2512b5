//! The core: everything that a batch changes, from the log's writer to the metrics.
//!
//! One writer: the shard's thread. The core does not know which lane a batch comes from.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use super::batch::{Batch, Run};
use super::handling::Handlers;
use super::syncer_link::SyncerLink;
use crate::clock::wall_time;
use crate::clock::{Clock, Nanos};
use crate::command::Question;
use crate::error::FailureCause;
use crate::error::panic_text;
use crate::event::{Offset, Schemas, Sequence, ShardId};
use crate::lane::requests::KeeperRequests;
use crate::log::segment::ShardLog;
use crate::log::writer::Writer;
use crate::metrics::{Counters, Recorder, Stage};
use crate::state::aggregate::Aggregate;
use crate::state::keys::KeyTable;
use crate::state::outcomes::Outcomes;
use crate::state::snapshot::taker::Taker;
use crate::state::view::{Position, ViewWriter};

/// Bytes appended between two wake-ups of the keeper.
const KEEPER_STEP_BYTES: u64 = 4 << 20;

/// A shard without its inbox.
pub(super) struct Core<A: Aggregate> {
    pub(super) id: ShardId,
    pub(super) clock: Clock,
    pub(super) keys: KeyTable<A>,
    pub(super) views: Vec<Box<dyn ViewWriter<A>>>,
    pub(super) taker: Taker,
    pub(super) writer: Writer,
    pub(super) log: Arc<ShardLog>,
    pub(super) handlers: Handlers<A::Event>,
    pub(super) syncer: SyncerLink,
    pub(super) keeper: Arc<KeeperRequests>,
    /// The log's end when the keeper was last woken.
    pub(super) keeper_woken_at: u64,
    pub(super) recorder: Recorder,
    pub(super) counters: Arc<Counters>,
    pub(super) schemas: Schemas,
    /// Runs of the current batch; reused.
    pub(super) runs: Vec<Run>,
    /// `true` if the last turn left events in their lanes because no segment was ready.
    pub(super) is_stalled: bool,
}

impl<A: Aggregate> Core<A> {
    /// Begins a batch, and appends a mark, which says how far the log is synced, if one is due.
    #[inline(always)]
    pub(super) fn begin_batch(&mut self) -> Batch<'_, A> {
        let mut batch = Batch {
            writer: &mut self.writer,
            keys: &mut self.keys,
            views: &mut self.views,
            taker: &mut self.taker,
            runs: &mut self.runs,
            placed: self.handlers.placed(),
            schemas: &self.schemas,
            shard: self.id,
            now: self.clock.now(),
            wall_offset: self.clock.wall_offset(),
            bytes: 0,
        };
        batch.mark();
        batch
    }

    /// Publishes a batch that began at `now`: first views and watermarks, then waiters (through `reached`), then
    /// handlers, then metrics.
    #[inline]
    pub(super) fn publish(
        &mut self,
        now: Nanos,
        appended: usize,
        bytes: u64,
        queue_depth: usize,
        reached: impl FnOnce(),
    ) -> Result<(), FailureCause> {
        if bytes == 0 {
            reached();
            // Nothing was appended, so the lane's durable count must rise without a sync. The syncer does that, and may
            // be asleep.
            self.syncer.wake_if_caught_up(|| self.log.durable.get(), self.log.appended.get());
            return Ok(());
        }
        // Before the watermarks: a reader that sees an event as appended finds it counted.
        self.counters.appended.add(appended as u64);
        self.counters.appended_bytes.add(bytes);
        let before = self.log.appended.get();
        if !self.views.is_empty() {
            // Before the watermarks: a reader that sees an event as appended finds it in the views.
            let (sequence, time) = (Sequence(self.writer.sequence()), wall_time(now, self.clock.wall_offset()));
            self.views.iter_mut().for_each(|view| view.publish(Position { sequence, time }));
        }
        let end = self.writer.publish();
        reached();
        self.log.grown.reached(end);
        self.syncer.wake_if_caught_up(|| self.log.durable.get(), before);
        self.wake_keeper(end);
        let visible = self.clock.now();
        let handled = if self.handlers.is_empty() {
            visible
        } else {
            self.handlers.run(&self.writer, queue_depth)?;
            self.clock.now()
        };
        self.counters.handled.add(appended as u64);
        if appended > 0 {
            self.record(appended as u64, now, visible, handled);
        }
        Ok(())
    }

    /// Wakes the keeper when a segment has begun or `KEEPER_STEP_BYTES` were appended.
    #[inline]
    fn wake_keeper(&mut self, end: u64) {
        let rolled = self.writer.take_rolled();
        if rolled || end.saturating_sub(self.keeper_woken_at) >= KEEPER_STEP_BYTES {
            self.counters.segments_begun.add(u64::from(rolled));
            self.keeper_woken_at = end;
            self.keeper.signal.notify();
        }
    }

    /// Records the metrics of a batch, and hands its runs over to the syncer.
    #[inline]
    fn record(&mut self, appended: u64, now: Nanos, visible: Nanos, handled: Nanos) {
        self.counters.keys.set(self.keys.len() as u64);
        self.recorder.record(Stage::Batch, appended, 1);
        for run in &self.runs {
            let (late, events) = (run.late, u64::from(run.events));
            let [ring, visible, handled] = [now, visible, handled].map(|at| at.saturating_sub(run.published));
            self.recorder.latency(Stage::Ring, Stage::RingDue, ring, late, events);
            self.recorder.latency(Stage::Appended, Stage::AppendedDue, visible, late, events);
            self.recorder.latency(Stage::Handled, Stage::HandledDue, handled, late, events);
        }
        self.syncer.send(&self.runs);
        self.runs.clear();
    }

    /// Records whether a batch left events in its lane because no segment is ready.
    pub(super) fn note_stall(&mut self, is_stalled: bool) {
        if is_stalled {
            if !self.is_stalled {
                self.counters.segment_waits.add(1);
            }
            self.is_stalled = true;
            self.keeper.signal.notify();
        }
    }

    /// Sends snapshots and advances a checkpoint, if they are due. Returns `true` if a checkpoint made progress.
    #[inline]
    pub(super) fn save(&mut self, outcomes: &Outcomes<A::Rejection>, is_busy: bool) -> bool {
        let now = self.clock.now();
        let time = wall_time(now, self.clock.wall_offset());
        let at = (Offset(self.log.appended.get()), Sequence(self.writer.sequence()), time);
        self.taker.step(&self.keys, outcomes, at, now, is_busy)
    }

    /// Answers questions about the states. Returns their number.
    pub(super) fn answer(&self, questions: Vec<Question<A>>) -> usize {
        let count = questions.len();
        for question in questions {
            // The asker learns of a panic in its question; the shard only logs it.
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| question(&self.keys))) {
                tracing::warn!(shard = self.id.0, panic = panic_text(&*panic), "a question about the states panicked");
            }
        }
        count
    }
}
