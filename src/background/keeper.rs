//! The keeper prepares segments ahead of need, prefaults them, and applies retention. One thread per
//! engine, so that no shard ever waits for the file system.
//!
//! Everything it changes in a shard's folder is durable before anyone relies on it: a segment's file and
//! the span that names it before the segment is handed over, the span without it before it is reused.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::background::age::{Ages, Now};
use crate::clock::wall_now;
use crate::config::{Durability, Retention};
use crate::error::FailureCause;
use crate::event::{Offset, Time};
use crate::lane::requests::CheckpointRequests;
use crate::lane::requests::KeeperRequests;
use crate::log::format::{HEADER_BYTES, OFFSETS_END, encode_prepared};
use crate::log::manifest::Span;
use crate::log::manifest::{FRESH, fresh_salt, spare_number};
use crate::log::segment::{Segment, ShardLog, Waits};
use crate::log::writer::{Prepared, PreparedQueue};
use crate::metrics::Counters;
use crate::storage::memory::{Memory, WriteHalf};
use crate::storage::{Storage, is_exhausted};
use crate::sync::{Idle, Signal};

/// How far ahead of the writer pages are made present.
const PREFAULT_BYTES: usize = 64 << 20;
/// How much of that is done before looking at the other shards.
const PREFAULT_STEP_BYTES: usize = 4 << 20;
/// How long after an attempt for which something was exhausted the next is made.
const RETRY: Duration = Duration::from_millis(100);
/// How often it is looked at whether the log has become durable, where retention waits for that. (A syncer that woke the keeper would
/// do so a thousand times a second.)
const SYNC_CHECK: Duration = Duration::from_millis(100);
/// How long after a failed checkpoint retention asks for another.
const RETRY_CHECKPOINT: Duration = Duration::from_millis(500);
/// How often age is looked at.
const AGE_CHECK: Duration = Duration::from_secs(1);

/// What the keeper knows of one shard.
#[derive(Debug)]
pub(crate) struct Kept {
    pub(crate) log: Arc<ShardLog>,
    pub(crate) prepared: Arc<PreparedQueue>,
    pub(crate) counters: Arc<Counters>,
    /// Wakes the shard when a segment is ready.
    pub(crate) shard_signal: Arc<Signal>,
    pub(crate) span: Span,
    /// Index of the next segment to prepare.
    pub(crate) next_index: u64,
    pub(crate) spares: Vec<(PathBuf, Option<Memory>)>,
    pub(crate) spare_number: u64,
    /// Freed, but somebody may still be reading them.
    pub(crate) retiring: Vec<(PathBuf, Arc<Memory>)>,
    /// Up to where the states are saved; nothing above is freed.
    pub(crate) checkpoints: Arc<CheckpointRequests>,
    /// Segment and position up to which pages are present.
    pub(crate) prefaulted: (u64, usize),
    pub(crate) retry_at: Option<Instant>,
    /// Checkpoints that are known to have failed, and when the next is asked for after one of them.
    pub(crate) checkpoints_failed: u64,
    pub(crate) ask_at: Option<Instant>,
    /// Up to where the states must be saved before retention goes on; 0: it waits for nothing.
    pub(crate) waits_for: u64,
    /// Up to where consumers must have come before it goes on; 0: it waits for none.
    pub(crate) held_to: u64,
    /// Up to where the log must be durable before it goes on; 0: it waits for nothing.
    pub(crate) unsynced_to: u64,
    pub(crate) ages: Ages,
}

/// The keeper of an engine.
#[derive(Debug)]
pub(crate) struct Keeper {
    pub(crate) shards: Vec<Kept>,
    pub(crate) storage: Arc<dyn Storage>,
    pub(crate) requests: Arc<KeeperRequests>,
    pub(crate) durability: Durability,
    pub(crate) retention: Retention,
    pub(crate) spares_max: usize,
    /// What its monotonic time is counted from.
    pub(crate) began: Instant,
}

