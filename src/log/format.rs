//! The bytes of a segment header and of a record. Pure functions; `FORMAT.md` §5 and §6 have the same tables.
//!
//! ```text
//! record   0 length u32 (stored last: the commit; 0 = end)   4 crc u32
//!          8 time u64   16 key u64   24 back-link/16 u48 | type u16
//!         32 correlation u64   40 version u47, more u1 | schema version u16   48 body, zero-padded to 16
//! ```

use crate::event::{Correlation, Event, EventTypeId, Key, Meta, Offset, Root, Sequence, ShardId, Time, Version};
use crate::log::seal::{commit, crc32c};
use crate::storage::framed::{
    CRC_BYTES, FORMAT_VERSION, put_u16, put_u32, put_u64, stated_version, u16_at, u32_at, u64_at,
};
use crate::storage::memory::{ALIGN, padded};

/// Bytes of a segment header: one page.
pub(crate) const HEADER_BYTES: usize = 4096;
/// Bytes of a record header.
pub(crate) const RECORD_HEADER_BYTES: usize = 48;
/// Length of the longest record: its header and the largest archive that a configuration may allow.
pub(crate) const RECORD_BYTES_MAX: usize = RECORD_HEADER_BYTES + (16 << 20);
/// The event type id of the log's own records. Their schema version distinguishes the kinds.
const OWN: EventTypeId = EventTypeId(0);
/// A mark, which is not an event and has no body. Its `key` is the offset up to which the log was synced.
const OWN_MARK: u16 = 0;
/// The outcome of a command with an idempotency key. `key` is the command's first key, `correlation` is the idempotency
/// key, `version` is the key's version after the command, and the back-link's bits hold an [`Ending`]. The body is the
/// archive of the rejection, or the other keys of a command for several keys ([`crate::log::other_keys`]).
const OWN_OUTCOME: u16 = 1;

const SEGMENT_MAGIC: [u8; 8] = *b"corelseg";
const BYTE_ORDER: u32 = 0x0102_0304;
const SALT_AT: usize = 72;
const HEADER_CRC_AT: usize = SALT_AT + 4;
const HEADER_USED_BYTES: usize = HEADER_CRC_AT + CRC_BYTES;
const LOW_48: u64 = (1 << 48) - 1;
pub(crate) const LOW_47: u64 = (1 << 47) - 1;
/// A bit beside the version: the next record belongs to the same command, and the log holds both or neither.
const MORE: u64 = 1 << 47;
/// The end of the last segment that a log can have: a back-link has 48 bits and counts 16-byte steps.
pub(crate) const OFFSETS_END: u64 = (LOW_48 + 1) * ALIGN as u64;

const _: () = assert!(RECORD_HEADER_BYTES.is_multiple_of(ALIGN) && HEADER_BYTES.is_multiple_of(ALIGN));

/// Returns `true` if an offset read from a file can be a position in a log, or is 0, which means none. Only the log can
/// tell whether a record begins there.
pub(crate) fn is_offset(offset: Offset) -> bool {
    offset.0.is_multiple_of(ALIGN as u64) && offset.0 <= OFFSETS_END
}

/// Returns `true` if a record may begin, or the log may end, at an offset read from a file: as [`is_offset`], but
/// without the offsets inside the first segment's header.
pub(crate) fn is_record_offset(offset: Offset) -> bool {
    is_offset(offset) && offset.0 >= HEADER_BYTES as u64
}

/// Returns the fingerprint of the properties that make archives of two builds compatible: rkyv's pointer width, byte
/// order and alignment.
pub(crate) fn archive_fingerprint() -> u32 {
    let pointer_bytes = size_of::<rkyv::primitive::ArchivedUsize>() as u8;
    let aligned = align_of::<rkyv::primitive::ArchivedU64>() as u8;
    fingerprint(pointer_bytes, archived_one(), aligned)
}

/// Returns the number 1 as rkyv stores it. The byte order is a feature of the build and does not depend on the machine.
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

