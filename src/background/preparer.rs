//! Prepares one shard's next segment before the shard needs it, and prefaults the pages that the shard writes next.
//!
//! A segment is blank, has its name and is in the span, all durably, before the shard gets it.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::segment_files::{FailedAction, SegmentFiles, Spare};
use super::step::Step;
use crate::error::FailureCause;
use crate::event::Offset;
use crate::log::format::{HEADER_BYTES, OFFSETS_END, encode_prepared};
use crate::log::manifest::{FRESH, fresh_salt};
use crate::log::segment::Waits;
use crate::log::writer::{Prepared, PreparedQueue};
use crate::storage::memory::{Memory, WriteHalf};
use crate::storage::{Storage, is_exhausted};
use crate::sync::Signal;

/// Prefault distance ahead of the writer.
const PREFAULT_BYTES: usize = 64 << 20;
/// Bytes prefaulted in one step, so that other shards get their turn.
const PREFAULT_STEP_BYTES: usize = 4 << 20;
/// Pause after an attempt that found the storage exhausted.
const RETRY: Duration = Duration::from_millis(100);

/// The preparer of one shard.
#[derive(Debug)]
pub(super) struct Preparer {
    prepared: Arc<PreparedQueue>,
    /// Wakes the shard when a segment is ready.
    shard_signal: Arc<Signal>,
    /// Index of the next segment to prepare.
    next_index: u64,
    /// Segment and position up to which pages are present.
    prefaulted: (u64, usize),
    /// No segment is prepared before this time.
    retry_at: Option<Instant>,
    /// `true` in modes with small and frequent syncs: a segment is then read into the cache in small pages before it is
    /// used. With page sizes chosen by the system, a sync of 100 KB wrote 1.7 MB.
    small_pages: bool,
}

impl Preparer {
    pub(super) fn new(
        prepared: Arc<PreparedQueue>,
        shard_signal: Arc<Signal>,
        next_index: u64,
        small_pages: bool,
    ) -> Self {
        Self { prepared, shard_signal, next_index, prefaulted: (u64::MAX, 0), retry_at: None, small_pages }
    }

    /// Prepares at most one segment, prefaults at most [`PREFAULT_STEP_BYTES`] and removes at most one surplus spare.
    /// Prepares nothing while `may_reuse` is `true`: retention is about to free a file, and reusing it costs no new
    /// blocks.
    pub(super) fn step(
        &mut self,
        files: &mut SegmentFiles,
        may_reuse: bool,
        now: Instant,
    ) -> Result<Step, FailedAction> {
        let prepared = self.prepare(files, may_reuse, now).map_err(|error| ("preparing a segment", error))?;
        let prefaulted = self.prefault(files).map_err(|error| ("prefaulting a segment", error))?;
        // Not before a segment has been prepared: until then a spare may become the next segment, or may be in the
        // span.
        let trimmed = self.prepared.is_full() && files.trim().map_err(|error| ("removing a spare", error))?;
        Ok(if prepared || prefaulted || trimmed { Step::Worked } else { Step::Idle(self.retry_at) })
    }

    /// Starts the pause after an attempt that found the storage exhausted. Returns the end of the pause.
    pub(super) fn pause(&mut self, now: Instant) -> Instant {
        *self.retry_at.insert(now + RETRY)
    }

    /// Ends the shard's wait for storage if it has its next segment.
    pub(super) fn note_storage(&self, files: &SegmentFiles) {
        if files.log.is_storage_full() && self.prepared.is_full() {
            files.log.wait_for_storage(Waits::Segment, None);
        }
    }

    /// Returns `true` if a segment is missing and no pause delays it.
    pub(super) fn must_prepare(&self) -> bool {
        !self.prepared.is_full() && self.retry_at.is_none()
    }

    /// Prepares the next segment if the shard has none. Returns `true` if it did something.
    fn prepare(&mut self, files: &mut SegmentFiles, may_reuse: bool, now: Instant) -> io::Result<bool> {
        if self.retry_at.is_some_and(|at| now < at) {
            return Ok(false);
        }
        self.retry_at = None;
        if self.prepared.is_full() || may_reuse {
            return Ok(false);
        }
        let index = self.next_index;
        // A segment is prepared as soon as the segment before it is begun, so this fails one segment before a back-link
        // could wrap.
        if index >= OFFSETS_END / files.log.segment_bytes {
            files.log.fail(FailureCause::OffsetsExhausted { end: Offset(OFFSETS_END) });
            self.shard_signal.notify();
            return Ok(false);
        }
        let path = files.log.segment_path(index);
        let salt = fresh_salt(index);
        let mut memory = match files.take_spare(&path) {
            Some(spare) => match self.rewrite(files, spare, &path, salt)? {
                Some(memory) => memory,
                // The spare is gone; the next step takes another.
                None => return Ok(true),
            },
            None => self.create(files, &path, salt)?,
        };
        if let Err(error) = files.extend_span(index).and_then(|()| self.make_present(&mut memory, files)) {
            // The next attempt continues with this file: a full disk may have no space for another.
            files.add_spare(path, Some(memory));
            return Err(error);
        }
        self.next_index += 1;
        if self.prepared.push(Prepared { index, salt, memory }).is_err() {
            unreachable!("only the preparer fills the queue, and it had room");
        }
        self.shard_signal.notify();
        Ok(true)
    }

