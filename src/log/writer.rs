//! Appends records to a shard's current segment. One writer: the owning shard.
//!
//! No function here waits. If the current segment is full and the keeper has not provided the next one, the result is
//! [`Refused::NeedsSegment`], and the shard retries in a later turn.

use std::sync::Arc;

use crossbeam::queue::ArrayQueue;

use crate::event::{Encode, Offset, Scratch, Time, has_one_size};
use crate::log::format::{HEADER_BYTES, RECORD_HEADER_BYTES, RecordHeader, SegmentHeader};
use crate::log::seal::SIDE_BY_SIDE;
use crate::log::seal::seal;
use crate::log::segment::{Segment, ShardLog};
use crate::storage::memory::{ALIGN, padded};
use crate::storage::memory::{Memory, WriteHalf, archive};
use crate::sync::prefetch;

/// A segment that is ready to be written: named, allocated, mostly prefaulted, and with an empty header.
#[derive(Debug)]
pub(crate) struct Prepared {
    pub(crate) index: u64,
    pub(crate) salt: u32,
    pub(crate) memory: Memory,
}

/// The queue of segments from the keeper to the writer.
pub(crate) type PreparedQueue = ArrayQueue<Prepared>;

/// The reason why an event was not appended. The log is unchanged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refused {
    /// No segment with enough space is available yet.
    NeedsSegment,
    /// The archive is larger than the limit.
    TooLarge {
        /// The limit in bytes.
        bytes_max: usize,
    },
}

/// The position at which a recovered or new log continues.
#[derive(Debug)]
pub(crate) struct Resume {
    pub(crate) segment: Option<(Segment, WriteHalf)>,
    pub(crate) next_index: u64,
    pub(crate) sequence: u64,
    /// The end of the durable log according to the log's own marks.
    pub(crate) marked: u64,
}

/// The only writer of a shard's log.
#[derive(Debug)]
pub(crate) struct Writer {
    log: Arc<ShardLog>,
    prepared: Arc<PreparedQueue>,
    current: Option<Current>,
    next_index: u64,
    /// Sequence of the next event.
    sequence: u64,
    schema: u32,
    event_bytes_max: usize,
    scratch: Scratch,
    /// Scratch space for archives that are made only to measure them.
    trial: Option<Box<[u8]>>,
    /// The end of the durable log, as recorded in the last mark.
    marked: u64,
    /// The time at which the last mark was written.
    marked_at: u64,
    /// The end of the last record that is not a mark.
    events_end: u64,
    rolled: bool,
}

/// The segment being written.
#[derive(Debug)]
struct Current {
    half: WriteHalf,
    base: u64,
    salt: u32,
}

/// The number of records sealed together, with CRCs computed side by side. Sealing a record right after storing it
/// would be slower, because the CRC would wait for the stores.
pub(crate) const GROUP: usize = 4 * SIDE_BY_SIDE;

/// The prefetch distance ahead of the next record, in bytes. Each record prefetches two cache lines. Stores become
/// visible in order, so a store to a line that is not in the cache holds up all stores after it.
const PREFETCH_AHEAD_BYTES: usize = 2048;

/// Appends records to one segment. Its state is local: the compiler can keep it in registers instead of reloading it
/// after every store.
pub(crate) struct Appender<'a, 's> {
    /// The segment from its first unsealed record on.
    open: &'a mut [u8],
    /// The offset of the beginning of `open`.
    begin: u64,
    /// The number of staged bytes in `open`.
    at: usize,
    salt: u32,
    event_bytes_max: usize,
    scratch: &'a mut Scratch,
    staged: &'s mut Group,
    staged_len: usize,
}

/// The exact lengths of staged records, which are appended but not yet sealed. Kept outside the [`Appender`], because
/// the address of this array is taken.
pub(crate) type Group = [u32; GROUP];

/// An appended event, in place in the log.
pub(crate) struct Appended<'o, T> {
    pub(crate) event: &'o T,
    /// The exact length of its record.
    pub(crate) len: usize,
}

impl Appender<'_, '_> {
    /// Returns the offset of the next record.
    #[inline(always)]
    pub(crate) fn offset(&self) -> Offset {
        Offset(self.begin + self.at as u64)
    }