impl Keeper {
    /// Runs until the engine ends.
    pub(crate) fn run(mut self) {
        let mut idle = Idle::sleepy();
        while !self.requests.is_ending() {
            if self.step() {
                continue;
            }
            let now = Instant::now();
            let retry = self.shards.iter().filter_map(|kept| kept.retry_at).min();
            let reading = self.shards.iter().any(|kept| !kept.retiring.is_empty()).then(|| now + RETRY);
            let asking = self.shards.iter().filter_map(|kept| kept.ask_at).min();
            let age = self.retention.age_max.map(|_| now + AGE_CHECK);
            let syncing = self.shards.iter().any(|kept| kept.unsynced_to > 0).then(|| now + SYNC_CHECK);
            let deadline = [retry, reading, asking, age, syncing].into_iter().flatten().min();
            let (shards, requests, bytes_max) = (&self.shards, &self.requests, self.retention.bytes_max);
            idle.step(&requests.signal, deadline, || {
                requests.is_ending() || shards.iter().any(|kept| kept.wants_work(bytes_max))
            });
        }
    }

    /// A bounded piece of work for every shard. Whether there was any.
    pub(crate) fn step(&mut self) -> bool {
        let mut worked = false;
        for i in 0..self.shards.len() {
            if self.shards[i].log.failure().is_some() {
                continue;
            }
            match self.step_shard(i) {
                Ok(did) => {
                    worked |= did;
                    let kept = &self.shards[i];
                    if kept.log.is_storage_full() && kept.prepared.is_full() {
                        kept.log.wait_for_storage(Waits::Segment, None);
                    }
                }
                Err((action, error)) if is_exhausted(&error) => {
                    let kept = &mut self.shards[i];
                    kept.log.wait_for_storage(Waits::Segment, Some((action, &error)));
                    kept.retry_at = Some(Instant::now() + RETRY);
                }
                Err((action, source)) => {
                    let kept = &self.shards[i];
                    kept.log.fail(FailureCause::Storage { action, source: Arc::new(source) });
                    kept.shard_signal.notify();
                }
            }
        }
        worked
    }

    fn step_shard(&mut self, i: usize) -> Result<bool, (&'static str, io::Error)> {
        // Freeing first: what is freed can be written again at once.
        let freed = self.retain(i).map_err(|error| ("freeing a segment", error))?;
        let prepared = self.prepare(i).map_err(|error| ("preparing a segment", error))?;
        let prefaulted = self.prefault(i).map_err(|error| ("prefaulting a segment", error))?;
        let trimmed = self.trim(i).map_err(|error| ("removing a spare", error))?;
        Ok(freed || prepared || prefaulted || trimmed)
    }

