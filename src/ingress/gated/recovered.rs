//! Recovers the progress of a gate's partitions: counts the sequences in the log and in the closed gaps.
//!
//! One writer: the thread that opens the gate. A power cut removes the ends of logs, so a sequence lost in one shard
//! may have successors in another. Late events may be anywhere in the log. So each sequence is counted on its own, and
//! the result does not depend on the order of counting. The start of a partition comes from the policy, from the gate's
//! record, or else from the lowest sequence counted.

use std::collections::{BTreeMap, HashMap};

use crate::error::ReadError;
use crate::event::{Event, Offset, Time};
use crate::ingress::gated::files::{Positions, Standing};
use crate::ingress::gated::record::{Gap, Start};
use crate::ingress::sequence_gate::partition::Ahead;
use crate::ingress::sequence_gate::policy::GateStart;
use crate::log::reader::Reader;

/// The number of events read from a shard before the next shard is chosen.
const READ_AT_A_TIME: usize = 1024;

/// The counted sequences of one partition.
#[derive(Debug)]
struct CountedPartition {
    /// Every lower sequence was counted or is below the partition's start. `None` if the start is known only after
    /// counting.
    expected: Option<u64>,
    /// Ranges of counted sequences above `expected`: first to last.
    ranges: BTreeMap<u64, u64>,
}

impl CountedPartition {
    fn new(expected: Option<u64>) -> Self {
        Self { expected, ranges: BTreeMap::new() }
    }

    fn count(&mut self, sequence: u64) {
        match &mut self.expected {
            Some(expected) if sequence == *expected => {
                *expected += 1;
                while let Some(first) = self.ranges.first_entry().filter(|first| first.key() == expected) {
                    *expected = first.remove() + 1;
                }
            }
            Some(expected) if sequence < *expected => {}
            _ => self.add(sequence),
        }
    }

    /// Starts a partition at its lowest sequence if it has no start. Returns that sequence, or `None` if the partition
    /// had a start.
    fn settle(&mut self, gaps: &[Gap]) -> Option<u64> {
        if self.expected.is_some() {
            return None;
        }
        let (range, gap) = (self.ranges.first_key_value().map(|(from, _)| *from), gaps.first().map(|gap| gap.from));
        let start = range.into_iter().chain(gap).min()?;
        let expected = self.ranges.remove(&start).map_or(start, |to| to + 1);
        self.expected = Some(expected);
        Some(start)
    }

    /// Adds a sequence to the ranges, and joins adjacent ranges.
    fn add(&mut self, sequence: u64) {
        let before = self.ranges.range(..=sequence).next_back().map(|(from, to)| (*from, *to));
        if before.is_some_and(|(_, to)| sequence <= to) {
            return;
        }
        let to = self.ranges.remove(&(sequence + 1)).unwrap_or(sequence);
        let from = before.filter(|(_, to)| to + 1 == sequence).map_or(sequence, |(from, _)| from);
        self.ranges.insert(from, to);
    }

    /// Returns the ranges, and the parts of `gaps` between them.
    fn ahead(&self, expected: u64, gaps: &[Gap]) -> Vec<(u64, u64, Ahead)> {
        let mut known: BTreeMap<u64, (u64, Ahead)> =
            self.ranges.iter().map(|(from, to)| (*from, (*to, Ahead::Passed))).collect();
        for gap in gaps.iter().filter(|gap| gap.to >= expected) {
            let mut from = gap.from.max(expected);
            while from <= gap.to {
                let at_or_before = known.range(..=from).next_back().map(|(_, (to, _))| *to);
                if let Some(to) = at_or_before.filter(|to| *to >= from) {
                    from = to + 1;
                    continue;
                }
                let next = known.range(from..).next().map_or(u64::MAX, |(next, _)| *next);
                let to = gap.to.min(next - 1);
                known.insert(from, (to, Ahead::Missing));
                from = to + 1;
            }
        }
        known.into_iter().map(|(from, (to, what))| (from, to, what)).collect()
    }
}

/// A partition, the sequence that it expects, and the known sequences above that.
pub(crate) type Resumed = (u64, u64, Vec<(u64, u64, Ahead)>);

/// A shard's reader, and the offset at which it must stop.
pub(crate) type Uncounted<E> = (Reader<E>, Offset);

/// The state of all partitions of a gate.
#[derive(Debug)]
pub(crate) struct Recovered {
    pub(crate) standings: Vec<Resumed>,
    /// Starts derived from the counted sequences alone, as partition and sequence.
    pub(crate) derived_starts: Vec<(u64, u64)>,
}

