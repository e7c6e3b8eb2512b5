//! The part of a shard's log that all threads of this process see: the list of segments, the watermarks, and the first
//! failure.
//!
//! Writers: the shard moves `appended` and adds segments, the syncer moves `durable`, and the keeper removes segments
//! from the front. Readers hold an `Arc` of a segment's memory; while one is held, the segment is not written again.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::OnceLock;

use crate::error::{FailureCause, ShardFailure};
use crate::event::{Offset, ShardId};
use crate::log::format::{HEADER_BYTES, RECORD_HEADER_BYTES, RecordHeader, Seam};
use crate::log::holds::Holds;
use crate::log::manifest::segment_name;
use crate::storage::SideFile;
use crate::storage::framed::u32_at;
use crate::storage::memory::Memory;
use crate::storage::memory::padded;
use crate::sync::{AtomicBool, Mutex, Notifier, Ordering, Waiters, Watermark, lock};

/// One segment that holds records.
#[derive(Debug, Clone)]
pub(crate) struct Segment {
    pub(crate) index: u64,
    /// The state in which the previous segment must end, and this segment's first sequence.
    pub(crate) seam: Seam,
    pub(crate) salt: u32,
    pub(crate) memory: Arc<Memory>,
}

/// The part of a shard's log that other threads see.
#[derive(Debug)]
pub(crate) struct ShardLog {
    /// The id of the store, which saved positions contain.
    pub(crate) store: u64,
    pub(crate) shard: ShardId,
    pub(crate) dir: PathBuf,
    pub(crate) segment_bytes: u64,
    segments: Mutex<VecDeque<Segment>>,
    /// The end of the log that readers may see.
    pub(crate) appended: Watermark,
    /// The end of the synced log.
    pub(crate) durable: Watermark,
    /// The number of events below `appended`.
    pub(crate) sequence: Watermark,
    /// Waiters for `appended`.
    pub(crate) grown: Waiters,
    /// Waiters for `durable`.
    pub(crate) synced: Waiters,
    /// Calls the wakers of tasks that wait for this shard.
    pub(crate) notifier: Arc<Notifier>,
    /// The retention holds of consumers and gates.
    pub(crate) holds: Holds,
    /// A checkpoint that was published without a sync (`OsCache`), and the end of the log that it covers: retention may
    /// have freed the records that it replaces. The snapshotter holds this lock from reading `durable` until it has
    /// published the checkpoint. The syncer holds this lock from reading this field until it has moved `durable`.
    pub(crate) unsynced: Mutex<Option<(Box<dyn SideFile>, Offset)>>,
    /// `true` once nothing more is appended.
    ended: AtomicBool,
    failed: AtomicBool,
    failure: OnceLock<ShardFailure>,
    /// `true` while the shard or the keeper waits for the storage.
    storage_full: AtomicBool,
    /// The reason for each kind of wait, indexed by [`Waits`].
    waiting: Mutex<[Option<Arc<str>>; 2]>,
}

/// The operations of a shard that wait while the storage is full, or descriptors or memory are exhausted.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Waits {
    /// The keeper waits to prepare or to free a segment.
    Segment,
    /// The shard waits to record the failure of an inline handler.
    Note,
}

impl ShardLog {
    /// Creates the log of a shard of a store, given by its id.
    pub(crate) fn new(
        (store, shard): (u64, ShardId),
        dir: PathBuf,
        segment_bytes: u64,
        at: Offset,
        sequence: u64,
        segments: VecDeque<Segment>,
        notifier: &Arc<Notifier>,
    ) -> Self {
        Self {
            store,
            shard,
            dir,
            segment_bytes,
            segments: Mutex::new(segments),
            appended: Watermark::new(at.0),
            durable: Watermark::new(at.0),
            sequence: Watermark::new(sequence),
            grown: Waiters::new(notifier),
            synced: Waiters::new(notifier),
            notifier: Arc::clone(notifier),
            holds: Holds::default(),
            unsynced: Mutex::new(None),
            ended: AtomicBool::new(false),
            failed: AtomicBool::new(false),
            failure: OnceLock::new(),
            storage_full: AtomicBool::new(false),
            waiting: Mutex::default(),
        }
    }

    /// Returns `true` if an operation waits for the storage; the shard then takes nothing from its lanes.
    pub(crate) fn is_storage_full(&self) -> bool {
        self.storage_full.load(Ordering::Relaxed)
    }

