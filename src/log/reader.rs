//! Reads a shard's log in place, also while the shard writes. Any thread; sees what is `appended`.

use std::marker::PhantomData;
use std::sync::Arc;
use std::task::Waker;

use crate::error::{Corruption, PositionError, ReadError};
use crate::event::{Event, Meta, Offset, Sequence, ShardId, Time};
use crate::log::access::Access;
use crate::log::format::{RECORD_HEADER_BYTES, RecordAt, RecordHeader, Seam, record_at};
use crate::log::position::Position;
use crate::log::segment::{Segment, ShardLog};
use crate::storage::Lock;
use crate::storage::framed::u32_at;
use crate::storage::memory::Memory;
use crate::storage::memory::padded;

/// What [`Reader::walk`] meets.
pub(crate) enum Walked<'a> {
    /// A record other than a mark, in `memory`.
    Record { memory: &'a Memory, at: usize, len: usize, header: &'a RecordHeader, offset: Offset },
    /// The last record of this memory has been handed out.
    SegmentEnd(&'a Memory),
}

/// One event in place: borrowed from the segment it lies in.
pub struct Record<'a, E: Event> {
    /// What the log knows of it.
    pub meta: Meta,
    /// The archived event.
    pub event: &'a E::Archived,
}

impl<E: Event> std::fmt::Debug for Record<'_, E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Record").field("meta", &self.meta).finish_non_exhaustive()
    }
}

/// A position in one shard's log that moves over its events.
///
/// While it lives, the segment it stands in is not written again, so keep readers short-lived or moving. It also
/// keeps the store locked: until it is dropped, opening the store again is [`crate::OpenError::Locked`].
pub struct Reader<E: Event> {
    log: Arc<ShardLog>,
    segment: Option<Segment>,
    at: Offset,
    /// The event passed last; 0: none yet.
    last: Offset,
    sequence: u64,
    sight: Sight,
    access: Access,
    event: PhantomData<fn() -> E>,
    /// The store's lock. A reader trusts what this process wrote, so while it lives no other engine may open
    /// the store and write its segments again, also when its own engine is gone.
    _lock: Arc<dyn Lock>,
}

impl<E: Event> std::fmt::Debug for Reader<E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reader").field("shard", &self.log.shard).field("at", &self.at).finish_non_exhaustive()
    }
}

/// How far a reader may see.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sight {
    /// What is appended.
    Appended,
    /// What has been synced.
    Durable,
}

/// What lies at the reader's position.
enum Step {
    Event(Ahead),
    /// A record of the log's own.
    Own(usize),
    NextSegment,
}

/// The event before which a reader stands.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ahead {
    /// In its segment.
    at: usize,
    len: usize,
    pub(crate) header: RecordHeader,
}

impl<E: Event> Reader<E> {
    /// At the earliest event still held.
    pub(crate) fn earliest(log: Arc<ShardLog>, lock: Arc<dyn Lock>) -> Self {
        let at = log.earliest();
        let (access, sight) = (Access::new::<E>(), Sight::Appended);
        Self { log, segment: None, at, last: Offset(0), sequence: 0, sight, access, event: PhantomData, _lock: lock }
    }

    /// At the record that begins at `offset` (or at the end of the log).
    pub(crate) fn at(log: Arc<ShardLog>, offset: Offset, lock: Arc<dyn Lock>) -> Result<Self, ReadError> {
        let earliest = log.earliest();
        let shard = log.shard;
        if offset < earliest {
            return Err(ReadError::BeyondRetention { shard, asked: offset, earliest });
        }
        // The end of a segment filled to its last byte still belongs to that segment.
        let start = log.first_offset(log.segment_of(Offset(offset.0.saturating_sub(1))));
        let mut reader = Self { at: start, ..Self::earliest(log, lock) };
        // The sequence is not stored with a record, so it is counted from the segment's beginning.
        while reader.at < offset {
            match reader.step()? {
                Some(Step::Event(ahead)) => reader.pass(&ahead),
                Some(Step::Own(len)) => reader.at.0 += padded(len) as u64,
                // Behind the segment's end, unless that is a hole.
                Some(Step::NextSegment) => {
                    reader.leave()?;
                    return Err(ReadError::NotARecord { shard, offset });
                }
                None => return Err(ReadError::NotARecord { shard, offset }),
            }
        }
        if reader.at == offset { Ok(reader) } else { Err(ReadError::NotARecord { shard, offset }) }
    }

    /// Where the next event will be read.
    #[must_use]
    pub fn offset(&self) -> Offset {
        self.at
    }

