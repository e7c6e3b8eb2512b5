//! The files of a gate: the record of its gaps and starts, the witness of that record, and its positions in the log.
//! `FORMAT.md` §19.
//!
//! One writer: the gate's owner. An entry of the record is synced before any later event is published. The witness
//! names the entries that must exist, so a lost entry is noticed. The positions are a cache.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{GateError, OpenError, RejectedReason};
use crate::ingress::gated::record::{self, ChainEnd, Entry, Gap, Start, WITNESSES_UNSYNCED_MAX};
use crate::log::position::Position;
use crate::storage::framed::{Frame, FrameError, Reader};
use crate::storage::{SideFile, Storage, is_exhausted, replace};

const GAPS: &str = "gaps";
const WITNESS: &str = "witness";
const POSITIONS: &str = "positions";
/// The frame of the positions. The shortest one has no shards and no partitions.
const POSITIONS_FRAME: Frame = Frame { magic: *b"corelpos", bytes_min: 28 };
const OTHER_SHARDS: &str = "it has positions for a different number of shards";

/// Returns the folder of a store's gates.
pub(crate) fn gates_dir(store: &Path) -> PathBuf {
    store.join("gates")
}

/// The progress of one partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Standing {
    pub(crate) partition: u64,
    /// Every lower sequence is in the log or in a gap.
    pub(crate) expected: u64,
    /// The ranges of higher sequences that are in the log: first and last, in rising order.
    pub(crate) runs: Vec<(u64, u64)>,
}

/// The positions up to which a gate has counted its events in the log, and the result of counting.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Positions {
    /// One position per shard: every event before it is counted.
    pub(crate) counted: Vec<Position>,
    pub(crate) standings: Vec<Standing>,
}

impl Positions {
    fn encode(&self) -> Vec<u8> {
        let mut out = POSITIONS_FRAME.begin();
        out.u16(self.counted.len() as u16);
        out.zeros(2);
        out.u64(self.standings.len() as u64);
        self.counted.iter().for_each(|position| out.bytes(&position.to_bytes()));
        for standing in &self.standings {
            out.u64(standing.partition);
            out.u64(standing.expected);
            out.u64(standing.runs.len() as u64);
            for (from, to) in &standing.runs {
                out.u64(*from);
                out.u64(*to);
            }
        }
        out.seal()
    }

    fn decode(path: &Path, bytes: &[u8]) -> Result<Self, OpenError> {
        POSITIONS_FRAME.open(bytes).and_then(Self::read).map_err(|error| error.of_file(path))
    }

    fn read(mut fields: Reader<'_>) -> Result<Self, FrameError> {
        let shards = fields.u16()?;
        fields.bytes(2)?;
        let partitions = fields.u64()?;
        let position = |fields: &mut Reader<'_>| {
            Position::from_bytes(&fields.array::<{ Position::BYTES }>()?)
                .map_err(|_| "it has an invalid position".into())
        };
        let counted = (0..shards).map(|_| position(&mut fields)).collect::<Result<_, FrameError>>()?;
        let standings = (0..partitions).map(|_| Standing::read(&mut fields)).collect::<Result<_, _>>()?;
        fields.end()?;
        let positions = Self { counted, standings };
        if positions.is_possible() { Ok(positions) } else { Err("no log can have these positions".into()) }
    }

    /// Returns `true` if a gate can have counted a log to these positions.
    fn is_possible(&self) -> bool {
        let is_of_shard = |(shard, position): (usize, &Position)| {
            usize::from(position.shard().0) == shard && position.store() == self.counted[0].store()
        };
        self.counted.iter().enumerate().all(is_of_shard)
            && self.standings.is_sorted_by(|a, b| a.partition < b.partition)
            && self.standings.iter().all(Standing::is_possible)
    }
}

