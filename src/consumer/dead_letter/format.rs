//! The bytes of a file of letters: a header, and batches of entries. Pure functions; `FORMAT.md` §16 has the same
//! tables.
//!
//! ```text
//! header   0 magic 8   8 format u32   12 flags u32 (1 complete)   16 number u32   20 number before u32   24 end before u64
//!         32 zero 24   56 crc u32   60 zero u32
//! entry    0 length u32   4 crc u32   8 batch u32   12 kind u8   13 last of its batch u8   14 why u8   15 zero u8
//!         16 offset u64   24 key u64   32 time u64   40 shard u16   42 type u16   44 schema version u16
//!         46 error bytes u16   48 attempts u32   52 archive bytes u32
//! letter  56 version u64   64 event time u64   72 correlation u64   80 last failed u64
//! then     error, padded to 8; archive, padded to 8
//! totals  56 parked u64   64 handled u64   72 discarded u64   80 overflowed u64   88 skipped u64
//! ```
//!
//! The CRC of an entry is seeded with the file's number and the entry's place, so a copy of the entry is valid nowhere
//! else.

use crate::event::{Correlation, EventId, EventTypeId, Key, Offset, ShardId, Time, Version};
use crate::log::format::RECORD_BYTES_MAX;
use crate::log::seal::crc32c;
use crate::storage::framed::{
    Frame, FrameError, Reader, put_u16, put_u32, put_u64, stated_version, u16_at, u32_at, u64_at,
};

use super::answer::{DeadLetter, Entry, LetterKind};

/// Bytes of a file's header: a frame and four zeros.
pub(super) const FILE_HEADER_BYTES: usize = 64;
const FRAME_BYTES: usize = FILE_HEADER_BYTES - 4;
const FRAME: Frame = Frame { magic: *b"coreletr", bytes_min: FRAME_BYTES };
/// Bytes of an entry that is not a letter, without its error.
pub(super) const ENTRY_BYTES: usize = 56;
const LETTER_BYTES: usize = 88;
const TOTALS_BYTES: usize = 96;
/// Length of the longest entry.
const ENTRY_BYTES_MAX: usize = LETTER_BYTES + ERROR_BYTES_MAX + RECORD_BYTES_MAX;
/// Longest error text in bytes. Longer texts are cut.
const ERROR_BYTES_MAX: usize = 1024;
/// Entries begin at multiples of this.
pub(super) const ALIGN: usize = 8;

/// A file and the end of its part that counts. Later ends compare greater; the default stands for no file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub(crate) struct FileEnd {
    pub(crate) number: u32,
    pub(crate) bytes: u64,
}

/// The header of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FileHeader {
    pub(super) number: u32,
    /// The end of the file that this one continues. `None`: this file holds everything.
    pub(super) before: Option<FileEnd>,
    /// `true` if the file was made from all earlier ones and replaces them.
    pub(super) is_complete: bool,
}

/// The reason why the first bytes of a file are not a valid header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum HeaderFault {
    /// This build does not know the format version.
    Version(u32),
    /// The bytes are not those that were written.
    Damaged(&'static str),
    /// The CRC matches, but no build writes such values.
    Strange(&'static str),
}

impl FileHeader {
    pub(super) fn encode(&self) -> Vec<u8> {
        assert!(self.number > 0 && !(self.is_complete && self.before.is_some()));
        let before = self.before.unwrap_or_default();
        let mut out = FRAME.begin();
        out.u32(u32::from(self.is_complete));
        out.u32(self.number);
        out.u32(before.number);
        out.u64(before.bytes);
        out.zeros(24);
        let mut header = out.seal();
        header.resize(FILE_HEADER_BYTES, 0);
        header
    }

    /// Reads the header of file `number` from its first bytes.
    pub(super) fn decode(bytes: &[u8], number: u32) -> Result<Self, HeaderFault> {
        let damaged = HeaderFault::Damaged;
        let header = bytes.get(..FILE_HEADER_BYTES).ok_or(damaged("the file is shorter than its header"))?;
        let (frame, zeros) = header.split_at(FRAME_BYTES);
        let fields = FRAME.open(frame).map_err(|error| match error {
            FrameError::Checksum => stated_version(frame).map_or(damaged(error.why()), HeaderFault::Version),
            FrameError::Version(version) => HeaderFault::Version(version),
            FrameError::Foreign(why) => damaged(why),
        })?;
        if zeros != [0; 4] {
            return Err(damaged("unused bytes of the header are not zero"));
        }
        Self::read(fields, number).map_err(|error| HeaderFault::Strange(error.why()))
    }

    fn read(mut fields: Reader<'_>, number: u32) -> Result<Self, FrameError> {
        let (flags, stored_number) = (fields.u32()?, fields.u32()?);
        let before = FileEnd { number: fields.u32()?, bytes: fields.u64()? };
        if stored_number != number || before.number >= number {
            return Err("its number does not match its name".into());
        }
        if before.number > 0 && before.bytes < FILE_HEADER_BYTES as u64 {
            return Err("the file before it ends within its header".into());
        }
        let before = (before.number > 0).then_some(before);
        Ok(Self { number, before, is_complete: flags & 1 != 0 })
    }
}

/// Counts of letters and skipped events, including those whose entries are gone.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Totals {
    pub(super) parked: u64,
    pub(super) handled: u64,
    pub(super) discarded: u64,
    pub(super) overflowed: u64,
    pub(super) skipped: u64,
}

