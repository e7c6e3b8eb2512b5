//! A gate's files: the record of its gaps and starts, the witness of that record, and how far it has counted the log. `FORMAT.md` §19.
//!
//! One writer: the gate's owner. An entry of the record is synced before anything behind it is published; the witness says which
//! entries must be there, so none is lost unnoticed; the positions are a cache.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{GateError, OpenError, RejectedReason};
use crate::ingress::gated::record::{self, Entry, FileEnd, Gap, Start, WITNESSES_UNSYNCED_MAX};
use crate::log::format::{FORMAT_VERSION, OFFSETS_END};
use crate::log::manifest::checked;
use crate::log::position::Position;
use crate::storage::framed::{u16_at, u64_at};
use crate::storage::{SideFile, Storage, is_exhausted, replace};

const POSITIONS_MAGIC: [u8; 8] = *b"corelpos";
const GAPS: &str = "gaps";
const WITNESS: &str = "witness";
const POSITIONS: &str = "positions";
const POSITIONS_FIXED_BYTES: usize = 24;
const OTHER_SHARDS: &str = "it counts another number of shards";

/// Where the gates of a store have their folders.
pub(crate) fn gates_dir(store: &Path) -> PathBuf {
    store.join("gates")
}

/// Where one partition stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Standing {
    pub(crate) partition: u64,
    /// Everything below it is in the log or in a gap.
    pub(crate) expected: u64,
    /// What of the sequences above it is in the log: first and last, rising.
    pub(crate) runs: Vec<(u64, u64)>,
}

/// How far the log was counted, and what was found up to there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Positions {
    /// By shard: the position before which every event is counted.
    pub(crate) counted: Vec<Position>,
    pub(crate) standings: Vec<Standing>,
}

impl Positions {
    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::from(POSITIONS_MAGIC);
        out.extend(FORMAT_VERSION.to_le_bytes());
        out.extend((self.counted.len() as u16).to_le_bytes());
        out.extend([0; 2]);
        out.extend((self.standings.len() as u64).to_le_bytes());
        debug_assert_eq!(out.len(), POSITIONS_FIXED_BYTES);
        self.counted.iter().for_each(|position| out.extend(position.to_bytes()));
        for standing in &self.standings {
            out.extend(standing.partition.to_le_bytes());
            out.extend(standing.expected.to_le_bytes());
            out.extend((standing.runs.len() as u64).to_le_bytes());
            for (from, to) in &standing.runs {
                out.extend(from.to_le_bytes());
                out.extend(to.to_le_bytes());
            }
        }
        let crc = crc32c::crc32c(&out);
        out.extend(crc.to_le_bytes());
        out
    }

    fn decode(path: &Path, bytes: &[u8]) -> Result<Self, OpenError> {
        let body = checked(path, bytes, POSITIONS_MAGIC, POSITIONS_FIXED_BYTES)?;
        let short = || OpenError::ForeignFile {
            path: path.to_owned(),
            why: "its counts do not fit its length, or it has no positions",
        };
        let mut words = Words(&body[POSITIONS_FIXED_BYTES..]);
        let counted = (0..u16_at(body, 12)).map(|_| words.position()).collect::<Option<_>>().ok_or_else(short)?;
        let standing = |words: &mut Words<'_>| {
            let (partition, expected, runs) = (words.next()?, words.next()?, words.next()?);
            let runs = (0..runs).map(|_| Some((words.next()?, words.next()?))).collect::<Option<Vec<_>>>()?;
            Some(Standing { partition, expected, runs })
        };
        let standings: Option<_> = (0..u64_at(body, 16)).map(|_| standing(&mut words)).collect();
        match standings {
            Some(standings) if words.0.is_empty() => {
                let positions = Self { counted, standings };
                let why = "its positions are not those of a log";
                if positions.can_be() {
                    Ok(positions)
                } else {
                    Err(OpenError::ForeignFile { path: path.to_owned(), why })
                }
            }
            _ => Err(short()),
        }
    }
}

