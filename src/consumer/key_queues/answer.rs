//! What the lanes are told and what they answer. Data only.

use std::time::Duration;

use crate::config::in_range;
use crate::config::setters;
use crate::config::whole_ms;
use crate::error::ConfigError;
use crate::event::{Key, Offset};

/// How much the lanes keep, and how much runs at once.
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
        /// Keys of which an event runs at once, 1..=65,536. Default: 1.
        concurrency: usize,
        /// Events offered and not ended, 1..=2³⁰; more are refused until one ends. Default: 65,536. Each takes 24 bytes.
        unfinished_max: usize,
        /// Keys that have unfinished events or are parked, 1..=2³⁰; events of further ones are refused until one is
        /// free. Default: 1,048,576. Each takes about 44 bytes, and one that waits for a time about 30 more.
        keys_max: usize,
        /// How long an event may wait for what is missing before it, 0..=24 h. Default: 5 s.
        gap_wait_max: Duration,
    }

    pub(super) fn check(&self) -> Result<(), ConfigError> {
        in_range("lanes_concurrency", self.concurrency as u64, 1, 65_536)?;
        in_range("lanes_unfinished_max", self.unfinished_max as u64, 1, 1 << 30)?;
        in_range("lanes_keys_max", self.keys_max as u64, 1, 1 << 30)?;
        in_range("lanes_gap_wait_max_ms", whole_ms(self.gap_wait_max), 0, 24 * 3_600_000)
    }
}

/// Why an event was not taken in. Nothing changed: whoever reads the log stops there and offers it again later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum QueueRefused {
    /// `unfinished_max` events are unfinished.
    #[error("too many events are unfinished")]
    Full,
    /// It is of a key without a place, and `keys_max` keys have one.
    #[error("too many keys have unfinished events or are parked")]
    TooManyKeys,
}

/// Fewer dead letters of the key are known than were to be taken away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("key {key} has {letters} dead letters")]
pub struct NotParked {
    /// The key.
    pub key: Key,
    /// What it has.
    pub letters: u32,
}

/// What is to be done about an event that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Try it again after this long. Later events of its key wait.
    Retry {
        /// From `now`.
        after: Duration,
    },
    /// Something is missing before it: try it again when [`crate::consumer::key_queues::KeyQueues::gap_filled`] says so, or `gap_wait_max` has
    /// passed. It does not count as a failure.
    AwaitGap,
    /// It becomes a dead letter, and so do later events of its key until its letters are dealt with.
    Park,
    /// It is left out, with a record. Its key goes on when the record is durable.
    Skip,
    /// Nothing runs any more until [`crate::consumer::key_queues::KeyQueues::resume`]; then it is tried again.
    Halt,
}

/// An event that is out to be handled; it goes back with [`crate::consumer::key_queues::KeyQueues::succeeded`] or [`crate::consumer::key_queues::KeyQueues::failed`]. While
/// it is out no other event of its key is.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "its key waits until the outcome is told"]
pub struct InFlight {
    pub(super) lane: u32,
    pub(super) key: Key,
    pub(super) offset: Offset,
    pub(super) attempt: u32,
    pub(super) is_gap_over: bool,
}

impl InFlight {
    /// Whose event.
    #[must_use]
    pub fn key(&self) -> Key {
        self.key
    }

    /// Which event.
    #[must_use]
    pub fn offset(&self) -> Offset {
        self.offset
    }

    /// 1 the first time, and one more after every failure.
    #[must_use]
    pub fn attempt(&self) -> u32 {
        self.attempt
    }

    /// It has waited for `gap_wait_max` for what is missing before it: the gap is to be closed, with a record.
    #[must_use]
    pub fn is_gap_over(&self) -> bool {
        self.is_gap_over
    }
}

/// Why an event ends without having been handled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RecordKind {
    /// It failed and its key is parked with it.
    Parked,
    /// Its key was parked before it came.
    ParkedBehind,
    /// It was left out.
    Skipped,
}

/// An event that ends when a record of it is durable; it goes back with [`crate::consumer::key_queues::KeyQueues::recorded`] or
/// [`crate::consumer::key_queues::KeyQueues::not_recorded`].
#[derive(Debug, PartialEq, Eq)]
#[must_use = "its key and the checkpoint wait until the outcome is told"]
pub struct ToRecord {
    pub(super) lane: u32,
    pub(super) key: Key,
    pub(super) offset: Offset,
    pub(super) attempts: u32,
    pub(super) kind: RecordKind,
}

impl ToRecord {
    /// Whose event.
    #[must_use]
    pub fn key(&self) -> Key {
        self.key
    }

    /// Which event.
    #[must_use]
    pub fn offset(&self) -> Offset {
        self.offset
    }

    /// How often it was tried.
    #[must_use]
    pub fn attempts(&self) -> u32 {
        self.attempts
    }

    /// Why it is to be recorded.
    #[must_use]
    pub fn kind(&self) -> RecordKind {
        self.kind
    }
}

/// Where a key stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyState {
    /// Its events run as they come.
    Live,
    /// Its first unfinished event failed.
    Retrying {
        /// When it is tried again.
        due: Duration,
    },
    /// Its events become dead letters.
    Parked {
        /// How many durable ones it has; 0 while the first is being recorded.
        letters: u32,
    },
    /// Its first unfinished event waits for what is missing before it.
    AwaitingGap {
        /// Since when.
        since: Duration,
    },
}

/// Counts since the lanes were made. Every event offered is in exactly one of `succeeded`, `parked`, `skipped` and
/// `unfinished` (or was left behind by [`crate::consumer::key_queues::KeyQueues::set_to`]).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct QueueStatistics {
    /// Events handled.
    pub succeeded: u64,
    /// Events that became dead letters.
    pub parked: u64,
    /// Events left out.
    pub skipped: u64,
    /// Events offered and not ended, now.
    pub unfinished: usize,
    /// Attempts that failed.
    pub failures: u64,
    /// Events out to be handled, now.
    pub running: usize,
    /// Keys that may run and wait for their turn, now.
    pub ready: usize,
    /// Keys that wait for a retry or a gap, now.
    pub waiting: usize,
    /// Keys that have unfinished events or are parked, now.
    pub keys: usize,
}
