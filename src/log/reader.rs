//! Reads a shard's log in place, even while the shard writes. Any thread may use a reader; it sees the log up to
//! `appended`, or only up to `durable`.

use std::marker::PhantomData;
use std::sync::Arc;
use std::task::Waker;

use rkyv::util::AlignedVec;

use crate::error::{Corruption, PositionError, ReadError};
use crate::event::{Event, Meta, Offset, Sequence, ShardId, Time};
use crate::log::access::Access;
use crate::log::format::{RECORD_HEADER_BYTES, RecordAt, RecordHeader, Seam, record_at};
use crate::log::position::Position;
use crate::log::segment::{Segment, ShardLog};
use crate::storage::Lock;
use crate::storage::framed::u32_at;
use crate::storage::memory::{ALIGN, Memory, padded};
use crate::sync::{Registration, Waiters};

/// Attempts to find the end of the log between two batches, before its newest segment is read instead.
const END_TRIES: usize = 64;

/// An item passed to the callback of [`Reader::walk`].
pub(crate) enum Walked<'a> {
    /// A record that is not a mark, in `memory`.
    Record { memory: &'a Memory, at: usize, len: usize, header: &'a RecordHeader, offset: Offset },
    /// The end of a segment with this memory: its last record has been passed.
    SegmentEnd(&'a Memory),
}

/// One event in place, borrowed from its segment.
pub struct Record<'a, E: Event> {
    /// The metadata of the event.
    pub meta: Meta,
    /// The archived event.
    pub event: &'a E::Archived,
}

impl<E: Event> std::fmt::Debug for Record<'_, E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Record").field("meta", &self.meta).finish_non_exhaustive()
    }
}

/// Reads the events of one shard's log in order.
///
/// While a reader lives, the segment at its position cannot be written again, so keep readers short-lived or moving. A
/// reader also keeps the store locked: until it is dropped, opening the store again fails with
/// [`crate::OpenError::Locked`].
///
/// ```
/// # use corelane::envelope::Envelope;
/// # use corelane::{Reader, ReadError};
/// # fn example(mut reader: Reader<Envelope>) -> Result<(), ReadError> {
/// while let Some(record) = reader.next()? {
///     println!("{} {}", record.meta.key, record.event.payload());
/// }
/// # Ok(()) }
/// ```
pub struct Reader<E: Event> {
    log: Arc<ShardLog>,
    segment: Option<Segment>,
    at: Offset,
    /// The last event passed; 0 if none.
    last: Offset,
    sequence: u64,
    sight: Sight,
    access: Access,
    event: PhantomData<fn() -> E>,
    /// The store's lock. A reader trusts the bytes that this process wrote. So no other engine may open the store and
    /// write its segments again while the reader lives, even after the reader's engine is dropped.
    _lock: Arc<dyn Lock>,
}

impl<E: Event> std::fmt::Debug for Reader<E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reader").field("shard", &self.log.shard).field("at", &self.at).finish_non_exhaustive()
    }
}

/// The watermark up to which a reader may see the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sight {
    /// Everything appended.
    Appended,
    /// Everything synced.
    Durable,
}

/// The item at the reader's position.
enum Step {
    Event(Ahead),
    /// One of the log's own records, with its length.
    Own(usize),
    NextSegment,
}

/// The event at a reader's position.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ahead {
    /// Its position in its segment, in bytes.
    pub(super) at: usize,
    pub(super) len: usize,
    pub(crate) header: RecordHeader,
}

impl<E: Event> Reader<E> {
    /// Creates a reader at the earliest event still held.
    pub(crate) fn earliest(log: Arc<ShardLog>, lock: Arc<dyn Lock>) -> Self {
        // Read before the list of segments: if the list then is empty, no event was appended when it was read.
        let of_log = log.sequence.get();
        let oldest = log.oldest().map(|oldest| (log.first_offset(oldest.index), oldest.seam.sequence));
        let (at, sequence) = oldest.unwrap_or_else(|| (Offset(log.appended.get()), of_log));
        let (access, sight) = (Access::new::<E>(), Sight::Appended);
        Self { log, segment: None, at, last: Offset(0), sequence, sight, access, event: PhantomData, _lock: lock }
    }

