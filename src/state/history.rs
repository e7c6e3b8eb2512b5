//! History: a key's events one by one, all keys' events of a time span, and a key's state at any time.
//!
//! Everything here reads the log in place, on the caller's thread, while the shard keeps working. Memory is bounded
//! however long a history is: a key's chain leads backwards, so a first walk notes where each part of the chain begins,
//! and the events are then read part by part.

use crate::error::{CodePanic, HistoryError, PanickedEvent, ReadError, guard};
use crate::event::{Event, EventType, Key, Offset, Sequence, ShardId, Time, Version};
use crate::log::access::Access;
use crate::log::finder::{Finder, RecordPlace};
use crate::log::format::RecordHeader;
use crate::log::reader::{Reader, Record};
use crate::state::aggregate::Aggregate;
use crate::state::snapshot::store::{Saved, SnapshotStore};

/// A moment in a key's history.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AsOf {
    /// After the key's event with this version; 0 is before its first event.
    Version(Version),
    /// Before the key's first event with a later time. (Events are ordered by version, also if an event has an earlier
    /// time than its predecessor.)
    Time(Time),
}

impl From<Version> for AsOf {
    fn from(version: Version) -> Self {
        Self::Version(version)
    }
}

impl From<Time> for AsOf {
    fn from(time: Time) -> Self {
        Self::Time(time)
    }
}

/// A key's state at a moment in its history.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct PastState<A> {
    /// The state.
    pub state: A,
    /// The version of the newest event in it.
    pub version: Version,
    /// The number of events that were applied to the nearest saved state.
    pub applied: u64,
}

/// The number of events that the log holds, by type.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Counts {
    /// Events of all types.
    pub events: u64,
    /// Events of each type, in the order of `TYPES`.
    pub by_type: Vec<(EventType, u64)>,
}

/// Events in one part of a chain: the number of offsets kept at a time.
const PART: usize = 1024;

/// A key's newest event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Head {
    pub(crate) version: Version,
    pub(crate) offset: Offset,
}

/// A key's events in order, up to the newest at the time of the call that made the stream.
pub struct Stream<E: Event> {
    key: Key,
    finder: Finder,
    access: Access,
    /// The newest offset of each part not read yet, the next part last.
    parts: Vec<Offset>,
    /// The offsets of the current part, the next event last.
    part: Vec<Offset>,
    /// The version of the next event.
    next: Version,
    until: Version,
    event: std::marker::PhantomData<fn() -> E>,
}

impl<E: Event> std::fmt::Debug for Stream<E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stream").field("key", &self.key).field("next", &self.next).finish_non_exhaustive()
    }
}

impl<E: Event> Stream<E> {
    /// The events `from..=head.version` of `key`.
    pub(crate) fn new(finder: Finder, key: Key, from: Version, head: Head) -> Result<Self, HistoryError> {
        let from = Version(from.0.max(1));
        let mut stream = Self {
            key,
            finder,
            access: Access::new::<E>(),
            parts: Vec::new(),
            part: Vec::new(),
            next: from,
            until: head.version,
            event: std::marker::PhantomData,
        };
        let mut at = head.offset;
        for version in (from.0..=head.version.0).rev() {
            // The newest event of each part, and of the whole chain.
            if (version - from.0 + 1).is_multiple_of(PART as u64) || version == head.version.0 {
                stream.parts.push(at);
            }
            at = match stream.finder.find(at) {
                Ok(place) => stream.before(at, &place, Version(version))?,
                Err(ReadError::BeyondRetention { .. }) => {
                    return Err(HistoryError::BeyondRetention { key, earliest: Version(version + 1) });
                }
                Err(error) => return Err(error.into()),
            };
        }
        Ok(stream)
    }

    /// Returns the offset of the key's previous event. Fails unless the record at `at` is `version` of the key.
    fn before(&self, at: Offset, place: &RecordPlace, version: Version) -> Result<Offset, ReadError> {
        let RecordPlace { header, .. } = place;
        if header.is_own() || header.key != self.key || header.version != version {
            return Err(self.finder.corruption(at, "a key's chain leads to a record that is not its next event"));
        }
        Ok(header.previous)
    }

    pub(crate) fn shard(&self) -> ShardId {
        self.finder.log().shard
    }

    /// The version of the next event.
    #[must_use]
    pub fn version(&self) -> Version {
        self.next
    }