impl Positions {
    /// Whether a log can have been counted so.
    fn can_be(&self) -> bool {
        let is_of = |(i, position): (usize, &Position)| {
            usize::from(position.shard().0) == i
                && position.store() == self.counted[0].store()
                && position.offset().0 < OFFSETS_END
        };
        self.counted.iter().enumerate().all(is_of)
            && self.standings.is_sorted_by(|a, b| a.partition < b.partition)
            && self.standings.iter().all(Standing::can_be)
    }
}

impl Standing {
    /// Whether the runs lie above what is expected and rise.
    fn can_be(&self) -> bool {
        let mut last = self.expected;
        self.runs.iter().all(|&(from, to)| {
            let follows = last < from && from <= to && to < u64::MAX;
            last = to;
            follows
        })
    }
}

/// Eight bytes at a time.
struct Words<'a>(&'a [u8]);

impl Words<'_> {
    fn next(&mut self) -> Option<u64> {
        let (word, rest) = self.0.split_first_chunk::<8>()?;
        self.0 = rest;
        Some(u64::from_le_bytes(*word))
    }

    fn position(&mut self) -> Option<Position> {
        let (bytes, rest) = self.0.split_first_chunk::<{ Position::BYTES }>()?;
        self.0 = rest;
        Position::from_bytes(bytes).ok()
    }
}

/// The gaps and starts of a gate's record, each in the order in which they were added.
#[derive(Debug, Default)]
pub(crate) struct Recorded {
    pub(crate) gaps: Vec<Gap>,
    pub(crate) starts: Vec<Start>,
}

/// The record as it was found.
struct Found {
    entries: Vec<Entry>,
    gaps_end: FileEnd,
    /// Bytes of the record up to its end, and how many stand behind it.
    whole: Vec<u8>,
    torn: usize,
    /// The witness, naming all of them; and how many it did not.
    witness: Vec<u8>,
    unwitnessed: usize,
}

/// Where the next entry goes.
#[derive(Debug, Clone, Copy)]
struct Ends {
    gaps: FileEnd,
    witness: FileEnd,
    entries: u64,
}

/// Why an entry was not written.
enum Unwritten {
    /// There was no space. What the file holds behind its end is written over by the next attempt.
    Full,
    Failed(&'static str, io::Error),
}

/// Whether there is no such file, or no folder that it could be in.
fn is_absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

/// The folder of one gate.
#[derive(Debug)]
pub(crate) struct GateFiles {
    storage: Arc<dyn Storage>,
    store: PathBuf,
    store_id: u64,
    dir: PathBuf,
    /// Once it is open to be written.
    ends: Option<Ends>,
    /// An entry could not be written. What the file holds at its end is unknown, so nothing is added any more.
    failed: Option<(&'static str, Arc<io::Error>)>,
    is_full: bool,
}

impl GateFiles {
    pub(crate) fn new(storage: &Arc<dyn Storage>, (store, store_id): (&Path, u64), name: &str) -> Self {
        let dir = gates_dir(store).join(name);
        let storage = Arc::clone(storage);
        Self { storage, store: store.to_owned(), store_id, dir, ends: None, failed: None, is_full: false }
    }

    fn io(&self, action: &'static str, name: &str) -> impl FnOnce(io::Error) -> OpenError + use<> {
        let path = self.dir.join(name);
        move |source| OpenError::Io { action, path, source }
    }

    /// Whether there is a folder of this name: what is none is no gate's.
    pub(crate) fn is_there(&self) -> Result<bool, OpenError> {
        match self.storage.list(&self.dir) {
            Ok(_) => Ok(true),
            Err(error) if is_absent(&error) => Ok(false),
            Err(source) => Err(OpenError::Io { action: "listing", path: self.dir.clone(), source }),
        }
    }

    /// The file's bytes, if there is one.
    fn read(&self, name: &str) -> Result<Option<Vec<u8>>, OpenError> {
        match self.storage.read(&self.dir.join(name)) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if is_absent(&error) => Ok(None),
            Err(source) => Err(self.io("reading", name)(source)),
        }
    }

