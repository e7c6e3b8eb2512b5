//! Events read back from a log: one of them where it lies, and all of them folded into the table of states.
//!
//! One writer: whoever recovers the shard. The same `evolve` that ran when the events were appended runs again here.

use rkyv::util::AlignedVec;

use crate::aggregate::{Aggregate, Stored};
use crate::command::{Outcomes, Remembered};
use crate::error::{CodePanic, PanickedEvent};
use crate::event::{Event, EventTypeId, Key, KeyHash, Offset, Root, Schemas, Scratch, Sequence, ShardId, upcaster};
use crate::keys::{KeyTable, Seen};
use crate::log::format::{ALIGN, Ending, RECORD_HEADER_BYTES, RecordHeader};
use crate::log::mmap::Memory;

/// Reads events in place, and those of older layouts through their upcasters.
#[derive(Debug)]
pub(crate) struct Access {
    schemas: Schemas,
    upcasted: AlignedVec<ALIGN>,
    /// Made when it is first needed.
    scratch: Option<Scratch>,
}

/// An upcasted event's first buffer, and its largest.
const UPCAST_BYTES_MIN: usize = 4 << 10;
const UPCAST_BYTES_MAX: usize = 16 << 20;

impl Access {
    pub(crate) fn new<E: Event>() -> Self {
        Self { schemas: Schemas::of::<E>(), upcasted: AlignedVec::new(), scratch: None }
    }

    /// The event of the record that begins at `at` and has this exact length and header; its CRC holds, or this process
    /// wrote it. `None` where the archive is not valid.
    #[inline]
    pub(crate) fn event<'a, E: Event>(
        &'a mut self,
        memory: &'a Memory,
        at: usize,
        len: usize,
        header: &RecordHeader,
    ) -> Option<&'a E::Archived> {
        let (at, len) = (at + RECORD_HEADER_BYTES, len.checked_sub(RECORD_HEADER_BYTES)?);
        if self.schemas.current(header.event_type) == Some(header.schema_version) {
            return memory.archived::<E>(at, len);
        }
        self.upcast::<E>(memory.read(at, len)?, header.event_type, header.schema_version)
    }

    /// The event of an archive that was kept elsewhere; its CRC holds. `None` where it is not valid.
    pub(crate) fn kept<'a, E: Event>(
        &'a mut self,
        archive: &'a [u8],
        event_type: EventTypeId,
        schema_version: u16,
    ) -> Option<&'a E::Archived> {
        if self.schemas.current(event_type) == Some(schema_version) {
            return E::access(archive).ok();
        }
        self.upcast::<E>(archive, event_type, schema_version)
    }

    #[cold]
    fn upcast<E: Event>(
        &mut self,
        archive: &[u8],
        event_type: EventTypeId,
        schema_version: u16,
    ) -> Option<&E::Archived> {
        let event = (upcaster::<E>(event_type, schema_version)?.upcast)(archive).ok()?;
        let scratch = self.scratch.get_or_insert_with(|| Scratch::new(4 * UPCAST_BYTES_MAX.min(1 << 20)));
        let mut bytes = self.upcasted.len().max(UPCAST_BYTES_MIN);
        let len = loop {
            self.upcasted.resize(bytes, 0);
            match event.encode(&mut self.upcasted, scratch) {
                Some(len) => break len,
                None if bytes >= UPCAST_BYTES_MAX => return None,
                None => bytes *= 2,
            }
        };
        E::access(&self.upcasted[..len]).ok()
    }
}

/// A record that is to be folded: where it is. Its header is read again when its turn comes, which costs less than keeping it.
#[derive(Debug, Clone, Copy)]
struct Pending {
    offset: Offset,
    at: usize,
    /// 0: none.
    len: u32,
    hash: KeyHash,
    seen: Seen,
}

const NONE: Pending = Pending { offset: Offset(0), at: 0, len: 0, hash: KeyHash(0), seen: Seen(0) };

/// Records read before their keys are looked up.
const LOOK_AHEAD: usize = 16;

/// A command's rejection, whose archive has this root, as it is laid out today. `None`: it is not valid, or of another layout
/// that the program does not read.
pub(crate) fn rejection<A: Aggregate>(root: Root, archive: &[u8]) -> Option<A::Rejection> {
    if root == Root::of::<A::Rejection>() { A::Rejection::decode(archive).ok() } else { A::upgrade_rejection(archive) }
}

/// Folds records, in the order of the log, into a table.
pub(crate) struct Folder<A: Aggregate> {
    pub(crate) keys: KeyTable<A>,
    pub(crate) outcomes: Outcomes<A::Rejection>,
    shard: ShardId,
    access: Access,
    /// The records of a command of which the last is not seen yet. They count only together.
    group: Vec<Pending>,
    ahead: [Pending; LOOK_AHEAD],
    next: usize,
    /// Sequence of the next event.
    pub(crate) sequence: u64,
    /// Every key that had an event before is in the table: the first event of another one has version 1.
    pub(crate) knows_all_keys: bool,
    /// The event that is being folded.
    folding: PanickedEvent,
    /// The layout of a rejection that could not be read, where that is why reading ended.
    pub(crate) unreadable_rejection: Option<Root>,
}

/// The header of the record at `at`.
#[inline]
fn header_at(memory: &Memory, at: usize) -> Option<RecordHeader> {
    memory.read(at, RECORD_HEADER_BYTES).map(RecordHeader::decode)
}

