//! The gate's limits, with their units and ranges.

use std::time::Duration;

use crate::config::in_range;
use crate::config::setters;
use crate::config::whole_ms;
use crate::error::ConfigError;

/// The start of a partition for which [`SequenceGate::start_at`](crate::ingress::SequenceGate::start_at) was not
/// called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum GateStart {
    /// The partition starts at this sequence.
    At(u64),
    /// The partition starts at the sequence of its first item. Later items below it are too old.
    FirstSeen,
}

/// The limits of a gate: the time that it waits for missing sequences, and the number of items that it buffers
/// meanwhile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GatePolicy {
    pub(super) start: GateStart,
    pub(super) gap_wait_max: Duration,
    pub(super) early_max_per_partition: usize,
    pub(super) early_max: usize,
    pub(super) ahead_max: u64,
    pub(super) partitions_max: usize,
    pub(super) closed_gaps_max: usize,
}

impl Default for GatePolicy {
    fn default() -> Self {
        Self {
            start: GateStart::At(0),
            gap_wait_max: Duration::from_secs(5),
            early_max_per_partition: 1 << 16,
            early_max: 1 << 20,
            ahead_max: 1 << 20,
            partitions_max: 1 << 20,
            closed_gaps_max: 64,
        }
    }
}

impl GatePolicy {
    setters! {
        /// The start of a partition. Default: sequence 0.
        start: GateStart,
        /// The longest wait for a missing sequence, 0..=24 h, after the first item above it came. Default: 5 s.
        gap_wait_max: Duration,
        /// The largest number of buffered items per partition, 1..=2³⁰; more are refused. Default: 65,536.
        early_max_per_partition: usize,
        /// The largest number of buffered items in all partitions, 1..=2³⁰; more are refused. Default: 1,048,576. A
        /// buffered item takes its size plus 16 to 40 bytes, and each partition with buffered items about 310 bytes
        /// more.
        early_max: usize,
        /// The largest distance of an item above the expected sequence, at least 1; items further above are refused.
        /// Without this limit, one wrong number could close a gap over all future sequences. Default: 1,048,576.
        ahead_max: u64,
        /// The largest number of partitions, 1..=2³⁰; items of further partitions are refused until one is removed.
        /// Default: 1,048,576. A partition in order takes its key and 32 bytes in a hash table, half of which may be
        /// empty.
        partitions_max: usize,
        /// The number of closed gaps remembered per partition, 1..=65,536, to distinguish late items from duplicates.
        /// When there are more, the oldest is forgotten. Each gap takes 16 bytes, and a late item may split a gap into
        /// two. Default: 64.
        closed_gaps_max: usize,
    }

    /// Returns the start of a partition.
    pub(crate) fn starts(&self) -> GateStart {
        self.start
    }

    pub(super) fn check(&self) -> Result<(), ConfigError> {
        in_range("gate_gap_wait_max_ms", whole_ms(self.gap_wait_max), 0, 24 * 3_600_000)?;
        in_range("gate_early_max_per_partition", self.early_max_per_partition as u64, 1, 1 << 30)?;
        in_range("gate_early_max", self.early_max as u64, 1, 1 << 30)?;
        in_range("gate_ahead_max", self.ahead_max, 1, u64::MAX)?;
        in_range("gate_partitions_max", self.partitions_max as u64, 1, 1 << 30)?;
        in_range("gate_closed_gaps_max", self.closed_gaps_max as u64, 1, 65_536)
    }
}
