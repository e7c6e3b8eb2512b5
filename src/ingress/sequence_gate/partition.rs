//! One partition of the gate: its expected sequence, its early items and its closed gaps. This file has no clock and no
//! limits.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

/// The state of a sequence below the expected one.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Behind {
    Duplicate,
    Late,
    TooOld,
}

/// The state of a known sequence above the expected one, which the gate does not wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ahead {
    /// The sequence passed before a restart.
    Passed,
    /// The sequence belongs to a gap that was closed before a restart.
    Missing,
    /// The sequence belonged to such a gap, and its item has come since.
    Late,
}

/// The state of one partition, which takes 32 bytes while its items come in order.
#[derive(Debug)]
pub(super) struct Partition<T> {
    /// The next sequence to pass.
    pub(super) expected: u64,
    /// The gate does not remember individual sequences below this one.
    known_from: u64,
    disorder: Option<Box<Disorder<T>>>,
    /// `true` while the partition is in the gate's list of ready partitions.
    pub(super) is_ready: bool,
    /// `true` while the partition is in the gate's heap.
    pub(super) is_timed: bool,
}

const _: () = assert!(size_of::<Partition<u64>>() == 32);

/// The state that a partition needs only while items are early or gaps are remembered.
#[derive(Debug)]
struct Disorder<T> {
    /// Buffered items by sequence, all at or above `expected`.
    early: BTreeMap<u64, T>,
    /// The early items that had the highest sequence when they came, each with its time of arrival. Sequences and times
    /// rise. A missing sequence has been missing since the first of these items above it came.
    highest: VecDeque<(u64, Duration)>,
    /// The sequences of closed gaps that have not come, as rising ranges (first, last).
    closed: Vec<(u64, u64)>,
    /// The known sequences, as rising ranges by first sequence: all above `expected`, none of them in `early`. Boxed,
    /// because known sequences exist only after a restart that found holes.
    #[expect(clippy::box_collection, reason = "8 bytes of every partition with early items instead of 24")]
    ahead: Option<Box<BTreeMap<u64, (u64, Ahead)>>>,
}

impl<T> Disorder<T> {
    fn new() -> Self {
        Self { early: BTreeMap::new(), highest: VecDeque::new(), closed: Vec::new(), ahead: None }
    }

    fn is_over(&self) -> bool {
        self.early.is_empty() && self.closed.is_empty() && self.ahead.is_none()
    }
}

impl<T> Partition<T> {
    pub(super) fn new(expected: u64) -> Self {
        Self { expected, known_from: expected, disorder: None, is_ready: false, is_timed: false }
    }

    /// Creates a partition that continues after a restart. The known ranges in `ahead` must rise and begin at or above
    /// `expected`.
    pub(super) fn resumed(expected: u64, ahead: Vec<(u64, u64, Ahead)>, closed_max: usize) -> Self {
        let mut resumed = Self::new(expected);
        if !ahead.is_empty() {
            let ahead = ahead.into_iter().map(|(from, to, what)| (from, (to, what))).collect();
            resumed.disorder = Some(Box::new(Disorder { ahead: Some(Box::new(ahead)), ..Disorder::new() }));
            resumed.step_over(closed_max);
        }
        resumed
    }

    /// Steps over known sequences that are expected next.
    pub(super) fn step_over(&mut self, closed_max: usize) {
        while let Some(disorder) = &mut self.disorder
            && let Some(ahead) = &mut disorder.ahead
            && let Some((to, what)) = ahead.remove(&self.expected)
        {
            let from = self.expected;
            if ahead.is_empty() {
                disorder.ahead = None;
            }
            if what == Ahead::Missing {
                disorder.closed.push((from, to));
            }
            self.expected = to + 1;
            self.forget(closed_max);
            self.settle();
        }
    }

    /// Returns the state of a known sequence above the expected one. A `Missing` sequence becomes `Late`.
    pub(super) fn known_ahead(&mut self, sequence: u64) -> Option<Ahead> {
        let ahead = self.disorder.as_mut()?.ahead.as_mut()?;
        let (&from, &(to, what)) = ahead.range(..=sequence).next_back().filter(|(_, (to, _))| *to >= sequence)?;
        if what == Ahead::Missing {
            ahead.remove(&from);
            ahead.extend((from < sequence).then(|| (from, (sequence - 1, Ahead::Missing))));
            ahead.extend((sequence < to).then(|| (sequence + 1, (to, Ahead::Missing))));
            ahead.insert(sequence, (sequence, Ahead::Late));
        }
        Some(what)
    }

    /// Returns `true` if the sequence is below the expected one or is known.
    pub(super) fn is_over(&self, sequence: u64) -> bool {
        sequence < self.expected || self.ahead_at(sequence).is_some_and(|(to, _)| to >= sequence)
    }

    /// Returns the first sequence of the stretch without known sequences that contains `sequence`.
    pub(super) fn open_from(&self, sequence: u64) -> u64 {
        self.ahead_at(sequence).map_or(self.expected, |(to, _)| to + 1)
    }

    /// Returns the last known range that begins at or below `sequence`: its end and state.
    fn ahead_at(&self, sequence: u64) -> Option<(u64, Ahead)> {
        let ahead = self.disorder.as_ref()?.ahead.as_ref()?;
        ahead.range(..=sequence).next_back().map(|(_, known)| *known)
    }

