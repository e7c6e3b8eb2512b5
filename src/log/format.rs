//! The bytes of a segment header and of a record. Pure functions; `FORMAT.md` draws the same tables.
//!
//! ```text
//! record   0 length u32 (stored last: the commit; 0 = end)   4 crc u32
//!          8 time u64   16 key u64   24 back-link/16 u48 | type u16
//!         32 correlation u64   40 version u47, more u1 | schema version u16   48 body, zero-padded to 16
//! ```

use crate::event::{Correlation, Event, EventTypeId, Key, Meta, Offset, Root, Sequence, ShardId, Time, Version};
use crate::log::seal::{commit, crc32c};
use crate::storage::framed::{u16_at, u32_at, u64_at};
use crate::storage::memory::{ALIGN, padded};

/// Bytes of a segment header: one page.
pub(crate) const HEADER_BYTES: usize = 4096;
/// Bytes of a record header.
pub(crate) const RECORD_HEADER_BYTES: usize = 48;
/// No record is longer than this: the header and the largest archive a configuration may allow.
pub(crate) const RECORD_BYTES_MAX: usize = RECORD_HEADER_BYTES + (16 << 20);
/// The format this build writes, and the newest it reads.
pub(crate) const FORMAT_VERSION: u32 = 2;
/// The type id of the log's own records, told apart by their schema version.
const OWN: EventTypeId = EventTypeId(0);
/// A mark: no event, no body; `key` is a position that had been synced.
const OWN_MARK: u16 = 0;
/// What became of a command that carried an idempotency key (in `correlation`): the key's version after it, and in the
/// place of the back-link its [`Ending`]. The body is the archive of the rejection, if it was rejected.
const OWN_OUTCOME: u16 = 1;

const SEGMENT_MAGIC: [u8; 8] = *b"corelseg";
const BYTE_ORDER: u32 = 0x0102_0304;
const SALT_AT: usize = 72;
const HEADER_CRC_AT: usize = SALT_AT + 4;
const LOW_48: u64 = (1 << 48) - 1;
pub(crate) const LOW_47: u64 = (1 << 47) - 1;
/// In the word of the version: the next record belongs to the same command, and one is nothing without the other.
const MORE: u64 = 1 << 47;
/// No record begins here or beyond: a back-link holds 48 bits of 16-byte steps.
pub(crate) const OFFSETS_END: u64 = (LOW_48 + 1) * ALIGN as u64;

const _: () = assert!(RECORD_HEADER_BYTES.is_multiple_of(ALIGN) && HEADER_BYTES.is_multiple_of(ALIGN));

/// What makes archives of two builds compatible: rkyv's pointer width, byte order and alignment, as this build has them.
pub(crate) fn archive_fingerprint() -> u32 {
    let pointer_bytes = size_of::<rkyv::primitive::ArchivedUsize>() as u8;
    let aligned = align_of::<rkyv::primitive::ArchivedU64>() as u8;
    fingerprint(pointer_bytes, archived_one(), aligned)
}

/// What rkyv stores for 1. Its byte order is a feature of the build, whatever the machine's is.
fn archived_one() -> [u8; 4] {
    let mut one = rkyv::util::Align([0; 4]);
    let stored = rkyv::api::low::to_bytes_in_with_alloc::<_, _, rkyv::rancor::Failure>(
        &1_u32,
        rkyv::ser::writer::Buffer::from(&mut *one),
        rkyv::ser::allocator::SubAllocator::empty(),
    );
    assert!(stored.is_ok_and(|stored| stored.len() == 4), "a u32 takes four bytes");
    *one
}

fn fingerprint(pointer_bytes: u8, one: [u8; 4], aligned: u8) -> u32 {
    crc32c::crc32c(&[b'r', b'k', 8, pointer_bytes, u8::from(one == 1_u32.to_le_bytes()), aligned])
}

