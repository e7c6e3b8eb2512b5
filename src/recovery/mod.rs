//! Looking at a shard's log when its store is opened: what is whole is kept, a torn tail is to be set aside and cut, and damage to what
//! had been durable is an error. Nothing is changed here: the repairs are carried out when the whole store was found sound.
//!
//! How the two are told apart: the log carries marks that say up to where it had been synced when they were
//! written. Bytes that do not hold, below any mark that does, were durable once: that is damage. Bytes that do
//! not hold above every mark were never promised to anyone: that is a tail torn by a power cut.

mod begin;
pub(crate) mod confirm;
pub(crate) mod fold;
pub(crate) mod load;
pub(crate) mod remains;
pub(crate) mod repair;
pub(crate) mod report;
pub(crate) mod unfit;

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Corruption, OpenError, guard};
use crate::event::{Offset, Root, ShardId, Version};
use crate::log::format::{
    HEADER_BYTES, HeaderError, LOST_MAGIC, OFFSETS_END, RECORD_BYTES_MAX, RECORD_HEADER_BYTES, RecordAt, RecordHeader,
    Seam, SegmentHeader, record_at,
};
use crate::log::manifest::spare_number;
use crate::log::manifest::{Manifest, Span, segment_index, segment_name};
use crate::log::segment::{Segment, ShardLog};
use crate::log::writer::Resume;
use crate::recovery::fold::{Folder, Unreadable};
use crate::recovery::remains::{are_of_an_earlier_life, later_records};
use crate::recovery::repair::Repair;
use crate::recovery::report::ShardRecovery;
use crate::recovery::unfit::{EMPTY, Unfit};
use crate::state::aggregate::Aggregate;
use crate::state::snapshot::format::{Owner, Unusable};
use crate::storage::Storage;
use crate::storage::framed::u32_at;
use crate::storage::memory::padded;
use crate::storage::memory::{Memory, WriteHalf};
use load::Candidate;

/// A shard's log as found, ready to be written.
pub(crate) struct Recovered<A: Aggregate> {
    pub(crate) report: ShardRecovery,
    pub(crate) segments: VecDeque<Segment>,
    pub(crate) resume: Resume,
    /// The keys' states and the outcomes of commands.
    pub(crate) folder: Folder<A>,
    /// What is saved besides; always there once recovery is over.
    pub(crate) saved: Option<load::Found>,
    pub(crate) span: Span,
    /// Prepared and never begun: to be blanked and prepared again.
    pub(crate) unused: Vec<PathBuf>,
    pub(crate) spares: Vec<PathBuf>,
    /// The repairs that are due before anything is appended.
    repair: Option<Repair>,
}

impl<A: Aggregate> Recovered<A> {
    /// The log as it was found, to be read before anything is changed.
    pub(crate) fn log(&self, manifest: &Manifest, dir: &Path) -> ShardLog {
        let (report, segments) = (&self.report, self.segments.clone());
        let (store, segment_bytes) = (manifest.store_id, manifest.segment_bytes);
        ShardLog::new(store, report.shard, dir.to_owned(), segment_bytes, report.end, self.resume.sequence, segments)
    }

    /// Changes what has to change. Not before the whole store was found sound: one that is refused stays as it is.
    pub(crate) fn repair(&mut self, storage: &dyn Storage, dir: &Path, quarantine: &Path) -> Result<(), OpenError> {
        if let Some(repair) = self.repair.take() {
            let last = self.resume.segment.as_mut();
            let mut last = last.map(|(segment, half)| (dir.join(segment_name(segment.index)), half));
            let last = last.as_mut().map(|(path, half)| (&**path, &mut **half));
            self.report.torn_tail = Some(repair.apply(storage, quarantine, last)?);
        }
        let saved = self.saved.as_mut().map_or(Ok(()), |saved| saved.settle(storage, dir));
        saved.map_err(|source| OpenError::Io { action: "removing saved states in", path: dir.to_owned(), source })
    }
}

/// What to open.
pub(crate) struct Opening<'a> {
    pub(crate) storage: &'a Arc<dyn Storage>,
    pub(crate) dir: &'a Path,
    /// The store is being created: it has no folder yet.
    pub(crate) is_new: bool,
    pub(crate) shard: ShardId,
    pub(crate) manifest: &'a Manifest,
    pub(crate) keys_expected: usize,
    pub(crate) outcomes_kept: usize,
    /// Whether this program can read a (type id, schema version).
    pub(crate) known: &'a (dyn Fn(u16, u16) -> bool + Sync),
}