    /// Creates a reader at the end of the appended log: it returns the events appended from now on.
    pub(crate) fn latest(log: Arc<ShardLog>, lock: Arc<dyn Lock>) -> Result<Self, ReadError> {
        for _ in 0..END_TRIES {
            if let Some((at, sequence)) = log.end_and_sequence() {
                return Ok(Self { at, sequence, ..Self::earliest(log, lock) });
            }
        }
        // The shard has been suspended while it published, or has failed there.
        let end = Offset(log.appended.get());
        Self::at(log, end, lock)
    }

    /// Creates a reader at the record that begins at `offset`, or at the end of the log.
    pub(crate) fn at(log: Arc<ShardLog>, offset: Offset, lock: Arc<dyn Lock>) -> Result<Self, ReadError> {
        let earliest = log.earliest();
        let shard = log.shard;
        if offset < earliest {
            return Err(ReadError::BeyondRetention { shard, asked: offset, earliest });
        }
        // The end of a completely filled segment still belongs to that segment.
        let index = log.segment_of(Offset(offset.0.saturating_sub(1)));
        let (start, sequence) = (log.first_offset(index), log.first_sequence(index));
        let mut reader = Self { at: start, sequence, ..Self::earliest(log, lock) };
        // Records do not store their sequence, so it is counted from the beginning of the segment.
        while reader.at < offset {
            match reader.step()? {
                Some(Step::Event(ahead)) => reader.pass(&ahead),
                Some(Step::Own(len)) => reader.at.0 += padded(len) as u64,
                // `offset` is beyond the segment's end, unless `leave` reports a hole.
                Some(Step::NextSegment) => {
                    reader.leave()?;
                    return Err(ReadError::NotARecord { shard, offset });
                }
                None => return Err(ReadError::NotARecord { shard, offset }),
            }
        }
        if reader.at == offset { Ok(reader) } else { Err(ReadError::NotARecord { shard, offset }) }
    }

    /// Returns the offset at which the next event will be read.
    #[must_use]
    pub fn offset(&self) -> Offset {
        self.at
    }

