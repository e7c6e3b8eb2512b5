//! The bytes of a file of letters: a header, and batches of entries. Pure functions; `FORMAT.md` draws the same tables.
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
//! The CRC of an entry is seeded with the file's number and where the entry stands: a copy of it holds nowhere else.

use crate::event::{Correlation, EventId, EventTypeId, Key, Offset, ShardId, Time, Version};
use crate::log::format::{FORMAT_VERSION, RECORD_BYTES_MAX};
use crate::log::seal::crc32c;
use crate::storage::framed::{u16_at, u32_at, u64_at};

use super::answer::{DeadLetter, Entry, LetterKind};

const MAGIC: [u8; 8] = *b"coreletr";
pub(super) const FILE_HEADER_BYTES: usize = 64;
const FILE_CRC_AT: usize = 56;
/// Bytes of an entry that is no letter, without its error.
pub(super) const ENTRY_BYTES: usize = 56;
const LETTER_BYTES: usize = 88;
const TOTALS_BYTES: usize = 96;
/// No entry is longer than this.
const ENTRY_BYTES_MAX: usize = LETTER_BYTES + ERROR_BYTES_MAX + RECORD_BYTES_MAX;
/// More of an error is cut.
const ERROR_BYTES_MAX: usize = 1024;
/// Entries begin at multiples of this.
pub(super) const ALIGN: usize = 8;

/// A file up to where it counts. Later ones are greater; the default is where there is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub(crate) struct FileEnd {
    pub(crate) number: u32,
    pub(crate) bytes: u64,
}

/// The head of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FileHeader {
    pub(super) number: u32,
    /// What the file goes on from. A file that goes on from none holds everything.
    pub(super) before: Option<FileEnd>,
    /// It was made from earlier files, and ends their use.
    pub(super) is_complete: bool,
}

