//! Makes a shard's log durable. One per shard; the only mover of `durable`.
//!
//! A failed sync is final: the contents of the device are unknown, so the shard fails, nothing later is acknowledged,
//! and the sync is not repeated.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::step::Step;
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
use crate::sync::{Signal, lock};

/// Bytes of the word that ends a segment's records.
const END_WORD_BYTES: usize = 4;

/// One shard's syncer.
#[derive(Debug)]
pub(crate) struct Syncer {
    pub(crate) log: Arc<ShardLog>,
    pub(crate) storage: Arc<dyn Storage>,
    pub(crate) requests: Arc<SyncRequests>,
    pub(crate) lanes: Arc<LaneRegistry>,
    /// Wakes the shard, which closes its lanes after a failed sync, and writes a mark when a sync has caught up.
    pub(crate) shard_signal: Arc<Signal>,
    pub(crate) durability: Durability,
    pub(crate) marks: rtrb::Consumer<UnsyncedRun>,
    pub(crate) recorder: Recorder,
    pub(crate) counters: Arc<Counters>,
    /// Measures syncs and latencies. No decision depends on it.
    pub(crate) clock: Clock,
    /// The time of the last sync, or of the first step.
    pub(crate) synced_at: Option<Instant>,
}

/// Shortest interval between the beginnings of two syncs in `GroupCommit`. More frequent syncs would shorten no wait:
/// each sync wakes the device, flushes other cores' address translations and takes a core from producers and shards.
const SYNC_EVERY: Duration = Duration::from_micros(900);

/// The time of the next sync.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Due {
    Now,
    At(Instant),
    /// Not before a request or another append.
    Later,
}

impl Syncer {
    /// Syncs once if a sync is due. Ends when the shard has ended and everything is synced, or a sync failed.
    pub(crate) fn step(&mut self, now: Instant) -> Step {
        let is_ending = self.requests.is_ending();
        if self.log.failure().is_some() {
            return self.end();
        }
        let synced_at = *self.synced_at.get_or_insert(now);
        let due = self.due(is_ending, synced_at, now);
        if due == Due::Now {
            self.synced_at = Some(now);
            return if self.sync() { Step::Worked } else { self.end() };
        }
        self.settle();
        if is_ending {
            return self.end();
        }
        self.recorder.exchange();
        match due {
            Due::At(at) => Step::Idle(Some(at)),
            Due::Now | Due::Later => Step::Idle(None),
        }
    }

    /// Wakes all threads that wait for a sync: there will be no more syncs.
    fn end(&self) -> Step {
        self.shard_signal.notify();
        self.lanes.wake_all();
        Step::Ended
    }

    /// Returns `true` if a step before `wake_at` may find work. Called before the thread sleeps, so it must see
    /// everything that was made visible before a wake-up.
    pub(crate) fn has_work(&self, wake_at: Option<Instant>) -> bool {
        let durable = self.log.durable.get();
        let appended = self.log.appended.get();
        let due = match self.durability {
            // With a `wake_at`, the thread wakes by itself when the interval ends.
            Durability::GroupCommit | Durability::Periodic(_) => wake_at.is_none() && appended > durable,
            Durability::OsCache => false,
        };
        due || (appended > durable && self.requests.flush_target() > durable)
            || self.requests.is_ending()
            || self.log.failure().is_some()
            || self.recorder.exchange_handle().is_wanted()
            || (appended <= durable && self.lanes.is_behind())
    }

    /// Returns the time of the next sync.
    fn due(&self, is_ending: bool, synced_at: Instant, now: Instant) -> Due {
        let durable = self.log.durable.get();
        if self.log.appended.get() <= durable {
            return Due::Later;
        }
        if is_ending || self.requests.flush_target() > durable {
            return Due::Now;
        }
        let at = match self.durability {
            Durability::OsCache => return Due::Later,
            Durability::GroupCommit => synced_at + SYNC_EVERY,
            Durability::Periodic(every) => synced_at + every,
        };
        if now >= at { Due::Now } else { Due::At(at) }
    }

    /// Raises the durable counts of lanes that counted events only after these were synced: the shard publishes the
    /// log's watermark before a lane's count, so a sync in between covers events that no lane has counted yet.
    fn settle(&mut self) {
        if self.log.appended.get() > self.log.durable.get() || !self.lanes.is_behind() {
            return;
        }
        // The lanes' counts first, as in `sync`.
        let lanes = self.lanes.appended_counts();
        let durable = self.log.durable.get();
        if self.log.appended.get() <= durable {
            self.publish(lanes, durable);
        }
    }

