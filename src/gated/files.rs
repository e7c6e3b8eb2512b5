//! A gate's two files: the gaps it closed, and how far it has counted the log. `FORMAT.md` §19.
//!
//! One writer: the gate's owner. A gap is in its file, synced, before anything behind it is published; the positions are a cache.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::error::{GateError, OpenError};
use crate::event::Time;
use crate::log::format::{FORMAT_VERSION, u16_at, u32_at, u64_at};
use crate::log::manifest::checked;
use crate::log::storage::{Storage, replace};

const GAPS_MAGIC: [u8; 8] = *b"corelgap";
const POSITIONS_MAGIC: [u8; 8] = *b"corelpos";
const GAPS: &str = "gaps";
const POSITIONS: &str = "positions";
const GAPS_HEADER_BYTES: usize = 16;
const GAP_BYTES: usize = 48;
const POSITIONS_FIXED_BYTES: usize = 24;

/// Where the gates of a store have their folders.
pub(crate) fn gates_dir(store: &Path) -> PathBuf {
    store.join("gates")
}

/// Sequences that did not come in time. What lies behind them was published without them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Gap {
    /// Of which partition.
    pub partition: u64,
    /// The first sequence.
    pub from: u64,
    /// The last sequence.
    pub to: u64,
    /// How long they were waited for.
    pub waited: Duration,
    /// When they were given up.
    pub time: Time,
}

impl Gap {
    pub(super) fn new(partition: u64, from: u64, to: u64, waited: Duration, time: Time) -> Self {
        Self { partition, from, to, waited, time }
    }

    fn encode(&self) -> [u8; GAP_BYTES] {
        let mut out = [0; GAP_BYTES];
        let waited_ns = u64::try_from(self.waited.as_nanos()).unwrap_or(u64::MAX);
        for (at, word) in [self.partition, self.from, self.to, waited_ns, self.time.0].into_iter().enumerate() {
            out[8 * at..][..8].copy_from_slice(&word.to_le_bytes());
        }
        let crc = crc32c::crc32c(&out[..44]);
        out[44..].copy_from_slice(&crc.to_le_bytes());
        out
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let holds = bytes.len() == GAP_BYTES && crc32c::crc32c(&bytes[..44]) == u32_at(bytes, 44);
        holds.then(|| Self {
            partition: u64_at(bytes, 0),
            from: u64_at(bytes, 8),
            to: u64_at(bytes, 16),
            waited: Duration::from_nanos(u64_at(bytes, 24)),
            time: Time(u64_at(bytes, 32)),
        })
    }
}

fn gaps_header() -> Vec<u8> {
    let mut out = Vec::from(GAPS_MAGIC);
    out.extend(FORMAT_VERSION.to_le_bytes());
    let crc = crc32c::crc32c(&out);
    out.extend(crc.to_le_bytes());
    out
}

/// The gaps, and the bytes of the file that hold. Gaps are added and synced one at a time, and after an error none is: so only the
/// last one can be torn.
fn decode_gaps(path: &Path, bytes: &[u8]) -> Result<(Vec<Gap>, usize), OpenError> {
    let foreign = |why| OpenError::ForeignFile { path: path.to_owned(), why };
    checked(path, &bytes[..bytes.len().min(GAPS_HEADER_BYTES)], GAPS_MAGIC, GAPS_HEADER_BYTES - 4)?;
    let mut gaps = Vec::with_capacity(bytes.len() / GAP_BYTES);
    let mut at = GAPS_HEADER_BYTES;
    while at < bytes.len() {
        let end = (at + GAP_BYTES).min(bytes.len());
        let Some(gap) = Gap::decode(&bytes[at..end]) else {
            if end == bytes.len() {
                break;
            }
            return Err(foreign("the CRC of a gap before the last does not hold"));
        };
        if gap.from > gap.to || gap.to == u64::MAX {
            return Err(foreign("a gap ends before it begins"));
        }
        gaps.push(gap);
        at = end;
    }
    Ok((gaps, at))
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
    /// By shard: the offset below which every event is counted.
    pub(crate) counted: Vec<u64>,
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
        self.counted.iter().for_each(|offset| out.extend(offset.to_le_bytes()));
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
        let short = || OpenError::ForeignFile { path: path.to_owned(), why: "its counts do not fit its length" };
        let mut words = Words(&body[POSITIONS_FIXED_BYTES..]);
        let counted = (0..u16_at(body, 12)).map(|_| words.next()).collect::<Option<_>>().ok_or_else(short)?;
        let standing = |words: &mut Words<'_>| {
            let (partition, expected, runs) = (words.next()?, words.next()?, words.next()?);
            let runs = (0..runs).map(|_| Some((words.next()?, words.next()?))).collect::<Option<_>>()?;
            Some(Standing { partition, expected, runs })
        };
        let standings: Option<_> = (0..u64_at(body, 16)).map(|_| standing(&mut words)).collect();
        match standings {
            Some(standings) if words.0.is_empty() => Ok(Self { counted, standings }),
            _ => Err(short()),
        }
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
}

