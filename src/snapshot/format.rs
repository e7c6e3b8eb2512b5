//! The bytes of a snapshot file: a header, and one entry per state. Pure functions; `FORMAT.md` draws the same tables.
//!
//! ```text
//! header   0 magic 8   8 format u32   12 archive fingerprint u32   16 kind u16   18 shard u16   20 state version u16   22 zero u16
//!         24 start u64   32 sequence u64   40 time u64   48 zero u64   56 crc u32   60 zero u32
//! entry    0 length u32   4 crc u32   8 key u64   16 version u48 | state version u16   24 head u64   32 latest time u64
//!         40 state bytes u32   44 outcomes u32   48 state, padded to 16; then outcomes
//! outcome  0 idempotency u64   8 version u64   16 events u32   20 rejection bytes u32   24 zero u64   32 rejection, padded to 16
//! end      an entry of version 0: key = number of entries, head = end of the log, latest time = 1 where that was durable,
//!          40 boot u64
//! ```

use rkyv::util::AlignedVec;

use crate::aggregate::{Aggregate, Stored};
use crate::command::Remembered;
use crate::event::{Encode, Key, Offset, Scratch, Sequence, ShardId, Time, Version};
use crate::keys::Slot;
use crate::log::format::{ALIGN, FORMAT_VERSION, archive_fingerprint, padded, u16_at, u32_at, u64_at};
use crate::log::mmap::crc32c;

const MAGIC: [u8; 8] = *b"corelsnp";
/// Bytes of a file's header.
pub(crate) const FILE_HEADER_BYTES: usize = 64;
const FILE_CRC_AT: usize = 56;
/// Bytes of an entry's header.
pub(crate) const ENTRY_HEADER_BYTES: usize = 48;
const OUTCOME_HEADER_BYTES: usize = 32;
const LOW_48: u64 = (1 << 48) - 1;

/// What a file holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Every so many events of a key its state, in the order of the log.
    Snapshots,
    /// The states of all keys, each as it was at some moment between `start` and the end.
    Checkpoint,
}

/// The head of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FileHeader {
    pub(crate) kind: Kind,
    pub(crate) shard: ShardId,
    pub(crate) state_version: u16,
    /// Where the log stood when the file was begun, and the sequence of the next event there.
    pub(crate) start: Offset,
    pub(crate) sequence: Sequence,
    pub(crate) time: Time,
}

impl FileHeader {
    pub(crate) fn encode(&self) -> [u8; FILE_HEADER_BYTES] {
        let mut out = [0; FILE_HEADER_BYTES];
        out[0..8].copy_from_slice(&MAGIC);
        out[8..12].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
        out[12..16].copy_from_slice(&archive_fingerprint().to_le_bytes());
        out[16..18].copy_from_slice(&u16::from(self.kind == Kind::Checkpoint).to_le_bytes());
        out[18..20].copy_from_slice(&self.shard.0.to_le_bytes());
        out[20..22].copy_from_slice(&self.state_version.to_le_bytes());
        out[24..32].copy_from_slice(&self.start.0.to_le_bytes());
        out[32..40].copy_from_slice(&self.sequence.0.to_le_bytes());
        out[40..48].copy_from_slice(&self.time.0.to_le_bytes());
        let crc = crc32c(0, &out[..FILE_CRC_AT]);
        out[FILE_CRC_AT..FILE_CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// The header of a file of `shard` that this build can read.
    pub(crate) fn decode(bytes: &[u8], shard: ShardId) -> Result<Self, &'static str> {
        let head = bytes.get(..FILE_HEADER_BYTES).ok_or("the file is shorter than its header")?;
        if head[..8] != MAGIC {
            return Err("wrong magic");
        }
        if crc32c(0, &head[..FILE_CRC_AT]) != u32_at(head, FILE_CRC_AT) || head[FILE_CRC_AT + 4..] != [0; 4] {
            return Err("the header's CRC does not hold");
        }
        if u32_at(head, 8) != FORMAT_VERSION || u32_at(head, 12) != archive_fingerprint() {
            return Err("it is of another format");
        }
        if u16_at(head, 18) != shard.0 {
            return Err("it is another shard's");
        }
        Ok(Self {
            kind: if u16_at(head, 16) == 0 { Kind::Snapshots } else { Kind::Checkpoint },
            shard,
            state_version: u16_at(head, 20),
            start: Offset(u64_at(head, 24)),
            sequence: Sequence(u64_at(head, 32)),
            time: Time(u64_at(head, 40)),
        })
    }
}

/// How a checkpoint ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct End {
    pub(crate) entries: u64,
    /// No entry knows of anything at or beyond this.
    pub(crate) log_end: Offset,
    /// Whether the log was durable up to there.
    pub(crate) durable: bool,
    /// Which run of the machine this was: within it the system's cache keeps what was written.
    pub(crate) boot: u64,
}

