//! Retention: frees the oldest segments of one shard, and recycles their files when no reader holds them.
//!
//! A segment is freed when the log is over its limits, the segment is durable, no consumer or gate needs it, and a
//! checkpoint has the states that its events led to. Retention asks the shard for that checkpoint.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::age::Ages;
use super::segment_files::{FailedAction, SegmentFiles};
use super::step::{Now, Step};
use crate::config::Retention;
use crate::event::Time;
use crate::lane::requests::CheckpointRequests;
use crate::log::format::{HEADER_BYTES, SegmentHeader};
use crate::log::segment::{Segment, ShardLog};
use crate::metrics::Counters;
use crate::storage::memory::Memory;
use crate::sync::Signal;

/// Interval between checks of freed segments that readers still hold.
const READERS_CHECK: Duration = Duration::from_millis(100);
/// Interval between checks of `durable` while retention waits for it. (If the syncer woke the keeper instead, it would
/// do so a thousand times a second.)
const SYNC_CHECK: Duration = Duration::from_millis(100);
/// Pause between a failed checkpoint and the next request for one.
const RETRY_CHECKPOINT: Duration = Duration::from_millis(500);
/// Interval between checks of the segments' age.
const AGE_CHECK: Duration = Duration::from_secs(1);

/// The reason why the oldest segment cannot be freed yet, with the end of the segment.
#[derive(Debug, Clone, Copy)]
enum Blocker {
    /// The segment is not durable.
    Sync(u64),
    /// A consumer or a gate needs the segment.
    Hold(u64),
    /// No checkpoint covers the segment.
    Checkpoint(u64),
}

/// Frees and recycles the segments of one shard.
#[derive(Debug)]
pub(super) struct Reclaimer {
    limits: Retention,
    /// `false` in `OsCache`: segments are freed whether they are durable or not.
    must_be_durable: bool,
    checkpoints: Arc<CheckpointRequests>,
    counters: Arc<Counters>,
    /// Wakes the shard when a checkpoint is requested.
    shard_signal: Arc<Signal>,
    /// Freed segments that readers may still hold.
    retiring: Vec<(PathBuf, Arc<Memory>)>,
    /// Number of failed checkpoints at the last step.
    checkpoints_failed: u64,
    /// No checkpoint is requested before this time.
    ask_at: Option<Instant>,
    blocker: Option<Blocker>,
    ages: Ages,
}

impl Reclaimer {
    pub(super) fn new(
        limits: Retention,
        must_be_durable: bool,
        checkpoints: Arc<CheckpointRequests>,
        counters: Arc<Counters>,
        shard_signal: Arc<Signal>,
    ) -> Self {
        Self {
            limits,
            must_be_durable,
            checkpoints,
            counters,
            shard_signal,
            retiring: Vec::new(),
            checkpoints_failed: 0,
            ask_at: None,
            blocker: None,
            ages: Ages::default(),
        }
    }

    /// Frees at most one segment and recycles every freed one that no reader holds.
    pub(super) fn step(&mut self, files: &mut SegmentFiles, now: Now) -> Result<Step, FailedAction> {
        let worked = self.reclaim(files, now).map_err(|error| ("freeing a segment", error))?;
        Ok(if worked { Step::Worked } else { self.idle(now.monotonic) })
    }

    /// The result of a step that found nothing to do.
    pub(super) fn idle(&self, now: Instant) -> Step {
        let readers = (!self.retiring.is_empty()).then(|| now + READERS_CHECK);
        let age = self.limits.age_max.map(|_| now + AGE_CHECK);
        let sync = matches!(self.blocker, Some(Blocker::Sync(_))).then(|| now + SYNC_CHECK);
        Step::Idle([readers, self.ask_at, age, sync].into_iter().flatten().min())
    }

    /// Returns `true` if the next step can act on a change since the last one. Called before the thread sleeps.
    pub(super) fn has_work(&self, log: &ShardLog) -> bool {
        let is_unblocked = match self.blocker {
            None => false,
            Some(Blocker::Sync(to)) => log.durable.get() >= to,
            Some(Blocker::Hold(to)) => !is_held(log, to),
            Some(Blocker::Checkpoint(to)) => self.checkpoints.covered() >= to,
        };
        is_unblocked || self.checkpoints.failures() != self.checkpoints_failed
    }