    /// Returns the known ranges, by rising sequence.
    pub(super) fn ahead(&self) -> impl Iterator<Item = (u64, u64, Ahead)> + '_ {
        let ahead = self.disorder.as_ref().and_then(|disorder| disorder.ahead.as_ref());
        ahead.into_iter().flat_map(|ahead| ahead.iter().map(|(from, (to, what))| (*from, *to, *what)))
    }

    /// Frees the memory of a [`Disorder`] that has ended.
    fn settle(&mut self) {
        if self.disorder.as_ref().is_some_and(|disorder| disorder.is_over()) {
            self.disorder = None;
        }
    }

    /// Returns `true` if nothing is buffered and no gap is remembered.
    #[inline]
    pub(super) fn is_plain(&self) -> bool {
        self.disorder.is_none()
    }

    /// Returns the number of buffered items.
    pub(super) fn early(&self) -> usize {
        self.disorder.as_ref().map_or(0, |disorder| disorder.early.len())
    }

    pub(super) fn is_buffered(&self, sequence: u64) -> bool {
        self.disorder.as_ref().is_some_and(|disorder| disorder.early.contains_key(&sequence))
    }

    /// Returns `true` if the expected item is buffered.
    pub(super) fn has_ready(&self) -> bool {
        self.first_early() == Some(self.expected)
    }

    fn first_early(&self) -> Option<u64> {
        self.disorder.as_ref()?.early.first_key_value().map(|(sequence, _)| *sequence)
    }

    /// Buffers an item whose sequence is above the expected one and is not buffered yet.
    pub(super) fn buffer(&mut self, sequence: u64, item: T, now: Duration) {
        assert!(sequence > self.expected);
        let disorder = self.disorder.get_or_insert_with(|| Box::new(Disorder::new()));
        let replaced = disorder.early.insert(sequence, item);
        assert!(replaced.is_none());
        if disorder.highest.back().is_none_or(|(highest, _)| *highest < sequence) {
            disorder.highest.push_back((sequence, now));
        }
    }

    /// Takes the expected item from the buffer. Returns `None` if it is not buffered.
    pub(super) fn pop_ready(&mut self, closed_max: usize) -> Option<(u64, T)> {
        let disorder = self.disorder.as_mut()?;
        let first = disorder.early.first_entry().filter(|first| *first.key() == self.expected)?;
        let (sequence, item) = first.remove_entry();
        if disorder.highest.front().is_some_and(|(highest, _)| *highest == sequence) {
            disorder.highest.pop_front();
        }
        self.expected += 1;
        self.step_over(closed_max);
        self.settle();
        Some((sequence, item))
    }

    /// Returns the time since which the expected item has been missing, or `None` if no item above it has come.
    pub(super) fn missing_since(&self) -> Option<Duration> {
        self.disorder.as_ref()?.highest.front().map(|(_, at)| *at)
    }

    /// Closes the gap before the first buffered item or known sequence. Returns its first and last sequence.
    pub(super) fn close_gap(&mut self, closed_max: usize) -> Option<(u64, u64)> {
        let first_ahead = self.ahead().next().map_or(u64::MAX, |(from, ..)| from);
        let first = self.first_early().map(|first| first.min(first_ahead)).filter(|first| *first > self.expected)?;
        let gap = (self.expected, first - 1);
        self.expected = first;
        self.disorder.as_mut()?.closed.push(gap);
        self.forget(closed_max);
        self.step_over(closed_max);
        Some(gap)
    }

    /// Returns the state of a sequence below the expected one. A sequence of a closed gap is late once, then a
    /// duplicate.
    pub(super) fn behind(&mut self, sequence: u64, closed_max: usize) -> Behind {
        assert!(sequence < self.expected);
        if sequence < self.known_from {
            return Behind::TooOld;
        }
        let Some(disorder) = &mut self.disorder else { return Behind::Duplicate };
        let at = disorder.closed.partition_point(|(_, to)| *to < sequence);
        let Some((from, to)) = disorder.closed.get(at).copied().filter(|(from, _)| *from <= sequence) else {
            return Behind::Duplicate;
        };
        let left = (from < sequence).then(|| (from, sequence - 1));
        let right = (sequence < to).then(|| (sequence + 1, to));
        disorder.closed.splice(at..=at, left.into_iter().chain(right));
        self.settle();
        self.forget(closed_max);
        Behind::Late
    }

    /// Forgets the oldest closed gap if more than `closed_max` are remembered.
    fn forget(&mut self, closed_max: usize) {
        let Some(disorder) = &mut self.disorder else { return };
        if disorder.closed.len() > closed_max {
            let (_, to) = disorder.closed.remove(0);
            self.known_from = to + 1;
        }
    }

    /// Returns the buffered items, by rising sequence.
    pub(super) fn into_early(self) -> Vec<(u64, T)> {
        self.disorder.map_or_else(Vec::new, |disorder| disorder.early.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_partition_resumed_with_many_holes_steps_over_each_once() {
        const RANGES: u64 = 200_000;
        let what = |i: u64| if i.is_multiple_of(2) { Ahead::Passed } else { Ahead::Late };
        let ahead: Vec<_> = (0..RANGES).map(|i| (2 * i + 10, 2 * i + 11, what(i))).collect();
        let mut partition = Partition::<()>::resumed(9, ahead, 16);
        // From the far end: a walk from the near end would pass all ranges.
        for i in (0..RANGES).rev() {
            let sequence = 2 * i + 11;
            assert!(partition.is_over(sequence));
            assert_eq!(partition.open_from(sequence), sequence + 1);
            assert_eq!(partition.known_ahead(sequence), Some(what(i)));
        }
        partition.expected += 1;
        partition.step_over(16);
        assert_eq!(partition.expected, 2 * RANGES + 10);
        assert!(partition.is_plain());
    }
}