    /// The record, all that must be there being there; `None`: this gate has none yet.
    fn find(&self) -> Result<Option<Found>, OpenError> {
        // Read first: what it names is in the record by then, also while a gate is writing.
        let witness = self.read(WITNESS)?;
        let missing = |name: &str, why| Err(OpenError::DamagedFile { path: self.dir.join(name), at: 0, why });
        let Some(gaps) = self.read(GAPS)? else {
            // Both of the others are made after it.
            if witness.is_some() || self.read(POSITIONS)?.is_some() {
                return missing(GAPS, "it is missing from the folder of a gate");
            }
            return Ok(None);
        };
        let (path, witness_path) = (self.dir.join(GAPS), self.dir.join(WITNESS));
        let (entries, gaps_end) = record::decode_gaps(&path, &gaps, self.store_id)?;
        // It is made when the record has no entries.
        if witness.is_none() && !entries.is_empty() {
            return missing(WITNESS, "it is missing, so whether all gaps are recorded is not known");
        }
        let mut witness = witness.unwrap_or_else(|| record::witness_header(self.store_id));
        let (end, missing) = record::check_witness((&witness_path, self.store_id), &witness, &path, &gaps, gaps_end)?;
        witness.truncate(end.at as usize);
        let unwitnessed = missing.len();
        witness.extend(missing);
        let mut whole = gaps;
        let torn = whole.len() - gaps_end.at as usize;
        whole.truncate(gaps_end.at as usize);
        Ok(Some(Found { entries, gaps_end, whole, torn, witness, unwitnessed }))
    }

    /// The gaps as the file has them. A torn one is not there yet.
    pub(crate) fn gaps(&self) -> Result<Vec<Gap>, OpenError> {
        let entries = self.find()?.map(|found| found.entries).unwrap_or_default();
        let gap = |entry| if let Entry::Gap(gap) = entry { Some(gap) } else { None };
        Ok(entries.into_iter().filter_map(gap).collect())
    }

    /// Makes the record ready for further entries, and says which it holds; `None`: it is new.
    ///
    /// A torn tail is cut: its entry was not durable, so nothing behind it had been published. What holds is written once more and
    /// synced before it is believed: after a kill it may be in the system's cache only, and after a failed sync marked as written there.
    pub(crate) fn open(&mut self) -> Result<Option<Recorded>, OpenError> {
        let found = self.find()?;
        if found.is_none() {
            self.storage.create_dir(&self.dir).map_err(self.io("creating", ""))?;
            replace(&*self.storage, &self.dir, GAPS, &record::gaps_header(self.store_id))
                .map_err(self.io("writing", GAPS))?;
        }
        if self.read(WITNESS)?.is_none() {
            replace(&*self.storage, &self.dir, WITNESS, &record::witness_header(self.store_id))
                .map_err(self.io("writing", WITNESS))?;
        }
        let is_new = found.is_none();
        let Some(found) = found.map_or_else(|| self.find(), |found| Ok(Some(found)))? else {
            let why = "it was removed while the gate was being opened";
            return Err(OpenError::DamagedFile { path: self.dir.join(GAPS), at: 0, why });
        };
        if found.torn > 0 {
            let path = self.dir.join(GAPS);
            tracing::warn!(path = %path.display(), bytes = found.torn, "a torn gap record is cut");
            match replace(&*self.storage, &self.dir, GAPS, &found.whole) {
                Err(error) if is_exhausted(&error) => {
                    tracing::warn!(path = %path.display(), "no space to cut it; the next entry is written over it");
                }
                cut => cut.map_err(self.io("cutting", GAPS))?,
            }
        }
        self.settle(&found)?;
        let (at, entries) = (FileEnd::of(&found.witness, found.witness.len()), found.entries.len() as u64);
        self.ends = Some(Ends { gaps: found.gaps_end, witness: at, entries });
        let mut recorded = Recorded::default();
        for entry in found.entries {
            match entry {
                Entry::Gap(gap) => recorded.gaps.push(gap),
                Entry::Start(start) => recorded.starts.push(start),
            }
        }
        Ok((!is_new).then_some(recorded))
    }

