//! Boundaries between the records of a segment. Only the log itself can confirm a place to read from. Reading from a
//! wrong place would find a false torn tail, and opening would cut it.

use crate::log::format::{HEADER_BYTES, RecordAt, RecordHeader, SegmentHeader, record_at};
use crate::storage::framed::u32_at;
use crate::storage::memory::padded;

/// The reason why a segment has no boundary at a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NoBoundary {
    /// The records before it end or are damaged at this position.
    Broken(usize, &'static str),
    /// The place is inside a record or a command.
    Inside,
}

/// A boundary between two records of a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Boundary {
    /// Sequence of the next event.
    pub(crate) sequence: u64,
    /// The CRC word of the record that ends there; 0 if the segment begins there. It differs in a log with another
    /// history: the CRC is seeded with the segment's salt and covers the record's time.
    pub(crate) check: u32,
    /// `true` if the records on both sides belong to one command.
    pub(crate) is_in_command: bool,
}

/// Returns the boundary at `place` if reading may begin there.
pub(crate) fn boundary_at(whole: &[u8], header: &SegmentHeader, place: usize) -> Result<Boundary, NoBoundary> {
    let boundary = walk_to(whole, header, place)?;
    if boundary.is_in_command { Err(NoBoundary::Inside) } else { Ok(boundary) }
}

/// Reads a segment from its first record to `place`. Returns the boundary there.
pub(crate) fn walk_to(whole: &[u8], header: &SegmentHeader, place: usize) -> Result<Boundary, NoBoundary> {
    let (mut at, mut sequence, mut is_in_command, mut check) = (HEADER_BYTES, header.first_sequence, false, 0);
    while at < place {
        let len = match record_at(&whole[at..], header.salt) {
            RecordAt::Record(len) => len,
            RecordAt::End => return Err(NoBoundary::Broken(at, "the log ends before the start of a checkpoint")),
            RecordAt::Damaged(why) => return Err(NoBoundary::Broken(at, why)),
        };
        let record = RecordHeader::decode(&whole[at..]);
        sequence += u64::from(!record.is_own());
        is_in_command = record.more;
        check = u32_at(whole, at + 4);
        at += padded(len);
    }
    if at == place { Ok(Boundary { sequence, check, is_in_command }) } else { Err(NoBoundary::Inside) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{Correlation, EventTypeId, Key, Offset, ShardId, Time, Version};
    use crate::log::format::tests::sealed;

    #[test]
    fn a_boundary_is_where_a_record_and_its_command_end_and_nowhere_else() {
        let event = |version, more| {
            let (event_type, correlation, version) = (EventTypeId(3), Correlation(0), Version(version));
            let (time, key, previous, schema_version) = (Time(1), Key(2), Offset(0), 1);
            sealed(
                &RecordHeader { time, key, previous, event_type, correlation, version, schema_version, more },
                b"x",
                7,
            )
        };
        let mark = sealed(&RecordHeader::mark(4096, Time(1)), &[], 7);
        let records = [event(1, false), mark, event(2, true), event(3, false), event(4, false)];
        let (mut whole, mut ends) = (vec![0; HEADER_BYTES], vec![HEADER_BYTES]);
        for record in &records {
            whole.extend(record);
            ends.push(whole.len());
        }
        whole.resize(whole.len() + 64, 0);
        let header = SegmentHeader {
            schema: 1,
            shard: ShardId(0),
            index: 0,
            segment_bytes: 1 << 16,
            previous_end: Offset(0),
            previous_salt: 0,
            first_sequence: 100,
            created: Time(1),
            salt: 7,
        };
        // After no record, an event, a mark, the first of a command's two events, the second, another event.
        let sequences = [Some(100), Some(101), Some(101), None, Some(103), Some(104)];
        let check = |records: usize| records.checked_sub(1).map_or(0, |last| u32_at(&whole, ends[last] + 4));
        let expected: Vec<_> = (0..ends.len())
            .map(|i| {
                sequences[i]
                    .map(|sequence| Boundary { sequence, check: check(i), is_in_command: false })
                    .ok_or(NoBoundary::Inside)
            })
            .collect();
        for place in 0..whole.len() {
            let found = boundary_at(&whole, &header, place);
            match ends.iter().position(|&end| end == place) {
                Some(records) => assert_eq!(found, expected[records], "after {records} records"),
                None => assert!(found.is_err(), "at {place}: {found:?}"),
            }
        }
        let end = *ends.last().expect("the segment has records");
        assert!(matches!(boundary_at(&whole, &header, end + 16), Err(NoBoundary::Broken(at, _)) if at == end));
        whole[ends[1] + 10] ^= 1;
        assert_eq!(boundary_at(&whole, &header, ends[1]), expected[1]);
        let why = "checksum mismatch in a record";
        assert_eq!(boundary_at(&whole, &header, ends[2]), Err(NoBoundary::Broken(ends[1], why)));
    }
}
