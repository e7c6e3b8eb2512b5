//! Saved states when a store is opened: the newest checkpoint that can be used, and the index of all that is saved.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::OnceLock;

use rkyv::util::AlignedVec;

use crate::event::{Key, KeyHash, Offset, Sequence, Version};
use crate::log::format::{LOW_47, is_record_offset};
use crate::log::segment::ShardLog;
use crate::recovery::fold::Folder;
use crate::state::aggregate::Aggregate;
use crate::state::keys::Slot;
use crate::state::snapshot::format::{
    ENTRY_HEADER_BYTES, End, Entry, FILE_HEADER_BYTES, FileHeader, Kind, OTHER_STORE, Owner, Unusable, entry_at,
};
use crate::state::snapshot::store::{Held, Saved, SnapshotStore, file_name, file_number, whole};
use crate::storage::memory::ALIGN;
use crate::storage::{Storage, replace};
use crate::sync::Ordering;

/// A checkpoint that opening may begin from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Candidate {
    pub(crate) number: u32,
    /// Where the log is to be followed from, and the sequence of the next event there.
    pub(crate) start: Offset,
    pub(crate) sequence: Sequence,
    /// The log must reach at least here.
    pub(crate) log_end: Offset,
    /// The CRC words of the records that end at `start` and at `log_end`.
    pub(crate) checks: [u32; 2],
    /// Whether the log was durable as far as the checkpoint knows, or lies in the same cache still; otherwise what lies before
    /// `start` must be looked at too.
    pub(crate) is_trusted: bool,
}

impl Candidate {
    /// Whether the log has the records before its start and before its end, as far as they are not freed.
    pub(crate) fn is_of(&self, log: &ShardLog) -> bool {
        let has = |(place, check)| place < log.earliest() || log.check_before(place) == Some(check);
        self.log_end.0 <= log.appended.get() && [self.start, self.log_end].into_iter().zip(self.checks).all(has)
    }
}

/// The checkpoints of a shard's folder that are whole, newest first; and how many are not.
pub(crate) fn candidates(storage: &dyn Storage, dir: &Path, owner: Owner) -> io::Result<(Vec<Candidate>, u64)> {
    let mut numbers: Vec<u32> = storage
        .list(dir)?
        .iter()
        .filter_map(|name| file_number(name))
        .filter_map(|(kind, number)| (kind == Kind::Checkpoint).then_some(number))
        .collect();
    numbers.sort_unstable_by(|a, b| b.cmp(a));
    let boot = storage.boot_id();
    let (mut found, mut unreadable) = (Vec::new(), 0);
    for number in numbers {
        match ends(storage, dir, owner, number)? {
            Ok((header, end)) => found.push(Candidate {
                number,
                start: header.start,
                sequence: header.sequence,
                log_end: end.log_end,
                checks: [header.check, end.check],
                is_trusted: end.durable || (boot != 0 && end.boot == boot),
            }),
            Err(why) => {
                unreadable += 1;
                tracing::warn!(
                    shard = owner.1.0,
                    number,
                    why,
                    "a checkpoint cannot be used; an earlier one or the log is"
                );
            }
        }
    }
    Ok((found, unreadable))
}

/// Beginning and end of a checkpoint, or why there are none. That a file cannot be read just now is an error and no reason to
/// pass over it: should the log go on without what it knows, it could be taken for a checkpoint of that log later.
fn ends(
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
            let holds = is_record_offset(header.start) && is_record_offset(end.log_end) && header.start <= end.log_end;
            holds.then_some((header, end)).ok_or("it begins or ends where no log does")
        }
        Kind::Snapshots => Err("it is no checkpoint"),
    }))
}

/// Whether an entry can be of a log that ends at `end`.
pub(crate) fn is_of(entry: &Entry<'_>, end: Offset) -> bool {
    entry.version.0 == 0 || (entry.version.0 <= LOW_47 && is_record_offset(entry.head) && entry.head < end)
}

/// Puts the states of a checkpoint into the table, and says which is the highest version. `Err`: it cannot be used, and the folder's
/// table is to be thrown away.
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
            return Err("an entry is of an event that no log has".into());
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
        // A part of the table that grew while it was saved comes twice.
        let hash = KeyHash::of(slot.key);
        let seen = folder.keys.look(hash);
        let known = folder.keys.slot(slot.key, hash, seen);
        if known.version <= slot.version {
            *known = slot;
        }
    }
    if count != end.entries || at != bytes.len() {
        return Err("a checkpoint's entries are not all there".into());
    }
    Ok(newest)
}

