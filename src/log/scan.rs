//! Reads a store from outside its engine: another process, also while the store is written, also
//! where nothing may be written. Takes no lock and changes no byte.
//!
//! One writer: the engine, elsewhere. It stores a zero length word behind a record before it commits the record's own, so
//! a length word that is not zero means a whole record. What this reader must add: its buffer may be older than the
//! file, so an end is believed only after a second look, taken after the look at the next segment; and the file may
//! have been retired and written again, so bytes that do not hold are damage only if their segment is still in the span.
//!
//! ```no_run
//! use corelane::scan::Store;
//! use corelane::ShardId;
//!
//! let store = Store::open("data")?;
//! let mut records = store.records(ShardId(0));
//! while let Some(record) = records.next()? {
//!     println!("{} {} {}", record.meta.id(), record.meta.key, record.body.len());
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rkyv::util::AlignedVec;

use crate::error::{Corruption, OpenError, ReadError};
use crate::event::{EventTypeId, Meta, Offset, Sequence, ShardId, Time};
use crate::log::format::{
    ALIGN, Found, HEADER_BYTES, HeaderError, MARK, RECORD_BYTES_MAX, RECORD_HEADER_BYTES, RecordHeader, SegmentHeader,
    padded, record_at, u32_at,
};
use crate::log::manifest::{MANIFEST, Manifest, Span, segment_index, segment_name, shard_dir};
use crate::log::storage::Files;

/// Where recovery keeps what it cut.
const QUARANTINE: &str = "quarantine";
/// Bytes read at once, unless asked otherwise.
const BUFFER_BYTES: usize = 1 << 20;
/// Fresh looks at bytes that do not hold, before they count as damage. A look at a file that is being written can be
/// torn; the writer needs nanoseconds, so one more look nearly always settles it.
const LOOKS_MAX: u32 = 5;
const LOOK_AGAIN: Duration = Duration::from_millis(1);

/// A store, seen from outside.
#[derive(Debug, Clone)]
pub struct Store {
    dir: PathBuf,
    manifest: Manifest,
}

/// An event type that the store has seen declared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TypeInfo<'a> {
    /// Its stable number.
    pub id: EventTypeId,
    /// The newest version of its layout.
    pub schema_version: u16,
    /// Its stable name.
    pub name: &'a str,
}

impl Store {
    /// Looks at the store in `dir`, which may be open elsewhere and may be read-only.
    ///
    /// # Errors
    /// `Io` where there is no manifest, `UnknownFormat`, `ArchiveFormat` and `ForeignFile` where it (or
    /// a shard's span) is not of this build's format.
    pub fn open(dir: impl Into<PathBuf>) -> Result<Self, OpenError> {
        let dir = dir.into();
        let manifest = Manifest::load(&Files, &dir)?.ok_or_else(|| OpenError::Io {
            action: "reading",
            path: dir.join(MANIFEST),
            source: ErrorKind::NotFound.into(),
        })?;
        let store = Self { dir, manifest };
        for shard in store.shard_ids() {
            Span::load(&Files, &store.shard_dir(shard))?;
        }
        Ok(store)
    }

    /// Where the store lies.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The number of shards.
    #[must_use]
    pub fn shards(&self) -> u16 {
        self.manifest.shards
    }

    /// Every shard.
    pub fn shard_ids(&self) -> impl Iterator<Item = ShardId> + use<> {
        (0..self.manifest.shards).map(ShardId)
    }

    /// Bytes of one segment.
    #[must_use]
    pub fn segment_bytes(&self) -> u64 {
        self.manifest.segment_bytes
    }