    /// Archives `event` after `header`. The record is sealed, and so becomes part of the log, when the first event
    /// after its group is appended, or by [`Appender::finish`]. If the thread panics before that, the record leaves no
    /// trace.
    ///
    /// Always inlined, which keeps the header out of memory: storing its 2-byte fields and then loading them as one
    /// word would wait until all earlier stores have reached the cache (a third of the total time).
    #[inline(always)]
    pub(crate) fn append<E: Encode>(
        &mut self,
        header: &RecordHeader,
        event: &E,
    ) -> Result<Appended<'_, E::Archived>, Refused> {
        if self.staged_len == GROUP {
            self.seal();
        }
        let out = &mut self.open[self.at..];
        if let Some(ahead) = out.get(PREFETCH_AHEAD_BYTES..PREFETCH_AHEAD_BYTES + 65) {
            prefetch(&ahead[0]);
            prefetch(&ahead[64]);
        }
        let room = out.len();
        match archive(event, out, self.event_bytes_max, self.scratch) {
            Some((head, event, len)) => {
                header.stage(head);
                let len = RECORD_HEADER_BYTES + len;
                self.at += padded(len);
                self.staged[self.staged_len] = len as u32;
                self.staged_len += 1;
                Ok(Appended { event, len })
            }
            None if room >= RECORD_HEADER_BYTES + self.event_bytes_max => {
                Err(Refused::TooLarge { bytes_max: self.event_bytes_max })
            }
            None => Err(Refused::NeedsSegment),
        }
    }

    /// Appends a record whose body is not an archive.
    pub(crate) fn append_bytes(&mut self, header: &RecordHeader, body: &[u8]) -> Result<(), Refused> {
        if self.staged_len == GROUP {
            self.seal();
        }
        let len = RECORD_HEADER_BYTES + body.len();
        let out = self.open[self.at..].get_mut(..padded(len)).ok_or(Refused::NeedsSegment)?;
        let (head, rest) = out.split_first_chunk_mut().ok_or(Refused::NeedsSegment)?;
        header.stage(head);
        rest[..body.len()].copy_from_slice(body);
        rest[body.len()..].fill(0);
        self.at += padded(len);
        self.staged[self.staged_len] = len as u32;
        self.staged_len += 1;
        Ok(())
    }

    /// Seals the staged records, after writing an end word after the last one.
    #[inline(always)]
    fn seal(&mut self) {
        let (group, open) = std::mem::take(&mut self.open).split_at_mut(self.at);
        if let Some(end) = open.get_mut(..4) {
            end.fill(0);
        }
        seal(self.salt, group, &self.staged[..self.staged_len]);
        self.open = open;
        self.begin += self.at as u64;
        (self.at, self.staged_len) = (0, 0);
    }

    /// Seals the last records. Everything below the returned offset is complete; pass it to [`Writer::advance`].
    #[inline(always)]
    pub(crate) fn finish(mut self) -> Offset {
        self.seal();
        self.offset()
    }
}

/// The shortest interval between two marks, in ns.
const MARK_EVERY_NS: u64 = 1_000_000;

impl Writer {
    pub(crate) fn new(
        log: Arc<ShardLog>,
        prepared: Arc<PreparedQueue>,
        resume: Resume,
        schema: u32,
        event_bytes_max: usize,
    ) -> Self {
        let events_end = if resume.segment.is_some() { log.appended.get() } else { 0 };
        let current = resume.segment.map(|(segment, half)| Current {
            half,
            base: segment.index * log.segment_bytes,
            salt: segment.salt,
        });
        Self {
            log,
            prepared,
            current,
            next_index: resume.next_index,
            sequence: resume.sequence,
            schema,
            event_bytes_max,
            scratch: Scratch::new(4 * event_bytes_max.max(1024)),
            trial: None,
            marked: resume.marked,
            marked_at: 0,
            events_end,
            rolled: false,
        }
    }

    /// Returns an appender for the current segment. Without a current segment, nothing fits.
    #[inline]
    pub(crate) fn appender<'a, 's>(&'a mut self, staged: &'s mut Group) -> Appender<'a, 's> {
        let (open, begin, salt) = match &mut self.current {
            Some(current) => {
                let begin = current.base + current.half.at() as u64;
                (current.half.tail(), begin, current.salt)
            }
            None => (&mut [][..], 0, 0),
        };
        Appender {
            open,
            begin,
            at: 0,
            salt,
            event_bytes_max: self.event_bytes_max,
            scratch: &mut self.scratch,
            staged,
            staged_len: 0,
        }
    }

    /// Accounts for the records of an appender: `events` events, and everything below `end`, including the log's own
    /// records. Readers see them after [`Writer::publish`].
    #[inline]
    pub(crate) fn advance(&mut self, end: Offset, events: u64) {
        if let Some(current) = &mut self.current {
            let at = current.half.at();
            current.half.skip((end.0 - current.base) as usize - at);
        }
        self.sequence += events;
        self.events_end = end.0;
    }