/// What does not hold at an offset.
pub(crate) type Unreadable = (Offset, &'static str);

impl<A: Aggregate> Folder<A> {
    pub(crate) fn new(shard: ShardId, keys_expected: usize, outcomes_kept: usize) -> Self {
        Self {
            keys: KeyTable::new(keys_expected),
            outcomes: Outcomes::new(outcomes_kept),
            shard,
            access: Access::new::<A::Event>(),
            group: Vec::new(),
            ahead: [NONE; LOOK_AHEAD],
            next: 0,
            sequence: 0,
            knows_all_keys: false,
            folding: PanickedEvent { offset: Offset(0), key: Key(0), event_type: EventTypeId(0) },
            unreadable_rejection: None,
        }
    }

    /// A panic while records were taken in, put down to the event that was being folded.
    pub(crate) fn at_fault(&self, panic: CodePanic) -> CodePanic {
        CodePanic { event: (self.folding.offset.0 > 0).then_some(self.folding), ..panic }
    }

    /// Whether a command has been begun whose last record is not seen yet, and where.
    pub(crate) fn open_group(&self) -> Option<Offset> {
        self.group.first().map(|first| first.offset)
    }

    /// Gives up a command that is not whole.
    pub(crate) fn forget_group(&mut self) {
        self.group.clear();
    }

    /// Takes in the record at `at` in `memory`: an event or an outcome. Its CRC holds.
    #[inline]
    pub(crate) fn record(
        &mut self,
        memory: &Memory,
        at: usize,
        len: usize,
        header: &RecordHeader,
        offset: Offset,
    ) -> Result<(), Unreadable> {
        let hash = KeyHash::of(header.key);
        let pending = Pending { offset, at, len: len as u32, hash, seen: self.keys.look(hash) };
        if !header.more && self.group.is_empty() {
            return self.take(memory, pending, header.is_outcome());
        }
        self.group.push(pending);
        if header.more {
            return Ok(());
        }
        let mut group = std::mem::take(&mut self.group);
        let taken = group.drain(..).try_for_each(|pending| {
            let is_outcome = header_at(memory, pending.at).is_some_and(|header| header.is_outcome());
            self.take(memory, pending, is_outcome)
        });
        self.group = group;
        taken
    }

    #[inline(always)]
    fn take(&mut self, memory: &Memory, pending: Pending, is_outcome: bool) -> Result<(), Unreadable> {
        if is_outcome {
            return self.outcome(memory, &pending);
        }
        self.sequence += 1;
        // Looked up a little behind the reading, so that the key's slot has time to arrive.
        let due = std::mem::replace(&mut self.ahead[self.next], pending);
        self.next = (self.next + 1) % LOOK_AHEAD;
        if due.len == 0 { Ok(()) } else { self.fold(memory, &due) }
    }

    /// Folds what is still waiting; to be called before another segment's memory comes.
    pub(crate) fn settle(&mut self, memory: &Memory) -> Result<(), Unreadable> {
        for _ in 0..LOOK_AHEAD {
            let due = std::mem::replace(&mut self.ahead[self.next], NONE);
            if due.len > 0 {
                self.fold(memory, &due)?;
            }
            self.next = (self.next + 1) % LOOK_AHEAD;
        }
        Ok(())
    }

    #[inline(always)]
    fn fold(&mut self, memory: &Memory, due: &Pending) -> Result<(), Unreadable> {
        let &Pending { offset, at, len, hash, seen } = due;
        let header = header_at(memory, at).ok_or((offset, "a record is gone while it is read"))?;
        self.folding = PanickedEvent { offset, key: header.key, event_type: header.event_type };
        let known = self.keys.slot(header.key, hash, seen);
        if header.version <= known.version {
            // A checkpoint has it already.
            return Ok(());
        }
        if header.version.0 != known.version.0 + 1 && (known.version.0 > 0 || self.knows_all_keys) {
            return Err((offset, "the versions of a key do not follow each other"));
        }
        if size_of::<A>() > 0 {
            let event = self.access.event::<A::Event>(memory, at, len as usize, &header);
            let event = event.ok_or((offset, "an archive is not valid behind a CRC that holds"))?;
            known.state.evolve(event, &header.meta(self.shard, offset, Sequence::UNKNOWN));
            known.time_max = known.time_max.max(header.time);
        }
        (known.version, known.head) = (header.version, offset);
        Ok(())
    }

    #[cold]
    fn outcome(&mut self, memory: &Memory, pending: &Pending) -> Result<(), Unreadable> {
        let Pending { offset, at, len, .. } = pending;
        let header = header_at(memory, *at).ok_or((*offset, "a record is gone while it is read"))?;
        let body = memory.read(at + RECORD_HEADER_BYTES, *len as usize - RECORD_HEADER_BYTES).unwrap_or_default();
        let outcome = match header.ending().ok_or((*offset, "an outcome has an unknown ending"))? {
            Ending::Done { events } => Remembered::Done { version: header.version, events },
            Ending::Rejected(root) => match rejection::<A>(root, body) {
                Some(rejection) => Remembered::Rejected(rejection),
                None if root == Root::of::<A::Rejection>() => {
                    return Err((*offset, "the rejection of a command is not valid"));
                }
                None => {
                    self.unreadable_rejection = Some(root);
                    return Err((*offset, "the rejection of a command has another layout"));
                }
            },
        };
        if self.outcomes.find(header.key, header.correlation.0).is_none() {
            self.outcomes.remember(header.key, header.version, header.correlation.0, outcome);
        }
        Ok(())
    }
}
