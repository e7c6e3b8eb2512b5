//! Makes what is appended durable. One thread per shard; the only mover of `durable`.
//!
//! A failed sync is final: what the device holds is unknown, so the shard is failed, nothing later
//! is acknowledged, and there is no second try.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::clock::Clock;
use crate::config::Durability;
use crate::error::FailureCause;
use crate::event::Offset;
use crate::lane::counts::LaneShared;
use crate::lane::registry::LaneRegistry;
use crate::lane::requests::{SyncRequests, UnsyncedRun};
use crate::log::segment::ShardLog;
use crate::metrics::{Counters, Recorder, Stage};
use crate::storage::Storage;
use crate::sync::Wait;
use crate::sync::{Idle, Signal, lock};

/// Bytes of the word that ends a segment's records.
const END_WORD_BYTES: usize = 4;

/// One shard's syncer.
#[derive(Debug)]
pub(crate) struct Syncer {
    pub(crate) log: Arc<ShardLog>,
    pub(crate) storage: Arc<dyn Storage>,
    pub(crate) requests: Arc<SyncRequests>,
    pub(crate) lanes: Arc<LaneRegistry>,
    /// Wakes the shard, which closes its lanes when a sync failed, and marks the log when one has caught up.
    pub(crate) shard_signal: Arc<Signal>,
    pub(crate) durability: Durability,
    pub(crate) marks: rtrb::Consumer<UnsyncedRun>,
    pub(crate) recorder: Recorder,
    pub(crate) counters: Arc<Counters>,
    pub(crate) clock: Clock,
}

/// In `GroupCommit`, syncs begin at least this far apart. More of them wait no less: each wakes the device, flushes
/// other cores' address translations and takes a core from producers and shards.
const SYNC_EVERY: Duration = Duration::from_micros(900);

/// Due now, or when.
fn due_at(at: Instant) -> (bool, Option<Instant>) {
    (Instant::now() >= at, Some(at))
}

impl Syncer {
    /// Runs until the shard has ended and everything is synced, or a sync failed.
    pub(crate) fn run(mut self) {
        let mut idle = Idle::new(Wait::Park);
        let mut synced_at = Instant::now();
        loop {
            let ending = self.requests.is_ending();
            if self.log.failure().is_some() {
                break;
            }
            let (due, wake_at) = self.due(ending, synced_at);
            if due {
                synced_at = Instant::now();
                if !self.sync() {
                    break;
                }
                idle.reset();
            } else {
                self.settle();
                if ending {
                    break;
                }
                self.recorder.exchange();
                idle.step(&self.requests.signal, wake_at, || self.has_work(wake_at));
            }
        }
        self.shard_signal.notify();
        self.lanes.wake_all();
    }

    /// Looked at before sleeping, so it must see whatever was made visible before a wake-up.
    fn has_work(&self, wake_at: Option<Instant>) -> bool {
        let durable = self.log.durable.get();
        let appended = self.log.appended.get();
        let due = match self.durability {
            // A wake-up for the interval comes by its deadline.
            Durability::GroupCommit | Durability::Periodic(_) => wake_at.is_none() && appended > durable,
            Durability::OsCache => false,
        };
        due || (appended > durable && self.requests.flush_target() > durable)
            || self.requests.is_ending()
            || self.log.failure().is_some()
            || self.recorder.exchange_handle().is_wanted()
            || (appended <= durable && self.lanes.is_behind())
    }

    /// Tells lanes of what was synced before the shard had counted it for them: between publishing the
    /// log's watermark and a lane's count, a sync may come in that covers an event no lane yet counts.
    fn settle(&mut self) {
        if self.log.appended.get() > self.log.durable.get() || !self.lanes.is_behind() {
            return;
        }
        // The lanes' counts first, as in `sync`.
        let lanes = self.lanes.appended_counts();
        let durable = self.log.durable.get();
        if self.log.appended.get() <= durable {
            self.reached(lanes, durable);
        }
    }

    /// Everything below `durable` is synced, and with it the counted events of `lanes`.
    fn reached(&mut self, lanes: Vec<(Arc<LaneShared>, u64)>, durable: u64) {
        for (lane, count) in lanes {
            lane.durable_reached(count);
        }
        // After the lanes: who has seen the log durable finds the receipts of what it covers durable too.
        self.log.durable.publish(durable);
        self.log.synced.reached(durable);
        self.lanes.flushed(durable);
        // A shard at rest notes it in the log.
        self.shard_signal.notify();
        let now = self.clock.now();
        while let Ok(mark) = self.marks.peek() {
            if mark.end > durable {
                break;
            }
            let ns = now.saturating_sub(mark.published);
            self.recorder.latency(Stage::Durable, Stage::DurableDue, ns, mark.late, mark.events);
            if self.marks.pop().is_err() {
                break;
            }
        }
    }

    /// Whether to sync now and, if not now but later, when.
    fn due(&self, ending: bool, synced_at: Instant) -> (bool, Option<Instant>) {
        let durable = self.log.durable.get();
        let work = self.log.appended.get() > durable;
        if !work {
            return (false, None);
        }
        if ending || self.requests.flush_target() > durable {
            return (true, None);
        }
        match self.durability {
            Durability::OsCache => (false, None),
            Durability::GroupCommit => due_at(synced_at + SYNC_EVERY),
            Durability::Periodic(every) => due_at(synced_at + every),
        }
    }