    /// Moves to the next segment. The old segment ends with a zero word, or has too little space left for a header.
    #[cold]
    pub(crate) fn roll(&mut self, now: Time) -> Result<(), Refused> {
        let prepared = self.prepared.pop().ok_or(Refused::NeedsSegment)?;
        assert_eq!(prepared.index, self.next_index, "the keeper prepares segments in order");
        let (mut previous_end, mut previous_salt) = (Offset(0), 0);
        if let Some(full) = &mut self.current {
            full.half.publish();
            (previous_end, previous_salt) = (Offset(full.base + full.half.at() as u64), full.salt);
        }
        let mut half = WriteHalf::new(prepared.memory, 0);
        let header = SegmentHeader {
            schema: self.schema,
            shard: self.log.shard,
            index: prepared.index,
            segment_bytes: self.log.segment_bytes,
            previous_end,
            previous_salt,
            first_sequence: self.sequence,
            created: now,
            salt: prepared.salt,
        };
        let tail = half.tail();
        // The end word is stored before the header: a reader that sees the header then finds the end of the segment.
        tail[HEADER_BYTES..HEADER_BYTES + 4].fill(0);
        header.encode(tail);
        half.skip(HEADER_BYTES);
        half.publish();
        self.log.push_segment(Segment {
            index: prepared.index,
            seam: header.seam(),
            salt: prepared.salt,
            memory: Arc::clone(half.memory()),
        });
        self.current = Some(Current { half, base: prepared.index * self.log.segment_bytes, salt: prepared.salt });
        self.next_index += 1;
        self.rolled = true;
        Ok(())
    }

    /// Records in the log how much of it is durable. From this, recovery can tell damage to durable bytes from a tail
    /// that was never durable. Writes a mark at most once per millisecond.
    #[inline]
    pub(crate) fn mark(&mut self, now: u64, time: Time) {
        if now.saturating_sub(self.marked_at) >= MARK_EVERY_NS && self.has_news() {
            self.mark_now(time);
            self.marked_at = now;
        }
    }

    /// Returns `true` if events, or part of an event, have become durable since the last mark.
    fn has_news(&self) -> bool {
        self.log.durable.get().min(self.events_end) > self.marked
    }

    /// Returns `true` if everything is synced, no mark says so yet, and there is space for a mark. Checked by an idle
    /// shard; returns `true` once each time the shard becomes idle.
    #[inline]
    pub(crate) fn wants_idle_mark(&self) -> bool {
        let room = || self.current.as_ref().map_or(0, |current| current.half.memory().len() - current.half.at());
        self.events_end > self.marked && self.log.durable.get() >= self.events_end && room() >= RECORD_HEADER_BYTES
    }

    /// Writes a mark if any event has become durable since the last one. Returns `false` if there is nothing to mark or
    /// no space for it. The mark becomes visible, and is synced, with the next published records.
    #[cold]
    pub(crate) fn mark_now(&mut self, time: Time) -> bool {
        let durable = self.log.durable.get();
        let room = self.current.as_mut().map(|current| current.half.tail().len());
        if !self.has_news() || room.is_none_or(|room| room < RECORD_HEADER_BYTES && self.roll(time).is_err()) {
            return false;
        }
        let mut staged = [0; GROUP];
        let mut appender = self.appender(&mut staged);
        let marked = appender.append_bytes(&RecordHeader::mark(durable, time), &[]);
        debug_assert!(marked.is_ok(), "there is room for a mark");
        let end = appender.finish();
        let events_end = self.events_end;
        self.advance(end, 0);
        // A mark describes the records before it, and needs no mark itself.
        self.events_end = events_end;
        self.marked = durable;
        true
    }

    /// Publishes everything appended to readers and the syncer.
    #[inline]
    pub(crate) fn publish(&mut self) -> u64 {
        let Some(current) = &mut self.current else { return self.log.appended.get() };
        current.half.publish();
        let end = current.base + current.half.at() as u64;
        self.log.sequence.publish(self.sequence);
        self.log.appended.publish(end);
        end
    }

    /// Returns the bytes left in the current segment.
    pub(crate) fn room(&mut self) -> usize {
        self.current.as_mut().map_or(0, |current| current.half.tail().len())
    }

    /// Returns the bytes available for records in a new segment.
    pub(crate) fn room_of_a_segment(&self) -> usize {
        self.log.segment_bytes as usize - HEADER_BYTES
    }

    /// Returns the largest archive of one event in bytes.
    pub(crate) fn event_bytes_max(&self) -> usize {
        self.event_bytes_max
    }

    /// Returns the length of the archive of `event`, or `usize::MAX` if it is longer than an event may be.
    pub(crate) fn measure<E: Encode>(&mut self, event: &E) -> usize {
        if has_one_size::<E>() {
            return size_of::<E::Archived>();
        }
        let trial = self.trial.get_or_insert_with(|| vec![0; self.event_bytes_max + ALIGN].into());
        let skip = trial.as_ptr().align_offset(ALIGN);
        event.encode(&mut trial[skip..skip + self.event_bytes_max], &mut self.scratch).unwrap_or(usize::MAX)
    }