    /// Returns `true` if a segment is about to be freed, there is no spare, and the shard can wait for that file.
    pub(super) fn is_about_to_free(&self, files: &SegmentFiles) -> bool {
        let (log, checkpoints) = (&files.log, &self.checkpoints);
        let is_over =
            self.limits.bytes_max.is_some_and(|max| (log.segments_len() as u64 + 1) * log.segment_bytes > max);
        let is_being_saved = checkpoints.begun() > checkpoints.covered();
        let has_time = log.appended.get() % log.segment_bytes < log.segment_bytes / 4 * 3;
        files.spares.is_empty() && is_over && is_being_saved && has_time
    }

    /// Returns `true` if it freed or recycled a segment.
    fn reclaim(&mut self, files: &mut SegmentFiles, now: Now) -> io::Result<bool> {
        self.blocker = None;
        self.notice_failed_checkpoints(now.monotonic);
        let recycled = self.recycle(files)?;
        let oldest_two = files.log.oldest_two().map(|(oldest, next)| (oldest.index, next.index));
        let Some((oldest, next)) = oldest_two else { return Ok(recycled) };
        self.ask_ahead(&files.log);
        if !self.is_over(&files.log, oldest, now) {
            return Ok(recycled);
        }
        self.blocker = self.find_blocker(&files.log, files.log.first_offset(next).0);
        if let Some(Blocker::Checkpoint(to)) = self.blocker
            && self.checkpoints.begun() < to
        {
            self.ask();
        }
        if self.blocker.is_some() || !self.free_oldest(files, next, now)? {
            return Ok(recycled);
        }
        self.recycle(files)?;
        Ok(true)
    }

    /// Returns `true` if the shard's oldest segment is beyond a limit.
    fn is_over(&mut self, log: &ShardLog, oldest: u64, now: Now) -> bool {
        let over_bytes = self.limits.bytes_max.is_some_and(|max| log.segments_len() as u64 * log.segment_bytes > max);
        let over_age = self.limits.age_max.is_some_and(|max| {
            // A header that has been damaged since gives a time that is never believed.
            let begun = |index| log.segment(index).map(|segment| begun(&segment).unwrap_or_default());
            self.ages.is_over(oldest, max, now, begun)
        });
        over_bytes || over_age
    }

    /// Returns the reason why the segment that ends at `freed_to` cannot be freed yet, if there is one.
    fn find_blocker(&self, log: &ShardLog, freed_to: u64) -> Option<Blocker> {
        if self.must_be_durable && log.durable.get() < freed_to {
            Some(Blocker::Sync(freed_to))
        } else if is_held(log, freed_to) {
            Some(Blocker::Hold(freed_to))
        } else if self.checkpoints.covered() < freed_to {
            // The states that the freed events led to must not be lost with them. Once anything was acknowledged, a
            // checkpoint covers only durable events.
            Some(Blocker::Checkpoint(freed_to))
        } else {
            None
        }
    }

    /// Takes the oldest segment out of the span and the log. Returns `false` if a consumer that needs the segment has
    /// registered meanwhile.
    fn free_oldest(&mut self, files: &mut SegmentFiles, next: u64, now: Now) -> io::Result<bool> {
        let log = Arc::clone(&files.log);
        // A consumer that registers at this moment finds the segment either held or gone.
        let freed = log.holds.free(log.first_offset(next), || {
            // The span first: after a crash in between, the file is surplus, not missing.
            files.shorten_span(next)?;
            Ok::<_, io::Error>(log.pop_oldest())
        });
        let Some(freed) = freed.transpose()? else { return Ok(false) };
        if let Some(freed) = freed {
            if self.limits.age_max.is_some() {
                self.ages.freed(freed.index, now);
            }
            self.retiring.push((log.segment_path(freed.index), freed.memory));
            self.counters.segments_freed.add(1);
        }
        Ok(true)
    }

    /// Recycles the files of freed segments that no reader holds any more. Returns `true` if there were any.
    fn recycle(&mut self, files: &mut SegmentFiles) -> io::Result<bool> {
        let (mut recycled, mut failed) = (false, None);
        for (path, memory) in std::mem::take(&mut self.retiring) {
            // After a failure the remaining files wait for the next attempt.
            let memory = if failed.is_none() { Arc::try_unwrap(memory) } else { Err(memory) };
            let memory = match memory {
                Ok(memory) => memory,
                Err(held) => {
                    self.retiring.push((path, held));
                    continue;
                }
            };
            match files.retire(&path) {
                Ok(spare) => {
                    if let Some(spare) = spare {
                        files.add_spare(spare, Some(memory));
                    }
                    recycled = true;
                    failed = files.storage.sync_dir(&files.log.dir).err();
                }
                Err(error) => {
                    self.retiring.push((path, Arc::new(memory)));
                    failed = Some(error);
                }
            }
        }
        failed.map_or(Ok(recycled), Err)
    }