    /// The event types that the store has seen declared.
    pub fn event_types(&self) -> impl Iterator<Item = TypeInfo<'_>> {
        self.manifest.types.iter().map(|t| TypeInfo { id: t.id, schema_version: t.schema_version, name: &t.name })
    }

    /// The name of an event type, if the store knows it.
    #[must_use]
    pub fn type_name(&self, id: EventTypeId) -> Option<&str> {
        self.manifest.types.iter().find(|t| t.id == id).map(|t| t.name.as_str())
    }

    /// The folder of one shard.
    #[must_use]
    pub fn shard_dir(&self, shard: ShardId) -> PathBuf {
        shard_dir(&self.dir, shard)
    }

    /// The files of one shard as they are now.
    ///
    /// # Errors
    /// What the file system or a damaged span says. A damaged segment is an entry of the list, not an error.
    pub fn shard(&self, shard: ShardId) -> Result<ShardFiles, OpenError> {
        let dir = self.shard_dir(shard);
        let span = Span::load(&Files, &dir)?;
        let mut files = ShardFiles {
            shard,
            span: span.map(|span| (span.first, span.last)),
            segments: Vec::new(),
            others: Vec::new(),
        };
        let listed = match list(&dir) {
            Err(error) if error.kind() == ErrorKind::NotFound && span.is_none() => return Ok(files),
            listed => listed.map_err(|source| OpenError::Io { action: "listing", path: dir.clone(), source })?,
        };
        for file in listed {
            match segment_index(&file.name)
                .filter(|index| span.is_some_and(|span| (span.first..=span.last).contains(index)))
            {
                Some(index) => {
                    let state = self.segment_state(shard, index)?;
                    files.segments.push(SegmentInfo { index, state, file });
                }
                None => files.others.push(file),
            }
        }
        if let Some(span) = span {
            // A reasonable bound: a damaged span is refused above, so this is the number of segments.
            for index in span.first..=span.last {
                let at = (index - span.first) as usize;
                if files.segments.get(at).is_none_or(|segment| segment.index != index) {
                    let file = FileInfo { name: segment_name(index), bytes: 0, allocated_bytes: 0 };
                    files.segments.insert(
                        at.min(files.segments.len()),
                        SegmentInfo { index, state: SegmentState::Missing, file },
                    );
                }
            }
        }
        Ok(files)
    }

    /// The records of one shard, from the earliest.
    #[must_use]
    pub fn records(&self, shard: ShardId) -> Records {
        Records::new(self, shard)
    }

    /// The end of a shard's last segment, written or not: an end for reading a log that grows.
    ///
    /// # Errors
    /// What the file system or a damaged span says.
    pub fn horizon(&self, shard: ShardId) -> Result<Offset, OpenError> {
        let span = Span::load(&Files, &self.shard_dir(shard))?;
        Ok(Offset(span.map_or(0, |span| span.last + 1).saturating_mul(self.segment_bytes())))
    }

    /// Reads single records whose places are known.
    #[must_use]
    pub fn lookup(&self) -> Lookup {
        Lookup { store: self.clone(), open: HashMap::new(), window: AlignedVec::new(), window_at: None }
    }

    /// Tails that recovery found torn, cut off and kept.
    ///
    /// # Errors
    /// What the file system says.
    pub fn quarantine(&self) -> Result<Vec<FileInfo>, OpenError> {
        let path = self.dir.join(QUARANTINE);
        match list(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
            listed => listed.map_err(|source| OpenError::Io { action: "listing", path, source }),
        }
    }

    fn segment_state(&self, shard: ShardId, index: u64) -> Result<SegmentState, OpenError> {
        let path = self.shard_dir(shard).join(segment_name(index));
        let io = |source| OpenError::Io { action: "reading", path: path.clone(), source };
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(SegmentState::Missing),
            Err(error) => return Err(io(error)),
        };
        let bytes = file.metadata().map_err(io)?.len();
        Ok(match self.header(&file, shard, index).map_err(io)? {
            Ok(_) if bytes != self.segment_bytes() => SegmentState::Damaged("the file is not as long as a segment is"),
            Ok(header) => SegmentState::Used {
                first_offset: header.first_offset,
                first_sequence: Sequence(header.first_sequence),
                created: header.created,
                schema: header.schema,
            },
            Err(Unusable::Blank) => SegmentState::Blank,
            Err(Unusable::Damaged(why)) => SegmentState::Damaged(why),
        })
    }

    /// The header of segment `index`, if that is what the file holds.
    fn header(&self, file: &File, shard: ShardId, index: u64) -> io::Result<Result<SegmentHeader, Unusable>> {
        let mut page = [0; HEADER_BYTES];
        let mut looks = 0;
        loop {
            let read = read_up_to(file, &mut page, 0)?;
            let seen = self.expected_header(&page[..read], shard, index);
            looks += 1;
            if !matches!(seen, Err(Unusable::Damaged(_))) || looks == LOOKS_MAX {
                return Ok(seen);
            }
            std::thread::sleep(LOOK_AGAIN);
        }
    }

    fn expected_header(&self, page: &[u8], shard: ShardId, index: u64) -> Result<SegmentHeader, Unusable> {
        let header = SegmentHeader::decode(page).map_err(|error| match error {
            HeaderError::Blank => Unusable::Blank,
            HeaderError::Version(_) => Unusable::Damaged("the segment is of a format version this build does not know"),
            HeaderError::Archive(_) => Unusable::Damaged("the segment was written with another archive format"),
            HeaderError::Damaged(why) => Unusable::Damaged(why),
        })?;
        let first_offset = Offset(index.wrapping_mul(self.segment_bytes()).wrapping_add(HEADER_BYTES as u64));
        if header.index != index || header.first_offset != first_offset {
            return Err(Unusable::Damaged("the segment's header is that of another segment"));
        }
        if header.shard != shard {
            return Err(Unusable::Damaged("the segment's header is that of another shard"));
        }
        if header.segment_bytes != self.segment_bytes() {
            return Err(Unusable::Damaged("the segment's header tells another segment size"));
        }
        Ok(header)
    }
}

