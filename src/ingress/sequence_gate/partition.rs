//! One partition of the gate: what it expects, what came early, which gaps were closed. No clock, no bounds of its own.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

/// What is known of a sequence below the one expected.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Behind {
    Duplicate,
    Late,
    TooOld,
}

/// What is known beforehand of a sequence above the one expected: it is not waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ahead {
    /// It has passed in an earlier life.
    Passed,
    /// It belongs to a gap that was closed then.
    Missing,
    /// It belonged to one, and has come since.
    Late,
}

/// 32 bytes while everything comes in order.
#[derive(Debug)]
pub(super) struct Partition<T> {
    /// The next sequence to pass.
    pub(super) expected: u64,
    /// Below it, nothing is known of single sequences.
    known_from: u64,
    disorder: Option<Box<Disorder<T>>>,
    /// Stands in the gate's list of what is ready.
    pub(super) is_ready: bool,
    /// Stands in the gate's heap.
    pub(super) is_timed: bool,
}

const _: () = assert!(size_of::<Partition<u64>>() == 32);

#[derive(Debug)]
struct Disorder<T> {
    /// All at or above `expected`.
    early: BTreeMap<u64, T>,
    /// Which early items came when they were the highest so far, and when: rising in both. What is missing below a
    /// sequence is missing since the first of these above it came.
    highest: VecDeque<(u64, Duration)>,
    /// What is missing of closed gaps, first and last sequence, rising.
    closed: Vec<(u64, u64)>,
    /// What is known beforehand, first and last sequence, rising: all above `expected`, nothing of it in `early`. Boxed, because
    /// there is any only behind a restart that found holes.
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

    /// One that goes on from an earlier life. What is known beforehand comes by rising sequence, at or above `expected`.
    pub(super) fn resumed(expected: u64, ahead: Vec<(u64, u64, Ahead)>, closed_max: usize) -> Self {
        let mut resumed = Self::new(expected);
        if !ahead.is_empty() {
            let ahead = ahead.into_iter().map(|(from, to, what)| (from, (to, what))).collect();
            resumed.disorder = Some(Box::new(Disorder { ahead: Some(Box::new(ahead)), ..Disorder::new() }));
            resumed.step_over(closed_max);
        }
        resumed
    }

    /// Moves over what is known beforehand, where it is next.
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

    /// What is known beforehand of a sequence above the expected one. A missing one is missing once.
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

    /// Whether a sequence is not waited for: its turn is over, or known to be.
    pub(super) fn is_over(&self, sequence: u64) -> bool {
        sequence < self.expected || self.ahead_at(sequence).is_some_and(|(to, _)| to >= sequence)
    }

    /// The nearest sequence at or below this one behind which everything is open.
    pub(super) fn open_from(&self, sequence: u64) -> u64 {
        self.ahead_at(sequence).map_or(self.expected, |(to, _)| to + 1)
    }

    /// The last run known beforehand that begins at or below this one: its end.
    fn ahead_at(&self, sequence: u64) -> Option<(u64, Ahead)> {
        let ahead = self.disorder.as_ref()?.ahead.as_ref()?;
        ahead.range(..=sequence).next_back().map(|(_, known)| *known)
    }

    /// What is known beforehand, by rising sequence.
    pub(super) fn ahead(&self) -> impl Iterator<Item = (u64, u64, Ahead)> + '_ {
        let ahead = self.disorder.as_ref().and_then(|disorder| disorder.ahead.as_ref());
        ahead.into_iter().flat_map(|ahead| ahead.iter().map(|(from, (to, what))| (*from, *to, *what)))
    }

    /// Lets go of the memory of a disorder that is over.
    fn settle(&mut self) {
        if self.disorder.as_ref().is_some_and(|disorder| disorder.is_over()) {
            self.disorder = None;
        }
    }

    /// Nothing is buffered and no gap is remembered.
    #[inline]
    pub(super) fn is_plain(&self) -> bool {
        self.disorder.is_none()
    }

    /// Number of early items.
    pub(super) fn early(&self) -> usize {
        self.disorder.as_ref().map_or(0, |disorder| disorder.early.len())
    }

    pub(super) fn is_buffered(&self, sequence: u64) -> bool {
        self.disorder.as_ref().is_some_and(|disorder| disorder.early.contains_key(&sequence))
    }

    /// Whether the expected item is buffered.
    pub(super) fn has_ready(&self) -> bool {
        self.first_early() == Some(self.expected)
    }

    fn first_early(&self) -> Option<u64> {
        self.disorder.as_ref()?.early.first_key_value().map(|(sequence, _)| *sequence)
    }

    /// Keeps an item that lies above the expected one and is not buffered yet.
    pub(super) fn buffer(&mut self, sequence: u64, item: T, now: Duration) {
        assert!(sequence > self.expected);
        let disorder = self.disorder.get_or_insert_with(|| Box::new(Disorder::new()));
        let replaced = disorder.early.insert(sequence, item);
        assert!(replaced.is_none());
        if disorder.highest.back().is_none_or(|(highest, _)| *highest < sequence) {
            disorder.highest.push_back((sequence, now));
        }
    }

    /// Takes the expected item from the buffer, if it is there.
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

    /// Since when the expected item is missing; `None` when nothing shows that it is.
    pub(super) fn missing_since(&self) -> Option<Duration> {
        self.disorder.as_ref()?.highest.front().map(|(_, at)| *at)
    }

    /// Gives up what is missing before the first early item, or before what is known to follow.
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

    /// What is known of a sequence below the expected one. Of a closed gap it is late once.
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

    /// Remembers at most so many gaps: the oldest goes first.
    fn forget(&mut self, closed_max: usize) {
        let Some(disorder) = &mut self.disorder else { return };
        if disorder.closed.len() > closed_max {
            let (_, to) = disorder.closed.remove(0);
            self.known_from = to + 1;
        }
    }

    /// What is buffered, by rising sequence.
    pub(super) fn into_early(self) -> Vec<(u64, T)> {
        self.disorder.map_or_else(Vec::new, |disorder| disorder.early.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_partition_that_goes_on_from_many_holes_steps_over_each_once() {
        const RUNS: u64 = 200_000;
        let what = |i: u64| if i.is_multiple_of(2) { Ahead::Passed } else { Ahead::Late };
        let ahead: Vec<_> = (0..RUNS).map(|i| (2 * i + 10, 2 * i + 11, what(i))).collect();
        let mut partition = Partition::<()>::resumed(9, ahead, 16);
        // From the far end, so that a walk from the near one would go over all of them.
        for i in (0..RUNS).rev() {
            let sequence = 2 * i + 11;
            assert!(partition.is_over(sequence));
            assert_eq!(partition.open_from(sequence), sequence + 1);
            assert_eq!(partition.known_ahead(sequence), Some(what(i)));
        }
        partition.expected += 1;
        partition.step_over(16);
        assert_eq!(partition.expected, 2 * RUNS + 10);
        assert!(partition.is_plain());
    }
}
