//! The outcome of a command: carried out, or an error.

use crate::error::WaitError;
use crate::error::fault::{Fault, says_whose_fault};
use crate::event::{EventTypeId, Key, Version};
use crate::lane::receipt::Receipt;

/// The version that a key must have for a command to be carried out.
///
/// An expected version protects against changes by other clients. A client needs no protection against its own
/// commands: commands for one key are carried out in the order in which the client sent them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum ExpectedVersion {
    /// Any version.
    #[default]
    Any,
    /// The key has no event yet.
    NoEvents,
    /// The key has events.
    Exists,
    /// The key has exactly this version.
    Exact(Version),
}

impl ExpectedVersion {
    pub(crate) fn holds(self, version: Version) -> bool {
        match self {
            Self::Any => true,
            Self::NoEvents => version.0 == 0,
            Self::Exists => version.0 > 0,
            Self::Exact(expected) => version == expected,
        }
    }
}

/// A command that was carried out.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Outcome {
    /// The key of the command.
    pub key: Key,
    /// The key's version after the command.
    pub version: Version,
    /// The number of events of the command. The last one has `version`.
    pub events: u32,
    /// `true` if this is the outcome of an earlier command with the same idempotency key; the command itself did
    /// nothing.
    pub repeated: bool,
    pub(super) receipt: Receipt,
}

impl Outcome {
    /// Returns the receipt of the command. Its events are appended; the receipt can wait until they are durable.
    #[must_use]
    pub fn receipt(&self) -> &Receipt {
        &self.receipt
    }
}

/// The reason why a command was not carried out, or why its outcome is not known.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum CommandError<R> {
    /// The aggregate rejected the command. Nothing was appended.
    #[error("the command was rejected")]
    Rejected(R),
    /// The key does not have the version that was expected. Nothing was appended.
    #[error("the key has version {found}, but the command expected {expected:?}")]
    WrongVersion {
        /// The version that the command expected.
        expected: ExpectedVersion,
        /// The key's version.
        found: Version,
    },
    /// An event of the decision, the rejection, or the whole decision is too large. Nothing was appended.
    #[error("the command is too large: an event, its rejection or the whole decision exceeds {bytes_max} bytes")]
    TooLarge {
        /// The limit in bytes: `event_bytes_max`, or the room in one segment.
        bytes_max: usize,
    },
    /// `TYPES` does not declare the type of one of the decision's events. Nothing was appended.
    #[error("an event of the decision has type {event_type}, which its TYPES do not declare")]
    UndeclaredType {
        /// The id that `event_type()` returned.
        event_type: EventTypeId,
    },
    /// `decide` panicked. Nothing was appended, and the shard continues.
    #[error("`decide` panicked: {0}")]
    Panicked(String),
    /// The command was not sent.
    #[error("the command was not sent: {0}")]
    NotSent(crate::error::RejectedReason),
    /// The command was sent, but no answer came. It may or may not have been carried out; an idempotency key makes it
    /// safe to repeat.
    #[error("the command was sent, but no answer came: {0}")]
    Unanswered(WaitError),
    /// The answer was claimed before, or the ticket belongs to another client. Each answer is given once, to the client
    /// that sent the command.
    #[error("the answer was claimed before, or the ticket belongs to another client")]
    Claimed,
    /// The command was carried out, but its events may not be durable.
    #[error("the command was carried out, but may not be durable: {0}")]
    NotDurable(WaitError),
}

says_whose_fault!(CommandError<R>);

impl<R> CommandError<R> {
    /// Returns `true` if the command was sent and may or may not have been carried out, now or later. It is safe to send
    /// it again only with an idempotency key. An HTTP server answers with 504.
    #[must_use]
    pub fn is_outcome_unknown(&self) -> bool {
        matches!(self, Self::Unanswered(_))
    }

    fn fault(&self) -> Fault {
        match self {
            Self::Rejected(_) | Self::WrongVersion { .. } | Self::TooLarge { .. } => Fault::Request,
            Self::NotSent(reason) => reason.fault(),
            // Sent again, `Unanswered` and `NotDurable` might be carried out twice.
            Self::UndeclaredType { .. }
            | Self::Panicked(_)
            | Self::Unanswered(_)
            | Self::Claimed
            | Self::NotDurable(_) => Fault::Neither,
        }
    }
}