/// What the folder of a shard has besides its log.
pub(crate) struct Found {
    pub(crate) store: SnapshotStore,
    pub(crate) next_number: u32,
    /// Up to where everything is saved.
    pub(crate) covered: Offset,
    /// What is to become of files that say more than there is; for [`Found::settle`].
    remove: Vec<PathBuf>,
    cut: Vec<(String, Vec<u8>)>,
    /// Checkpoints that may be the only record of what the freed beginning of the log had made.
    usable: Vec<PathBuf>,
}

/// The log that was found.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Log {
    pub(crate) end: Offset,
    /// How many events it ever had.
    pub(crate) events: u64,
}

impl Found {
    /// What a shard has whose store is being created.
    pub(crate) fn nothing(storage: &Arc<dyn Storage>) -> Self {
        let store = SnapshotStore::new(Arc::clone(storage));
        Self { store, next_number: 0, covered: Offset(0), remove: Vec::new(), cut: Vec::new(), usable: Vec::new() }
    }

    /// Removes for good what was saved of events that are gone: their places in the log will be written again. Not before all
    /// shards were found sound: a store that is refused stays as it is.
    pub(crate) fn settle(&mut self, storage: &dyn Storage, dir: &Path) -> io::Result<()> {
        for path in &self.remove {
            storage.remove(path)?;
        }
        for (name, content) in std::mem::take(&mut self.cut) {
            replace(storage, dir, &name, &content)?;
        }
        if std::mem::take(&mut self.remove).is_empty() { Ok(()) } else { storage.sync_dir(dir) }
    }

    /// Makes durable what the shard goes on from: the checkpoints, and the names in its folder, those of its span and its segments
    /// included. A process that was killed may have renamed a file and not come to its sync; retention frees the log before such a
    /// checkpoint, and a receipt would rest on it.
    pub(crate) fn make_durable(&self, storage: &dyn Storage, dir: &Path) -> io::Result<()> {
        for path in &self.usable {
            storage.open_side(path)?.sync()?;
        }
        storage.sync_dir(dir)
    }
}

/// Builds the index of everything saved of a log. Changes no file.
pub(crate) fn index<A: Aggregate>(
    storage: &Arc<dyn Storage>,
    dir: &Path,
    owner: Owner,
    log: Log,
    usable: &[u32],
    unreadable: u64,
) -> io::Result<Found> {
    let store = SnapshotStore::new(Arc::clone(storage));
    let storage = &**storage;
    store.unreadable.store(unreadable, Ordering::Relaxed);
    let (mut next_number, mut covered) = (0, Offset(0));
    let mut files: Vec<(Kind, u32)> = storage.list(dir)?.iter().filter_map(|name| file_number(name)).collect();
    files.sort_unstable_by_key(|(_, number)| *number);
    let (mut remove, mut cut, mut held_checkpoints) = (Vec::new(), Vec::new(), Vec::new());
    for (kind, number) in files {
        next_number = next_number.max(number + 1);
        let path = dir.join(file_name(kind, number));
        if kind == Kind::Checkpoint && !usable.contains(&number) {
            // A damaged one, or one of another state version, may be of use to somebody yet.
            if ends(storage, dir, owner, number)?.is_ok_and(|(_, known)| known.log_end > log.end) {
                tracing::warn!(path = %path.display(), "a checkpoint of events that are gone is removed");
                remove.push(path);
            }
            continue;
        }
        let file = storage.open_side(&path)?;
        if kind == Kind::Checkpoint {
            let (header, entries, bytes) = match ends(storage, dir, owner, number)? {
                Ok((header, end)) => (header, end.entries, file.len()?),
                Err(_) => continue,
            };
            let start = header.start;
            covered = covered.max(start);
            held_checkpoints.push(path.clone());
            // States that are laid out otherwise are not asked for.
            let is_asked = !header.is_of_another_layout::<A>();
            let places = if is_asked { OnceLock::new() } else { OnceLock::from(Vec::new()) };
            let places = Arc::new(places);
            let held = Held { number, kind, path, start, last_head: Offset(0), entries, bytes, places };
            store.add(held, []);
            continue;
        }
        let bytes = whole(&*file)?;
        let scanned = match FileHeader::decode(&bytes, owner) {
            Ok(header) if header.kind != kind => Scanned { why: Some("it is a checkpoint"), ..Scanned::default() },
            Ok(header) => scan::<A>(&bytes, &header, number, log),
            Err(why) => Scanned { why: Some(why), ..Scanned::default() },
        };
        if let Some(why) = scanned.why {
            tracing::warn!(path = %path.display(), why, kept = scanned.entries, "saved states are unreadable or of events that are gone");
            store.unreadable.fetch_add(1, Ordering::Relaxed);
        }
        // Somebody else's is not ours to remove.
        if scanned.why == Some(OTHER_STORE) {
            continue;
        }
        if scanned.end < bytes.len() {
            if scanned.entries == 0 {
                remove.push(path);
                continue;
            }
            cut.push((file_name(kind, number), bytes[..scanned.end].to_vec()));
        }
        let held = Held {
            number,
            kind,
            path,
            start: Offset(0),
            last_head: scanned.last_head,
            entries: scanned.entries,
            bytes: scanned.end as u64,
            places: Arc::default(),
        };
        store.add(held, scanned.saved);
    }
    Ok(Found { store, next_number, covered, remove, cut, usable: held_checkpoints })
}