    /// Prepares the next segment if none is waiting.
    fn prepare(&mut self, i: usize) -> io::Result<bool> {
        let kept = &mut self.shards[i];
        if kept.retry_at.is_some_and(|at| Instant::now() < at) {
            return Ok(false);
        }
        kept.retry_at = None;
        if kept.prepared.is_full() {
            return Ok(false);
        }
        if kept.waits_to_reuse(self.retention.bytes_max) {
            return Ok(false);
        }
        let index = kept.next_index;
        // Wanted as soon as the last one is begun, so a segment's length before a link could wrap.
        if index >= OFFSETS_END / kept.log.segment_bytes {
            kept.log.fail(FailureCause::OffsetsExhausted { end: Offset(OFFSETS_END) });
            kept.shard_signal.notify();
            return Ok(false);
        }
        let path = kept.log.segment_path(index);
        // Where syncs follow each other and are small, a segment is brought into the cache in small pages before it is
        // used: a sync of 100 KB wrote 1.7 MB in pages as large as the system makes them by itself.
        let small_pages = self.durability == Durability::GroupCommit;
        // A leftover that has the name already comes first: another one renamed to that name would replace it, and
        // the name would then stand twice, once for the segment being written and once for a spare.
        let at = kept.spares.iter().position(|(spare, _)| *spare == path).or(kept.spares.len().checked_sub(1));
        let salt = fresh_salt(index);
        let mut memory = match at.map(|at| kept.spares.remove(at)) {
            Some((spare, memory)) => {
                let usable = match memory {
                    Some(memory) => Ok(memory),
                    // Of an earlier process.
                    None => reopen(&*self.storage, &spare, kept.log.segment_bytes, small_pages),
                };
                let memory = match usable {
                    Ok(memory) => memory,
                    Err(error) if is_exhausted(&error) => {
                        kept.spares.push((spare, None));
                        return Err(error);
                    }
                    Err(error) => {
                        tracing::warn!(path = %spare.display(), %error, "not a file that can be written again; removed");
                        if let Err(error) = self.storage.remove(&spare) {
                            tracing::warn!(path = %spare.display(), %error, "nor can it be removed; it stays");
                        }
                        return Ok(true);
                    }
                };
                let memory = blank(&*self.storage, memory, salt)?;
                if let Err(error) = self.storage.rename(&spare, &path) {
                    kept.spares.push((spare, Some(memory)));
                    return Err(error);
                }
                memory
            }
            None => {
                let fresh = kept.log.dir.join(FRESH);
                if self.storage.list(&kept.log.dir)?.iter().any(|name| name == FRESH) {
                    self.storage.remove(&fresh)?;
                }
                let memory = self.storage.create_segment(&fresh, kept.log.segment_bytes)?;
                if small_pages {
                    self.storage.zero(&fresh, HEADER_BYTES as u64)?;
                }
                let memory = blank(&*self.storage, memory, salt)?;
                self.storage.rename(&fresh, &path)?;
                memory
            }
        };
        let span = Span { last: index, ..kept.span };
        if let Err(error) = self.storage.sync_dir(&kept.log.dir).and_then(|()| span.save(&*self.storage, &kept.log.dir))
        {
            // The next attempt goes on with this file: on a full disk there may be no space for another.
            kept.spares.push((path, Some(memory)));
            return Err(error);
        }
        kept.span = span;
        let advised = if small_pages { memory.advise_small() } else { memory.advise_huge() };
        if let Err(error) = advised {
            tracing::debug!(%error, "no advice on page sizes here");
        }
        // The first is wanted now; for later ones there is time.
        let ahead = if kept.log.segments_len() == 0 { PREFAULT_STEP_BYTES } else { PREFAULT_BYTES };
        if let Err(error) = memory.prefault(0..ahead.min(memory.len())) {
            kept.spares.push((path, Some(memory)));
            return Err(error);
        }
        kept.next_index += 1;
        if kept.prepared.push(Prepared { index, salt, memory }).is_err() {
            unreachable!("only the keeper prepares, and there was room");
        }
        kept.shard_signal.notify();
        Ok(true)
    }

    /// Makes pages present ahead of the writer.
    fn prefault(&mut self, i: usize) -> io::Result<bool> {
        let kept = &mut self.shards[i];
        let appended = kept.log.appended.get();
        let index = kept.log.segment_of(Offset(appended));
        let Some(segment) = kept.log.segment(index) else { return Ok(false) };
        let written = (appended - index * kept.log.segment_bytes) as usize;
        if kept.prefaulted.0 != index {
            kept.prefaulted = (index, 0);
        }
        let from = kept.prefaulted.1.max(written);
        let to = (written + PREFAULT_BYTES).min(segment.memory.len());
        // In whole steps, so that a slow writer does not make the keeper work for every page.
        if from >= to || (to - from < PREFAULT_STEP_BYTES && to != segment.memory.len()) {
            return Ok(false);
        }
        let to = to.min(from + PREFAULT_STEP_BYTES);
        segment.memory.prefault(from..to)?;
        kept.prefaulted.1 = to;
        Ok(true)
    }