/// What makes two programs' events the same: ids, names and schema versions.
pub(crate) fn schema_fingerprint<E: Event>() -> u32 {
    E::TYPES.iter().fold(0, |crc, t| {
        let crc = crc32c::crc32c_append(crc, &t.id.0.to_le_bytes());
        let crc = crc32c::crc32c_append(crc, &t.schema_version.to_le_bytes());
        crc32c::crc32c_append(crc, t.name.as_bytes())
    })
}

/// The head of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SegmentHeader {
    pub(crate) schema: u32,
    pub(crate) shard: ShardId,
    pub(crate) index: u64,
    pub(crate) segment_bytes: u64,
    /// Offset at which the last record of the segment before it ends; 0 where there is none.
    pub(crate) previous_end: Offset,
    /// Salt of the segment before it; 0 where there is none.
    pub(crate) previous_salt: u32,
    pub(crate) first_sequence: u64,
    pub(crate) created: Time,
    pub(crate) salt: u32,
}

/// What a page without magic before a record is: damage, unless the record is found to be of an earlier life of the file.
pub(crate) const LOST_MAGIC: &str = "the segment header has lost its magic";

/// The seam between two segments: where the one before ends, and what has been counted up to there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Seam {
    pub(crate) end: Offset,
    pub(crate) salt: u32,
    pub(crate) sequence: u64,
}

impl Seam {
    /// Why a reader that stands at `here` must not go on into the segment with this seam, if so.
    pub(crate) fn breaks_after(&self, here: &Seam) -> Option<&'static str> {
        if self.salt != here.salt {
            return Some("the next segment does not follow this one: one of them is of another log");
        }
        if self.end != here.end {
            return Some("the records end here, but the next segment says that they end elsewhere");
        }
        (self.sequence != here.sequence).then_some("the next segment's first sequence does not follow")
    }
}

/// Why a page is not the header it should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HeaderError {
    /// Prepared and never used.
    Blank,
    /// Of a format this build does not know.
    Version(u32),
    /// Of another archive format.
    Archive(u32),
    /// Something else.
    Damaged(&'static str),
}

/// Writes the page of a segment that is prepared and not begun: its salt, and a checksum over what stands there. So a
/// page that was lost is never taken for one that was not written yet. One sector changes: it is there or it is not.
pub(crate) fn encode_prepared(salt: u32, page: &mut [u8]) {
    assert!(page.len() >= HEADER_BYTES && salt != 0);
    page[..HEADER_BYTES].fill(0);
    page[SALT_AT..HEADER_CRC_AT].copy_from_slice(&salt.to_le_bytes());
    page[HEADER_CRC_AT..HEADER_CRC_AT + 4].copy_from_slice(&prepared_crc(salt).to_le_bytes());
}

/// The CRC of a prepared page: of zeros and the salt.
fn prepared_crc(salt: u32) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&[0; SALT_AT]), &salt.to_le_bytes())
}

/// Whether a page is prepared, or being begun: its last word is still what [`encode_prepared`] wrote.
fn is_prepared(page: &[u8]) -> bool {
    let salt = u32_at(page, SALT_AT);
    salt != 0
        && u32_at(page, HEADER_CRC_AT) == prepared_crc(salt)
        && page[HEADER_CRC_AT + 4..HEADER_BYTES].iter().all(|&byte| byte == 0)
}

impl SegmentHeader {
    /// Where the segment's first record begins.
    pub(crate) fn first_offset(&self) -> Offset {
        Offset(self.index.wrapping_mul(self.segment_bytes).wrapping_add(HEADER_BYTES as u64))
    }

    /// What the segment before must come to.
    pub(crate) fn seam(&self) -> Seam {
        Seam { end: self.previous_end, salt: self.previous_salt, sequence: self.first_sequence }
    }