    /// Makes durable what was found, up to the name of the folder.
    fn settle(&self, found: &Found) -> Result<(), OpenError> {
        let settle = |name: &str, content: &[u8], has_more: bool| {
            let file = self.storage.edit_side(&self.dir.join(name))?;
            match file.write_at(0, content) {
                // The same bytes are there already.
                Err(error) if is_exhausted(&error) && !has_more => {}
                written => written?,
            }
            file.sync()
        };
        settle(GAPS, &found.whole, false).map_err(self.io("syncing", GAPS))?;
        settle(WITNESS, &found.witness, found.unwitnessed > 0).map_err(self.io("syncing", WITNESS))?;
        for dir in [&self.dir, &gates_dir(&self.store), &self.store] {
            self.storage.sync_dir(dir).map_err(|source| OpenError::Io {
                action: "syncing",
                path: dir.clone(),
                source,
            })?;
        }
        Ok(())
    }

    /// Adds an entry, durably. On a full disk it can be tried again; any other error is final: what a failed sync left is unknown.
    pub(crate) fn add(&mut self, entry: &Entry) -> Result<(), GateError> {
        let path = self.dir.join(GAPS);
        if self.failed.is_none() {
            match self.write(entry) {
                Ok(()) => {
                    self.is_full = false;
                    return Ok(());
                }
                Err(Unwritten::Full) => {
                    if !std::mem::replace(&mut self.is_full, true) {
                        tracing::error!(path = %path.display(), "no space for a gap record; the gate waits until there is");
                    }
                    return Err(GateError::Publish(RejectedReason::StorageFull));
                }
                Err(Unwritten::Failed(name, error)) => self.failed = Some((name, Arc::new(error))),
            }
        }
        match &self.failed {
            None => Ok(()),
            Some((name, source)) => Err(GateError::GapRecord { path: self.dir.join(name), source: Arc::clone(source) }),
        }
    }

    fn write(&mut self, entry: &Entry) -> Result<(), Unwritten> {
        let ends = self.ends.expect("a gate that records is open");
        let failed =
            |name| move |error| if is_exhausted(&error) { Unwritten::Full } else { Unwritten::Failed(name, error) };
        // Both before anything is written: where one was taken away, nothing is recorded.
        let gaps = self.as_left(GAPS, ends.gaps).map_err(failed(GAPS))?;
        let witnesses = self.as_left(WITNESS, ends.witness).map_err(failed(WITNESS))?;
        let entry = entry.encode(ends.gaps.crc);
        gaps.write_at(ends.gaps.at, &entry).map_err(failed(GAPS))?;
        // Final, whatever it says: no later sync makes durable what a failed one took for written.
        gaps.sync().map_err(|error| Unwritten::Failed(GAPS, error))?;
        let gaps_end = ends.gaps.behind(&entry);
        let witness = record::witness(gaps_end.crc, ends.witness.crc);
        witnesses.write_at(ends.witness.at, &witness).map_err(failed(WITNESS))?;
        let entries = ends.entries + 1;
        if entries.is_multiple_of(WITNESSES_UNSYNCED_MAX) {
            witnesses.sync().map_err(|error| Unwritten::Failed(WITNESS, error))?;
        }
        self.ends = Some(Ends { gaps: gaps_end, witness: ends.witness.behind(&witness), entries });
        Ok(())
    }

    /// A file of the record, which must still be the one that ends here.
    fn as_left(&self, name: &str, end: FileEnd) -> io::Result<Box<dyn SideFile>> {
        let file = self.storage.edit_side(&self.dir.join(name))?;
        let mut crc = [0; 4];
        match file.read_at(end.at - 4, &mut crc) {
            Ok(()) if u32::from_le_bytes(crc) == end.crc => Ok(file),
            Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => Err(error),
            _ => Err(io::Error::new(io::ErrorKind::InvalidData, "it has been cut or replaced while the gate was open")),
        }
    }

