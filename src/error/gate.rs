//! Errors of a gated producer.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use super::{ConfigError, OpenError, ReadError, RejectedReason, WaitError};

/// The reason why a gated producer stopped. Events that are ready to be published stay queued, in order.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GateError {
    /// The first queued event cannot be published now, or the storage has no space for the gate's record
    /// (`StorageFull`).
    #[error(transparent)]
    Publish(RejectedReason),
    /// The record of a gap, or of the start of a partition, could not be made durable, so no later event may be
    /// published. This is final; open the gate again.
    #[error("writing the gate's record {} failed; open the gate again", path.display())]
    GapRecord {
        /// The gate's file.
        path: PathBuf,
        /// The error of the operating system.
        source: Arc<io::Error>,
    },
    /// The positions could not be saved. The previously saved ones remain valid.
    #[error(transparent)]
    Positions(OpenError),
    /// The log could not be read up to the positions to be saved. The previously saved ones remain valid.
    #[error(transparent)]
    Read(ReadError),
    /// The published events did not become durable.
    #[error(transparent)]
    Wait(WaitError),
}

/// The reason why a gate could not be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GateOpenError {
    /// The name is invalid. A name has 1..=64 characters of `[a-z0-9._-]` and does not begin with a dot.
    #[error(
        "{name:?} is not a valid name for a gate: use 1 to 64 of a-z, 0-9, '.', '_' and '-', not beginning with '.'"
    )]
    Name {
        /// The name given.
        name: String,
    },
    /// This engine already has a gate of this name open.
    #[error("the gate {name} is already open")]
    Taken {
        /// The name.
        name: String,
    },
    /// The policy is invalid.
    #[error(transparent)]
    Policy(#[from] ConfigError),
    /// The store holds more partitions of the gate than its policy allows.
    #[error("the gate has {partitions} partitions, more than its policy allows")]
    TooManyPartitions {
        /// The number of partitions in the store.
        partitions: usize,
    },
    /// One of the gate's files could not be used.
    #[error(transparent)]
    File(#[from] OpenError),
    /// The log could not be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The log holds starts of partitions that could not be recorded in the gate's file.
    #[error(transparent)]
    Record(GateError),
    /// Events that were accepted earlier did not become durable.
    #[error(transparent)]
    Wait(#[from] WaitError),
}
