//! The bytes of a gate's record: its gaps and where its partitions started, and which of these entries were durable. `FORMAT.md` §19.
//!
//! Pure functions. An entry's CRC is seeded with that of the entry before it, so a file holds as a whole up to some entry, or is
//! damaged. How many entries it must hold says another file, entry by entry.

use std::path::Path;
use std::time::Duration;

use crate::error::OpenError;
use crate::event::Time;
use crate::log::format::FORMAT_VERSION;
use crate::log::manifest::checked;
use crate::log::seal::crc32c;
use crate::storage::framed::{u32_at, u64_at};

const GAPS_MAGIC: [u8; 8] = *b"corelgap";
const WITNESS_MAGIC: [u8; 8] = *b"corelgat";
const HEADER_BYTES: usize = 24;
const STORE_AT: usize = 12;
const ENTRY_BYTES: usize = 48;
const ENTRY_CRC_AT: usize = 44;
const WITNESS_BYTES: usize = 8;
/// The witness is synced whenever it names a multiple of this, so a power cut takes fewer.
pub(super) const WITNESSES_UNSYNCED_MAX: u64 = 32;

const KIND_GAP: u32 = 0;
const KIND_START: u32 = 1;

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
}

/// The start of a partition that begins at its first offered event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Start {
    pub(crate) partition: u64,
    pub(crate) sequence: u64,
    pub(crate) time: Time,
}

/// An entry that a gate makes durable before it publishes the events behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Entry {
    Gap(Gap),
    Start(Start),
}

impl Entry {
    /// `before` is the CRC that stands before it in the file.
    pub(super) fn encode(&self, before: u32) -> [u8; ENTRY_BYTES] {
        let (kind, words) = match self {
            Self::Gap(Gap { partition, from, to, waited, time }) => {
                let waited_ns = u64::try_from(waited.as_nanos()).unwrap_or(u64::MAX);
                (KIND_GAP, [*partition, *from, *to, waited_ns, time.0])
            }
            Self::Start(Start { partition, sequence, time }) => {
                (KIND_START, [*partition, *sequence, *sequence, 0, time.0])
            }
        };
        let mut out = [0; ENTRY_BYTES];
        for (at, word) in words.into_iter().enumerate() {
            out[8 * at..][..8].copy_from_slice(&word.to_le_bytes());
        }
        out[40..ENTRY_CRC_AT].copy_from_slice(&kind.to_le_bytes());
        let crc = crc32c(before, &out[..ENTRY_CRC_AT]);
        out[ENTRY_CRC_AT..].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// The entry, or what is wrong with one whose CRC holds.
    fn decode(bytes: &[u8]) -> Result<Self, &'static str> {
        let (partition, from, to) = (u64_at(bytes, 0), u64_at(bytes, 8), u64_at(bytes, 16));
        let time = Time(u64_at(bytes, 32));
        if from > to || to == u64::MAX {
            return Err("an entry ends before it begins");
        }
        match u32_at(bytes, 40) {
            KIND_GAP => Ok(Self::Gap(Gap::new(partition, from, to, Duration::from_nanos(u64_at(bytes, 24)), time))),
            KIND_START => Ok(Self::Start(Start { partition, sequence: from, time })),
            _ => Err("an entry is of an unknown kind"),
        }
    }
}

/// Where a file of the record ends, and the CRC that stands before that: what the next one is seeded with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FileEnd {
    pub(super) at: u64,
    pub(super) crc: u32,
}

impl FileEnd {
    /// Behind `added`, which stands at this end and whose last four bytes are its CRC.
    pub(super) fn behind(self, added: &[u8]) -> Self {
        Self { at: self.at + added.len() as u64, crc: u32_at(added, added.len() - 4) }
    }

    /// At `at`, behind the CRC that stands there.
    pub(super) fn of(bytes: &[u8], at: usize) -> Self {
        Self { at: at as u64, crc: u32_at(bytes, at - 4) }
    }
}

fn header(magic: [u8; 8], store: u64) -> Vec<u8> {
    let mut out = Vec::from(magic);
    out.extend(FORMAT_VERSION.to_le_bytes());
    debug_assert_eq!(out.len(), STORE_AT);
    out.extend(store.to_le_bytes());
    let crc = crc32c(0, &out);
    out.extend(crc.to_le_bytes());
    out
}

pub(super) fn gaps_header(store: u64) -> Vec<u8> {
    header(GAPS_MAGIC, store)
}

pub(super) fn witness_header(store: u64) -> Vec<u8> {
    header(WITNESS_MAGIC, store)
}

/// The witness that an entry with this CRC is durable.
pub(super) fn witness(entry_crc: u32, before: u32) -> [u8; WITNESS_BYTES] {
    let mut out = [0; WITNESS_BYTES];
    out[..4].copy_from_slice(&entry_crc.to_le_bytes());
    let crc = crc32c(before, &out[..4]);
    out[4..].copy_from_slice(&crc.to_le_bytes());
    out
}