    /// One sync of everything appended. `false` when it failed.
    fn sync(&mut self) -> bool {
        // The lanes' counts first: whatever they count lies below the watermark read afterwards.
        let lanes = self.lanes.appended_counts();
        let target = self.log.appended.get();
        let from = self.log.durable.get();
        let started = self.clock.now();
        // In the other modes a checkpoint is synced before it counts. Held until the log is durable: a checkpoint that is published
        // afterwards is synced as well.
        let log = Arc::clone(&self.log);
        let mut unsynced = (self.durability == Durability::OsCache).then(|| lock(&log.unsynced));
        // What was freed before anything was acknowledged rests on it: it becomes durable first, with all of the log that it knows.
        let rests_on = unsynced.as_mut().and_then(|unsynced| unsynced.take());
        let log_end = rests_on.as_ref().map_or(0, |(_, log_end)| log_end.0);
        let target = target.max(log_end);
        if let Err(error) = self.sync_range(from, target) {
            self.log.fail(FailureCause::Sync(Arc::new(error)));
            return false;
        }
        if let Some((file, _)) = rests_on
            && let Err(source) = file.sync().and_then(|()| self.storage.sync_dir(&self.log.dir))
        {
            let source = Arc::new(source);
            self.log.fail(FailureCause::Storage { action: "syncing a checkpoint", source });
            return false;
        }
        self.recorder.record(Stage::Sync, self.clock.now().saturating_sub(started), 1);
        self.counters.syncs.add(1);
        self.counters.synced_bytes.add(target - from);
        self.reached(lanes, target);
        true
    }

    /// Syncs `[from, to)` segment by segment, front to back, so that a later byte is never durable before an earlier one is acknowledged.
    fn sync_range(&self, from: u64, to: u64) -> std::io::Result<()> {
        let (first, last) = (self.log.segment_of(Offset(from)), self.log.segment_of(Offset(to)));
        for index in first..=last {
            let Some(segment) = self.log.segment(index) else {
                // Never begun (the range ends where it would begin), or freed by retention before it was durable: in OsCache mode,
                // as long as nothing was acknowledged.
                continue;
            };
            let base = index * self.log.segment_bytes;
            // A segment's first sync takes its header along.
            let first_record = self.log.first_offset(index).0;
            let start = if from <= first_record { 0 } else { (from - base) as usize };
            let committed = segment.memory.committed();
            // A segment that is left takes the zero word behind its last record along: in a recycled segment
            // old bytes would stand there after a power cut, and the log would seem damaged before the next one.
            let end = if index < last {
                (committed + END_WORD_BYTES).min(segment.memory.len())
            } else {
                ((to - base) as usize).min(committed)
            };
            self.storage.sync(&segment.memory, start..end.max(start))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::ShardId;
    use crate::testing::FaultyStorage;
    use std::collections::VecDeque;

    /// A syncer of an empty shard, and a lane that it tells.
    fn syncer(durability: Durability) -> (Syncer, Arc<LaneShared>) {
        let log = Arc::new(ShardLog::new(1, ShardId(0), "/s".into(), 1 << 16, Offset(4096), 0, VecDeque::new()));
        let lanes = Arc::new(LaneRegistry::default());
        let lane = Arc::new(LaneShared::new(Arc::clone(&log), durability));
        lanes.register(&lane);
        let syncer = Syncer {
            log,
            storage: Arc::new(FaultyStorage::new()),
            requests: Arc::new(SyncRequests::new()),
            lanes,
            shard_signal: Arc::new(Signal::new()),
            durability,
            marks: rtrb::RingBuffer::new(2).1,
            recorder: Recorder::new(&[], false).0,
            counters: Arc::default(),
            clock: Clock::new(),
        };
        (syncer, lane)
    }

    #[test]
    fn group_commit_syncs_apart_but_at_once_after_a_pause_or_when_asked() {
        let (syncer, _lane) = syncer(Durability::GroupCommit);
        let later = Instant::now() + Duration::from_secs(60);
        assert_eq!(syncer.due(false, later), (false, None), "nothing to sync");
        syncer.log.appended.publish(5000);
        assert_eq!(syncer.due(false, later), (false, Some(later + SYNC_EVERY)), "too soon after the last");
        assert!(syncer.due(false, Instant::now() - SYNC_EVERY).0, "a lone event after a pause");
        assert!(syncer.due(true, later).0, "the shard has ended");
        syncer.requests.flush(5000);
        assert!(syncer.due(false, later).0, "a flush");
    }

    #[test]
    fn an_event_synced_before_its_lane_counted_it_is_settled() {
        for durability in [Durability::GroupCommit, Durability::Periodic(Duration::from_secs(1))] {
            let (mut syncer, lane) = syncer(durability);
            let log = Arc::clone(&syncer.log);
            // The shard publishes the log's watermark, the syncer runs, and only then the shard counts for the lane.
            log.appended.publish(5000);
            assert!(syncer.sync());
            lane.appended_reached(1);
            assert_eq!((log.durable.get(), lane.durable_count()), (5000, 0));
            assert!(syncer.has_work(None), "the syncer must not sleep over it");
            syncer.settle();
            assert_eq!(lane.durable_count(), 1);
            assert!(!syncer.has_work(None), "and then it may");
            syncer.requests.flush(5001);
            assert!(!syncer.has_work(None), "also where more is asked for than there is");
            // What is appended and not synced is nothing to settle.
            log.appended.publish(6000);
            lane.appended_reached(2);
            syncer.settle();
            assert_eq!(lane.durable_count(), 1);
        }
    }
}
