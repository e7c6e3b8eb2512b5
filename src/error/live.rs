//! Errors of live feeds.

use super::{ReadError, WaitError};
use crate::event::{BadTypes, ShardId};

/// The reason why a live feed could not begin, or could not return the next event.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LiveError {
    /// The feed was too slow: retention has freed events that it had not read, or more events were unread than
    /// [`crate::log::LiveBuilder::lag_max`] allows. The feed continues behind them.
    #[error("shard {shard}: the feed was too slow and has missed {missed} events")]
    Lagged {
        /// The shard.
        shard: ShardId,
        /// The number of the shard's events that were passed over, whether the feed wants them or not.
        missed: u64,
    },
    /// The name of an event type is not in [`crate::Event::TYPES`].
    #[error("there is no event type \"{name}\"")]
    UnknownType {
        /// The name.
        name: String,
    },
    /// The feed asks for no event type.
    #[error("the feed asks for no event types")]
    NoTypes,
    /// The log could not be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The shard has failed, the deadline passed, or the thread must not wait; `NeverDurable` for a feed of durable
    /// events in `OsCache`.
    #[error(transparent)]
    Wait(#[from] WaitError),
}

impl From<BadTypes> for LiveError {
    fn from(bad: BadTypes) -> Self {
        match bad {
            BadTypes::None => Self::NoTypes,
            BadTypes::Unknown(name) => Self::UnknownType { name },
        }
    }
}