    /// Requests the checkpoint that the next freeing needs as soon as the current segment is half full. When the
    /// segment is full, a freed file can then be reused at once, and no new file is needed.
    fn ask_ahead(&self, log: &ShardLog) {
        let (appended, held) = (log.appended.get(), log.segments_len() as u64);
        let over = self.limits.bytes_max.and_then(|max| (held + 1).checked_sub(max / log.segment_bytes));
        let Some(over) = over else { return };
        let freed_to = log.earliest().0 + over * log.segment_bytes;
        let is_half_full = appended % log.segment_bytes >= log.segment_bytes / 2;
        if over > 0 && is_half_full && self.checkpoints.begun() < freed_to && appended >= freed_to {
            self.ask();
        }
    }

    /// Requests a checkpoint, unless one has just failed.
    fn ask(&self) {
        if self.ask_at.is_none() {
            self.checkpoints.ask();
            self.shard_signal.notify();
        }
    }

    /// After a failed checkpoint, starts the pause before the next request; ends the pause when its time is over.
    fn notice_failed_checkpoints(&mut self, now: Instant) {
        let failed = self.checkpoints.failures();
        if failed != self.checkpoints_failed {
            self.checkpoints_failed = failed;
            self.ask_at = Some(now + RETRY_CHECKPOINT);
        } else if self.ask_at.is_some_and(|at| at <= now) {
            self.ask_at = None;
        }
    }
}

/// Returns `true` if a consumer or a gate needs something below `freed_to`.
fn is_held(log: &ShardLog, freed_to: u64) -> bool {
    log.holds.lowest().is_some_and(|lowest| lowest.0 < freed_to)
}

/// The time at which a segment was begun, which is when the segment before it got its newest record.
fn begun(segment: &Segment) -> Option<Time> {
    let page = segment.memory.read(0, HEADER_BYTES)?;
    SegmentHeader::decode(page).ok().map(|header| header.created)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{Offset, ShardId};
    use crate::log::manifest::Span;
    use crate::storage::Storage;
    use crate::testing::FaultyStorage;
    use std::collections::BTreeSet;
    use std::path::Path;

    #[test]
    fn no_freed_file_is_forgotten_at_whichever_operation_recycling_fails() {
        let dir = Path::new("/s/shard-0000");
        for spares_max in 0..3 {
            for n in 1.. {
                let storage = FaultyStorage::new();
                let retired = |index| {
                    let path = dir.join(format!("{index:012}.seg"));
                    let memory = storage.create_segment(&path, 4096).expect("space for a segment");
                    (path, Arc::new(memory))
                };
                let log =
                    ShardLog::new((1, ShardId(0)), dir.to_owned(), 4096, Offset(4096), 0, [].into(), &Arc::default());
                let mut reclaimer = Reclaimer::new(
                    Retention::default(),
                    false,
                    Arc::new(CheckpointRequests::new(Offset(0), &Arc::default())),
                    Arc::default(),
                    Arc::new(Signal::new()),
                );
                reclaimer.retiring = [retired(0), retired(1)].to_vec();
                let span = Span { first: 2, last: 2 };
                let found = (Vec::new(), Vec::new());
                let mut files = SegmentFiles::new(Arc::new(storage.clone()), Arc::new(log), span, found, spares_max);
                storage.fail_operation(n);
                let recycled = reclaimer.recycle(&mut files);
                let retiring = reclaimer.retiring.iter().map(|(path, _)| path);
                let known: BTreeSet<_> = retiring.chain(files.spares.iter().map(|spare| &spare.path)).collect();
                assert!(storage.files().keys().eq(known), "{spares_max} spares, operation {n}");
                if recycled.is_ok() {
                    assert_eq!((reclaimer.retiring.len(), files.spares.len()), (0, spares_max.min(2)));
                    break;
                }
            }
        }
    }
}
