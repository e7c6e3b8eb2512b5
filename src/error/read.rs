//! Errors of reading the log and the past of a key.

use std::io;
use std::path::PathBuf;

use super::{CodePanic, WaitError};
use crate::event::{Key, Offset, ShardId, Version};

/// Damage in the middle of a log: bytes that were durable have changed or are missing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("shard {shard}, segment {segment}, offset {offset}: {why}")]
#[non_exhaustive]
pub struct Corruption {
    /// The shard.
    pub shard: ShardId,
    /// The number of the segment.
    pub segment: u64,
    /// The offset at which the damage begins.
    pub offset: Offset,
    /// The check that failed.
    pub why: &'static str,
}

/// The reason why the past of a key could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HistoryError {
    /// Retention has freed the requested past.
    #[error("key {key}: the history before version {earliest} is no longer held")]
    BeyondRetention {
        /// The key.
        key: Key,
        /// The earliest version that can still be read.
        earliest: Version,
    },
    /// The requested version or time has not been reached.
    #[error("key {key}: the newest version is {newest}")]
    NotYet {
        /// The key.
        key: Key,
        /// Its newest version.
        newest: Version,
    },
    /// The log could not be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// `evolve`, an upcaster or `upgrade` panicked.
    #[error(transparent)]
    Panicked(#[from] CodePanic),
    /// The shard did not answer with the key's version and newest record.
    #[error(transparent)]
    Wait(#[from] WaitError),
}

impl From<Corruption> for HistoryError {
    fn from(corruption: Corruption) -> Self {
        Self::Read(corruption.into())
    }
}

/// The reason why reading cannot continue from a saved position. The data saved with the position was made from events
/// other than those in the log: the store or the data was restored from a copy, or the two do not belong together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PositionError {
    /// The bytes or the text are not a position.
    #[error("not a position: {why}")]
    Malformed {
        /// The check that failed.
        why: &'static str,
    },
    /// The position belongs to another store.
    #[error("shard {shard}: the position belongs to store {position:016x}, but this is store {store:016x}")]
    OtherStore {
        /// The shard.
        shard: ShardId,
        /// The id of the store that the position belongs to.
        position: u64,
        /// The id of this store.
        store: u64,
    },
    /// The position belongs to another shard.
    #[error("shard {shard}: the position belongs to shard {position}")]
    OtherShard {
        /// The shard it was used for.
        shard: ShardId,
        /// The shard it belongs to.
        position: ShardId,
    },
    /// The log ends before the position: the log has lost events, or is an older copy.
    #[error("shard {shard}: the position is at offset {position}, but the log ends at {end}")]
    AheadOfLog {
        /// The shard.
        shard: ShardId,
        /// The offset of the position.
        position: Offset,
        /// The end of the log.
        end: Offset,
    },
    /// The log reaches the position, but holds different events before it: the store was restored from a copy, or its
    /// newest events were lost, and other events have been appended since.
    #[error("shard {shard}: the position at offset {position} belongs to another history of this store: {why}")]
    OtherHistory {
        /// The shard.
        shard: ShardId,
        /// The offset of the position.
        position: Offset,
        /// The check that failed.
        why: &'static str,
    },
}

/// The reason why reading the log ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// Retention has freed the requested offset.
    #[error("shard {shard}: offset {asked} is no longer held; the earliest offset is {earliest}")]
    BeyondRetention {
        /// The shard.
        shard: ShardId,
        /// The requested offset.
        asked: Offset,
        /// The earliest offset still held.
        earliest: Offset,
    },
    /// No record begins at the offset.
    #[error("shard {shard}: no record begins at offset {offset}")]
    NotARecord {
        /// The shard.
        shard: ShardId,
        /// The requested offset.
        offset: Offset,
    },
    /// A saved position does not belong to this log.
    #[error(transparent)]
    Position(#[from] PositionError),
    /// The log is damaged.
    #[error(transparent)]
    Corruption(#[from] Corruption),
    /// An operation of the file system failed.
    #[error("{action} {} failed", path.display())]
    Io {
        /// The operation.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
}
