//! The bytes of a snapshot file: a header, and one entry per state. Pure functions; `FORMAT.md` §15 has the same
//! tables.
//!
//! ```text
//! header   0 magic 8   8 format u32   12 archive fingerprint u32   16 kind u16   18 shard u16   20 state version u16   22 zero u16
//!         24 start u64   32 sequence u64   40 time u64   48 state root bytes u32   52 its alignment u16   54 zero u16   56 store u64
//!         64 check u32   68 zero u32   72 crc u32   76 zero u32
//! entry    0 length u32   4 crc u32   8 key u64   16 version u48 | state version u16   24 head u64   32 latest time u64
//!         40 state bytes u32   44 outcomes u32   48 state, padded to 16; then outcomes
//! outcome  0 idempotency u64   8 version u64   16 ending u64   24 body bytes u32   28 zero u32
//!         32 body (the rejection, or the command's other keys), padded to 16
//! end      an entry of version 0 and length 48: key = number of entries, head = end of the log, 32 durable u32 = 1 if the log
//!          was durable up to there, 36 check u32, 40 boot u64. (A longer entry of version 0: outcomes of a key without events.)
//! ```

use rkyv::util::AlignedVec;

use crate::event::{Encode, Key, Offset, Root, Scratch, Sequence, ShardId, Time, Version, has_one_size};
use crate::log::format::{Ending, LOW_47, archive_fingerprint};
use crate::log::other_keys::OtherKeys;
use crate::log::seal::crc32c;
use crate::state::aggregate::{Aggregate, Stored};
use crate::state::keys::Slot;
use crate::state::outcomes::Remembered;
use crate::state::outcomes::rejection;
use crate::storage::framed::{Frame, FrameError, Reader, put_u32, put_u64, u16_at, u32_at, u64_at};
use crate::storage::memory::{ALIGN, padded};

/// Bytes of a file's header: a frame and four zeros.
pub(crate) const FILE_HEADER_BYTES: usize = 80;
const FRAME_BYTES: usize = FILE_HEADER_BYTES - 4;
const FRAME: Frame = Frame { magic: *b"corelsnp", bytes_min: FRAME_BYTES };
/// Bytes of an entry's header.
pub(crate) const ENTRY_HEADER_BYTES: usize = 48;
const OUTCOME_HEADER_BYTES: usize = 32;
const LOW_48: u64 = (1 << 48) - 1;

/// The error for a file of another store.
pub(crate) const OTHER_STORE: &str = "it belongs to another store";

/// The store and shard that files belong to.
pub(crate) type Owner = (u64, ShardId);

/// The content of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The state of a key after every `snapshot_every` of its events, in the order of the log.
    Snapshots,
    /// The states of all keys, each at some moment between `start` and the end.
    Checkpoint,
}

/// The header of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FileHeader {
    pub(crate) kind: Kind,
    /// The store's id.
    pub(crate) store: u64,
    pub(crate) shard: ShardId,
    pub(crate) state_version: u16,
    /// The root of an archived state.
    pub(crate) state: Root,
    /// The end of the log when the file was begun, and the sequence of the next event there.
    pub(crate) start: Offset,
    pub(crate) sequence: Sequence,
    /// The CRC word of the record that ends at `start`; 0 if no record ends there.
    pub(crate) check: u32,
    pub(crate) time: Time,
}