    /// Blanks a spare and gives it the name `path`. Returns `None` if the spare cannot be used; it is then removed.
    fn rewrite(&self, files: &mut SegmentFiles, spare: Spare, path: &Path, salt: u32) -> io::Result<Option<Memory>> {
        let storage = Arc::clone(&files.storage);
        let Spare { path: spare, memory } = spare;
        let opened = match memory {
            Some(memory) => Ok(memory),
            None => self.reopen(&*storage, &spare, files.log.segment_bytes),
        };
        let memory = match opened {
            Ok(memory) => memory,
            Err(error) if is_exhausted(&error) => {
                files.add_spare(spare, None);
                return Err(error);
            }
            Err(error) => {
                tracing::warn!(path = %spare.display(), %error, "a spare cannot be written again and is removed");
                if let Err(error) = storage.remove(&spare) {
                    tracing::warn!(path = %spare.display(), %error, "an unusable spare cannot be removed and stays");
                }
                return Ok(None);
            }
        };
        let memory = blank(&*storage, memory, salt)?;
        if let Err(error) = storage.rename(&spare, path) {
            files.add_spare(spare, Some(memory));
            return Err(error);
        }
        Ok(Some(memory))
    }

    /// Creates a blank segment with the name `path`.
    fn create(&self, files: &SegmentFiles, path: &Path, salt: u32) -> io::Result<Memory> {
        let (storage, dir) = (&*files.storage, &files.log.dir);
        let fresh = dir.join(FRESH);
        if storage.list(dir)?.iter().any(|name| name == FRESH) {
            storage.remove(&fresh)?;
        }
        let memory = storage.create_segment(&fresh, files.log.segment_bytes)?;
        if self.small_pages {
            storage.zero(&fresh, HEADER_BYTES as u64)?;
        }
        let memory = blank(storage, memory, salt)?;
        storage.rename(&fresh, path)?;
        Ok(memory)
    }

    /// Maps a spare of an earlier process.
    fn reopen(&self, storage: &dyn Storage, path: &Path, segment_bytes: u64) -> io::Result<Memory> {
        let memory = storage.open_segment(path, true)?;
        if memory.len() as u64 != segment_bytes {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the file's length is not that of a segment"));
        }
        if self.small_pages {
            // A segment that was prepared and never begun has the name of a segment, and its first page must keep
            // saying that it was never begun. If the first page were zeroed too, a power cut could leave a page of
            // zeros before bytes of an earlier use, which counts as damage.
            storage.zero(path, HEADER_BYTES as u64)?;
        }
        Ok(memory)
    }

    /// Prefaults the beginning of a prepared segment.
    fn make_present(&self, memory: &mut Memory, files: &SegmentFiles) -> io::Result<()> {
        let advised = if self.small_pages { memory.advise_small() } else { memory.advise_huge() };
        if let Err(error) = advised {
            tracing::debug!(%error, "the system does not accept advice on page sizes");
        }
        // The shard waits for its first segment; for later ones there is time.
        let ahead = if files.log.segments_len() == 0 { PREFAULT_STEP_BYTES } else { PREFAULT_BYTES };
        memory.prefault(0..ahead.min(memory.len()))
    }

    /// Prefaults pages of the current segment ahead of the writer. Returns `true` if it did.
    fn prefault(&mut self, files: &SegmentFiles) -> io::Result<bool> {
        let log = &files.log;
        let appended = log.appended.get();
        let index = log.segment_of(Offset(appended));
        let Some(segment) = log.segment(index) else { return Ok(false) };
        let written = (appended - index * log.segment_bytes) as usize;
        if self.prefaulted.0 != index {
            self.prefaulted = (index, 0);
        }
        let from = self.prefaulted.1.max(written);
        let to = (written + PREFAULT_BYTES).min(segment.memory.len());
        // In whole steps, so that a slow writer does not cause a step per page.
        if from >= to || (to - from < PREFAULT_STEP_BYTES && to != segment.memory.len()) {
            return Ok(false);
        }
        let to = to.min(from + PREFAULT_STEP_BYTES);
        segment.memory.prefault(from..to)?;
        self.prefaulted.1 = to;
        Ok(true)
    }
}

/// Blanks a segment before it gets its name: under that name no bytes of an earlier use may be read.
fn blank(storage: &dyn Storage, memory: Memory, salt: u32) -> io::Result<Memory> {
    let mut half = WriteHalf::new(memory, 0);
    encode_prepared(salt, half.tail());
    let memory = half.into_memory();
    storage.sync(&memory, 0..HEADER_BYTES)?;
    Ok(memory)
}
