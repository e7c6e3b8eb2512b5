//! The bytes of a gate's record (its gaps and the starts of its partitions) and of the record's witness (the entries
//! that are durable). Pure functions; `FORMAT.md` §19 has the tables.
//!
//! The CRC of each entry is seeded with the CRC of the entry before it, so the file is valid up to one point. The
//! witness tells whether a file that ends early is torn or damaged.

use std::path::Path;
use std::time::Duration;

use crate::error::OpenError;
use crate::event::Time;
use crate::log::seal::crc32c;
use crate::storage::framed::{CRC_BYTES, Frame, FrameError, Reader, Writer, u32_at};

const HEADER_BYTES: usize = 24;
const GAPS_FRAME: Frame = Frame { magic: *b"corelgap", bytes_min: HEADER_BYTES };
const WITNESS_FRAME: Frame = Frame { magic: *b"corelgat", bytes_min: HEADER_BYTES };
const ENTRY_BYTES: usize = 48;
const ENTRY_CRC_AT: usize = ENTRY_BYTES - CRC_BYTES;
const WITNESS_BYTES: usize = 8;
/// The witness is synced at every multiple of this number of entries, so a power cut loses fewer than this number of
/// its entries.
pub(super) const WITNESSES_UNSYNCED_MAX: u64 = 32;

const KIND_GAP: u32 = 0;
const KIND_START: u32 = 1;

/// Sequences that did not arrive in time. The gate has published later sequences without them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Gap {
    /// The partition.
    pub partition: u64,
    /// The first missing sequence.
    pub from: u64,
    /// The last missing sequence.
    pub to: u64,
    /// The time that the gate waited for the sequences.
    pub waited: Duration,
    /// The time at which the gate gave the sequences up.
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

/// An entry of the record. An entry is durable before the gate publishes the events after its gap or start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Entry {
    Gap(Gap),
    Start(Start),
}

impl Entry {
    /// Encodes the entry. `before` is the CRC that precedes it in the file.
    pub(super) fn encode(&self, before: u32) -> Vec<u8> {
        let (kind, words) = match self {
            Self::Gap(Gap { partition, from, to, waited, time }) => {
                let waited_ns = u64::try_from(waited.as_nanos()).unwrap_or(u64::MAX);
                (KIND_GAP, [*partition, *from, *to, waited_ns, time.0])
            }
            Self::Start(Start { partition, sequence, time }) => {
                (KIND_START, [*partition, *sequence, *sequence, 0, time.0])
            }
        };
        let mut out = Writer::default();
        words.into_iter().for_each(|word| out.u64(word));
        out.u32(kind);
        out.seal_after(before)
    }

    /// Decodes an entry whose CRC matches.
    fn decode(bytes: &[u8]) -> Result<Self, FrameError> {
        let mut fields = Reader::new(bytes);
        let (partition, from, to) = (fields.u64()?, fields.u64()?, fields.u64()?);
        let (waited, time) = (Duration::from_nanos(fields.u64()?), Time(fields.u64()?));
        if from > to || to == u64::MAX {
            return Err("an entry has an impossible range of sequences".into());
        }
        match fields.u32()? {
            KIND_GAP => Ok(Self::Gap(Gap::new(partition, from, to, waited, time))),
            KIND_START => Ok(Self::Start(Start { partition, sequence: from, time })),
            _ => Err("an entry has an unknown kind".into()),
        }
    }
}

/// The end of a chain of CRCs: a position in a file, and the CRC before it, which seeds the next CRC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ChainEnd {
    pub(super) at: u64,
    pub(super) crc: u32,
}

impl ChainEnd {
    /// Returns the end after `added`, whose last four bytes are its CRC.
    pub(super) fn after(self, added: &[u8]) -> Self {
        Self { at: self.at + added.len() as u64, crc: u32_at(added, added.len() - CRC_BYTES) }
    }

    /// Returns the end at `at`. A CRC must precede this position.
    pub(super) fn of(bytes: &[u8], at: usize) -> Self {
        Self { at: at as u64, crc: u32_at(bytes, at - CRC_BYTES) }
    }
}

fn header(frame: Frame, store: u64) -> Vec<u8> {
    let mut out = frame.begin();
    out.u64(store);
    out.seal()
}

pub(super) fn gaps_header(store: u64) -> Vec<u8> {
    header(GAPS_FRAME, store)
}

pub(super) fn witness_header(store: u64) -> Vec<u8> {
    header(WITNESS_FRAME, store)
}

/// Encodes the witness of an entry with the CRC `entry_crc`. `before` is the CRC that precedes the witness in its file.
pub(super) fn witness(entry_crc: u32, before: u32) -> Vec<u8> {
    let mut out = Writer::default();
    out.u32(entry_crc);
    out.seal_after(before)
}

fn damaged(path: &Path, at: usize, why: &'static str) -> OpenError {
    OpenError::DamagedFile { path: path.to_owned(), at: at as u64, why }
}