/// Returns the fingerprint of a program's event types: ids, names and schema versions.
pub(crate) fn schema_fingerprint<E: Event>() -> u32 {
    E::TYPES.iter().fold(0, |crc, t| {
        let crc = crc32c::crc32c_append(crc, &t.id.0.to_le_bytes());
        let crc = crc32c::crc32c_append(crc, &t.schema_version.to_le_bytes());
        crc32c::crc32c_append(crc, t.name.as_bytes())
    })
}

/// The header of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SegmentHeader {
    pub(crate) schema: u32,
    pub(crate) shard: ShardId,
    pub(crate) index: u64,
    pub(crate) segment_bytes: u64,
    /// The offset where the last record of the previous segment ends; 0 without a previous segment.
    pub(crate) previous_end: Offset,
    /// The salt of the previous segment; 0 without a previous segment.
    pub(crate) previous_salt: u32,
    pub(crate) first_sequence: u64,
    pub(crate) created: Time,
    pub(crate) salt: u32,
}

/// The error for a page that has no magic but is followed by a record. This is damage, unless recovery finds that the
/// record belongs to an earlier use of the file.
pub(crate) const LOST_MAGIC: &str = "the segment header has lost its magic";

/// The seam between two segments: the end and salt of the earlier one, and the number of events before the later one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Seam {
    pub(crate) end: Offset,
    pub(crate) salt: u32,
    pub(crate) sequence: u64,
}

impl Seam {
    /// Returns the reason, if any, why a reader at `here` must not continue in the segment that states this seam.
    pub(crate) fn breaks_after(&self, here: &Seam) -> Option<&'static str> {
        if self.salt != here.salt {
            return Some("the next segment does not follow this one: one of them is of another log");
        }
        if self.end != here.end {
            return Some("the end that the next segment states for this one differs from the end of its records");
        }
        (self.sequence != here.sequence).then_some("the next segment's first sequence does not follow")
    }
}

/// The reason why a page is not a valid segment header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HeaderError {
    /// The segment is prepared and not yet begun.
    Blank,
    /// This build does not know the format version.
    Version(u32),
    /// The archives have this other format.
    Archive(u32),
    /// Any other reason.
    Damaged(&'static str),
}

/// Writes the page of a prepared segment: its salt, and a CRC over the salt and the zeros before it. The CRC
/// distinguishes a lost page from a page that was never written. Only one sector changes, so the page is written whole
/// or not at all.
pub(crate) fn encode_prepared(salt: u32, page: &mut [u8]) {
    assert!(page.len() >= HEADER_BYTES && salt != 0);
    page[..HEADER_BYTES].fill(0);
    put_u32(page, SALT_AT, salt);
    put_u32(page, HEADER_CRC_AT, prepared_crc(salt));
}

/// Returns the CRC of a prepared page, over zeros and the salt.
fn prepared_crc(salt: u32) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&[0; SALT_AT]), &salt.to_le_bytes())
}

/// Returns `true` if salt and CRC are those of [`encode_prepared`]. The earlier bytes may hold a header that is being
/// written.
fn is_prepared(page: &[u8]) -> bool {
    let salt = u32_at(page, SALT_AT);
    salt != 0 && u32_at(page, HEADER_CRC_AT) == prepared_crc(salt) && is_unused_zero(page)
}

/// Returns `true` if the bytes of a page after its CRC are zero.
fn is_unused_zero(page: &[u8]) -> bool {
    page[HEADER_USED_BYTES..HEADER_BYTES].iter().all(|&byte| byte == 0)
}

impl SegmentHeader {
    /// Returns the offset at which the segment's first record begins.
    pub(crate) fn first_offset(&self) -> Offset {
        Offset(self.index.wrapping_mul(self.segment_bytes).wrapping_add(HEADER_BYTES as u64))
    }

    /// Returns the seam that the previous segment must end with.
    pub(crate) fn seam(&self) -> Seam {
        Seam { end: self.previous_end, salt: self.previous_salt, sequence: self.first_sequence }
    }