/// How far a scan came and what it met there.
struct Scan<A: Aggregate> {
    folder: Folder<A>,
    durable: u64,
    /// Sequence of the first event held.
    first_sequence: u64,
    /// Where the last record ends that is no mark.
    events_end: u64,
}

/// Up to where a torn tail reaches, and what does not hold.
type Torn = (usize, &'static str);

/// A segment of the span; without a header, it was never begun.
type Opened = (u64, Memory, Option<SegmentHeader>);

/// The code that a panic is attributed to.
const UPGRADE: &str = "upgrade";
const EVOLVE: &str = "evolve or an upcaster";

/// Where a segment's records end.
struct End {
    at: usize,
    damaged: Option<&'static str>,
}

impl End {
    /// Why the log does not go on from here, the end of `segment`, into the segment with header `next`, if so.
    fn breaks_before(&self, next: &SegmentHeader, segment: &Segment, sequence: u64) -> Option<&'static str> {
        let end = Offset(segment.index * next.segment_bytes + self.at as u64);
        self.damaged.or_else(|| next.seam().breaks_after(&Seam { end, salt: segment.salt, sequence }))
    }
}

impl Opening<'_> {
    /// Looks at the log and folds it: from the newest checkpoint that can be used, or from its beginning.
    pub(crate) fn recover<A: Aggregate>(&self) -> Result<Recovered<A>, OpenError> {
        if self.is_new {
            let mut blank = self.blank(Vec::new(), self.folder(), Span { first: 0, last: 0 });
            blank.saved = Some(load::Found::nothing(self.storage));
            return Ok(blank);
        }
        let io = |source| OpenError::Io { action: "reading the saved states of", path: self.dir.to_owned(), source };
        let earliest = Span::load(&**self.storage, self.dir, self.manifest.segment_bytes)?.map_or(0, |span| span.first);
        let earliest = Offset(earliest * self.manifest.segment_bytes + HEADER_BYTES as u64);
        let has_lost_the_beginning = earliest.0 > HEADER_BYTES as u64;
        // A folder that is not there is an error before anything else is looked for in it.
        self.names()?;
        let (mut found, mut damage) = (None, None);
        // Of the newest checkpoint that is whole and was made by a program whose types are laid out otherwise.
        let mut other_layout = None;
        let (candidates, mut unreadable) = load::candidates(&**self.storage, self.dir, self.owner()).map_err(io)?;
        for candidate in candidates.iter().filter(|candidate| candidate.start >= earliest) {
            match self.recover_with::<A>(candidate)? {
                Ok(recovered) => {
                    let log = recovered.log(self.manifest, self.dir);
                    let is_usable = |other: &&Candidate| {
                        other.number <= candidate.number && other.start <= candidate.start && other.is_of(&log)
                    };
                    let usable = candidates.iter().filter(is_usable).map(|candidate| candidate.number).collect();
                    found = Some((recovered, usable));
                    break;
                }
                Err(unfit) => {
                    let why = unfit.why;
                    tracing::warn!(shard = self.shard.0, number = candidate.number, %why, "a checkpoint is not used");
                    unreadable += u64::from(!unfit.is_sound);
                    damage = damage.or(unfit.damage);
                    other_layout = other_layout.or(Some(why).filter(|why| !matches!(why, Unusable::Damaged(_))));
                }
            }
        }
        let (mut recovered, usable) = match found {
            Some(found) => found,
            None => {
                let recovered = self.recover_from(self.folder(), None)?;
                let Ok(recovered) = recovered else { unreachable!("without a checkpoint there is nothing to miss") };
                if has_lost_the_beginning && size_of::<A>() > 0 {
                    let shard = self.shard;
                    return Err(match other_layout {
                        Some(Unusable::State { stored }) => OpenError::state_layout(shard, stored, Root::of::<A>()),
                        Some(Unusable::Rejection { stored }) => {
                            OpenError::rejection_layout(shard, stored, Root::of::<A::Rejection>())
                        }
                        _ => OpenError::StatesLost { shard, earliest },
                    });
                }
                (recovered, Vec::new())
            }
        };
        // Damage that a checkpoint speaks for is no torn tail to be cut, though the log alone would call it one.
        if let (Some(damage), Some(_)) = (damage, &recovered.repair) {
            return Err(damage.into());
        }
        recovered.report.lost_beginning = has_lost_the_beginning && usable.is_empty();
        if recovered.report.lost_beginning {
            let shard = self.shard.0;
            tracing::warn!(
                shard,
                "no usable checkpoint before the log's beginning: keys without events in it begin anew"
            );
        }
        let log = load::Log { end: recovered.report.end, events: recovered.resume.sequence };
        let saved = guard(UPGRADE, self.shard, || {
            load::index::<A>(self.storage, self.dir, self.owner(), log, &usable, unreadable)
        })?;
        recovered.saved = Some(saved.map_err(io)?);
        Ok(recovered)
    }

    /// Looks at the log with the states of a checkpoint, or says why that is not one of this log.
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
            // Is it the log that is damaged? The log alone can tell.
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

    fn owner(&self) -> Owner {
        (self.manifest.store_id, self.shard)
    }

    fn folder<A: Aggregate>(&self) -> Folder<A> {
        Folder::new(self.shard, self.keys_expected, self.outcomes_kept)
    }

    /// Looks at the log and folds what `checkpoint` does not have; or says why it is not one of this log.
    fn recover_from<A: Aggregate>(
        &self,
        folder: Folder<A>,
        checkpoint: Option<&Candidate>,
    ) -> Result<Result<Recovered<A>, Unfit>, OpenError> {
        let mut names = self.names()?;
        let span = match Span::load(&**self.storage, self.dir, self.manifest.segment_bytes)? {
            Some(span) => Some(span),
            // Before the span is written for the first time, the first segment may have been prepared.
            None if self.all_blank(&names.segments)? => None,
            None => {
                return Err(OpenError::ForeignFile {
                    path: self.dir.join(crate::log::manifest::SPAN),
                    why: "there are segments, but the file that says which is missing",
                });
            }
        };
        let mut scan = Scan { folder, durable: 0, first_sequence: 0, events_end: 0 };
        let Some(span) = span else {
            let mut blank = self.blank(names.spares, scan.folder, Span { first: 0, last: 0 });
            blank.unused = names.segments.iter().map(|&index| self.path(index)).collect();
            return Ok(if checkpoint.is_none() { Ok(blank) } else { Err(EMPTY) });
        };
        // Surplus: freed before a crash, or prepared and not yet in the span. Written again, never read.
        let (held, surplus): (Vec<u64>, Vec<u64>) =
            names.segments.iter().partition(|&&index| (span.first..=span.last).contains(&index));
        let mut unused: Vec<PathBuf> = surplus.iter().map(|&index| self.path(index)).collect();
        if let Some(missing) = (span.first..=span.last)
            .zip(held.iter().copied().chain(std::iter::repeat(u64::MAX)))
            .find(|(want, have)| want != have)
        {
            return Err(self.corruption(missing.0, 0, "a segment is missing").into());
        }
        for &index in surplus.iter().filter(|&&index| index > span.last) {
            // The span is written before a segment is handed over, so one beyond it was never begun.
            if self.header(index, &self.open(index)?)?.is_some() {
                return Err(OpenError::ForeignFile {
                    path: self.path(index),
                    why: "a segment in use lies beyond the span: the span is older than the log",
                });
            }
        }
        let mut opened = Vec::new();
        let mut lost_header = None;
        for index in span.first..=span.last {
            let memory = self.open(index)?;
            let header = match self.header(index, &memory) {
                // Was it ever begun? The log before it tells.
                Err(OpenError::Corruption(damage)) if damage.why == LOST_MAGIC => {
                    lost_header.get_or_insert(index);
                    None
                }
                header => header?,
            };
            if let (Some(lost), Some(_)) = (lost_header, header) {
                return Err(self.corruption(lost, 0, LOST_MAGIC).into());
            }
            opened.push((index, memory, header));
        }
        // Where reading begins: what lies before is not looked at, unless the checkpoint may know more than the disk.
        let begin = checkpoint.map(|checkpoint| self.place_of(checkpoint.start));
        if let Some(unfit) = checkpoint.and_then(|checkpoint| self.misplaced(checkpoint, &opened)) {
            return Ok(Err(unfit));
        }
        scan.folder.knows_all_keys = checkpoint.is_some() || span.first == 0;
        // Nor if the store has ever seen a layout declared that this program cannot read: whether the log still holds such events
        // is for a look at all of it to say.
        let reads_all = self.manifest.types.iter().all(|t| (self.known)(t.id.0, t.schema_version));
        let skip = checkpoint.filter(|checkpoint| checkpoint.is_trusted && reads_all).and(begin);

        let mut segments = VecDeque::new();
        let mut tail: Option<(Segment, End)> = None;
        let mut blank = None;
        // Segments behind the place where the log stops holding.
        let mut beyond: Vec<(u64, Memory, u32)> = Vec::new();
        let mut stop = None;
        for (index, memory, header) in opened {
            let Some(header) = header else {
                if lost_header.is_some_and(|lost| index >= lost) {
                    let whole = memory.read(0, memory.len()).unwrap_or_default();
                    let is_blank = SegmentHeader::decode(whole) == Err(HeaderError::Blank);
                    let version_of = |key| scan.folder.keys.get(key).map_or(Version(0), |slot| slot.version);
                    let is_whole = tail.as_ref().is_some_and(|(_, end)| end.damaged.is_none());
                    let was_begun = !(is_blank || is_whole && are_of_an_earlier_life(whole, version_of));
                    if was_begun {
                        return Err(self.corruption(index, 0, LOST_MAGIC).into());
                    }
                }
                blank.get_or_insert(index);
                unused.push(self.path(index));
                continue;
            };
            let is_skipped = skip.is_some_and(|(begin, _)| index <= begin);
            // A checkpoint vouches for what is skipped, so this is no torn tail.
            if is_skipped && tail.as_ref().is_some_and(|(before, _)| header.previous_salt != before.salt) {
                let why = "the segment does not follow the one before it: one of them is of another log";
                return Err(self.corruption(index, 0, why).into());
            }
            stop = stop.or_else(|| match (blank, &tail) {
                (Some(blank), _) => Some((blank, 0, "a blank segment lies before one in use")),
                // Of what is skipped only the headers are looked at.
                (None, Some(_)) if is_skipped => None,
                (None, Some((before, end))) => {
                    end.breaks_before(&header, before, scan.folder.sequence).map(|why| (before.index, end.at, why))
                }
                (None, None) => None,
            });
            if stop.is_some() {
                beyond.push((index, memory, header.salt));
                continue;
            }
            match tail.take() {
                Some((before, _)) => segments.push_back(before),
                None => {
                    scan.first_sequence = header.first_sequence;
                    scan.folder.sequence = header.first_sequence;
                }
            }
            let end = match skip {
                Some((begin, at)) if index < begin => End { at, damaged: None },
                Some((begin, at)) if index == begin => {
                    scan.folder.sequence = checkpoint.map_or(header.first_sequence, |checkpoint| checkpoint.sequence.0);
                    self.scan(index, &memory, header.salt, at, &mut scan)?
                }
                _ => self.scan(index, &memory, header.salt, HEADER_BYTES, &mut scan)?,
            };
            tail = Some((Segment { index, seam: header.seam(), salt: header.salt, memory: Arc::new(memory) }, end));
        }
        let mut lost = Vec::new();
        for (index, memory, salt) in &beyond {
            let whole = memory.read(0, memory.len()).unwrap_or_default();
            let found = later_records(whole, HEADER_BYTES, *salt, self.known);
            scan.durable = scan.durable.max(found.durable);
            lost.extend_from_slice(&whole[..found.end]);
            unused.push(self.path(*index));
        }
        if let Some((index, at, why)) = stop
            && scan.durable > index * self.manifest.segment_bytes + at as u64
        {
            return Err(self.corruption(index, at, why).into());
        }

        let beyond = beyond.into_iter().map(|(index, memory, _)| (index, self.path(index), memory)).collect();
        let shard = self.shard;
        let Some((last, end)) = tail else {
            let mut recovered = self.blank(std::mem::take(&mut names.spares), scan.folder, span);
            recovered.repair = stop.map(|(index, _, why)| {
                let offset = Offset(index * self.manifest.segment_bytes);
                Repair { shard, offset, bytes: lost, torn: 0, why, beyond }
            });
            recovered.unused = unused;
            return Ok(if checkpoint.is_none() { Ok(recovered) } else { Err(EMPTY) });
        };
        let Segment { index, seam, salt, memory } = last;
        let (at, mut torn) = self.settle_tail(index, salt, &memory, &end, scan.durable)?;
        if let (None, Some((_, _, why))) = (&torn, stop) {
            torn = Some((at, why));
        }
        let repair = torn.map(|(until, why)| {
            let mut bytes = memory.read(at, until - at).unwrap_or_default().to_vec();
            bytes.append(&mut lost);
            let offset = Offset(index * self.manifest.segment_bytes + at as u64);
            Repair { shard, offset, bytes, torn: until - at, why, beyond }
        });
        let memory = Arc::try_unwrap(memory).expect("recovery alone holds the segment");
        let half = WriteHalf::new(memory, at);
        let last = Segment { index, seam, salt, memory: Arc::clone(half.memory()) };
        segments.push_back(last.clone());
        let end = Offset(index * self.manifest.segment_bytes + at as u64);
        // Marks alone behind the last event need not be marked again.
        let marked = if scan.durable >= scan.events_end && repair.is_none() { end.0 } else { scan.durable };
        let report = ShardRecovery {
            shard: self.shard,
            events: scan.folder.sequence - scan.first_sequence,
            segments: segments.len(),
            keys: scan.folder.keys.len(),
            end,
            torn_tail: None,
            lost_beginning: false,
        };
        Ok(Ok(Recovered {
            report,
            segments,
            resume: Resume {
                segment: Some((last, half)),
                next_index: index + 1,
                sequence: scan.folder.sequence,
                marked,
            },
            folder: scan.folder,
            saved: None,
            span,
            unused,
            spares: names.spares,
            repair,
        }))
    }

    /// A log without records.
    fn blank<A: Aggregate>(&self, spares: Vec<PathBuf>, folder: Folder<A>, span: Span) -> Recovered<A> {
        let report = ShardRecovery {
            shard: self.shard,
            events: 0,
            segments: 0,
            keys: 0,
            end: Offset(span.first * self.manifest.segment_bytes + HEADER_BYTES as u64),
            torn_tail: None,
            lost_beginning: false,
        };
        Recovered {
            report,
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

    fn names(&self) -> Result<Names, OpenError> {
        let mut names = Names::default();
        for name in self.storage.list(self.dir).map_err(|source| OpenError::Io {
            action: "listing",
            path: self.dir.to_owned(),
            source,
        })? {
            if let Some(index) = segment_index(&name) {
                if index >= OFFSETS_END / self.manifest.segment_bytes {
                    return Err(OpenError::ForeignFile {
                        path: self.dir.join(name),
                        why: "a segment beyond the last offset",
                    });
                }
                names.segments.push(index);
            } else if spare_number(&name).is_some() {
                names.spares.push(self.dir.join(name));
            } else if name.ends_with(".seg") {
                return Err(OpenError::ForeignFile { path: self.dir.join(name), why: "not the name of a segment" });
            }
        }
        Ok(names)
    }

    /// Whether none of these segments was ever begun.
    fn all_blank(&self, indices: &[u64]) -> Result<bool, OpenError> {
        for &index in indices {
            if self.header(index, &self.open(index)?)?.is_some() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn path(&self, index: u64) -> PathBuf {
        self.dir.join(crate::log::manifest::segment_name(index))
    }

    /// Maps a segment and syncs it: after a killed process its newest bytes may be in the system's cache
    /// only, and what recovery builds on must not vanish later.
    fn open(&self, index: u64) -> Result<Memory, OpenError> {
        let io = |action| move |source| OpenError::Io { action, path: self.path(index), source };
        let memory = match self.storage.open_segment(&self.path(index), true) {
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
                return Err(self.corruption(index, 0, "the segment is empty").into());
            }
            opened => opened.map_err(io("opening"))?,
        };
        self.storage.sync(&memory, 0..memory.len()).map_err(io("syncing"))?;
        if memory.len() as u64 != self.manifest.segment_bytes {
            return Err(self.corruption(index, memory.len(), "the segment is not as long as the manifest says").into());
        }
        Ok(memory)
    }

    /// The segment's header; `None` for one that was prepared and never begun.
    fn header(&self, index: u64, memory: &Memory) -> Result<Option<SegmentHeader>, OpenError> {
        let page = memory.read(0, (HEADER_BYTES + 4).min(memory.len())).unwrap_or_default();
        let header = match SegmentHeader::decode(page) {
            Ok(header) => header,
            Err(HeaderError::Blank) => return Ok(None),
            Err(HeaderError::Version(found)) => {
                return Err(OpenError::UnknownFormat {
                    path: self.path(index),
                    found,
                    known: crate::storage::framed::FORMAT_VERSION,
                });
            }
            Err(HeaderError::Archive(found)) => {
                return Err(OpenError::ArchiveFormat {
                    path: self.path(index),
                    found,
                    known: crate::log::format::archive_fingerprint(),
                });
            }
            Err(HeaderError::Damaged(why)) => return Err(self.corruption(index, 0, why).into()),
        };
        if header.shard != self.shard || header.index != index || header.segment_bytes != self.manifest.segment_bytes {
            return Err(OpenError::ForeignFile { path: self.path(index), why: "the segment belongs to another place" });
        }
        // No record is smaller than its header.
        if header.first_sequence > index.saturating_mul(self.manifest.segment_bytes) / RECORD_HEADER_BYTES as u64 {
            return Err(self
                .corruption(index, 0, "its first sequence is beyond all events that can lie before")
                .into());
        }
        Ok(Some(header))
    }

    /// Goes over a segment's records from the front until one does not hold or none follows.
    fn scan<A: Aggregate>(
        &self,
        index: u64,
        memory: &Memory,
        salt: u32,
        from: usize,
        scan: &mut Scan<A>,
    ) -> Result<End, OpenError> {
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
    ) -> Result<End, OpenError> {
        let whole = memory.read(0, memory.len()).unwrap_or_default();
        if let Err(error) = memory.advise_sequential() {
            tracing::debug!(%error, "no read-ahead advice");
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
                RecordAt::End => break End { at, damaged: None },
                RecordAt::Damaged(why) => break End { at, damaged: Some(why) },
            };
            let header = RecordHeader::decode(&whole[at..]);
            if header.is_mark() {
                scan.durable = scan.durable.max(header.key.0);
            } else {
                self.check(index, at, &header)?;
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
            // A command is one: where its last record is missing, the others do not count either.
            Some(begun) => {
                scan.folder.forget_group();
                let damaged = Some(end.damaged.unwrap_or("a command's last records are missing"));
                Ok(End { at: (begun.0 - base) as usize, damaged })
            }
        }
    }

    /// Whether this program can read such a record.
    #[inline]
    fn check(&self, index: u64, at: usize, header: &RecordHeader) -> Result<(), OpenError> {
        if header.is_own() {
            return match header.is_outcome() {
                true => Ok(()),
                false => {
                    Err(self.corruption(index, at, "a record of the log's own that this build does not know").into())
                }
            };
        }
        if header.version.0 == 0 {
            return Err(self.corruption(index, at, "an event without a version behind a CRC that holds").into());
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

    /// Decides what the end of the last segment is. Returns where to go on writing and, for a torn tail, up
    /// to where it reaches and why it is one.
    fn settle_tail(
        &self,
        index: u64,
        salt: u32,
        memory: &Memory,
        end: &End,
        durable: u64,
    ) -> Result<(usize, Option<Torn>), OpenError> {
        let whole = memory.read(0, memory.len()).unwrap_or_default();
        // Whatever still holds behind the end: it tells how far the log once was, and how far it was durable.
        let beyond = later_records(whole, end.at, salt, self.known);
        let durable = durable.max(beyond.durable);
        let why = end.damaged.unwrap_or("the log ends before records that hold");
        if durable > index * self.manifest.segment_bytes + end.at as u64 {
            return Err(self.corruption(index, end.at, why).into());
        }
        if end.damaged.is_none() && beyond.end == end.at {
            return Ok((end.at, None));
        }
        // At least the record that does not hold: as far as its own length says, or a page.
        let claimed = whole.get(end.at..end.at + 4).map_or(0, |word| u32_at(word, 0) as usize);
        let until = beyond.end.max(end.at + claimed.clamp(4096, RECORD_BYTES_MAX)).min(whole.len());
        Ok((end.at, Some((until, why))))
    }

    fn corruption(&self, segment: u64, at: usize, why: &'static str) -> Corruption {
        Corruption {
            shard: self.shard,
            segment,
            offset: Offset(segment.saturating_mul(self.manifest.segment_bytes).saturating_add(at as u64)),
            why,
        }
    }
}

#[derive(Default)]
struct Names {
    segments: Vec<u64>,
    spares: Vec<PathBuf>,
}