/// Checks a file's header, which must name this store, and the chain of pieces after the header. Returns the end of the
/// last piece with a matching CRC.
fn chained((path, store): (&Path, u64), bytes: &[u8], frame: Frame, piece_bytes: usize) -> Result<ChainEnd, OpenError> {
    let check_store = |mut fields: Reader<'_>| match fields.u64()? {
        named if named == store => Ok(()),
        _ => Err(FrameError::Foreign("the gate's record belongs to another store")),
    };
    let header = &bytes[..bytes.len().min(HEADER_BYTES)];
    frame.open(header).and_then(check_store).map_err(|error| error.of_file(path))?;
    let mut end = ChainEnd::of(bytes, HEADER_BYTES);
    for piece in bytes[HEADER_BYTES..].chunks_exact(piece_bytes) {
        let next = end.after(piece);
        if crc32c(end.crc, &piece[..piece_bytes - CRC_BYTES]) != next.crc {
            break;
        }
        end = next;
    }
    Ok(end)
}

/// Returns the entries of the record and the end of the last one. Entries are written one at a time, so only the last
/// can be torn.
pub(super) fn decode_gaps(path: &Path, bytes: &[u8], store: u64) -> Result<(Vec<Entry>, ChainEnd), OpenError> {
    let end = chained((path, store), bytes, GAPS_FRAME, ENTRY_BYTES)?;
    let whole = end.at as usize;
    if bytes.len() - whole > ENTRY_BYTES {
        return Err(damaged(path, whole, "checksum mismatch in an entry before the last"));
    }
    let entry = |(i, bytes)| {
        let decoded = Entry::decode(bytes);
        decoded.map_err(|error| damaged(path, HEADER_BYTES + i * ENTRY_BYTES, error.why()))
    };
    let entries = bytes[HEADER_BYTES..whole].chunks_exact(ENTRY_BYTES).enumerate().map(entry);
    Ok((entries.collect::<Result<_, _>>()?, end))
}

/// Checks that `gaps`, which is valid up to `gaps_end`, has every witnessed entry. Returns the end of the witness, and
/// the bytes to append to the witness for the last entries, which it does not name yet.
pub(super) fn check_witness(
    (path, store): (&Path, u64),
    bytes: &[u8],
    gaps_path: &Path,
    gaps: &[u8],
    gaps_end: ChainEnd,
) -> Result<(ChainEnd, Vec<u8>), OpenError> {
    let mut end = chained((path, store), bytes, WITNESS_FRAME, WITNESS_BYTES)?;
    let whole = end.at as usize;
    if bytes.len() - whole > WITNESSES_UNSYNCED_MAX as usize * WITNESS_BYTES {
        return Err(damaged(path, whole, "checksum mismatch in a witness that was synced"));
    }
    let witnessed = bytes[HEADER_BYTES..whole].chunks_exact(WITNESS_BYTES);
    let mut entries = gaps[HEADER_BYTES..gaps_end.at as usize].chunks_exact(ENTRY_BYTES);
    for (i, witness) in witnessed.enumerate() {
        let at = HEADER_BYTES + i * ENTRY_BYTES;
        match entries.next() {
            Some(entry) if entry[ENTRY_CRC_AT..] == witness[..4] => {}
            Some(_) => return Err(damaged(gaps_path, at, "an entry differs from the durable one")),
            None => return Err(damaged(gaps_path, at, "a durable entry is missing")),
        }
    }
    let mut missing = Vec::new();
    let from = end;
    for entry in entries {
        let witness = witness(u32_at(entry, ENTRY_CRC_AT), end.crc);
        end = end.after(&witness);
        missing.extend(witness);
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
        assert_eq!(from, ChainEnd::of(&bytes, HEADER_BYTES));
        bytes.extend(missing);
        bytes
    }

    fn check(witness: &[u8], gaps: &[u8], end: ChainEnd) -> Result<(ChainEnd, Vec<u8>), OpenError> {
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
    fn a_record_cut_anywhere_keeps_the_entries_before_the_cut() {
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
    fn a_durable_entry_is_never_mistaken_for_a_torn_one() {
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
    fn an_entry_is_invalid_after_any_other_entry_than_its_predecessor() {
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
    fn a_witness_that_lags_is_completed() {
        let bytes = file(&(0..100).map(|i| gap(i, i)).collect::<Vec<_>>());
        let (_, end) = decode_gaps(Path::new("gaps"), &bytes, STORE).expect("decodes");
        let whole = witnesses(&bytes);
        for cut in HEADER_BYTES..whole.len() {
            let (from, missing) = check(&whole[..cut], &bytes, end).expect("a witness that lags");
            assert_eq!(from.at as usize, cut - (cut - HEADER_BYTES) % WITNESS_BYTES);
            assert_eq!(missing, whole[from.at as usize..]);
        }
        // A power cut may damage unsynced witnesses; damage to a synced one is an error.
        let unsynced = WITNESSES_UNSYNCED_MAX as usize * WITNESS_BYTES;
        for at in HEADER_BYTES..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 1;
            let is_synced = at - (at - HEADER_BYTES) % WITNESS_BYTES < whole.len() - unsynced;
            assert_eq!(check(&damaged, &bytes, end).is_err(), is_synced, "byte {at}");
        }
    }
}
