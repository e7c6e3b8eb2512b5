//! Appends records to a shard's current segment. One writer: the owning shard.
//!
//! Nothing here waits: when the current segment is full and the keeper has not handed over the next,
//! the answer is [`Refused::NeedsSegment`], and the shard tries again in a later turn.

use crossbeam::queue::ArrayQueue;

use crate::event::{Encode, Key, Offset, Scratch, Time, Version};
use crate::event::Correlation;
use crate::log::format::{HEADER_BYTES, MARK, RECORD_HEADER_BYTES, RecordHeader, SegmentHeader, padded, seal};
use crate::log::mmap::{Memory, WriteHalf};
use crate::log::segment::{Segment, ShardLog};
use crate::sync::Arc;

/// A segment that is ready to be written: named, allocated, blank-headed and (mostly) prefaulted.
#[derive(Debug)]
pub(crate) struct Prepared {
    pub(crate) index: u64,
    pub(crate) salt: u32,
    pub(crate) memory: Memory,
}

/// Where the keeper leaves what the writer takes.
pub(crate) type PreparedQueue = ArrayQueue<Prepared>;

/// Why an event was not appended. The log is as before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refused {
    /// There is no segment with room yet.
    NeedsSegment,
    /// The archive exceeds the limit.
    TooLarge {
        /// The limit.
        bytes_max: usize,
    },
}

/// The position a recovered (or new) log is written at.
#[derive(Debug)]
pub(crate) struct Resume {
    pub(crate) segment: Option<(Segment, WriteHalf)>,
    pub(crate) next_index: u64,
    pub(crate) sequence: u64,
    /// Up to where the log's own marks say it is durable.
    pub(crate) marked: u64,
}

/// The one writer of a shard's log.
#[derive(Debug)]
pub(crate) struct Writer {
    log: Arc<ShardLog>,
    prepared: std::sync::Arc<PreparedQueue>,
    current: Option<Current>,
    next_index: u64,
    /// Sequence of the next event.
    sequence: u64,
    schema: u32,
    event_bytes_max: usize,
    scratch: Scratch,
    /// Up to where the last mark said the log was durable, and when it was written.
    marked: u64,
    marked_at: u64,
    rolled: bool,
}

/// The segment being written.
#[derive(Debug)]
struct Current {
    half: WriteHalf,
    base: u64,
    salt: u32,
    /// Records whose CRC and length word are still to be written: (position, exact length).
    staged: [(usize, usize); GROUP],
    staged_len: usize,
}

/// Records are sealed in groups of this many: a CRC that reads what was stored only just now waits for
/// the store, and a few records later it does not (a quarter more throughput).
const GROUP: usize = 4;

impl Current {
    fn new(half: WriteHalf, base: u64, salt: u32) -> Self {
        Self { half, base, salt, staged: [(0, 0); GROUP], staged_len: 0 }
    }

    /// Completes the record whose body stands behind the position, but for its CRC and length word.
    #[inline]
    fn stage(&mut self, header: &RecordHeader, len: usize) {
        let at = self.half.at();
        let advance = padded(len);
        header.stage(&mut self.half.tail()[..advance], len);
        self.half.skip(advance);
        self.staged[self.staged_len] = (at, len);
        self.staged_len += 1;
        if self.staged_len == GROUP {
            self.seal_staged();
        }
    }

    /// Writes what staged records lack, in order, with an end behind them first.
    #[inline]
    fn seal_staged(&mut self) {
        if let Some(end) = self.half.tail().get_mut(..4) {
            end.fill(0);
        }
        for &(at, len) in &self.staged[..self.staged_len] {
            seal(self.half.unpublished(at, len), len, self.salt);
            self.half.store_length(at, len as u32);
        }
        self.staged_len = 0;
    }
}

/// At least this long (ns) lies between two marks.
const MARK_EVERY_NS: u64 = 1_000_000;

impl Writer {
    pub(crate) fn new(log: Arc<ShardLog>, prepared: std::sync::Arc<PreparedQueue>, resume: Resume, schema: u32, event_bytes_max: usize) -> Self {
        let current = resume.segment.map(|(segment, half)| Current::new(half, segment.index * log.segment_bytes, segment.salt));
        Self {
            log,
            prepared,
            current,
            next_index: resume.next_index,
            sequence: resume.sequence,
            schema,
            event_bytes_max,
            scratch: Scratch::new(4 * event_bytes_max.max(1024)),
            marked: resume.marked,
            marked_at: 0,
            rolled: false,
        }
    }

