//! Opening a shard's log: what is whole is kept, a torn tail is set aside and cut, damage to what had been
//! durable is an error, and nothing else is touched.
//!
//! How the two are told apart: the log carries marks that say up to where it had been synced when they were
//! written. Bytes that do not hold, below any mark that does, were durable once: that is damage. Bytes that do
//! not hold above every mark were never promised to anyone: that is a tail torn by a power cut.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};

use crate::aggregate::Aggregate;
use crate::error::{Corruption, OpenError};
use crate::event::{Offset, ShardId};
use crate::log::fold::{Folder, Unreadable};
use crate::log::format::{
    ALIGN, Found, HEADER_BYTES, HeaderError, OFFSETS_END, RECORD_BYTES_MAX, RECORD_HEADER_BYTES, RecordHeader,
    SegmentHeader, encode_prepared, padded, record_at, u32_at,
};
use crate::log::keeper::{fresh_salt, spare_number};
use crate::log::manifest::{Manifest, Span, segment_index};
use crate::log::mmap::{Memory, WriteHalf};
use crate::log::segment::Segment;
use crate::log::storage::{Storage, replace};
use crate::log::writer::Resume;
use crate::snapshot::load::{self, Candidate};

/// What opening a store found.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct RecoveryReport {
    /// Shard by shard.
    pub shards: Vec<ShardRecovery>,
    /// How long it took, in ns.
    pub duration_ns: u64,
}

impl RecoveryReport {
    /// Events found in all shards.
    #[must_use]
    pub fn events(&self) -> u64 {
        self.shards.iter().map(|shard| shard.events).sum()
    }
}

/// What opening one shard found.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ShardRecovery {
    /// The shard.
    pub shard: ShardId,
    /// Events held (retention may have freed earlier ones).
    pub events: u64,
    /// Segments that hold records.
    pub segments: usize,
    /// Keys seen.
    pub keys: usize,
    /// Where the next record will be written.
    pub end: Offset,
    /// A tail that was torn: cut at `end`, its bytes kept.
    pub torn_tail: Option<TornTail>,
    /// Retention has freed the log's beginning and no usable checkpoint knows what it held: versions of keys without events in the
    /// log begin anew, and outcomes of commands are forgotten. (With states the store is refused instead.)
    pub lost_beginning: bool,
}

/// A tail that did not hold and had never been durable.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct TornTail {
    /// Where it began.
    pub offset: Offset,
    /// Bytes set aside.
    pub bytes: u64,
    /// The file that has them.
    pub quarantined: PathBuf,
    /// What did not hold.
    pub why: &'static str,
}

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
}

/// What to open.
pub(crate) struct Opening<'a> {
    pub(crate) storage: &'a std::sync::Arc<dyn Storage>,
    pub(crate) dir: &'a Path,
    pub(crate) quarantine: &'a Path,
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

/// Where a segment's records end.
struct End {
    at: usize,
    damaged: Option<&'static str>,
}

impl End {
    /// Why the log does not go on from here into the segment with header `next`, if so.
    fn breaks_before(&self, next: &SegmentHeader, sequence: u64) -> Option<&'static str> {
        self.damaged
            .or((next.first_sequence != sequence).then_some("the next segment's first sequence does not follow"))
    }
}