impl FileHeader {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = FRAME.begin();
        out.u32(archive_fingerprint());
        out.u16(u16::from(self.kind == Kind::Checkpoint));
        out.u16(self.shard.0);
        out.u16(self.state_version);
        out.zeros(2);
        out.u64(self.start.0);
        out.u64(self.sequence.0);
        out.u64(self.time.0);
        out.u32(self.state.bytes);
        out.u16(self.state.align);
        out.zeros(2);
        out.u64(self.store);
        out.u32(self.check);
        out.zeros(4);
        let mut header = out.seal();
        header.resize(FILE_HEADER_BYTES, 0);
        header
    }

    /// Reads the header of a file of this store and shard.
    pub(crate) fn decode(bytes: &[u8], owner: Owner) -> Result<Self, &'static str> {
        let header = bytes.get(..FILE_HEADER_BYTES).ok_or("the file is shorter than its header")?;
        let (frame, zeros) = header.split_at(FRAME_BYTES);
        let fields = FRAME.open(frame).map_err(FrameError::why)?;
        if zeros != [0; 4] {
            return Err("unused bytes of the header are not zero");
        }
        Self::read(fields, owner).map_err(FrameError::why)
    }

    fn read(mut fields: Reader<'_>, (store, shard): Owner) -> Result<Self, FrameError> {
        if fields.u32()? != archive_fingerprint() {
            return Err("its archives have another format".into());
        }
        let (kind, stored_shard, state_version) = (fields.u16()?, fields.u16()?, fields.u16()?);
        fields.bytes(2)?;
        let (start, sequence, time) = (Offset(fields.u64()?), Sequence(fields.u64()?), Time(fields.u64()?));
        let state = Root { bytes: fields.u32()?, align: fields.u16()? };
        fields.bytes(2)?;
        if fields.u64()? != store {
            return Err(OTHER_STORE.into());
        }
        let check = fields.u32()?;
        let kind = match kind {
            0 => Kind::Snapshots,
            1 => Kind::Checkpoint,
            _ => return Err("this build does not know its kind".into()),
        };
        if stored_shard != shard.0 {
            return Err("it belongs to another shard".into());
        }
        let is_possible = state.align.is_power_of_two() && state.bytes.is_multiple_of(u32::from(state.align));
        if !is_possible && state != Root::default() {
            return Err("its size of a state is not a multiple of its alignment".into());
        }
        Ok(Self { kind, store, shard, state_version, state, start, sequence, check, time })
    }

    /// Returns `true` if the file has the program's state version, but another layout of states, so they cannot be
    /// read.
    pub(crate) fn is_of_another_layout<A: Aggregate>(&self) -> bool {
        size_of::<A>() > 0 && self.state_version == A::STATE_VERSION && self.state != Root::of::<A>()
    }
}

/// The reason why a saved state, or a whole checkpoint, cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Unusable {
    /// The bytes are not valid; the text says why.
    #[error("{0}")]
    Damaged(&'static str),
    /// The states have another size or alignment under the program's state version.
    #[error("its states take {stored}, but the program has the same state version")]
    State { stored: Root },
    /// A rejection has another size or alignment than the program's.
    #[error("a rejection takes {stored}")]
    Rejection { stored: Root },
}

impl From<&'static str> for Unusable {
    fn from(why: &'static str) -> Self {
        Self::Damaged(why)
    }
}

/// The end entry of a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct End {
    pub(crate) entries: u64,
    /// No entry depends on a record at or beyond this offset.
    pub(crate) log_end: Offset,
    /// The CRC word of the record that ends at `log_end`; 0 if no record ends there.
    pub(crate) check: u32,
    /// `true` if the log was durable up to `log_end`.
    pub(crate) durable: bool,
    /// The boot id of the machine. Until the next boot, the system's cache keeps the bytes written.
    pub(crate) boot: u64,
}

impl End {
    pub(crate) fn encode(&self) -> [u8; ENTRY_HEADER_BYTES] {
        let mut out = [0; ENTRY_HEADER_BYTES];
        put_u64(&mut out, 8, self.entries);
        put_u64(&mut out, 24, self.log_end.0);
        put_u32(&mut out, 32, u32::from(self.durable));
        put_u32(&mut out, 36, self.check);
        put_u64(&mut out, 40, self.boot);
        seal(&mut out);
        out
    }

    /// Reads the end entry of a whole checkpoint file.
    pub(crate) fn decode(file: &[u8]) -> Result<Self, &'static str> {
        let at = file.len().checked_sub(ENTRY_HEADER_BYTES).filter(|&at| at >= FILE_HEADER_BYTES);
        let at = at.ok_or("a checkpoint without an end entry")?;
        match entry_at(file, at)? {
            Some(end) if end.is_end() => {
                let durable = match u32_at(file, at + 32) {
                    0 => false,
                    1 => true,
                    _ => return Err("a checkpoint's end entry has an unknown durability flag"),
                };
                let (check, boot) = (u32_at(file, at + 36), u64_at(file, at + 40));
                Ok(Self { entries: end.key.0, log_end: end.head, check, durable, boot })
            }
            _ => Err("a checkpoint without an end entry"),
        }
    }
}