impl Standing {
    fn read(fields: &mut Reader<'_>) -> Result<Self, FrameError> {
        let (partition, expected, runs) = (fields.u64()?, fields.u64()?, fields.u64()?);
        let runs = (0..runs).map(|_| Ok((fields.u64()?, fields.u64()?))).collect::<Result<_, FrameError>>()?;
        Ok(Self { partition, expected, runs })
    }

    /// Returns `true` if the runs are above the expected sequence, in rising order.
    fn is_possible(&self) -> bool {
        let mut last = self.expected;
        self.runs.iter().all(|&(from, to)| {
            let follows = last < from && from <= to && to < u64::MAX;
            last = to;
            follows
        })
    }
}

/// The gaps and the starts of a gate's record, each in the order of their entries.
#[derive(Debug, Default)]
pub(crate) struct Recorded {
    pub(crate) gaps: Vec<Gap>,
    pub(crate) starts: Vec<Start>,
}

/// A gate's record and witness, as read from their files.
struct GateRecord {
    entries: Vec<Entry>,
    gaps_end: ChainEnd,
    /// The bytes of the record up to `gaps_end`.
    whole: Vec<u8>,
    /// The number of bytes after `gaps_end`.
    torn: usize,
    /// The bytes of the witness, completed to name all entries.
    witness: Vec<u8>,
    /// The number of bytes that were missing from the witness.
    unwitnessed: usize,
}

/// The ends of the record's files, where the next entry is written, and the number of entries.
#[derive(Debug, Clone, Copy)]
struct Ends {
    gaps: ChainEnd,
    witness: ChainEnd,
    entries: u64,
}

/// The reason why an entry was not written.
enum Unwritten {
    /// The disk is full. The next attempt overwrites the bytes after the end.
    Full,
    Failed(&'static str, io::Error),
}

/// Returns `true` if the error says that the file, or its folder, does not exist.
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
    /// `None` until the record is opened for writing.
    ends: Option<Ends>,
    /// The error of a failed write. The end of the file is then unknown, so no further entry is added.
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

    /// Returns `true` if the gate's folder exists. A file with this name is not a gate.
    pub(crate) fn exists(&self) -> Result<bool, OpenError> {
        match self.storage.list(&self.dir) {
            Ok(_) => Ok(true),
            Err(error) if is_absent(&error) => Ok(false),
            Err(source) => Err(OpenError::Io { action: "listing", path: self.dir.clone(), source }),
        }
    }