fn damaged(path: &Path, at: usize, why: &'static str) -> OpenError {
    OpenError::DamagedFile { path: path.to_owned(), at: at as u64, why }
}

/// Checks a file's header, which must be of this store, and splits the rest into pieces whose CRCs hold, each seeded with the one
/// before. The last piece may be cut short. Returns the end of the last piece that holds.
fn chained(
    (path, store): (&Path, u64),
    bytes: &[u8],
    magic: [u8; 8],
    piece_bytes: usize,
) -> Result<FileEnd, OpenError> {
    let head = checked(path, &bytes[..bytes.len().min(HEADER_BYTES)], magic, HEADER_BYTES - 4)?;
    if u64_at(head, STORE_AT) != store {
        return Err(OpenError::ForeignFile { path: path.to_owned(), why: "the gate's record is of another store" });
    }
    let mut end = FileEnd::of(bytes, HEADER_BYTES);
    for piece in bytes[HEADER_BYTES..].chunks_exact(piece_bytes) {
        let next = end.behind(piece);
        if crc32c(end.crc, &piece[..piece_bytes - 4]) != next.crc {
            break;
        }
        end = next;
    }
    Ok(end)
}

/// Returns the entries of the file, and where it ends. One entry is written at a time, so only the last one can be torn.
pub(super) fn decode_gaps(path: &Path, bytes: &[u8], store: u64) -> Result<(Vec<Entry>, FileEnd), OpenError> {
    let end = chained((path, store), bytes, GAPS_MAGIC, ENTRY_BYTES)?;
    let whole = end.at as usize;
    if bytes.len() - whole > ENTRY_BYTES {
        return Err(damaged(path, whole, "the CRC of an entry before the last does not hold"));
    }
    let entries = bytes[HEADER_BYTES..whole].chunks_exact(ENTRY_BYTES).enumerate();
    let entry = |(i, bytes)| Entry::decode(bytes).map_err(|why| damaged(path, HEADER_BYTES + i * ENTRY_BYTES, why));
    Ok((entries.map(entry).collect::<Result<_, _>>()?, end))
}

