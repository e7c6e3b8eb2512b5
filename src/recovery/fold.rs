//! Folds the events of a log into a table of states, with the `evolve` that ran when they were appended.
//!
//! One writer: the thread that recovers the shard.

use crate::error::{CodePanic, PanickedEvent, ReadError};
use crate::event::{EventTypeId, Key, KeyHash, Offset, Root, Sequence, ShardId};
use crate::log::access::Access;
use crate::log::format::{Ending, RECORD_HEADER_BYTES, RecordHeader};
use crate::log::other_keys::OtherKeys;
use crate::log::reader::{Reader, Walked};
use crate::state::aggregate::Aggregate;
use crate::state::keys::{KeyTable, Seen};
use crate::state::outcomes::rejection;
use crate::state::outcomes::{Outcomes, Remembered};
use crate::storage::memory::Memory;

/// The place of a record that will be folded. Its header is read again when it is folded, which costs less than keeping
/// it.
#[derive(Debug, Clone, Copy)]
struct Pending {
    offset: Offset,
    at: usize,
    /// 0 in an empty slot.
    len: u32,
    hash: KeyHash,
    seen: Seen,
}

const NONE: Pending = Pending { offset: Offset(0), at: 0, len: 0, hash: KeyHash(0), seen: Seen(0) };

/// Records between the prefetch of a key's slot and its use.
const LOOK_AHEAD: usize = 16;

/// Folds records, in the order of the log, into a table.
pub(crate) struct Folder<A: Aggregate> {
    pub(crate) keys: KeyTable<A>,
    pub(crate) outcomes: Outcomes<A::Rejection>,
    shard: ShardId,
    access: Access,
    /// The records of an incomplete command. They count only together.
    group: Vec<Pending>,
    ahead: [Pending; LOOK_AHEAD],
    next: usize,
    /// Sequence of the next event.
    pub(crate) sequence: u64,
    /// `true` if every key with earlier events is in the table: the first event of any other key then has version 1.
    pub(crate) knows_all_keys: bool,
    /// The event that is folded now.
    folding: PanickedEvent,
    /// The layout of the rejection that ended the reading, because it could not be read.
    pub(crate) unreadable_rejection: Option<Root>,
}

/// The header of the record at `at`.
#[inline]
fn header_at(memory: &Memory, at: usize) -> Option<RecordHeader> {
    memory.read(at, RECORD_HEADER_BYTES).map(RecordHeader::decode)
}

/// The offset of an invalid record, and the reason why it is invalid.
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

    /// Attributes a panic to the event that was being folded.
    pub(crate) fn at_fault(&self, panic: CodePanic) -> CodePanic {
        CodePanic { event: (self.folding.offset.0 > 0).then_some(self.folding), ..panic }
    }

    /// Returns the offset of an incomplete command, if there is one.
    pub(crate) fn open_group(&self) -> Option<Offset> {
        self.group.first().map(|first| first.offset)
    }

    /// Discards an incomplete command.
    pub(crate) fn forget_group(&mut self) {
        self.group.clear();
    }

    /// Adds the record at `at` in `memory`: an event or an outcome. The caller has checked its CRC.
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
            return self.add(memory, pending, header.is_outcome());
        }
        self.group.push(pending);
        if header.more {
            return Ok(());
        }
        let mut group = std::mem::take(&mut self.group);
        let added = group.drain(..).try_for_each(|pending| {
            let is_outcome = header_at(memory, pending.at).is_some_and(|header| header.is_outcome());
            self.add(memory, pending, is_outcome)
        });
        self.group = group;
        added
    }

    #[inline(always)]
    fn add(&mut self, memory: &Memory, pending: Pending, is_outcome: bool) -> Result<(), Unreadable> {
        if is_outcome {
            return self.outcome(memory, &pending);
        }
        self.sequence += 1;
        // Folding lags behind reading, so that the prefetched slot of the key has time to arrive.
        let due = std::mem::replace(&mut self.ahead[self.next], pending);
        self.next = (self.next + 1) % LOOK_AHEAD;
        if due.len == 0 { Ok(()) } else { self.fold(memory, &due) }
    }

    /// Folds every record that `reader` has left below `until`.
    pub(crate) fn read(&mut self, reader: &mut Reader<A::Event>, until: Offset) -> Result<(), ReadError> {
        reader.walk(until, |walked| match walked {
            Walked::Record { memory, at, len, header, offset } => self.record(memory, at, len, header, offset),
            Walked::SegmentEnd(memory) => self.settle(memory),
        })
    }

    /// Folds the records that lag behind. Call it before records of another segment are added.
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
        let header = header_at(memory, at).ok_or((offset, "a record has vanished while it is read"))?;
        self.folding = PanickedEvent { offset, key: header.key, event_type: header.event_type };
        let known = self.keys.slot(header.key, hash, seen);
        if header.version <= known.version {
            // The checkpoint has this event already.
            return Ok(());
        }
        if header.version.0 != known.version.0 + 1 && (known.version.0 > 0 || self.knows_all_keys) {
            return Err((offset, "the versions of a key do not follow each other"));
        }
        if size_of::<A>() > 0 {
            let event = self.access.event::<A::Event>(memory, at, len as usize, &header);
            let event = event.ok_or((offset, "an archive is invalid, although its CRC matches"))?;
            known.state.evolve(event, &header.meta(self.shard, offset, Sequence::UNKNOWN));
            known.time_max = known.time_max.max(header.time);
        }
        (known.version, known.head) = (header.version, offset);
        Ok(())
    }

    #[cold]
    fn outcome(&mut self, memory: &Memory, pending: &Pending) -> Result<(), Unreadable> {
        let Pending { offset, at, len, .. } = pending;
        let header = header_at(memory, *at).ok_or((*offset, "a record has vanished while it is read"))?;
        let body = memory.read(at + RECORD_HEADER_BYTES, *len as usize - RECORD_HEADER_BYTES).unwrap_or_default();
        let outcome = match header.ending().ok_or((*offset, "an outcome has an unknown ending"))? {
            Ending::Done { events, others } => {
                let others = OtherKeys::decode(others, body).map_err(|why| (*offset, why))?;
                Remembered::Done { version: header.version, events, others }
            }
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