    /// Begins a segment: writes its header over a prepared page. The fields come first, then salt and CRC as one word, which
    /// commits them. A process killed between any two stores, or a page written back there, leaves a page that is still prepared.
    pub(crate) fn encode(&self, page: &mut [u8]) {
        assert!(is_prepared(page) && u32_at(page, SALT_AT) == self.salt, "a segment is begun on its prepared page");
        page[0..8].copy_from_slice(&SEGMENT_MAGIC);
        page[8..12].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
        page[12..16].copy_from_slice(&BYTE_ORDER.to_le_bytes());
        page[16..20].copy_from_slice(&archive_fingerprint().to_le_bytes());
        page[20..24].copy_from_slice(&self.schema.to_le_bytes());
        page[24..26].copy_from_slice(&self.shard.0.to_le_bytes());
        page[26..28].fill(0);
        page[28..32].copy_from_slice(&self.previous_salt.to_le_bytes());
        page[32..40].copy_from_slice(&self.index.to_le_bytes());
        page[40..48].copy_from_slice(&self.segment_bytes.to_le_bytes());
        page[48..56].copy_from_slice(&self.previous_end.0.to_le_bytes());
        page[56..64].copy_from_slice(&self.first_sequence.to_le_bytes());
        page[64..72].copy_from_slice(&self.created.0.to_le_bytes());
        let crc = crc32c::crc32c(&page[..HEADER_CRC_AT]);
        commit(&mut page[SALT_AT..], self.salt, crc);
    }

    /// Reads the header from a segment's first bytes: its page and, to tell a lost magic from a blank page, the
    /// first record's length word.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, HeaderError> {
        let page = bytes;
        if page.len() < HEADER_BYTES {
            return Err(HeaderError::Damaged("the segment is shorter than its header"));
        }
        let crc_holds = crc32c::crc32c(&page[..HEADER_CRC_AT]) == u32_at(page, HEADER_CRC_AT);
        let is_begun = crc_holds && page[..8] == SEGMENT_MAGIC;
        // Whatever stands in the fields before that word was not committed. (A record behind such a page: a power cut took the
        // header and left the record, and neither was durable.)
        if !is_begun && is_prepared(page) {
            return Err(HeaderError::Blank);
        }
        if page[..8].iter().all(|&byte| byte == 0) {
            // Of an earlier build, which stored the magic last: never begun, or killed while it was. The end is written before the
            // page, so the place of the first record was zero then.
            let has_record = bytes.get(HEADER_BYTES..HEADER_BYTES + 4).is_some_and(|word| word != [0; 4]);
            return Err(if has_record { HeaderError::Damaged(LOST_MAGIC) } else { HeaderError::Blank });
        }
        if page[0..8] != SEGMENT_MAGIC {
            return Err(HeaderError::Damaged("not a segment: wrong magic"));
        }
        let version = u32_at(page, 8);
        // A newer format may keep its checksum elsewhere, so its version is believed as it stands;
        // damage to the version of a known format shows in the checksum of that format.
        if version != FORMAT_VERSION && !crc_holds_with_version(page, FORMAT_VERSION) {
            return Err(HeaderError::Version(version));
        }
        if !crc_holds {
            return Err(HeaderError::Damaged("the segment header's CRC does not hold"));
        }
        if u32_at(page, 12) != BYTE_ORDER {
            return Err(HeaderError::Damaged("the segment header's byte order mark does not hold"));
        }
        if u32_at(page, SALT_AT) == 0 {
            return Err(HeaderError::Damaged("the segment header has no salt"));
        }
        if u32_at(page, 16) != archive_fingerprint() {
            return Err(HeaderError::Archive(u32_at(page, 16)));
        }
        if page[HEADER_CRC_AT + 4..HEADER_BYTES].iter().any(|&byte| byte != 0) {
            return Err(HeaderError::Damaged("unused bytes of the segment header are not zero"));
        }
        Ok(Self {
            schema: u32_at(page, 20),
            shard: ShardId(u16_at(page, 24)),
            index: u64_at(page, 32),
            segment_bytes: u64_at(page, 40),
            previous_end: Offset(u64_at(page, 48)),
            previous_salt: u32_at(page, 28),
            first_sequence: u64_at(page, 56),
            created: Time(u64_at(page, 64)),
            salt: u32_at(page, 72),
        })
    }
}

