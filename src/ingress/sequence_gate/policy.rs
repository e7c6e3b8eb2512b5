//! The gate's limits, each with its unit. Does not know what they are used for.

use std::time::Duration;

use crate::config::in_range;
use crate::config::setters;
use crate::config::whole_ms;
use crate::error::ConfigError;

/// Where a partition starts that nobody named a start for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GateStart {
    /// At this sequence.
    At(u64),
    /// At that of its first item. What comes below it later is too old.
    FirstSeen,
}

/// What the gate waits for, and how much it keeps meanwhile.
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
        /// Where a partition starts. Default: at 0.
        start: GateStart,
        /// How long a missing sequence is waited for, 0..=24 h, from when the first item above it came. Default: 5 s.
        gap_wait_max: Duration,
        /// Early items buffered of one partition, 1..=2³⁰; more are refused. Default: 65,536.
        early_max_per_partition: usize,
        /// Early items buffered of all partitions, 1..=2³⁰; more are refused. Default: 1,048,576. One takes the item's
        /// size and 16 to 40 bytes, and each partition that has any about 310 more.
        early_max: usize,
        /// How far above the expected sequence an item may lie, at least 1; farther ones are refused. It keeps one
        /// wrong number from closing a gap over everything to come. Default: 1,048,576.
        ahead_max: u64,
        /// Partitions known at once, 1..=2³⁰; items of further ones are refused until one is removed. Default:
        /// 1,048,576. A partition in order takes its key and 32 bytes in a hash table, half of which may be empty.
        partitions_max: usize,
        /// Closed gaps remembered per partition, 1..=65,536, to tell late items from duplicates; each takes 16 bytes, and a
        /// late item may split one into two. When there are more, the oldest is forgotten. Default: 64.
        closed_gaps_max: usize,
    }

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
