//! What a consumer is told before it starts: data only. Parsed once, by the builder.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::dead_letter::answer::DeadLetterPolicy;
use super::error::ConsumerError;
use super::health::HealthPolicy;
use super::retry::RetryPolicy;
use crate::consumer::key_queues::answer::QueuePolicy;
use crate::error::HandlerError;
use crate::event::{Event, EventTypeId, Time};
use crate::log::reader::Sight;

/// Where a consumer starts that has no checkpoint yet, or goes to when it is set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Start {
    /// At the earliest event the log holds.
    #[default]
    Beginning,
    /// Behind the newest event there is then.
    Latest,
    /// At each shard's first event that is not earlier than this. Times need not rise, so earlier events may follow it; every event
    /// before it is earlier.
    Time(Time),
}

/// What becomes of an event whose attempts are used up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Exhausted {
    /// It becomes a dead letter and its key is parked: later events of the key become dead letters behind it.
    #[default]
    Park,
    /// It is left out, with a record; its key goes on.
    Skip,
    /// The consumer halts, the event first in line, until it is told to go on.
    Halt,
}

/// What is to be done about one failed attempt, in the eyes of who knows the error. Where it is to be parked, skipped or to wait for a
/// gap, the event is at fault, and the service's health has nothing of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Judgement {
    /// As the retry policy says; when its attempts are used up, as [`Exhausted`] says.
    ByPolicy,
    /// Try again after this long, however often it was tried.
    RetryIn(Duration),
    /// Something is missing before it: try again when [`super::Consumer::gap_filled`] says so, or the longest wait for a gap has
    /// passed. It does not count as an attempt.
    AwaitGap,
    /// Park its key with it.
    Park,
    /// Leave it out, with a record.
    Skip,
    /// Halt the consumer.
    Halt,
}

impl Judgement {
    /// Whether it says something against the service; else the event itself is at fault, or what came before it.
    pub(crate) fn is_of_service(self) -> bool {
        match self {
            Self::ByPolicy | Self::RetryIn(_) | Self::Halt => true,
            Self::AwaitGap | Self::Park | Self::Skip => false,
        }
    }
}

/// Judges an error after so many attempts.
pub(crate) type Judge = Arc<dyn Fn(&HandlerError, u32) -> Judgement + Send + Sync>;

/// Everything that a consumer is told.
#[derive(Clone)]
pub(crate) struct Settings {
    pub(crate) name: Arc<str>,
    pub(crate) filter: Filter,
    pub(crate) start: Start,
    pub(crate) sight: Sight,
    pub(crate) concurrency: usize,
    pub(crate) lanes: QueuePolicy,
    pub(crate) retry: RetryPolicy,
    pub(crate) health: HealthPolicy,
    pub(crate) letters: DeadLetterPolicy,
    pub(crate) exhausted: Exhausted,
    pub(crate) judge: Option<Judge>,
    pub(crate) checkpoint_every: Duration,
    pub(crate) jitter_seed: u64,
}

impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Settings")
            .field("name", &self.name)
            .field("filter", &self.filter)
            .field("concurrency", &self.concurrency)
            .finish_non_exhaustive()
    }
}

/// The event types that a consumer wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Filter(Option<Box<[bool]>>);

impl Filter {
    pub(crate) fn all() -> Self {
        Self(None)
    }

    /// The types of these names.
    pub(crate) fn named<E: Event>(names: &[String]) -> Result<Self, ConsumerError> {
        if names.is_empty() {
            return Err(ConsumerError::NoTypes);
        }
        let ids = E::TYPES.iter().map(|t| usize::from(t.id.0) + 1).max().unwrap_or(0);
        let mut wanted = vec![false; ids].into_boxed_slice();
        for name in names {
            let known = E::TYPES.iter().find(|t| t.name == name);
            let known = known.ok_or_else(|| ConsumerError::UnknownType { name: name.clone() })?;
            wanted[usize::from(known.id.0)] = true;
        }
        Ok(Self(Some(wanted)))
    }

    #[inline]
    pub(crate) fn wants(&self, event_type: EventTypeId) -> bool {
        match &self.0 {
            None => true,
            Some(wanted) => wanted.get(usize::from(event_type.0)).copied().unwrap_or(false),
        }
    }
}
