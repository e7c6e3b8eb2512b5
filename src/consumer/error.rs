//! What consumers answer when they cannot. Data only.

use super::dead_letter::answer::{LettersError, WriteRefused};
use crate::error::{ConfigError, OpenError, ReadError, WaitError};
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
    #[error("the consumer has ended{}", failure.as_deref().map(|why| format!(": {why}")).unwrap_or_default())]
    Ended {
        /// Why it ended by itself.
        failure: Option<String>,
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
    /// A sink has taken in events that the log does not have: it is another log's, or the log lost its newest events.
    #[error("shard {shard}: the sink stands at {position}, the log ends at {end}")]
    AheadOfLog {
        /// The shard.
        shard: ShardId,
        /// Where the sink stands.
        position: Offset,
        /// What there is.
        end: Offset,
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
    Read(#[from] ReadError),
    /// Waiting for it ended.
    #[error(transparent)]
    Wait(#[from] WaitError),
}