/// Writes length and CRC of an entry. `entry` ends before the padding.
fn seal(entry: &mut [u8]) {
    let len = entry.len() as u32;
    put_u32(entry, 0, len);
    let crc = crc32c(0, &entry[8..]);
    put_u32(entry, 4, crc);
}

/// Writes the CRCs of the entries in `chunk`, which [`Chunk::add`] has filled, and calls `each` with every entry and
/// its place.
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

/// Outcomes of commands, with their idempotency keys.
pub(crate) type Kept<R> = Vec<(u64, Remembered<R>)>;

/// One saved state.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Entry<'a> {
    pub(crate) key: Key,
    pub(crate) version: Version,
    pub(crate) state_version: u16,
    pub(crate) head: Offset,
    pub(crate) time_max: Time,
    /// Its length with padding: the distance to the next entry.
    pub(crate) bytes: usize,
    pub(crate) state: &'a [u8],
    outcomes: u32,
    rest: &'a [u8],
}

/// Reads the entry at `at` and checks its CRC. Returns `None` at the end of the bytes.
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
        return Err("checksum mismatch in an entry");
    }
    entry_at_unchecked(bytes, at)
}

fn entry_at_unchecked(bytes: &[u8], at: usize) -> Result<Option<Entry<'_>>, &'static str> {
    let len = u32_at(bytes, at) as usize;
    let entry = &bytes[at..at + len];
    let version = Version(u64_at(entry, 16) & LOW_48);
    // An end entry has other fields there.
    let is_end = version.0 == 0 && len == ENTRY_HEADER_BYTES;
    let (state_bytes, outcomes) = if is_end { (0, 0) } else { (u32_at(entry, 40) as usize, u32_at(entry, 44)) };
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
    /// Returns `true` if this is the end entry of a checkpoint.
    pub(crate) fn is_end(&self) -> bool {
        self.version.0 == 0 && self.bytes == ENTRY_HEADER_BYTES
    }

    /// Decodes the state, or upgrades it from an older state version.
    pub(crate) fn state<A: Aggregate>(&self) -> Result<A, &'static str> {
        if size_of::<A>() == 0 {
            return Ok(A::default());
        }
        if self.state_version == A::STATE_VERSION {
            return A::decode(self.state).map_err(|_| "a state's archive is not valid");
        }
        A::upgrade(self.state_version, self.state).ok_or("the program cannot read this version of its states")
    }

    /// Decodes the outcomes of the key's commands, oldest first.
    pub(crate) fn outcomes<A: Aggregate>(&self) -> Result<Kept<A::Rejection>, Unusable> {
        let mut outcomes = Vec::new();
        self.each_outcome(|StoredOutcome { id, version, ending, body }| {
            let outcome = match ending {
                Ending::Done { events, others } => {
                    Remembered::Done { version, events, others: OtherKeys::decode(others, body)? }
                }
                Ending::Rejected(root) => match rejection::<A>(root, body) {
                    Some(rejection) => Remembered::Rejected(rejection),
                    None if root == Root::of::<A::Rejection>() => {
                        return Err("a rejection's archive is not valid".into());
                    }
                    None => return Err(Unusable::Rejection { stored: root }),
                },
            };
            outcomes.push((id, outcome));
            Ok(())
        })?;
        Ok(outcomes)
    }

    /// Calls `each` with every outcome as it is stored, for any type of rejection.
    pub(crate) fn each_outcome(
        &self,
        mut each: impl FnMut(StoredOutcome<'_>) -> Result<(), Unusable>,
    ) -> Result<(), Unusable> {
        let mut rest = self.rest;
        for _ in 0..self.outcomes {
            let head = rest.get(..OUTCOME_HEADER_BYTES).ok_or("an outcome is cut short")?;
            let bytes = u32_at(head, 24) as usize;
            let body = rest.get(OUTCOME_HEADER_BYTES..OUTCOME_HEADER_BYTES + bytes);
            let body = body.ok_or("an outcome is cut short")?;
            let ending = Ending::decode(u64_at(head, 16)).ok_or("an outcome has an unknown ending")?;
            if u64_at(head, 8) > LOW_47 || u32_at(head, 28) != 0 {
                return Err("an outcome has a version that no key can have".into());
            }
            if let Ending::Done { others, .. } = ending {
                OtherKeys::decode(others, body)?;
            }
            each(StoredOutcome { id: u64_at(head, 0), version: Version(u64_at(head, 8)), ending, body })?;
            rest = rest.get(OUTCOME_HEADER_BYTES + padded(bytes)..).unwrap_or_default();
        }
        Ok(())
    }
}