    /// Returns the next event, or `None` at the end of the appended log. Later calls return events appended since.
    ///
    /// # Errors
    /// Returns `BeyondRetention` if the position was freed, and `Corruption` if bytes that an earlier process wrote are
    /// damaged or missing. No event is passed: the next call returns the same error, never a later event.
    #[expect(clippy::should_implement_trait, reason = "lends from the reader, which `Iterator` cannot do")]
    pub fn next(&mut self) -> Result<Option<Record<'_, E>>, ReadError> {
        match self.ahead(|_| true)? {
            Some(ahead) => self.take(&ahead).map(Some),
            None => Ok(None),
        }
    }

    /// Returns the event at the position in place, and moves past it. Does not move if the archive is invalid.
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

    /// Moves to the next event whose header is wanted, and returns it without passing it.
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

    /// Returns the metadata of the event at the position.
    #[inline]
    pub(crate) fn meta(&self, ahead: &Ahead) -> Meta {
        ahead.header.meta(self.log.shard, self.at, Sequence(self.sequence))
    }

    /// Returns the event at the position in place, or `None` if its archive is invalid.
    #[inline]
    pub(crate) fn event(&mut self, ahead: &Ahead) -> Option<&E::Archived> {
        self.access.event::<E>(&self.segment.as_ref()?.memory, ahead.at, ahead.len, &ahead.header)
    }

    /// Moves past the event at the position.
    #[inline]
    pub(crate) fn pass(&mut self, ahead: &Ahead) {
        self.last = self.at;
        self.at.0 += padded(ahead.len) as u64;
        self.sequence += 1;
    }

    /// Moves to the earliest event still held, after a `BeyondRetention` error. Returns the number of events passed
    /// over, or `None` if the log holds no segment.
    pub(super) fn skip_freed(&mut self) -> Option<u64> {
        let oldest = self.log.oldest()?;
        let missed = oldest.seam.sequence.saturating_sub(self.sequence);
        (self.at, self.sequence) = (self.log.first_offset(oldest.index), oldest.seam.sequence);
        self.segment = Some(oldest);
        Some(missed)
    }

    /// Moves to the end of the appended log.
    pub(super) fn skip_to_latest(&mut self) -> Result<(), ReadError> {
        let latest = Self::latest(Arc::clone(&self.log), Arc::clone(&self._lock))?;
        (self.at, self.sequence, self.last, self.segment) = (latest.at, latest.sequence, latest.last, latest.segment);
        Ok(())
    }

    /// Returns `true` if the event at the position has the current layout of its type and a valid archive.
    #[inline]
    pub(super) fn is_valid(&self, ahead: &Ahead) -> bool {
        let (at, len) = (ahead.at + RECORD_HEADER_BYTES, ahead.len.saturating_sub(RECORD_HEADER_BYTES));
        let is_valid = |memory: &Arc<Memory>| memory.archived::<E>(at, len).is_some();
        self.access.is_current(&ahead.header) && self.memory().is_some_and(is_valid)
    }

    /// Returns the archive of the event at the position, upcasted from its older layout, or `None` if that fails.
    #[cold]
    pub(super) fn upcasted(&mut self, ahead: &Ahead) -> Option<AlignedVec<ALIGN>> {
        let memory = &self.segment.as_ref()?.memory;
        let archive = memory.read(ahead.at + RECORD_HEADER_BYTES, ahead.len.checked_sub(RECORD_HEADER_BYTES)?)?;
        self.access.upcasted::<E>(archive, &ahead.header)
    }

    /// Releases the segment at the position, so that it can be freed and written again.
    pub(super) fn release(&mut self) {
        self.segment = None;
    }

    /// Returns the memory of the segment at the position, if the reader holds it.
    #[inline]
    pub(super) fn memory(&self) -> Option<&Arc<Memory>> {
        self.segment.as_ref().map(|segment| &segment.memory)
    }

    pub(super) fn log(&self) -> &Arc<ShardLog> {
        &self.log
    }

    pub(super) fn lock(&self) -> &Arc<dyn Lock> {
        &self._lock
    }

    /// Limits the reader to the watermark `sight`.
    pub(crate) fn with_sight(self, sight: Sight) -> Self {
        Self { sight, ..self }
    }

    pub(crate) fn shard(&self) -> ShardId {
        self.log.shard
    }

    /// Registers a task, which is woken when more events become visible. The caller must check again afterwards.
    pub(crate) fn register(&self, registration: &mut Registration, waker: &Waker) {
        self.waiters().register(registration, self.horizon().0 + 1, waker);
    }

    /// As [`Reader::register`], for a thread.
    pub(crate) fn register_thread(&self, registration: &mut Registration, waker: &Waker) {
        self.waiters().register_own(registration, self.horizon().0 + 1, waker);
    }

    fn waiters(&self) -> &Waiters {
        match self.sight {
            Sight::Appended => &self.log.grown,
            Sight::Durable => &self.log.synced,
        }
    }

    /// Returns the sequence of the next event.
    pub(crate) fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Returns the last event passed; 0 if none.
    pub(crate) fn last(&self) -> Offset {
        self.last
    }

    /// Returns the CRC word of the last event passed, or `None` if no event was passed or the event has been freed
    /// since.
    pub(crate) fn last_check(&self) -> Option<u32> {
        let index = self.log.segment_of(self.last);
        let own = self.segment.as_ref().filter(|segment| segment.index == index).cloned();
        let segment = own.or_else(|| self.log.segment(index)).filter(|_| self.last.0 > 0)?;
        let at = (self.last.0 - index * self.log.segment_bytes) as usize;
        segment.memory.read(at, RECORD_HEADER_BYTES).map(|head| u32_at(head, 4))
    }

    /// Returns the position of the next event, to be saved. The position identifies the log by the last event before
    /// it.
    ///
    /// # Errors
    /// Returns `BeyondRetention` if the event before the position has been freed since, and otherwise the error of
    /// reading.
    pub fn position(&self) -> Result<Position, ReadError> {
        let (shard, sequence) = (self.log.shard, Sequence(self.sequence));
        let behind = |reader: &Self| reader.last_check().map(|check| (reader.last, check));
        let mut witness = behind(self);
        if witness.is_none() && self.last.0 > 0 {
            let earliest = self.log.earliest();
            return Err(ReadError::BeyondRetention { shard, asked: self.last, earliest });
        }
        // No event has been passed yet: the last event is in an earlier segment.
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

    /// As [`Reader::position`], but for a reader that has moved on from `before` and holds back retention.
    pub(crate) fn position_after(&self, before: &Position) -> Position {
        let witness = match before.last() {
            (last, _) if self.last > last => self.last_check().map(|check| (self.last, check)),
            witness => Some(witness),
        };
        let (shard, sequence) = (self.log.shard, Sequence(self.sequence));
        match witness.filter(|(last, _)| last.0 > 0) {
            Some(witness) => Position::behind(self.log.store, shard, self.at, witness, sequence),
            None => Position::unwitnessed(self.log.store, shard, self.at, sequence),
        }
    }

    /// Returns the watermark up to which the reader may see the log now.
    #[inline]
    pub(crate) fn horizon(&self) -> Offset {
        Offset(match self.sight {
            Sight::Appended => self.log.appended.get(),
            Sight::Durable => self.log.durable.get(),
        })
    }

    /// Returns the item at the position without moving.
    #[inline]
    fn step(&mut self) -> Result<Option<Step>, ReadError> {
        // The watermark is read first: everything below it is complete, in every segment.
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
        // In the segment being written, only bytes below the watermark may be read.
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

    /// Moves to the next event whose header is wanted, and returns its time. Reads only headers.
    pub(crate) fn seek(&mut self, is_wanted: impl FnMut(&RecordHeader) -> bool) -> Result<Option<Time>, ReadError> {
        Ok(self.ahead(is_wanted)?.map(|ahead| ahead.header.time))
    }

    /// As [`Reader::seek`], but passes over events that retention frees meanwhile.
    pub(super) fn seek_held(&mut self, mut is_wanted: impl FnMut(&RecordHeader) -> bool) -> Result<(), ReadError> {
        while let Err(error) = self.seek(&mut is_wanted) {
            let is_freed = matches!(error, ReadError::BeyondRetention { .. });
            if !is_freed || self.skip_freed().is_none() {
                return Err(error);
            }
        }
        Ok(())
    }

    /// Passes to `take` every record below `until` except marks, and each segment's memory when the reader leaves the
    /// segment.
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

    /// Moves to the next segment, if the log continues there.
    #[cold]
    fn leave(&mut self) -> Result<(), ReadError> {
        let Some(segment) = &self.segment else { return Ok(()) };
        // The index comes from the segment, not from the position: after a completely filled segment the position is
        // already in the next one.
        let next = segment.index + 1;
        let here = Seam { end: self.at, salt: segment.salt, sequence: self.sequence };
        let start = self.log.first_offset(next);
        let Some(next) = self.log.segment(next) else {
            let (shard, earliest) = (self.log.shard, self.log.earliest());
            if start >= earliest {
                // This is damage: `appended` is beyond the position, and a segment enters the list before `appended`
                // reaches it.
                return Err(self.corruption("a zero length word before the end of the log").into());
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

    pub(super) fn corruption(&self, why: &'static str) -> Corruption {
        let segment = self.segment.as_ref().map_or(self.log.segment_of(self.at), |segment| segment.index);
        Corruption { shard: self.log.shard, segment, offset: self.at, why }
    }
}

impl Position {
    /// Creates a reader that continues at this position.
    ///
    /// # Errors
    /// Returns `Position` if the position does not belong to this log, and `BeyondRetention` if retention has freed the
    /// position.
    pub(crate) fn reader<E: Event>(&self, log: &Arc<ShardLog>, lock: &Arc<dyn Lock>) -> Result<Reader<E>, ReadError> {
        self.check(log, lock)?;
        let (shard, position) = (log.shard, self.offset);
        let other = |why| ReadError::from(PositionError::OtherHistory { shard, position, why });
        let reader = Reader::at(Arc::clone(log), position, Arc::clone(lock));
        let reader = reader.map_err(|error| match error {
            ReadError::NotARecord { .. } => other("no event ends at the offset of the position"),
            error => error,
        })?;
        let (sequence, last) = (Sequence(reader.sequence), reader.last());
        if sequence != self.sequence {
            return Err(other("the number of events before the position differs"));
        }
        if last.0 > 0 && self.last.0 > 0 && last != self.last {
            return Err(other("the last event before the position differs"));
        }
        Ok(reader)
    }
}