impl Totals {
    fn words(&self) -> [u64; 5] {
        [self.parked, self.handled, self.discarded, self.overflowed, self.skipped]
    }
}

/// The kind of an entry: what happened to its event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    Parked,
    Skipped,
    FailedAgain,
    Handled,
    Discarded {
        is_overflow: bool,
    },
    /// The event was skipped, handled or discarded, and the entry about it is gone.
    Known,
    /// The counts up to here; belongs to no event. The last entry of the part that makes a file complete.
    Totals(Totals),
}

const PARKED: u8 = 1;
const SKIPPED: u8 = 2;
const FAILED_AGAIN: u8 = 3;
const HANDLED: u8 = 4;
const DISCARDED: u8 = 5;
const KNOWN: u8 = 6;
const TOTALS: u8 = 7;

/// A buffer of entries for one place of one file. The entries count together or not at all.
#[derive(Debug)]
pub(super) struct EntryBatch {
    bytes: Vec<u8>,
    /// The position of the first entry: after the file's header, if the buffer has one.
    begun: usize,
    /// The position of the last entry.
    last: usize,
    file: u32,
    at: u64,
    number: u32,
}

impl EntryBatch {
    /// Creates the empty batch `number` of file `file`. It is written at `at`, after the bytes `before`.
    pub(super) fn new(file: u32, at: u64, number: u32, before: &[u8]) -> Self {
        Self { bytes: before.to_vec(), begun: before.len(), last: before.len(), file, at, number }
    }

    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    pub(super) fn number(&self) -> u32 {
        self.number
    }

    /// Begins the next batch after this one is written.
    pub(super) fn begin_next(&mut self) {
        *self = Self::new(self.file, self.at + self.bytes.len() as u64, self.number + 1, &[]);
    }

    pub(super) fn add(&mut self, entry: &Entry<'_>) {
        match *entry {
            Entry::Parked { letter, archive } => self.add_letter(PARKED, letter, archive),
            Entry::Skipped { letter, archive } => self.add_letter(SKIPPED, letter, archive),
            Entry::FailedAgain { id, key, attempts, error, time } => {
                let error = cut(error);
                let out = self.begin(FAILED_AGAIN, id, key, time);
                put_u16(out, 46, error.len() as u16);
                put_u32(out, 48, attempts);
                self.extend(error.as_bytes());
            }
            Entry::Handled { id, key, time } => drop(self.begin(HANDLED, id, key, time)),
            Entry::Discarded { id, key, time } => drop(self.begin(DISCARDED, id, key, time)),
        }
    }

    /// Adds the entry of a letter that is discarded to make room.
    pub(super) fn add_overflowed(&mut self, id: EventId, key: Key, time: Time) {
        self.begin(DISCARDED, id, key, time)[14] = 1;
    }

    pub(super) fn add_known(&mut self, id: EventId) {
        self.begin(KNOWN, id, Key(0), Time(0));
    }

    pub(super) fn add_totals(&mut self, totals: &Totals) {
        let no_event = EventId { shard: ShardId(0), offset: Offset(0) };
        self.begin(TOTALS, no_event, Key(0), Time(0));
        for word in totals.words() {
            self.extend(&word.to_le_bytes());
        }
    }

