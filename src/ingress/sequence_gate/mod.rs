//! The sequence gate: restores the order of input by a sequence number per partition.
//!
//! One writer: its owner. The items of a partition leave by rising sequence, each at most once. Every other item is
//! buffered, returned, or counted as a duplicate, and the gate reports every gap that it closes.
//!
//! ```text
//!  offer ─▶ expected next ──▶ Passed at once, without a look into any buffer
//!        ─▶ early ──────────▶ buffered ──▶ next(): Item, after the items before it have passed
//!        ─▶ seen before ────▶ Duplicate      └───▶ next(): GapClosed, when they have not come in time
//!        ─▶ of a closed gap ▶ Late
//! ```
//!
//! An item in order costs one look-up of its partition and no allocation. Buffered items are in one B-tree per
//! partition: the cost depends on their number, not on the distance between their sequences.

use std::collections::hash_map::Entry;
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::fmt;
use std::hash::Hash;
use std::time::Duration;

use crate::error::ConfigError;

pub(crate) mod answer;
pub(crate) mod partition;
pub(crate) mod policy;

use answer::{GateStatistics, OfferRefused, Offered, Released, StartRefused};
use partition::{Ahead, Behind, Partition};
use policy::{GatePolicy, GateStart};

/// Puts items in order by partition and sequence. `P` identifies a partition: a user, a Kafka partition, a sender.
///
/// `now` is the time since any fixed moment on a monotonic clock. If `now` goes back, the gate uses the latest time
/// that it was given.
///
/// ```
/// # use corelane::ingress::{GatePolicy, Offered, Released, SequenceGate};
/// # use std::time::Duration;
/// let mut gate = SequenceGate::new(GatePolicy::default())?;
/// let now = Duration::ZERO;
/// assert_eq!(gate.offer("alice", 1, "second", now), Ok(Offered::Buffered));
/// assert_eq!(gate.offer("alice", 0, "first", now), Ok(Offered::Passed("first")));
/// let Some(Released::Item { item, .. }) = gate.next(now) else { panic!("the second is ready") };
/// assert_eq!(item, "second");
///
/// // 2 never comes.
/// assert_eq!(gate.offer("alice", 3, "fourth", now), Ok(Offered::Buffered));
/// assert_eq!(gate.next_due(), Some(Duration::from_secs(5)));
/// let gap = gate.next(Duration::from_secs(5));
/// assert!(matches!(gap, Some(Released::GapClosed { partition: "alice", from: 2, to: 2, .. })));
/// assert!(matches!(gate.next(Duration::from_secs(5)), Some(Released::Item { item: "fourth", .. })));
/// # Ok::<(), corelane::ConfigError>(())
/// ```
pub struct SequenceGate<P, T> {
    policy: GatePolicy,
    partitions: HashMap<P, Partition<T>>,
    /// Partitions whose next item is buffered, each once.
    ready: VecDeque<P>,
    /// Partitions with a gap, each at most once, ordered by a time no later than the one at which the partition's first
    /// gap is due.
    timed: BinaryHeap<Timed<P>>,
    now: Duration,
    has_ended: bool,
    statistics: GateStatistics,
}

impl<P, T> fmt::Debug for SequenceGate<P, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SequenceGate")
            .field("policy", &self.policy)
            .field("now", &self.now)
            .field("statistics", &self.statistics)
            .finish_non_exhaustive()
    }
}

impl<P: Eq + Hash + Clone, T> SequenceGate<P, T> {
    /// Creates an empty gate.
    ///
    /// # Errors
    /// Returns the first value of the policy that is out of range.
    pub fn new(policy: GatePolicy) -> Result<Self, ConfigError> {
        policy.check()?;
        Ok(Self {
            policy,
            partitions: HashMap::new(),
            ready: VecDeque::new(),
            timed: BinaryHeap::new(),
            now: Duration::ZERO,
            has_ended: false,
            statistics: GateStatistics::default(),
        })
    }

    /// Sets the sequence at which a partition starts, for instance the one that it expected before a restart. Call this
    /// before the partition's first item.
    ///
    /// # Errors
    /// Returns an error if the partition has started, or if the gate has no room for it.
    pub fn start_at(&mut self, partition: P, sequence: u64) -> Result<(), StartRefused> {
        let is_full = self.partitions.len() >= self.policy.partitions_max;
        match self.partitions.entry(partition) {
            Entry::Occupied(_) => Err(StartRefused::Started),
            Entry::Vacant(_) if is_full => Err(StartRefused::TooManyPartitions),
            Entry::Vacant(vacant) => {
                vacant.insert(Partition::new(sequence));
                Ok(())
            }
        }
    }

