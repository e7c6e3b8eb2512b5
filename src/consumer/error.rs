//! What consumers answer when they cannot. Data only.

use std::sync::Arc;

use super::dead_letter::answer::{LettersError, WriteRefused};
use crate::error::{ConfigError, OpenError, PositionError, ReadError, WaitError};
use crate::event::{Offset, ShardId};

/// Why a consumer does not do what was asked of it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConsumerError {
    /// A setting cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A name that cannot be: 1 to 64 of `a-z`, `0-9`, `.`, `_` and `-`, not beginning with a dot.
    #[error("\"{name}\" cannot be a consumer's name")]
    Name {
        /// What was given.
        name: String,
    },
    /// It is asked for a type of event that is none of [`crate::Event::TYPES`].
    #[error("there is no event type \"{name}\"")]
    UnknownType {
        /// What was given.
        name: String,
    },
    /// It is asked for events of no type at all.
    #[error("a consumer of no event types would never see an event")]
    NoTypes,
    /// It runs already, or its thread hangs in a handler.
    #[error("consumer \"{name}\" is running")]
    AlreadyRunning {
        /// Its name.
        name: String,
    },
    /// The store has no such consumer.
    #[error("there is no consumer \"{name}\"")]
    NotRegistered {
        /// What was given.
        name: String,
    },
    /// The engine has been shut down.
    #[error("the engine is closed")]
    Closed,
    /// It has ended: it was stopped or, with a reason, ended by itself.
    #[error("the consumer has ended{}", failure.as_ref().map(|why| format!(": {why}")).unwrap_or_default())]
    Ended {
        /// Why it ended by itself.
        failure: Option<ConsumerFailure>,
    },
    /// It does not answer in time: its thread is inside a handler.
    #[error("consumer \"{name}\" is busy in a handler")]
    Busy {
        /// Its name.
        name: String,
    },
    /// More keys have dead letters than it may know.
    #[error("more keys have dead letters than there is room for")]
    TooManyKeys,
    /// The consumer's position, or its sink's, is not one of this log: its data was made of other events. Nothing is delivered. Make a
    /// sink's data anew ([`super::ConsumerBuilder::start_sink_over`]); remove any other consumer and register it again.
    #[error(transparent)]
    Position(PositionError),
    /// A sink has no position for a shard whose events were delivered before: its data is gone. Nothing is delivered until it is
    /// started over ([`super::ConsumerBuilder::start_sink_over`]).
    #[error(
        "shard {shard}: the sink has no position, but events up to offset {delivered} were delivered before: restore its data, or use start_sink_over"
    )]
    PositionGone {
        /// The shard.
        shard: ShardId,
        /// Events were delivered up to here.
        delivered: Offset,
    },
    /// A sink cannot be started over: retention has freed events from its beginning on.
    #[error(
        "shard {shard}: the sink began at offset {began}, but the earliest event held is at {earliest}: remove it and register it again"
    )]
    BeginningGone {
        /// The shard.
        shard: ShardId,
        /// Where it began when it was registered.
        began: Offset,
        /// The earliest offset still held.
        earliest: Offset,
    },
    /// It could not be started, for a reason that cannot be copied.
    #[error("{why}")]
    NotStarted {
        /// The error of that attempt, as text.
        why: String,
    },
    /// Its own code, or the code of its sink outside a batch, panicked.
    #[error("the consumer's own code panicked: {text}")]
    Panicked {
        /// What the panic said.
        text: String,
    },
    /// Its files.
    #[error(transparent)]
    Files(#[from] OpenError),
    /// Its dead letters could not be read.
    #[error(transparent)]
    Letters(#[from] LettersError),
    /// Something could not be recorded.
    #[error(transparent)]
    Records(#[from] WriteRefused),
    /// The log.
    #[error(transparent)]
    Read(ReadError),
    /// Waiting for it ended.
    #[error(transparent)]
    Wait(#[from] WaitError),
}

impl ConsumerError {
    /// The same, to be kept while this one is returned.
    pub(super) fn to_be_kept(&self) -> ConsumerFailure {
        let kept = match *self {
            Self::Position(error) => Self::Position(error),
            Self::PositionGone { shard, delivered } => Self::PositionGone { shard, delivered },
            Self::BeginningGone { shard, began, earliest } => Self::BeginningGone { shard, began, earliest },
            ref other => Self::NotStarted { why: crate::error::with_sources(other) },
        };
        kept.into()
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

/// Why a consumer ended by itself, or could not be started: the error, to be kept and compared. Two with the same text are equal.
#[derive(Debug, Clone)]
pub struct ConsumerFailure(Arc<ConsumerError>);

impl ConsumerFailure {
    /// The error.
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
