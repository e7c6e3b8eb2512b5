//! A consumer's settings. Data only; the builder checks them once.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::dead_letter::answer::DeadLetterPolicy;
use super::health::HealthPolicy;
use super::retry::RetryPolicy;
use crate::consumer::key_queues::answer::QueuePolicy;
use crate::error::HandlerError;
use crate::event::Time;
pub(crate) use crate::event::TypeFilter as Filter;
use crate::log::reader::Sight;

/// The place where a new consumer starts, or to which a consumer is set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Start {
    /// At the earliest event that the log holds.
    #[default]
    Beginning,
    /// After the newest event.
    Latest,
    /// At each shard's first event at or after this time. Times may fall, so events with earlier times may follow that
    /// event; every event before it has an earlier time.
    Time(Time),
}

/// The policy for an event whose attempts are used up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Exhausted {
    /// The event becomes a dead letter and its key is parked: later events of the key become dead letters behind it.
    #[default]
    Park,
    /// The event is skipped, with a record, and its key continues.
    Skip,
    /// The consumer halts until it is resumed. The event stays the first of its key.
    Halt,
}

/// The application's decision about one failed attempt. `Park`, `Skip` and `AwaitGap` blame the event and leave the
/// service's health unchanged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Judgement {
    /// Follow the retry policy and, when its attempts are used up, [`Exhausted`].
    ByPolicy,
    /// Try again after this long, however many attempts were made.
    RetryIn(Duration),
    /// An event is missing before this one: try again after [`super::Consumer::gap_filled`], or when
    /// [`super::QueuePolicy::gap_wait_max`] has passed. It does not count as an attempt.
    AwaitGap,
    /// Park the key, with this event as its first dead letter.
    Park,
    /// Skip the event, with a record.
    Skip,
    /// Halt the consumer.
    Halt,
}

impl Judgement {
    /// Returns `true` if the judgement blames the service, not the event.
    pub(crate) fn blames_service(self) -> bool {
        match self {
            Self::ByPolicy | Self::RetryIn(_) | Self::Halt => true,
            Self::AwaitGap | Self::Park | Self::Skip => false,
        }
    }
}

/// Judges an error; the number is the attempt's.
pub(crate) type Judge = Arc<dyn Fn(&HandlerError, u32) -> Judgement + Send + Sync>;

/// All settings of a consumer.
#[derive(Clone)]
pub(crate) struct Settings {
    pub(crate) name: Arc<str>,
    pub(crate) filter: Filter,
    pub(crate) start: Start,
    pub(crate) sight: Sight,
    pub(crate) concurrency: usize,
    pub(crate) queues: QueuePolicy,
    pub(crate) retry: RetryPolicy,
    pub(crate) health: HealthPolicy,
    pub(crate) letters: DeadLetterPolicy,
    pub(crate) exhausted: Exhausted,
    pub(crate) judge: Option<Judge>,
    pub(crate) save_every: Duration,
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
