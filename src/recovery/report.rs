//! The report of opening a store, for the application.

use std::path::PathBuf;

use crate::event::{Offset, ShardId};

/// The result of recovering a store.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct RecoveryReport {
    /// One entry per shard.
    pub shards: Vec<ShardRecovery>,
    /// Duration of the recovery, in ns.
    pub duration_ns: u64,
}

impl RecoveryReport {
    /// Returns the number of events in all shards.
    #[must_use]
    pub fn events(&self) -> u64 {
        self.shards.iter().map(|shard| shard.events).sum()
    }
}

/// The result of recovering one shard.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ShardRecovery {
    /// The shard.
    pub shard: ShardId,
    /// Number of events held (retention may have freed earlier ones).
    pub events: u64,
    /// Number of segments that hold records.
    pub segments: usize,
    /// Number of keys.
    pub keys: usize,
    /// The offset of the next record.
    pub end: Offset,
    /// The torn tail that was cut at `end`, if there was one.
    pub torn_tail: Option<TornTail>,
    /// `true` if retention has freed the log's beginning and no usable checkpoint covers it: versions of keys without
    /// events in the log begin anew, and outcomes of commands are forgotten. (A store with states is refused instead.)
    pub lost_beginning: bool,
}

impl ShardRecovery {
    /// The report of a log without records.
    pub(super) fn empty(shard: ShardId, end: Offset) -> Self {
        Self { shard, events: 0, segments: 0, keys: 0, end, torn_tail: None, lost_beginning: false }
    }
}

/// An invalid end of a log that had never been durable.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct TornTail {
    /// The offset at which it began.
    pub offset: Offset,
    /// Number of bytes set aside.
    pub bytes: u64,
    /// The file that has the bytes.
    pub quarantined: PathBuf,
    /// The reason why it is invalid.
    pub why: &'static str,
}