/// The folder of one gate.
#[derive(Debug)]
pub(crate) struct GateFiles {
    storage: std::sync::Arc<dyn Storage>,
    dir: PathBuf,
    /// A gap could not be written. What the file holds at its end is unknown, so nothing is added any more.
    failed: Option<Arc<io::Error>>,
}

impl GateFiles {
    pub(crate) fn new(storage: &std::sync::Arc<dyn Storage>, store: &Path, name: &str) -> Self {
        let dir = gates_dir(store).join(name);
        Self { storage: std::sync::Arc::clone(storage), dir, failed: None }
    }

    fn io(&self, action: &'static str, name: &str) -> impl FnOnce(io::Error) -> OpenError + use<> {
        let path = self.dir.join(name);
        move |source| OpenError::Io { action, path, source }
    }

    /// The file's bytes, if there is one.
    fn read(&self, name: &str) -> Result<Option<Vec<u8>>, OpenError> {
        match self.storage.read(&self.dir.join(name)) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(self.io("reading", name)(source)),
        }
    }

    /// The gaps as the file has them. A torn one is not there yet.
    pub(crate) fn gaps(&self) -> Result<Vec<Gap>, OpenError> {
        let bytes = self.read(GAPS)?;
        let decoded = bytes.map(|bytes| decode_gaps(&self.dir.join(GAPS), &bytes)).transpose()?;
        Ok(decoded.map(|(gaps, _)| gaps).unwrap_or_default())
    }

    /// Makes the file ready for further gaps, and says which it holds.
    ///
    /// A torn tail is cut: its gap was not durable, so nothing behind it had been published. What holds is synced before it
    /// is believed, since after a kill it may be in the system's cache only.
    pub(crate) fn open(&self) -> Result<Vec<Gap>, OpenError> {
        let Some(bytes) = self.read(GAPS)? else {
            self.storage.create_dir(&self.dir).map_err(self.io("creating", ""))?;
            replace(&*self.storage, &self.dir, GAPS, &gaps_header()).map_err(self.io("writing", GAPS))?;
            return Ok(Vec::new());
        };
        let path = self.dir.join(GAPS);
        let (gaps, whole) = decode_gaps(&path, &bytes)?;
        if whole < bytes.len() {
            tracing::warn!(path = %path.display(), bytes = bytes.len() - whole, "a torn gap record is cut");
            replace(&*self.storage, &self.dir, GAPS, &bytes[..whole]).map_err(self.io("cutting", GAPS))?;
        } else {
            self.storage.append(&path, &[]).map_err(self.io("syncing", GAPS))?;
        }
        Ok(gaps)
    }

    /// Adds a gap, durably. An error is final: what a failed sync left is unknown.
    pub(crate) fn add(&mut self, gap: &Gap) -> Result<(), GateError> {
        let path = self.dir.join(GAPS);
        if self.failed.is_none() {
            self.failed = self.storage.append(&path, &gap.encode()).err().map(Arc::new);
        }
        match &self.failed {
            None => Ok(()),
            Some(source) => Err(GateError::GapRecord { path, source: Arc::clone(source) }),
        }
    }

    /// The positions last saved. Damaged ones are none: the log says the same.
    pub(crate) fn positions(&self, shards: usize) -> Result<Option<Positions>, OpenError> {
        let Some(bytes) = self.read(POSITIONS)? else { return Ok(None) };
        let path = self.dir.join(POSITIONS);
        match Positions::decode(&path, &bytes) {
            Ok(positions) if positions.counted.len() == shards => Ok(Some(positions)),
            Ok(_) => Err(OpenError::ForeignFile { path, why: "it counts another number of shards" }),
            Err(unknown @ OpenError::UnknownFormat { .. }) => Err(unknown),
            Err(error) => {
                tracing::warn!(%error, "a gate's positions are not used; the log is counted anew");
                Ok(None)
            }
        }
    }

    pub(crate) fn save(&self, positions: &Positions) -> Result<(), OpenError> {
        replace(&*self.storage, &self.dir, POSITIONS, &positions.encode()).map_err(self.io("writing", POSITIONS))
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
    use crate::log::format::tests::assert_golden;

    fn gap(partition: u64, from: u64) -> Gap {
        Gap::new(partition, from, from + 2, Duration::from_millis(5_001), Time::unix_ms(1_700_000_000_000))
    }

    fn file(gaps: &[Gap]) -> Vec<u8> {
        let entries = gaps.iter().flat_map(|gap| gap.encode());
        gaps_header().into_iter().chain(entries).collect()
    }

    #[test]
    fn a_file_of_gaps_is_frozen() {
        let gaps = [gap(7, 0x0102_0304_0506_0708), gap(u64::MAX, 0)];
        let bytes = file(&gaps);
        assert_golden("gaps.bin", &bytes);
        assert_eq!(decode_gaps(Path::new("gaps"), &bytes).expect("decodes"), (gaps.to_vec(), bytes.len()));
    }

    #[test]
    fn positions_are_frozen() {
        let standing = |partition, expected, runs: &[(u64, u64)]| Standing { partition, expected, runs: runs.to_vec() };
        let standings = vec![standing(1, 10, &[(12, 13), (20, 20)]), standing(u64::MAX, 0, &[])];
        let positions = Positions { counted: vec![4096, 0x0102_0304_0506], standings };
        let bytes = positions.encode();
        assert_golden("positions.bin", &bytes);
        assert_eq!(Positions::decode(Path::new("positions"), &bytes).expect("decodes"), positions);
    }

    #[test]
    fn a_file_of_gaps_cut_anywhere_holds_the_gaps_before_the_cut() {
        let gaps = [gap(1, 1), gap(2, 5), gap(1, 9)];
        let bytes = file(&gaps);
        for cut in GAPS_HEADER_BYTES..bytes.len() {
            let whole = (cut - GAPS_HEADER_BYTES) / GAP_BYTES;
            let (found, end) = decode_gaps(Path::new("gaps"), &bytes[..cut]).expect("torn, not damaged");
            assert_eq!((&found[..], end), (&gaps[..whole], GAPS_HEADER_BYTES + whole * GAP_BYTES), "cut at {cut}");
        }
        for cut in 0..GAPS_HEADER_BYTES {
            assert!(decode_gaps(Path::new("gaps"), &bytes[..cut]).is_err(), "the header is written whole");
        }
    }

    #[test]
    fn damage_before_the_last_gap_is_an_error_and_in_the_last_a_torn_tail() {
        let bytes = file(&[gap(1, 1), gap(2, 5)]);
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1;
            let decoded = decode_gaps(Path::new("gaps"), &damaged);
            match decoded {
                Ok((gaps, end)) => {
                    assert!(at >= GAPS_HEADER_BYTES + GAP_BYTES, "byte {at}");
                    assert_eq!((gaps.len(), end), (1, GAPS_HEADER_BYTES + GAP_BYTES));
                }
                Err(error) => {
                    assert!(at < GAPS_HEADER_BYTES + GAP_BYTES, "byte {at}: {error}");
                    let is_typed = matches!(error, OpenError::ForeignFile { .. } | OpenError::UnknownFormat { .. });
                    assert!(is_typed, "byte {at}: {error}");
                }
            }
        }
    }
}
