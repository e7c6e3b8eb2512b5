//! Reads the records of one shard in the order of the log, also while it grows or retention frees its beginning.

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

/// Bytes read at once, unless asked otherwise.
const BUFFER_BYTES: usize = 1 << 20;

/// Events that retention took away while they were about to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MissedEvents {
    /// The shard.
    pub shard: ShardId,
    /// Where the next record would have been.
    pub from: Offset,
    /// Where reading went on.
    pub until: Offset,
    /// How many events lie between.
    pub events: u64,
}

/// What stands behind a position of the log, up to the end of its segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Tail {
    /// The position.
    pub offset: Offset,
    /// Where the last record ends that holds; the position itself where none does.
    pub end: Offset,
    /// Events that hold.
    pub events: u64,
    /// Whether a mark says that bytes behind the position had been synced.
    pub was_durable: bool,
}

/// One event, as it stands in the log.
#[derive(Debug, Clone, Copy)]
pub struct ScannedRecord<'a> {
    /// What the log knows of it.
    pub meta: Meta,
    /// Its archive, CRC checked and beginning at a multiple of 16. Whether it is a valid archive is for bytecheck to say.
    pub body: &'a [u8],
}

impl ScannedRecord<'_> {
    /// Where it lies.
    #[must_use]
    pub fn place(&self) -> RecordPosition {
        let Meta { time, shard, offset, sequence, .. } = self.meta;
        // No record is longer than its length word can say.
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

/// The records of one shard in the order of the log: a cursor that lends each from its buffer.
#[derive(Debug)]
pub struct Records {
    store: Store,
    shard: ShardId,
    current: Option<Current>,
    /// The segment to read or being read; `None` before the first.
    index: Option<u64>,
    /// Position in the segment; a multiple of 16.
    at: usize,
    /// Of the next event; `None` before a segment was entered.
    sequence: Option<u64>,
    /// What the segment to be entered must go on from: the end of the one before it, where that was read.
    continues: Option<Seam>,
    /// The furthest position that a mark says was durable.
    durable: u64,
    /// Where what is left of a damaged segment was given up, until another is entered; `sequence` is of there.
    given_up_at: Option<Offset>,
    /// The log's position when a segment disappeared, until the next is entered; `sequence` is of there.
    lost_at: Option<Offset>,
    until: Offset,
    gaps: Vec<MissedEvents>,
    buffer: AlignedVec<16>,
    buffer_bytes: usize,
    /// Position in the segment of the buffer's first byte; a multiple of 16, so bodies are aligned in it.
    buffer_at: usize,
    /// Called before every look at the disk.
    #[cfg(test)]
    pub(super) between_looks: BetweenLooks,
}

/// What a test lets happen between two looks at the disk.
#[cfg(test)]
#[derive(Default)]
pub(super) struct BetweenLooks(pub(super) std::cell::RefCell<Option<Box<dyn FnMut()>>>);

#[cfg(test)]
impl std::fmt::Debug for BetweenLooks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BetweenLooks").finish_non_exhaustive()
    }
}