    /// Records why an operation waits for the storage, and logs it once. `None` ends the wait.
    pub(crate) fn wait_for_storage(&self, what: Waits, why: Option<(&'static str, &std::io::Error)>) {
        let mut waiting = lock(&self.waiting);
        let reason = &mut waiting[what as usize];
        match why {
            None => *reason = None,
            Some(_) if reason.is_some() => {}
            Some((action, error)) => {
                tracing::error!(shard = self.shard.0, action, %error, "the storage is exhausted; publishers wait");
                *reason = Some(format!("{action}: {error}").into());
            }
        }
        // SeqCst: a flag for publishers and metrics; it orders no other data.
        self.storage_full.store(waiting.iter().any(Option::is_some), Ordering::SeqCst);
    }

    /// Returns the reason why an operation waits for the storage.
    pub(crate) fn why_storage_full(&self) -> Option<Arc<str>> {
        lock(&self.waiting).iter().flatten().next().cloned()
    }

    pub(crate) fn segment_of(&self, offset: Offset) -> u64 {
        offset.0 / self.segment_bytes
    }

    /// Returns the offset of segment `index`'s first record.
    pub(crate) fn first_offset(&self, index: u64) -> Offset {
        Offset(index * self.segment_bytes + HEADER_BYTES as u64)
    }

    pub(crate) fn segment_path(&self, index: u64) -> PathBuf {
        self.dir.join(segment_name(index))
    }

    /// Returns the segment with this index, if it is still held.
    pub(crate) fn segment(&self, index: u64) -> Option<Segment> {
        let segments = lock(&self.segments);
        let first = segments.front()?.index;
        segments.get(usize::try_from(index.checked_sub(first)?).ok()?).cloned()
    }

    /// Returns the last event in `from..end`, among those appended by this process. `from` must be the beginning or the
    /// end of a record. Returns `None` if there is no such event, or if it has been freed since.
    pub(crate) fn last_event_in(&self, from: Offset, end: Offset) -> Option<Offset> {
        let (mut at, mut last) = (from, None);
        while at < end {
            let index = self.segment_of(at);
            let segment = self.segment(index)?;
            at = at.max(self.first_offset(index));
            let mut position = (at.0 - index * self.segment_bytes) as usize;
            while at < end {
                let head = segment.memory.read(position, RECORD_HEADER_BYTES);
                let Some((len, head)) = head.map(|head| (u32_at(head, 0) as usize, head)).filter(|(len, _)| *len > 0)
                else {
                    break;
                };
                if !RecordHeader::decode(head).is_own() {
                    last = Some(at);
                }
                position += padded(len);
                at.0 += padded(len) as u64;
            }
            // This also leaves a completely filled segment.
            at = if at < end { at.max(self.first_offset(index + 1)) } else { at };
        }
        last
    }

    /// Returns the CRC word of the record that ends at `end`, or 0 if the log begins there. Everything below `end` must
    /// be published. Returns `None` if the record has been freed, or if no record ends there.
    pub(crate) fn check_before(&self, end: Offset) -> Option<u32> {
        // The end of a completely filled segment still belongs to that segment.
        let index = self.segment_of(Offset(end.0.saturating_sub(1)));
        let (mut at, mut check) = (HEADER_BYTES as u64, 0);
        let end = end.0.saturating_sub(index * self.segment_bytes);
        if end <= at {
            return Some(0);
        }
        let segment = self.segment(index)?;
        while at < end {
            let head = segment.memory.read(at as usize, RECORD_HEADER_BYTES)?;
            let len = u32_at(head, 0) as usize;
            if len == 0 {
                return None;
            }
            check = u32_at(head, 4);
            at += padded(len) as u64;
        }
        (at == end).then_some(check)
    }

    pub(crate) fn push_segment(&self, segment: Segment) {
        let mut segments = lock(&self.segments);
        debug_assert!(segments.back().is_none_or(|last| last.index + 1 == segment.index));
        segments.push_back(segment);
    }

    /// Removes the oldest segment from the list, unless it is the only one.
    pub(crate) fn pop_oldest(&self) -> Option<Segment> {
        let mut segments = lock(&self.segments);
        if segments.len() > 1 { segments.pop_front() } else { None }
    }

    /// Returns the two oldest segments: the candidate for retention, and the segment that is the earliest once that one
    /// is freed.
    pub(crate) fn oldest_two(&self) -> Option<(Segment, Segment)> {
        let segments = lock(&self.segments);
        Some((segments.front()?.clone(), segments.get(1)?.clone()))
    }

    /// Returns the number of segments held.
    pub(crate) fn segments_len(&self) -> usize {
        lock(&self.segments).len()
    }

    /// Returns the end of the appended log, with the number of events below it. Returns `None` if the shard is
    /// publishing at this moment: try again.
    ///
    /// The shard publishes the bytes first, then the sequence, then `appended`. If nothing behind `appended` is
    /// published after the sequence was read, both were read between the same two batches.
    pub(crate) fn end_and_sequence(&self) -> Option<(Offset, u64)> {
        let (appended, sequence) = (self.appended.get(), self.sequence.get());
        let segments = lock(&self.segments);
        let Some(newest) = segments.back() else { return Some((Offset(appended), sequence)) };
        let committed = newest.memory.committed();
        if newest.index * self.segment_bytes + committed as u64 == appended {
            return Some((Offset(appended), sequence));
        }
        // The newest segment is empty, and the one before it ends with the published events.
        let is_empty = committed == HEADER_BYTES && newest.seam.end.0 == appended;
        is_empty.then_some((Offset(appended), newest.seam.sequence))
    }

    /// Returns the sequence of the first event of a segment that is held or will be the next one.
    pub(crate) fn first_sequence(&self, index: u64) -> u64 {
        // Read before the list of segments: if the list then lacks the segment, no event was in it when the sequence
        // was read.
        let of_log = self.sequence.get();
        self.segment(index).map_or(of_log, |segment| segment.seam.sequence)
    }

    /// Returns the oldest segment held.
    pub(crate) fn oldest(&self) -> Option<Segment> {
        lock(&self.segments).front().cloned()
    }

    /// Returns the earliest offset still held.
    pub(crate) fn earliest(&self) -> Offset {
        match lock(&self.segments).front() {
            Some(first) => self.first_offset(first.index),
            None => Offset(self.appended.get()),
        }
    }

    /// Notes that nothing more will be appended, and wakes all waiters for the log.
    pub(crate) fn end(&self) {
        // SeqCst: pairs with the load in `has_ended`. A waiter registers first and checks afterwards.
        self.ended.store(true, Ordering::SeqCst);
        self.grown.wake_all();
        self.synced.wake_all();
    }

    /// Returns `true` if nothing more will be appended: the engine was closed, or the shard has failed.
    pub(crate) fn has_ended(&self) -> bool {
        // SeqCst: pairs with the store in `end`.
        self.ended.load(Ordering::SeqCst)
    }

    /// Fails the shard. Only the first cause is kept.
    pub(crate) fn fail(&self, cause: FailureCause) {
        let failure = ShardFailure { shard: self.shard, cause };
        tracing::error!(shard = self.shard.0, %failure, "a shard failed");
        // Any later failure is a consequence of the first one and less informative.
        if self.failure.set(failure).is_ok() {
            // SeqCst: pairs with the load in `failure`. A waiter registers first and checks afterwards.
            self.failed.store(true, Ordering::SeqCst);
        }
    }

    /// Returns the failure of the shard, if it failed.
    #[inline]
    pub(crate) fn failure(&self) -> Option<&ShardFailure> {
        // SeqCst: pairs with the store in `fail`.
        if self.failed.load(Ordering::SeqCst) { self.failure.get() } else { None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::memory::{Heap, WriteHalf};

    const SEGMENT_BYTES: u64 = 8192;

    fn begin(log: &ShardLog, index: u64, seam: Seam) -> WriteHalf {
        let memory = Memory::heap(Arc::new(Heap::new(vec![0; SEGMENT_BYTES as usize])));
        let half = WriteHalf::new(memory, HEADER_BYTES);
        log.push_segment(Segment { index, seam, salt: 0, memory: Arc::clone(half.memory()) });
        half
    }

    /// The writer's steps one by one: at no step does the end of the log come with the sequence of another batch.
    #[test]
    fn the_end_of_the_log_has_its_own_sequence_or_none() {
        let (store, notifier) = ((1, ShardId(0)), Arc::default());
        let log = ShardLog::new(store, PathBuf::new(), SEGMENT_BYTES, Offset(4096), 0, VecDeque::new(), &notifier);
        let ends = |offset, sequence| assert_eq!(log.end_and_sequence(), Some((Offset(offset), sequence)));
        ends(4096, 0);
        let mut half = begin(&log, 0, Seam { end: Offset(0), salt: 0, sequence: 0 });
        ends(4096, 0);
        half.skip(96);
        ends(4096, 0);
        half.publish();
        assert_eq!(log.end_and_sequence(), None, "the bytes are published, the watermarks are not");
        log.sequence.publish(1);
        assert_eq!(log.end_and_sequence(), None, "`appended` belongs to sequence 0");
        log.appended.publish(4192);
        ends(4192, 1);
        // A batch begins a segment before anything is published.
        let mut next = begin(&log, 1, Seam { end: Offset(4192), salt: 0, sequence: 1 });
        ends(4192, 1);
        next.skip(96);
        next.publish();
        log.sequence.publish(2);
        assert_eq!(log.end_and_sequence(), None);
        log.appended.publish(SEGMENT_BYTES + 4192);
        ends(SEGMENT_BYTES + 4192, 2);
        // A batch fills the old segment, and begins another one before anything is published.
        next.skip(96);
        next.publish();
        begin(&log, 2, Seam { end: Offset(SEGMENT_BYTES + 4288), salt: 0, sequence: 3 });
        assert_eq!(log.end_and_sequence(), None);
    }
}