#[derive(Default)]
struct Scanned {
    saved: Vec<(Key, Saved)>,
    entries: u64,
    last_head: Offset,
    /// Where the entries end that can be used.
    end: usize,
    /// Why they end there, unless the file does.
    why: Option<&'static str>,
}

fn scan<A: Aggregate>(bytes: &[u8], header: &FileHeader, number: u32, log: Log) -> Scanned {
    // States of another version are as good where the program takes them: the first one tells.
    let mut indexed = match size_of::<A>() {
        0 => Some(false),
        _ if header.is_of_another_layout::<A>() => {
            tracing::warn!(shard = header.shard.0, number, stored = %header.state, "saved states of another layout under the same state version are passed over");
            Some(false)
        }
        _ => (header.state_version == A::STATE_VERSION).then_some(true),
    };
    let mut scanned = Scanned { end: FILE_HEADER_BYTES, ..Scanned::default() };
    loop {
        let entry: Entry<'_> = match entry_at(bytes, scanned.end) {
            Ok(None) => return scanned,
            Ok(Some(entry)) if !is_of(&entry, log.end) || entry.version.0 > log.events => {
                scanned.why = Some("of an event that is gone or never was");
                return scanned;
            }
            Ok(Some(entry)) => entry,
            Err(why) => {
                scanned.why = Some(why);
                return scanned;
            }
        };
        if !entry.is_end() {
            scanned.entries += 1;
            scanned.last_head = scanned.last_head.max(entry.head);
            if entry.version.0 > 0 && *indexed.get_or_insert_with(|| entry.state::<A>().is_ok()) {
                scanned.saved.extend(Saved::new(&entry, number, scanned.end as u64).map(|saved| (entry.key, saved)));
            }
        }
        scanned.end += entry.bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::envelope::Envelope;
    use crate::event::{Root, ShardId, Time};
    use crate::state::aggregate::Stateless;
    use crate::testing::FaultyStorage;

    #[test]
    fn what_a_checkpoint_covers_ends_where_it_began() {
        let (storage, dir) = (FaultyStorage::new(), Path::new("/s/shard-0000"));
        let (start, sequence) = (Offset(5_008), Sequence(3));
        let (kind, store, shard, check) = (Kind::Checkpoint, 7, ShardId(0), 0);
        let (state_version, state) = (0, Root::default());
        let header = FileHeader { kind, store, shard, state_version, state, start, sequence, check, time: Time(0) };
        let end = End { entries: 0, log_end: Offset(100_000), check, durable: true, boot: 0 };
        let content = [&header.encode()[..], &end.encode()].concat();
        storage.create_dir(dir).expect("made");
        replace(&storage, dir, &file_name(kind, 4), &content).expect("written");
        let storage: Arc<dyn Storage> = Arc::new(storage);
        let log = Log { end: Offset(200_000), events: 9 };
        let found = index::<Stateless<Envelope>>(&storage, dir, (store, shard), log, &[4], 0).expect("readable");
        assert_eq!((found.covered, found.next_number), (start, 5));
    }
}
