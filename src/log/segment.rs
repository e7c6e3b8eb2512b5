//! The segments of one shard as every thread of this process sees them: the list, the watermarks,
//! and the first failure.
//!
//! Writers: the shard moves `appended` and adds segments; the syncer moves `durable`; the keeper takes
//! segments off the front. Readers hold an `Arc` of a segment's memory, and a segment that is held is never written again.

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
use crate::sync::{AtomicBool, Mutex, Ordering, Waiters, Watermark, lock};

/// One segment that holds records.
#[derive(Debug, Clone)]
pub(crate) struct Segment {
    pub(crate) index: u64,
    /// What the segment before it must come to; its own first sequence is there too.
    pub(crate) seam: Seam,
    pub(crate) salt: u32,
    pub(crate) memory: Arc<Memory>,
}

/// What a shard's log shows to the other threads.
#[derive(Debug)]
pub(crate) struct ShardLog {
    /// The store's id, by which a saved position knows it.
    pub(crate) store: u64,
    pub(crate) shard: ShardId,
    pub(crate) dir: PathBuf,
    pub(crate) segment_bytes: u64,
    segments: Mutex<VecDeque<Segment>>,
    /// End of what readers may see.
    pub(crate) appended: Watermark,
    /// End of what has been synced.
    pub(crate) durable: Watermark,
    /// Events below `appended`.
    pub(crate) sequence: Watermark,
    /// Who waits for `appended` to move.
    pub(crate) grown: Waiters,
    /// Who waits for `durable` to move.
    pub(crate) synced: Waiters,
    /// What consumers and gates still need.
    pub(crate) holds: Holds,
    /// A checkpoint that was published without a sync (`OsCache`), and up to where it knows the log: retention may have freed what it
    /// stands for. The snapshotter holds this from its look at `durable` until it has published; the syncer from its look here until
    /// it has moved `durable`.
    pub(crate) unsynced: Mutex<Option<(Box<dyn SideFile>, Offset)>>,
    failed: AtomicBool,
    failure: OnceLock<ShardFailure>,
    /// Something of the shard waits for its storage.
    storage_full: AtomicBool,
    /// What waits, and why.
    waiting: Mutex<[Option<Arc<str>>; 2]>,
}

/// What of a shard waits while its storage is full, or descriptors or memory are exhausted.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Waits {
    /// The keeper: to prepare a segment, or to free one.
    Segment,
    /// The shard: to note that an inline handler failed.
    Note,
}

impl ShardLog {
    pub(crate) fn new(
        store: u64,
        shard: ShardId,
        dir: PathBuf,
        segment_bytes: u64,
        at: Offset,
        sequence: u64,
        segments: VecDeque<Segment>,
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
            grown: Waiters::new(),
            synced: Waiters::new(),
            holds: Holds::default(),
            unsynced: Mutex::new(None),
            failed: AtomicBool::new(false),
            failure: OnceLock::new(),
            storage_full: AtomicBool::new(false),
            waiting: Mutex::default(),
        }
    }

    /// Whether something waits for the storage, which is why nothing is taken out of the lanes for long.
    pub(crate) fn is_storage_full(&self) -> bool {
        self.storage_full.load(Ordering::Relaxed)
    }

    /// Notes why something waits for the storage, and says so once; `None`: it does no longer.
    pub(crate) fn wait_for_storage(&self, what: Waits, why: Option<(&'static str, &std::io::Error)>) {
        let mut waiting = lock(&self.waiting);
        let place = &mut waiting[what as usize];
        match why {
            None => *place = None,
            Some(_) if place.is_some() => {}
            Some((action, error)) => {
                tracing::error!(shard = self.shard.0, action, %error, "the storage has no room; publishers wait until it has");
                *place = Some(format!("{action}: {error}").into());
            }
        }
        self.storage_full.store(waiting.iter().any(Option::is_some), Ordering::SeqCst);
    }

    /// Why something waits for the storage.
    pub(crate) fn why_storage_full(&self) -> Option<Arc<str>> {
        lock(&self.waiting).iter().flatten().next().cloned()
    }

    pub(crate) fn segment_of(&self, offset: Offset) -> u64 {
        offset.0 / self.segment_bytes
    }

    /// Where segment `index`'s first record begins.
    pub(crate) fn first_offset(&self, index: u64) -> Offset {
        Offset(index * self.segment_bytes + HEADER_BYTES as u64)
    }

    pub(crate) fn segment_path(&self, index: u64) -> PathBuf {
        self.dir.join(segment_name(index))
    }

    /// The segment with this number, if it is held.
    pub(crate) fn segment(&self, index: u64) -> Option<Segment> {
        let segments = lock(&self.segments);
        let first = segments.front()?.index;
        segments.get(usize::try_from(index.checked_sub(first)?).ok()?).cloned()
    }

    /// The last event of `from..end`, of what this process appended; `from` begins a record or ends one. `None`: there is none, or it was
    /// freed meanwhile.
    pub(crate) fn last_event_in(&self, from: Offset, end: Offset) -> Option<Offset> {
        let (mut at, mut last) = (from, None);
        while at < end {
            let index = self.segment_of(at);
            let segment = self.segment(index)?;
            at = at.max(self.first_offset(index));
            let mut place = (at.0 - index * self.segment_bytes) as usize;
            while at < end {
                let head = segment.memory.read(place, RECORD_HEADER_BYTES);
                let Some((len, head)) = head.map(|head| (u32_at(head, 0) as usize, head)).filter(|(len, _)| *len > 0)
                else {
                    break;
                };
                if !RecordHeader::decode(head).is_own() {
                    last = Some(at);
                }
                place += padded(len);
                at.0 += padded(len) as u64;
            }
            // Also where the segment is filled to its last byte.
            at = if at < end { at.max(self.first_offset(index + 1)) } else { at };
        }
        last
    }

    /// The CRC word of the record that ends at `end`, where everything below is published; 0 where the log begins there. `None`: it was
    /// freed, or no record ends there.
    pub(crate) fn check_before(&self, end: Offset) -> Option<u32> {
        // The end of a segment filled to its last byte still belongs to that segment.
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

    /// Takes the oldest segment off the list, unless it is the only one.
    pub(crate) fn pop_oldest(&self) -> Option<Segment> {
        let mut segments = lock(&self.segments);
        if segments.len() > 1 { segments.pop_front() } else { None }
    }

    /// The two oldest segments: the candidate for retention and the one that would be the earliest after it.
    pub(crate) fn oldest_two(&self) -> Option<(Segment, Segment)> {
        let segments = lock(&self.segments);
        Some((segments.front()?.clone(), segments.get(1)?.clone()))
    }

    /// Number of segments held.
    pub(crate) fn segments_len(&self) -> usize {
        lock(&self.segments).len()
    }

    /// The earliest offset still held.
    pub(crate) fn earliest(&self) -> Offset {
        match lock(&self.segments).front() {
            Some(first) => self.first_offset(first.index),
            None => Offset(self.appended.get()),
        }
    }

    /// Makes the shard fail, once: the first cause stays.
    pub(crate) fn fail(&self, cause: FailureCause) {
        let failure = ShardFailure { shard: self.shard, cause };
        tracing::error!(shard = self.shard.0, %failure, "a shard failed");
        // A second failure is a consequence of the first and says less.
        if self.failure.set(failure).is_ok() {
            self.failed.store(true, Ordering::SeqCst);
        }
    }

    /// Why the shard failed, if it did.
    #[inline]
    pub(crate) fn failure(&self) -> Option<&ShardFailure> {
        if self.failed.load(Ordering::SeqCst) { self.failure.get() } else { None }
    }
}
