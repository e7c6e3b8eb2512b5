//! One job, run by whoever has a thread for it: finds the event, calls the handler, and says what came of it.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};

use rkyv::util::AlignedVec;

use super::super::dead_letter::answer::DeadLetter;
use super::super::effects::Call;
use super::super::health::CallPermit;
use crate::consumer::key_queues::answer::InFlight;
use crate::error::ReadError;
use crate::error::{HandlerError, panic_text};
use crate::event::{Event, Meta, Offset, Sequence};
use crate::log::access::Access;
use crate::log::finder::Finder;

/// What a consumer's owner does with events.
pub(crate) type Handler<'a, E> =
    dyn FnMut(&<E as rkyv::Archive>::Archived, &Meta, &Call<'_>) -> Result<(), HandlerError> + 'a;

/// An event or a dead letter that is out to be handled.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) desk: usize,
    pub(crate) what: What,
    pub(super) pass: CallPermit,
    /// Side effects below this have been had.
    effects_from: Offset,
}

#[derive(Debug)]
pub(crate) enum What {
    Event(InFlight),
    Letter { letter: Box<DeadLetter>, archive: AlignedVec<16> },
}

/// Why an attempt failed.
#[derive(Debug)]
pub(crate) enum Failed {
    Handler(HandlerError),
    Panic(String),
    /// Its archive is not valid, or its upcaster refused it.
    Undecodable,
    /// The log does not hold it any more: no failure of the event.
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
    pub(super) fn new(desk: usize, what: What, pass: CallPermit, effects_from: Offset) -> Self {
        Self { desk, what, pass, effects_from }
    }

    /// What it is of: an event of a desk has its offset alone.
    pub(crate) fn of(&self) -> (usize, Offset) {
        match &self.what {
            What::Event(run) => (self.desk, run.offset()),
            What::Letter { letter, .. } => (self.desk, letter.id.offset),
        }
    }

    /// 1 the first time.
    pub(crate) fn attempt(&self) -> u32 {
        match &self.what {
            What::Event(run) => run.attempt(),
            What::Letter { letter, .. } => letter.attempts.saturating_add(1),
        }
    }

    /// Lets `handler` see the job's event.
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
            let had = matches!(self.what, What::Event(_)) && meta.offset < self.effects_from;
            let call = Call::new(consumer, meta.id(), self.attempt(), had);
            handler(event, &meta, &call).map_err(Failed::Handler)
        })
    }

    /// The job's event, or `None` where it cannot be decoded. Its `meta.sequence` is not known.
    pub(crate) fn event<'a, E: Event>(
        &'a self,
        finder: &'a mut Finder,
        access: &'a mut Access,
    ) -> Result<Option<(&'a E::Archived, Meta)>, ReadError> {
        match &self.what {
            What::Event(run) => {
                // Retention keeps what is not done, so it is there.
                let place = finder.find(run.offset())?;
                let meta = place.header.meta(finder.log().shard, run.offset(), Sequence::UNKNOWN);
                let memory = finder.memory();
                let event = memory.and_then(|memory| access.event::<E>(memory, place.at, place.len, &place.header));
                Ok(event.map(|event| (event, meta)))
            }
            What::Letter { letter, archive } => {
                let event = access.kept::<E>(archive, letter.event_type, letter.schema_version);
                Ok(event.map(|event| (event, letter.meta())))
            }
        }
    }
}

/// Lets the application's code run (an upcaster, the handler), whatever it does. What it leaves half done is its own; nothing of ours
/// is changed inside.
#[inline]
pub(super) fn guarded(body: impl FnOnce() -> Result<(), Failed>) -> Result<(), Failed> {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| Err(Failed::Panic(panic_text(&*panic))))
}