    /// Reads a file. Returns `None` if it does not exist.
    fn read(&self, name: &str) -> Result<Option<Vec<u8>>, OpenError> {
        match self.storage.read(&self.dir.join(name)) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if is_absent(&error) => Ok(None),
            Err(source) => Err(self.io("reading", name)(source)),
        }
    }

    /// Reads the record and checks it against its witness. Returns `None` if the gate has no record yet.
    fn load_record(&self) -> Result<Option<GateRecord>, OpenError> {
        // The witness is read first: even while a gate is writing, it names only entries that are already in the
        // record.
        let witness = self.read(WITNESS)?;
        let missing = |name: &str, why| Err(OpenError::DamagedFile { path: self.dir.join(name), at: 0, why });
        let Some(gaps) = self.read(GAPS)? else {
            // The other two files are created after this one.
            if witness.is_some() || self.read(POSITIONS)?.is_some() {
                return missing(GAPS, "it is missing from a gate's folder");
            }
            return Ok(None);
        };
        let (path, witness_path) = (self.dir.join(GAPS), self.dir.join(WITNESS));
        let (entries, gaps_end) = record::decode_gaps(&path, &gaps, self.store_id)?;
        // The witness is created before the first entry.
        if witness.is_none() && !entries.is_empty() {
            return missing(WITNESS, "it is missing, and without it a lost gap would not be noticed");
        }
        let mut witness = witness.unwrap_or_else(|| record::witness_header(self.store_id));
        let (end, missing) = record::check_witness((&witness_path, self.store_id), &witness, &path, &gaps, gaps_end)?;
        witness.truncate(end.at as usize);
        let unwitnessed = missing.len();
        witness.extend(missing);
        let mut whole = gaps;
        let torn = whole.len() - gaps_end.at as usize;
        whole.truncate(gaps_end.at as usize);
        Ok(Some(GateRecord { entries, gaps_end, whole, torn, witness, unwitnessed }))
    }

    /// Returns the recorded gaps, without the gap of a torn entry.
    pub(crate) fn gaps(&self) -> Result<Vec<Gap>, OpenError> {
        let entries = self.load_record()?.map(|found| found.entries).unwrap_or_default();
        let gap = |entry| if let Entry::Gap(gap) = entry { Some(gap) } else { None };
        Ok(entries.into_iter().filter_map(gap).collect())
    }

    /// Opens the record for writing and returns its entries, or `None` if the record is new.
    ///
    /// A torn tail is cut: its entry was not durable, so no later event was published. The valid bytes are written
    /// again and synced before they are trusted. After a kill they may be only in the system's cache, and after a
    /// failed sync the cache may mark them as written.
    pub(crate) fn open(&mut self) -> Result<Option<Recorded>, OpenError> {
        let found = self.load_record()?;
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
        let Some(found) = found.map_or_else(|| self.load_record(), |found| Ok(Some(found)))? else {
            let why = "it was removed while the gate was being opened";
            return Err(OpenError::DamagedFile { path: self.dir.join(GAPS), at: 0, why });
        };
        if found.torn > 0 {
            let path = self.dir.join(GAPS);
            tracing::warn!(path = %path.display(), bytes = found.torn, "cutting a torn gap record");
            match replace(&*self.storage, &self.dir, GAPS, &found.whole) {
                Err(error) if is_exhausted(&error) => {
                    tracing::warn!(path = %path.display(), "no space to cut the torn gap record; the next entry overwrites it");
                }
                cut => cut.map_err(self.io("cutting", GAPS))?,
            }
        }
        self.settle(&found)?;
        let (at, entries) = (ChainEnd::of(&found.witness, found.witness.len()), found.entries.len() as u64);
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

    /// Makes the record durable, with the names of its files and folders.
    fn settle(&self, found: &GateRecord) -> Result<(), OpenError> {
        let settle = |name: &str, content: &[u8], has_more: bool| {
            let file = self.storage.edit_side(&self.dir.join(name))?;
            match file.write_at(0, content) {
                // The file has the same bytes already.
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

    /// Adds an entry, durably. After a full disk the caller may try again. Any other error is final, because a failed
    /// sync leaves unknown bytes.
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
                        tracing::error!(path = %path.display(), "no space for a gap record; the gate waits for space");
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
        let ends = self.ends.expect("the record is open");
        let failed =
            |name| move |error| if is_exhausted(&error) { Unwritten::Full } else { Unwritten::Failed(name, error) };
        // Both files are checked before the first write: if either was replaced, nothing is recorded.
        let gaps = self.open_unchanged(GAPS, ends.gaps).map_err(failed(GAPS))?;
        let witnesses = self.open_unchanged(WITNESS, ends.witness).map_err(failed(WITNESS))?;
        let entry = entry.encode(ends.gaps.crc);
        gaps.write_at(ends.gaps.at, &entry).map_err(failed(GAPS))?;
        // Every error is final: a later sync would skip pages that the failed one marked as written.
        gaps.sync().map_err(|error| Unwritten::Failed(GAPS, error))?;
        let gaps_end = ends.gaps.after(&entry);
        let witness = record::witness(gaps_end.crc, ends.witness.crc);
        witnesses.write_at(ends.witness.at, &witness).map_err(failed(WITNESS))?;
        let entries = ends.entries + 1;
        if entries.is_multiple_of(WITNESSES_UNSYNCED_MAX) {
            witnesses.sync().map_err(|error| Unwritten::Failed(WITNESS, error))?;
        }
        self.ends = Some(Ends { gaps: gaps_end, witness: ends.witness.after(&witness), entries });
        Ok(())
    }

    /// Opens a file of the record and checks that it still ends at `end`.
    fn open_unchanged(&self, name: &str, end: ChainEnd) -> io::Result<Box<dyn SideFile>> {
        let file = self.storage.edit_side(&self.dir.join(name))?;
        let mut crc = [0; 4];
        match file.read_at(end.at - 4, &mut crc) {
            Ok(()) if u32::from_le_bytes(crc) == end.crc => Ok(file),
            Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => Err(error),
            _ => Err(io::Error::new(io::ErrorKind::InvalidData, "it was cut or replaced while the gate was open")),
        }
    }

    /// Returns the positions last saved, or the reason why they cannot be used.
    pub(crate) fn stored_positions(&self, shards: usize) -> Result<Option<Positions>, OpenError> {
        let Some(bytes) = self.read(POSITIONS)? else { return Ok(None) };
        let path = self.dir.join(POSITIONS);
        let positions = Positions::decode(&path, &bytes)?;
        if positions.counted.first().is_some_and(|position| position.store() != self.store_id) {
            return Err(OpenError::ForeignFile { path, why: "it belongs to another store" });
        }
        if positions.counted.len() != shards {
            return Err(OpenError::ForeignFile { path, why: OTHER_SHARDS });
        }
        Ok(Some(positions))
    }

    /// Returns the number of recorded gaps, and the number of torn bytes after the last whole entry.
    pub(crate) fn look(&self) -> Result<(usize, usize), OpenError> {
        let Some(found) = self.load_record()? else { return Ok((0, 0)) };
        let gaps = found.entries.iter().filter(|entry| matches!(entry, Entry::Gap(_))).count();
        Ok((gaps, found.torn))
    }

    /// Returns the positions last saved. Positions that are damaged or belong to another store count as none, because
    /// the log has the same facts.
    pub(crate) fn positions(&self, shards: usize) -> Result<Option<Positions>, OpenError> {
        match self.stored_positions(shards) {
            Ok(positions) => Ok(positions),
            Err(refused @ (OpenError::UnknownFormat { .. } | OpenError::Io { .. })) => Err(refused),
            Err(OpenError::ForeignFile { path, why: OTHER_SHARDS }) => {
                Err(OpenError::ForeignFile { path, why: OTHER_SHARDS })
            }
            Err(error) => {
                tracing::warn!(%error, "a gate's positions are not used; its events in the log are counted again");
                Ok(None)
            }
        }
    }

    /// Syncs the witness and replaces the positions.
    pub(crate) fn save(&mut self, positions: &Positions) -> Result<(), OpenError> {
        let witness = self.storage.edit_side(&self.dir.join(WITNESS)).map_err(self.io("opening", WITNESS))?;
        if let Err(error) = witness.sync() {
            // The error is final for the record too, because its next witness would follow unknown bytes.
            self.failed = Some((WITNESS, Arc::new(io::Error::new(error.kind(), error.to_string()))));
            return Err(self.io("syncing", WITNESS)(error));
        }
        replace(&*self.storage, &self.dir, POSITIONS, &positions.encode()).map_err(self.io("writing", POSITIONS))
    }

    /// Makes the record, the witness and their names durable, because a killed process may not have synced them.
    pub(crate) fn make_durable(&self) -> Result<(), OpenError> {
        for name in [GAPS, WITNESS] {
            if self.read(name)?.is_some() {
                let file = self.storage.edit_side(&self.dir.join(name));
                file.and_then(|file| file.sync()).map_err(self.io("syncing", name))?;
            }
        }
        self.storage.sync_dir(&self.dir).map_err(self.io("syncing", ""))
    }

    /// Removes positions that do not match the log.
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
