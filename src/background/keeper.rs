//! The work of the keeper's thread: retention, then preparing, shard by shard, so that no shard waits for the file
//! system.

use std::path::PathBuf;
use std::sync::Arc;

use super::preparer::Preparer;
use super::retention::Reclaimer;
use super::segment_files::{FailedAction, SegmentFiles};
use super::step::{Now, Step};
use crate::config::{Durability, Retention};
use crate::error::FailureCause;
use crate::lane::requests::CheckpointRequests;
use crate::lane::requests::KeeperRequests;
use crate::log::manifest::Span;
use crate::log::segment::{ShardLog, Waits};
use crate::log::writer::PreparedQueue;
use crate::metrics::Counters;
use crate::storage::{Storage, is_exhausted};
use crate::sync::Signal;

/// The parts of a shard that the keeper needs.
#[derive(Debug)]
pub(crate) struct KeptShard {
    pub(crate) log: Arc<ShardLog>,
    pub(crate) prepared: Arc<PreparedQueue>,
    pub(crate) counters: Arc<Counters>,
    /// Wakes the shard when a segment is ready.
    pub(crate) shard_signal: Arc<Signal>,
    /// Nothing above the offset that the shard's checkpoints cover is freed.
    pub(crate) checkpoints: Arc<CheckpointRequests>,
    pub(crate) span: Span,
    /// Index of the next segment to prepare.
    pub(crate) next_index: u64,
    /// Files that recovery found outside the log. They will be written again.
    pub(crate) spares: Vec<PathBuf>,
    pub(crate) unused: Vec<PathBuf>,
}

/// The rules by which segments are prepared and freed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct KeeperRules {
    pub(crate) durability: Durability,
    pub(crate) retention: Retention,
    pub(crate) spares_max: usize,
}

/// The keeper of an engine.
#[derive(Debug)]
pub(crate) struct Keeper {
    pub(crate) requests: Arc<KeeperRequests>,
    shards: Vec<Kept>,
}

/// One shard's workers and the files that they share.
#[derive(Debug)]
struct Kept {
    files: SegmentFiles,
    reclaimer: Reclaimer,
    preparer: Preparer,
    shard_signal: Arc<Signal>,
}

impl Keeper {
    pub(crate) fn new(
        rules: KeeperRules,
        storage: &Arc<dyn Storage>,
        requests: Arc<KeeperRequests>,
        shards: Vec<KeptShard>,
    ) -> Self {
        let shards = shards.into_iter().map(|shard| Kept::new(rules, Arc::clone(storage), shard)).collect();
        Self { requests, shards }
    }

    /// Does a bounded piece of work for every shard that has not failed. Ends when the engine ends.
    pub(crate) fn step(&mut self, now: Now) -> Step {
        if self.requests.is_ending() {
            return Step::Ended;
        }
        let running = self.shards.iter_mut().filter(|shard| shard.files.log.failure().is_none());
        running.map(|shard| shard.step(now)).fold(Step::Idle(None), Step::and)
    }

    /// Returns `true` if the next step may find work. Called before the thread sleeps.
    pub(crate) fn has_work(&self) -> bool {
        self.requests.is_ending() || self.shards.iter().any(Kept::has_work)
    }
}

impl Kept {
    fn new(rules: KeeperRules, storage: Arc<dyn Storage>, shard: KeptShard) -> Self {
        let KeptShard { log, prepared, counters, shard_signal, checkpoints, span, next_index, spares, unused } = shard;
        let small_pages = rules.durability == Durability::GroupCommit;
        let must_be_durable = rules.durability != Durability::OsCache;
        let signal = Arc::clone(&shard_signal);
        Self {
            files: SegmentFiles::new(storage, log, span, (spares, unused), rules.spares_max),
            reclaimer: Reclaimer::new(rules.retention, must_be_durable, checkpoints, counters, Arc::clone(&signal)),
            preparer: Preparer::new(prepared, signal, next_index, small_pages),
            shard_signal,
        }
    }