    /// Returns the next event, or `None` at the end. Its `meta.sequence` is [`Sequence::UNKNOWN`].
    ///
    /// # Errors
    /// `BeyondRetention` if retention has freed the event meanwhile; `Corruption` if bytes that an earlier process
    /// wrote are damaged. The stream does not move on: the next call returns the same error, never a later event.
    #[expect(clippy::should_implement_trait, reason = "lends from the stream, which Iterator cannot")]
    pub fn next(&mut self) -> Result<Option<Record<'_, E>>, ReadError> {
        if self.next > self.until {
            return Ok(None);
        }
        if self.part.is_empty() {
            self.collect()?;
        }
        let Some(&offset) = self.part.last() else { return Ok(None) };
        let place = self.finder.find(offset)?;
        self.before(offset, &place, self.next)?;
        let damage = self.finder.corruption(offset, "an archive is not valid");
        let (shard, memory) = (self.finder.log().shard, self.finder.memory());
        let event = memory.and_then(|memory| self.access.event::<E>(memory, place.at, place.len, &place.header));
        let event = event.ok_or(damage)?;
        self.part.pop();
        self.next.0 += 1;
        Ok(Some(Record { meta: place.header.meta(shard, offset, Sequence::UNKNOWN), event }))
    }

    /// Collects the offsets of the next part.
    fn collect(&mut self) -> Result<(), ReadError> {
        let Some(&(mut at)) = self.parts.last() else { return Ok(()) };
        let last = self.until.0.min(self.next.0 + PART as u64 - 1);
        // Stored only when complete: half a part would skip the record that could not be read.
        let mut part = Vec::new();
        for version in (self.next.0..=last).rev() {
            part.push(at);
            let place = self.finder.find(at)?;
            at = self.before(at, &place, Version(version))?;
        }
        self.part = part;
        self.parts.pop();
        Ok(())
    }
}

/// All keys' events of a time span: each shard's events in the order of its log, the shards merged by time.
pub struct EventsBetween<E: Event> {
    shards: Vec<(Reader<E>, NextEvent)>,
    from: Time,
    until: Time,
}

/// A shard's next event of the span.
#[derive(Debug, Clone, Copy)]
enum NextEvent {
    Unknown,
    At(Time),
}

impl<E: Event> std::fmt::Debug for EventsBetween<E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EventsBetween").field("from", &self.from).field("until", &self.until).finish_non_exhaustive()
    }
}

impl<E: Event> EventsBetween<E> {
    pub(crate) fn new(readers: Vec<Reader<E>>, from: Time, until: Time) -> Self {
        Self { shards: readers.into_iter().map(|reader| (reader, NextEvent::Unknown)).collect(), from, until }
    }

    /// Returns the next event of the span, or `None` at the end of the log; call it again later for more.
    ///
    /// # Errors
    /// The same as for [`Reader::next`]. An error in one shard's log also holds back the other shards' events, because
    /// their order is not known.
    #[expect(clippy::should_implement_trait, reason = "lends from the readers, which Iterator cannot")]
    pub fn next(&mut self) -> Result<Option<Record<'_, E>>, ReadError> {
        let (from, until) = (self.from, self.until);
        let mut first: Option<(Time, usize)> = None;
        for (i, (reader, seen)) in self.shards.iter_mut().enumerate() {
            if let NextEvent::Unknown = seen
                && let Some(time) =
                    reader.seek(|header| header.time >= from && (header.time < until || until == Time::END))?
            {
                *seen = NextEvent::At(time);
            }
            if let NextEvent::At(time) = *seen
                && first.is_none_or(|(earliest, _)| time < earliest)
            {
                first = Some((time, i));
            }
        }
        let Some((_, i)) = first else { return Ok(None) };
        let (reader, seen) = &mut self.shards[i];
        *seen = NextEvent::Unknown;
        reader.next()
    }
}

/// Counts the events from the readers' positions on, by their headers alone.
pub(crate) fn count<E: Event>(readers: Vec<Reader<E>>) -> Result<Counts, ReadError> {
    let mut by_id = vec![0_u64; E::TYPES.iter().map(|t| usize::from(t.id.0) + 1).max().unwrap_or(0)];
    for mut reader in readers {
        reader.seek(|header| {
            if let Some(count) = by_id.get_mut(usize::from(header.event_type.0)) {
                *count += 1;
            }
            false
        })?;
    }
    let by_type: Vec<_> = E::TYPES.iter().map(|t| (*t, by_id[usize::from(t.id.0)])).collect();
    Ok(Counts { events: by_type.iter().map(|(_, count)| count).sum(), by_type })
}

