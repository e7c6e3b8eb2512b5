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
}

impl<T> Partition<T> {
    pub(super) fn new(expected: u64) -> Self {
        Self { expected, known_from: expected, disorder: None, is_ready: false, is_timed: false }
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
        let disorder = self.disorder.get_or_insert_with(|| {
            Box::new(Disorder { early: BTreeMap::new(), highest: VecDeque::new(), closed: Vec::new() })
        });
        let replaced = disorder.early.insert(sequence, item);
        assert!(replaced.is_none());
        if disorder.highest.back().is_none_or(|(highest, _)| *highest < sequence) {
            disorder.highest.push_back((sequence, now));
        }
    }

    /// Takes the expected item from the buffer, if it is there.
    pub(super) fn pop_ready(&mut self) -> Option<(u64, T)> {
        let disorder = self.disorder.as_mut()?;
        let first = disorder.early.first_entry().filter(|first| *first.key() == self.expected)?;
        let (sequence, item) = first.remove_entry();
        if disorder.highest.front().is_some_and(|(highest, _)| *highest == sequence) {
            disorder.highest.pop_front();
        }
        if disorder.early.is_empty() && disorder.closed.is_empty() {
            self.disorder = None;
        }
        self.expected += 1;
        Some((sequence, item))
    }

    /// Since when the expected item is missing; `None` when nothing shows that it is.
    pub(super) fn missing_since(&self) -> Option<Duration> {
        self.disorder.as_ref()?.highest.front().map(|(_, at)| *at)
    }

    /// Gives up what is missing before the first early item.
    pub(super) fn close_gap(&mut self, closed_max: usize) -> Option<(u64, u64)> {
        let first = self.first_early().filter(|first| *first > self.expected)?;
        let gap = (self.expected, first - 1);
        self.expected = first;
        self.disorder.as_mut()?.closed.push(gap);
        self.forget(closed_max);
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
        if disorder.early.is_empty() && disorder.closed.is_empty() {
            self.disorder = None;
        }
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
