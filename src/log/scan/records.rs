//! Reads the records of one shard in the order of the log, even while the log grows or retention frees its beginning.

use std::fs::File;
use std::io::ErrorKind;
use std::path::PathBuf;

use rkyv::util::AlignedVec;

use super::{LOOK_AGAIN, LOOKS_MAX, RecordPosition, Store, Unusable, io_error, read_up_to};
use crate::error::{Corruption, OpenError, ReadError};
use crate::event::{Meta, Offset, Sequence, ShardId};
use crate::log::format::{
    HEADER_BYTES, RECORD_BYTES_MAX, RECORD_HEADER_BYTES, RecordAt, RecordHeader, Seam, SegmentHeader, record_at,
};
use crate::log::manifest::{Span, segment_name};
use crate::storage::framed::u32_at;
use crate::storage::memory::{ALIGN, padded};

/// The default size of the buffer in bytes.
const BUFFER_BYTES: usize = 1 << 20;

/// Events that retention freed before they could be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct MissedEvents {
    /// The shard.
    pub shard: ShardId,
    /// The offset at which the next record would have been.
    pub from: Offset,
    /// The offset at which reading continued.
    pub until: Offset,
    /// The number of events in between.
    pub events: u64,
}

/// The valid records after a position in the log, up to the end of its segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Tail {
    /// The position.
    pub offset: Offset,
    /// The end of the last valid record; the position itself if there is none.
    pub end: Offset,
    /// The number of valid events.
    pub events: u64,
    /// `true` if a mark says that bytes after the position were synced.
    pub was_durable: bool,
}

/// One event, as stored in the log.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct ScannedRecord<'a> {
    /// The metadata of the event.
    pub meta: Meta,
    /// The archive of the event, with a verified CRC, at a multiple of 16. It still needs validation by bytecheck.
    pub body: &'a [u8],
}

impl ScannedRecord<'_> {
    /// Returns the position of the record, for [`super::Lookup`].
    #[must_use]
    pub fn place(&self) -> RecordPosition {
        let Meta { time, shard, offset, sequence, .. } = self.meta;
        // A record is never longer than its length word can express.
        let record_bytes = (RECORD_HEADER_BYTES + self.body.len()) as u32;
        RecordPosition { time, shard, offset, sequence, record_bytes }
    }
}

/// The segment being read.
#[derive(Debug)]
struct Current {
    file: File,
    path: PathBuf,
    header: SegmentHeader,
}

/// Reads the records of one shard in the order of the log. Each record is borrowed from the reader's buffer.
#[derive(Debug)]
pub struct Records {
    store: Store,
    shard: ShardId,
    current: Option<Current>,
    /// The segment being read or to be read next; `None` before the first.
    index: Option<u64>,
    /// The position in the segment, a multiple of 16.
    at: usize,
    /// The sequence of the next event; `None` before the first segment.
    sequence: Option<u64>,
    /// The end of the previous segment, which the next one must continue; `None` if the previous segment was not read
    /// to its end.
    continues: Option<Seam>,
    /// The largest durable offset that a mark has recorded.
    durable: u64,
    /// The offset at which a damaged segment was abandoned; `None` again once another segment is entered. `sequence` is
    /// the sequence at this offset.
    given_up_at: Option<Offset>,
    /// The offset at which a segment disappeared; `None` again once another segment is entered. `sequence` is the
    /// sequence at this offset.
    lost_at: Option<Offset>,
    until: Offset,
    gaps: Vec<MissedEvents>,
    buffer: AlignedVec<16>,
    buffer_bytes: usize,
    /// The position of the buffer's first byte in the segment: a multiple of 16, which aligns the bodies.
    buffer_at: usize,
    /// Called before every read from the disk.
    #[cfg(test)]
    pub(super) between_looks: BetweenLooks,
}