    /// Begins a segment: writes its header over a prepared page. Salt and CRC are stored last, as one word, which
    /// commits the other fields. If the process is killed, or the system writes the page back, between two stores, the
    /// page still counts as prepared.
    pub(crate) fn encode(&self, page: &mut [u8]) {
        assert!(is_prepared(page) && u32_at(page, SALT_AT) == self.salt, "a segment is begun on its prepared page");
        page[0..8].copy_from_slice(&SEGMENT_MAGIC);
        put_u32(page, 8, FORMAT_VERSION);
        put_u32(page, 12, BYTE_ORDER);
        put_u32(page, 16, archive_fingerprint());
        put_u32(page, 20, self.schema);
        put_u16(page, 24, self.shard.0);
        put_u16(page, 26, 0);
        put_u32(page, 28, self.previous_salt);
        put_u64(page, 32, self.index);
        put_u64(page, 40, self.segment_bytes);
        put_u64(page, 48, self.previous_end.0);
        put_u64(page, 56, self.first_sequence);
        put_u64(page, 64, self.created.0);
        let crc = crc32c::crc32c(&page[..HEADER_CRC_AT]);
        commit(&mut page[SALT_AT..], self.salt, crc);
    }

    /// Reads the header from the first bytes of a segment: its page and the first record's length word. The length word
    /// distinguishes a lost magic from a blank page.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, HeaderError> {
        let page = bytes;
        if page.len() < HEADER_BYTES {
            return Err(HeaderError::Damaged("the segment is shorter than its header"));
        }
        let crc_matches = crc32c::crc32c(&page[..HEADER_CRC_AT]) == u32_at(page, HEADER_CRC_AT);
        let is_begun = crc_matches && page[..8] == SEGMENT_MAGIC;
        // The fields before the last word were not committed. (A record may follow such a page: a power cut lost the
        // header and kept the record, and neither was durable.)
        if !is_begun && is_prepared(page) {
            return Err(HeaderError::Blank);
        }
        if page[..8].iter().all(|&byte| byte == 0) {
            // The page is of an earlier build, which stored the magic last: the segment was never begun, or the process
            // was killed before the magic was stored. That build wrote a zero length word for the first record before
            // the page.
            let has_record = bytes.get(HEADER_BYTES..HEADER_BYTES + 4).is_some_and(|word| word != [0; 4]);
            return Err(if has_record { HeaderError::Damaged(LOST_MAGIC) } else { HeaderError::Blank });
        }
        if page[0..8] != SEGMENT_MAGIC {
            return Err(HeaderError::Damaged("not a segment: wrong magic"));
        }
        if let Some(version) = stated_version(&page[..HEADER_USED_BYTES]) {
            return Err(HeaderError::Version(version));
        }
        if !crc_matches {
            return Err(HeaderError::Damaged("checksum mismatch in the segment header"));
        }
        if u32_at(page, 12) != BYTE_ORDER {
            return Err(HeaderError::Damaged("the segment header has a wrong byte order mark"));
        }
        if u32_at(page, SALT_AT) == 0 {
            return Err(HeaderError::Damaged("the segment header has no salt"));
        }
        if u32_at(page, 16) != archive_fingerprint() {
            return Err(HeaderError::Archive(u32_at(page, 16)));
        }
        if !is_unused_zero(page) {
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
            salt: u32_at(page, SALT_AT),
        })
    }
}

/// How a command ended. An outcome stores it in the 48 bits of the back-link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ending {
    /// The command was carried out, emitted this many events, and named this many keys besides its first.
    Done { events: u32, others: u8 },
    /// The command was rejected; the rejection's archive has this root.
    Rejected(Root),
}

/// The bit of an [`Ending`] that says *rejected*.
const REJECTED: u64 = 1 << 47;

impl Ending {
    pub(crate) fn encode(self) -> u64 {
        match self {
            Self::Done { events, others } => {
                assert!(usize::from(others) <= OTHER_KEYS_MAX, "no command names more keys");
                u64::from(events) | u64::from(others) << 32
            }
            Self::Rejected(root) => {
                assert!(usize::from(root.align) <= ALIGN, "no archive has a larger alignment");
                REJECTED | u64::from(root.align) << 32 | u64::from(root.bytes)
            }
        }
    }