/// Why a file holds no records of its segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Unusable {
    Blank,
    Damaged(&'static str),
}

/// The files of one shard.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ShardFiles {
    /// The shard.
    pub shard: ShardId,
    /// First and last of the segments that must exist; `None` where nothing was ever written.
    pub span: Option<(u64, u64)>,
    /// The segments of the span, in order.
    pub segments: Vec<SegmentInfo>,
    /// Everything else in the folder: spares (`spare-…`), surplus segments, small files.
    pub others: Vec<FileInfo>,
}

/// One segment of a shard.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct SegmentInfo {
    /// Its number.
    pub index: u64,
    /// What it is.
    pub state: SegmentState,
    /// Its file.
    pub file: FileInfo,
}

/// What a segment's file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum SegmentState {
    /// It holds records, or is about to.
    Used {
        /// Where its first record begins.
        first_offset: Offset,
        /// The sequence of its first event.
        first_sequence: Sequence,
        /// When it was begun.
        created: Time,
        /// Fingerprint of the event types of the program that began it.
        schema: u32,
    },
    /// Prepared, and not yet written.
    Blank,
    /// Its header does not hold.
    Damaged(&'static str),
    /// In the span, but not there.
    Missing,
}

/// A file of a store.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct FileInfo {
    /// Its name in its folder.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// What it takes on the disk.
    pub allocated_bytes: u64,
}

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

/// Where a record lies, and what it takes to read it by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// The event's time.
    pub time: Time,
    /// The shard.
    pub shard: ShardId,
    /// Where the record begins.
    pub offset: Offset,
    /// The event's number in its shard (the log does not store it with the record).
    pub sequence: Sequence,
    /// Bytes of the record, without its padding.
    pub record_bytes: u32,
}