/// A test's callback between two reads from the disk.
#[cfg(test)]
#[derive(Default)]
pub(super) struct BetweenLooks(pub(super) std::cell::RefCell<Option<Box<dyn FnMut()>>>);

#[cfg(test)]
impl std::fmt::Debug for BetweenLooks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BetweenLooks").finish_non_exhaustive()
    }
}

/// The item at the position.
enum Look {
    Record(RecordHeader, usize),
    End,
    Damaged(&'static str),
}

impl Records {
    pub(super) fn new(store: &Store, shard: ShardId) -> Self {
        Self {
            store: store.clone(),
            shard,
            current: None,
            index: None,
            at: HEADER_BYTES,
            sequence: None,
            continues: None,
            durable: 0,
            given_up_at: None,
            lost_at: None,
            until: Offset(u64::MAX),
            gaps: Vec::new(),
            buffer: AlignedVec::new(),
            buffer_bytes: BUFFER_BYTES,
            buffer_at: 0,
            #[cfg(test)]
            between_looks: BetweenLooks::default(),
        }
    }

    /// Sets the size of the buffer, at least 4 KiB. Default: 1 MiB.
    #[must_use]
    pub fn buffered(mut self, bytes: usize) -> Self {
        self.buffer_bytes = bytes.max(4096).next_multiple_of(ALIGN);
        self
    }

    /// Ends the reader at `offset`, even if the log continues.
    #[must_use]
    pub fn until(mut self, offset: Offset) -> Self {
        self.until = offset;
        self
    }

    /// Returns the offset at which the next record is expected.
    #[must_use]
    pub fn offset(&self) -> Offset {
        Offset(self.index.unwrap_or(0) * self.store.segment_bytes() + self.at as u64)
    }

    /// Returns the sequence of the next event, or 0 before the first call of [`Records::next`].
    #[must_use]
    pub fn sequence(&self) -> Sequence {
        Sequence(self.sequence.unwrap_or(0))
    }

    /// Returns the ranges of events that retention freed before this reader reached them.
    #[must_use]
    pub fn gaps(&self) -> &[MissedEvents] {
        &self.gaps
    }

    /// Returns the next event, or `None` at the current end of the log. Later calls return events appended since.
    ///
    /// # Errors
    /// Returns `Corruption` if bytes are damaged or missing, or `Io`. The position does not move: the next call returns
    /// the same error (or the record, if the cause is gone), never a later event. [`Records::skip_segment`] continues
    /// after damage.
    #[expect(clippy::should_implement_trait, reason = "lends from the buffer, which `Iterator` cannot do")]
    pub fn next(&mut self) -> Result<Option<ScannedRecord<'_>>, ReadError> {
        let Some((header, len)) = self.step()? else { return Ok(None) };
        let start = self.at - self.buffer_at;
        let meta = header.meta(self.shard, self.offset(), self.sequence());
        self.at += padded(len);
        self.sequence = Some(meta.sequence.0 + 1);
        Ok(Some(ScannedRecord { meta, body: &self.buffer[start + RECORD_HEADER_BYTES..start + len] }))
    }

    /// Abandons the rest of a damaged segment and moves to the beginning of the next one. Returns `false` if there is
    /// no next segment.
    ///
    /// # Errors
    /// Returns the error of the file system, or that of a damaged span.
    pub fn skip_segment(&mut self) -> Result<bool, ReadError> {
        let span = self.span()?;
        let (Some(index), Some(span)) = (self.index, span) else { return Ok(false) };
        // Missing segments are skipped together: a damaged span can name more than can be checked one by one.
        let next = match self.store.segments_within(self.shard, index, span.last)?.first() {
            Some(first) if *first == index => Some(index + 1),
            first => first.copied(),
        };
        let here = self.offset();
        let Some(next) = next.filter(|next| *next <= span.last) else { return Ok(false) };
        self.stand_before(next);
        self.given_up_at.get_or_insert(here);
        Ok(true)
    }