    /// The positions last saved.
    pub(crate) fn stored_positions(&self, shards: usize) -> Result<Option<Positions>, OpenError> {
        let Some(bytes) = self.read(POSITIONS)? else { return Ok(None) };
        let path = self.dir.join(POSITIONS);
        let positions = Positions::decode(&path, &bytes)?;
        if positions.counted.first().is_some_and(|position| position.store() != self.store_id) {
            return Err(OpenError::ForeignFile { path, why: "it is of another store" });
        }
        if positions.counted.len() != shards {
            return Err(OpenError::ForeignFile { path, why: OTHER_SHARDS });
        }
        Ok(Some(positions))
    }

    /// How many gaps are recorded, and how many bytes behind the last whole entry are torn.
    pub(crate) fn look(&self) -> Result<(usize, usize), OpenError> {
        let Some(found) = self.find()? else { return Ok((0, 0)) };
        let gaps = found.entries.iter().filter(|entry| matches!(entry, Entry::Gap(_))).count();
        Ok((gaps, found.torn))
    }

    /// The positions last saved. Damaged ones and those of another store are none: the log says the same.
    pub(crate) fn positions(&self, shards: usize) -> Result<Option<Positions>, OpenError> {
        match self.stored_positions(shards) {
            Ok(positions) => Ok(positions),
            Err(refused @ (OpenError::UnknownFormat { .. } | OpenError::Io { .. })) => Err(refused),
            Err(OpenError::ForeignFile { path, why: OTHER_SHARDS }) => {
                Err(OpenError::ForeignFile { path, why: OTHER_SHARDS })
            }
            Err(error) => {
                tracing::warn!(%error, "a gate's positions are not used; the log is counted anew");
                Ok(None)
            }
        }
    }

    /// Replaces the positions. What the witness says is made durable with them.
    pub(crate) fn save(&mut self, positions: &Positions) -> Result<(), OpenError> {
        let witness = self.storage.edit_side(&self.dir.join(WITNESS)).map_err(self.io("opening", WITNESS))?;
        if let Err(error) = witness.sync() {
            // Final for the record too, which goes on with what the witness says.
            self.failed = Some((WITNESS, Arc::new(io::Error::new(error.kind(), error.to_string()))));
            return Err(self.io("syncing", WITNESS)(error));
        }
        replace(&*self.storage, &self.dir, POSITIONS, &positions.encode()).map_err(self.io("writing", POSITIONS))
    }

    /// Makes what the files say durable, and their names: a process that was killed may not have come to its syncs.
    pub(crate) fn make_durable(&self) -> Result<(), OpenError> {
        for name in [GAPS, WITNESS] {
            if self.read(name)?.is_some() {
                let file = self.storage.edit_side(&self.dir.join(name));
                file.and_then(|file| file.sync()).map_err(self.io("syncing", name))?;
            }
        }
        self.storage.sync_dir(&self.dir).map_err(self.io("syncing", ""))
    }

    /// Removes positions that cannot be of this log.
    pub(crate) fn forget_positions(&self) -> Result<(), OpenError> {
        self.storage.remove(&self.dir.join(POSITIONS)).map_err(self.io("removing", POSITIONS))?;
        self.storage.sync_dir(&self.dir).map_err(self.io("syncing", ""))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{Offset, Sequence, ShardId};
    use crate::log::format::tests::assert_golden;

    #[test]
    fn positions_are_frozen() {
        let standing = |partition, expected, runs: &[(u64, u64)]| Standing { partition, expected, runs: runs.to_vec() };
        let standings = vec![standing(1, 10, &[(12, 13), (20, 20)]), standing(u64::MAX, 0, &[])];
        let (store, at) = (0x1112_1314_1516_1718, Offset(0x0102_0304_0500));
        let counted = vec![
            Position::unwitnessed(store, ShardId(0), Offset(4096), Sequence(0)),
            Position::behind(store, ShardId(1), at, (Offset(0x0102_0304_0400), 0x2122_2324), Sequence(9)),
        ];
        let positions = Positions { counted, standings };
        let bytes = positions.encode();
        assert_golden("positions.bin", &bytes);
        assert_eq!(Positions::decode(Path::new("positions"), &bytes).expect("decodes"), positions);
    }
}