impl Opening<'_> {
    /// Opens the log and folds it: from the newest checkpoint that can be used, or from its beginning.
    pub(crate) fn recover<A: Aggregate>(&self) -> Result<Recovered<A>, OpenError> {
        let io = |source| OpenError::Io { action: "reading the saved states of", path: self.dir.to_owned(), source };
        let earliest = Span::load(&**self.storage, self.dir)?.map_or(0, |span| span.first);
        let earliest = Offset(earliest * self.manifest.segment_bytes + HEADER_BYTES as u64);
        let has_lost_the_beginning = earliest.0 > HEADER_BYTES as u64;
        // A folder that is not there is an error before anything else is looked for in it.
        self.names()?;
        let mut torn_tail = None;
        let mut found = None;
        let (candidates, mut unreadable) = load::candidates(&**self.storage, self.dir, self.shard).map_err(io)?;
        for candidate in candidates.iter().filter(|candidate| candidate.start >= earliest) {
            let mut folder = Folder::<A>::new(self.shard, self.keys_expected, self.outcomes_kept);
            let loaded = load::load(&**self.storage, self.dir, self.shard, candidate, &mut folder);
            let recovered = match loaded {
                Ok(()) => self.recover_from(folder, Some(candidate))?,
                Err(why) => {
                    tracing::warn!(shard = self.shard.0, number = candidate.number, why, "a checkpoint is unusable");
                    unreadable += 1;
                    continue;
                }
            };
            let Some(recovered) = recovered else { continue };
            if recovered.report.end >= candidate.log_end {
                let usable = candidates.iter().map(|candidate| candidate.number);
                found = Some((recovered, usable.filter(|&number| number <= candidate.number).collect()));
                break;
            }
            // It has states whose events are gone: not those of this log.
            tracing::warn!(shard = self.shard.0, number = candidate.number, "a checkpoint is ahead of the log");
            torn_tail = torn_tail.or(recovered.report.torn_tail);
        }
        let (mut recovered, usable) = match found {
            Some(found) => found,
            None => {
                let folder = Folder::<A>::new(self.shard, self.keys_expected, self.outcomes_kept);
                let recovered =
                    self.recover_from(folder, None)?.expect("without a checkpoint there is nothing to miss");
                if has_lost_the_beginning && size_of::<A>() > 0 {
                    return Err(OpenError::StatesLost { shard: self.shard, earliest });
                }
                (recovered, Vec::new())
            }
        };
        recovered.report.lost_beginning = has_lost_the_beginning && usable.is_empty();
        if recovered.report.lost_beginning {
            let shard = self.shard.0;
            tracing::warn!(
                shard,
                "no usable checkpoint before the log's beginning: keys without events in it begin anew"
            );
        }
        recovered.report.torn_tail = recovered.report.torn_tail.or(torn_tail);
        let end = recovered.report.end;
        let saved = load::index::<A>(self.storage, self.dir, self.shard, end, &usable, unreadable);
        recovered.saved = Some(saved.map_err(io)?);
        Ok(recovered)
    }

    /// Opens the log and folds what `checkpoint` does not have. `None`: it is not one of this log.
    fn recover_from<A: Aggregate>(
        &self,
        folder: Folder<A>,
        checkpoint: Option<&Candidate>,
    ) -> Result<Option<Recovered<A>>, OpenError> {
        let mut names = self.names()?;
        let span = match Span::load(&**self.storage, self.dir)? {
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
            return Ok(checkpoint.is_none().then_some(blank));
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
        if span.last >= OFFSETS_END / self.manifest.segment_bytes {
            let path = self.dir.join(crate::log::manifest::SPAN);
            return Err(OpenError::ForeignFile { path, why: "the span lies beyond the last offset" });
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
        for index in span.first..=span.last {
            let memory = self.open(index)?;
            let header = self.header(index, &memory)?;
            opened.push((index, memory, header));
        }
        // Where reading begins: what lies before is not looked at, unless the checkpoint may know more than the disk.
        let begin = checkpoint.map(|checkpoint| self.place_of(checkpoint));
        if let Some((begin, _)) = begin
            && !opened.iter().any(|(index, _, header)| *index == begin && header.is_some())
        {
            return Ok(None);
        }
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
                blank.get_or_insert(index);
                unused.push(self.path(index));
                continue;
            };
            stop = stop.or_else(|| match (blank, &tail) {
                (Some(blank), _) => Some((blank, 0, "a blank segment lies before one in use")),
                // Of what is skipped only the headers are looked at.
                (None, Some(_)) if skip.is_some_and(|(begin, _)| index <= begin) => None,
                (None, Some((before, end))) => {
                    end.breaks_before(&header, scan.folder.sequence).map(|why| (before.index, end.at, why))
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
            tail = Some((
                Segment {
                    index,
                    first_sequence: header.first_sequence,
                    salt: header.salt,
                    memory: std::sync::Arc::new(memory),
                },
                end,
            ));
        }
        let mut lost = Vec::new();
        for (index, memory, salt) in &beyond {
            let whole = memory.read(0, memory.len()).unwrap_or_default();
            let found = self.later_records(whole, HEADER_BYTES, *salt);
            scan.durable = scan.durable.max(found.durable);
            lost.extend_from_slice(&whole[..found.end]);
            unused.push(self.path(*index));
        }
        if let Some((index, at, why)) = stop
            && scan.durable > index * self.manifest.segment_bytes + at as u64
        {
            return Err(self.corruption(index, at, why).into());
        }

        let Some((last, end)) = tail else {
            let mut recovered = self.blank(std::mem::take(&mut names.spares), scan.folder, span);
            if let Some((index, _, why)) = stop {
                recovered.report.torn_tail =
                    Some(self.quarantine(Offset(index * self.manifest.segment_bytes), &lost, why)?);
                self.blank_segments(beyond)?;
            }
            recovered.unused = unused;
            return Ok(checkpoint.is_none().then_some(recovered));
        };
        let Segment { index, first_sequence, salt, memory } = last;
        let (at, mut torn) = self.settle_tail(index, salt, &memory, &end, scan.durable)?;
        if let (None, Some((_, _, why))) = (&torn, stop) {
            torn = Some((at, why));
        }
        let mut torn_tail = None;
        if let Some((until, why)) = torn {
            let mut bytes = memory.read(at, until - at).unwrap_or_default().to_vec();
            bytes.append(&mut lost);
            torn_tail = Some(self.quarantine(Offset(index * self.manifest.segment_bytes + at as u64), &bytes, why)?);
        }
        // From the back, so that a crash in between leaves a log that is torn in the same place.
        self.blank_segments(beyond)?;
        let memory = std::sync::Arc::try_unwrap(memory).expect("recovery alone holds the segment");
        let mut half = WriteHalf::new(memory, at);
        if let Some((until, _)) = torn {
            // Blanked, so that it can never be taken for part of a later log.
            half.tail()[..until - at].fill(0);
            self.storage.sync(half.memory(), at..until).map_err(|source| OpenError::Io {
                action: "cutting",
                path: self.path(index),
                source,
            })?;
        }
        let last = Segment { index, first_sequence, salt, memory: std::sync::Arc::clone(half.memory()) };
        segments.push_back(last.clone());
        let end = Offset(index * self.manifest.segment_bytes + at as u64);
        // Marks alone behind the last event need not be marked again.
        let marked = if scan.durable >= scan.events_end && torn_tail.is_none() { end.0 } else { scan.durable };
        let report = ShardRecovery {
            shard: self.shard,
            events: scan.folder.sequence - scan.first_sequence,
            segments: segments.len(),
            keys: scan.folder.keys.len(),
            end,
            torn_tail,
            lost_beginning: false,
        };
        Ok(Some(Recovered {
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
        }))
    }

    /// Segment and position where the log goes on behind a checkpoint.
    fn place_of(&self, checkpoint: &Candidate) -> (u64, usize) {
        // The end of a segment filled to its last byte still belongs to that segment.
        let index = (checkpoint.start.0 - 1) / self.manifest.segment_bytes;
        (index, (checkpoint.start.0 - index * self.manifest.segment_bytes) as usize)
    }

    /// Blanks the headers of segments that are not part of the log, the last one first.
    fn blank_segments(&self, segments: Vec<(u64, Memory, u32)>) -> Result<(), OpenError> {
        for (index, memory, _) in segments.into_iter().rev() {
            let mut half = WriteHalf::new(memory, 0);
            encode_prepared(fresh_salt(index), half.tail());
            self.storage.sync(half.memory(), 0..HEADER_BYTES).map_err(|source| OpenError::Io {
                action: "cutting",
                path: self.path(index),
                source,
            })?;
        }
        Ok(())
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
                    known: crate::log::format::FORMAT_VERSION,
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
        let whole = memory.read(0, memory.len()).unwrap_or_default();
        if let Err(error) = memory.advise_sequential() {
            tracing::debug!(%error, "no read-ahead advice");
        }
        let base = index * self.manifest.segment_bytes;
        let mut at = from;
        let unreadable = |(offset, why): Unreadable| self.corruption(index, (offset.0 - base) as usize, why);
        let end = loop {
            let len = match record_at(&whole[at..], salt) {
                Found::Record(len) => len,
                Found::End => break End { at, damaged: None },
                Found::Damaged(why) => break End { at, damaged: Some(why) },
            };
            let header = RecordHeader::decode(&whole[at..]);
            if header.is_mark() {
                scan.durable = scan.durable.max(header.key.0);
            } else {
                self.check(index, at, &header)?;
                scan.folder.record(memory, at, len, &header, Offset(base + at as u64)).map_err(unreadable)?;
            }
            at += padded(len);
            if !header.is_mark() {
                scan.events_end = base + at as u64;
            }
        };
        scan.folder.settle(memory).map_err(unreadable)?;
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
        let beyond = self.later_records(whole, end.at, salt);
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

    /// Looks for records that hold at any 16-byte step behind `from`. Old contents of a recycled segment do
    /// not hold: their salt was another.
    fn later_records(&self, whole: &[u8], from: usize, salt: u32) -> Beyond {
        let mut found = Beyond { end: from, durable: 0 };
        let mut at = from;
        while at + RECORD_HEADER_BYTES <= whole.len() {
            let header = RecordHeader::decode(&whole[at..]);
            let mark = header.is_mark();
            // Most places are not even the beginning of a header; a look at it spares the check sum.
            let likely = if mark {
                u32_at(whole, at) as usize == RECORD_HEADER_BYTES
            } else if header.is_own() {
                header.is_outcome()
            } else {
                (self.known)(header.event_type.0, header.schema_version)
            };
            match if likely { record_at(&whole[at..], salt) } else { Found::End } {
                Found::Record(len) => {
                    if mark {
                        found.durable = found.durable.max(header.key.0);
                    }
                    at += padded(len);
                    found.end = at;
                }
                Found::End | Found::Damaged(_) => at += ALIGN,
            }
        }
        found
    }

    fn quarantine(&self, offset: Offset, bytes: &[u8], why: &'static str) -> Result<TornTail, OpenError> {
        let plain = format!("shard-{:04}-offset-{offset}", self.shard.0);
        let io = |path: &Path, source| OpenError::Io { action: "quarantining", path: path.to_owned(), source };
        let taken = self
            .storage
            .create_dir(self.quarantine)
            .and_then(|()| self.storage.list(self.quarantine))
            .map_err(|source| io(self.quarantine, source))?;
        // What an earlier opening kept stays: the same place can be torn again.
        let (mut name, mut n) = (format!("{plain}.torn"), 1_u64);
        while taken.contains(&name) {
            n += 1;
            name = format!("{plain}-{n}.torn");
        }
        let path = self.quarantine.join(&name);
        replace(&**self.storage, self.quarantine, &name, bytes).map_err(|source| io(&path, source))?;
        tracing::warn!(shard = self.shard.0, %offset, why, "a torn tail was cut");
        Ok(TornTail { offset, bytes: bytes.len() as u64, quarantined: path, why })
    }

    fn corruption(&self, segment: u64, at: usize, why: &'static str) -> Corruption {
        Corruption {
            shard: self.shard,
            segment,
            offset: Offset(segment * self.manifest.segment_bytes + at as u64),
            why,
        }
    }
}

#[derive(Default)]
struct Names {
    segments: Vec<u64>,
    spares: Vec<PathBuf>,
}

struct Beyond {
    /// End of the last record that holds, or where the search began.
    end: usize,
    /// The furthest mark among them.
    durable: u64,
}