const _: () = assert!(size_of::<Place>() == 32, "an index holds one per event");

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
    /// Whether the segment to be entered must begin where the one before it ended.
    continues: bool,
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
    fn new(store: &Store, shard: ShardId) -> Self {
        Self {
            store: store.clone(),
            shard,
            current: None,
            index: None,
            at: HEADER_BYTES,
            sequence: 0,
            continues: false,
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
        let meta = meta(&header, self.shard, self.offset(), Sequence(self.sequence));
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
                    if header.event_type == MARK {
                        tail.was_durable |= header.key.get() > offset.get();
                    } else {
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
        if header.event_type == MARK {
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
                Look::Record(header, len) if header.event_type == MARK => {
                    if header.key.get() > self.offset().get() {
                        return Err(self.corruption("a mark tells of bytes behind itself").into());
                    }
                    self.durable = self.durable.max(header.key.get());
                    self.at += padded(len);
                }
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
        if self.continues && self.lost_at.is_none() && current.header.first_sequence != self.sequence {
            return Err(self.corruption("the segment's first sequence is not where the one before it ended").into());
        }
        let events = current.header.first_sequence.saturating_sub(self.sequence);
        // A segment that was read to its end before it went is no loss.
        if let Some(from) = self.lost_at.take()
            && events > 0
        {
            self.gaps.push(Gap { shard: self.shard, from, until: current.header.first_offset, events });
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
        self.continues = false;
        self.at = HEADER_BYTES;
        self.forget_buffer();
    }

    /// Goes from an end over to the next segment. `false` at the end of the log; `true`: look again.
    fn leave(&mut self) -> Result<bool, ReadError> {
        let Some(index) = self.index else { return Ok(false) };
        let next = self.open(index + 1)?;
        // After the look at the next segment: what was committed here before the writer went on is seen now.
        if self.has_grown()? {
            return Ok(true);
        }
        match next {
            // Every event up to there was read, even if this file has been written again meanwhile.
            Some(Ok(next)) if next.header.first_sequence == self.sequence => {}
            Some(Ok(_)) => {
                // Told here, where the hole is; the next segment may well be sound.
                self.explain("the log ends here, but the next segment begins with a later event")?;
                return Ok(true);
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
        self.continues = true;
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

/// Reads single records by their [`Place`]; cheapest where the places ascend.
#[derive(Debug)]
pub struct Lookup {
    store: Store,
    open: HashMap<(ShardId, u64), (File, SegmentHeader)>,
    window: AlignedVec<16>,
    /// Shard, segment and position of the window's first byte.
    window_at: Option<(ShardId, u64, usize)>,
}

impl Lookup {
    /// Bytes read ahead while places ascend closely.
    const WINDOW_BYTES: usize = 256 << 10;
    /// Open files kept.
    const OPEN_MAX: usize = 256;

    /// The record at `place`.
    ///
    /// # Errors
    /// `BeyondRetention` when it was freed meanwhile, `NotARecord` when no such record is there, `Io`.
    pub fn get(&mut self, place: &Place) -> Result<Record<'_>, ReadError> {
        let segment_bytes = self.store.segment_bytes();
        let (index, at) = (place.offset.get() / segment_bytes, (place.offset.get() % segment_bytes) as usize);
        let len = place.record_bytes as usize;
        let end = at + padded(len);
        if at % ALIGN != 0 || at < HEADER_BYTES || len < RECORD_HEADER_BYTES || end as u64 > segment_bytes {
            return Err(ReadError::NotARecord { shard: place.shard, offset: place.offset });
        }
        let salt = match self.salt(place.shard, index)? {
            Some(salt) => salt,
            None => return Err(self.gone(place)),
        };
        let start = match self.window_at {
            Some((shard, segment, from))
                if (shard, segment) == (place.shard, index) && from <= at && end <= from + self.window.len() =>
            {
                at - from
            }
            _ => {
                self.move_window(place.shard, index, at, end)?;
                0
            }
        };
        let tail = self.window.get(start..start + padded(len)).unwrap_or_default();
        if record_at(tail, salt) != Found::Record(len) {
            return Err(self.gone(place));
        }
        let header = RecordHeader::decode(tail);
        let body = &self.window[start + RECORD_HEADER_BYTES..start + len];
        Ok(Record { meta: meta(&header, place.shard, place.offset, place.sequence), body })
    }

    fn move_window(&mut self, shard: ShardId, index: u64, at: usize, end: usize) -> Result<(), ReadError> {
        // Far jumps read only what they need; a step forward promises more steps forward.
        let near = self.window_at.is_some_and(|(was_shard, was_index, from)| {
            (was_shard, was_index) == (shard, index)
                && from <= at
                && at <= from + self.window.len() + Self::WINDOW_BYTES
        });
        let room = self.store.segment_bytes() as usize - at;
        let wanted = if near { Self::WINDOW_BYTES.max(end - at).min(room) } else { end - at };
        self.window.resize(wanted, 0);
        self.window_at = Some((shard, index, at));
        let Some((file, _)) = self.open.get(&(shard, index)) else { return Ok(()) };
        let read = read_up_to(file, &mut self.window, at as u64)
            .map_err(|source| io_error(&self.store.shard_dir(shard).join(segment_name(index)), source))?;
        self.window.resize(read, 0);
        Ok(())
    }

    fn salt(&mut self, shard: ShardId, index: u64) -> Result<Option<u32>, ReadError> {
        if let Some((_, header)) = self.open.get(&(shard, index)) {
            return Ok(Some(header.salt));
        }
        let path = self.store.shard_dir(shard).join(segment_name(index));
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(io_error(&path, source)),
        };
        let Ok(header) = self.store.header(&file, shard, index).map_err(|source| io_error(&path, source))? else {
            return Ok(None);
        };
        if self.open.len() >= Self::OPEN_MAX {
            self.open.clear();
        }
        self.open.insert((shard, index), (file, header));
        Ok(Some(header.salt))
    }

    fn gone(&mut self, place: &Place) -> ReadError {
        self.window_at = None;
        let shard = place.shard;
        match Span::load(&Files, &self.store.shard_dir(shard)) {
            Ok(Some(span)) if place.offset.get() / self.store.segment_bytes() < span.first => {
                let earliest = Offset(span.first * self.store.segment_bytes() + HEADER_BYTES as u64);
                ReadError::BeyondRetention { shard, asked: place.offset, earliest }
            }
            _ => ReadError::NotARecord { shard, offset: place.offset },
        }
    }
}

fn meta(header: &RecordHeader, shard: ShardId, offset: Offset, sequence: Sequence) -> Meta {
    Meta {
        shard,
        offset,
        sequence,
        key: header.key,
        version: header.version,
        time: header.time,
        event_type: header.event_type,
        schema_version: header.schema_version,
        correlation: header.correlation,
        previous: Some(header.previous).filter(|previous| previous.get() != 0),
    }
}

/// Fills as much of `buffer` as the file has from `at` on.
fn read_up_to(file: &File, buffer: &mut [u8], at: u64) -> io::Result<usize> {
    let mut read = 0;
    while read < buffer.len() {
        match file.read_at(&mut buffer[read..], at + read as u64) {
            Ok(0) => break,
            Ok(bytes) => read += bytes,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(read)
}

fn io_error(path: &Path, source: io::Error) -> ReadError {
    ReadError::Io { action: "reading", path: path.to_owned(), source }
}

/// Every file in a folder, sorted by name.
fn list(dir: &Path) -> io::Result<Vec<FileInfo>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        // A file can go while the folder is read; then it is not there.
        let Ok(metadata) = entry.metadata() else { continue };
        if metadata.is_file() {
            files.push(file_info(entry.file_name().to_string_lossy().into_owned(), &metadata));
        }
    }
    files.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(files)
}

fn file_info(name: String, metadata: &fs::Metadata) -> FileInfo {
    // POSIX counts blocks of 512 bytes, whatever the file system's own are.
    FileInfo { name, bytes: metadata.len(), allocated_bytes: metadata.blocks() * 512 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{Correlation, Key, Version};
    use crate::log::format::seal;
    use crate::log::manifest::StoredType;
    use proptest::prelude::*;
    use std::fs::OpenOptions;

    const SEGMENT_BYTES: u64 = 64 << 10;

    /// Plays the engine: writes a shard's files in the order in which it does.
    struct Engine {
        dir: tempfile::TempDir,
        index: u64,
        span: Span,
        at: usize,
        salt: u32,
        sequence: u64,
        chains: HashMap<u64, (u64, u64)>,
    }

    impl Engine {
        fn new() -> Self {
            let dir = tempfile::tempdir().expect("a folder");
            let types = vec![StoredType { id: EventTypeId(1), schema_version: 1, name: "moved".into() }];
            Manifest { shards: 1, segment_bytes: SEGMENT_BYTES, types }.save(&Files, dir.path()).expect("saved");
            fs::create_dir(shard_dir(dir.path(), ShardId(0))).expect("made");
            Self {
                dir,
                index: 0,
                span: Span { first: 0, last: 0 },
                at: 0,
                salt: 0,
                sequence: 0,
                chains: HashMap::new(),
            }
        }

        fn store(&self) -> Store {
            Store::open(self.dir.path()).expect("a store")
        }

        fn path(&self, index: u64) -> PathBuf {
            shard_dir(self.dir.path(), ShardId(0)).join(segment_name(index))
        }

        fn file(&self, index: u64) -> File {
            OpenOptions::new().read(true).write(true).open(self.path(index)).expect("a segment")
        }

        fn save_span(&self) {
            self.span.save(&Files, &shard_dir(self.dir.path(), ShardId(0))).expect("saved");
        }

        /// Prepares a blank segment, from an old one if there is `old`.
        fn prepare(&mut self, index: u64, old: Option<&Path>) {
            match old {
                Some(old) => {
                    let file = OpenOptions::new().write(true).open(old).expect("an old segment");
                    file.write_all_at(&[0; HEADER_BYTES], 0).expect("blanked");
                    fs::rename(old, self.path(index)).expect("renamed");
                }
                None => File::create_new(self.path(index)).and_then(|file| file.set_len(SEGMENT_BYTES)).expect("made"),
            }
            self.span.last = index;
            self.save_span();
        }

        fn begin(&mut self, index: u64) {
            (self.index, self.at, self.salt) = (index, HEADER_BYTES, 7 + index as u32);
            let header = SegmentHeader {
                schema: 1,
                shard: ShardId(0),
                index,
                segment_bytes: SEGMENT_BYTES,
                first_offset: Offset(index * SEGMENT_BYTES + HEADER_BYTES as u64),
                first_sequence: self.sequence,
                created: Time(1),
                salt: self.salt,
            };
            let mut page = vec![0; HEADER_BYTES + 4];
            header.encode(&mut page);
            self.file(index).write_all_at(&page, 0).expect("written");
        }

        fn put(&mut self, event_type: EventTypeId, key: u64, previous: u64, version: u64, body: &[u8]) -> u64 {
            let len = RECORD_HEADER_BYTES + body.len();
            let mut record = vec![0xee; padded(len) + 4];
            record[RECORD_HEADER_BYTES..len].copy_from_slice(body);
            let header = RecordHeader {
                time: Time(key),
                key: Key(key),
                previous: Offset(previous),
                event_type,
                correlation: Correlation(0),
                version: Version(version),
                schema_version: 1,
            };
            header.stage(&mut record[..padded(len)], len);
            seal(&mut record, len, self.salt);
            record[padded(len)..].fill(0);
            let file = self.file(self.index);
            let end = record.len().min(SEGMENT_BYTES as usize - self.at);
            file.write_all_at(&record[4..end], self.at as u64 + 4).expect("written");
            file.write_all_at(&(len as u32).to_le_bytes(), self.at as u64).expect("committed");
            let offset = self.index * SEGMENT_BYTES + self.at as u64;
            self.at += padded(len);
            offset
        }

        fn append(&mut self, key: u64, body: &[u8]) {
            if self.at == 0 {
                self.prepare(0, None);
                self.begin(0);
            }
            if self.at + padded(RECORD_HEADER_BYTES + body.len()) > SEGMENT_BYTES as usize {
                let next = self.index + 1;
                if self.span.last < next {
                    self.prepare(next, None);
                }
                self.begin(next);
            }
            let (previous, version) = self.chains.get(&key).copied().unwrap_or((0, 0));
            let offset = self.put(EventTypeId(1), key, previous, version + 1, body);
            self.chains.insert(key, (offset, version + 1));
            self.sequence += 1;
        }

        fn mark(&mut self) {
            if self.at + RECORD_HEADER_BYTES <= SEGMENT_BYTES as usize {
                let durable = self.index * SEGMENT_BYTES + self.at as u64;
                self.put(MARK, durable, 0, 0, &[]);
            }
        }
    }

    fn body(i: u64) -> Vec<u8> {
        (0..i % 97).map(|byte| (byte ^ i) as u8).collect()
    }

    fn drain(records: &mut Records) -> Vec<(Meta, Vec<u8>)> {
        let mut all = Vec::new();
        while let Some(record) = records.next().expect("a sound log") {
            assert_eq!(record.body.as_ptr() as usize % ALIGN, 0, "bodies are aligned");
            all.push((record.meta, record.body.to_vec()));
        }
        all
    }

    #[test]
    fn everything_written_is_read_over_segments_and_marks() {
        let mut engine = Engine::new();
        for i in 0..3000 {
            engine.append(i % 10, &body(i));
            if i % 7 == 0 {
                engine.mark();
            }
        }
        let store = engine.store();
        let all = drain(&mut store.records(ShardId(0)).buffered(4096));
        assert_eq!(all.len(), 3000);
        for (i, (meta, bytes)) in (0..).zip(&all) {
            assert_eq!((meta.sequence.get(), meta.key.get(), meta.version.get()), (i, i % 10, i / 10 + 1));
            assert_eq!(bytes, &body(i));
        }
        assert_eq!(drain(&mut store.records(ShardId(0))), all, "whatever the buffer");
        let files = store.shard(ShardId(0)).expect("listed");
        assert_eq!(files.segments.len() as u64, engine.index + 1);
        assert!(files.segments.iter().all(|segment| matches!(segment.state, SegmentState::Used { .. })));

        let mut places = Vec::new();
        let mut records = store.records(ShardId(0));
        while let Some(record) = records.next().expect("a sound log") {
            places.push(record.place());
        }
        let mut lookup = store.lookup();
        for step in [1, 7, 1999] {
            for i in 0..3000 {
                let i = i * step % 3000;
                let record = lookup.get(&places[i]).expect("still there");
                assert_eq!((record.meta, record.body.to_vec()), all[i]);
            }
        }
        let wrong = Place { offset: Offset(places[5].offset.get() + 16), ..places[5] };
        assert!(matches!(lookup.get(&wrong), Err(ReadError::NotARecord { .. })));
    }

    #[test]
    fn an_end_is_looked_at_again_before_the_reader_goes_on() {
        let mut engine = Engine::new();
        engine.append(1, b"a");
        let store = engine.store();
        let mut records = store.records(ShardId(0));
        assert_eq!(drain(&mut records).len(), 1);
        // The reader's buffer holds the old end; meanwhile this segment is filled and the next one begun.
        let mut written = 1;
        while engine.index < 2 {
            engine.append(1, &body(96));
            written += 1;
            if written % 100 == 0 {
                engine.mark();
            }
        }
        assert_eq!(drain(&mut records).len(), written - 1, "nothing between the two ends is passed over");
        engine.append(1, b"b");
        assert_eq!(drain(&mut records).len(), 1);
        let half = store.records(ShardId(0)).until(Offset(SEGMENT_BYTES));
        assert_eq!(drain(&mut { half }).iter().filter(|(meta, _)| meta.offset.get() >= SEGMENT_BYTES).count(), 0);
        assert_eq!(store.horizon(ShardId(0)).expect("a span"), Offset(3 * SEGMENT_BYTES));
        assert_eq!(records.tail().expect("readable").events, 0);
    }

    #[test]
    fn what_retention_takes_from_under_the_reader_is_a_gap() {
        let mut engine = Engine::new();
        while engine.index < 3 {
            engine.append(1, &body(96));
        }
        let store = engine.store();
        for reuse in [false, true] {
            let mut records = store.records(ShardId(0)).buffered(4096);
            let start = records.next().expect("a sound log").expect("a record").meta.sequence.get();
            let seen = 20;
            for _ in 1..seen {
                assert!(records.next().expect("a sound log").is_some());
            }
            let from = records.offset();
            let first = engine.span.first;
            // Two go; the file being read is written again under a new name.
            engine.span.first = first + 2;
            engine.save_span();
            for index in first..first + 2 {
                let old = engine.path(index);
                if reuse {
                    let next = engine.span.last + 1;
                    engine.prepare(next, Some(&old));
                    while engine.index < next {
                        engine.append(1, &body(96));
                    }
                } else {
                    fs::remove_file(&old).expect("removed");
                }
            }
            let rest = drain(&mut records);
            assert_eq!(rest.last().map(|(meta, _)| meta.sequence.get() + 1), Some(engine.sequence));
            let [gap] = records.gaps() else { panic!("one gap, not {:?}", records.gaps()) };
            assert!(gap.from >= from && gap.until == Offset(engine.span.first * SEGMENT_BYTES + 4096), "{gap:?}");
            let mut next = start + seen;
            for (meta, _) in &rest {
                if meta.offset == gap.until {
                    next += gap.events;
                }
                assert_eq!(meta.sequence.get(), next, "what is not in the gap is read");
                next += 1;
            }
            while engine.index < engine.span.first + 3 {
                engine.append(1, &body(96));
            }
        }
    }

    #[test]
    fn the_end_of_a_file_written_again_is_not_taken_for_the_end_of_the_old_segment() {
        let mut engine = Engine::new();
        while engine.index < 3 {
            engine.append(1, &body(96));
        }
        let mut records = engine.store().records(ShardId(0)).buffered(4096);
        // As many as fit into the buffer, so that the next look is at the file.
        let seen = (4096 / 144) as u64;
        for _ in 0..seen {
            assert!(records.next().expect("a sound log").is_some());
        }
        let from = records.offset();
        engine.span.first = 2;
        let old = engine.path(0);
        engine.prepare(4, Some(&old));
        fs::remove_file(engine.path(1)).expect("removed");
        engine.begin(4);
        for _ in 0..seen {
            engine.append(1, &body(96));
        }
        assert!(records.next().expect("a sound log").is_some());
        let per_segment = (SEGMENT_BYTES - 4096) / 144;
        let gap =
            Gap { shard: ShardId(0), from, until: Offset(2 * SEGMENT_BYTES + 4096), events: 2 * per_segment - seen };
        assert_eq!(records.gaps(), [gap]);
        assert_eq!(drain(&mut records).last().map(|(meta, _)| meta.sequence.get() + 1), Some(engine.sequence));
    }

    #[test]
    fn damage_is_named_and_the_next_segment_can_still_be_read() {
        let mut engine = Engine::new();
        while engine.index < 2 {
            engine.append(1, &body(96));
        }
        engine.file(0).write_all_at(b"x", HEADER_BYTES as u64 + 60).expect("damaged");
        let store = engine.store();
        let mut records = store.records(ShardId(0));
        let error = records.next().expect_err("damage");
        assert!(matches!(&error, ReadError::Corruption(c) if c.segment == 0 && c.offset == Offset(4096)), "{error}");
        assert!(records.next().is_err(), "the position stays");
        assert!(records.skip_segment().expect("a span"));
        assert!(!drain(&mut records).is_empty());
        assert!(!records.skip_segment().expect("a span"));
    }

    #[test]
    fn a_hole_in_the_log_does_not_pass_for_its_end() {
        let mut engine = Engine::new();
        for i in 0..100 {
            engine.append(i, &body(40));
        }
        let end = engine.at as u64;
        engine.file(0).write_all_at(&[0; 512], HEADER_BYTES as u64 + 960).expect("zeroed");
        let store = engine.store();
        let mut records = store.records(ShardId(0));
        assert_eq!(drain(&mut records).len(), 10);
        let tail = records.tail().expect("readable");
        assert_eq!((tail.offset, tail.end, tail.was_durable), (Offset(4096 + 960), Offset(end), false));
        assert_eq!(tail.events, 84);
        engine.mark();
        assert!(records.tail().expect("readable").was_durable);
        let mut early = store.records(ShardId(0));
        assert!(early.next().expect("a sound log").is_some());
        assert_eq!(early.tail().expect("readable").events, 0, "what can be read is no tail");

        // With a segment behind it, a hole is damage.
        while engine.index < 1 {
            engine.append(1, &body(40));
        }
        let error = records.next().expect_err("a hole");
        assert!(matches!(&error, ReadError::Corruption(c) if c.offset == Offset(4096 + 960)), "{error}");
        assert!(records.skip_segment().expect("a span"));
        assert!(!drain(&mut records).is_empty());
    }

    #[test]
    fn damaged_and_missing_segments_are_not_an_end() {
        let mut engine = Engine::new();
        while engine.index < 2 {
            engine.append(1, &body(96));
        }
        let store = engine.store();
        let last_error = |store: &Store| {
            let mut records = store.records(ShardId(0));
            loop {
                match records.next() {
                    Ok(Some(_)) => {}
                    Ok(None) => return None,
                    Err(ReadError::Corruption(corruption)) => return Some(corruption),
                    Err(error) => panic!("{error}"),
                }
            }
        };
        assert_eq!(last_error(&store), None);
        engine.file(2).write_all_at(b"x", 50).expect("damaged");
        assert_eq!(last_error(&store).map(|c| c.segment), Some(2));
        engine.file(2).write_all_at(&[0; HEADER_BYTES], 0).expect("blanked");
        assert_eq!(last_error(&store), None, "prepared and never begun");
        engine.file(1).write_all_at(&[0; HEADER_BYTES], 0).expect("blanked");
        assert_eq!(last_error(&store), None);
        engine.begin(2);
        assert_eq!(last_error(&store).map(|c| c.segment), Some(1), "blank before one in use");
        fs::remove_file(engine.path(1)).expect("removed");
        assert_eq!(last_error(&store).map(|c| c.segment), Some(1));
        let states: Vec<_> = store.shard(ShardId(0)).expect("listed").segments.into_iter().map(|s| s.state).collect();
        assert!(
            matches!(states[..], [SegmentState::Used { .. }, SegmentState::Missing, SegmentState::Used { .. }]),
            "{states:?}"
        );
        engine.file(0).set_len(5000).expect("cut short");
        assert_eq!(last_error(&store).map(|c| c.segment), Some(0));
    }

    #[test]
    fn a_store_without_records_is_empty_and_a_folder_without_manifest_is_none() {
        let mut engine = Engine::new();
        let store = engine.store();
        assert!(store.records(ShardId(0)).next().expect("empty").is_none());
        engine.prepare(0, None);
        let mut records = store.records(ShardId(0));
        assert!(records.next().expect("empty").is_none());
        assert_eq!(records.tail().expect("nothing").events, 0);
        engine.begin(0);
        assert!(records.next().expect("empty").is_none());
        engine.append(1, b"a");
        assert!(records.next().expect("one").is_some());
        assert!(matches!(Store::open(engine.dir.path().join("none")), Err(OpenError::Io { .. })));
    }

    #[test]
    fn a_reader_follows_a_writer() {
        let mut engine = Engine::new();
        engine.append(1, b"a");
        let store = engine.store();
        const EVENTS: u64 = 20_000;
        let writer = std::thread::spawn(move || {
            for i in 1..EVENTS {
                engine.append(i % 5, &body(i));
            }
            engine
        });
        let mut records = store.records(ShardId(0)).buffered(8192);
        let mut next = 0;
        while next < EVENTS {
            match records.next().expect("a sound log") {
                Some(record) => {
                    assert_eq!(record.meta.sequence.get(), next);
                    assert!(next == 0 || record.body == body(next));
                    next += 1;
                }
                None => std::thread::yield_now(),
            }
        }
        drop(writer.join().expect("a writer"));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn no_flipped_bit_goes_unseen(at in 0_u64..14_000, bit in 0_u8..8) {
            let mut engine = Engine::new();
            for i in 0..100 {
                engine.append(i, &body(96));
            }
            let end = engine.at as u64;
            let at = at.min(end - 1);
            let file = engine.file(0);
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).expect("in the file");
            file.write_all_at(&[byte[0] ^ (1_u8 << bit)], at).expect("flipped");
            let mut records = engine.store().records(ShardId(0));
            let mut seen = 0;
            let damaged = loop {
                match records.next() {
                    Ok(Some(_)) => seen += 1,
                    Ok(None) => break records.tail().expect("readable").events > 0,
                    Err(_) => break true,
                }
            };
            prop_assert!(damaged, "byte {} of {}, {} seen", at, end, seen);
        }
    }
}