/// What lies at the position.
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

    /// Reads `bytes` at once instead of 1 MiB (at least 4 KiB).
    #[must_use]
    pub fn buffered(mut self, bytes: usize) -> Self {
        self.buffer_bytes = bytes.max(4096).next_multiple_of(ALIGN);
        self
    }

    /// Ends at `offset`, however far the log goes.
    #[must_use]
    pub fn until(mut self, offset: Offset) -> Self {
        self.until = offset;
        self
    }

    /// Where the next record is expected.
    #[must_use]
    pub fn offset(&self) -> Offset {
        Offset(self.index.unwrap_or(0) * self.store.segment_bytes() + self.at as u64)
    }

    /// The sequence of the next event; 0 before the first was looked for.
    #[must_use]
    pub fn sequence(&self) -> Sequence {
        Sequence(self.sequence.unwrap_or(0))
    }

    /// What retention took away from under this reader.
    #[must_use]
    pub fn gaps(&self) -> &[MissedEvents] {
        &self.gaps
    }

    /// The next event, or `None` at the end of the log as it is now; call again later for more.
    ///
    /// # Errors
    /// `Corruption` when bytes do not hold or are missing, `Io`. The position stays: the next call says the same (or has the record,
    /// where the cause is gone), and never what follows. [`Records::skip_segment`] goes on behind damage.
    #[expect(clippy::should_implement_trait, reason = "lends from the buffer, which Iterator cannot")]
    pub fn next(&mut self) -> Result<Option<ScannedRecord<'_>>, ReadError> {
        let Some((header, len)) = self.step()? else { return Ok(None) };
        let start = self.at - self.buffer_at;
        let meta = header.meta(self.shard, self.offset(), self.sequence());
        self.at += padded(len);
        self.sequence = Some(meta.sequence.0 + 1);
        Ok(Some(ScannedRecord { meta, body: &self.buffer[start + RECORD_HEADER_BYTES..start + len] }))
    }

    /// Gives up what is left of the segment after damage and stands at the beginning of the next one.
    /// `false` at the last.
    ///
    /// # Errors
    /// What the file system or a damaged span says.
    pub fn skip_segment(&mut self) -> Result<bool, ReadError> {
        let span = self.span()?;
        let (Some(index), Some(span)) = (self.index, span) else { return Ok(false) };
        // Missing ones are passed over together: a damaged span can name more of them than anybody could look for.
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

    /// Looks behind the position, to the end of the segment, for records that hold: behind an end there are none,
    /// unless the log was torn or damaged. Reads the rest of the segment; the position stays. Where the log has grown
    /// meanwhile, nothing is reported: [`Records::next`] has more.
    ///
    /// # Errors
    /// What the file system says.
    pub fn tail(&mut self) -> Result<Tail, ReadError> {
        let home = self.at;
        self.forget_buffer();
        let found = self.look_behind();
        // Also after an error: the position stays.
        self.at = home;
        self.forget_buffer();
        let (tail, offset) = (found?, self.offset());
        // A writer commits in order: were it still at work here, the position would be the first to hold. And bytes that
        // were looked at after the file was written again are not of this segment.
        if matches!(self.look()?, Look::Record(..)) || !self.is_current()? {
            let was_durable = self.durable > offset.get();
            return Ok(Tail { offset, end: offset, events: 0, was_durable });
        }
        self.forget_buffer();
        Ok(tail)
    }

    /// What holds from the position on, which moves to the end of the segment.
    fn look_behind(&mut self) -> Result<Tail, ReadError> {
        let offset = self.offset();
        let mut tail = Tail { offset, end: offset, events: 0, was_durable: self.durable > offset.get() };
        let room = self.store.segment_bytes() as usize;
        while self.current.is_some() && room - self.at >= RECORD_HEADER_BYTES {
            if self.buffered_bytes() < RECORD_HEADER_BYTES && self.fill(RECORD_HEADER_BYTES)? < RECORD_HEADER_BYTES {
                break;
            }
            // Sense before checksum: the sum over any length that chance wrote would take for ever.
            let seen = if self.makes_sense() { self.look_once()? } else { Look::End };
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

    /// Whether what is buffered at the position could be the header of a record of this place.
    fn makes_sense(&self) -> bool {
        let record = &self.buffer[self.at - self.buffer_at..];
        let len = u32_at(record, 0) as usize;
        if !(RECORD_HEADER_BYTES..=RECORD_BYTES_MAX).contains(&len) {
            return false;
        }
        let header = RecordHeader::decode(record);
        if header.is_outcome() {
            return header.key.shard(self.store.shards()) == self.shard;
        }
        if header.is_own() {
            return len == RECORD_HEADER_BYTES && header.key.get() <= self.offset().get();
        }
        let first = header.previous.get() == 0;
        self.store.type_name(header.event_type).is_some()
            && header.key.shard(self.store.shards()) == self.shard
            && header.previous < self.offset()
            && header.version.get() > 0
            && first == (header.version.get() == 1)
    }

    /// Finds the next event, passing marks and ends of segments.
    fn step(&mut self) -> Result<Option<(RecordHeader, usize)>, ReadError> {
        loop {
            if (self.current.is_none() && !self.enter()?) || self.offset() >= self.until {
                return Ok(None);
            }
            match self.look()? {
                Look::Record(header, len) if header.is_mark() => {
                    if header.key.get() > self.offset().get() {
                        return Err(self.corruption("a mark tells of bytes behind itself").into());
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

    /// What stands at the position. Bytes that do not hold are looked at afresh before they are called damaged.
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
        // Also its place: the position may move back to a segment's beginning.
        self.buffer_at = 0;
    }

    /// Bytes in the buffer from the position on.
    fn buffered_bytes(&self) -> usize {
        (self.buffer_at + self.buffer.len()).saturating_sub(self.at)
    }

    /// Reads afresh from the position on, `need` bytes or more; returns how many there are.
    fn fill(&mut self, need: usize) -> Result<usize, ReadError> {
        self.look_comes();
        let Some(current) = &self.current else { return Ok(0) };
        let room = self.store.segment_bytes() as usize - self.at;
        self.buffer.resize(self.buffer_bytes.max(need).min(room), 0);
        self.buffer_at = self.at;
        let read = read_up_to(&current.file, &mut self.buffer, self.at as u64);
        let read = read.map_err(|source| io_error(&current.path, source));
        // After an error nothing that was not read may pass for bytes of the file.
        self.buffer.resize(*read.as_ref().unwrap_or(&0), 0);
        read
    }

    /// Opens the segment to be read; `false` where it is not written yet.
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
                Some(Err(Unusable::Blank)) => "the segment's header is blank, but a later segment is written",
                Some(Err(Unusable::Damaged(why))) => why,
                None => "a segment of the span is missing",
            };
            // It may have been freed, or begun together with the next, since the span was read: the looks have to agree.
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
        // A segment that was read to its end before it went is no loss; nor is one that was gone before the first was read.
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

    /// Goes from an end over to the next segment. `false` at the end of the log; `true`: look again.
    fn leave(&mut self) -> Result<bool, ReadError> {
        let Some((index, salt)) = self.index.zip(self.current.as_ref().map(|current| current.header.salt)) else {
            return Ok(false);
        };
        let here = Seam { end: self.offset(), salt, sequence: self.sequence().0 };
        let mut looks = 0;
        loop {
            let next = self.open(index + 1)?;
            // After the look at the next segment: what was committed here before the writer went on is seen now.
            if self.has_grown()? {
                return Ok(true);
            }
            // And after that look: whether it was this segment that was looked at.
            if !self.is_current()? {
                self.explain("the segment's header has changed while it was read")?;
                return Ok(true);
            }
            if let Some(Ok(next)) = next {
                match next.header.seam().breaks_after(&here) {
                    // Told here, where the hole is; the next segment may well be sound.
                    Some(why) => self.explain(why)?,
                    // Every event up to there was read, whatever becomes of this file.
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
            // Being begun right now, freed, or damaged: a few looks later it is settled, and `enter` says which.
            if looks == LOOKS_MAX {
                self.stand_before(index + 1);
                self.continues = Some(here);
                return Ok(true);
            }
            looks += 1;
            std::thread::sleep(LOOK_AGAIN);
        }
    }

    /// Whether a record has come to the position where there was none.
    fn has_grown(&mut self) -> Result<bool, ReadError> {
        self.forget_buffer();
        Ok(!matches!(self.look_once()?, Look::End))
    }

    /// Whether the file being read still was this segment when it was looked at last. Its header goes before anything else of a file
    /// that is written again.
    fn is_current(&self) -> Result<bool, ReadError> {
        self.look_comes();
        let Some(Current { file, path, header }) = &self.current else { return Ok(true) };
        let now = self.store.header(file, self.shard, header.index).map_err(|source| io_error(path, source))?;
        Ok(now.is_ok_and(|now| now.salt == header.salt))
    }

    /// Bytes do not hold. If their segment was retired meanwhile, goes on behind a gap; else that is damage.
    fn explain(&mut self, why: &'static str) -> Result<(), ReadError> {
        match self.index.zip(self.span()?) {
            Some((index, span)) if index < span.first => {
                self.lose(span);
                Ok(())
            }
            _ => Err(self.corruption(why).into()),
        }
    }

    /// The segment being read, or to be read, is gone: the next is the first that is left.
    fn lose(&mut self, span: Span) {
        let from = self.given_up_at.unwrap_or(self.offset());
        self.lost_at.get_or_insert(from);
        self.stand_before(span.first);
    }

    /// Whether a segment behind `index` holds records.
    fn used_behind(&self, index: u64, last: u64) -> Result<bool, ReadError> {
        for later in self.store.segments_within(self.shard, index + 1, last)? {
            if let Some(Ok(_)) = self.open(later)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Opens a segment's file; `None` where there is none.
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
            _ => self.corruption("the shard's span does not hold").into(),
        })
    }

    /// The disk is about to be looked at.
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
    fn what_could_not_be_read_is_neither_an_end_nor_passed_over() {
        let dir = tempfile::tempdir().expect("a folder");
        let engine = EventLog::<Envelope>::open(Config::new(dir.path()).segment_bytes(64 << 10)).expect("opened");
        let mut producer = engine.producer();
        for n in 0..300 {
            producer.publish(Key(1), Envelope::new("said", 1, &n.to_string()).expect("it is JSON")).expect("published");
        }
        engine.flush(Deadline::NEVER).expect("flushed");
        let mut records = crate::scan::Store::open(dir.path()).expect("a store").records(ShardId(0)).buffered(4096);
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
                    assert_eq!(records.offset(), offset, "the position stays");
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