/// The counted sequences of all partitions of a gate.
#[derive(Debug)]
pub(crate) struct Counts {
    start: GateStart,
    /// `true` if retention has freed uncounted events. A sequence that is missing below the highest one may have been
    /// among them.
    has_lost_beginning: bool,
    /// The recorded starts by partition. A later start replaces an earlier one, because a partition whose events are
    /// all freed starts again.
    starts: HashMap<u64, u64>,
    partitions: HashMap<u64, CountedPartition>,
}

impl Counts {
    pub(crate) fn new(
        start: GateStart,
        positions: Option<Positions>,
        starts: &[Start],
        has_lost_beginning: bool,
    ) -> Self {
        let standings = positions.map(|positions| positions.standings).unwrap_or_default();
        let counted = |standing: Standing| {
            let Standing { partition, expected, runs } = standing;
            (partition, CountedPartition { expected: Some(expected), ranges: runs.into_iter().collect() })
        };
        let starts = starts.iter().map(|start| (start.partition, start.sequence)).collect();
        Self { start, has_lost_beginning, starts, partitions: standings.into_iter().map(counted).collect() }
    }

    pub(crate) fn count(&mut self, partition: u64, sequence: u64) {
        // The gate refuses this sequence, so no event has it.
        if sequence == u64::MAX {
            return;
        }
        let counted = Self::known(&mut self.partitions, &self.starts, self.start, partition);
        if self.has_lost_beginning {
            counted.expected = counted.expected.max(Some(sequence + 1));
        } else {
            counted.count(sequence);
        }
    }