/// Checks that every entry that was durable is in `gaps`, a file that holds up to `gaps_end`. Returns where the witness ends, and
/// what is missing of it: the entries that were written last.
pub(super) fn check_witness(
    (path, store): (&Path, u64),
    bytes: &[u8],
    gaps_path: &Path,
    gaps: &[u8],
    gaps_end: FileEnd,
) -> Result<(FileEnd, Vec<u8>), OpenError> {
    let mut end = chained((path, store), bytes, WITNESS_MAGIC, WITNESS_BYTES)?;
    let whole = end.at as usize;
    if bytes.len() - whole > WITNESSES_UNSYNCED_MAX as usize * WITNESS_BYTES {
        return Err(damaged(path, whole, "the CRC of a witness that was synced does not hold"));
    }
    let witnessed = bytes[HEADER_BYTES..whole].chunks_exact(WITNESS_BYTES);
    let mut entries = gaps[HEADER_BYTES..gaps_end.at as usize].chunks_exact(ENTRY_BYTES);
    for (i, witness) in witnessed.enumerate() {
        let at = HEADER_BYTES + i * ENTRY_BYTES;
        match entries.next() {
            Some(entry) if entry[ENTRY_CRC_AT..] == witness[..4] => {}
            Some(_) => return Err(damaged(gaps_path, at, "an entry differs from the one that was durable here")),
            None => return Err(damaged(gaps_path, at, "an entry that was durable is missing")),
        }
    }
    let mut missing = Vec::new();
    let from = end;
    for entry in entries {
        let witness = witness(u32_at(entry, ENTRY_CRC_AT), end.crc);
        missing.extend(witness);
        end = end.behind(&witness);
    }
    Ok((from, missing))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::format::tests::assert_golden;

    const STORE: u64 = 0x1112_1314_1516_1718;

    fn gap(partition: u64, from: u64) -> Entry {
        let time = Time::unix_ms(1_700_000_000_000);
        Entry::Gap(Gap::new(partition, from, from + 2, Duration::from_millis(5_001), time))
    }

    fn start(partition: u64, sequence: u64) -> Entry {
        Entry::Start(Start { partition, sequence, time: Time::unix_ms(1_700_000_000_001) })
    }

    fn file(entries: &[Entry]) -> Vec<u8> {
        let mut bytes = gaps_header(STORE);
        for entry in entries {
            let before = u32_at(&bytes, bytes.len() - 4);
            bytes.extend(entry.encode(before));
        }
        bytes
    }

    fn witnesses(gaps: &[u8]) -> Vec<u8> {
        let (_, end) = decode_gaps(Path::new("gaps"), gaps, STORE).expect("decodes");
        let mut bytes = witness_header(STORE);
        let empty = bytes.clone();
        let (from, missing) = check(&empty, gaps, end).expect("nothing is witnessed");
        assert_eq!(from, FileEnd::of(&bytes, HEADER_BYTES));
        bytes.extend(missing);
        bytes
    }

    fn check(witness: &[u8], gaps: &[u8], end: FileEnd) -> Result<(FileEnd, Vec<u8>), OpenError> {
        check_witness((Path::new("witness"), STORE), witness, Path::new("gaps"), gaps, end)
    }

    #[test]
    fn a_gates_record_is_frozen() {
        let entries = [gap(7, 0x0102_0304_0506_0708), start(8, 0x1112_1314_1516_1718), gap(u64::MAX, 0)];
        let bytes = file(&entries);
        assert_golden("gaps.bin", &bytes);
        let (decoded, end) = decode_gaps(Path::new("gaps"), &bytes, STORE).expect("decodes");
        assert_eq!((&decoded[..], end.at), (&entries[..], bytes.len() as u64));
        assert_golden("gaps-witness.bin", &witnesses(&bytes));
    }

    #[test]
    fn a_record_cut_anywhere_holds_the_entries_before_the_cut() {
        let entries = [gap(1, 1), start(2, 5), gap(1, 9)];
        let bytes = file(&entries);
        for cut in HEADER_BYTES..bytes.len() {
            let whole = (cut - HEADER_BYTES) / ENTRY_BYTES;
            let (found, end) = decode_gaps(Path::new("gaps"), &bytes[..cut], STORE).expect("torn, not damaged");
            let at = (HEADER_BYTES + whole * ENTRY_BYTES) as u64;
            assert_eq!((&found[..], end.at), (&entries[..whole], at), "cut at {cut}");
        }
        for cut in 0..HEADER_BYTES {
            assert!(decode_gaps(Path::new("gaps"), &bytes[..cut], STORE).is_err(), "the header is written whole");
        }
    }

    #[test]
    fn an_entry_that_was_durable_is_never_taken_for_a_torn_one() {
        let bytes = file(&[gap(1, 1), gap(2, 5), start(3, 7)]);
        let witness = witnesses(&bytes);
        for cut in 0..bytes.len() {
            let decoded = decode_gaps(Path::new("gaps"), &bytes[..cut], STORE);
            let checked = decoded.and_then(|(_, end)| check(&witness, &bytes[..cut], end));
            assert!(checked.is_err(), "cut at {cut}");
        }
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1;
            let decoded = decode_gaps(Path::new("gaps"), &damaged, STORE);
            let error = decoded.and_then(|(_, end)| check(&witness, &damaged, end)).expect_err("damaged");
            let is_typed = match error {
                OpenError::ForeignFile { .. } | OpenError::UnknownFormat { .. } => at < HEADER_BYTES,
                OpenError::DamagedFile { at: named, .. } => named as usize <= at && at - (named as usize) < ENTRY_BYTES,
                _ => false,
            };
            assert!(is_typed, "byte {at}: {error}");
        }
    }

    #[test]
    fn entries_do_not_hold_in_another_order_or_behind_others() {
        let entries = [gap(1, 1), gap(2, 5), gap(1, 9)];
        let bytes = file(&entries);
        for first in 0..3 {
            let mut fewer = bytes.clone();
            fewer.drain(HEADER_BYTES + first * ENTRY_BYTES..HEADER_BYTES + (first + 1) * ENTRY_BYTES);
            let decoded = decode_gaps(Path::new("gaps"), &fewer, STORE);
            let whole = decoded.map(|(entries, _)| entries.len());
            assert!(first < 2 || whole.as_ref().is_ok_and(|whole| *whole == 2), "{whole:?}");
            assert!(first > 0 || whole.is_err(), "{whole:?}");
        }
    }

    #[test]
    fn a_witness_that_is_behind_is_brought_up_to_the_entries() {
        let bytes = file(&(0..100).map(|i| gap(i, i)).collect::<Vec<_>>());
        let (_, end) = decode_gaps(Path::new("gaps"), &bytes, STORE).expect("decodes");
        let whole = witnesses(&bytes);
        for cut in HEADER_BYTES..whole.len() {
            let (from, missing) = check(&whole[..cut], &bytes, end).expect("it is behind");
            assert_eq!(from.at as usize, cut - (cut - HEADER_BYTES) % WITNESS_BYTES);
            assert_eq!(missing, whole[from.at as usize..]);
        }
        // A power cut may leave anything of what was not synced, and nothing of what was.
        let unsynced = WITNESSES_UNSYNCED_MAX as usize * WITNESS_BYTES;
        for at in HEADER_BYTES..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 1;
            let is_synced = at - (at - HEADER_BYTES) % WITNESS_BYTES < whole.len() - unsynced;
            assert_eq!(check(&damaged, &bytes, end).is_err(), is_synced, "byte {at}");
        }
    }
}
