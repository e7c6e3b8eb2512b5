//! Checks that a checkpoint fits this log: the log must have the places that the checkpoint names. Runs before any
//! record is read from such a place.

use crate::error::Corruption;
use crate::event::Offset;
use crate::log::format::{HEADER_BYTES, SegmentHeader};
use crate::recovery::boundary::{Boundary, NoBoundary, boundary_at};
use crate::recovery::load::Candidate;
use crate::recovery::opening::Opening;
use crate::recovery::segments::OpenedSegment;
use crate::state::snapshot::format::Unusable;

/// The reason why a checkpoint is not used.
pub(super) struct Unfit {
    pub(super) why: Unusable,
    /// `true` if nothing is wrong with the checkpoint: its log reached further, or the log is empty.
    pub(super) is_sound: bool,
    /// The damage to the log, if the checkpoint is right.
    pub(super) damage: Option<Corruption>,
}

impl Unfit {
    pub(super) fn of(why: impl Into<Unusable>) -> Self {
        Self { why: why.into(), is_sound: false, damage: None }
    }
}

/// The reason for not using a checkpoint beside an empty log.
pub(super) const EMPTY_LOG: Unfit = Unfit { why: Unusable::Damaged("the log is empty"), is_sound: true, damage: None };

impl Opening<'_> {
    /// Segment and position of an offset after the first segment's header.
    pub(super) fn place_of(&self, offset: Offset) -> (u64, usize) {
        // The end of a segment that is filled to its last byte still belongs to that segment.
        let index = (offset.0 - 1) / self.manifest.segment_bytes;
        (index, (offset.0 - index * self.manifest.segment_bytes) as usize)
    }

    /// Checks that the log has the places at which `checkpoint` begins and ends. Returns the reason if it does not,
    /// else `None`. Reads the segment up to the beginning, because a checkpoint alone cannot confirm a place to read
    /// from.
    pub(super) fn misplaced(&self, checkpoint: &Candidate, opened: &[OpenedSegment]) -> Option<Unfit> {
        let (index, at) = self.place_of(checkpoint.start);
        let Some(segment) = opened.iter().find(|segment| segment.index == index) else {
            return Some(Unfit::of("it begins outside the log"));
        };
        let Some(header) = &segment.header else {
            return Some(if at == HEADER_BYTES {
                EMPTY_LOG
            } else {
                Unfit::of("it begins in a segment without records")
            });
        };
        match boundary_of(segment, header, at) {
            Ok(Boundary { sequence, .. }) if sequence != checkpoint.sequence.0 => {
                Some(Unfit::of("the log has another sequence where it begins"))
            }
            Ok(Boundary { check, .. }) if check != checkpoint.checks[0] => Some(Unfit::of(
                "it belongs to another history of this store: a different record precedes its beginning",
            )),
            Ok(_) => self.ends_elsewhere(checkpoint, opened),
            Err(NoBoundary::Inside) => Some(Unfit::of("it begins inside a record or a command")),
            Err(NoBoundary::Broken(at, why)) => {
                let damage = checkpoint.is_trusted.then(|| self.corruption(index, at, why));
                Some(Unfit { damage, ..Unfit::of("the log is damaged before the place where it begins") })
            }
        }
    }

    /// Checks that the end of `checkpoint`, whose beginning the log has, is in this log too. Returns the reason if it
    /// is not, else `None`. If the log is shorter or damaged before that end, the scan decides.
    fn ends_elsewhere(&self, checkpoint: &Candidate, opened: &[OpenedSegment]) -> Option<Unfit> {
        let (index, at) = self.place_of(checkpoint.log_end);
        let segment = opened.iter().find(|segment| segment.index == index)?;
        match boundary_of(segment, segment.header.as_ref()?, at) {
            Ok(Boundary { check, .. }) if check == checkpoint.checks[1] => return None,
            Ok(_) | Err(NoBoundary::Inside) => {}
            // The records end before the place, and the log may continue in the next segment.
            Err(NoBoundary::Broken(at, _)) => {
                let next = opened.iter().find(|segment| segment.index == index + 1);
                let previous_end = next.and_then(|next| next.header.as_ref()).map(|header| header.previous_end);
                if previous_end != Some(self.offset(index, at)) {
                    return None;
                }
            }
        }
        Some(Unfit::of("it belongs to another history of this store: a different record precedes its end"))
    }
}

fn boundary_of(segment: &OpenedSegment, header: &SegmentHeader, at: usize) -> Result<Boundary, NoBoundary> {
    boundary_at(segment.memory.read(0, segment.memory.len()).unwrap_or_default(), header, at)
}