    /// Searches for valid records after the position, up to the end of the segment. At the end of the log there are
    /// none, unless the log was torn or damaged. Reads the rest of the segment; the position does not move. If the log
    /// has grown meanwhile, no record is reported, because [`Records::next`] returns the new ones.
    ///
    /// # Errors
    /// Returns the error of the file system.
    pub fn tail(&mut self) -> Result<Tail, ReadError> {
        let home = self.at;
        self.forget_buffer();
        let found = self.look_behind();
        // The position does not move, even after an error.
        self.at = home;
        self.forget_buffer();
        let (tail, offset) = (found?, self.offset());
        // A writer commits in order: if it were still writing here, the record at the position would become valid
        // first. Bytes that were read after the file was written again do not belong to this segment.
        if matches!(self.look()?, Look::Record(..)) || !self.is_current()? {
            let was_durable = self.durable > offset.get();
            return Ok(Tail { offset, end: offset, events: 0, was_durable });
        }
        self.forget_buffer();
        Ok(tail)
    }

    /// Returns the valid records from the position on. Moves to the end of the segment.
    fn look_behind(&mut self) -> Result<Tail, ReadError> {
        let offset = self.offset();
        let mut tail = Tail { offset, end: offset, events: 0, was_durable: self.durable > offset.get() };
        let room = self.store.segment_bytes() as usize;
        while self.current.is_some() && room - self.at >= RECORD_HEADER_BYTES {
            if self.buffered_bytes() < RECORD_HEADER_BYTES && self.fill(RECORD_HEADER_BYTES)? < RECORD_HEADER_BYTES {
                break;
            }
            // Plausibility is checked before the checksum, because computing a CRC for every random length would take
            // too long.
            let seen = if self.is_plausible() { self.look_once()? } else { Look::End };
            match seen {
                Look::Record(header, len) => {
                    if header.is_mark() {
                        tail.was_durable |= header.key.get() > offset.get();
                    } else if !header.is_own() {
                        tail.events += 1;
                    }
                    self.at += padded(len);
                    tail.end = self.offset();
                }
                Look::End | Look::Damaged(_) => self.at += ALIGN,
            }
        }
        Ok(tail)
    }

    /// Returns `true` if the buffered bytes at the position could be the header of a record at this offset.
    fn is_plausible(&self) -> bool {
        let record = &self.buffer[self.at - self.buffer_at..];
        let len = u32_at(record, 0) as usize;
        if !(RECORD_HEADER_BYTES..=RECORD_BYTES_MAX).contains(&len) {
            return false;
        }
        let header = RecordHeader::decode(record);
        if header.is_outcome() {
            return self.store.may_hold(self.shard, header.key);
        }
        if header.is_own() {
            return len == RECORD_HEADER_BYTES && header.key.get() <= self.offset().get();
        }
        let first = header.previous.get() == 0;
        self.store.type_name(header.event_type).is_some()
            && self.store.may_hold(self.shard, header.key)
            && header.previous < self.offset()
            && header.version.get() > 0
            && first == (header.version.get() == 1)
    }

    /// Moves to the next event, past marks and ends of segments.
    fn step(&mut self) -> Result<Option<(RecordHeader, usize)>, ReadError> {
        loop {
            if (self.current.is_none() && !self.enter()?) || self.offset() >= self.until {
                return Ok(None);
            }
            match self.look()? {
                Look::Record(header, len) if header.is_mark() => {
                    if header.key.get() > self.offset().get() {
                        return Err(self.corruption("a mark refers to bytes after itself").into());
                    }
                    self.durable = self.durable.max(header.key.get());
                    self.at += padded(len);
                }
                Look::Record(header, len) if header.is_own() => self.at += padded(len),
                Look::Record(header, len) => return Ok(Some((header, len))),
                Look::End => {
                    if !self.leave()? {
                        return Ok(None);
                    }
                }
                Look::Damaged(why) => self.explain(why)?,
            }
        }
    }