/// Returns a key's state at a moment: the nearest saved state before it, with the events between applied. `head`
/// returns the key's newest event; it is called only if no state is saved after that moment. `checkpoints` adds the
/// states that checkpoints saved, which are needed if the log has lost its beginning.
pub(crate) fn state_at<A: Aggregate>(
    store: &SnapshotStore,
    finder: &mut Finder,
    key: Key,
    at: AsOf,
    checkpoints: bool,
    head: impl FnOnce() -> Result<Head, HistoryError>,
) -> Result<PastState<A>, HistoryError> {
    if at == AsOf::Version(Version(0)) {
        return Ok(PastState { state: A::default(), version: Version(0), applied: 0 });
    }
    let reaches = |saved: &Saved| match at {
        AsOf::Version(version) => saved.version <= version,
        AsOf::Time(time) => saved.time_max <= time,
    };
    let around = || match checkpoints {
        true => store.around_with_checkpoints(key, reaches),
        false => Ok(store.around(key, reaches)),
    };
    let (mut base, next) = around()?;
    // During a batch, a state is saved a moment before its event can be read.
    let appended = finder.log().appended.get();
    let upper = match next.filter(|next| next.head.0 < appended) {
        Some(next) => Head { version: next.version, offset: next.head },
        None => head()?,
    };
    if let AsOf::Version(version) = at
        && version > upper.version
    {
        return Err(HistoryError::NotYet { key, newest: upper.version });
    }
    let mut chain = Chain { key, offsets: Vec::new(), version: upper.version, at: upper.offset };
    loop {
        let state = match base {
            None => Some(A::default()),
            Some(saved) => {
                guard("upgrade", finder.log().shard, || store.read(key, &saved, |entry| entry.state::<A>()))??
            }
        };
        let Some(state) = state else {
            // Unreadable: an earlier saved state, or the log from its beginning, gives the same result.
            (base, _) = around()?;
            continue;
        };
        let from = base.map_or(Version(0), |saved| saved.version);
        chain.back_to(from, at, finder)?;
        return chain.apply(from, state, at, finder);
    }
}

/// Adds the event at fault to a panic.
fn at_event(panic: CodePanic, offset: Offset, header: &RecordHeader) -> CodePanic {
    let event = PanickedEvent { offset, key: header.key, event_type: header.event_type };
    CodePanic { event: Some(event), ..panic }
}

/// The walk from an event back to a saved state.
struct Chain {
    key: Key,
    /// Offsets of the events to apply, the newest first.
    offsets: Vec<Offset>,
    /// The next event of the walk.
    version: Version,
    at: Offset,
}

impl Chain {
    /// Walks back to the event `from`.
    fn back_to(&mut self, from: Version, at: AsOf, finder: &mut Finder) -> Result<(), HistoryError> {
        while self.version > from {
            let place = match finder.find(self.at) {
                Ok(place) => place,
                Err(ReadError::BeyondRetention { .. }) => {
                    // The first state that can be restored is the one after the earliest event held.
                    let earliest = Version(self.version.0 + 1);
                    return Err(HistoryError::BeyondRetention { key: self.key, earliest });
                }
                Err(error) => return Err(error.into()),
            };
            if place.header.is_own() || place.header.key != self.key || place.header.version != self.version {
                let why = "a key's chain leads to a record that is not its next event";
                return Err(finder.corruption(self.at, why).into());
            }
            let is_wanted = match at {
                AsOf::Version(version) => self.version <= version,
                AsOf::Time(_) => true,
            };
            if is_wanted {
                self.offsets.push(self.at);
            }
            self.version.0 -= 1;
            self.at = place.header.previous;
        }
        Ok(())
    }

    /// Applies the events of the walk to `state`, whose version is `from`.
    fn apply<A: Aggregate>(
        self,
        from: Version,
        mut state: A,
        at: AsOf,
        finder: &mut Finder,
    ) -> Result<PastState<A>, HistoryError> {
        let mut access = Access::new::<A::Event>();
        let (mut version, shard) = (from, finder.log().shard);
        for offset in self.offsets.into_iter().rev() {
            let place = finder.find(offset)?;
            let header = &place.header;
            if matches!(at, AsOf::Time(time) if header.time > time) {
                break;
            }
            let meta = header.meta(shard, offset, Sequence::UNKNOWN);
            let memory = finder.memory();
            let evolved = guard("evolve or an upcaster", shard, || {
                let event = memory.and_then(|memory| access.event::<A::Event>(memory, place.at, place.len, header));
                event.map(|event| state.evolve(event, &meta))
            });
            evolved
                .map_err(|panic| at_event(panic, offset, header))?
                .ok_or_else(|| finder.corruption(offset, "an archive is not valid"))?;
            version.0 += 1;
        }
        Ok(PastState { state, version, applied: version.0 - from.0 })
    }
}