/// Whether the checksum would hold if the version field said `version`.
fn crc_holds_with_version(page: &[u8], version: u32) -> bool {
    let crc = crc32c::crc32c(&page[..8]);
    let crc = crc32c::crc32c_append(crc, &version.to_le_bytes());
    crc32c::crc32c_append(crc, &page[12..HEADER_CRC_AT]) == u32_at(page, HEADER_CRC_AT)
}

/// How a command ended. In an outcome it stands in the place of the back-link, in 48 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ending {
    /// It was carried out, with this many events.
    Done { events: u32 },
    /// It was rejected; the rejection's archive has this root.
    Rejected(Root),
}

/// In an [`Ending`]: rejected.
const REJECTED: u64 = 1 << 47;

impl Ending {
    pub(crate) fn encode(self) -> u64 {
        match self {
            Self::Done { events } => u64::from(events),
            Self::Rejected(root) => {
                assert!(usize::from(root.align) <= ALIGN, "archives are not aligned to more");
                REJECTED | u64::from(root.align) << 32 | u64::from(root.bytes)
            }
        }
    }

    pub(crate) fn decode(word: u64) -> Option<Self> {
        if word & REJECTED == 0 {
            return u32::try_from(word).ok().map(|events| Self::Done { events });
        }
        let align = (word & !REJECTED) >> 32;
        let root = Root { bytes: word as u32, align: align as u16 };
        (align.is_power_of_two() && align <= ALIGN as u64).then_some(Self::Rejected(root))
    }
}

/// The header of a record, without length and CRC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RecordHeader {
    pub(crate) time: Time,
    pub(crate) key: Key,
    /// 0: the key has no previous record.
    pub(crate) previous: Offset,
    pub(crate) event_type: EventTypeId,
    pub(crate) correlation: Correlation,
    pub(crate) version: Version,
    pub(crate) schema_version: u16,
    /// The next record belongs to the same command: both hold or neither does.
    pub(crate) more: bool,
}

impl RecordHeader {
    /// A mark: everything below `durable` had been synced.
    pub(crate) fn mark(durable: u64, time: Time) -> Self {
        Self {
            time,
            key: Key(durable),
            previous: Offset(0),
            event_type: OWN,
            correlation: Correlation(0),
            version: Version(0),
            schema_version: OWN_MARK,
            more: false,
        }
    }

    /// What became of a command of `key` under an idempotency key.
    pub(crate) fn outcome(key: Key, idempotency: u64, version: Version, ending: Ending, time: Time) -> Self {
        Self {
            time,
            key,
            previous: Offset(ending.encode() * ALIGN as u64),
            event_type: OWN,
            correlation: Correlation(idempotency),
            version,
            schema_version: OWN_OUTCOME,
            more: false,
        }
    }

    /// Whether the record is the log's own and no event.
    #[inline]
    pub(crate) fn is_own(&self) -> bool {
        self.event_type == OWN
    }

    /// Whether this is a mark: `key` is then a position.
    #[inline]
    pub(crate) fn is_mark(&self) -> bool {
        self.event_type == OWN && self.schema_version == OWN_MARK
    }

    /// Whether this tells what became of a command.
    #[inline]
    pub(crate) fn is_outcome(&self) -> bool {
        self.event_type == OWN && self.schema_version == OWN_OUTCOME
    }

    /// How the command of an outcome ended; `None` where that is nothing this build writes.
    pub(crate) fn ending(&self) -> Option<Ending> {
        Ending::decode(self.previous.0 / ALIGN as u64)
    }

    /// Writes the fields before a body that already stands behind them, with a length word of zero: no record yet.
    #[inline(always)]
    pub(crate) fn stage(&self, head: &mut [u8; RECORD_HEADER_BYTES]) {
        debug_assert!(self.version.0 <= LOW_47 && self.previous.0.is_multiple_of(ALIGN as u64));
        debug_assert!(self.previous.0 < OFFSETS_END);
        let link = (self.previous.0 / ALIGN as u64) | u64::from(self.event_type.0) << 48;
        let more = if self.more { MORE } else { 0 };
        let version = self.version.0 | more | u64::from(self.schema_version) << 48;
        head[0..8].fill(0);
        head[8..16].copy_from_slice(&self.time.0.to_le_bytes());
        head[16..24].copy_from_slice(&self.key.0.to_le_bytes());
        head[24..32].copy_from_slice(&link.to_le_bytes());
        head[32..40].copy_from_slice(&self.correlation.0.to_le_bytes());
        head[40..48].copy_from_slice(&version.to_le_bytes());
    }