    /// Runs a step of both workers. If the storage is exhausted, preparing pauses; any other storage error fails the
    /// shard.
    fn step(&mut self, now: Now) -> Step {
        let log = Arc::clone(&self.files.log);
        match self.try_step(now) {
            Ok(step) => {
                self.preparer.note_storage(&self.files);
                step
            }
            Err((action, error)) if is_exhausted(&error) => {
                log.wait_for_storage(Waits::Segment, Some((action, &error)));
                let retry_at = self.preparer.pause(now.monotonic);
                Step::Idle(Some(retry_at)).and(self.reclaimer.idle(now.monotonic))
            }
            Err((action, source)) => {
                log.fail(FailureCause::Storage { action, error: Arc::new(source) });
                self.shard_signal.notify();
                Step::Idle(None)
            }
        }
    }

    fn try_step(&mut self, now: Now) -> Result<Step, FailedAction> {
        // Freeing first: the file of a freed segment can be written again at once.
        let freed = self.reclaimer.step(&mut self.files, now)?;
        let may_reuse = self.reclaimer.is_about_to_free(&self.files);
        let prepared = self.preparer.step(&mut self.files, may_reuse, now.monotonic)?;
        Ok(freed.and(prepared))
    }

    fn has_work(&self) -> bool {
        let Self { files, reclaimer, preparer, .. } = self;
        let must_prepare = preparer.must_prepare() && !reclaimer.is_about_to_free(files);
        files.log.failure().is_none() && (must_prepare || reclaimer.has_work(&files.log))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::wall_now;
    use crate::event::{Offset, ShardId};
    use crate::testing::FaultyStorage;
    use std::time::{Duration, Instant};

    const SEGMENT_BYTES: u64 = 1 << 16;

    /// The keeper of one empty shard.
    fn keeper(storage: &FaultyStorage) -> (Keeper, Arc<ShardLog>, Arc<PreparedQueue>) {
        let dir = PathBuf::from("/s");
        storage.create_dir(&dir).expect("a folder");
        let log =
            Arc::new(ShardLog::new((1, ShardId(0)), dir, SEGMENT_BYTES, Offset(4096), 0, [].into(), &Arc::default()));
        let prepared = Arc::new(PreparedQueue::new(1));
        let shard = KeptShard {
            log: Arc::clone(&log),
            prepared: Arc::clone(&prepared),
            counters: Arc::default(),
            shard_signal: Arc::new(Signal::new()),
            checkpoints: Arc::new(CheckpointRequests::new(Offset(0), &Arc::default())),
            span: Span { first: 0, last: 0 },
            next_index: 0,
            spares: Vec::new(),
            unused: Vec::new(),
        };
        let rules = KeeperRules { durability: Durability::OsCache, retention: Retention::default(), spares_max: 1 };
        let requests = Arc::new(KeeperRequests::new());
        let storage: Arc<dyn Storage> = Arc::new(storage.clone());
        (Keeper::new(rules, &storage, requests, vec![shard]), log, prepared)
    }

    fn at(monotonic: Instant) -> Now {
        Now { monotonic, wall: wall_now() }
    }

    #[test]
    fn a_segment_is_prepared_once_and_then_the_keeper_rests_until_it_is_woken() {
        let (mut keeper, _log, prepared) = keeper(&FaultyStorage::new());
        let now = Instant::now();
        assert!(keeper.has_work());
        assert_eq!(keeper.step(at(now)), Step::Worked);
        assert!(prepared.is_full() && !keeper.has_work());
        assert_eq!(keeper.step(at(now)), Step::Idle(None));
        keeper.requests.end();
        assert!(keeper.has_work());
        assert_eq!(keeper.step(at(now)), Step::Ended);
    }

    #[test]
    fn an_exhausted_storage_is_tried_again_after_a_tenth_of_a_second() {
        let storage = FaultyStorage::new();
        let (mut keeper, log, prepared) = keeper(&storage);
        storage.set_space(Some(0));
        let now = Instant::now();
        let retry_at = now + Duration::from_millis(100);
        assert_eq!(keeper.step(at(now)), Step::Idle(Some(retry_at)));
        assert!(log.is_storage_full() && !keeper.has_work());
        storage.set_space(None);
        assert_eq!(keeper.step(at(retry_at - Duration::from_millis(1))), Step::Idle(Some(retry_at)), "too early");
        assert!(prepared.is_empty());
        assert_eq!(keeper.step(at(retry_at)), Step::Worked);
        assert!(prepared.is_full() && !log.is_storage_full());
    }
}