    /// Returns the counted sequences of a partition, which begin at its start.
    fn known<'a>(
        partitions: &'a mut HashMap<u64, CountedPartition>,
        starts: &HashMap<u64, u64>,
        start: GateStart,
        partition: u64,
    ) -> &'a mut CountedPartition {
        partitions.entry(partition).or_insert_with(|| {
            let recorded = starts.get(&partition).copied();
            CountedPartition::new(recorded.or(match start {
                GateStart::At(first) => Some(first),
                GateStart::FirstSeen => None,
            }))
        })
    }

    /// Counts the events below each shard's end. The shards are read in turn, by the times of their events, because a
    /// sequence that is missing in one shard takes memory until it is found in another.
    pub(crate) fn count_log<E: Event>(
        &mut self,
        shards: &mut [Uncounted<E>],
        source: impl Fn(&E::Archived) -> Option<(u64, u64)>,
    ) -> Result<(), ReadError> {
        let mut left: Vec<_> = shards.iter_mut().map(|(reader, until)| (Time(0), reader, until)).collect();
        while let Some(at) = (0..left.len()).min_by_key(|at| left[*at].0) {
            let (time, reader, until) = &mut left[at];
            let mut is_over = false;
            for _ in 0..READ_AT_A_TIME {
                let record = if reader.offset() < **until { reader.next()? } else { None };
                let Some(record) = record else {
                    is_over = true;
                    break;
                };
                *time = record.meta.time;
                if let Some((partition, sequence)) = source(record.event) {
                    self.count(partition, sequence);
                }
            }
            if is_over {
                left.swap_remove(at);
            }
        }
        Ok(())
    }

    /// Adds the closed gaps, and returns the state of every partition.
    pub(crate) fn with_gaps(mut self, mut gaps: Vec<Gap>) -> Recovered {
        gaps.sort_by_key(|gap| (gap.partition, gap.from));
        for gap in &gaps {
            let counted = Self::known(&mut self.partitions, &self.starts, self.start, gap.partition);
            if self.has_lost_beginning {
                counted.expected = counted.expected.max(Some(gap.to + 1));
            }
        }
        // A partition with a recorded start waits for that sequence, even if none of its events is in the log. If the
        // beginning of the log is freed, the partition's events are unknown.
        if !self.has_lost_beginning {
            for partition in self.starts.keys() {
                Self::known(&mut self.partitions, &self.starts, self.start, *partition);
            }
        }
        let gaps_of = |partition: u64| {
            let from = gaps.partition_point(|gap| gap.partition < partition);
            &gaps[from..from + gaps[from..].partition_point(|gap| gap.partition == partition)]
        };
        let mut recovered = Recovered { standings: Vec::new(), derived_starts: Vec::new() };
        for (partition, mut counted) in self.partitions {
            let gaps = gaps_of(partition);
            recovered.derived_starts.extend(counted.settle(gaps).map(|start| (partition, start)));
            let expected = counted.expected.expect("a partition without a start has a range or a gap");
            recovered.standings.push((partition, expected, counted.ahead(expected, gaps)));
        }
        recovered
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::time::Duration;

    use super::*;
    use proptest::prelude::*;

    fn gap(from: u64, to: u64) -> Gap {
        Gap::new(0, from, to, Duration::ZERO, Time(0))
    }

    proptest! {
        /// Compares with plain sets of the sequences in the log and in gaps, in any order and with repeats.
        #[test]
        fn every_sequence_is_recovered_as_passed_missing_or_open(
            log in proptest::collection::vec(0u64..60, 0..80),
            gaps in proptest::collection::vec((0u64..60, 0u64..5), 0..6),
            start in 0u64..5,
        ) {
            let mut counts = Counts::new(GateStart::At(start), None, &[], false);
            log.iter().for_each(|sequence| counts.count(0, *sequence));
            let gaps: Vec<Gap> = gaps.into_iter().map(|(from, more)| gap(from, from + more)).collect();
            let in_log: BTreeSet<u64> = log.into_iter().collect();
            let in_gap: BTreeSet<u64> = gaps.iter().flat_map(|gap| gap.from..=gap.to).collect();
            let is_known = in_log.iter().chain(&in_gap).next().is_some();
            let Recovered { standings, derived_starts } = counts.with_gaps(gaps);
            prop_assert_eq!(derived_starts, []);
            prop_assert_eq!(standings.len(), usize::from(is_known));
            for (_, expected, ahead) in standings {
                prop_assert!((start..expected).all(|sequence| in_log.contains(&sequence)));
                prop_assert!(!in_log.contains(&expected));
                prop_assert!(ahead.windows(2).all(|pair| pair[0].1 < pair[1].0), "rising: {:?}", ahead);
                for sequence in expected..70 {
                    let known = ahead.iter().find(|(from, to, _)| (*from..=*to).contains(&sequence));
                    let wanted = match (in_log.contains(&sequence), in_gap.contains(&sequence)) {
                        (true, _) => Some(Ahead::Passed),
                        (false, true) => Some(Ahead::Missing),
                        (false, false) => None,
                    };
                    prop_assert_eq!(known.map(|(.., what)| *what), wanted, "{}", sequence);
                }
            }
        }
    }

    #[test]
    fn no_sequence_below_the_highest_is_expected_if_the_beginning_of_the_log_is_freed() {
        let mut counts = Counts::new(GateStart::At(0), None, &[], true);
        [500, 502].into_iter().for_each(|sequence| counts.count(0, sequence));
        assert_eq!(counts.with_gaps(vec![gap(503, 505)]).standings, [(0, 506, vec![])]);
    }

    proptest! {
        /// Covers every distribution of events over shards, and every order of reading the shards.
        #[test]
        fn the_result_does_not_depend_on_the_order_of_counting(
            log in proptest::collection::vec(0u64..20, 1..30),
            shuffle in proptest::collection::vec(any::<prop::sample::Index>(), 30),
            recorded in proptest::option::of(0u64..20),
            gaps in proptest::collection::vec((0u64..20, 0u64..3), 0..3),
            policy in proptest::option::of(0u64..20),
            has_lost_beginning in any::<bool>(),
        ) {
            let start = policy.map_or(GateStart::FirstSeen, GateStart::At);
            let starts: Vec<Start> =
                recorded.map(|sequence| Start { partition: 0, sequence, time: Time(0) }).into_iter().collect();
            let gaps: Vec<Gap> = gaps.into_iter().map(|(from, more)| gap(from, from + more)).collect();
            let mut other = log.clone();
            for (i, at) in shuffle.iter().enumerate() {
                let (i, at) = (i % log.len(), at.index(log.len()));
                other.swap(i, at);
            }
            let counted = |log: &[u64]| {
                let mut counts = Counts::new(start, None, &starts, has_lost_beginning);
                log.iter().for_each(|sequence| counts.count(0, *sequence));
                counts.with_gaps(gaps.clone())
            };
            let (one, two) = (counted(&log), counted(&other));
            prop_assert_eq!(&one.standings, &two.standings);
            prop_assert_eq!(&one.derived_starts, &two.derived_starts);
            // The oracle is the first sequence from the start on that is not in the log.
            let lowest = log.iter().copied().chain(gaps.iter().map(|gap| gap.from)).min().expect("not empty");
            let start = recorded.or(policy).unwrap_or(lowest);
            if !has_lost_beginning {
                let expected = (start..).find(|sequence| !log.contains(sequence)).expect("it ends");
                prop_assert_eq!(one.standings[0].1, expected);
            }
        }
    }
}
