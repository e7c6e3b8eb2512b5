//! Appends one batch: gives each event its version and offset, writes its record, and applies it to its key's state.

use std::borrow::Borrow;

use crate::clock::wall_time;
use crate::clock::{Lateness, NOT_DUE, Nanos};
use crate::error::FailureCause;
use crate::event::{Event as _, Meta, Offset, Schemas, Sequence, ShardId, Time, Version};
use crate::lane::ring::Slot;
use crate::log::format::RecordHeader;
use crate::log::writer::{Appended, Appender, GROUP, Refused, Writer};
use crate::state::aggregate::Aggregate;
use crate::state::keys::{self, KeyTable, Seen};
use crate::state::snapshot::taker::Taker;
use crate::state::view::ViewWriter;
use crate::sync::prefetch;

/// Events of one batch with one publish time.
#[derive(Debug, Clone, Copy)]
pub(super) struct Run {
    pub(super) published: Nanos,
    pub(super) late: Option<Lateness>,
    pub(super) events: u32,
    /// The log's end after the run.
    pub(super) end: u64,
}

/// A run that is still open.
#[derive(Debug, Clone, Copy)]
struct OpenRun {
    published: Nanos,
    late: Lateness,
    first: usize,
}

impl OpenRun {
    /// The run up to the record at `end`, which belongs to event `next` of the batch. `None` if the run has no event.
    fn until(&self, next: usize, end: Offset) -> Option<Run> {
        let late = (self.late != NOT_DUE).then_some(self.late);
        let run = Run { published: self.published, late, events: (next - self.first) as u32, end: end.0 };
        (run.events > 0).then_some(run)
    }
}

/// Prefetch distance of the key table, in events: about the number of appends that one memory access takes.
const LOOK_AHEAD: usize = 16;
/// Prefetch distance of the lane's slots, in events. The slots come from the producer's core, and the look-up in the
/// key table must not wait for them.
const FETCH_AHEAD: usize = 32;

/// The parts of the core that appending a batch changes.
pub(super) struct Batch<'a, A: Aggregate> {
    pub(super) writer: &'a mut Writer,
    pub(super) keys: &'a mut KeyTable<A>,
    pub(super) views: &'a mut [Box<dyn ViewWriter<A>>],
    pub(super) taker: &'a mut Taker,
    pub(super) runs: &'a mut Vec<Run>,
    /// The appended events and the lengths of their records; `None` if there are no handlers.
    pub(super) placed: Option<&'a mut Vec<(Meta, usize)>>,
    pub(super) schemas: &'a Schemas,
    pub(super) shard: ShardId,
    pub(super) now: Nanos,
    pub(super) wall_offset: u64,
    /// Bytes appended.
    pub(super) bytes: u64,
}

