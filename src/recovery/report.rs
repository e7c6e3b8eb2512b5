//! What opening a store found, for the program.

use std::path::PathBuf;

use crate::event::{Offset, ShardId};

/// What opening a store found.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct RecoveryReport {
    /// Shard by shard.
    pub shards: Vec<ShardRecovery>,
    /// How long it took, in ns.
    pub duration_ns: u64,
}

impl RecoveryReport {
    /// Events found in all shards.
    #[must_use]
    pub fn events(&self) -> u64 {
        self.shards.iter().map(|shard| shard.events).sum()
    }
}

/// What opening one shard found.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ShardRecovery {
    /// The shard.
    pub shard: ShardId,
    /// Events held (retention may have freed earlier ones).
    pub events: u64,
    /// Segments that hold records.
    pub segments: usize,
    /// Keys seen.
    pub keys: usize,
    /// Where the next record will be written.
    pub end: Offset,
    /// A tail that was torn: cut at `end`, its bytes kept.
    pub torn_tail: Option<TornTail>,
    /// Retention has freed the log's beginning and no usable checkpoint knows what it held: versions of keys without events in the
    /// log begin anew, and outcomes of commands are forgotten. (With states the store is refused instead.)
    pub lost_beginning: bool,
}

/// A tail that did not hold and had never been durable.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct TornTail {
    /// Where it began.
    pub offset: Offset,
    /// Bytes set aside.
    pub bytes: u64,
    /// The file that has them.
    pub quarantined: PathBuf,
    /// What did not hold.
    pub why: &'static str,
}
