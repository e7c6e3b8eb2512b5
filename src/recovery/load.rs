//! Loads a checkpoint when a store is opened: the checkpoints of a folder, newest first, and the states of one of them.

use std::io;
use std::path::Path;

use rkyv::util::AlignedVec;

use crate::event::{KeyHash, Offset, Sequence, Version};
use crate::log::format::{LOW_47, is_record_offset};
use crate::log::segment::ShardLog;
use crate::recovery::fold::Folder;
use crate::state::aggregate::Aggregate;
use crate::state::keys::Slot;
use crate::state::snapshot::format::{
    ENTRY_HEADER_BYTES, End, Entry, FILE_HEADER_BYTES, FileHeader, Kind, Owner, Unusable, entry_at,
};
use crate::state::snapshot::store::{file_name, file_number, whole};
use crate::storage::Storage;
use crate::storage::memory::ALIGN;

/// A checkpoint from which recovery may begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Candidate {
    pub(crate) number: u32,
    /// The offset from which the log must be folded, and the sequence of the next event there.
    pub(crate) start: Offset,
    pub(crate) sequence: Sequence,
    /// The offset that the log must reach at least.
    pub(crate) log_end: Offset,
    /// The CRC words of the records that end at `start` and at `log_end`.
    pub(crate) checks: [u32; 2],
    /// `true` if the log was durable up to `log_end`, or if the system has not restarted since, so that its cache still
    /// has the log. Otherwise the log before `start` must be scanned too.
    pub(crate) is_trusted: bool,
}

impl Candidate {
    /// Returns `true` if `log` reaches the checkpoint's end and has the records that end at its start and at its end.
    /// Freed records are not checked.
    pub(crate) fn is_of(&self, log: &ShardLog) -> bool {
        let has = |(place, check)| place < log.earliest() || log.check_before(place) == Some(check);
        self.log_end.0 <= log.appended.get() && [self.start, self.log_end].into_iter().zip(self.checks).all(has)
    }
}

/// Returns the valid checkpoints of a shard's folder, newest first, and the number of invalid ones.
pub(crate) fn candidates(storage: &dyn Storage, dir: &Path, owner: Owner) -> io::Result<(Vec<Candidate>, u64)> {
    let mut numbers: Vec<u32> = storage
        .list(dir)?
        .iter()
        .filter_map(|name| file_number(name))
        .filter_map(|(kind, number)| (kind == Kind::Checkpoint).then_some(number))
        .collect();
    numbers.sort_unstable_by(|a, b| b.cmp(a));
    let boot = storage.boot_id();
    let (mut valid, mut unreadable) = (Vec::new(), 0);
    for number in numbers {
        match read_ends(storage, dir, owner, number)? {
            Ok((header, end)) => valid.push(Candidate {
                number,
                start: header.start,
                sequence: header.sequence,
                log_end: end.log_end,
                checks: [header.check, end.check],
                is_trusted: end.durable || (boot != 0 && end.boot == boot),
            }),
            Err(why) => {
                unreadable += 1;
                let shard = owner.1.0;
                tracing::warn!(
                    shard,
                    number,
                    why,
                    "a checkpoint is invalid; an earlier one or the whole log is used instead"
                );
            }
        }
    }
    Ok((valid, unreadable))
}

/// Reads the header and the end of a checkpoint. The inner error is the reason why they are invalid. A file that cannot
/// be read now is an I/O error, not a reason to ignore it: if the log grew without the file's states, the file could
/// later be taken for a checkpoint of that log.
pub(super) fn read_ends(
    storage: &dyn Storage,
    dir: &Path,
    owner: Owner,
    number: u32,
) -> io::Result<Result<(FileHeader, End), &'static str>> {
    let file = storage.open_side(&dir.join(file_name(Kind::Checkpoint, number)))?;
    let bytes = file.len()?;
    let mut ends = AlignedVec::<ALIGN>::new();
    ends.resize(FILE_HEADER_BYTES + ENTRY_HEADER_BYTES, 0);
    if bytes < ends.len() as u64 {
        return Ok(Err("a checkpoint without an end"));
    }
    let (head, end) = ends.split_at_mut(FILE_HEADER_BYTES);
    file.read_at(0, head)?;
    file.read_at(bytes - ENTRY_HEADER_BYTES as u64, end)?;
    Ok(FileHeader::decode(&ends, owner).and_then(|header| match header.kind {
        Kind::Checkpoint => {
            let end = End::decode(&ends)?;
            let is_valid =
                is_record_offset(header.start) && is_record_offset(end.log_end) && header.start <= end.log_end;
            is_valid.then_some((header, end)).ok_or("its start or end is not a place in a log")
        }
        Kind::Snapshots => Err("it is not a checkpoint"),
    }))
}

/// Returns `true` if an entry can belong to a log that ends at `end`.
pub(crate) fn is_of(entry: &Entry<'_>, end: Offset) -> bool {
    entry.version.0 == 0 || (entry.version.0 <= LOW_47 && is_record_offset(entry.head) && entry.head < end)
}

/// Loads the states and outcomes of a checkpoint into `folder`. Returns the highest version. After an error the
/// checkpoint is not usable, and `folder` must be thrown away.
pub(crate) fn load<A: Aggregate>(
    storage: &dyn Storage,
    dir: &Path,
    owner: Owner,
    candidate: &Candidate,
    folder: &mut Folder<A>,
) -> Result<Version, Unusable> {
    let path = dir.join(file_name(Kind::Checkpoint, candidate.number));
    let bytes = storage.open_side(&path).and_then(|file| whole(&*file)).map_err(|_| "it cannot be read")?;
    let header = FileHeader::decode(&bytes, owner)?;
    if header.is_of_another_layout::<A>() {
        return Err(Unusable::State { stored: header.state });
    }
    let end = End::decode(&bytes)?;
    let (mut at, mut count, mut newest) = (FILE_HEADER_BYTES, 0, Version(0));
    while let Some(entry) = entry_at(&bytes, at)? {
        at += entry.bytes;
        if entry.is_end() {
            break;
        }
        count += 1;
        if !is_of(&entry, candidate.log_end) {
            return Err("an entry names an event that no log can have".into());
        }
        newest = newest.max(entry.version);
        let outcomes = entry.outcomes::<A>()?;
        if !outcomes.is_empty() {
            folder.outcomes.restore(entry.key, entry.version, outcomes.into());
        }
        if entry.version.0 == 0 {
            continue;
        }
        let slot = Slot {
            key: entry.key,
            version: entry.version,
            head: entry.head,
            time_max: entry.time_max,
            state: entry.state::<A>()?,
        };
        // If a part of the table grew while it was saved, its keys appear twice.
        let hash = KeyHash::of(slot.key);
        let seen = folder.keys.look(hash);
        let known = folder.keys.slot(slot.key, hash, seen);
        if known.version <= slot.version {
            *known = slot;
        }
    }
    if count != end.entries || at != bytes.len() {
        return Err("entries of the checkpoint are missing".into());
    }
    Ok(newest)
}