    /// What readers and handlers are told of the record at `offset`.
    #[inline]
    pub(crate) fn meta(&self, shard: ShardId, offset: Offset, sequence: Sequence) -> Meta {
        Meta {
            shard,
            offset,
            sequence,
            key: self.key,
            version: self.version,
            time: self.time,
            event_type: self.event_type,
            schema_version: self.schema_version,
            correlation: self.correlation,
            previous: (self.previous.0 != 0).then_some(self.previous),
        }
    }

    /// Reads a header; whether it holds is for [`record_len`] to say.
    #[inline]
    pub(crate) fn decode(record: &[u8]) -> Self {
        let link = u64_at(record, 24);
        let version = u64_at(record, 40);
        Self {
            time: Time(u64_at(record, 8)),
            key: Key(u64_at(record, 16)),
            previous: Offset((link & LOW_48) * ALIGN as u64),
            event_type: EventTypeId((link >> 48) as u16),
            correlation: Correlation(u64_at(record, 32)),
            version: Version(version & LOW_47),
            schema_version: (version >> 48) as u16,
            more: version & MORE != 0,
        }
    }
}

/// What stands at a place where a record may begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Found {
    /// A whole record of this exact length.
    Record(usize),
    /// The end: a zero length word, or no room for a header.
    End,
    /// Neither.
    Damaged(&'static str),
}

