//! The answers of the gate. Data only.

use std::fmt;
use std::time::Duration;

/// The gate's answer to an item that it did not refuse.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub enum Offered<T> {
    /// The item was expected next: handle it now. [`SequenceGate::next`](crate::ingress::SequenceGate::next) releases
    /// the items buffered behind it.
    Passed(T),
    /// The item is early. [`SequenceGate::next`](crate::ingress::SequenceGate::next) will release it.
    Buffered,
    /// An item of this sequence has passed or is buffered. The gate counted and dropped this one.
    Duplicate,
    /// The item belongs to a closed gap and is offered for the first time. If it is offered again, it is a duplicate.
    Late(T),
    /// The sequence is below everything that the gate remembers of its partition: below the partition's start, or among
    /// forgotten gaps. The gate does not know whether such an item has passed before.
    TooOld(T),
}

/// The reason why an item was refused, with the item. The gate does not keep the item.
///
/// An item that is expected next is never refused for lack of room, so input in order always makes progress. After a
/// refusal, call [`SequenceGate::next`](crate::ingress::SequenceGate::next) and offer the item again later. There will
/// be room when the first gap is closed, if not earlier.
#[derive(thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum OfferRefused<T> {
    /// The partition has `early_max_per_partition` buffered items.
    #[error("the partition has no room for more early items")]
    PartitionFull(T),
    /// All partitions together have `early_max` buffered items.
    #[error("the gate has no room for more early items")]
    Full(T),
    /// The sequence is more than `ahead_max` above the expected one, or is `u64::MAX`, which is not a valid sequence.
    /// If the source really jumped that far, remove the partition and start it again.
    #[error("the sequence is too far ahead of the expected one")]
    TooFarAhead(T),
    /// The item belongs to a new partition, but the gate already has `partitions_max` partitions.
    #[error("the gate has no room for more partitions")]
    TooManyPartitions(T),
}

impl<T> OfferRefused<T> {
    /// Returns the item.
    pub fn into_item(self) -> T {
        match self {
            Self::PartitionFull(item) | Self::Full(item) | Self::TooFarAhead(item) | Self::TooManyPartitions(item) => {
                item
            }
        }
    }

    /// Returns the same refusal with a changed item.
    pub(crate) fn map<U>(self, change: impl FnOnce(T) -> U) -> OfferRefused<U> {
        match self {
            Self::PartitionFull(item) => OfferRefused::PartitionFull(change(item)),
            Self::Full(item) => OfferRefused::Full(change(item)),
            Self::TooFarAhead(item) => OfferRefused::TooFarAhead(change(item)),
            Self::TooManyPartitions(item) => OfferRefused::TooManyPartitions(change(item)),
        }
    }
}

// Not derived, because the item need not implement `Debug`.
impl<T> fmt::Debug for OfferRefused<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::PartitionFull(_) => "PartitionFull",
            Self::Full(_) => "Full",
            Self::TooFarAhead(_) => "TooFarAhead",
            Self::TooManyPartitions(_) => "TooManyPartitions",
        })
    }
}

/// An item or a gap that the gate releases from its buffer.
#[derive(Debug, PartialEq, Eq)]
pub enum Released<P, T> {
    /// An item whose turn has come.
    Item {
        /// Its partition.
        partition: P,
        /// Its sequence number in the partition.
        sequence: u64,
        /// The item.
        item: T,
    },
    /// The sequences `from..=to` have not come in time, and the gate no longer waits for them. The items after the gap
    /// come next; make a record of the gap durable before you take these items.
    GapClosed {
        /// The partition.
        partition: P,
        /// The first missing sequence.
        from: u64,
        /// The last missing sequence.
        to: u64,
        /// The time since the first item above the gap came.
        waited: Duration,
    },
}

/// The reason why a partition's start cannot be set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StartRefused {
    /// The partition has already started.
    #[error("the partition has started already")]
    Started,
    /// The gate already has `partitions_max` partitions.
    #[error("the gate has no room for more partitions")]
    TooManyPartitions,
}

/// The counts since the gate was created. Every offered item is in exactly one of `in_order`, `reordered`, `waiting`,
/// `duplicates`, `late`, `too_old`, `refused` and `removed`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct GateStatistics {
    /// Items that passed at once.
    pub in_order: u64,
    /// Items that were buffered and released.
    pub reordered: u64,
    /// Items buffered now.
    pub waiting: u64,
    /// Items dropped as duplicates.
    pub duplicates: u64,
    /// Items returned because their gap was closed.
    pub late: u64,
    /// Items returned as too old.
    pub too_old: u64,
    /// Items refused.
    pub refused: u64,
    /// Items returned by `remove`.
    pub removed: u64,
    /// Gaps closed.
    pub gaps_closed: u64,
    /// Sequences in closed gaps.
    pub missing: u64,
    /// Partitions of the gate now.
    pub partitions: u64,
}
