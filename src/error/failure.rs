//! The failure of a shard, which is final for the engine.

use std::io;
use std::sync::Arc;

use crate::event::{EventTypeId, Offset, ShardId};

/// The failure of a shard. It is final for this engine; to continue, open the store again.
#[derive(Debug, Clone, thiserror::Error)]
#[error("shard {shard} failed: {cause}")]
#[non_exhaustive]
pub struct ShardFailure {
    /// The shard.
    pub shard: ShardId,
    /// The cause.
    pub cause: FailureCause,
}

/// The cause of a [`ShardFailure`].
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum FailureCause {
    /// A sync of the log failed. The content of the device is then unknown, so nothing later is acknowledged.
    #[error("syncing the log failed: {0}")]
    Sync(Arc<io::Error>),
    /// The log could not be written or extended, for a reason other than lack of space.
    #[error("{action} failed: {error}")]
    Storage {
        /// The operation that failed.
        action: &'static str,
        /// The error of the operating system.
        error: Arc<io::Error>,
    },
    /// An inline handler with the halt policy returned an error.
    #[error("handler {handler} failed on the event at offset {offset}: {error}")]
    Handler {
        /// The name of the handler.
        handler: String,
        /// The offset of the event.
        offset: Offset,
        /// The text of the handler's error.
        error: String,
    },
    /// An event changed its type after it was accepted, to one that its `TYPES` do not declare. The event was not
    /// appended, because it could not be read again.
    #[error("an accepted event of key {key} has type {event_type}, which its TYPES do not declare")]
    UndeclaredType {
        /// The key of the event.
        key: u64,
        /// The type that `event_type()` returned.
        event_type: EventTypeId,
    },
    /// The log has reached the last offset that the back-link of a record can hold (4 PiB).
    #[error("the log ends at offset {end}, and no further segment can be numbered")]
    OffsetsExhausted {
        /// The end of the last segment.
        end: Offset,
    },
    /// Code on the shard's thread panicked, with this text.
    #[error("a panic on the shard's thread: {0}")]
    Panic(String),
    /// The archive of an accepted event has grown since its size was checked, and no longer fits.
    #[error("an accepted event of key {key} does not fit into {bytes_max} bytes")]
    EventTooLarge {
        /// The key of the event.
        key: u64,
        /// The limit in bytes.
        bytes_max: usize,
    },
}