/// Why a file's first bytes are not the header they should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum HeaderFault {
    /// Of a format this build does not know.
    Version(u32),
    /// Its bytes do not hold.
    Damaged(&'static str),
    /// They hold, but no build writes such values.
    Strange(&'static str),
}

impl FileHeader {
    pub(super) fn encode(&self) -> [u8; FILE_HEADER_BYTES] {
        assert!(self.number > 0 && !(self.is_complete && self.before.is_some()));
        let before = self.before.unwrap_or_default();
        let mut out = [0; FILE_HEADER_BYTES];
        out[0..8].copy_from_slice(&MAGIC);
        out[8..12].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
        out[12..16].copy_from_slice(&u32::from(self.is_complete).to_le_bytes());
        out[16..20].copy_from_slice(&self.number.to_le_bytes());
        out[20..24].copy_from_slice(&before.number.to_le_bytes());
        out[24..32].copy_from_slice(&before.bytes.to_le_bytes());
        let crc = crc32c(0, &out[..FILE_CRC_AT]);
        out[FILE_CRC_AT..FILE_CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// The header of file `number`, from its first bytes.
    pub(super) fn decode(bytes: &[u8], number: u32) -> Result<Self, HeaderFault> {
        let damaged = HeaderFault::Damaged;
        let head = bytes.get(..FILE_HEADER_BYTES).ok_or(damaged("the file is shorter than its header"))?;
        if head[..8] != MAGIC {
            return Err(damaged("wrong magic"));
        }
        // A newer format may keep its checksum elsewhere, so its version is believed as it stands; damage to the version
        // of this format shows in its checksum.
        if u32_at(head, 8) != FORMAT_VERSION && !holds_with_version(head, FORMAT_VERSION) {
            return Err(HeaderFault::Version(u32_at(head, 8)));
        }
        if !holds_with_version(head, u32_at(head, 8)) || head[FILE_CRC_AT + 4..] != [0; 4] {
            return Err(damaged("the header's CRC does not hold"));
        }
        let before = FileEnd { number: u32_at(head, 20), bytes: u64_at(head, 24) };
        if u32_at(head, 16) != number || before.number >= number {
            return Err(HeaderFault::Strange("it is another file"));
        }
        if before.number > 0 && before.bytes < FILE_HEADER_BYTES as u64 {
            return Err(HeaderFault::Strange("the file before it ends within its header"));
        }
        let before = (before.number > 0).then_some(before);
        Ok(Self { number, before, is_complete: u32_at(head, 12) & 1 != 0 })
    }
}

/// Whether the header's CRC holds if `version` stands in it.
fn holds_with_version(head: &[u8], version: u32) -> bool {
    let crc = crc32c(crc32c(0, &head[..8]), &version.to_le_bytes());
    crc32c(crc, &head[12..FILE_CRC_AT]) == u32_at(head, FILE_CRC_AT)
}

/// Counts that outlive what they counted.
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

/// What an entry says of its event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    Parked,
    Skipped,
    FailedAgain,
    Handled,
    Discarded {
        is_overflow: bool,
    },
    /// It was skipped or dealt with; the entry that said so is gone.
    Known,
    /// Of no event: what was counted up to here. The last entry that a complete file begins with.
    Totals(Totals),
}

const PARKED: u8 = 1;
const SKIPPED: u8 = 2;
const FAILED_AGAIN: u8 = 3;
const HANDLED: u8 = 4;
const DISCARDED: u8 = 5;
const KNOWN: u8 = 6;
const TOTALS: u8 = 7;

/// Entries that count together or not at all, on their way to one place of one file.
#[derive(Debug)]
pub(super) struct Batch {
    bytes: Vec<u8>,
    /// Where the first entry begins: a file's header may stand before it.
    begun: usize,
    /// Where the last entry begins.
    last: usize,
    file: u32,
    at: u64,
    number: u32,
}

impl Batch {
    /// An empty batch `number` of file `file`, to be written at `at`; `before` stands in front of it.
    pub(super) fn new(file: u32, at: u64, number: u32, before: &[u8]) -> Self {
        Self { bytes: before.to_vec(), begun: before.len(), last: before.len(), file, at, number }
    }

    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    pub(super) fn number(&self) -> u32 {
        self.number
    }

    /// This one was written; the next stands behind it.
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
                out[46..48].copy_from_slice(&(error.len() as u16).to_le_bytes());
                out[48..52].copy_from_slice(&attempts.to_le_bytes());
                self.extend(error.as_bytes());
            }
            Entry::Handled { id, key, time } => drop(self.begin(HANDLED, id, key, time)),
            Entry::Discarded { id, key, time } => drop(self.begin(DISCARDED, id, key, time)),
        }
    }

    /// A letter that makes room.
    pub(super) fn add_overflowed(&mut self, id: EventId, key: Key, time: Time) {
        self.begin(DISCARDED, id, key, time)[14] = 1;
    }

    pub(super) fn add_known(&mut self, id: EventId) {
        self.begin(KNOWN, id, Key(0), Time(0));
    }

    pub(super) fn add_totals(&mut self, totals: &Totals) {
        let nobody = EventId { shard: ShardId(0), offset: Offset(0) };
        self.begin(TOTALS, nobody, Key(0), Time(0));
        for word in totals.words() {
            self.extend(&word.to_le_bytes());
        }
    }

    fn add_letter(&mut self, kind: u8, letter: &DeadLetter, archive: &[u8]) {
        assert!(archive.len() <= RECORD_BYTES_MAX, "an archive is no longer than a record");
        let error = cut(&letter.error);
        let out = self.begin(kind, letter.id, letter.key, letter.first_failed);
        out[14] = letter.why as u8;
        out[42..44].copy_from_slice(&letter.event_type.0.to_le_bytes());
        out[44..46].copy_from_slice(&letter.schema_version.to_le_bytes());
        out[46..48].copy_from_slice(&(error.len() as u16).to_le_bytes());
        out[48..52].copy_from_slice(&letter.attempts.to_le_bytes());
        out[52..56].copy_from_slice(&(archive.len() as u32).to_le_bytes());
        for word in [letter.version.0, letter.time.0, letter.correlation.0, letter.last_failed.0] {
            self.extend(&word.to_le_bytes());
        }
        self.extend(error.as_bytes());
        self.extend(archive);
    }

    /// Begins an entry with what all have.
    fn begin(&mut self, kind: u8, id: EventId, key: Key, time: Time) -> &mut [u8] {
        self.last = self.bytes.len();
        self.bytes.resize(self.last + ENTRY_BYTES, 0);
        let out = &mut self.bytes[self.last..];
        out[8..12].copy_from_slice(&self.number.to_le_bytes());
        out[12] = kind;
        out[16..24].copy_from_slice(&id.offset.0.to_le_bytes());
        out[24..32].copy_from_slice(&key.0.to_le_bytes());
        out[32..40].copy_from_slice(&time.0.to_le_bytes());
        out[40..42].copy_from_slice(&id.shard.0.to_le_bytes());
        out[0..4].copy_from_slice(&(ENTRY_BYTES as u32).to_le_bytes());
        out
    }

    /// Adds a part and its padding to the entry that was begun.
    fn extend(&mut self, part: &[u8]) {
        self.bytes.extend_from_slice(part);
        self.bytes.resize(self.bytes.len().next_multiple_of(ALIGN), 0);
        let len = (self.bytes.len() - self.last) as u32;
        self.bytes[self.last..self.last + 4].copy_from_slice(&len.to_le_bytes());
    }

    /// The bytes to write. The batch has an entry at least.
    pub(super) fn seal(&mut self) -> &[u8] {
        assert!(self.last < self.bytes.len(), "a batch without entries has no end");
        self.bytes[self.last + 13] = 1;
        let mut begun = self.begun;
        while begun < self.bytes.len() {
            let len = u32_at(&self.bytes, begun) as usize;
            let crc = crc32c(seed(self.file, self.at + begun as u64), &self.bytes[begun + 8..begun + len]);
            self.bytes[begun + 4..begun + 8].copy_from_slice(&crc.to_le_bytes());
            begun += len;
        }
        &self.bytes
    }

    /// The entries with where each stands in the file. To be asked when the batch is sealed.
    pub(super) fn entries(&self) -> impl Iterator<Item = (u64, StoredEntry<'_>)> {
        let mut begun = self.begun;
        std::iter::from_fn(move || {
            let len = u32_at(self.bytes.get(begun..begun + 4)?, 0) as usize;
            let entry = StoredEntry::decode(&self.bytes[begun..begun + len]).expect("what was just encoded");
            let at = self.at + begun as u64;
            begun += len;
            Some((at, entry))
        })
    }
}