    fn add_letter(&mut self, kind: u8, letter: &DeadLetter, archive: &[u8]) {
        assert!(archive.len() <= RECORD_BYTES_MAX, "an archive is no longer than a record");
        let error = cut(&letter.error);
        let out = self.begin(kind, letter.id, letter.key, letter.first_failed);
        out[14] = letter.why as u8;
        put_u16(out, 42, letter.event_type.0);
        put_u16(out, 44, letter.schema_version);
        put_u16(out, 46, error.len() as u16);
        put_u32(out, 48, letter.attempts);
        put_u32(out, 52, archive.len() as u32);
        for word in [letter.version.0, letter.time.0, letter.correlation.0, letter.last_failed.0] {
            self.extend(&word.to_le_bytes());
        }
        self.extend(error.as_bytes());
        self.extend(archive);
    }

    /// Begins an entry with the fields that all kinds have.
    fn begin(&mut self, kind: u8, id: EventId, key: Key, time: Time) -> &mut [u8] {
        self.last = self.bytes.len();
        self.bytes.resize(self.last + ENTRY_BYTES, 0);
        let out = &mut self.bytes[self.last..];
        put_u32(out, 0, ENTRY_BYTES as u32);
        put_u32(out, 8, self.number);
        out[12] = kind;
        put_u64(out, 16, id.offset.0);
        put_u64(out, 24, key.0);
        put_u64(out, 32, time.0);
        put_u16(out, 40, id.shard.0);
        out
    }

    /// Appends a part and its padding to the last entry.
    fn extend(&mut self, part: &[u8]) {
        self.bytes.extend_from_slice(part);
        self.bytes.resize(self.bytes.len().next_multiple_of(ALIGN), 0);
        let len = (self.bytes.len() - self.last) as u32;
        put_u32(&mut self.bytes, self.last, len);
    }

    /// Marks the end of the batch, writes the CRCs, and returns the bytes to write. The batch must not be empty.
    pub(super) fn seal(&mut self) -> &[u8] {
        assert!(self.last < self.bytes.len(), "a batch without entries has no end");
        self.bytes[self.last + 13] = 1;
        let mut begun = self.begun;
        while begun < self.bytes.len() {
            let len = u32_at(&self.bytes, begun) as usize;
            let crc = crc32c(seed(self.file, self.at + begun as u64), &self.bytes[begun + 8..begun + len]);
            put_u32(&mut self.bytes, begun + 4, crc);
            begun += len;
        }
        &self.bytes
    }

    /// The entries of a sealed batch, each with its place in the file.
    pub(super) fn entries(&self) -> impl Iterator<Item = (u64, StoredEntry<'_>)> {
        let mut begun = self.begun;
        std::iter::from_fn(move || {
            let len = u32_at(self.bytes.get(begun..begun + 4)?, 0) as usize;
            let entry = StoredEntry::decode(&self.bytes[begun..begun + len]).expect("an entry that was just encoded");
            let at = self.at + begun as u64;
            begun += len;
            Some((at, entry))
        })
    }
}

fn seed(file: u32, at: u64) -> u32 {
    crc32c(file, &at.to_le_bytes())
}

/// Cuts a text to the part that is stored.
fn cut(text: &str) -> &str {
    let end = (0..=text.len().min(ERROR_BYTES_MAX)).rev().find(|&end| text.is_char_boundary(end));
    &text[..end.unwrap_or(0)]
}

/// Returns the length of a letter's entry.
pub(super) fn letter_bytes(letter: &DeadLetter, archive: &[u8]) -> usize {
    LETTER_BYTES + cut(&letter.error).len().next_multiple_of(ALIGN) + archive.len().next_multiple_of(ALIGN)
}

/// Returns the length of the entry that begins with `head`, or an error if no entry is that long.
pub(super) fn entry_len(head: &[u8]) -> Result<usize, &'static str> {
    let len = u32_at(head, 0) as usize;
    let is_possible = len.is_multiple_of(ALIGN) && (ENTRY_BYTES..=ENTRY_BYTES_MAX).contains(&len);
    if is_possible { Ok(len) } else { Err("an entry's length is out of range") }
}

/// Checks the CRC of an entry at this place of this file.
pub(super) fn check(entry: &[u8], file: u32, at: u64) -> Result<(), &'static str> {
    let matches = crc32c(seed(file, at), &entry[8..]) == u32_at(entry, 4);
    if matches { Ok(()) } else { Err("checksum mismatch in an entry") }
}