    /// Publishes that everything below `durable` is synced, and with it the counted events of `lanes`.
    fn publish(&mut self, lanes: Vec<(Arc<LaneShared>, u64)>, durable: u64) {
        for (lane, count) in lanes {
            lane.durable_reached(count);
        }
        // After the lanes: a thread that has seen the log durable finds the receipts of its events durable too.
        self.log.durable.publish(durable);
        self.log.synced.reached(durable);
        self.lanes.flushed(durable);
        // An idle shard then writes a mark.
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

    /// Syncs everything appended. Returns `false` if that failed.
    fn sync(&mut self) -> bool {
        // The lanes' counts first: all events that they count are below the watermark that is read afterwards.
        let lanes = self.lanes.appended_counts();
        let target = self.log.appended.get();
        let from = self.log.durable.get();
        let started = self.clock.now();
        // In `OsCache` mode, the lock is held until the log is durable, so that a checkpoint published afterwards is
        // synced as well. (In the other modes, a checkpoint is synced before it counts.)
        let log = Arc::clone(&self.log);
        let mut unsynced = (self.durability == Durability::OsCache).then(|| lock(&log.unsynced));
        // The checkpoint stands for events that retention freed before anything was acknowledged. It becomes durable
        // before anything is acknowledged, together with the log up to the checkpoint's end.
        let checkpoint = unsynced.as_mut().and_then(|unsynced| unsynced.take());
        let log_end = checkpoint.as_ref().map_or(0, |(_, log_end)| log_end.0);
        let target = target.max(log_end);
        if let Err(error) = self.sync_range(from, target) {
            self.log.fail(FailureCause::Sync(Arc::new(error)));
            return false;
        }
        if let Some((file, _)) = checkpoint
            && let Err(source) = file.sync().and_then(|()| self.storage.sync_dir(&self.log.dir))
        {
            self.log.fail(FailureCause::Storage { action: "syncing a checkpoint", error: Arc::new(source) });
            return false;
        }
        self.recorder.record(Stage::Sync, self.clock.now().saturating_sub(started), 1);
        self.counters.syncs.add(1);
        self.counters.synced_bytes.add(target - from);
        self.publish(lanes, target);
        true
    }

    /// Syncs `[from, to)` segment by segment, front to back: no byte becomes durable before the bytes in front of it.
    fn sync_range(&self, from: u64, to: u64) -> std::io::Result<()> {
        let (first, last) = (self.log.segment_of(Offset(from)), self.log.segment_of(Offset(to)));
        for index in first..=last {
            let Some(segment) = self.log.segment(index) else {
                // The segment has not begun (the range ends at its beginning), or retention freed it before it was
                // durable (in `OsCache` mode, while nothing was acknowledged).
                continue;
            };
            let base = index * self.log.segment_bytes;
            // The first sync of a segment includes its header.
            let first_record = self.log.first_offset(index).0;
            let start = if from <= first_record { 0 } else { (from - base) as usize };
            let committed = segment.memory.committed();
            // The last sync of a segment includes the zero word after its last record: otherwise, after a power cut, a
            // recycled segment could have old bytes there, and the log would seem damaged before the next segment.
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

    /// The syncer of an empty shard, and one of its lanes.
    fn syncer(durability: Durability) -> (Syncer, Arc<LaneShared>) {
        let log = Arc::new(ShardLog::new(
            (1, ShardId(0)),
            "/s".into(),
            1 << 16,
            Offset(4096),
            0,
            VecDeque::new(),
            &Arc::default(),
        ));
        let lanes = Arc::new(LaneRegistry::new(&log.notifier));
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
            synced_at: None,
        };
        (syncer, lane)
    }

    #[test]
    fn group_commit_syncs_in_intervals_and_at_once_after_a_pause_or_on_request() {
        let (syncer, _lane) = syncer(Durability::GroupCommit);
        let synced_at = Instant::now();
        let due = |is_ending, since: Duration| syncer.due(is_ending, synced_at, synced_at + since);
        assert_eq!(due(false, SYNC_EVERY), Due::Later, "nothing to sync");
        syncer.log.appended.publish(5000);
        assert_eq!(due(false, Duration::ZERO), Due::At(synced_at + SYNC_EVERY), "too soon after the last");
        assert_eq!(due(false, SYNC_EVERY), Due::Now, "a lone event after a pause");
        assert_eq!(due(true, Duration::ZERO), Due::Now, "the shard has ended");
        syncer.requests.flush(5000);
        assert_eq!(due(false, Duration::ZERO), Due::Now, "a flush");
    }

    #[test]
    fn a_step_syncs_at_most_once_and_returns_the_time_of_the_next_sync() {
        let (mut syncer, _lane) = syncer(Durability::GroupCommit);
        let now = Instant::now();
        assert_eq!(syncer.step(now), Step::Idle(None));
        syncer.log.appended.publish(5000);
        assert!(syncer.has_work(None));
        assert_eq!(syncer.step(now), Step::Idle(Some(now + SYNC_EVERY)));
        assert!(!syncer.has_work(Some(now + SYNC_EVERY)), "the thread may sleep until then");
        assert_eq!(syncer.step(now + SYNC_EVERY), Step::Worked);
        assert_eq!(syncer.log.durable.get(), 5000);
        syncer.log.appended.publish(6000);
        let meanwhile = now + SYNC_EVERY + SYNC_EVERY / 2;
        assert_eq!(syncer.step(meanwhile), Step::Idle(Some(now + 2 * SYNC_EVERY)), "counted from the last sync");
        syncer.requests.end();
        assert_eq!(syncer.step(meanwhile), Step::Worked, "the last sync waits for no interval");
        assert_eq!((syncer.step(meanwhile), syncer.log.durable.get()), (Step::Ended, 6000));
    }

    #[test]
    fn an_event_synced_before_its_lane_counted_it_becomes_durable() {
        for durability in [Durability::GroupCommit, Durability::Periodic(Duration::from_secs(1))] {
            let (mut syncer, lane) = syncer(durability);
            let log = Arc::clone(&syncer.log);
            // The shard publishes the log's watermark, the syncer runs, and only then the shard counts the lane's
            // events.
            log.appended.publish(5000);
            assert!(syncer.sync());
            lane.appended_reached(1);
            assert_eq!((log.durable.get(), lane.durable_count()), (5000, 0));
            assert!(syncer.has_work(None), "the syncer must not sleep yet");
            syncer.settle();
            assert_eq!(lane.durable_count(), 1);
            assert!(!syncer.has_work(None), "now it may");
            syncer.requests.flush(5001);
            assert!(!syncer.has_work(None), "even if a flush asks for more than is appended");
            // An event that is appended and not synced stays as it is.
            log.appended.publish(6000);
            lane.appended_reached(2);
            syncer.settle();
            assert_eq!(lane.durable_count(), 1);
        }
    }
}
