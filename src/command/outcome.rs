//! The outcome of a command: carried out, or an error.

use super::expected::ExpectedVersion;
use super::named::NamedKeys;
use crate::error::WaitError;
use crate::error::fault::{Fault, says_whose_fault};
use crate::event::{EventTypeId, Key, Version};
use crate::lane::receipt::Receipt;

/// A command that was carried out.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Outcome {
    /// The key of the command, or the first of its keys.
    pub key: Key,
    /// The key's version after the command. [`Outcome::versions`] returns those of all keys.
    pub version: Version,
    /// The number of events of the command, of all its keys.
    pub events: u32,
    /// `true` if this is the outcome of an earlier command with the same idempotency key; the command itself did
    /// nothing.
    pub repeated: bool,
    /// All keys of a command for several keys.
    pub(super) named: Option<Box<NamedKeys>>,
    pub(super) receipt: Receipt,
}

impl Outcome {
    /// Returns the outcome of a command for several keys.
    pub(super) fn of_several(named: Box<NamedKeys>, receipt: Receipt) -> Self {
        let (first, events, repeated) = (named.keys[0], named.events, named.repeated);
        Self { key: first.key, version: first.version, events, repeated, named: Some(named), receipt }
    }

    /// Returns every key of the command with its version after the command, in the order in which the command names
    /// them. The outcome of an earlier command with the same idempotency key has the keys that the earlier one named.
    pub fn versions(&self) -> impl Iterator<Item = (Key, Version)> + '_ {
        let others = self.named.as_deref().map_or(&[][..], |named| &named.keys[1..]);
        std::iter::once((self.key, self.version)).chain(others.iter().map(|other| (other.key, other.version)))
    }

    /// Returns the version of `key` after the command, or `None` if the command does not name the key.
    #[must_use]
    pub fn version_of(&self, key: Key) -> Option<Version> {
        self.versions().find(|(one, _)| *one == key).map(|(_, version)| version)
    }

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
    #[error("key {key} has version {found}, but the command expected {expected:?}")]
    WrongVersion {
        /// The key; of several, the first one with an unexpected version.
        key: Key,
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
    /// `decide` or `decide_many` panicked. Nothing was appended, and the shard continues.
    #[error("the decision panicked: {0}")]
    Panicked(String),
    /// The decision emitted an event for a key that the command does not name. Nothing was appended.
    #[error("the decision emitted an event for key {key}, which the command does not name")]
    ForeignKey {
        /// The first such key.
        key: Key,
    },
    /// The command names several keys, and the aggregate has no [`decide_many`](crate::Aggregate::decide_many). Nothing
    /// was appended.
    #[error("the aggregate has no `decide_many`: it decides on commands for one key only")]
    NotSupported,
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
            | Self::ForeignKey { .. }
            | Self::NotSupported
            | Self::Panicked(_)
            | Self::Unanswered(_)
            | Self::Claimed
            | Self::NotDurable(_) => Fault::Neither,
        }
    }
}
