//! The arguments and results of the key queues. Data only.

use std::time::Duration;

use crate::config::in_range;
use crate::config::setters;
use crate::config::whole_ms;
use crate::error::ConfigError;
use crate::event::{Key, Offset};

/// Limits of a consumer's per-key queues.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueuePolicy {
    pub(super) concurrency: usize,
    pub(super) unfinished_max: usize,
    pub(super) keys_max: usize,
    pub(super) gap_wait_max: Duration,
}

impl Default for QueuePolicy {
    fn default() -> Self {
        Self { concurrency: 1, unfinished_max: 1 << 16, keys_max: 1 << 20, gap_wait_max: Duration::from_secs(5) }
    }
}

impl QueuePolicy {
    setters! {
        /// Keys handled at the same time, 1..=65,536. A consumer takes it from
        /// [`crate::consumer::ConsumerBuilder::concurrency`]. Default: 1.
        concurrency: usize,
        /// Unfinished events kept in memory, 1..=2³⁰. At this limit, the log is read further only when an event ends.
        /// Default: 65,536. Each takes 24 bytes.
        unfinished_max: usize,
        /// Keys with unfinished events or dead letters, 1..=2³⁰. At this limit, an event of a further key is read only
        /// when one of these keys has neither. Default: 1,048,576. Each takes about 44 bytes, and a key that waits for
        /// a time about 30 more.
        keys_max: usize,
        /// The longest time that an event waits for an event missing before it, 0..=24 h. Default: 5 s.
        gap_wait_max: Duration,
    }

    pub(super) fn check(&self) -> Result<(), ConfigError> {
        in_range("queues_concurrency", self.concurrency as u64, 1, 65_536)?;
        in_range("queues_unfinished_max", self.unfinished_max as u64, 1, 1 << 30)?;
        in_range("queues_keys_max", self.keys_max as u64, 1, 1 << 30)?;
        in_range("queues_gap_wait_max_ms", whole_ms(self.gap_wait_max), 0, 24 * 3_600_000)
    }
}

/// The reason why an event was refused. Nothing has changed: the reader stops at the event and offers it again later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum QueueRefused {
    /// `unfinished_max` events are unfinished.
    #[error("too many events are unfinished")]
    Full,
    /// The key has no queue, and `keys_max` keys have one.
    #[error("too many keys have unfinished events or are parked")]
    TooManyKeys,
}

/// The error for a key with fewer dead letters than were to be removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("key {key} has {letters} dead letters")]
pub(crate) struct NotParked {
    /// The key.
    pub(crate) key: Key,
    /// The dead letters that it has.
    pub(crate) letters: u32,
}

/// The decision about an event that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Try it again after this long. Later events of its key wait.
    Retry {
        /// Counted from `now`.
        after: Duration,
    },
    /// An event is missing before this one: try this one again after
    /// [`crate::consumer::key_queues::KeyQueues::gap_filled`], or when `gap_wait_max` has passed. It does not count as
    /// a failure.
    AwaitGap,
    /// The event becomes a dead letter, and so do later events of its key until the key's letters are handled or
    /// discarded.
    Park,
    /// The event is skipped, with a record. Its key continues when the record is durable.
    Skip,
    /// No event runs until [`crate::consumer::key_queues::KeyQueues::resume`]; then this event is tried again.
    Halt,
}

/// An event that is being handled. It returns through [`crate::consumer::key_queues::KeyQueues::succeeded`] or
/// [`crate::consumer::key_queues::KeyQueues::failed`]. Meanwhile no other event of its key is in flight.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "its key waits until the outcome is reported"]
pub(crate) struct InFlight {
    pub(super) queue: u32,
    pub(super) key: Key,
    pub(super) offset: Offset,
    pub(super) attempt: u32,
}

impl InFlight {
    /// Returns the event's key.
    #[must_use]
    pub(crate) fn key(&self) -> Key {
        self.key
    }

    /// Returns the event's offset.
    #[must_use]
    pub(crate) fn offset(&self) -> Offset {
        self.offset
    }

    /// Returns the number of this attempt: 1 at first, and one more after every failure.
    #[must_use]
    pub(crate) fn attempt(&self) -> u32 {
        self.attempt
    }
}

/// The reason why an event ends without having been handled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RecordKind {
    /// The event failed, and its key is parked.
    Parked,
    /// The event's key was already parked.
    ParkedBehind,
    /// The event was skipped.
    Skipped,
}

/// An event that ends when its record is durable. It returns through
/// [`crate::consumer::key_queues::KeyQueues::recorded`] or [`crate::consumer::key_queues::KeyQueues::not_recorded`].
#[derive(Debug, PartialEq, Eq)]
#[must_use = "its key and the position wait until the outcome is reported"]
pub(crate) struct ToRecord {
    pub(super) queue: u32,
    pub(super) key: Key,
    pub(super) offset: Offset,
    pub(super) attempts: u32,
    pub(super) kind: RecordKind,
}

impl ToRecord {
    #[cfg(test)]
    pub(super) fn key(&self) -> Key {
        self.key
    }

    /// Returns the event's offset.
    #[must_use]
    pub(crate) fn offset(&self) -> Offset {
        self.offset
    }

    /// Returns the number of attempts.
    #[must_use]
    pub(crate) fn attempts(&self) -> u32 {
        self.attempts
    }

    /// Returns the reason why it is recorded.
    #[must_use]
    pub(crate) fn kind(&self) -> RecordKind {
        self.kind
    }
}

/// The state of a key.
#[cfg(test)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum KeyState {
    /// The key's events run in order.
    Live,
    /// The key's first unfinished event failed.
    Retrying {
        /// The time when it is tried again.
        due: Duration,
    },
    /// The key's events become dead letters.
    Parked {
        /// The number of the key's durable dead letters; 0 while the first is being recorded.
        letters: u32,
    },
    /// The key's first unfinished event waits for an event that is missing before it.
    AwaitingGap {
        /// The time since which it waits.
        since: Duration,
    },
}

/// Counts since the queues were created. Every event offered is in exactly one of `succeeded`, `parked`, `skipped` and
/// `unfinished`, or was left behind by [`crate::consumer::key_queues::KeyQueues::set_to`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct QueueStatistics {
    /// Events handled.
    pub(crate) succeeded: u64,
    /// Events that became dead letters.
    pub(crate) parked: u64,
    /// Events skipped.
    pub(crate) skipped: u64,
    /// Events offered and not ended, now.
    pub(crate) unfinished: usize,
    /// Failed attempts.
    pub(crate) failures: u64,
    /// Events in flight, now.
    pub(crate) running: usize,
    /// Keys that may run and wait for their turn, now.
    pub(crate) ready: usize,
    /// Keys that wait for a retry or a gap, now.
    pub(crate) waiting: usize,
    /// Keys that have unfinished events or are parked, now.
    pub(crate) keys: usize,
}