impl End {
    pub(crate) fn encode(&self) -> [u8; ENTRY_HEADER_BYTES] {
        let mut out = [0; ENTRY_HEADER_BYTES];
        out[8..16].copy_from_slice(&self.entries.to_le_bytes());
        out[24..32].copy_from_slice(&self.log_end.0.to_le_bytes());
        out[32..40].copy_from_slice(&u64::from(self.durable).to_le_bytes());
        out[40..48].copy_from_slice(&self.boot.to_le_bytes());
        seal(&mut out);
        out
    }

    /// The end of a whole checkpoint.
    pub(crate) fn decode(file: &[u8]) -> Result<Self, &'static str> {
        let at = file.len().checked_sub(ENTRY_HEADER_BYTES).filter(|&at| at >= FILE_HEADER_BYTES);
        let at = at.ok_or("a checkpoint without an end")?;
        match entry_at(file, at)? {
            Some(Entry { version: Version(0), key, head, time_max, .. }) => {
                Ok(Self { entries: key.0, log_end: head, durable: time_max.0 != 0, boot: u64_at(file, at + 40) })
            }
            _ => Err("a checkpoint without an end"),
        }
    }
}

/// Completes an entry, whose length is that of `entry` before its padding.
fn seal(entry: &mut [u8]) {
    let len = entry.len() as u32;
    entry[0..4].copy_from_slice(&len.to_le_bytes());
    let crc = crc32c(0, &entry[8..]);
    entry[4..8].copy_from_slice(&crc.to_le_bytes());
}

/// Writes the check sums of the entries in `chunk`, which was filled by [`Chunk::add`]; tells `each` where one is.
pub(crate) fn seal_chunk(chunk: &mut [u8], mut each: impl FnMut(usize, &Entry<'_>)) {
    let mut at = 0;
    while at < chunk.len() {
        let len = u32_at(chunk, at) as usize;
        seal(&mut chunk[at..at + len]);
        if let Ok(Some(entry)) = entry_at_unchecked(chunk, at) {
            each(at, &entry);
        }
        at += padded(len);
    }
}

/// One state, as a file has it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Entry<'a> {
    pub(crate) key: Key,
    pub(crate) version: Version,
    pub(crate) state_version: u16,
    pub(crate) head: Offset,
    pub(crate) time_max: Time,
    /// Its length with padding: where the next one begins.
    pub(crate) bytes: usize,
    pub(crate) state: &'a [u8],
    outcomes: u32,
    rest: &'a [u8],
}

/// The entry at `at`, its CRC checked; `None` at the end of the bytes.
pub(crate) fn entry_at(bytes: &[u8], at: usize) -> Result<Option<Entry<'_>>, &'static str> {
    if at == bytes.len() {
        return Ok(None);
    }
    let head = bytes.get(at..at + ENTRY_HEADER_BYTES).ok_or("an entry is cut short")?;
    let len = u32_at(head, 0) as usize;
    if len < ENTRY_HEADER_BYTES {
        return Err("an entry's length is out of range");
    }
    let entry = bytes.get(at..at + len).ok_or("an entry is cut short")?;
    if crc32c(0, &entry[8..]) != u32_at(head, 4) {
        return Err("an entry's CRC does not hold");
    }
    entry_at_unchecked(bytes, at)
}