/// Returns the number of the batch that an entry belongs to.
pub(super) fn batch_of(head: &[u8]) -> u32 {
    u32_at(head, 8)
}

/// One stored entry.
#[derive(Debug, Clone, Copy)]
pub(super) struct StoredEntry<'a> {
    pub(super) change: Change,
    pub(super) id: EventId,
    pub(super) key: Key,
    pub(super) is_last: bool,
    bytes: &'a [u8],
}

impl<'a> StoredEntry<'a> {
    /// Reads an entry whose CRC matches.
    pub(super) fn decode(bytes: &'a [u8]) -> Result<Self, &'static str> {
        let change = match bytes[12] {
            PARKED => Change::Parked,
            SKIPPED => Change::Skipped,
            FAILED_AGAIN => Change::FailedAgain,
            HANDLED => Change::Handled,
            DISCARDED => Change::Discarded { is_overflow: bytes[14] != 0 },
            KNOWN => Change::Known,
            TOTALS if bytes.len() == TOTALS_BYTES => {
                let [parked, handled, discarded, overflowed, skipped] =
                    std::array::from_fn(|i| u64_at(bytes, ENTRY_BYTES + 8 * i));
                Change::Totals(Totals { parked, handled, discarded, overflowed, skipped })
            }
            _ => return Err("an entry has an unknown kind"),
        };
        let id = EventId { shard: ShardId(u16_at(bytes, 40)), offset: Offset(u64_at(bytes, 16)) };
        let entry = Self { change, id, key: Key(u64_at(bytes, 24)), is_last: bytes[13] != 0, bytes };
        let is_whole =
            matches!(change, Change::Totals(_)) || entry.archive_at() + entry.archive_padded() == bytes.len();
        if !is_whole {
            return Err("an entry's length differs from the sum of its parts");
        }
        if entry.is_letter() && (u16_at(bytes, 42) == 0 || bytes[14] > LetterKind::Undecodable as u8) {
            return Err("a letter has an impossible event type or kind");
        }
        Ok(entry)
    }

    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    fn is_letter(&self) -> bool {
        matches!(self.change, Change::Parked | Change::Skipped)
    }

    fn error_at(&self) -> usize {
        if self.is_letter() { LETTER_BYTES } else { ENTRY_BYTES }
    }

    fn error_bytes(&self) -> usize {
        usize::from(u16_at(self.bytes, 46))
    }

    fn archive_at(&self) -> usize {
        self.error_at() + self.error_bytes().next_multiple_of(ALIGN)
    }

    fn archive_bytes(&self) -> usize {
        u32_at(self.bytes, 52) as usize
    }

    fn archive_padded(&self) -> usize {
        self.archive_bytes().next_multiple_of(ALIGN)
    }

    pub(super) fn archive(&self) -> &'a [u8] {
        &self.bytes[self.archive_at()..][..self.archive_bytes()]
    }

    /// The number of attempts and the error of the last one.
    pub(super) fn attempts(&self) -> Result<(u32, String), &'static str> {
        let error = &self.bytes[self.error_at()..][..self.error_bytes()];
        let error = std::str::from_utf8(error).map_err(|_| "an error's text is not UTF-8")?;
        Ok((u32_at(self.bytes, 48), error.to_owned()))
    }

    pub(super) fn time(&self) -> Time {
        Time(u64_at(self.bytes, 32))
    }

    /// Reads the letter from an entry of kind `Parked` or `Skipped`.
    pub(super) fn letter(&self) -> Result<DeadLetter, &'static str> {
        if !self.is_letter() {
            return Err("the entry is not a letter");
        }
        let (attempts, error) = self.attempts()?;
        Ok(DeadLetter {
            id: self.id,
            key: self.key,
            event_type: EventTypeId(u16_at(self.bytes, 42)),
            schema_version: u16_at(self.bytes, 44),
            version: Version(u64_at(self.bytes, 56)),
            time: Time(u64_at(self.bytes, 64)),
            correlation: Correlation(u64_at(self.bytes, 72)),
            why: match self.bytes[14] {
                0 => LetterKind::Failed,
                1 => LetterKind::Behind,
                2 => LetterKind::Undecodable,
                _ => return Err("a letter has an unknown kind"),
            },
            attempts,
            error,
            first_failed: self.time(),
            last_failed: Time(u64_at(self.bytes, 80)),
        })
    }
}
