//! What the gate answers. Data only.

use std::fmt;
use std::time::Duration;

/// What became of an item that was offered and not refused.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub enum Offered<T> {
    /// It is the one expected: handle it now. Those buffered behind it come from [`SequenceGate::next`](crate::ingress::SequenceGate::next).
    Passed(T),
    /// It is early. It will come from [`SequenceGate::next`](crate::ingress::SequenceGate::next).
    Buffered,
    /// Its sequence has passed already, or waits in the buffer. It was counted and dropped.
    Duplicate,
    /// It belongs to a gap that has been closed, and comes for the first time. A second time it is a duplicate.
    Late(T),
    /// Its sequence lies below what the gate remembers of its partition: before where the partition started, or in the
    /// times of gaps that were forgotten. Whether it has passed before is not known.
    TooOld(T),
}

/// Why an item was refused. It comes back, and the gate keeps nothing of it.
///
/// An item that is expected next is never refused for want of room, so what comes in the order of its sequences can
/// always go on. Who is refused pulls [`SequenceGate::next`](crate::ingress::SequenceGate::next) and offers again later: at the latest when the gap in
/// front is closed there is room.
#[derive(thiserror::Error, PartialEq, Eq)]
pub enum OfferRefused<T> {
    /// The partition has `early_max_per_partition` items buffered.
    #[error("the partition has no room for more early items")]
    PartitionFull(T),
    /// All partitions together have `early_max` items buffered.
    #[error("the gate has no room for more early items")]
    Full(T),
    /// The sequence lies more than `ahead_max` above the one expected (or is `u64::MAX`, which is none). If its source did
    /// jump that far, remove the partition and start it anew.
    #[error("the sequence lies too far ahead")]
    TooFarAhead(T),
    /// It is of a new partition, and the gate knows `partitions_max` already.
    #[error("the gate has no room for more partitions")]
    TooManyPartitions(T),
}

impl<T> OfferRefused<T> {
    /// Takes the item back.
    pub fn into_item(self) -> T {
        match self {
            Self::PartitionFull(item) | Self::Full(item) | Self::TooFarAhead(item) | Self::TooManyPartitions(item) => {
                item
            }
        }
    }

    /// The same refusal of something else.
    pub(crate) fn map<U>(self, change: impl FnOnce(T) -> U) -> OfferRefused<U> {
        match self {
            Self::PartitionFull(item) => OfferRefused::PartitionFull(change(item)),
            Self::Full(item) => OfferRefused::Full(change(item)),
            Self::TooFarAhead(item) => OfferRefused::TooFarAhead(change(item)),
            Self::TooManyPartitions(item) => OfferRefused::TooManyPartitions(change(item)),
        }
    }
}

// Not derived: an item need not be Debug for its refusal to be.
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

/// What comes out of the gate's buffer.
#[derive(Debug, PartialEq, Eq)]
pub enum Released<P, T> {
    /// An item whose turn it is.
    Item {
        /// Its partition.
        partition: P,
        /// Its number there.
        sequence: u64,
        /// The item.
        item: T,
    },
    /// The sequences `from..=to` have not come for too long and are no longer waited for. The caller makes a record of it
    /// durable before pulling on; the items behind the gap come next.
    GapClosed {
        /// The partition.
        partition: P,
        /// The first missing sequence.
        from: u64,
        /// The last missing sequence.
        to: u64,
        /// How long they were waited for, since the first item above them came.
        waited: Duration,
    },
}

/// A partition that cannot be told where to start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StartRefused {
    /// It has started.
    #[error("the partition has started already")]
    Started,
    /// The gate knows `partitions_max` already.
    #[error("the gate has no room for more partitions")]
    TooManyPartitions,
}

/// Counts since the gate was made. Every offered item is in exactly one of `in_order`, `reordered`, `waiting`,
/// `duplicates`, `late`, `too_old`, `refused` and `removed`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct GateStatistics {
    /// Passed at once.
    pub in_order: u64,
    /// Buffered, and released.
    pub reordered: u64,
    /// Buffered now.
    pub waiting: u64,
    /// Dropped: seen before.
    pub duplicates: u64,
    /// Handed back: of a closed gap.
    pub late: u64,
    /// Handed back: too old to be known.
    pub too_old: u64,
    /// Handed back: no room, or too far ahead.
    pub refused: u64,
    /// Handed back by `remove`.
    pub removed: u64,
    /// Gaps closed.
    pub gaps_closed: u64,
    /// Sequences in them.
    pub missing: u64,
    /// Partitions known now.
    pub partitions: u64,
}