    /// Returns the item at the position. Reads invalid bytes again before it reports damage.
    fn look(&mut self) -> Result<Look, ReadError> {
        let mut looks = 0;
        loop {
            let seen = self.look_once()?;
            looks += 1;
            if !matches!(seen, Look::Damaged(_)) || looks == LOOKS_MAX {
                return Ok(seen);
            }
            if looks > 1 {
                std::thread::sleep(LOOK_AGAIN);
            }
            self.forget_buffer();
        }
    }

    fn look_once(&mut self) -> Result<Look, ReadError> {
        let Some(current) = &self.current else { return Ok(Look::End) };
        let salt = current.header.salt;
        let room = self.store.segment_bytes() as usize - self.at;
        if room < RECORD_HEADER_BYTES {
            return Ok(Look::End);
        }
        let mut have = self.buffered_bytes();
        if have < RECORD_HEADER_BYTES {
            have = self.fill(RECORD_HEADER_BYTES)?;
        }
        if have < RECORD_HEADER_BYTES {
            return Ok(Look::Damaged("the file is shorter than a segment"));
        }
        let need = padded(u32_at(&self.buffer, self.at - self.buffer_at) as usize);
        if need > room.min(padded(RECORD_BYTES_MAX)) {
            return Ok(Look::Damaged("a record's length is out of range"));
        }
        if have < need && self.fill(need)? < need {
            return Ok(Look::Damaged("the file is shorter than a segment"));
        }
        let tail = &self.buffer[self.at - self.buffer_at..];
        Ok(match record_at(tail, salt) {
            RecordAt::Record(len) => Look::Record(RecordHeader::decode(tail), len),
            RecordAt::End => Look::End,
            RecordAt::Damaged(why) => Look::Damaged(why),
        })
    }

    fn forget_buffer(&mut self) {
        self.buffer.clear();
        // The buffer's position is reset too, because the reader may move back to the beginning of a segment.
        self.buffer_at = 0;
    }

    /// Returns the number of buffered bytes from the position on.
    fn buffered_bytes(&self) -> usize {
        (self.buffer_at + self.buffer.len()).saturating_sub(self.at)
    }

    /// Fills the buffer from the position on, with at least `need` bytes if the file has them. Returns the number of
    /// bytes read.
    fn fill(&mut self, need: usize) -> Result<usize, ReadError> {
        self.look_comes();
        let Some(current) = &self.current else { return Ok(0) };
        let room = self.store.segment_bytes() as usize - self.at;
        self.buffer.resize(self.buffer_bytes.max(need).min(room), 0);
        self.buffer_at = self.at;
        let read = read_up_to(&current.file, &mut self.buffer, self.at as u64);
        let read = read.map_err(|source| io_error(&current.path, source));
        // After an error, the buffer must not hold bytes that were not read from the file.
        self.buffer.resize(*read.as_ref().unwrap_or(&0), 0);
        read
    }

    /// Opens the segment to be read. Returns `false` if it has not been written yet.
    fn enter(&mut self) -> Result<bool, ReadError> {
        let mut looks = 0;
        loop {
            let Some(span) = self.span()? else { return Ok(false) };
            let index = match self.index {
                None => span.first,
                Some(index) if index < span.first => {
                    self.lose(span);
                    span.first
                }
                Some(index) => index,
            };
            if self.index != Some(index) {
                self.stand_before(index);
            }
            let why = match self.open(index)? {
                Some(Ok(current)) => {
                    self.begin(current)?;
                    return Ok(true);
                }
                Some(Err(Unusable::Blank)) if !self.used_behind(index, span.last)? => return Ok(false),
                Some(Err(Unusable::Blank)) => "the segment's header is blank, but a later segment holds records",
                Some(Err(Unusable::Damaged(why))) => why,
                None => "a segment of the span is missing",
            };
            // Since the span was read, the segment may have been freed, or begun together with the next one, so all
            // reads must agree.
            if self.span()?.is_some_and(|now| index < now.first) {
                continue;
            }
            if looks == LOOKS_MAX {
                return Err(self.corruption(why).into());
            }
            looks += 1;
            std::thread::sleep(LOOK_AGAIN);
        }
    }

