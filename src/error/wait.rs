//! Errors of waiting.

use super::ShardFailure;
use crate::sync::GaveUp;

/// The reason why waiting for a receipt, a flush, a checkpoint, an answer or a shutdown did not succeed.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum WaitError {
    /// The shard failed first. The event may or may not be on disk.
    #[error(transparent)]
    ShardFailed(#[from] ShardFailure),
    /// The deadline passed. The operation may still complete.
    #[error("the deadline passed")]
    TimedOut,
    /// A checkpoint could not be written; the program's log (`tracing`) gives the reason. The events that the
    /// checkpoint would have covered are still in the store's log.
    #[error("the checkpoint could not be written")]
    CheckpointFailed,
    /// The engine is closed.
    #[error("the engine is closed")]
    Closed,
    /// The question itself panicked, with this message. The shard continues.
    #[error("the question panicked: {0}")]
    QuestionPanicked(String),
    /// The call would wait for its own thread: an engine's thread (inline handlers, `evolve`, `decide`, views,
    /// questions), or the thread of the consumer that it waits for.
    #[error("the call would wait for its own thread: make it on another thread")]
    OnEngineThread,
    /// The durability mode never syncs by itself. Call `flush`.
    #[error("durability mode OsCache acknowledges nothing as durable: call flush()")]
    NeverDurable,
}

impl From<GaveUp> for WaitError {
    fn from(gave_up: GaveUp) -> Self {
        match gave_up {
            GaveUp::TimedOut => Self::TimedOut,
            GaveUp::OnEngineThread => Self::OnEngineThread,
        }
    }
}