    /// As [`SequenceGate::start_at`], but for a partition with known sequences at or above `sequence`, which have
    /// passed or are in a closed gap.
    pub(crate) fn resume(
        &mut self,
        partition: P,
        sequence: u64,
        ahead: Vec<(u64, u64, Ahead)>,
    ) -> Result<(), StartRefused> {
        self.start_at(partition.clone(), sequence)?;
        self.partitions.insert(partition, Partition::resumed(sequence, ahead, self.policy.closed_gaps_max));
        Ok(())
    }

    /// Returns every partition with the sequence that it expects and the known sequences above that.
    pub(crate) fn standings(&self) -> impl Iterator<Item = (&P, u64, impl Iterator<Item = (u64, u64, Ahead)> + '_)> {
        self.partitions.iter().map(|(partition, known)| (partition, known.expected, known.ahead()))
    }

    /// Returns `true` if the gate does not expect this sequence any more.
    pub(crate) fn is_over(&self, partition: &P, sequence: u64) -> bool {
        self.partitions.get(partition).is_some_and(|known| known.is_over(sequence))
    }

    /// Returns `true` if the policy lets this item start its partition, and the gate would not refuse it.
    #[inline]
    pub(crate) fn would_start(&self, partition: &P, sequence: u64) -> bool {
        self.policy.start == GateStart::FirstSeen
            && sequence != u64::MAX
            && self.partitions.len() < self.policy.partitions_max
            && !self.partitions.contains_key(partition)
    }

    /// Offers an item to the gate.
    ///
    /// # Errors
    /// Returns the item with the reason why it was refused.
    #[inline]
    pub fn offer(
        &mut self,
        partition: P,
        sequence: u64,
        item: T,
        now: Duration,
    ) -> Result<Offered<T>, OfferRefused<T>> {
        self.now = self.now.max(now);
        if let Some(known) = self.partitions.get_mut(&partition)
            && known.expected == sequence
            && known.is_plain()
            && sequence != u64::MAX
        {
            known.expected += 1;
            self.statistics.in_order += 1;
            return Ok(Offered::Passed(item));
        }
        let offered = self.offer_any(partition, sequence, item);
        self.statistics.refused += u64::from(offered.is_err());
        offered
    }

    /// Handles an item that is not expected next, or whose partition is new or has buffered items or gaps.
    fn offer_any(&mut self, partition: P, sequence: u64, item: T) -> Result<Offered<T>, OfferRefused<T>> {
        if sequence == u64::MAX {
            return Err(OfferRefused::TooFarAhead(item));
        }
        let is_full = self.partitions.len() >= self.policy.partitions_max;
        let (start, wait) = (self.policy.start, self.policy.gap_wait_max);
        let mut entry = match self.partitions.entry(partition) {
            Entry::Occupied(known) => known,
            Entry::Vacant(_) if is_full => return Err(OfferRefused::TooManyPartitions(item)),
            Entry::Vacant(vacant) => vacant.insert_entry(Partition::new(match start {
                GateStart::At(first) => first,
                GateStart::FirstSeen => sequence,
            })),
        };
        let known = entry.get_mut();
        // The expected item may be in the buffer already, ready but not pulled yet; this one is then a duplicate.
        if sequence == known.expected && !known.has_ready() {
            known.expected += 1;
            known.step_over(self.policy.closed_gaps_max);
            self.statistics.in_order += 1;
            if known.has_ready() && !std::mem::replace(&mut known.is_ready, true) {
                self.ready.push_back(entry.key().clone());
            }
            return Ok(Offered::Passed(item));
        }
        if sequence < known.expected {
            let (offered, count) = match known.behind(sequence, self.policy.closed_gaps_max) {
                Behind::Duplicate => (Offered::Duplicate, &mut self.statistics.duplicates),
                Behind::Late => (Offered::Late(item), &mut self.statistics.late),
                Behind::TooOld => (Offered::TooOld(item), &mut self.statistics.too_old),
            };
            *count += 1;
            return Ok(offered);
        }
        if known.is_buffered(sequence) {
            self.statistics.duplicates += 1;
            return Ok(Offered::Duplicate);
        }
        if let Some(ahead) = known.known_ahead(sequence) {
            let (offered, count) = match ahead {
                Ahead::Passed | Ahead::Late => (Offered::Duplicate, &mut self.statistics.duplicates),
                Ahead::Missing => (Offered::Late(item), &mut self.statistics.late),
            };
            *count += 1;
            return Ok(offered);
        }
        if sequence - known.open_from(sequence) > self.policy.ahead_max {
            return Err(OfferRefused::TooFarAhead(item));
        }
        if known.early() >= self.policy.early_max_per_partition {
            return Err(OfferRefused::PartitionFull(item));
        }
        if self.statistics.waiting >= self.policy.early_max as u64 {
            return Err(OfferRefused::Full(item));
        }
        known.buffer(sequence, item, self.now);
        self.statistics.waiting += 1;
        if !std::mem::replace(&mut known.is_timed, true) {
            self.timed.push(Timed { at: self.now.saturating_add(wait), partition: entry.key().clone() });
        }
        Ok(Offered::Buffered)
    }