    /// Frees the oldest segment if it is beyond what is to be kept, and reuses what nobody reads any more.
    fn retain(&mut self, i: usize) -> io::Result<bool> {
        self.shards[i].notice_checkpoints();
        let mut worked = self.reuse_retired(i)?;
        let kept = &mut self.shards[i];
        let Some((oldest, next)) = kept.log.oldest_two() else { return Ok(worked) };
        Self::ask_ahead(kept, self.retention.bytes_max);
        let over_bytes =
            self.retention.bytes_max.is_some_and(|max| kept.log.segments_len() as u64 * kept.log.segment_bytes > max);
        let aged = self.retention.age_max.map(|max| (max, Now { wall: wall_now(), monotonic: self.began.elapsed() }));
        let over_age = aged.is_some_and(|(max, now)| {
            let log = &kept.log;
            // One whose header does not hold any more was begun at no time that can be believed.
            let begun = |index| log.segment(index).map(|segment| begun(&segment).unwrap_or_default());
            kept.ages.is_over(oldest.index, max, now, begun)
        });
        if !(over_bytes || over_age) {
            return Ok(worked);
        }
        let freed_to = kept.log.first_offset(next.index).0;
        if self.durability != Durability::OsCache && kept.log.durable.get() < freed_to {
            kept.unsynced_to = freed_to;
            return Ok(worked);
        }
        if kept.is_held(freed_to) {
            kept.held_to = freed_to;
            return Ok(worked);
        }
        // What the freed events had made of their keys must not go with them. Since something was acknowledged, a checkpoint covers
        // nothing that is not durable.
        if kept.checkpoints.covered() < freed_to {
            kept.waits_for = freed_to;
            if kept.checkpoints.begun() < freed_to {
                kept.ask();
            }
            return Ok(worked);
        }
        let span = Span { first: next.index, ..kept.span };
        drop((oldest, next));
        // A consumer that comes now finds it held, or gone.
        let freed = kept.log.holds.free(Offset(freed_to), || {
            // The span first: after a crash in between, the file is surplus, not missing.
            span.save(&*self.storage, &kept.log.dir)?;
            Ok::<_, io::Error>(kept.log.pop_oldest())
        });
        let Some(freed) = freed.transpose()? else { return Ok(worked) };
        kept.span = span;
        if let Some(freed) = freed {
            if let Some((_, now)) = aged {
                kept.ages.freed(freed.index, now);
            }
            kept.retiring.push((kept.log.segment_path(freed.index), freed.memory));
            kept.counters.segments_freed.add(1);
        }
        worked = true;
        self.reuse_retired(i)?;
        Ok(worked)
    }

    /// Asks for the checkpoint that the next freeing needs when the segment being written is half full: when it is full, what is
    /// freed can be written again at once, and no new file is needed in between.
    fn ask_ahead(kept: &mut Kept, bytes_max: Option<u64>) {
        let log = &kept.log;
        let (appended, held) = (log.appended.get(), log.segments_len() as u64);
        let Some(over) = bytes_max.and_then(|max| (held + 1).checked_sub(max / log.segment_bytes)) else { return };
        let freed_to = log.earliest().0 + over * log.segment_bytes;
        let is_half_full = appended % log.segment_bytes >= log.segment_bytes / 2;
        if over > 0 && is_half_full && kept.checkpoints.begun() < freed_to && appended >= freed_to {
            kept.ask();
        }
    }

    /// Removes one file too many of those that recovery found.
    fn trim(&mut self, i: usize) -> io::Result<bool> {
        let kept = &mut self.shards[i];
        // Not before a segment has been prepared: until then one of them may be the next, or be in the span.
        if kept.spares.len() <= self.spares_max || !kept.prepared.is_full() {
            return Ok(false);
        }
        let (path, memory) = kept.spares.remove(0);
        match self.storage.remove(&path) {
            Err(error) if is_exhausted(&error) => {
                kept.spares.insert(0, (path, memory));
                return Err(error);
            }
            Err(error) => tracing::warn!(path = %path.display(), %error, "a spare too many cannot be removed"),
            Ok(()) => self.storage.sync_dir(&kept.log.dir)?,
        }
        Ok(true)
    }

