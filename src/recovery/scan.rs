//! The scan of a shard's log: its segments in order, each record checked and folded, up to the place where the log ends
//! or breaks.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;

use crate::error::{OpenError, guard};
use crate::event::{Offset, Root, Version};
use crate::log::format::{
    HEADER_BYTES, HeaderError, LOST_MAGIC, RecordAt, RecordHeader, Seam, SegmentHeader, record_at,
};
use crate::log::segment::Segment;
use crate::recovery::fold::{Folder, Unreadable};
use crate::recovery::opening::Opening;
use crate::recovery::remains::are_of_an_earlier_life;
use crate::recovery::segments::{OpenedSegment, OpenedSpan};
use crate::state::aggregate::Aggregate;
use crate::storage::memory::{Memory, padded};

/// The code that a panic is attributed to.
const EVOLVE: &str = "evolve or an upcaster";

/// The place from which records are read, because a checkpoint has everything before it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Start {
    pub(super) index: u64,
    pub(super) at: usize,
    /// Sequence of the next event there.
    pub(super) sequence: u64,
}

/// The end of a segment's records.
#[derive(Debug, Clone, Copy)]
pub(super) struct RecordsEnd {
    pub(super) at: usize,
    /// The damage after it, if the records do not simply end.
    pub(super) damaged: Option<&'static str>,
}

/// The place where the log breaks before its last segment.
#[derive(Debug, Clone, Copy)]
pub(super) struct Break {
    pub(super) index: u64,
    pub(super) at: usize,
    pub(super) why: &'static str,
}

/// A segment after the break.
pub(super) struct Stranded {
    pub(super) index: u64,
    pub(super) memory: Memory,
    pub(super) salt: u32,
}

/// The result of a scan.
pub(super) struct Scan<A: Aggregate> {
    pub(super) folder: Folder<A>,
    /// The highest offset that a mark declares durable.
    pub(super) durable: u64,
    /// Sequence of the first event held.
    pub(super) first_sequence: u64,
    /// The end of the last record that is not a mark.
    pub(super) events_end: u64,
    /// The log's segments before the last one.
    pub(super) segments: VecDeque<Segment>,
    /// The last segment before the break (or of the log, if there is no break), and the end of its records.
    pub(super) last: Option<(Segment, RecordsEnd)>,
    pub(super) broken: Option<Break>,
    pub(super) stranded: Vec<Stranded>,
    /// The first blank segment.
    blank: Option<u64>,
    /// Files that were prepared and never begun.
    pub(super) unused: Vec<PathBuf>,
}

impl RecordsEnd {
    /// Returns the reason why the segment with header `next` does not continue the log after this end of `segment`;
    /// `None` if it does.
    fn breaks_before(&self, next: &SegmentHeader, segment: &Segment, sequence: u64) -> Option<&'static str> {
        let end = Offset(segment.index * next.segment_bytes + self.at as u64);
        self.damaged.or_else(|| next.seam().breaks_after(&Seam { end, salt: segment.salt, sequence }))
    }
}

impl<A: Aggregate> Scan<A> {
    fn new(folder: Folder<A>) -> Self {
        Self {
            folder,
            durable: 0,
            first_sequence: 0,
            events_end: 0,
            segments: VecDeque::new(),
            last: None,
            broken: None,
            stranded: Vec::new(),
            blank: None,
            unused: Vec::new(),
        }
    }

    /// Returns the place where the log breaks before the segment with `header`, if it does.
    fn break_before(&self, header: &SegmentHeader, is_skipped: bool) -> Option<Break> {
        match (self.blank, &self.last) {
            (Some(index), _) => Some(Break { index, at: 0, why: "a blank segment precedes one in use" }),
            // Only the headers of skipped segments are read.
            (None, Some(_)) if is_skipped => None,
            (None, Some((last, end))) => end.breaks_before(header, last, self.folder.sequence).map(|why| Break {
                index: last.index,
                at: end.at,
                why,
            }),
            (None, None) => None,
        }
    }
}

