//! Whether a log has the places that a checkpoint names, before anything is read from there on.

use crate::event::Offset;
use crate::log::format::HEADER_BYTES;
use crate::recovery::confirm::{Astray, There, there};
use crate::recovery::load::Candidate;
use crate::recovery::unfit::{EMPTY, Unfit};
use crate::recovery::{Opened, Opening};

impl Opening<'_> {
    /// Segment and position of a place behind the first segment's header.
    pub(super) fn place_of(&self, at: Offset) -> (u64, usize) {
        // The end of a segment filled to its last byte still belongs to that segment.
        let index = (at.0 - 1) / self.manifest.segment_bytes;
        (index, (at.0 - index * self.manifest.segment_bytes) as usize)
    }

    /// Why the log does not have the place that `checkpoint` says it begins at, if so. The segment is read up to there: a cache alone
    /// does not vouch for a place to read from, for what is taken for a torn tail behind a wrong one would be cut.
    pub(super) fn misplaced(&self, checkpoint: &Candidate, opened: &[Opened]) -> Option<Unfit> {
        let (index, place) = self.place_of(checkpoint.start);
        let Some((_, memory, header)) = opened.iter().find(|(other, _, _)| *other == index) else {
            return Some(Unfit::of("it begins outside the log"));
        };
        let Some(header) = header else {
            return Some(if place == HEADER_BYTES { EMPTY } else { Unfit::of("it begins where no log was begun") });
        };
        let whole = memory.read(0, memory.len()).unwrap_or_default();
        match there(whole, header, place) {
            Ok(There { sequence, .. }) if sequence != checkpoint.sequence.0 => {
                Some(Unfit::of("the log has another sequence where it begins"))
            }
            Ok(There { check, .. }) if check != checkpoint.checks[0] => {
                Some(Unfit::of("it is of another history of this store: another record lies before its beginning"))
            }
            Ok(_) => self.ends_elsewhere(checkpoint, opened),
            Err(Astray::Inside) => Some(Unfit::of("it begins inside a record or a command")),
            Err(Astray::Broken(at, why)) => {
                let damage = checkpoint.is_trusted.then(|| self.corruption(index, at, why));
                Some(Unfit { damage, ..Unfit::of("the log does not hold up to where it begins") })
            }
        }
    }

    /// Why the states of `checkpoint`, whose beginning the log has, are not of this log further on, if so. Where the log does not reach as
    /// far, or does not hold up to there, that is for the look at all of it to say.
    fn ends_elsewhere(&self, checkpoint: &Candidate, opened: &[Opened]) -> Option<Unfit> {
        let (index, place) = self.place_of(checkpoint.log_end);
        let of_end = opened.iter().find(|(other, _, _)| *other == index);
        let (memory, header) = of_end.and_then(|(_, memory, header)| Some((memory, header.as_ref()?)))?;
        match there(memory.read(0, memory.len()).unwrap_or_default(), header, place) {
            Ok(There { check, .. }) if check == checkpoint.checks[1] => return None,
            Ok(_) | Err(Astray::Inside) => {}
            // The segment ends before, and the log goes on in the next one.
            Err(Astray::Broken(at, _)) => {
                let next = opened.iter().find(|(other, _, _)| *other == index + 1);
                let previous_end = next.and_then(|(_, _, header)| header.as_ref()).map(|header| header.previous_end);
                if previous_end != Some(Offset(index * self.manifest.segment_bytes + at as u64)) {
                    return None;
                }
            }
        }
        Some(Unfit::of("it is of another history of this store: another record lies before its end"))
    }
}
