//! The bytes of a segment after the end of its log: later records that are still valid, or records of an earlier use of
//! the file.

use crate::event::{Key, Version};
use crate::log::format::{HEADER_BYTES, RECORD_BYTES_MAX, RECORD_HEADER_BYTES, RecordAt, RecordHeader, record_at};
use crate::storage::framed::u32_at;
use crate::storage::memory::{ALIGN, padded};

/// Valid records after the end of a log.
pub(super) struct LaterRecords {
    /// The end of the last one, or the start of the search.
    pub(super) end: usize,
    /// The highest offset that a mark among them declares durable.
    pub(super) durable: u64,
}

/// Searches for valid records at every 16-byte step from `from` on. `known` returns `true` for a (type id, schema
/// version) that this program can read. The old contents of a recycled segment are not valid: they have another salt.
pub(super) fn later_records(whole: &[u8], from: usize, salt: u32, known: &dyn Fn(u16, u16) -> bool) -> LaterRecords {
    let mut later = LaterRecords { end: from, durable: 0 };
    let mut at = from;
    while at + RECORD_HEADER_BYTES <= whole.len() {
        let header = RecordHeader::decode(&whole[at..]);
        let mark = header.is_mark();
        // Most places are not the beginning of a header: this check avoids most checksums.
        let likely = if mark {
            u32_at(whole, at) as usize == RECORD_HEADER_BYTES
        } else if header.is_own() {
            header.is_outcome()
        } else {
            known(header.event_type.0, header.schema_version)
        };
        match if likely { record_at(&whole[at..], salt) } else { RecordAt::End } {
            RecordAt::Record(len) => {
                if mark {
                    later.durable = later.durable.max(header.key.0);
                }
                at += padded(len);
                later.end = at;
            }
            RecordAt::End | RecordAt::Damaged(_) => at += ALIGN,
        }
    }
    later
}

/// Returns `true` if the records after a lost header page are of an earlier use of the file, not the segment's own: the
/// first event then has a version that its key already had. `version_of` returns a key's version in the log before this
/// segment.
pub(super) fn are_of_an_earlier_life(whole: &[u8], version_of: impl Fn(Key) -> Version) -> bool {
    let Some(salt) = salt_of(&whole[HEADER_BYTES..]) else { return false };
    let mut at = HEADER_BYTES;
    while let RecordAt::Record(len) = record_at(&whole[at..], salt) {
        let header = RecordHeader::decode(&whole[at..]);
        if !header.is_own() {
            return (1..=version_of(header.key).0).contains(&header.version.0);
        }
        at += padded(len);
    }
    false
}

/// Returns the one salt with which the record at the beginning of `tail` is valid: over given bytes a CRC is a
/// bijection of its seed. (So the first record is always valid with this salt; only the second one confirms it.)
fn salt_of(tail: &[u8]) -> Option<u32> {
    let len = u32_at(tail, 0) as usize;
    if !(RECORD_HEADER_BYTES..=RECORD_BYTES_MAX).contains(&len) || padded(len) > tail.len() {
        return None;
    }
    // One byte turns the register r into T[(r ^ byte) & 255] ^ (r >> 8). The highest bytes in T are all different, so
    // the highest byte of the new register gives the index, and the index gives the rest.
    let table: [u32; 256] = std::array::from_fn(|index| {
        (0..8).fold(index as u32, |value, _| if value & 1 == 1 { value >> 1 ^ 0x82F6_3B78 } else { value >> 1 })
    });
    let mut index_of = [0_u32; 256];
    (0..).zip(&table).for_each(|(index, value)| index_of[(value >> 24) as usize] = index);
    let register = tail[8..len].iter().rev().fold(!u32_at(tail, 4), |register, &byte| {
        let index = index_of[(register >> 24) as usize];
        (register ^ table[index as usize]) << 8 | (index ^ u32::from(byte))
    });
    Some(!register)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{Correlation, EventTypeId, Offset, Time};
    use crate::log::format::tests::sealed;

    fn event(key: u64, version: u64, body: &[u8], salt: u32) -> Vec<u8> {
        let header = RecordHeader {
            time: Time(1),
            key: Key(key),
            previous: Offset(0),
            event_type: EventTypeId(3),
            correlation: Correlation(0),
            version: Version(version),
            schema_version: 1,
            more: false,
        };
        sealed(&header, body, salt)
    }

    #[test]
    fn the_salt_of_a_record_is_found_from_its_bytes() {
        for salt in [1, 0x0bad_cafe, u32::MAX] {
            for len in [0, 1, 15, 16, 300] {
                let record = event(1, 2, &vec![0xa5; len], salt);
                assert_eq!(salt_of(&record), Some(salt), "{len}");
            }
        }
        assert_eq!(salt_of(&[0; 64]), None);
    }

    #[test]
    fn events_with_versions_that_their_keys_already_had_are_of_an_earlier_life_and_new_ones_are_not() {
        let segment = |records: &[Vec<u8>]| [vec![0; HEADER_BYTES], records.concat(), vec![0; 64]].concat();
        let version_of = |key: Key| Version(if key == Key(1) { 5 } else { 0 });
        let mark = || sealed(&RecordHeader::mark(4096, Time(1)), &[], 7);
        for (version, is_earlier) in [(1, true), (5, true), (6, false), (7, false), (0, false)] {
            let records = [event(1, version, b"body", 7), event(2, 1, b"other", 7)];
            assert_eq!(are_of_an_earlier_life(&segment(&records), version_of), is_earlier, "version {version}");
            let records = [mark(), records[0].clone()];
            assert_eq!(are_of_an_earlier_life(&segment(&records), version_of), is_earlier, "after a mark");
        }
        assert!(
            !are_of_an_earlier_life(&segment(&[event(2, 1, b"body", 7)]), version_of),
            "the first event of a new key"
        );
        assert!(!are_of_an_earlier_life(&segment(&[mark()]), version_of), "no event");
        assert!(!are_of_an_earlier_life(&segment(&[mark(), event(1, 2, b"body", 8)]), version_of), "two salts");
        assert!(!are_of_an_earlier_life(&segment(&[vec![0xff; 64]]), version_of), "no record");
    }
}