    pub(crate) fn decode(word: u64) -> Option<Self> {
        if word & REJECTED == 0 {
            let others = word >> 32;
            return (others <= OTHER_KEYS_MAX as u64)
                .then_some(Self::Done { events: word as u32, others: others as u8 });
        }
        let align = (word & !REJECTED) >> 32;
        let root = Root { bytes: word as u32, align: align as u16 };
        (align.is_power_of_two() && align <= ALIGN as u64).then_some(Self::Rejected(root))
    }
}

/// The largest number of keys that a command names besides its first.
pub(crate) const OTHER_KEYS_MAX: usize = 15;
/// The header of a record, without length and CRC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RecordHeader {
    pub(crate) time: Time,
    pub(crate) key: Key,
    /// The key's previous record; 0 if there is none.
    pub(crate) previous: Offset,
    pub(crate) event_type: EventTypeId,
    pub(crate) correlation: Correlation,
    pub(crate) version: Version,
    pub(crate) schema_version: u16,
    /// `true` if the next record belongs to the same command: the log holds both or neither.
    pub(crate) more: bool,
}

impl RecordHeader {
    /// Returns the header of a mark: everything below `durable` is synced.
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

    /// Returns the header of the outcome of a command of `key` with an idempotency key.
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

    /// Returns `true` if the record is the log's own and not an event.
    #[inline]
    pub(crate) fn is_own(&self) -> bool {
        self.event_type == OWN
    }

    /// Returns `true` if the record is a mark; its `key` is then an offset.
    #[inline]
    pub(crate) fn is_mark(&self) -> bool {
        self.event_type == OWN && self.schema_version == OWN_MARK
    }

    /// Returns `true` if the record is the outcome of a command.
    #[inline]
    pub(crate) fn is_outcome(&self) -> bool {
        self.event_type == OWN && self.schema_version == OWN_OUTCOME
    }

    /// Returns how the command of an outcome ended, or `None` for bits that this build does not write.
    pub(crate) fn ending(&self) -> Option<Ending> {
        Ending::decode(self.previous.0 / ALIGN as u64)
    }

    /// Writes the header before a complete body. The length word stays zero, so the bytes are not a record yet.
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

    /// Returns the metadata of the record at `offset`, for readers and handlers.
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

    /// Reads a header without checking it; [`record_at`] checks it.
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

/// The result of [`record_at`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RecordAt {
    /// A whole record of this exact length.
    Record(usize),
    /// The end of the records: a zero length word, or no room for a header.
    End,
    /// Neither a record nor an end.
    Damaged(&'static str),
}

/// Checks the record at the beginning of `tail`, which reaches to the end of its segment.
#[inline]
pub(crate) fn record_at(tail: &[u8], salt: u32) -> RecordAt {
    if tail.len() < RECORD_HEADER_BYTES {
        return RecordAt::End;
    }
    let len = u32_at(tail, 0) as usize;
    if len == 0 {
        return RecordAt::End;
    }
    if !(RECORD_HEADER_BYTES..=RECORD_BYTES_MAX).contains(&len) || padded(len) > tail.len() {
        return RecordAt::Damaged("a record's length is out of range");
    }
    if crc32c(salt, &tail[8..len]) != u32_at(tail, 4) {
        return RecordAt::Damaged("checksum mismatch in a record");
    }
    if tail[len..padded(len)].iter().any(|&byte| byte != 0) {
        return RecordAt::Damaged("the padding of a record is not zero");
    }
    RecordAt::Record(len)
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
        assert_eq!(record_at(&bytes, 9), RecordAt::Record(53));
        assert_eq!(RecordHeader::decode(&bytes), header());
        assert!(matches!(record_at(&bytes, 10), RecordAt::Damaged(_)), "a record does not match another salt");
    }