    fn begin(&mut self, current: Current) -> Result<(), ReadError> {
        if self.lost_at.is_none()
            && let Some(why) = self.continues.and_then(|here| current.header.seam().breaks_after(&here))
        {
            return Err(self.corruption(why).into());
        }
        // A segment that was read to its end before it was freed is not a loss. Nor is a segment that was freed before
        // the first read.
        if let Some((from, sequence)) = self.lost_at.take().zip(self.sequence) {
            let events = current.header.first_sequence.saturating_sub(sequence);
            if events > 0 {
                self.gaps.push(MissedEvents { shard: self.shard, from, until: current.header.first_offset(), events });
            }
        }
        self.sequence = Some(current.header.first_sequence);
        (self.continues, self.given_up_at) = (None, None);
        self.at = HEADER_BYTES;
        self.forget_buffer();
        self.current = Some(current);
        Ok(())
    }

    fn stand_before(&mut self, index: u64) {
        self.current = None;
        self.index = Some(index);
        self.continues = None;
        self.at = HEADER_BYTES;
        self.forget_buffer();
    }

    /// Moves from the end of a segment to the next one. Returns `false` at the end of the log, and `true` if the caller
    /// must look again.
    fn leave(&mut self) -> Result<bool, ReadError> {
        let Some((index, salt)) = self.index.zip(self.current.as_ref().map(|current| current.header.salt)) else {
            return Ok(false);
        };
        let here = Seam { end: self.offset(), salt, sequence: self.sequence().0 };
        let mut looks = 0;
        loop {
            let next = self.open(index + 1)?;
            // Checked after reading the next segment, and so sees every record that was committed here before the
            // writer moved on.
            if self.has_grown()? {
                return Ok(true);
            }
            // Checked last: all these reads must have been of this segment.
            if !self.is_current()? {
                self.explain("the segment's header changed while it was being read")?;
                return Ok(true);
            }
            if let Some(Ok(next)) = next {
                match next.header.seam().breaks_after(&here) {
                    // The hole is reported here, at its offset; the next segment may be valid.
                    Some(why) => self.explain(why)?,
                    // Every event of this segment has been read, so later changes of its file do not matter.
                    None => {
                        self.stand_before(index + 1);
                        self.begin(next)?;
                    }
                }
                return Ok(true);
            }
            let Some(span) = self.span()? else { return Ok(false) };
            if index < span.first {
                self.lose(span);
                return Ok(true);
            }
            let is_blank = matches!(next, Some(Err(Unusable::Blank)));
            if index == span.last || (is_blank && !self.used_behind(index + 1, span.last)?) {
                return Ok(false);
            }
            // The next segment is being begun, freed, or damaged. A few reads settle this, and `enter` reports which.
            if looks == LOOKS_MAX {
                self.stand_before(index + 1);
                self.continues = Some(here);
                return Ok(true);
            }
            looks += 1;
            std::thread::sleep(LOOK_AGAIN);
        }
    }

    /// Returns `true` if there is now a record at the position.
    fn has_grown(&mut self) -> Result<bool, ReadError> {
        self.forget_buffer();
        Ok(!matches!(self.look_once()?, Look::End))
    }

    /// Returns `true` if the file was still this segment at the last read. When a file is written again, its header is
    /// overwritten first.
    fn is_current(&self) -> Result<bool, ReadError> {
        self.look_comes();
        let Some(Current { file, path, header }) = &self.current else { return Ok(true) };
        let now = self.store.header(file, self.shard, header.index).map_err(|source| io_error(path, source))?;
        Ok(now.is_ok_and(|now| now.salt == header.salt))
    }

