//! Opens a shard's log: finds its newest checkpoint, folds the later events, judges the end of the log, and reports.
//! Recovery changes nothing: the repairs run after the whole store was found sound.
//!
//! A torn tail is set aside and cut; damage to durable bytes is an error. The log's marks tell the two apart: each
//! holds the offset up to which the log was synced when the mark was written. Invalid bytes below any of these offsets
//! were durable once: they are damage. Invalid bytes above all of them were never acknowledged: they are a tail torn by
//! a power cut.

pub(crate) mod boundary;
mod fit;
pub(crate) mod fold;
pub(crate) mod load;
mod opening;
mod remains;
mod repair;
pub(crate) mod report;
pub(crate) mod saved;
mod scan;
mod segments;
mod tail;

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Corruption, OpenError, guard};
use crate::event::{Offset, Root};
use crate::log::format::HEADER_BYTES;
use crate::log::manifest::{Manifest, Span, segment_name};
use crate::log::segment::{Segment, ShardLog};
use crate::log::writer::Resume;
use crate::recovery::fit::{EMPTY_LOG, Unfit};
use crate::recovery::fold::Folder;
use crate::recovery::load::Candidate;
use crate::recovery::repair::Repair;
use crate::recovery::saved::{LogExtent, SavedFiles};
use crate::recovery::scan::{Scan, Start};
use crate::state::aggregate::Aggregate;
use crate::state::snapshot::format::Unusable;
use crate::storage::Storage;
use crate::storage::memory::WriteHalf;

pub(crate) use crate::recovery::opening::Opening;

/// The code that a panic is attributed to.
const UPGRADE: &str = "upgrade";

pub use report::{RecoveryReport, ShardRecovery, TornTail};

/// A recovered log, ready to be written.
pub(crate) struct Recovered<A: Aggregate> {
    pub(crate) report: ShardRecovery,
    pub(crate) segments: VecDeque<Segment>,
    pub(crate) resume: Resume,
    /// The keys' states and the outcomes of commands.
    pub(crate) folder: Folder<A>,
    /// The saved states. Always `Some` once recovery is over.
    pub(crate) saved: Option<SavedFiles>,
    pub(crate) span: Span,
    /// Segments that were prepared and never begun: they are blanked and prepared again.
    pub(crate) unused: Vec<PathBuf>,
    pub(crate) spares: Vec<PathBuf>,
    /// The repair that is due before anything is appended.
    repair: Option<Repair>,
}

impl<A: Aggregate> Recovered<A> {
    /// Returns the log as recovery found it, to be read before anything is changed.
    pub(crate) fn log(&self, manifest: &Manifest, dir: &Path) -> ShardLog {
        let (report, segments) = (&self.report, self.segments.clone());
        let (store, segment_bytes) = (manifest.store_id, manifest.segment_bytes);
        ShardLog::new(
            (store, report.shard),
            dir.to_owned(),
            segment_bytes,
            report.end,
            self.resume.sequence,
            segments,
            &Arc::default(),
        )
    }

    /// Carries out the repairs. Call it only after the whole store was found sound: a refused store must stay
    /// unchanged.
    pub(crate) fn repair(&mut self, storage: &dyn Storage, dir: &Path, quarantine: &Path) -> Result<(), OpenError> {
        if let Some(repair) = self.repair.take() {
            let last = self.resume.segment.as_mut();
            let mut last = last.map(|(segment, half)| (dir.join(segment_name(segment.index)), half));
            let last = last.as_mut().map(|(path, half)| (&**path, &mut **half));
            self.report.torn_tail = Some(repair.apply(storage, quarantine, last)?);
        }
        let saved = self.saved.as_mut().map_or(Ok(()), |saved| saved.repair(storage, dir));
        saved.map_err(|source| OpenError::Io { action: "removing saved states in", path: dir.to_owned(), source })
    }
}

/// The result of trying a folder's checkpoints, newest first.
struct Tried<A: Aggregate> {
    /// The log recovered with the newest checkpoint that fits, and the numbers of all that fit.
    recovered: Option<(Recovered<A>, Vec<u32>)>,
    /// Damage to the log, if a newer checkpoint that did not fit is right.
    damage: Option<Corruption>,
    /// The layout of the newest valid checkpoint whose types have another layout than this program's.
    other_layout: Option<Unusable>,
    unreadable: u64,
}

