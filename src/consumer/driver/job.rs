//! A job: one event or dead letter on its way through the handler, on any thread.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
#[cfg(feature = "tokio")]
use std::sync::Arc;

use rkyv::util::AlignedVec;

use crate::consumer::dead_letter::answer::DeadLetter;
#[cfg(feature = "tokio")]
use crate::consumer::delivered::Delivered;
use crate::consumer::effects::Call;
use crate::consumer::health::CallPermit;
use crate::consumer::key_queues::answer::InFlight;
use crate::error::ReadError;
use crate::error::{HandlerError, panic_text};
use crate::event::{Event, Meta, Offset, Sequence};
use crate::log::access::Access;
use crate::log::finder::Finder;

/// The application's handler of events.
pub(crate) type Handler<'a, E> =
    dyn FnMut(&<E as rkyv::Archive>::Archived, &Meta, &Call<'_>) -> Result<(), HandlerError> + 'a;

/// An event or a dead letter that is to be handled once.
#[derive(Debug)]
pub(crate) struct Job {
    /// The index of the event's shard.
    pub(crate) shard: usize,
    pub(crate) work: Work,
    pub(super) permit: CallPermit,
    /// Side effects of events below this offset have already run.
    effects_from: Offset,
}

#[derive(Debug)]
pub(crate) enum Work {
    Event(InFlight),
    Letter { letter: Box<DeadLetter>, archive: AlignedVec<16> },
}

/// The reason why an attempt failed.
#[derive(Debug)]
pub(crate) enum Failed {
    Handler(HandlerError),
    Panic(String),
    /// The archive is invalid, or its upcaster returned an error.
    Undecodable,
    /// The log no longer holds the event: the event has not failed.
    Unreadable(ReadError),
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Handler(error) => error.fmt(f),
            Self::Panic(text) => write!(f, "the handler panicked: {text}"),
            Self::Undecodable => f.write_str("the event cannot be decoded"),
            Self::Unreadable(error) => error.fmt(f),
        }
    }
}

impl Job {
    pub(super) fn new(shard: usize, work: Work, permit: CallPermit, effects_from: Offset) -> Self {
        Self { shard, work, permit, effects_from }
    }

    /// Returns the shard's index and the event's offset. They identify a job: no two in flight have the same.
    pub(crate) fn identity(&self) -> (usize, Offset) {
        match &self.work {
            Work::Event(event) => (self.shard, event.offset()),
            Work::Letter { letter, .. } => (self.shard, letter.id.offset),
        }
    }

    /// Returns the number of this attempt; the first is 1.
    pub(crate) fn attempt(&self) -> u32 {
        match &self.work {
            Work::Event(event) => event.attempt(),
            Work::Letter { letter, .. } => letter.attempts.saturating_add(1),
        }
    }

    /// Calls `handler` with the job's event.
    pub(crate) fn execute<E: Event>(
        &self,
        consumer: &str,
        finder: &mut Finder,
        access: &mut Access,
        handler: &mut Handler<'_, E>,
    ) -> Result<(), Failed> {
        guarded(|| {
            let (event, meta) =
                self.event::<E>(finder, access).map_err(Failed::Unreadable)?.ok_or(Failed::Undecodable)?;
            let call = Call::new(consumer, meta.id(), self.attempt(), self.is_rebuild(&meta));
            handler(event, &meta, &call).map_err(Failed::Handler)
        })
    }

    fn is_rebuild(&self, meta: &Meta) -> bool {
        matches!(self.work, Work::Event(_)) && meta.offset < self.effects_from
    }

    /// Returns the job's event for a handler that outlives this call.
    #[cfg(feature = "tokio")]
    pub(crate) fn deliver<E: Event>(
        &self,
        consumer: &Arc<str>,
        finder: &mut Finder,
        access: &mut Access,
    ) -> Result<Delivered<E>, Failed> {
        guarded(|| {
            let (held, meta) = match &self.work {
                Work::Event(event) => {
                    let place = finder.find(event.offset()).map_err(Failed::Unreadable)?;
                    let meta = place.header.meta(finder.log().shard, event.offset(), Sequence::UNKNOWN);
                    let (memory, lock) = finder.shared_memory().ok_or(Failed::Undecodable)?;
                    (access.hold::<E>(memory, place.at, place.len, &place.header, lock), meta)
                }
                Work::Letter { letter, archive } => {
                    (access.hold_copy::<E>(archive, letter.event_type, letter.schema_version), letter.meta())
                }
            };
            let held = held.ok_or(Failed::Undecodable)?;
            Ok(Delivered::new(held, meta, Arc::clone(consumer), self.attempt(), self.is_rebuild(&meta)))
        })
    }

    /// Returns the job's event, or `None` if it cannot be decoded. Its `meta.sequence` is unknown.
    pub(crate) fn event<'a, E: Event>(
        &'a self,
        finder: &'a mut Finder,
        access: &'a mut Access,
    ) -> Result<Option<(&'a E::Archived, Meta)>, ReadError> {
        match &self.work {
            Work::Event(event) => {
                // Retention keeps unfinished events.
                let place = finder.find(event.offset())?;
                let meta = place.header.meta(finder.log().shard, event.offset(), Sequence::UNKNOWN);
                let memory = finder.memory();
                let event = memory.and_then(|memory| access.event::<E>(memory, place.at, place.len, &place.header));
                Ok(event.map(|event| (event, meta)))
            }
            Work::Letter { letter, archive } => {
                let event = access.kept::<E>(archive, letter.event_type, letter.schema_version);
                Ok(event.map(|event| (event, letter.meta())))
            }
        }
    }
}

/// Runs the application's code (an upcaster, the handler) and turns a panic into a failure. `body` changes no state of
/// the engine, so a panic leaves nothing half done here.
#[inline]
pub(super) fn guarded<T>(body: impl FnOnce() -> Result<T, Failed>) -> Result<T, Failed> {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| Err(Failed::Panic(panic_text(&*panic))))
}