    /// Handles invalid bytes: if retention freed the segment meanwhile, continues after a gap; otherwise reports
    /// damage.
    fn explain(&mut self, why: &'static str) -> Result<(), ReadError> {
        match self.index.zip(self.span()?) {
            Some((index, span)) if index < span.first => {
                self.lose(span);
                Ok(())
            }
            _ => Err(self.corruption(why).into()),
        }
    }

    /// Moves to the earliest segment still held, because retention freed the current one.
    fn lose(&mut self, span: Span) {
        let from = self.given_up_at.unwrap_or(self.offset());
        self.lost_at.get_or_insert(from);
        self.stand_before(span.first);
    }

    /// Returns `true` if a segment after `index` holds records.
    fn used_behind(&self, index: u64, last: u64) -> Result<bool, ReadError> {
        for later in self.store.segments_within(self.shard, index + 1, last)? {
            if let Some(Ok(_)) = self.open(later)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Opens the file of a segment. Returns `None` if there is no file.
    fn open(&self, index: u64) -> Result<Option<Result<Current, Unusable>>, ReadError> {
        self.look_comes();
        let path = self.store.shard_dir(self.shard).join(segment_name(index));
        let file = match self.store.files.open_file(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(io_error(&path, source)),
        };
        self.look_comes();
        let header = self.store.header(&file, self.shard, index).map_err(|source| io_error(&path, source))?;
        Ok(Some(header.map(|header| Current { file, path, header })))
    }

    fn span(&self) -> Result<Option<Span>, ReadError> {
        self.look_comes();
        self.store.span(self.shard).map_err(|error| match error {
            OpenError::Io { action, path, source } => ReadError::Io { action, path, source },
            _ => self.corruption("the shard's span is damaged").into(),
        })
    }

    /// Called before each read from the disk.
    fn look_comes(&self) {
        #[cfg(test)]
        if let Some(meanwhile) = &mut *self.between_looks.0.borrow_mut() {
            meanwhile();
        }
    }

    fn corruption(&self, why: &'static str) -> Corruption {
        Corruption { shard: self.shard, segment: self.index.unwrap_or(0), offset: self.offset(), why }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use crate::envelope::Envelope;
    use crate::{Config, Deadline, EventLog, Key, ReadError, ShardId};

    #[test]
    fn an_unreadable_record_is_neither_an_end_nor_skipped() {
        let dir = tempfile::tempdir().expect("a folder");
        let engine = EventLog::<Envelope>::open(Config::new(dir.path()).segment_bytes(64 << 10)).expect("opened");
        let mut producer = engine.producer();
        for n in 0..300 {
            producer.publish(Key(1), Envelope::new("said", 1, &n.to_string()).expect("it is JSON")).expect("published");
        }
        engine.flush(Deadline::NEVER).expect("flushed");
        let mut records =
            crate::log::scan::Store::open(dir.path()).expect("a store").records(ShardId(0)).buffered(4096);
        let mut next = 0;
        while next < 300 {
            let unreadable = File::create(dir.path().join("unreadable")).expect("made");
            let current = records.current.as_mut().map(|current| std::mem::replace(&mut current.file, unreadable));
            if let Some(file) = current {
                let offset = records.offset();
                records.forget_buffer();
                for _ in 0..2 {
                    assert!(matches!(records.next(), Err(ReadError::Io { .. })));
                    assert!(matches!(records.tail(), Err(ReadError::Io { .. })));
                    assert_eq!(records.offset(), offset, "the position does not move");
                }
                records.current.as_mut().expect("being read").file = file;
            }
            let record = records.next().expect("readable again").expect("a record");
            assert_eq!(record.meta.sequence.get(), next);
            next += 1;
        }
        assert!(records.next().expect("the end").is_none());
    }
}
