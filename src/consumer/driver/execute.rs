//! One job, run by whoever has a thread for it: finds the event, calls the handler, and says what came of it.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};

use rkyv::util::AlignedVec;

use super::super::dead_letter::answer::DeadLetter;
use super::super::effects::Call;
use super::super::health::Pass;
use super::super::lanes::answer::Run;
use crate::event::{Event, Meta, Offset, Sequence};
use crate::handler::HandlerError;
use crate::log::finder::Finder;
use crate::log::fold::Access;

/// What a consumer's owner does with events.
pub(crate) type Handler<'a, E> =
    dyn FnMut(&<E as rkyv::Archive>::Archived, &Meta, &Call<'_>) -> Result<(), HandlerError> + 'a;

/// An event or a dead letter that is out to be handled.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) desk: usize,
    pub(crate) what: What,
    pub(super) pass: Pass,
    /// Side effects below this have been had.
    effects_from: Offset,
}

#[derive(Debug)]
pub(crate) enum What {
    Event(Run),
    Letter { letter: Box<DeadLetter>, archive: AlignedVec<16> },
}

/// Why an attempt failed.
#[derive(Debug)]
pub(crate) enum Failed {
    Handler(HandlerError),
    Panic(String),
    /// Its archive is not valid, or its upcaster refused it.
    Undecodable,
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Handler(error) => error.fmt(f),
            Self::Panic(text) => write!(f, "the handler panicked: {text}"),
            Self::Undecodable => f.write_str("the event cannot be decoded"),
        }
    }
}

impl Job {
    pub(super) fn new(desk: usize, what: What, pass: Pass, effects_from: Offset) -> Self {
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
        let (event, meta) = self.event::<E>(finder, access).ok_or(Failed::Undecodable)?;
        let had = matches!(self.what, What::Event(_)) && meta.offset < self.effects_from;
        call(event, &meta, &Call::new(consumer, meta.id(), self.attempt(), had), handler)
    }

    /// The job's event. Its `meta.sequence` is not known.
    pub(crate) fn event<'a, E: Event>(
        &'a self,
        finder: &'a mut Finder,
        access: &'a mut Access,
    ) -> Option<(&'a E::Archived, Meta)> {
        match &self.what {
            What::Event(run) => {
                // Retention keeps what is not done, so it is there.
                let place = finder.find(run.offset()).ok()?;
                let meta = place.header.meta(finder.log().shard, run.offset(), Sequence::UNKNOWN);
                let event = access.event::<E>(finder.memory()?, place.at, place.len, &place.header)?;
                Some((event, meta))
            }
            What::Letter { letter, archive } => {
                let event = access.kept::<E>(archive, letter.event_type, letter.schema_version)?;
                Some((event, meta_of(letter)))
            }
        }
    }
}

/// What the log knew of a letter's event.
fn meta_of(letter: &DeadLetter) -> Meta {
    Meta {
        shard: letter.id.shard,
        offset: letter.id.offset,
        sequence: Sequence::UNKNOWN,
        key: letter.key,
        version: letter.version,
        time: letter.time,
        event_type: letter.event_type,
        schema_version: letter.schema_version,
        correlation: letter.correlation,
        previous: None,
    }
}

/// Calls a handler, whatever it does.
#[inline]
pub(super) fn call<A>(
    event: &A,
    meta: &Meta,
    call: &Call<'_>,
    handler: &mut (impl FnMut(&A, &Meta, &Call<'_>) -> Result<(), HandlerError> + ?Sized),
) -> Result<(), Failed> {
    // What a handler leaves half done is its own; nothing of ours is touched inside.
    match catch_unwind(AssertUnwindSafe(|| handler(event, meta, call))) {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(Failed::Handler(error)),
        Err(panic) => Err(Failed::Panic(panic_text(&*panic))),
    }
}

/// What a panic said.
fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no text".to_owned())
}
