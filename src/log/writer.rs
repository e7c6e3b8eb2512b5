//! Appends records to a shard's current segment. One writer: the owning shard.
//!
//! Nothing here waits: when the current segment is full and the keeper has not handed over the next,
//! the answer is [`Refused::NeedsSegment`], and the shard tries again in a later turn.

use std::sync::Arc;

use crossbeam::queue::ArrayQueue;

use crate::event::{Encode, Offset, Scratch, Time, has_one_size};
use crate::log::format::{HEADER_BYTES, RECORD_HEADER_BYTES, RecordHeader, SegmentHeader};
use crate::log::seal::LANES;
use crate::log::seal::seal;
use crate::log::segment::{Segment, ShardLog};
use crate::storage::memory::{ALIGN, padded};
use crate::storage::memory::{Memory, WriteHalf, archive};
use crate::sync::prefetch;

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
    prepared: Arc<PreparedQueue>,
    current: Option<Current>,
    next_index: u64,
    /// Sequence of the next event.
    sequence: u64,
    schema: u32,
    event_bytes_max: usize,
    scratch: Scratch,
    /// Where archives are made to see how long they are.
    trial: Option<Box<[u8]>>,
    /// Up to where the last mark said the log was durable, and when it was written.
    marked: u64,
    marked_at: u64,
    /// Where the last record ends that is no mark.
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

/// Records are sealed in groups of this many: their sums are computed side by side, and a CRC that reads what
/// was stored only just now would wait for the store.
pub(crate) const GROUP: usize = 4 * LANES;

/// So far behind the next record the segment's memory is brought near, two lines with each record: stores become visible in
/// order, so one to a line that is not there yet holds up all that follow it.
const NEAR_BYTES: usize = 2048;

/// The appending of a run of records to one segment. All its state is local to the run: what the
/// compiler can keep in registers need not be read again after every byte stored.
pub(crate) struct Appender<'a, 's> {
    /// The segment from the first record on that is not sealed.
    open: &'a mut [u8],
    /// Offset of its beginning.
    begin: u64,
    /// Bytes of it that are staged.
    at: usize,
    salt: u32,
    event_bytes_max: usize,
    scratch: &'a mut Scratch,
    staged: &'s mut Group,
    staged_len: usize,
}

/// The exact lengths of records that are staged: appended and not yet sealed. Apart from the [`Appender`], for its address is taken.
pub(crate) type Group = [u32; GROUP];

/// An event that was appended, as it lies in the log.
pub(crate) struct Appended<'o, T> {
    pub(crate) event: &'o T,
    /// The record's exact length.
    pub(crate) len: usize,
}

impl Appender<'_, '_> {
    /// Where the next record begins.
    #[inline(always)]
    pub(crate) fn offset(&self) -> Offset {
        Offset(self.begin + self.at as u64)
    }

    /// Archives `event` behind `header`. It is sealed, and so becomes part of the log, with the appending of the first event
    /// after its group, or with [`Appender::finish`]: until then a panic leaves nothing of it.
    ///
    /// Always inlined, so that the header never takes the way over memory: its 2-byte fields, stored and then
    /// loaded as one word, would wait until every store before them has reached the cache (a third of all time).
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
        if let Some(ahead) = out.get(NEAR_BYTES..NEAR_BYTES + 65) {
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

    /// Appends a record without a body.
    pub(crate) fn append_empty(&mut self, header: &RecordHeader) -> Result<(), Refused> {
        if self.staged_len == GROUP {
            self.seal();
        }
        let head = self.open[self.at..].first_chunk_mut().ok_or(Refused::NeedsSegment)?;
        header.stage(head);
        self.at += RECORD_HEADER_BYTES;
        self.staged[self.staged_len] = RECORD_HEADER_BYTES as u32;
        self.staged_len += 1;
        Ok(())
    }

    /// Makes records of what is staged, with an end behind them first.
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

    /// Ends the run: everything below the position returned, which is for [`Writer::advance`], is whole.
    #[inline(always)]
    pub(crate) fn finish(mut self) -> Offset {
        self.seal();
        self.offset()
    }
}

/// At least this long (ns) lies between two marks.
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

    /// To append to the current segment; where there is none, nothing fits.
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