fn entry_at_unchecked(bytes: &[u8], at: usize) -> Result<Option<Entry<'_>>, &'static str> {
    let len = u32_at(bytes, at) as usize;
    let entry = &bytes[at..at + len];
    let version = Version(u64_at(entry, 16) & LOW_48);
    // An end has other things there.
    let (state_bytes, outcomes) = if version.0 == 0 { (0, 0) } else { (u32_at(entry, 40) as usize, u32_at(entry, 44)) };
    let body = &entry[ENTRY_HEADER_BYTES..];
    let state = body.get(..state_bytes).ok_or("an entry's state is cut short")?;
    let rest = body.get(padded(state_bytes).min(body.len())..).unwrap_or_default();
    Ok(Some(Entry {
        key: Key(u64_at(entry, 8)),
        version,
        state_version: u16_at(entry, 22),
        head: Offset(u64_at(entry, 24)),
        time_max: Time(u64_at(entry, 32)),
        bytes: padded(len),
        state,
        outcomes,
        rest,
    }))
}

impl Entry<'_> {
    /// The state, as it is laid out today.
    pub(crate) fn state<A: Aggregate>(&self) -> Result<A, &'static str> {
        if size_of::<A>() == 0 {
            return Ok(A::default());
        }
        if self.state_version == A::STATE_VERSION {
            return A::decode(self.state).map_err(|_| "a state's archive is not valid");
        }
        A::upgrade(self.state_version, self.state).ok_or("a state of a version that this program cannot read")
    }

    /// What became of the key's commands, oldest first.
    pub(crate) fn outcomes<R: Stored>(&self) -> Result<Vec<(u64, Remembered<R>)>, &'static str> {
        let mut rest = self.rest;
        let mut outcomes = Vec::new();
        for _ in 0..self.outcomes {
            let head = rest.get(..OUTCOME_HEADER_BYTES).ok_or("an outcome is cut short")?;
            let bytes = u32_at(head, 20) as usize;
            let rejection = rest.get(OUTCOME_HEADER_BYTES..OUTCOME_HEADER_BYTES + bytes);
            let rejection = rejection.ok_or("an outcome is cut short")?;
            let outcome = if bytes == 0 {
                Remembered::Done { version: Version(u64_at(head, 8)), events: u32_at(head, 16) }
            } else {
                Remembered::Rejected(R::decode(rejection).map_err(|_| "a rejection's archive is not valid")?)
            };
            outcomes.push((u64_at(head, 0), outcome));
            rest = rest.get(OUTCOME_HEADER_BYTES + padded(bytes)..).unwrap_or_default();
        }
        Ok(outcomes)
    }
}

/// Entries on their way to a file. Filled by the shard, without check sums; its memory is used again.
#[derive(Debug)]
pub(crate) struct Chunk {
    bytes: AlignedVec<ALIGN>,
    used: usize,
    pub(crate) entries: u64,
}

/// A chunk's memory at first, and when it counts as full.
const CHUNK_BYTES: usize = 64 << 10;
/// The largest state that can be saved.
const STATE_BYTES_MAX: usize = 16 << 20;

impl Chunk {
    pub(crate) fn new() -> Self {
        let mut bytes = AlignedVec::with_capacity(CHUNK_BYTES);
        bytes.resize(CHUNK_BYTES, 0);
        Self { bytes, used: 0, entries: 0 }
    }

    pub(crate) fn clear(&mut self) {
        (self.used, self.entries) = (0, 0);
    }

    /// Whether it should be sent before more is added.
    pub(crate) fn is_full(&self) -> bool {
        self.used > CHUNK_BYTES - CHUNK_BYTES / 4
    }

    pub(crate) fn filled(&mut self) -> &mut [u8] {
        &mut self.bytes[..self.used]
    }