    /// Returns `true` if the keeper has provided the next segment.
    pub(crate) fn segment_ready(&self) -> bool {
        !self.prepared.is_empty()
    }

    /// Returns `true` if a segment was begun since the last call.
    #[inline]
    pub(crate) fn take_rolled(&mut self) -> bool {
        std::mem::take(&mut self.rolled)
    }

    /// Returns the sequence of the next event.
    #[inline]
    pub(crate) fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Returns the first offset of the current segment, and its memory.
    #[inline]
    pub(crate) fn current_memory(&self) -> Option<(u64, &Arc<Memory>)> {
        self.current.as_ref().map(|current| (current.base, current.half.memory()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::envelope::Envelope;
    use crate::event::{Correlation, EventTypeId, Key, Version};
    use crate::log::format::{RecordAt, record_at};
    use crate::storage::memory::Heap;

    /// Events of a type with one archive size take a separate code path.
    #[test]
    fn an_event_of_one_size_is_padded_and_refused_like_any_other() {
        let header = RecordHeader::mark(16, Time(1));
        let bytes = 4 * padded(RECORD_HEADER_BYTES + 21);
        let mut half = WriteHalf::new(Memory::heap(Arc::new(Heap::new(vec![0xff; bytes]))), 0);
        let (mut scratch, mut staged) = (Scratch::new(16), [0; GROUP]);
        let mut appender = Appender {
            open: half.tail(),
            begin: 0,
            at: 0,
            salt: 7,
            event_bytes_max: 24,
            scratch: &mut scratch,
            staged: &mut staged,
            staged_len: 0,
        };
        let event = [0x55_u8; 21];
        assert_eq!(appender.append(&header, &[0_u64; 4]).err(), Some(Refused::TooLarge { bytes_max: 24 }));
        for _ in 0..4 {
            let appended = appender.append(&header, &event).expect("there is room");
            assert_eq!((appended.event, appended.len), (&event, RECORD_HEADER_BYTES + 21));
        }
        assert_eq!(appender.append(&header, &event).err(), Some(Refused::NeedsSegment));
        assert_eq!(appender.finish(), Offset(bytes as u64));
        for record in half.tail().chunks(bytes / 4) {
            assert_eq!(record_at(record, 7), RecordAt::Record(RECORD_HEADER_BYTES + 21));
            assert!(record[RECORD_HEADER_BYTES + 21..].iter().all(|&byte| byte == 0));
        }
    }

    /// Old bytes must show neither after an archive of odd length nor after the last record.
    #[test]
    fn records_are_complete_padded_with_zeros_and_followed_by_an_end_word() {
        let mut half = WriteHalf::new(Memory::heap(Arc::new(Heap::new(vec![0xff; 1 << 16]))), 0);
        let header = |i: u64| RecordHeader {
            time: Time(i),
            key: Key(i),
            previous: Offset(0),
            event_type: EventTypeId(1),
            correlation: Correlation(0),
            version: Version(1),
            schema_version: 1,
            more: false,
        };
        let said = |chars| Envelope::new("said", 1, &format!("\"{}\"", "x".repeat(chars))).expect("it is JSON");
        // Two full groups and an incomplete one.
        let count = 2 * GROUP as u64 + 5;
        let (mut scratch, mut staged) = (Scratch::new(1 << 14), [0; GROUP]);
        let mut appender = Appender {
            open: half.tail(),
            begin: 0,
            at: 0,
            salt: 7,
            event_bytes_max: 1 << 10,
            scratch: &mut scratch,
            staged: &mut staged,
            staged_len: 0,
        };
        let mut lens = Vec::new();
        for i in 0..count {
            lens.push(appender.append(&header(i), &said(i as usize)).expect("there is room").len);
        }
        appender.append_bytes(&header(count), &[]).expect("there is room");
        lens.push(RECORD_HEADER_BYTES);
        assert_eq!(appender.append(&header(0), &said(2000)).err(), Some(Refused::TooLarge { bytes_max: 1 << 10 }));
        let end = appender.finish();
        let (bytes, mut at) = (half.tail(), 0);
        for (i, len) in lens.into_iter().enumerate() {
            assert_eq!(record_at(&bytes[at..], 7), RecordAt::Record(len), "number {i}");
            assert_eq!(RecordHeader::decode(&bytes[at..]), header(i as u64));
            assert!(bytes[at + len..at + padded(len)].iter().all(|&byte| byte == 0), "number {i}");
            at += padded(len);
        }
        assert_eq!(end, Offset(at as u64));
        assert_eq!(record_at(&bytes[at..], 7), RecordAt::End);
    }
}