fn seed(file: u32, at: u64) -> u32 {
    crc32c(file, &at.to_le_bytes())
}

/// As much of a text as is kept.
fn cut(text: &str) -> &str {
    let end = (0..=text.len().min(ERROR_BYTES_MAX)).rev().find(|&end| text.is_char_boundary(end));
    &text[..end.unwrap_or(0)]
}

/// Bytes that a letter takes in a file.
pub(super) fn letter_bytes(letter: &DeadLetter, archive: &[u8]) -> usize {
    LETTER_BYTES + cut(&letter.error).len().next_multiple_of(ALIGN) + archive.len().next_multiple_of(ALIGN)
}

/// The length of an entry that begins with `head`, if it can be one.
pub(super) fn entry_len(head: &[u8]) -> Result<usize, &'static str> {
    let len = u32_at(head, 0) as usize;
    let is_possible = len.is_multiple_of(ALIGN) && (ENTRY_BYTES..=ENTRY_BYTES_MAX).contains(&len);
    if is_possible { Ok(len) } else { Err("an entry's length is out of range") }
}

/// Whether the entry holds at this place of this file.
pub(super) fn check(entry: &[u8], file: u32, at: u64) -> Result<(), &'static str> {
    let holds = crc32c(seed(file, at), &entry[8..]) == u32_at(entry, 4);
    if holds { Ok(()) } else { Err("an entry's CRC does not hold") }
}

/// The batch that an entry belongs to.
pub(super) fn batch_of(head: &[u8]) -> u32 {
    u32_at(head, 8)
}

/// One entry, as a file has it.
#[derive(Debug, Clone, Copy)]
pub(super) struct StoredEntry<'a> {
    pub(super) change: Change,
    pub(super) id: EventId,
    pub(super) key: Key,
    pub(super) is_last: bool,
    bytes: &'a [u8],
}

impl<'a> StoredEntry<'a> {
    /// Reads an entry whose checksum holds.
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
            _ => return Err("an entry of an unknown kind"),
        };
        let id = EventId { shard: ShardId(u16_at(bytes, 40)), offset: Offset(u64_at(bytes, 16)) };
        let entry = Self { change, id, key: Key(u64_at(bytes, 24)), is_last: bytes[13] != 0, bytes };
        let is_whole =
            matches!(change, Change::Totals(_)) || entry.archive_at() + entry.archive_padded() == bytes.len();
        if !is_whole {
            return Err("an entry is not as long as its parts");
        }
        if entry.is_letter() && (u16_at(bytes, 42) == 0 || bytes[14] > LetterKind::Undecodable as u8) {
            return Err("a letter of an event type or a kind that cannot be");
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

    /// How often it was tried, and what was said the last time.
    pub(super) fn attempts(&self) -> Result<(u32, String), &'static str> {
        let error = &self.bytes[self.error_at()..][..self.error_bytes()];
        let error = std::str::from_utf8(error).map_err(|_| "an error's text is not UTF-8")?;
        Ok((u32_at(self.bytes, 48), error.to_owned()))
    }

    pub(super) fn time(&self) -> Time {
        Time(u64_at(self.bytes, 32))
    }

    /// The letter in an entry that is one.
    pub(super) fn letter(&self) -> Result<DeadLetter, &'static str> {
        if !self.is_letter() {
            return Err("an entry that is no letter");
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
                _ => return Err("a letter of an unknown kind"),
            },
            attempts,
            error,
            first_failed: self.time(),
            last_failed: Time(u64_at(self.bytes, 80)),
        })
    }
}