    /// The next event, or `None` at the end of what is appended; call again later for more.
    ///
    /// # Errors
    /// `BeyondRetention` when the position was freed, `Corruption` when bytes that come from before
    /// this process do not hold or are missing. The position stays: the next call says the same, and never what follows.
    #[expect(clippy::should_implement_trait, reason = "lends from the reader, which Iterator cannot")]
    pub fn next(&mut self) -> Result<Option<Record<'_, E>>, ReadError> {
        match self.ahead(|_| true)? {
            Some(ahead) => self.take(&ahead).map(Some),
            None => Ok(None),
        }
    }

    /// The event ahead, in place, and goes on behind it. Where its archive is not valid, the position stays.
    #[inline]
    pub(crate) fn take(&mut self, ahead: &Ahead) -> Result<Record<'_, E>, ReadError> {
        let (meta, damage) = (self.meta(ahead), self.corruption("an archive is not valid"));
        let memory = self.segment.as_ref().map(|segment| &segment.memory);
        let event = memory.and_then(|memory| self.access.event::<E>(memory, ahead.at, ahead.len, &ahead.header));
        let event = event.ok_or(damage)?;
        self.last = self.at;
        self.at.0 += padded(ahead.len) as u64;
        self.sequence += 1;
        Ok(Record { meta, event })
    }

    /// Moves past events until one is wanted, by its header, and stands before it.
    #[inline]
    pub(crate) fn ahead(
        &mut self,
        mut is_wanted: impl FnMut(&RecordHeader) -> bool,
    ) -> Result<Option<Ahead>, ReadError> {
        loop {
            match self.step()? {
                None => return Ok(None),
                Some(Step::Event(ahead)) if is_wanted(&ahead.header) => return Ok(Some(ahead)),
                Some(Step::Event(ahead)) => self.pass(&ahead),
                Some(Step::Own(len)) => self.at.0 += padded(len) as u64,
                Some(Step::NextSegment) => self.leave()?,
            }
        }
    }

    /// What the log knows of the event ahead.
    #[inline]
    pub(crate) fn meta(&self, ahead: &Ahead) -> Meta {
        ahead.header.meta(self.log.shard, self.at, Sequence(self.sequence))
    }

    /// The event ahead, in place; `None` where its archive is not valid.
    #[inline]
    pub(crate) fn event(&mut self, ahead: &Ahead) -> Option<&E::Archived> {
        self.access.event::<E>(&self.segment.as_ref()?.memory, ahead.at, ahead.len, &ahead.header)
    }

    /// Goes on behind the event ahead.
    #[inline]
    pub(crate) fn pass(&mut self, ahead: &Ahead) {
        self.last = self.at;
        self.at.0 += padded(ahead.len) as u64;
        self.sequence += 1;
    }

    /// To see only so far.
    pub(crate) fn with_sight(self, sight: Sight) -> Self {
        Self { sight, ..self }
    }

    pub(crate) fn shard(&self) -> ShardId {
        self.log.shard
    }

    /// Lets the log wake somebody when more may be seen. To be looked at again afterwards.
    pub(crate) fn register(&self, waker: &Waker) {
        let target = self.horizon().0 + 1;
        match self.sight {
            Sight::Appended => self.log.grown.register(target, waker),
            Sight::Durable => self.log.synced.register(target, waker),
        }
    }

    /// Sequence of the next event; not exact before the first was looked at.
    pub(crate) fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Sequence of the next event, also where nothing was looked at yet.
    pub(crate) fn sequence_here(&self) -> Sequence {
        // Before the list: where it has no such segment even now, nothing lay behind the position when this was read.
        let of_log = self.log.sequence.get();
        if self.segment.is_some() || self.last.0 > 0 {
            return Sequence(self.sequence);
        }
        let index = self.log.segment_of(self.at);
        Sequence(self.log.segment(index).map_or(of_log, |segment| segment.seam.sequence))
    }

    /// The last event before the position that was passed or looked past; 0: none was.
    pub(crate) fn last(&self) -> Offset {
        self.last
    }

    /// The CRC word of the event passed last; `None` where none was, or it was freed meanwhile.
    pub(crate) fn last_check(&self) -> Option<u32> {
        let index = self.log.segment_of(self.last);
        let own = self.segment.as_ref().filter(|segment| segment.index == index).cloned();
        let segment = own.or_else(|| self.log.segment(index)).filter(|_| self.last.0 > 0)?;
        let at = (self.last.0 - index * self.log.segment_bytes) as usize;
        segment.memory.read(at, RECORD_HEADER_BYTES).map(|head| u32_at(head, 4))
    }

    /// Returns the position of the next event, to be saved. It identifies the log by the event before it.
    ///
    /// # Errors
    /// `BeyondRetention` when the event before it was freed meanwhile; what reading found.
    pub fn position(&self) -> Result<Position, ReadError> {
        let (shard, sequence) = (self.log.shard, self.sequence_here());
        let behind = |reader: &Self| reader.last_check().map(|check| (reader.last, check));
        let mut witness = behind(self);
        if witness.is_none() && self.last.0 > 0 {
            let earliest = self.log.earliest();
            return Err(ReadError::BeyondRetention { shard, asked: self.last, earliest });
        }
        // Nothing was passed yet: the last event lies in a segment before.
        let mut index = self.log.segment_of(Offset(self.at.0.saturating_sub(1)));
        while witness.is_none() && self.log.segment(index).is_some() {
            let mut before = Self {
                at: self.log.first_offset(index),
                ..Self::earliest(Arc::clone(&self.log), Arc::clone(&self._lock))
            };
            while before.at < self.at
                && let Some(step) = before.step()?
            {
                match step {
                    Step::Event(ahead) => before.pass(&ahead),
                    Step::Own(len) => before.at.0 += padded(len) as u64,
                    Step::NextSegment => break,
                }
            }
            witness = behind(&before);
            let Some(next) = index.checked_sub(1) else { break };
            index = next;
        }
        Ok(match witness {
            Some(witness) => Position::behind(self.log.store, shard, self.at, witness, sequence),
            None => Position::unwitnessed(self.log.store, shard, self.at, sequence),
        })
    }

    /// As [`Reader::position`], of a reader that has gone on from `before`; for readers that hold back retention.
    pub(crate) fn position_after(&self, before: &Position) -> Position {
        let witness = match before.last() {
            (last, _) if self.last > last => self.last_check().map(|check| (self.last, check)),
            witness => Some(witness),
        };
        let (shard, sequence) = (self.log.shard, self.sequence_here());
        match witness.filter(|(last, _)| last.0 > 0) {
            Some(witness) => Position::behind(self.log.store, shard, self.at, witness, sequence),
            None => Position::unwitnessed(self.log.store, shard, self.at, sequence),
        }
    }

    /// How far it may see now.
    #[inline]
    pub(crate) fn horizon(&self) -> Offset {
        Offset(match self.sight {
            Sight::Appended => self.log.appended.get(),
            Sight::Durable => self.log.durable.get(),
        })
    }

    /// Looks at the position without moving it.
    #[inline]
    fn step(&mut self) -> Result<Option<Step>, ReadError> {
        // The watermark first: whatever lies below it is complete, whichever segment it is in.
        let horizon = self.horizon().0;
        if self.at.0 >= horizon {
            return Ok(None);
        }
        if self.segment.is_none() {
            self.enter()?;
        }
        let Some(segment) = &self.segment else { return Ok(None) };
        let base = segment.index * self.log.segment_bytes;
        let at = (self.at.0 - base) as usize;
        // In the segment being written only bytes below the watermark may be looked at.
        let end = (horizon - base).min(self.log.segment_bytes) as usize;
        let Some(tail) = segment.memory.read(at, end.min(segment.memory.committed()).saturating_sub(at)) else {
            return Ok(Some(Step::NextSegment));
        };
        if tail.len() < RECORD_HEADER_BYTES {
            return Ok(Some(Step::NextSegment));
        }
        let len = if segment.memory.is_own(at) {
            u32_at(tail, 0) as usize
        } else {
            match record_at(tail, segment.salt) {
                RecordAt::Record(len) => len,
                RecordAt::End => 0,
                RecordAt::Damaged(why) => return Err(self.corruption(why).into()),
            }
        };
        if len == 0 {
            return Ok(Some(Step::NextSegment));
        }
        let header = RecordHeader::decode(tail);
        if header.is_own() {
            return Ok(Some(Step::Own(len)));
        }
        Ok(Some(Step::Event(Ahead { at, len, header })))
    }

    #[cold]
    fn enter(&mut self) -> Result<(), ReadError> {
        let index = self.log.segment_of(self.at);
        let Some(segment) = self.log.segment(index) else {
            return Err(ReadError::BeyondRetention {
                shard: self.log.shard,
                asked: self.at,
                earliest: self.log.earliest(),
            });
        };
        if self.at <= self.log.first_offset(index) {
            self.at = self.log.first_offset(index);
            self.sequence = segment.seam.sequence;
        }
        self.segment = Some(segment);
        Ok(())
    }

    /// Moves past events until one is wanted, and says when that was; only headers are looked at. Stands before it then.
    pub(crate) fn seek(&mut self, is_wanted: impl FnMut(&RecordHeader) -> bool) -> Result<Option<Time>, ReadError> {
        Ok(self.ahead(is_wanted)?.map(|ahead| ahead.header.time))
    }

    /// Hands every record below `until` to `take` (marks left out), and each segment's memory when it is left.
    pub(crate) fn walk(
        &mut self,
        until: Offset,
        mut take: impl FnMut(Walked<'_>) -> Result<(), (Offset, &'static str)>,
    ) -> Result<(), ReadError> {
        let shard = self.log.shard;
        while self.at < until {
            let step = self.step()?;
            let Some(segment) = &self.segment else { break };
            let unreadable = |(offset, why): (Offset, _)| Corruption { shard, segment: segment.index, offset, why };
            let at = (self.at.0 - segment.index * self.log.segment_bytes) as usize;
            let (len, events) = match step {
                None => break,
                Some(Step::NextSegment) => {
                    take(Walked::SegmentEnd(&segment.memory)).map_err(unreadable)?;
                    self.leave()?;
                    continue;
                }
                Some(Step::Own(len)) => (len, 0),
                Some(Step::Event(Ahead { len, .. })) => (len, 1),
            };
            let header = RecordHeader::decode(segment.memory.read(at, len).unwrap_or_default());
            if !header.is_mark() {
                let record = Walked::Record { memory: &segment.memory, at, len, header: &header, offset: self.at };
                take(record).map_err(unreadable)?;
            }
            self.at.0 += padded(len) as u64;
            self.sequence += events;
        }
        if let Some(segment) = &self.segment {
            let unreadable = |(offset, why): (Offset, _)| Corruption { shard, segment: segment.index, offset, why };
            take(Walked::SegmentEnd(&segment.memory)).map_err(unreadable)?;
        }
        Ok(())
    }

    /// Goes over to the next segment, if the log goes on there from here.
    #[cold]
    fn leave(&mut self) -> Result<(), ReadError> {
        let Some(segment) = &self.segment else { return Ok(()) };
        // From the segment, not from the position: that of a segment filled to its last byte lies in the next.
        let next = segment.index + 1;
        let here = Seam { end: self.at, salt: segment.salt, sequence: self.sequence };
        let start = self.log.first_offset(next);
        let Some(next) = self.log.segment(next) else {
            let (shard, earliest) = (self.log.shard, self.log.earliest());
            if start >= earliest {
                // The watermark lies further on, and a segment is in the list before it does.
                return Err(self.corruption("a zero length word lies before the end of the log").into());
            }
            (self.at, self.segment) = (start, None);
            return Err(ReadError::BeyondRetention { shard, asked: start, earliest });
        };
        if let Some(why) = next.seam.breaks_after(&here) {
            return Err(self.corruption(why).into());
        }
        (self.at, self.segment) = (start, Some(next));
        Ok(())
    }

    fn corruption(&self, why: &'static str) -> Corruption {
        let segment = self.segment.as_ref().map_or(self.log.segment_of(self.at), |segment| segment.index);
        Corruption { shard: self.log.shard, segment, offset: self.at, why }
    }
}

impl Position {
    /// A reader that goes on here.
    ///
    /// # Errors
    /// `Position` where it is none of this log's, `BeyondRetention` where it was freed.
    pub(crate) fn reader<E: Event>(&self, log: &Arc<ShardLog>, lock: &Arc<dyn Lock>) -> Result<Reader<E>, ReadError> {
        self.check(log, lock)?;
        let (shard, position) = (log.shard, self.offset);
        let other = |why| ReadError::from(PositionError::OtherHistory { shard, position, why });
        let reader = Reader::at(Arc::clone(log), position, Arc::clone(lock));
        let reader = reader.map_err(|error| match error {
            ReadError::NotARecord { .. } => other("no event ends there"),
            error => error,
        })?;
        let (sequence, last) = (reader.sequence_here(), reader.last());
        if sequence != self.sequence {
            return Err(other("another number of events lies before it"));
        }
        if last.0 > 0 && self.last.0 > 0 && last != self.last {
            return Err(other("another event is the last one before it"));
        }
        Ok(reader)
    }
}