    fn reuse_retired(&mut self, i: usize) -> io::Result<bool> {
        let kept = &mut self.shards[i];
        let mut worked = false;
        let mut failed = None;
        for (path, memory) in std::mem::take(&mut kept.retiring) {
            let memory = match Arc::try_unwrap(memory) {
                Ok(memory) if failed.is_none() => memory,
                Ok(memory) => {
                    kept.retiring.push((path, Arc::new(memory)));
                    continue;
                }
                Err(held) => {
                    kept.retiring.push((path, held));
                    continue;
                }
            };
            let is_kept = kept.spares.len() < self.spares_max;
            let spare = kept.log.dir.join(format!("spare-{:06}.seg", kept.spare_number));
            let done = if is_kept { self.storage.rename(&path, &spare) } else { self.storage.remove(&path) };
            if let Err(error) = done {
                // It stays what it is, for the next attempt.
                kept.retiring.push((path, Arc::new(memory)));
                failed = Some(error);
                continue;
            }
            if is_kept {
                kept.spare_number += 1;
                kept.spares.push((spare, Some(memory)));
            }
            worked = true;
            // The others stay what they are.
            failed = self.storage.sync_dir(&kept.log.dir).err();
        }
        failed.map_or(Ok(worked), Err)
    }
}

impl Kept {
    /// Takes in files that recovery found and nobody needs: to be written again.
    pub(crate) fn with_leftovers(mut self, unused: Vec<PathBuf>, spares: Vec<PathBuf>) -> Self {
        let number = |path: &PathBuf| spare_number(path.file_name()?.to_str()?);
        self.spare_number = spares.iter().filter_map(number).max().map_or(0, |highest| highest + 1);
        self.spares = spares.into_iter().chain(unused).map(|path| (path, None)).collect();
        self
    }

    /// After a checkpoint that failed, the next is asked for a little later, also if nothing else happens.
    fn notice_checkpoints(&mut self) {
        (self.waits_for, self.held_to, self.unsynced_to) = (0, 0, 0);
        let failed = self.checkpoints.failures();
        if failed != self.checkpoints_failed {
            self.checkpoints_failed = failed;
            self.ask_at = Some(Instant::now() + RETRY_CHECKPOINT);
        } else if self.ask_at.is_some_and(|at| at <= Instant::now()) {
            self.ask_at = None;
        }
    }

    /// Whether a consumer needs something below `freed_to`.
    fn is_held(&self, freed_to: u64) -> bool {
        self.log.holds.lowest().is_some_and(|lowest| lowest.0 < freed_to)
    }

    /// Asks for a checkpoint, unless one has just failed.
    fn ask(&self) {
        if self.ask_at.is_none() {
            self.checkpoints.ask();
            self.shard_signal.notify();
        }
    }

    /// Whether a segment is about to be freed, and there is time to wait for it: written again, it costs no new blocks.
    fn waits_to_reuse(&self, bytes_max: Option<u64>) -> bool {
        let Self { log, checkpoints, .. } = self;
        let over = bytes_max.is_some_and(|max| (log.segments_len() as u64 + 1) * log.segment_bytes > max);
        let is_being_saved = checkpoints.begun() > checkpoints.covered();
        let has_time = log.appended.get() % log.segment_bytes < log.segment_bytes / 4 * 3;
        self.spares.is_empty() && over && is_being_saved && has_time
    }

    /// Looked at before sleeping.
    fn wants_work(&self, bytes_max: Option<u64>) -> bool {
        let is_saved = self.waits_for > 0 && self.checkpoints.covered() >= self.waits_for;
        let is_released = self.held_to > 0 && !self.is_held(self.held_to);
        let is_synced = self.unsynced_to > 0 && self.log.durable.get() >= self.unsynced_to;
        let has_failed = self.checkpoints.failures() != self.checkpoints_failed;
        let must_prepare = !self.prepared.is_full() && self.retry_at.is_none() && !self.waits_to_reuse(bytes_max);
        self.log.failure().is_none() && (must_prepare || is_saved || is_released || is_synced || has_failed)
    }
}