impl<A: Aggregate> Batch<'_, A> {
    /// The wall time at which the batch began.
    pub(super) fn time(&self) -> Time {
        wall_time(self.now, self.wall_offset)
    }

    /// Appends a mark, which says how far the log is synced, if one is due.
    #[inline]
    pub(super) fn mark(&mut self) {
        let time = self.time();
        self.writer.mark(self.now, time);
    }

    /// Appends slots until one does not fit and no new segment is ready. Returns the number appended.
    #[inline]
    pub(super) fn append<T: Borrow<Slot<A::Event>>>(&mut self, slots: &[T]) -> Result<usize, FailureCause> {
        let mut appended = 0;
        loop {
            appended += self.append_to_segment(&slots[appended..])?;
            let time = self.time();
            if appended == slots.len() || self.writer.roll(time).is_err() {
                return Ok(appended);
            }
        }
    }

    /// Appends slots until the current segment is full. Returns the number appended.
    ///
    /// Prefetches the key table's slots of later events meanwhile.
    fn append_to_segment<T: Borrow<Slot<A::Event>>>(&mut self, slots: &[T]) -> Result<usize, FailureCause> {
        let mut seen = [Seen::default(); LOOK_AHEAD];
        for (slot, seen) in slots.iter().zip(&mut seen) {
            *seen = self.keys.look(slot.borrow().hash);
        }
        let first_sequence = self.writer.sequence();
        let mut staged = [0; GROUP];
        let mut appender = self.writer.appender(&mut staged);
        let begun = appender.offset().0;
        let mut run = OpenRun { published: 0, late: NOT_DUE, first: 0 };
        let (mut appended, mut refused) = (0, None);
        for slot in slots {
            let slot = slot.borrow();
            if let Some(coming) = slots.get(appended + FETCH_AHEAD) {
                prefetch(&coming.borrow().hash);
            }
            let seen = &mut seen[appended % LOOK_AHEAD];
            let here = *seen;
            if let Some(later) = slots.get(appended + LOOK_AHEAD) {
                *seen = self.keys.look(later.borrow().hash);
            }
            let event_type = slot.event.event_type();
            let Some(schema_version) = self.schemas.current(event_type) else {
                refused = Some(FailureCause::UndeclaredType { key: slot.key.0, event_type });
                break;
            };
            let offset = appender.offset();
            if run.published != slot.published || run.late != slot.late {
                self.runs.extend(run.until(appended, offset));
                run = OpenRun { published: slot.published, late: slot.late, first: appended };
            }
            let known = self.keys.slot(slot.key, slot.hash, here);
            let header = RecordHeader {
                time: slot.event.time().unwrap_or_else(|| wall_time(slot.published, self.wall_offset)),
                key: slot.key,
                previous: known.head,
                event_type,
                correlation: slot.event.correlation(),
                version: Version(known.version.0 + 1),
                schema_version,
                more: false,
            };
            let meta = || header.meta(self.shard, offset, Sequence(first_sequence + appended as u64));
            let len = match record(&mut appender, &header, &slot.event, meta, known, self.views, self.taker) {
                Ok(len) => len,
                Err(why) => {
                    if let Refused::TooLarge { bytes_max } = why {
                        refused = Some(FailureCause::EventTooLarge { key: slot.key.0, bytes_max });
                    }
                    break;
                }
            };
            if let Some(placed) = &mut self.placed {
                placed.push((meta(), len));
            }
            appended += 1;
        }
        let end = appender.finish();
        self.runs.extend(run.until(appended, end));
        self.bytes += end.0 - begun;
        self.writer.advance(end, appended as u64);
        refused.map_or(Ok(appended), Err)
    }
}

/// Shows a changed state to the views. (Not inlined: engines without views never call it.)
#[inline(never)]
fn show<A: Aggregate>(views: &mut [Box<dyn ViewWriter<A>>], state: &A, meta: &Meta) {
    views.iter_mut().for_each(|view| view.changed(meta.key, state, meta));
}

/// Appends one event, applies it to its key's state, and shows the state to the views. Returns the record's exact
/// length.
#[inline(always)]
pub(super) fn record<A: Aggregate>(
    appender: &mut Appender<'_, '_>,
    header: &RecordHeader,
    event: &A::Event,
    meta: impl Fn() -> Meta,
    known: &mut keys::Slot<A>,
    views: &mut [Box<dyn ViewWriter<A>>],
    taker: &mut Taker,
) -> Result<usize, Refused> {
    let offset = appender.offset();
    let Appended { event, len } = appender.append(header, event)?;
    if size_of::<A>() > 0 {
        known.state.evolve(event, &Meta { sequence: Sequence::UNKNOWN, ..meta() });
        known.time_max = known.time_max.max(header.time);
    }
    if !views.is_empty() {
        show(views, &known.state, &meta());
    }
    (known.version, known.head) = (header.version, offset);
    if size_of::<A>() > 0 && taker.is_due(header.version.0) {
        taker.take(known);
    }
    Ok(len)
}
