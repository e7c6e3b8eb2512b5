//! The outcome of an event, and the cause of a halt. Data only.

use crate::event::{EventId, Key};

/// The reason why a consumer calls no handler until it is resumed.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum HaltCause {
    /// An attempt was judged [`super::Judgement::Halt`], or an event's attempts are used up and
    /// [`super::Exhausted::Halt`] is set.
    Event {
        /// The event, which is the first to be handled after the halt.
        id: EventId,
        /// The event's key.
        key: Key,
        /// The handler's error.
        error: String,
    },
    /// There is no room for more dead letters.
    DeadLettersFull,
    /// A sink failed on a batch until its attempts were used up.
    Batch {
        /// The sink's error.
        error: String,
    },
}

/// The outcome of an event that a caller waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Handled {
    /// The event was handled, or the consumer does not follow its type.
    Yes,
    /// The event was recorded as a dead letter, or as skipped.
    Recorded,
    /// The consumer has passed the event, and its outcome is unknown: the consumer began after the event or was set to
    /// a position after it, or it has since saved its position and forgotten the records before that position.
    Unknown,
}