    /// Archives `event` behind `header` into the log. Visible to readers after [`Writer::publish`].
    #[inline]
    pub(crate) fn append<E: Encode>(&mut self, header: &RecordHeader, event: &E) -> Result<(Offset, usize), Refused> {
        if self.current.is_none() {
            self.roll(header.time)?;
        }
        loop {
            let Some(current) = &mut self.current else { return Err(Refused::NeedsSegment) };
            let tail = current.half.tail();
            let room = tail.len().saturating_sub(RECORD_HEADER_BYTES).min(self.event_bytes_max);
            let body = tail.get_mut(RECORD_HEADER_BYTES..RECORD_HEADER_BYTES + room);
            match body.and_then(|body| event.encode(body, &mut self.scratch)) {
                Some(bytes) => {
                    let len = RECORD_HEADER_BYTES + bytes;
                    let offset = Offset(current.base + current.half.at() as u64);
                    current.stage(header, len);
                    self.sequence += 1;
                    return Ok((offset, len));
                }
                None if room >= self.event_bytes_max => return Err(Refused::TooLarge { bytes_max: self.event_bytes_max }),
                None => self.roll(header.time)?,
            }
        }
    }

    /// Goes over to the next segment. The old one ends with a zero word or too little room for a header.
    #[cold]
    fn roll(&mut self, now: Time) -> Result<(), Refused> {
        let prepared = self.prepared.pop().ok_or(Refused::NeedsSegment)?;
        assert_eq!(prepared.index, self.next_index, "the keeper prepares segments in order");
        if let Some(full) = &mut self.current {
            full.seal_staged();
            full.half.publish();
        }
        let first_offset = self.log.first_offset(prepared.index);
        let mut half = WriteHalf::new(prepared.memory, 0);
        let header = SegmentHeader {
            schema: self.schema,
            shard: self.log.shard,
            index: prepared.index,
            segment_bytes: self.log.segment_bytes,
            first_offset,
            first_sequence: self.sequence,
            created: now,
            salt: prepared.salt,
        };
        let tail = half.tail();
        header.encode(tail);
        tail[HEADER_BYTES..HEADER_BYTES + 4].fill(0);
        half.skip(HEADER_BYTES);
        half.publish();
        self.log.push_segment(Segment {
            index: prepared.index,
            first_sequence: self.sequence,
            salt: prepared.salt,
            memory: std::sync::Arc::clone(half.memory()),
        });
        self.current = Some(Current::new(half, prepared.index * self.log.segment_bytes, prepared.salt));
        self.next_index += 1;
        self.rolled = true;
        Ok(())
    }

    /// Notes in the log itself up to where it had been synced: the evidence by which recovery tells
    /// damage to durable bytes from a tail that never was. Written at most once a millisecond.
    #[inline]
    pub(crate) fn mark(&mut self, now: u64, time: Time) {
        if now.saturating_sub(self.marked_at) >= MARK_EVERY_NS && self.log.durable.get() > self.marked {
            self.mark_now(time);
            self.marked_at = now;
        }
    }

    /// Writes a mark if anything was synced since the last; `false` where there is no room for it.
    #[cold]
    pub(crate) fn mark_now(&mut self, time: Time) -> bool {
        let durable = self.log.durable.get();
        let room = self.current.as_mut().map(|current| current.half.tail().len());
        if durable <= self.marked || room.is_none_or(|room| room < RECORD_HEADER_BYTES && self.roll(time).is_err()) {
            return false;
        }
        let Some(current) = &mut self.current else { return false };
        let header = RecordHeader {
            time,
            key: Key(durable),
            previous: Offset(0),
            event_type: MARK,
            correlation: Correlation(0),
            version: Version(0),
            schema_version: 0,
        };
        current.stage(&header, RECORD_HEADER_BYTES);
        self.marked = durable;
        true
    }

    /// Lets readers and the syncer see everything appended so far.
    #[inline]
    pub(crate) fn publish(&mut self) -> u64 {
        let Some(current) = &mut self.current else { return self.log.appended.get() };
        current.seal_staged();
        current.half.publish();
        let end = current.base + current.half.at() as u64;
        self.log.sequence.publish(self.sequence);
        self.log.appended.publish(end);
        end
    }

    /// Whether the keeper has handed over the next segment.
    pub(crate) fn segment_ready(&self) -> bool {
        !self.prepared.is_empty()
    }

    /// Whether a segment was begun since this was last asked.
    #[inline]
    pub(crate) fn take_rolled(&mut self) -> bool {
        std::mem::take(&mut self.rolled)
    }

    /// Sequence of the next event.
    #[inline]
    pub(crate) fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Bytes `[offset, offset + len)` of a record in the current segment, as this writer appended them.
    #[inline]
    pub(crate) fn current_memory(&self) -> Option<(u64, &std::sync::Arc<Memory>)> {
        self.current.as_ref().map(|current| (current.base, current.half.memory()))
    }
}

