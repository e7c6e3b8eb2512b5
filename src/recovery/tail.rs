//! The end of a scanned log: a clean end, a torn tail to cut, or damage to durable bytes.

use crate::error::OpenError;
use crate::log::format::{HEADER_BYTES, RECORD_BYTES_MAX};
use crate::log::segment::Segment;
use crate::recovery::opening::Opening;
use crate::recovery::remains::later_records;
use crate::recovery::repair::Repair;
use crate::recovery::scan::{RecordsEnd, Scan, Stranded};
use crate::state::aggregate::Aggregate;
use crate::storage::framed::u32_at;

/// The end of a torn tail in its segment, and the reason why the tail is invalid.
type Torn = (usize, &'static str);

impl Opening<'_> {
    /// Judges the end of the log. Returns the repair that it needs. Damage below a mark is an error.
    pub(super) fn judge_end<A: Aggregate>(&self, scan: &mut Scan<A>) -> Result<Option<Repair>, OpenError> {
        let mut bytes = self.read_stranded(scan);
        if let Some(broken) = scan.broken
            && scan.durable > self.offset(broken.index, broken.at).0
        {
            return Err(self.corruption(broken.index, broken.at, broken.why).into());
        }
        let stranded = std::mem::take(&mut scan.stranded);
        let beyond =
            stranded.into_iter().map(|Stranded { index, memory, .. }| (index, self.path(index), memory)).collect();
        let shard = self.shard;
        let Some((last, end)) = &scan.last else {
            return Ok(scan.broken.map(|broken| {
                let offset = self.offset(broken.index, 0);
                Repair { shard, offset, bytes, torn: 0, why: broken.why, beyond }
            }));
        };
        let at = end.at;
        let torn = self.torn_tail(last, end, scan.durable)?.or(scan.broken.map(|broken| (at, broken.why)));
        Ok(torn.map(|(until, why)| {
            let tail = last.memory.read(at, until - at).unwrap_or_default();
            bytes.splice(0..0, tail.iter().copied());
            Repair { shard, offset: self.offset(last.index, at), bytes, torn: until - at, why, beyond }
        }))
    }

    /// Returns the bytes of the segments after the break up to their last valid records, and notes their marks.
    fn read_stranded<A: Aggregate>(&self, scan: &mut Scan<A>) -> Vec<u8> {
        let mut bytes = Vec::new();
        for Stranded { index, memory, salt } in &scan.stranded {
            let whole = memory.read(0, memory.len()).unwrap_or_default();
            let later = later_records(whole, HEADER_BYTES, *salt, self.known);
            scan.durable = scan.durable.max(later.durable);
            bytes.extend_from_slice(&whole[..later.end]);
            scan.unused.push(self.path(*index));
        }
        bytes
    }

    /// Returns the torn tail after the records of the last segment, if it has one.
    fn torn_tail(&self, last: &Segment, end: &RecordsEnd, durable: u64) -> Result<Option<Torn>, OpenError> {
        let whole = last.memory.read(0, last.memory.len()).unwrap_or_default();
        // Valid records after the end show how far the log once reached, and how far it was durable.
        let later = later_records(whole, end.at, last.salt, self.known);
        let durable = durable.max(later.durable);
        let why = end.damaged.unwrap_or("the log ends before valid records");
        if durable > self.offset(last.index, end.at).0 {
            return Err(self.corruption(last.index, end.at, why).into());
        }
        if end.damaged.is_none() && later.end == end.at {
            return Ok(None);
        }
        // The tail has at least the length that the damaged record claims, and at least a page.
        let claimed = whole.get(end.at..end.at + 4).map_or(0, |word| u32_at(word, 0) as usize);
        let until = later.end.max(end.at + claimed.clamp(4096, RECORD_BYTES_MAX)).min(whole.len());
        Ok(Some((until, why)))
    }
}