    /// Adds what `slot` knows of its key, and what became of its commands. `false` where the state is too large.
    #[inline]
    pub(crate) fn add<'o, A: Aggregate>(
        &mut self,
        slot: &Slot<A>,
        mut outcomes: impl Iterator<Item = &'o (u64, Remembered<A::Rejection>)>,
        scratch: &mut Scratch,
    ) -> bool
    where
        A::Rejection: 'o,
    {
        let begun = self.used;
        self.used += ENTRY_HEADER_BYTES;
        let state_bytes = match size_of::<A>() {
            0 => Some(0),
            _ => self.archive(&slot.state, scratch),
        };
        let Some(state_bytes) = state_bytes else {
            self.used = begun;
            return false;
        };
        let (mut end, mut count) = (begun + ENTRY_HEADER_BYTES + state_bytes, 0_u32);
        if let Some(first) = outcomes.next() {
            for (id, outcome) in std::iter::once(first).chain(outcomes) {
                if !self.outcome(*id, outcome, scratch) {
                    self.used = begun;
                    return false;
                }
                count += 1;
            }
            end = self.used;
        }
        self.reserve(0);
        let version = slot.version.0 & LOW_48 | u64::from(A::STATE_VERSION) << 48;
        let out = &mut self.bytes[begun..begun + ENTRY_HEADER_BYTES];
        // The check sum is for who writes the file.
        out[0..8].copy_from_slice(&((end - begun) as u64).to_le_bytes());
        out[8..16].copy_from_slice(&slot.key.0.to_le_bytes());
        out[16..24].copy_from_slice(&version.to_le_bytes());
        out[24..32].copy_from_slice(&slot.head.0.to_le_bytes());
        out[32..40].copy_from_slice(&slot.time_max.0.to_le_bytes());
        out[40..48].copy_from_slice(&(state_bytes as u64 | u64::from(count) << 32).to_le_bytes());
        self.entries += 1;
        true
    }

    /// Adds what became of a command. `false` where its rejection is too large.
    #[cold]
    fn outcome<R: Stored>(&mut self, id: u64, outcome: &Remembered<R>, scratch: &mut Scratch) -> bool {
        let head = self.used;
        self.used += OUTCOME_HEADER_BYTES;
        let (version, events, rejection) = match outcome {
            Remembered::Done { version, events } => (version.0, *events, Some(0)),
            Remembered::Rejected(rejection) => (0, 0, self.archive(rejection, scratch)),
        };
        let Some(rejection) = rejection else { return false };
        self.reserve(0);
        let out = &mut self.bytes[head..head + OUTCOME_HEADER_BYTES];
        out[0..8].copy_from_slice(&id.to_le_bytes());
        out[8..16].copy_from_slice(&version.to_le_bytes());
        out[16..20].copy_from_slice(&events.to_le_bytes());
        out[20..24].copy_from_slice(&(rejection as u32).to_le_bytes());
        out[24..32].fill(0);
        true
    }

    /// Archives `value` behind what is used, and pads it. Returns its exact length.
    fn archive<T: Encode>(&mut self, value: &T, scratch: &mut Scratch) -> Option<usize> {
        // Of a type that owns nothing outside itself the archive has one size.
        let mut room = if std::mem::needs_drop::<T>() { 4096 } else { padded(size_of::<T::Archived>()) };
        loop {
            self.reserve(room);
            let end = self.bytes.len();
            if let Some(len) = value.encode(&mut self.bytes[self.used..end], scratch) {
                let at = self.used;
                self.used = at + padded(len);
                self.reserve(0);
                self.bytes[at + len..at + padded(len)].fill(0);
                return Some(len);
            }
            if end - self.used >= STATE_BYTES_MAX {
                return None;
            }
            room = ((end - self.used) * 2).max(4096);
        }
    }

    /// Makes sure that `room` bytes stand behind what is used.
    fn reserve(&mut self, room: usize) {
        let wanted = self.used + room;
        if self.bytes.len() < wanted {
            self.bytes.resize(wanted.next_power_of_two(), 0);
        }
    }
}