/// Looks at the bytes from a record's beginning to the end of its segment, CRC checked.
#[inline]
pub(crate) fn record_at(tail: &[u8], salt: u32) -> Found {
    if tail.len() < RECORD_HEADER_BYTES {
        return Found::End;
    }
    let len = u32_at(tail, 0) as usize;
    if len == 0 {
        return Found::End;
    }
    if !(RECORD_HEADER_BYTES..=RECORD_BYTES_MAX).contains(&len) || padded(len) > tail.len() {
        return Found::Damaged("a record's length is out of range");
    }
    if crc32c(salt, &tail[8..len]) != u32_at(tail, 4) {
        return Found::Damaged("a record's CRC does not hold");
    }
    if tail[len..padded(len)].iter().any(|&byte| byte != 0) {
        return Found::Damaged("the padding of a record is not zero");
    }
    Found::Record(len)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::log::seal::seal;

    fn header() -> RecordHeader {
        RecordHeader {
            time: Time(1),
            key: Key(2),
            previous: Offset(4096),
            event_type: EventTypeId(3),
            correlation: Correlation(4),
            version: Version(5),
            schema_version: 6,
            more: true,
        }
    }

    #[test]
    fn a_record_reads_back_as_written() {
        let mut bytes = sealed(&header(), b"hello", 9);
        bytes.resize(96, 0xff);
        assert_eq!(record_at(&bytes, 9), Found::Record(53));
        assert_eq!(RecordHeader::decode(&bytes), header());
        assert!(matches!(record_at(&bytes, 10), Found::Damaged(_)), "another salt must not replay");
    }

    #[test]
    fn every_flipped_bit_of_a_record_shows() {
        let mut bytes = sealed(&header(), b"hello", 9);
        assert_eq!(bytes.len(), 64);
        for bit in 0..64 * 8 {
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert_ne!(record_at(&bytes, 9), Found::Record(53), "bit {bit}");
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
    }

    #[test]
    fn every_flipped_bit_of_a_segment_header_shows() {
        let head = SegmentHeader {
            schema: 1,
            shard: ShardId(2),
            index: 3,
            segment_bytes: 65536,
            previous_end: Offset(3 * 65536 - 4096),
            previous_salt: 7,
            first_sequence: 4,
            created: Time(5),
            salt: 6,
        };
        let mut page = vec![0; HEADER_BYTES];
        encode_prepared(head.salt, &mut page);
        head.encode(&mut page);
        assert_eq!(SegmentHeader::decode(&page), Ok(head));
        for bit in 0..HEADER_BYTES * 8 {
            page[bit / 8] ^= 1 << (bit % 8);
            assert!(SegmentHeader::decode(&page).is_err(), "bit {bit}");
            page[bit / 8] ^= 1 << (bit % 8);
        }
    }

    /// Compares with a golden file; `CORELANE_GOLDEN=write` renews it, which a change of format alone may need.
    pub(crate) fn assert_golden(name: &str, bytes: &[u8]) {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
        if std::env::var("CORELANE_GOLDEN").is_ok_and(|what| what == "write") {
            std::fs::write(&path, bytes).expect("written");
        }
        let golden = std::fs::read(&path).expect("the golden file is there");
        assert!(golden == bytes, "{name}: these bytes are frozen:\n{golden:02x?}\nbut this build writes\n{bytes:02x?}");
    }

    /// A whole record, padded.
    pub(crate) fn sealed(header: &RecordHeader, body: &[u8], salt: u32) -> Vec<u8> {
        let mut head = [0xff; RECORD_HEADER_BYTES];
        header.stage(&mut head);
        let mut bytes = rkyv::util::AlignedVec::<ALIGN>::new();
        bytes.extend_from_slice(&head);
        bytes.extend_from_slice(body);
        let len = bytes.len();
        bytes.resize(padded(len), 0);
        seal(salt, &mut bytes, &[len as u32]);
        bytes.into_vec()
    }

    #[test]
    fn segment_header_is_frozen() {
        let head = SegmentHeader {
            schema: 0x1122_3344,
            shard: ShardId(0x0506),
            index: 7,
            segment_bytes: 256 << 20,
            previous_end: Offset(7 * (256 << 20) - 48),
            previous_salt: 0x5a17_5a17,
            first_sequence: 0x0102_0304_0506_0708,
            created: Time(1_700_000_000_000_000_000),
            salt: 0x0bad_cafe,
        };
        let mut page = vec![0xff; HEADER_BYTES];
        encode_prepared(head.salt, &mut page);
        head.encode(&mut page);
        assert_golden("segment-header.bin", &page);
        assert_eq!(SegmentHeader::decode(&page), Ok(head));
    }

    #[test]
    fn prepared_page_is_frozen_and_blank() {
        let mut page = vec![0xff; HEADER_BYTES + 4];
        encode_prepared(0x0bad_cafe, &mut page);
        assert_golden("prepared-page.bin", &page[..HEADER_BYTES]);
        // Whatever stands behind it.
        assert_eq!(SegmentHeader::decode(&page), Err(HeaderError::Blank));
        // And whatever stands in the fields that its last word would commit.
        for bit in 0..SALT_AT * 8 {
            page[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(SegmentHeader::decode(&page), Err(HeaderError::Blank), "bit {bit}");
            page[bit / 8] ^= 1 << (bit % 8);
        }
        for bit in SALT_AT * 8..HEADER_BYTES * 8 {
            page[bit / 8] ^= 1 << (bit % 8);
            assert!(matches!(SegmentHeader::decode(&page), Err(HeaderError::Damaged(_))), "bit {bit} before a record");
            page[bit / 8] ^= 1 << (bit % 8);
        }
    }

    #[test]
    fn a_segment_is_prepared_until_the_last_store_of_its_header_and_begun_with_it() {
        let head = SegmentHeader {
            schema: 0x1122_3344,
            shard: ShardId(5),
            index: 7,
            segment_bytes: 1 << 20,
            previous_end: Offset(7 << 20),
            previous_salt: 8,
            first_sequence: 99,
            created: Time(1_700_000_000_000_000_000),
            salt: 0x0bad_cafe,
        };
        let mut prepared = vec![0; HEADER_BYTES + 4];
        encode_prepared(head.salt, &mut prepared);
        let mut begun = prepared.clone();
        head.encode(&mut begun);
        let mut random = 1_u64;
        for behind in [[0; 4], [0x40, 0, 0, 0]] {
            prepared[HEADER_BYTES..].copy_from_slice(&behind);
            // Byte by byte from the front, and any of them before any other: a page may be written back at any moment.
            for stored in 0..SALT_AT * 20 {
                let mut page = prepared.clone();
                for at in 0..SALT_AT {
                    random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    if if stored < SALT_AT { at < stored } else { random >> 63 == 0 } {
                        page[at] = begun[at];
                    }
                }
                assert_eq!(SegmentHeader::decode(&page), Err(HeaderError::Blank), "{stored} bytes stored");
            }
            let mut page = prepared.clone();
            page[..HEADER_BYTES].copy_from_slice(&begun[..HEADER_BYTES]);
            assert_eq!(SegmentHeader::decode(&page), Ok(head));
        }
    }

    #[test]
    fn record_and_mark_are_frozen() {
        let event = RecordHeader {
            time: Time(1_700_000_000_123_456_789),
            key: Key(0xfedc_ba98_7654_3210),
            previous: Offset(0x0012_3456_7890),
            event_type: EventTypeId(0x0102),
            correlation: Correlation(0x1111_2222_3333_4444),
            version: Version(0x0000_2abb_ccdd_eeff),
            schema_version: 0x0304,
            more: true,
        };
        let bytes = sealed(&event, b"an archive of 21 byte", 0x0bad_cafe);
        assert_golden("record.bin", &bytes);
        assert_eq!(record_at(&bytes, 0x0bad_cafe), Found::Record(69));
        assert_eq!(RecordHeader::decode(&bytes), event);
        let mark = RecordHeader::mark(0x0012_3456_7890, Time(1_700_000_000_123_456_789));
        let bytes = sealed(&mark, b"", 0x0bad_cafe);
        assert_golden("mark.bin", &bytes);
        assert_eq!(record_at(&bytes, 0x0bad_cafe), Found::Record(48));
        let ending = Ending::Rejected(Root { bytes: 18, align: 1 });
        let outcome =
            RecordHeader::outcome(Key(42), 0x5555_6666_7777_8888, Version(7), ending, Time(1_700_000_000_123_456_789));
        let bytes = sealed(&outcome, b"why it was refused", 0x0bad_cafe);
        assert_golden("outcome.bin", &bytes);
        let read = RecordHeader::decode(&bytes);
        assert!(read == outcome && read.is_outcome() && !read.is_mark() && read.ending() == Some(ending));
    }

    #[test]
    fn an_ending_is_read_as_it_was_written_and_nothing_else_is_one() {
        let root = |bytes, align| Root { bytes, align };
        let done = |events| Ending::Done { events };
        for ending in [
            done(0),
            done(1),
            done(u32::MAX),
            Ending::Rejected(root(0, 1)),
            Ending::Rejected(root(u32::MAX, 16)),
            Ending::Rejected(root(24, 8)),
        ] {
            assert_eq!(Ending::decode(ending.encode()), Some(ending));
            assert!(ending.encode() <= LOW_48, "{ending:?} has room in a back-link");
        }
        for word in [1 << 32, REJECTED - 1, REJECTED, REJECTED | 3 << 32, REJECTED | 32 << 32, REJECTED << 1, u64::MAX]
        {
            assert_eq!(Ending::decode(word), None, "{word:#x}");
        }
    }

    #[test]
    fn fingerprints_are_frozen() {
        let little = fingerprint(4, 1_u32.to_le_bytes(), 8);
        assert_golden("archive-fingerprint.bin", &little.to_le_bytes());
        let big = fingerprint(4, 1_u32.to_be_bytes(), 8);
        let unaligned = fingerprint(4, 1_u32.to_le_bytes(), 1);
        let wide = fingerprint(8, 1_u32.to_le_bytes(), 8);
        assert!([big, unaligned, wide].iter().all(|&other| other != little));
        assert_eq!(archive_fingerprint(), if archived_one() == [0, 0, 0, 1] { big } else { little });
    }
}
