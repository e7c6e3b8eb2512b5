//! The errors of consumers. Data only.

use std::sync::Arc;

use super::dead_letter::answer::{LettersError, WriteRefused};
use crate::error::fault::{Fault, fault_of_io, says_whose_fault};
use crate::error::{ConfigError, OpenError, PositionError, ReadError, WaitError};
use crate::event::{BadTypes, Offset, ShardId};

/// The reason why a call to a consumer failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConsumerError {
    /// A setting is out of range.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The name is invalid: 1 to 64 of `a-z`, `0-9`, `.`, `_` and `-`, not beginning with a dot.
    #[error("invalid consumer name \"{name}\": use 1 to 64 of a-z, 0-9, '.', '_' and '-', not beginning with a dot")]
    Name {
        /// The name.
        name: String,
    },
    /// The name of an event type is not in [`crate::Event::TYPES`].
    #[error("there is no event type \"{name}\"")]
    UnknownType {
        /// The name.
        name: String,
    },
    /// The consumer asks for no event type.
    #[error("the consumer asks for no event types")]
    NoTypes,
    /// The consumer is running, or its thread hangs in a handler.
    #[error("consumer \"{name}\" is already running")]
    AlreadyRunning {
        /// The consumer's name.
        name: String,
    },
    /// The store has no such consumer.
    #[error("there is no consumer \"{name}\"")]
    NotRegistered {
        /// The name.
        name: String,
    },
    /// The engine has been shut down.
    #[error("the engine is closed")]
    Closed,
    /// The consumer has ended: it was stopped or, with a reason, ended by itself.
    #[error("the consumer has ended{}", failure.as_ref().map(|why| format!(": {why}")).unwrap_or_default())]
    Ended {
        /// The reason, if it ended by itself.
        failure: Option<ConsumerFailure>,
    },
    /// The consumer does not answer in time: its thread is inside a handler.
    #[error("consumer \"{name}\" is busy in a handler")]
    Busy {
        /// The consumer's name.
        name: String,
    },
    /// More keys have dead letters than [`super::QueuePolicy::keys_max`].
    #[error("more keys have dead letters than the queue policy allows: raise keys_max")]
    TooManyKeys,
    /// The saved position of the consumer or of its sink belongs to a log with other events. Nothing is delivered.
    /// Rebuild a sink's data with [`super::ConsumerBuilder::start_sink_over`]; remove any other consumer and register
    /// it again.
    #[error(transparent)]
    Position(PositionError),
    /// A sink has no position for a shard whose events were delivered before: the sink's data is gone. Nothing is
    /// delivered until the sink is started over ([`super::ConsumerBuilder::start_sink_over`]).
    #[error(
        "shard {shard}: the sink has no position, but events up to offset {delivered} were delivered before: restore its data, or use start_sink_over"
    )]
    PositionGone {
        /// The shard.
        shard: ShardId,
        /// Events below this offset were delivered.
        delivered: Offset,
    },
    /// A sink cannot be started over: retention has freed its first events.
    #[error(
        "shard {shard}: the sink began at offset {began}, but the earliest event held is at {earliest}: remove the consumer and register it again"
    )]
    BeginningGone {
        /// The shard.
        shard: ShardId,
        /// The sink's position when it was registered.
        began: Offset,
        /// The earliest offset still held.
        earliest: Offset,
    },
    /// The consumer could not be started.
    #[error("{why}")]
    NotStarted {
        /// The error of that start, as text.
        why: String,
    },
    /// An asynchronous consumer was started outside a tokio runtime, or in one without timers (`enable_time`).
    #[error("start an asynchronous consumer inside a tokio runtime with timers (enable_time)")]
    NoRuntime,
    /// The tokio runtime of an asynchronous consumer was shut down. Unfinished events are handled after the next start.
    #[error("the consumer's async runtime was shut down")]
    RuntimeEnded,
    /// The consumer's own code, or its sink's code outside a batch, panicked.
    #[error("the consumer's own code panicked: {text}")]
    Panicked {
        /// The panic's message.
        text: String,
    },
    /// The consumer's files could not be read or written.
    #[error(transparent)]
    Files(#[from] OpenError),
    /// The consumer's dead letters could not be read.
    #[error(transparent)]
    Letters(#[from] LettersError),
    /// A record could not be written.
    #[error(transparent)]
    Records(#[from] WriteRefused),
    /// The log could not be read.
    #[error(transparent)]
    Read(ReadError),
    /// A wait ended early.
    #[error(transparent)]
    Wait(#[from] WaitError),
}

impl ConsumerError {
    /// Returns a copy that can be kept while this error is returned.
    pub(super) fn to_failure(&self) -> ConsumerFailure {
        let kept = match *self {
            Self::Position(error) => Self::Position(error),
            Self::PositionGone { shard, delivered } => Self::PositionGone { shard, delivered },
            Self::BeginningGone { shard, began, earliest } => Self::BeginningGone { shard, began, earliest },
            ref other => Self::NotStarted { why: crate::error::with_sources(other) },
        };
        kept.into()
    }
}

says_whose_fault!(ConsumerError);

impl ConsumerError {
    fn fault(&self) -> Fault {
        match self {
            Self::Name { .. }
            | Self::UnknownType { .. }
            | Self::NoTypes
            | Self::AlreadyRunning { .. }
            | Self::NotRegistered { .. } => Fault::Request,
            Self::Busy { .. } => Fault::Passing,
            Self::Files(error) => error.fault(),
            Self::Letters(LettersError::Io { source, .. }) | Self::Records(WriteRefused::Io { source, .. }) => {
                fault_of_io(source)
            }
            Self::Read(error) => error.fault(),
            Self::Wait(error) => error.fault(),
            // A position here is the consumer's own, and settings come from the program, not from a request.
            Self::Config(_)
            | Self::Closed
            | Self::Ended { .. }
            | Self::TooManyKeys
            | Self::Position(_)
            | Self::PositionGone { .. }
            | Self::BeginningGone { .. }
            | Self::NotStarted { .. }
            | Self::Panicked { .. }
            | Self::NoRuntime
            | Self::RuntimeEnded
            | Self::Letters(LettersError::Damaged { .. })
            | Self::Records(WriteRefused::Full) => Fault::Neither,
        }
    }
}

impl From<BadTypes> for ConsumerError {
    fn from(bad: BadTypes) -> Self {
        match bad {
            BadTypes::None => Self::NoTypes,
            BadTypes::Unknown(name) => Self::UnknownType { name },
        }
    }
}

impl From<ReadError> for ConsumerError {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Position(error) => Self::Position(error),
            error => Self::Read(error),
        }
    }
}

/// The reason why a consumer ended by itself, or could not be started: an error that can be kept and compared. Failures
/// with the same text are equal.
#[derive(Debug, Clone)]
pub struct ConsumerFailure(Arc<ConsumerError>);

impl ConsumerFailure {
    /// Returns the error.
    #[must_use]
    pub fn error(&self) -> &ConsumerError {
        &self.0
    }
}

impl From<ConsumerError> for ConsumerFailure {
    fn from(error: ConsumerError) -> Self {
        Self(Arc::new(error))
    }
}

impl PartialEq for ConsumerFailure {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0) || self.to_string() == other.to_string()
    }
}

impl std::fmt::Display for ConsumerFailure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&crate::error::with_sources(&*self.0))
    }
}
