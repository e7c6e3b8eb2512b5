//! Reads the records of one shard in the order of the log, also while it grows or retention frees its beginning.

use std::fs::File;
use std::io::ErrorKind;
use std::path::PathBuf;

use rkyv::util::AlignedVec;

use super::{LOOK_AGAIN, LOOKS_MAX, Place, Store, Unusable, io_error, read_up_to};
use crate::error::{Corruption, OpenError, ReadError};
use crate::event::{Meta, Offset, Sequence, ShardId};
use crate::log::format::{
    ALIGN, Found, HEADER_BYTES, RECORD_BYTES_MAX, RECORD_HEADER_BYTES, RecordHeader, Seam, SegmentHeader, padded,
    record_at, u32_at,
};
use crate::log::manifest::{Span, segment_name};
use crate::log::storage::Files;

/// Bytes read at once, unless asked otherwise.
const BUFFER_BYTES: usize = 1 << 20;

/// Events that retention took away while they were about to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gap {
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
pub struct Record<'a> {
    /// What the log knows of it.
    pub meta: Meta,
    /// Its archive, CRC checked and beginning at a multiple of 16. Whether it is a valid archive is for bytecheck to say.
    pub body: &'a [u8],
}

impl Record<'_> {
    /// Where it lies.
    #[must_use]
    pub fn place(&self) -> Place {
        let Meta { time, shard, offset, sequence, .. } = self.meta;
        // No record is longer than its length word can say.
        let record_bytes = (RECORD_HEADER_BYTES + self.body.len()) as u32;
        Place { time, shard, offset, sequence, record_bytes }
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
    sequence: u64,
    /// What the segment to be entered must go on from: the end of the one before it, where that was read.
    continues: Option<Seam>,
    /// The furthest position that a mark says was durable.
    durable: u64,
    /// The log's position when a segment disappeared, until the next is entered.
    lost_at: Option<Offset>,
    until: Offset,
    gaps: Vec<Gap>,
    buffer: AlignedVec<16>,
    buffer_bytes: usize,
    /// Position in the segment of the buffer's first byte; a multiple of 16, so bodies are aligned in it.
    buffer_at: usize,
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
            sequence: 0,
            continues: None,
            durable: 0,
            lost_at: None,
            until: Offset(u64::MAX),
            gaps: Vec::new(),
            buffer: AlignedVec::new(),
            buffer_bytes: BUFFER_BYTES,
            buffer_at: 0,
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

    /// The sequence of the next event.
    #[must_use]
    pub fn sequence(&self) -> Sequence {
        Sequence(self.sequence)
    }

    /// What retention took away from under this reader.
    #[must_use]
    pub fn gaps(&self) -> &[Gap] {
        &self.gaps
    }

    /// The next event, or `None` at the end of the log as it is now; call again later for more.
    ///
    /// # Errors
    /// `Corruption` when bytes do not hold (the position stays; [`Records::skip_segment`] goes on), `Io`.
    #[expect(clippy::should_implement_trait, reason = "lends from the buffer, which Iterator cannot")]
    pub fn next(&mut self) -> Result<Option<Record<'_>>, ReadError> {
        let Some((header, len)) = self.step()? else { return Ok(None) };
        let start = self.at - self.buffer_at;
        let meta = header.meta(self.shard, self.offset(), Sequence(self.sequence));
        self.at += padded(len);
        self.sequence += 1;
        Ok(Some(Record { meta, body: &self.buffer[start + RECORD_HEADER_BYTES..start + len] }))
    }

    /// Gives up what is left of the segment after damage and stands at the beginning of the next one.
    /// `false` at the last.
    ///
    /// # Errors
    /// What the file system or a damaged span says.
    pub fn skip_segment(&mut self) -> Result<bool, ReadError> {
        let span = self.span()?;
        let Some(next) = self.index.map(|index| index + 1).filter(|next| span.is_some_and(|span| *next <= span.last))
        else {
            return Ok(false);
        };
        self.stand_before(next);
        Ok(true)
    }

    /// Looks behind the position, to the end of the segment, for records that hold: behind an end there are none,
    /// unless the log was torn or damaged. Reads the rest of the segment; the position stays. Where the log has grown
    /// meanwhile, nothing is reported: [`Records::next`] has more.
    ///
    /// # Errors
    /// What the file system says.
    pub fn tail(&mut self) -> Result<Tail, ReadError> {
        let (home, offset) = (self.at, self.offset());
        self.forget_buffer();
        let mut tail = Tail { offset, end: offset, events: 0, was_durable: self.durable > offset.get() };
        let room = self.store.segment_bytes() as usize;
        while self.current.is_some() && room - self.at >= RECORD_HEADER_BYTES {
            if self.buffered_bytes() < RECORD_HEADER_BYTES && self.fill(RECORD_HEADER_BYTES)? < RECORD_HEADER_BYTES {
                break;
            }
            // Sense before check sum: the sum over any length that chance wrote would take for ever.
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
        self.at = home;
        self.forget_buffer();
        // A writer commits in order: were it still at work here, the position would be the first to hold.
        let has_grown = matches!(self.look_once()?, Look::Record(..));
        self.forget_buffer();
        if has_grown {
            let was_durable = self.durable > offset.get();
            return Ok(Tail { offset, end: offset, events: 0, was_durable });
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
            Found::Record(len) => Look::Record(RecordHeader::decode(tail), len),
            Found::End => Look::End,
            Found::Damaged(why) => Look::Damaged(why),
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
        let Some(current) = &self.current else { return Ok(0) };
        let room = self.store.segment_bytes() as usize - self.at;
        self.buffer.resize(self.buffer_bytes.max(need).min(room), 0);
        self.buffer_at = self.at;
        let read = read_up_to(&current.file, &mut self.buffer, self.at as u64)
            .map_err(|source| io_error(&current.path, source))?;
        self.buffer.resize(read, 0);
        Ok(read)
    }

    /// Opens the segment to be read; `false` where it is not written yet.
    fn enter(&mut self) -> Result<bool, ReadError> {
        let mut looks = 0;
        loop {
            let Some(span) = self.span()? else { return Ok(false) };
            let index = match self.index {
                None => span.first,
                Some(index) if index < span.first => {
                    self.lost_at.get_or_insert(self.offset());
                    span.first
                }
                Some(index) => index,
            };
            if self.index != Some(index) {
                self.stand_before(index);
            }
            match self.open(index)? {
                Some(Ok(current)) => {
                    self.begin(current)?;
                    return Ok(true);
                }
                Some(Err(Unusable::Blank)) => {
                    if self.used_behind(index, span.last)? && self.span()?.is_some_and(|now| now.first <= index) {
                        return Err(self
                            .corruption("the segment's header is blank, but a later segment is written")
                            .into());
                    }
                    return Ok(false);
                }
                // A rename, a new span and this look can cross; a few looks later they agree.
                None | Some(Err(Unusable::Damaged(_))) if looks < LOOKS_MAX => {
                    looks += 1;
                    std::thread::sleep(LOOK_AGAIN);
                }
                None => return Err(self.corruption("a segment of the span is missing").into()),
                Some(Err(Unusable::Damaged(why))) => return Err(self.corruption(why).into()),
            }
        }
    }

    fn begin(&mut self, current: Current) -> Result<(), ReadError> {
        if self.lost_at.is_none()
            && let Some(why) = self.continues.and_then(|here| current.header.seam().breaks_after(&here))
        {
            return Err(self.corruption(why).into());
        }
        let events = current.header.first_sequence.saturating_sub(self.sequence);
        // A segment that was read to its end before it went is no loss.
        if let Some(from) = self.lost_at.take()
            && events > 0
        {
            self.gaps.push(Gap { shard: self.shard, from, until: current.header.first_offset(), events });
        }
        self.sequence = current.header.first_sequence;
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
        let Some((index, current)) = self.index.zip(self.current.as_ref()) else { return Ok(false) };
        let here = Seam { end: self.offset(), salt: current.header.salt, sequence: self.sequence };
        let next = self.open(index + 1)?;
        // After the look at the next segment: what was committed here before the writer went on is seen now.
        if self.has_grown()? {
            return Ok(true);
        }
        match next {
            // Every event up to there was read, even if this file has been written again meanwhile.
            Some(Ok(next)) => {
                if let Some(why) = next.header.seam().breaks_after(&here) {
                    // Told here, where the hole is; the next segment may well be sound.
                    self.explain(why)?;
                    return Ok(true);
                }
                // Every event up to there was read, even if this file has been written again meanwhile.
            }
            _ => {
                let Some(span) = self.span()? else { return Ok(false) };
                if index < span.first {
                    self.lose(span);
                    return Ok(true);
                }
                if index == span.last {
                    return Ok(false);
                }
                match self.open(index + 1)? {
                    Some(Ok(_)) => return Ok(true),
                    Some(Err(Unusable::Blank)) if !self.used_behind(index + 1, span.last)? => return Ok(false),
                    // Being begun right now, freed, or damaged: `enter` finds out. Either way the writer has left this one.
                    _ => {}
                }
                if self.has_grown()? {
                    return Ok(true);
                }
            }
        }
        self.stand_before(index + 1);
        self.continues = Some(here);
        Ok(true)
    }

    /// Whether a record has come to the position where there was none.
    fn has_grown(&mut self) -> Result<bool, ReadError> {
        self.forget_buffer();
        Ok(!matches!(self.look_once()?, Look::End))
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

    /// The segment being read is gone: the next is the first that is left.
    fn lose(&mut self, span: Span) {
        self.lost_at.get_or_insert(self.offset());
        self.stand_before(span.first);
    }

    /// Whether a segment behind `index` holds records.
    fn used_behind(&self, index: u64, last: u64) -> Result<bool, ReadError> {
        for later in index + 1..=last {
            if let Some(Ok(_)) = self.open(later)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Opens a segment's file; `None` where there is none.
    fn open(&self, index: u64) -> Result<Option<Result<Current, Unusable>>, ReadError> {
        let path = self.store.shard_dir(self.shard).join(segment_name(index));
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(io_error(&path, source)),
        };
        let header = self.store.header(&file, self.shard, index).map_err(|source| io_error(&path, source))?;
        Ok(Some(header.map(|header| Current { file, path, header })))
    }

    fn span(&self) -> Result<Option<Span>, ReadError> {
        Span::load(&Files, &self.store.shard_dir(self.shard)).map_err(|error| match error {
            OpenError::Io { action, path, source } => ReadError::Io { action, path, source },
            _ => self.corruption("the shard's span does not hold").into(),
        })
    }

    fn corruption(&self, why: &'static str) -> Corruption {
        Corruption { shard: self.shard, segment: self.index.unwrap_or(0), offset: self.offset(), why }
    }
}