    #[test]
    fn every_flipped_bit_of_a_record_is_detected() {
        let mut bytes = sealed(&header(), b"hello", 9);
        assert_eq!(bytes.len(), 64);
        for bit in 0..64 * 8 {
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert_ne!(record_at(&bytes, 9), RecordAt::Record(53), "bit {bit}");
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
    }

    #[test]
    fn every_flipped_bit_of_a_segment_header_is_detected() {
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

    /// Compares `bytes` with a golden file. `CORELANE_GOLDEN=write` renews the file; only a change of the format needs
    /// that.
    pub(crate) fn assert_golden(name: &str, bytes: &[u8]) {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
        if std::env::var("CORELANE_GOLDEN").is_ok_and(|value| value == "write") {
            std::fs::write(&path, bytes).expect("written");
        }
        let golden = std::fs::read(&path).expect("a golden file");
        assert!(golden == bytes, "{name}: these bytes are frozen:\n{golden:02x?}\nbut this build writes\n{bytes:02x?}");
    }

    /// Returns a whole record, padded.
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
        // The bytes after the page do not matter.
        assert_eq!(SegmentHeader::decode(&page), Err(HeaderError::Blank));
        // Nor do its uncommitted fields.
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
    fn the_last_store_of_its_header_turns_a_prepared_segment_into_a_begun_one() {
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
        for first_length in [[0; 4], [0x40, 0, 0, 0]] {
            prepared[HEADER_BYTES..].copy_from_slice(&first_length);
            // The bytes are stored in order, then in random order: the system may write the page back at any moment.
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
        assert_eq!(record_at(&bytes, 0x0bad_cafe), RecordAt::Record(69));
        assert_eq!(RecordHeader::decode(&bytes), event);
        let mark = RecordHeader::mark(0x0012_3456_7890, Time(1_700_000_000_123_456_789));
        let bytes = sealed(&mark, b"", 0x0bad_cafe);
        assert_golden("mark.bin", &bytes);
        assert_eq!(record_at(&bytes, 0x0bad_cafe), RecordAt::Record(48));
        let ending = Ending::Rejected(Root { bytes: 18, align: 1 });
        let outcome =
            RecordHeader::outcome(Key(42), 0x5555_6666_7777_8888, Version(7), ending, Time(1_700_000_000_123_456_789));
        let bytes = sealed(&outcome, b"why it was refused", 0x0bad_cafe);
        assert_golden("outcome.bin", &bytes);
        let read = RecordHeader::decode(&bytes);
        assert!(read == outcome && read.is_outcome() && !read.is_mark() && read.ending() == Some(ending));
    }

    #[test]
    fn an_ending_reads_back_as_written_and_other_bits_are_refused() {
        let root = |bytes, align| Root { bytes, align };
        let done = |events| Ending::Done { events, others: 0 };
        for ending in [
            done(0),
            done(1),
            done(u32::MAX),
            Ending::Done { events: 7, others: OTHER_KEYS_MAX as u8 },
            Ending::Rejected(root(0, 1)),
            Ending::Rejected(root(u32::MAX, 16)),
            Ending::Rejected(root(24, 8)),
        ] {
            assert_eq!(Ending::decode(ending.encode()), Some(ending));
            assert!(ending.encode() <= LOW_48, "{ending:?} fits into a back-link");
        }
        for word in [16 << 32, REJECTED - 1, REJECTED, REJECTED | 3 << 32, REJECTED | 32 << 32, REJECTED << 1, u64::MAX]
        {
            assert_eq!(Ending::decode(word), None, "{word:#x}");
        }
    }

    #[test]
    fn offsets_are_multiples_of_sixteen_up_to_the_end_of_the_last_segment() {
        for at in [0, 16, HEADER_BYTES as u64, OFFSETS_END] {
            assert!(is_offset(Offset(at)), "{at}");
        }
        for at in [1, HEADER_BYTES as u64 + 8, OFFSETS_END + 16, u64::MAX - 15] {
            assert!(!is_offset(Offset(at)), "{at}");
        }
        let smallest = HEADER_BYTES as u64;
        assert!(is_record_offset(Offset(smallest)) && !is_record_offset(Offset(smallest - 16)));
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