impl Opening<'_> {
    /// Scans the segments of the span, from `start` or from the first record.
    pub(super) fn scan<A: Aggregate>(
        &self,
        opened: OpenedSpan,
        folder: Folder<A>,
        start: Option<Start>,
    ) -> Result<Scan<A>, OpenError> {
        let mut scan = Scan::new(folder);
        let OpenedSpan { segments, lost_header } = opened;
        for segment in segments {
            let may_be_lost = lost_header.is_some_and(|lost| segment.index >= lost);
            self.scan_segment(segment, may_be_lost, start, &mut scan)?;
        }
        Ok(scan)
    }

    fn scan_segment<A: Aggregate>(
        &self,
        segment: OpenedSegment,
        may_be_lost: bool,
        start: Option<Start>,
        scan: &mut Scan<A>,
    ) -> Result<(), OpenError> {
        let OpenedSegment { index, memory, header } = segment;
        let Some(header) = header else {
            if may_be_lost && was_begun(&memory, scan) {
                return Err(self.corruption(index, 0, LOST_MAGIC).into());
            }
            scan.blank.get_or_insert(index);
            scan.unused.push(self.path(index));
            return Ok(());
        };
        let is_skipped = start.is_some_and(|start| index <= start.index);
        // A checkpoint vouches for skipped segments, so this is not a torn tail.
        if is_skipped && scan.last.as_ref().is_some_and(|(before, _)| header.previous_salt != before.salt) {
            let why = "the segment does not follow the one before it: one of them is of another log";
            return Err(self.corruption(index, 0, why).into());
        }
        scan.broken = scan.broken.or_else(|| scan.break_before(&header, is_skipped));
        if scan.broken.is_some() {
            scan.stranded.push(Stranded { index, memory, salt: header.salt });
            return Ok(());
        }
        match scan.last.take() {
            Some((before, _)) => scan.segments.push_back(before),
            None => {
                scan.first_sequence = header.first_sequence;
                scan.folder.sequence = header.first_sequence;
            }
        }
        let end = match start {
            Some(start) if index < start.index => RecordsEnd { at: start.at, damaged: None },
            Some(start) if index == start.index => {
                scan.folder.sequence = start.sequence;
                self.scan_records(index, &memory, header.salt, start.at, scan)?
            }
            _ => self.scan_records(index, &memory, header.salt, HEADER_BYTES, scan)?,
        };
        let segment = Segment { index, seam: header.seam(), salt: header.salt, memory: Arc::new(memory) };
        scan.last = Some((segment, end));
        Ok(())
    }

    /// Scans a segment's records from `from` to their end. A panic of the application's code is an error.
    fn scan_records<A: Aggregate>(
        &self,
        index: u64,
        memory: &Memory,
        salt: u32,
        from: usize,
        scan: &mut Scan<A>,
    ) -> Result<RecordsEnd, OpenError> {
        let walked = guard(EVOLVE, self.shard, || self.walk(index, memory, salt, from, scan));
        walked.map_err(|panic| scan.folder.at_fault(panic))?
    }

    fn walk<A: Aggregate>(
        &self,
        index: u64,
        memory: &Memory,
        salt: u32,
        from: usize,
        scan: &mut Scan<A>,
    ) -> Result<RecordsEnd, OpenError> {
        let whole = memory.read(0, memory.len()).unwrap_or_default();
        if let Err(error) = memory.advise_sequential() {
            tracing::debug!(%error, "the system does not accept advice on read-ahead");
        }
        let base = index * self.manifest.segment_bytes;
        let mut at = from;
        let unreadable = |folder: &Folder<A>, (offset, why): Unreadable| match folder.unreadable_rejection {
            Some(root) => OpenError::rejection_layout(self.shard, root, Root::of::<A::Rejection>()),
            None => self.corruption(index, (offset.0 - base) as usize, why).into(),
        };
        let end = loop {
            let len = match record_at(&whole[at..], salt) {
                RecordAt::Record(len) => len,
                RecordAt::End => break RecordsEnd { at, damaged: None },
                RecordAt::Damaged(why) => break RecordsEnd { at, damaged: Some(why) },
            };
            let header = RecordHeader::decode(&whole[at..]);
            if header.is_mark() {
                scan.durable = scan.durable.max(header.key.0);
            } else {
                self.check_readable(index, at, &header)?;
                let folded = scan.folder.record(memory, at, len, &header, Offset(base + at as u64));
                folded.map_err(|why| unreadable(&scan.folder, why))?;
            }
            at += padded(len);
            if !header.is_mark() {
                scan.events_end = base + at as u64;
            }
        };
        let settled = scan.folder.settle(memory);
        settled.map_err(|why| unreadable(&scan.folder, why))?;
        match scan.folder.open_group() {
            None => Ok(end),
            // A command's records count together: if the last one is missing, the others do not count either.
            Some(begun) => {
                scan.folder.forget_group();
                let damaged = Some(end.damaged.unwrap_or("a command's last records are missing"));
                Ok(RecordsEnd { at: (begun.0 - base) as usize, damaged })
            }
        }
    }

    /// Checks that this program can read a record with `header`.
    #[inline]
    fn check_readable(&self, index: u64, at: usize, header: &RecordHeader) -> Result<(), OpenError> {
        let corrupt = |why| Err(self.corruption(index, at, why).into());
        if header.is_own() {
            return match header.is_outcome() {
                true => Ok(()),
                false => corrupt("a record of the log's own that this build does not know"),
            };
        }
        if header.version.0 == 0 {
            return corrupt("an event has no version, although its CRC matches");
        }
        if !(self.known)(header.event_type.0, header.schema_version) {
            return Err(OpenError::UnknownEventType {
                shard: self.shard,
                event_type: header.event_type,
                name: self.manifest.type_name(header.event_type).to_owned(),
                schema_version: header.schema_version,
            });
        }
        Ok(())
    }
}

/// Returns `true` if a segment at or after the first lost header was part of the log. It was not if its first page is
/// that of a prepared segment, or if the log before it ends cleanly and its records are of an earlier use of the file.
fn was_begun<A: Aggregate>(memory: &Memory, scan: &Scan<A>) -> bool {
    let whole = memory.read(0, memory.len()).unwrap_or_default();
    let is_blank = SegmentHeader::decode(whole) == Err(HeaderError::Blank);
    let version_of = |key| scan.folder.keys.get(key).map_or(Version(0), |slot| slot.version);
    let ends_well = scan.last.as_ref().is_some_and(|(_, end)| end.damaged.is_none());
    !(is_blank || ends_well && are_of_an_earlier_life(whole, version_of))
}