/// The outcome of one command.
pub(crate) struct StoredOutcome<'a> {
    id: u64,
    version: Version,
    ending: Ending,
    body: &'a [u8],
}

/// A buffer of entries for a file. The shard fills it without CRCs. Its memory is reused.
#[derive(Debug)]
pub(crate) struct Chunk {
    bytes: AlignedVec<ALIGN>,
    used: usize,
    pub(crate) entries: u64,
}

/// Initial size of a chunk's memory; a chunk counts as full at three quarters of it.
const CHUNK_BYTES: usize = 64 << 10;
/// A chunk that has grown beyond this frees its memory when it is cleared.
const CHUNK_BYTES_KEPT: usize = 1 << 20;
/// The shard's scratch memory is large enough for states up to this size.
const SCRATCH_BYTES: usize = 256 << 10;
/// Size of the largest state that can be saved.
const STATE_BYTES_MAX: usize = 16 << 20;

impl Chunk {
    pub(crate) fn new() -> Self {
        let mut bytes = AlignedVec::with_capacity(CHUNK_BYTES);
        bytes.resize(CHUNK_BYTES, 0);
        Self { bytes, used: 0, entries: 0 }
    }

    pub(crate) fn clear(&mut self) {
        if self.bytes.len() > CHUNK_BYTES_KEPT {
            *self = Self::new();
        }
        (self.used, self.entries) = (0, 0);
    }

    /// Returns `true` if the chunk should be sent before another entry is added.
    pub(crate) fn is_full(&self) -> bool {
        self.used > CHUNK_BYTES - CHUNK_BYTES / 4
    }

    /// Returns `true` if its entries are so large that fewer than 64 fill a chunk.
    pub(crate) fn is_of_large_states(&self) -> bool {
        self.used as u64 > self.entries * (CHUNK_BYTES as u64 / 64)
    }

    pub(crate) fn filled(&mut self) -> &mut [u8] {
        &mut self.bytes[..self.used]
    }