/// Makes a segment blank before it gets its name: under that name nothing of an old life may be read.
fn blank(storage: &dyn Storage, memory: Memory, salt: u32) -> io::Result<Memory> {
    let mut half = WriteHalf::new(memory, 0);
    encode_prepared(salt, half.tail());
    let memory = half.into_memory();
    storage.sync(&memory, 0..HEADER_BYTES)?;
    Ok(memory)
}

/// Maps a leftover of an earlier process, to be written again.
fn reopen(storage: &dyn Storage, path: &Path, segment_bytes: u64, small_pages: bool) -> io::Result<Memory> {
    let memory = storage.open_segment(path, true)?;
    if memory.len() as u64 != segment_bytes {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the file is not as long as a segment is"));
    }
    if small_pages {
        // A file that was prepared and not begun has the name of a segment. Its page must go on saying so: before the
        // first bytes of an old life, a page of zeros would be damage, and a power cut may leave just that.
        storage.zero(path, HEADER_BYTES as u64)?;
    }
    Ok(memory)
}

/// When a segment was begun, which is when the one before it got its newest record.
fn begun(segment: &Segment) -> Option<Time> {
    let page = segment.memory.read(0, HEADER_BYTES)?;
    crate::log::format::SegmentHeader::decode(page).ok().map(|header| header.created)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::ShardId;
    use crate::testing::FaultyStorage;

    #[test]
    fn no_freed_file_is_forgotten_whatever_fails_while_they_are_kept() {
        let dir = Path::new("/s/shard-0000");
        for spares_max in 0..3 {
            for n in 1.. {
                let storage = FaultyStorage::new();
                let retired = |index| {
                    let path = dir.join(format!("{index:012}.seg"));
                    let memory = storage.create_segment(&path, 4096).expect("made");
                    (path, Arc::new(memory))
                };
                let retiring = [retired(0), retired(1)].to_vec();
                let log = ShardLog::new(1, ShardId(0), dir.to_owned(), 4096, Offset(4096), 0, [].into());
                let kept = Kept {
                    log: Arc::new(log),
                    prepared: Arc::new(PreparedQueue::new(1)),
                    counters: Arc::default(),
                    shard_signal: Arc::new(Signal::new()),
                    span: Span { first: 2, last: 2 },
                    next_index: 3,
                    spares: Vec::new(),
                    spare_number: 0,
                    retiring,
                    checkpoints: Arc::new(CheckpointRequests::new(Offset(0))),
                    prefaulted: (u64::MAX, 0),
                    retry_at: None,
                    checkpoints_failed: 0,
                    ask_at: None,
                    waits_for: 0,
                    held_to: 0,
                    unsynced_to: 0,
                    ages: Ages::default(),
                };
                let mut keeper = Keeper {
                    shards: vec![kept],
                    storage: Arc::new(storage.clone()),
                    requests: Arc::new(KeeperRequests::new()),
                    durability: Durability::OsCache,
                    retention: Retention::default(),
                    spares_max,
                    began: Instant::now(),
                };
                storage.fail_operation(n);
                let reused = keeper.reuse_retired(0);
                let kept = &keeper.shards[0];
                let retiring = kept.retiring.iter().map(|(path, _)| path);
                let known: std::collections::BTreeSet<_> =
                    retiring.chain(kept.spares.iter().map(|(path, _)| path)).collect();
                assert!(storage.files().keys().eq(known), "{spares_max} spares, operation {n}");
                if reused.is_ok() {
                    assert_eq!((kept.retiring.len(), kept.spares.len()), (0, spares_max.min(2)));
                    break;
                }
            }
        }
    }

    #[test]
    fn a_spare_is_named_by_digits_alone() {
        assert_eq!(spare_number("spare-000007.seg"), Some(7));
        assert_eq!(spare_number(&format!("spare-{}.seg", u64::MAX)), None, "no number comes behind it");
        assert_eq!(spare_number("spare-1234567.seg"), Some(1_234_567));
        for name in ["spare-.seg", "spare-+7.seg", "spare-7.tmp", "spare-backup.seg", "spare-99999999999999999999.seg"]
        {
            assert_eq!(spare_number(name), None, "{name}");
        }
    }
}