    /// Takes over what an appender has written: `events` events, and everything below `end`, the log's own records included. Visible to readers
    /// after [`Writer::publish`].
    #[inline]
    pub(crate) fn advance(&mut self, end: Offset, events: u64) {
        if let Some(current) = &mut self.current {
            let at = current.half.at();
            current.half.skip((end.0 - current.base) as usize - at);
        }
        self.sequence += events;
        self.events_end = end.0;
    }

    /// Goes over to the next segment. The old one ends with a zero word or too little room for a header.
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
        // The end before the head: whoever sees the segment begun finds it ended.
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

    /// Notes in the log itself up to where it had been synced: the evidence by which recovery tells
    /// damage to durable bytes from a tail that never was. Written at most once a millisecond.
    #[inline]
    pub(crate) fn mark(&mut self, now: u64, time: Time) {
        if now.saturating_sub(self.marked_at) >= MARK_EVERY_NS && self.has_news() {
            self.mark_now(time);
            self.marked_at = now;
        }
    }

    /// Whether an event, or a part of one, was synced that no mark tells of.
    fn has_news(&self) -> bool {
        self.log.durable.get().min(self.events_end) > self.marked
    }

    /// Whether everything is synced and the log does not say so, though there is room. Looked at by a shard that has
    /// nothing else to do; true once for each time it comes to rest.
    #[inline]
    pub(crate) fn wants_idle_mark(&self) -> bool {
        let room = || self.current.as_ref().map_or(0, |current| current.half.memory().len() - current.half.at());
        self.events_end > self.marked && self.log.durable.get() >= self.events_end && room() >= RECORD_HEADER_BYTES
    }

    /// Writes a mark if any event was synced since the last; `false` where there is no room for it. It becomes visible,
    /// and is synced, together with what is published next.
    #[cold]
    pub(crate) fn mark_now(&mut self, time: Time) -> bool {
        let durable = self.log.durable.get();
        let room = self.current.as_mut().map(|current| current.half.tail().len());
        if !self.has_news() || room.is_none_or(|room| room < RECORD_HEADER_BYTES && self.roll(time).is_err()) {
            return false;
        }
        let mut staged = [0; GROUP];
        let mut appender = self.appender(&mut staged);
        let marked = appender.append_empty(&RecordHeader::mark(durable, time));
        debug_assert!(marked.is_ok(), "there is room for a mark");
        let end = appender.finish();
        let events_end = self.events_end;
        self.advance(end, 0);
        // A mark tells of what lies before it, and nothing has to tell of a mark.
        self.events_end = events_end;
        self.marked = durable;
        true
    }

    /// Lets readers and the syncer see everything appended so far.
    #[inline]
    pub(crate) fn publish(&mut self) -> u64 {
        let Some(current) = &mut self.current else { return self.log.appended.get() };
        current.half.publish();
        let end = current.base + current.half.at() as u64;
        self.log.sequence.publish(self.sequence);
        self.log.appended.publish(end);
        end
    }

    /// Bytes left in the current segment.
    pub(crate) fn room(&mut self) -> usize {
        self.current.as_mut().map_or(0, |current| current.half.tail().len())
    }

    /// Bytes of records that a new segment holds.
    pub(crate) fn room_of_a_segment(&self) -> usize {
        self.log.segment_bytes as usize - HEADER_BYTES
    }

    /// Largest archive of one event.
    pub(crate) fn event_bytes_max(&self) -> usize {
        self.event_bytes_max
    }

    /// How long the archive of `event` is; `usize::MAX` where it is longer than an event may be.
    pub(crate) fn measure<E: Encode>(&mut self, event: &E) -> usize {
        if has_one_size::<E>() {
            return size_of::<E::Archived>();
        }
        let trial = self.trial.get_or_insert_with(|| vec![0; self.event_bytes_max + ALIGN].into());
        let skip = trial.as_ptr().align_offset(ALIGN);
        event.encode(&mut trial[skip..skip + self.event_bytes_max], &mut self.scratch).unwrap_or(usize::MAX)
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

    /// The current segment's first offset and its memory.
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

    /// Whose archive has one size is archived by another way than the rest.
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

    /// What stood there before must not show, neither behind an archive of odd length nor behind the last record.
    #[test]
    fn records_are_whole_padded_with_zeros_and_ended() {
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
        // More than two groups, the last one short.
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
        appender.append_empty(&header(count)).expect("there is room");
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