impl Opening<'_> {
    /// Recovers the log: from the newest checkpoint that fits, or from its beginning.
    pub(crate) fn recover<A: Aggregate>(&self) -> Result<Recovered<A>, OpenError> {
        if self.is_new {
            let mut blank = self.blank(Vec::new(), self.folder(), Span { first: 0, last: 0 });
            blank.saved = Some(SavedFiles::nothing(self.storage));
            return Ok(blank);
        }
        let io = |source| OpenError::Io { action: "reading the saved states of", path: self.dir.to_owned(), source };
        let earliest = Span::load(&**self.storage, self.dir, self.manifest.segment_bytes)?.map_or(0, |span| span.first);
        let earliest = self.offset(earliest, HEADER_BYTES);
        let has_lost_the_beginning = earliest.0 > HEADER_BYTES as u64;
        // Reports a missing folder before anything else is looked for in it.
        self.names()?;
        let (candidates, invalid) = load::candidates(&**self.storage, self.dir, self.owner()).map_err(io)?;
        let tried = self.try_checkpoints::<A>(&candidates, earliest)?;
        let (mut recovered, usable) = match tried.recovered {
            Some(recovered) => recovered,
            None => {
                let recovered = self.recover_from(self.folder(), None)?;
                let Ok(recovered) = recovered else { unreachable!("only a checkpoint can be unfit") };
                if has_lost_the_beginning && size_of::<A>() > 0 {
                    return Err(self.states_lost::<A>(earliest, tried.other_layout));
                }
                (recovered, Vec::new())
            }
        };
        // A checkpoint shows that the tail was durable: it must not be cut, though the log alone would call it torn.
        if let (Some(damage), Some(_)) = (tried.damage, &recovered.repair) {
            return Err(damage.into());
        }
        recovered.report.lost_beginning = has_lost_the_beginning && usable.is_empty();
        if recovered.report.lost_beginning {
            let shard = self.shard.0;
            tracing::warn!(
                shard,
                "no usable checkpoint covers the log's freed beginning: keys without events in the log begin anew"
            );
        }
        let log = LogExtent { end: recovered.report.end, events: recovered.resume.sequence };
        let unreadable = invalid + tried.unreadable;
        let saved = guard(UPGRADE, self.shard, || {
            SavedFiles::index::<A>(self.storage, self.dir, self.owner(), log, &usable, unreadable)
        })?;
        recovered.saved = Some(saved.map_err(io)?);
        Ok(recovered)
    }

    /// Tries the checkpoints from the newest on, until one fits the log.
    fn try_checkpoints<A: Aggregate>(&self, candidates: &[Candidate], earliest: Offset) -> Result<Tried<A>, OpenError> {
        let mut tried = Tried { recovered: None, damage: None, other_layout: None, unreadable: 0 };
        for candidate in candidates.iter().filter(|candidate| candidate.start >= earliest) {
            match self.recover_with::<A>(candidate)? {
                Ok(recovered) => {
                    let log = recovered.log(self.manifest, self.dir);
                    let is_usable = |other: &&Candidate| {
                        other.number <= candidate.number && other.start <= candidate.start && other.is_of(&log)
                    };
                    let usable = candidates.iter().filter(is_usable).map(|candidate| candidate.number).collect();
                    tried.recovered = Some((recovered, usable));
                    break;
                }
                Err(unfit) => {
                    let why = unfit.why;
                    tracing::warn!(shard = self.shard.0, number = candidate.number, %why, "a checkpoint is not used");
                    tried.unreadable += u64::from(!unfit.is_sound);
                    tried.damage = tried.damage.or(unfit.damage);
                    let is_of_other_layout = !matches!(why, Unusable::Damaged(_));
                    tried.other_layout = tried.other_layout.or(is_of_other_layout.then_some(why));
                }
            }
        }
        Ok(tried)
    }

    /// The error for a log whose beginning is freed and whose states no checkpoint has.
    fn states_lost<A: Aggregate>(&self, earliest: Offset, other_layout: Option<Unusable>) -> OpenError {
        let shard = self.shard;
        match other_layout {
            Some(Unusable::State { stored }) => OpenError::state_layout(shard, stored, Root::of::<A>()),
            Some(Unusable::Rejection { stored }) => {
                OpenError::rejection_layout(shard, stored, Root::of::<A::Rejection>())
            }
            _ => OpenError::StatesLost { shard, earliest },
        }
    }

    /// Recovers the log with the states of a checkpoint, or returns why the checkpoint does not fit.
    fn recover_with<A: Aggregate>(&self, candidate: &Candidate) -> Result<Result<Recovered<A>, Unfit>, OpenError> {
        let mut folder = self.folder::<A>();
        let loaded =
            guard(UPGRADE, self.shard, || load::load(&**self.storage, self.dir, self.owner(), candidate, &mut folder))?;
        let newest = match loaded {
            Ok(newest) => newest,
            Err(why) => return Ok(Err(Unfit::of(why))),
        };
        let recovered = match self.recover_from(folder, Some(candidate)) {
            Ok(Ok(recovered)) => recovered,
            Ok(Err(unfit)) => return Ok(Err(unfit)),
            // The log may be damaged, or the checkpoint wrong. The log alone can tell.
            Err(OpenError::Corruption(damage)) => {
                return Ok(Err(Unfit { damage: Some(damage.clone()), ..Unfit::of(damage.why) }));
            }
            Err(error) => return Err(error),
        };
        if recovered.report.end < candidate.log_end {
            let why = Unusable::Damaged("it has states of events that are gone");
            return Ok(Err(Unfit { why, is_sound: true, damage: None }));
        }
        if newest.0 > recovered.resume.sequence {
            return Ok(Err(Unfit::of("a state has more events than the log ever had")));
        }
        Ok(Ok(recovered))
    }

    /// Opens the segments, folds the events that `checkpoint` does not have, and judges the end of the log; or returns
    /// why the checkpoint does not fit.
    fn recover_from<A: Aggregate>(
        &self,
        mut folder: Folder<A>,
        checkpoint: Option<&Candidate>,
    ) -> Result<Result<Recovered<A>, Unfit>, OpenError> {
        let names = self.names()?;
        let Some(span) = self.span(&names)? else {
            let mut blank = self.blank(names.spares, folder, Span { first: 0, last: 0 });
            blank.unused = names.segments.iter().map(|&index| self.path(index)).collect();
            return Ok(if checkpoint.is_none() { Ok(blank) } else { Err(EMPTY_LOG) });
        };
        let mut unused = self.surplus(&names, span)?;
        let opened = self.open_span(span)?;
        if let Some(unfit) = checkpoint.and_then(|checkpoint| self.misplaced(checkpoint, &opened.segments)) {
            return Ok(Err(unfit));
        }
        folder.knows_all_keys = checkpoint.is_some() || span.first == 0;
        let mut scan = self.scan(opened, folder, self.start(checkpoint))?;
        let repair = self.judge_end(&mut scan)?;
        unused.append(&mut scan.unused);
        if scan.last.is_none() {
            let blank = self.blank(names.spares, scan.folder, span);
            return Ok(if checkpoint.is_none() { Ok(Recovered { unused, repair, ..blank }) } else { Err(EMPTY_LOG) });
        }
        Ok(Ok(self.recovered(scan, span, unused, names.spares, repair)))
    }

    /// Returns the place from which records are read: the start of a trusted checkpoint. A checkpoint is not used for
    /// this if it may cover events that never reached the disk, or if a layout was ever declared that this program
    /// cannot read: only a scan of the whole log shows whether the log still has events of that layout.
    fn start(&self, checkpoint: Option<&Candidate>) -> Option<Start> {
        let reads_all = self.manifest.types.iter().all(|t| (self.known)(t.id.0, t.schema_version));
        let checkpoint = checkpoint.filter(|checkpoint| checkpoint.is_trusted && reads_all)?;
        let (index, at) = self.place_of(checkpoint.start);
        Some(Start { index, at, sequence: checkpoint.sequence.0 })
    }

    /// The recovered log after a scan that found records, with its write position.
    fn recovered<A: Aggregate>(
        &self,
        scan: Scan<A>,
        span: Span,
        unused: Vec<PathBuf>,
        spares: Vec<PathBuf>,
        repair: Option<Repair>,
    ) -> Recovered<A> {
        let Scan { folder, mut segments, last, durable, events_end, first_sequence, .. } = scan;
        let (last, at) = last.map(|(last, end)| (last, end.at)).expect("the log has records");
        let memory = Arc::try_unwrap(last.memory).expect("recovery alone holds the segment");
        let half = WriteHalf::new(memory, at);
        let last = Segment { memory: Arc::clone(half.memory()), ..last };
        segments.push_back(last.clone());
        let end = self.offset(last.index, at);
        // If only marks follow the last event, no further mark is needed.
        let marked = if durable >= events_end && repair.is_none() { end.0 } else { durable };
        let (next_index, sequence) = (last.index + 1, folder.sequence);
        let report = ShardRecovery {
            events: sequence - first_sequence,
            segments: segments.len(),
            keys: folder.keys.len(),
            ..ShardRecovery::empty(self.shard, end)
        };
        let resume = Resume { segment: Some((last, half)), next_index, sequence, marked };
        Recovered { report, segments, resume, folder, saved: None, span, unused, spares, repair }
    }

    /// A log without records.
    fn blank<A: Aggregate>(&self, spares: Vec<PathBuf>, folder: Folder<A>, span: Span) -> Recovered<A> {
        Recovered {
            report: ShardRecovery::empty(self.shard, self.offset(span.first, HEADER_BYTES)),
            segments: VecDeque::new(),
            resume: Resume { segment: None, next_index: span.first, sequence: 0, marked: 0 },
            folder,
            saved: None,
            span,
            unused: Vec::new(),
            spares,
            repair: None,
        }
    }
}