    /// Releases the next item or gap at `now`: first items that are ready, then gaps that are due, each followed by the
    /// items after it. Returns `None` if there is none; call again at [`SequenceGate::next_due`] or after the next
    /// offer.
    ///
    /// Nothing is lost if the owner does not call this: items wait, in order.
    pub fn next(&mut self, now: Duration) -> Option<Released<P, T>> {
        self.now = self.now.max(now);
        if let Some(released) = self.next_ready() {
            return Some(released);
        }
        while let Some(first) = self.timed.peek()
            && (first.at <= self.now || self.has_ended)
        {
            let Timed { partition, .. } = self.timed.pop()?;
            let Some(known) = self.partitions.get_mut(&partition) else { continue };
            known.is_timed = false;
            // The gap for which the partition was listed may be filled by now. Another gap may be due later, or there
            // may be none.
            let Some(since) = known.missing_since() else { continue };
            let at = since.saturating_add(self.policy.gap_wait_max);
            known.is_timed = true;
            self.timed.push(Timed { at, partition: partition.clone() });
            if at > self.now && !self.has_ended {
                continue;
            }
            let (from, to) = known.close_gap(self.policy.closed_gaps_max).expect("ready items were released before");
            // A gap ends at a buffered item or at known sequences. After known sequences, another gap may follow.
            known.is_ready = known.has_ready();
            if known.is_ready {
                self.ready.push_back(partition.clone());
            }
            self.statistics.gaps_closed += 1;
            self.statistics.missing += to - from + 1;
            return Some(Released::GapClosed { partition, from, to, waited: self.now.saturating_sub(since) });
        }
        None
    }

    fn next_ready(&mut self) -> Option<Released<P, T>> {
        let partition = self.ready.front()?;
        let known = self.partitions.get_mut(partition).expect("a listed partition is known");
        let (sequence, item) =
            known.pop_ready(self.policy.closed_gaps_max).expect("a listed partition has a ready item");
        known.is_ready = known.has_ready();
        let partition = if known.is_ready { partition.clone() } else { self.ready.pop_front()? };
        self.statistics.waiting -= 1;
        self.statistics.reordered += 1;
        Some(Released::Item { partition, sequence, item })
    }

    /// Returns the time at which [`SequenceGate::next`] may release an item or a gap, or `None` if it releases nothing
    /// before the next offer. The time may be too early, if the gap was filled meanwhile, but never too late.
    #[must_use]
    pub fn next_due(&self) -> Option<Duration> {
        if !self.ready.is_empty() {
            return Some(self.now);
        }
        let first = self.timed.peek()?;
        Some(if self.has_ended { self.now } else { first.at })
    }

    /// Ends the input: from now on, gaps are closed without waiting. Call [`SequenceGate::next`] until it returns
    /// `None`.
    pub fn end(&mut self) {
        self.has_ended = true;
    }

    /// Returns the next sequence that a partition expects, or `None` if the partition is unknown.
    #[must_use]
    pub fn expected(&self, partition: &P) -> Option<u64> {
        self.partitions.get(partition).map(|known| known.expected)
    }

    /// Removes a partition, and returns its buffered items by rising sequence.
    pub fn remove(&mut self, partition: &P) -> Vec<(u64, T)> {
        let Some(known) = self.partitions.remove(partition) else { return Vec::new() };
        if known.is_ready {
            self.ready.retain(|ready| ready != partition);
        }
        if known.is_timed {
            self.timed.retain(|timed| timed.partition != *partition);
        }
        let early = known.into_early();
        self.statistics.waiting -= early.len() as u64;
        self.statistics.removed += early.len() as u64;
        early
    }

    /// Returns the counts since the gate was created.
    #[must_use]
    pub fn statistics(&self) -> GateStatistics {
        GateStatistics { partitions: self.partitions.len() as u64, ..self.statistics }
    }
}

/// A partition and the time at which to check it. The earliest time compares as the greatest, because the heap returns
/// its greatest element.
struct Timed<P> {
    at: Duration,
    partition: P,
}

impl<P> Ord for Timed<P> {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        other.at.cmp(&self.at)
    }
}

impl<P> PartialOrd for Timed<P> {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl<P> PartialEq for Timed<P> {
    fn eq(&self, other: &Self) -> bool {
        self.at == other.at
    }
}

impl<P> Eq for Timed<P> {}

#[cfg(test)]
mod tests;