    /// Adds the state in `slot` and the outcomes of the key's commands. Returns `false` if state or outcomes are too
    /// large.
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
        let has_state = size_of::<A>() > 0 && slot.version.0 > 0;
        let state_bytes = if has_state { self.archive(&slot.state, scratch) } else { Some(0) };
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
        assert!(slot.version.0 > 0 || count > 0, "an empty entry would read as an end entry");
        self.reserve(0);
        let version = slot.version.0 & LOW_48 | u64::from(A::STATE_VERSION) << 48;
        let out = &mut self.bytes[begun..begun + ENTRY_HEADER_BYTES];
        // Length and a CRC of zero; `seal_chunk` writes the CRC.
        put_u64(out, 0, (end - begun) as u64);
        put_u64(out, 8, slot.key.0);
        put_u64(out, 16, version);
        put_u64(out, 24, slot.head.0);
        put_u64(out, 32, slot.time_max.0);
        put_u64(out, 40, state_bytes as u64 | u64::from(count) << 32);
        self.entries += 1;
        true
    }

    /// Adds the outcome of a command. Returns `false` if its rejection is too large.
    #[cold]
    fn outcome<R: Stored>(&mut self, id: u64, outcome: &Remembered<R>, scratch: &mut Scratch) -> bool {
        let head = self.used;
        self.used += OUTCOME_HEADER_BYTES;
        let (version, ending, body) = match outcome {
            Remembered::Done { version, events, others } => {
                let (events, count) = (*events, OtherKeys::count(others.as_deref()));
                let body = self.put(&OtherKeys::encode(others.as_deref()));
                (version.0, Ending::Done { events, others: count }, Some(body))
            }
            Remembered::Rejected(rejection) => (0, Ending::Rejected(Root::of::<R>()), self.archive(rejection, scratch)),
        };
        let Some(body) = body else { return false };
        self.reserve(0);
        let out = &mut self.bytes[head..head + OUTCOME_HEADER_BYTES];
        put_u64(out, 0, id);
        put_u64(out, 8, version);
        put_u64(out, 16, ending.encode());
        put_u64(out, 24, body as u64);
        true
    }

    /// Copies `body` after the used bytes and pads it. Returns its length.
    fn put(&mut self, body: &[u8]) -> usize {
        self.reserve(padded(body.len()));
        let at = self.used;
        self.used += padded(body.len());
        self.bytes[at..at + body.len()].copy_from_slice(body);
        self.bytes[at + body.len()..self.used].fill(0);
        body.len()
    }

    /// Archives `value` after the used bytes and pads it. Returns its exact length, or `None` if it is too large.
    fn archive<T: Encode>(&mut self, value: &T, scratch: &mut Scratch) -> Option<usize> {
        let mut room = if has_one_size::<T>() { padded(size_of::<T::Archived>()) } else { 4096 };
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
            // `encode` does not tell whether room or scratch was too small. A value with nested parts needs much of
            // both.
            if room > SCRATCH_BYTES {
                *scratch = Scratch::new(4 * room);
            }
        }
    }

    /// Grows the memory to at least `room` bytes after the used ones.
    fn reserve(&mut self, room: usize) {
        let wanted = self.used + room;
        if self.bytes.len() < wanted {
            self.bytes.resize(wanted.next_power_of_two(), 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bounded::Bounded;
    use crate::event::{Event, EventType, EventTypeId, Meta};
    use crate::log::format::tests::assert_golden;
    use crate::state::aggregate::Emit;
    use rkyv::{Archive, Deserialize, Serialize};

    #[derive(Archive, Serialize, Deserialize, Bounded, Debug, Clone, Copy)]
    struct Happened;

    impl Event for Happened {
        const TYPES: &'static [EventType] = &[EventType::new(1, "happened", 1)];
        fn event_type(&self) -> EventTypeId {
            EventTypeId(1)
        }
    }

    #[derive(Archive, Serialize, Deserialize, Bounded, Debug, Clone, Default, PartialEq)]
    struct State {
        n: u64,
        name: String,
    }

    impl Aggregate for State {
        type Event = Happened;
        type Command = ();
        type Rejection = u32;

        const STATE_VERSION: u16 = 0x0102;

        fn evolve(&mut self, _: &ArchivedHappened, _: &Meta) {
            self.n += 1;
        }

        fn decide(&self, (): (), _: &mut Emit<Happened>) -> Result<(), u32> {
            Ok(())
        }
    }

    const OWNER: Owner = (0x1112_1314_1516_1718, ShardId(0x0203));

    fn header(kind: Kind) -> FileHeader {
        let (start, sequence, check) = match kind {
            Kind::Snapshots => (Offset(0), Sequence(0), 0),
            Kind::Checkpoint => (Offset(0x0012_3456_7890), Sequence(0x0a0b_0c0d), 0x3132_3334),
        };
        let time = Time(1_700_000_000_123_456_789);
        FileHeader {
            kind,
            store: OWNER.0,
            shard: OWNER.1,
            state_version: State::STATE_VERSION,
            state: Root::of::<State>(),
            start,
            sequence,
            check,
            time,
        }
    }

    fn slot(key: u64, version: u64) -> Slot<State> {
        Slot {
            key: Key(key),
            version: Version(version),
            head: Offset(0x0010_2030_4050),
            time_max: Time(1_700_000_000_000_000_001),
            state: State { n: version, name: "somebody, longer than eight".into() },
        }
    }

    /// Returns a file with these keys and outcomes.
    fn file(kind: Kind, keys: &[(Slot<State>, Kept<u32>)]) -> Vec<u8> {
        let (mut chunk, mut scratch) = (Chunk::new(), Scratch::new(1 << 16));
        // Earlier bytes of the chunk's memory must not reach the file.
        chunk.bytes.fill(0xff);
        for (slot, outcomes) in keys {
            assert!(chunk.add(slot, outcomes.iter(), &mut scratch));
        }
        let mut seen = Vec::new();
        seal_chunk(chunk.filled(), |at, entry| seen.push((at, entry.key)));
        assert_eq!(seen.len(), keys.len());
        [&header(kind).encode()[..], chunk.filled()].concat()
    }

    /// Compares a file with its keys; reads it from aligned memory, as readers do. Returns where the last entry ends.
    fn check(bytes: &[u8], kind: Kind, keys: &[(Slot<State>, Kept<u32>)]) -> usize {
        let mut file = AlignedVec::<ALIGN>::new();
        file.extend_from_slice(bytes);
        assert_eq!(FileHeader::decode(&file, OWNER), Ok(header(kind)));
        let mut at = FILE_HEADER_BYTES;
        for (slot, outcomes) in keys {
            let entry = entry_at(&file, at).expect("a valid entry").expect("an entry");
            assert_eq!((entry.key, entry.version, entry.head), (slot.key, slot.version, slot.head));
            assert_eq!((entry.time_max, entry.is_end()), (slot.time_max, false));
            if slot.version.0 > 0 {
                assert_eq!(entry.state::<State>().expect("a state"), slot.state);
            }
            assert_eq!(&entry.outcomes::<State>().expect("outcomes"), outcomes);
            at += entry.bytes;
        }
        at
    }

    #[test]
    fn a_file_of_snapshots_is_frozen() {
        let keys = [(slot(0xfedc_ba98_7654_3210, 0x0000_2abb_ccdd_eeff), vec![])];
        let bytes = file(Kind::Snapshots, &keys);
        assert_golden("snapshots.bin", &bytes);
        assert_eq!(check(&bytes, Kind::Snapshots, &keys), bytes.len());
    }

    #[test]
    fn a_checkpoint_is_frozen() {
        let done = Remembered::Done { version: Version(6), events: 3, others: None };
        let others = OtherKeys::new([(Key(7), Version(6)), (Key(8), Version(0))].into_iter());
        let of_three_keys = Remembered::Done { version: Version(1), events: 2, others };
        let without_events = Slot { key: Key(8), ..Slot::default() };
        let keys = [
            (without_events, vec![(0x5555_6666_7777_8888, Remembered::Rejected(41))]),
            (slot(7, 6), vec![(1, Remembered::Rejected(42)), (2, done)]),
            (slot(9, 1), vec![]),
            (slot(10, 1), vec![(3, of_three_keys)]),
        ];
        let end = End {
            entries: 4,
            log_end: Offset(0x0012_3456_9999),
            check: 0x4142_4344,
            durable: true,
            boot: 0x0102_0304_0506_0708,
        };
        let bytes = [file(Kind::Checkpoint, &keys), end.encode().to_vec()].concat();
        assert_golden("checkpoint.bin", &bytes);
        let at = check(&bytes, Kind::Checkpoint, &keys);
        assert_eq!(bytes.len() - at, ENTRY_HEADER_BYTES);
        assert_eq!(End::decode(&bytes), Ok(end));
        assert!(entry_at(&bytes, at).expect("a valid entry").expect("an entry").is_end());
    }

    #[test]
    fn every_flipped_bit_of_a_file_is_detected() {
        let keys = [(slot(7, 6), vec![(1, Remembered::Rejected(42))])];
        let end = End { entries: 1, log_end: Offset(4096), check: 5, durable: false, boot: 7 };
        let whole = [file(Kind::Checkpoint, &keys), end.encode().to_vec()].concat();
        let entry_bytes = u32_at(&whole, FILE_HEADER_BYTES) as usize;
        for bit in 0..whole.len() * 8 {
            let mut bytes = AlignedVec::<ALIGN>::new();
            bytes.extend_from_slice(&whole);
            bytes[bit / 8] ^= 1 << (bit % 8);
            let is_valid = FileHeader::decode(&bytes, OWNER).is_ok()
                && matches!(entry_at(&bytes, FILE_HEADER_BYTES), Ok(Some(entry)) if !entry.is_end())
                && End::decode(&bytes).is_ok();
            // Padding between entries is not checked.
            let is_padding = (FILE_HEADER_BYTES + entry_bytes..whole.len() - ENTRY_HEADER_BYTES).contains(&(bit / 8));
            assert_eq!(is_valid, is_padding, "bit {bit}");
        }
    }
}
