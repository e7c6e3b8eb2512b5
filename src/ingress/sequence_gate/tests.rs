//! Tests the gate's rules one by one, then against a model that forgets nothing, then with shuffled input and random
//! pulls.

use std::collections::{BTreeMap, BTreeSet};

use crate::ingress::sequence_gate::*;
use proptest::prelude::*;

const S: Duration = Duration::from_secs(1);
const T0: Duration = Duration::ZERO;

type Gate = SequenceGate<u8, u64>;

fn gate(policy: GatePolicy) -> Gate {
    SequenceGate::new(policy).expect("valid")
}

/// Offers an item whose value is its sequence.
fn offer(gate: &mut Gate, sequence: u64, now: Duration) -> Offered<u64> {
    gate.offer(0, sequence, sequence, now).expect("there is room")
}

fn item(sequence: u64) -> Option<Released<u8, u64>> {
    Some(Released::Item { partition: 0, sequence, item: sequence })
}

fn gap(from: u64, to: u64, waited: Duration) -> Option<Released<u8, u64>> {
    Some(Released::GapClosed { partition: 0, from, to, waited })
}

#[test]
fn an_early_item_waits_for_the_items_before_it() {
    let mut gate = gate(GatePolicy::default());
    assert_eq!(offer(&mut gate, 2, T0), Offered::Buffered);
    assert_eq!(offer(&mut gate, 1, T0), Offered::Buffered);
    assert_eq!(gate.next(T0), None);
    assert_eq!(offer(&mut gate, 0, T0), Offered::Passed(0));
    assert_eq!(gate.next_due(), Some(T0));
    assert_eq!([gate.next(T0), gate.next(T0), gate.next(T0)], [item(1), item(2), None]);
    assert_eq!(gate.expected(&0), Some(3));
    let GateStatistics { in_order, reordered, waiting, .. } = gate.statistics();
    assert_eq!((in_order, reordered, waiting), (1, 2, 0));
}

#[test]
fn duplicates_of_passed_and_of_buffered_items_are_counted() {
    let mut gate = gate(GatePolicy::default());
    assert_eq!(offer(&mut gate, 0, T0), Offered::Passed(0));
    assert_eq!(offer(&mut gate, 2, T0), Offered::Buffered);
    assert_eq!(offer(&mut gate, 0, T0), Offered::Duplicate);
    assert_eq!(offer(&mut gate, 2, T0), Offered::Duplicate);
    // An item that is ready and not pulled is still buffered.
    assert_eq!(offer(&mut gate, 1, T0), Offered::Passed(1));
    assert_eq!(offer(&mut gate, 2, T0), Offered::Duplicate);
    assert_eq!([gate.next(T0), gate.next(T0)], [item(2), None]);
    assert_eq!(gate.statistics().duplicates, 3);
}

#[test]
fn a_gap_is_closed_when_it_is_due_and_not_before() {
    let mut gate = gate(GatePolicy::default());
    assert_eq!(offer(&mut gate, 3, S), Offered::Buffered);
    let due = gate.next_due().expect("a gap is open");
    assert_eq!(due, 6 * S);
    assert_eq!(gate.next(due - Duration::from_nanos(1)), None);
    assert_eq!(gate.next(due), gap(0, 2, 5 * S));
    assert_eq!([gate.next(due), gate.next(due)], [item(3), None]);
    assert_eq!((gate.statistics().gaps_closed, gate.statistics().missing), (1, 3));
    assert_eq!(gate.next_due(), None);
}

#[test]
fn the_wait_for_a_gap_begins_with_the_first_item_above_it() {
    let mut gate = gate(GatePolicy::default());
    // 1 and 2 have been missing since 3 came at 0 s. 4 to 8 have been missing since 9 came at 1 s, although 6 came
    // later.
    offer(&mut gate, 0, T0).ignore();
    offer(&mut gate, 3, T0).ignore();
    offer(&mut gate, 9, S).ignore();
    offer(&mut gate, 6, 2 * S).ignore();
    assert_eq!([gate.next(5 * S), gate.next(5 * S), gate.next(5 * S)], [gap(1, 2, 5 * S), item(3), None]);
    assert_eq!(gate.next_due(), Some(6 * S));
    assert_eq!([gate.next(6 * S), gate.next(6 * S)], [gap(4, 5, 5 * S), item(6)]);
    assert_eq!([gate.next(6 * S), gate.next(6 * S), gate.next(6 * S)], [gap(7, 8, 5 * S), item(9), None]);
}

#[test]
fn a_late_item_is_late_once_and_then_a_duplicate() {
    let mut gate = gate(GatePolicy::default());
    offer(&mut gate, 5, T0).ignore();
    assert_eq!([gate.next(5 * S), gate.next(5 * S)], [gap(0, 4, 5 * S), item(5)]);
    for sequence in [2, 0, 4, 1, 3] {
        assert_eq!(offer(&mut gate, sequence, 5 * S), Offered::Late(sequence));
        assert_eq!(offer(&mut gate, sequence, 5 * S), Offered::Duplicate);
    }
    assert_eq!(offer(&mut gate, 5, 5 * S), Offered::Duplicate);
    assert!(gate.partitions[&0].is_plain(), "the partition remembers nothing");
}

#[test]
fn an_item_of_a_forgotten_gap_is_too_old() {
    let mut gate = gate(GatePolicy::default().closed_gaps_max(1).gap_wait_max(T0));
    for sequence in [1, 3] {
        offer(&mut gate, sequence, T0).ignore();
        while gate.next(T0).is_some() {}
    }
    assert_eq!(offer(&mut gate, 0, T0), Offered::TooOld(0), "its gap was forgotten when that of 2 was closed");
    assert_eq!(offer(&mut gate, 1, T0), Offered::Duplicate);
    assert_eq!(offer(&mut gate, 2, T0), Offered::Late(2));
}

#[test]
fn a_partition_starts_at_its_set_start_or_at_its_first_item() {
    let mut gate = gate(GatePolicy::default().start(GateStart::FirstSeen));
    assert_eq!(offer(&mut gate, 7, T0), Offered::Passed(7));
    assert_eq!(offer(&mut gate, 6, T0), Offered::TooOld(6));
    assert_eq!(gate.start_at(0, 3), Err(StartRefused::Started));
    assert_eq!(gate.start_at(1, 3), Ok(()));
    assert_eq!(gate.offer(1, 4, 4, T0), Ok(Offered::Buffered));
    assert_eq!(gate.offer(1, 3, 3, T0), Ok(Offered::Passed(3)));
}

#[test]
fn a_full_gate_refuses_early_items_and_never_the_expected_one() {
    let mut gate = gate(GatePolicy::default().early_max_per_partition(2).early_max(3).partitions_max(2));
    for sequence in [1, 2] {
        assert_eq!(gate.offer(0, sequence, sequence, T0), Ok(Offered::Buffered));
    }
    assert_eq!(gate.offer(0, 3, 3, T0), Err(OfferRefused::PartitionFull(3)));
    assert_eq!(gate.offer(0, 2, 2, T0), Ok(Offered::Duplicate), "a duplicate needs no room");
    assert_eq!(gate.offer(1, 1, 1, T0), Ok(Offered::Buffered));
    assert_eq!(gate.offer(1, 2, 2, T0), Err(OfferRefused::Full(2)));
    assert_eq!(gate.offer(2, 0, 0, T0), Err(OfferRefused::TooManyPartitions(0)));
    assert_eq!(gate.start_at(2, 0), Err(StartRefused::TooManyPartitions));
    assert_eq!(gate.offer(0, 0, 0, T0), Ok(Offered::Passed(0)));
    assert_eq!([gate.next(T0), gate.next(T0)], [item(1), item(2)]);
    assert_eq!(gate.offer(1, 2, 2, T0), Ok(Offered::Buffered), "there is room again");
    assert_eq!(gate.statistics().refused, 3);
}

#[test]
fn one_wrong_number_cannot_close_a_gap_over_everything_to_come() {
    let mut gate = gate(GatePolicy::default().ahead_max(100));
    assert_eq!(gate.offer(0, u64::MAX, 1, T0), Err(OfferRefused::TooFarAhead(1)));
    assert_eq!(gate.offer(0, 101, 1, T0), Err(OfferRefused::TooFarAhead(1)));
    assert_eq!(gate.offer(0, 100, 1, T0), Ok(Offered::Buffered));
    gate.start_at(1, u64::MAX - 1).expect("new");
    assert_eq!(gate.offer(1, u64::MAX - 1, 1, T0), Ok(Offered::Passed(1)));
    assert_eq!(gate.offer(1, u64::MAX, 1, T0), Err(OfferRefused::TooFarAhead(1)), "no overflow");
}

#[test]
fn the_end_of_input_closes_open_gaps_at_once() {
    let mut gate = gate(GatePolicy::default());
    offer(&mut gate, 1, T0).ignore();
    offer(&mut gate, 3, S).ignore();
    gate.end();
    assert_eq!([gate.next(S), gate.next(S), gate.next(S)], [gap(0, 0, S), item(1), gap(2, 2, T0)]);
    assert_eq!([gate.next(S), gate.next(S)], [item(3), None]);
}

#[test]
fn removing_a_partition_returns_its_buffered_items() {
    let mut gate = gate(GatePolicy::default());
    for sequence in [4, 1, 2] {
        offer(&mut gate, sequence, T0).ignore();
    }
    offer(&mut gate, 0, T0).ignore();
    assert_eq!(gate.remove(&0), [(1, 1), (2, 2), (4, 4)]);
    assert!(gate.ready.is_empty() && gate.timed.is_empty(), "no list contains it");
    assert_eq!((gate.next(9 * S), gate.next_due(), gate.expected(&0)), (None, None, None));
    assert_eq!((gate.statistics().waiting, gate.statistics().removed), (0, 3));
    assert_eq!(offer(&mut gate, 1, 9 * S), Offered::Buffered, "the partition is new again");
}

#[test]
fn the_gate_ignores_a_clock_that_goes_back() {
    let mut gate = gate(GatePolicy::default());
    offer(&mut gate, 1, 10 * S).ignore();
    offer(&mut gate, 3, S).ignore();
    assert_eq!(gate.next(14 * S), None);
    assert_eq!(gate.next(15 * S), gap(0, 0, 5 * S));
}

#[test]
fn a_policy_value_out_of_range_is_named_in_the_error() {
    let d = GatePolicy::default;
    let bad = [
        (d().gap_wait_max(Duration::MAX), "gate_gap_wait_max_ms"),
        (d().early_max_per_partition(0), "gate_early_max_per_partition"),
        (d().early_max(0), "gate_early_max"),
        (d().ahead_max(0), "gate_ahead_max"),
        (d().partitions_max(0), "gate_partitions_max"),
        (d().closed_gaps_max(0), "gate_closed_gaps_max"),
    ];
    for (policy, expected) in bad {
        match SequenceGate::<u8, u8>::new(policy) {
            Err(ConfigError::OutOfRange { name, .. }) => assert_eq!(name, expected),
            other => panic!("{expected}: {other:?}"),
        }
    }
}

impl<T> Offered<T> {
    fn ignore(self) {}
}

/// One partition's history, kept completely and searched on every call.
#[derive(Default)]
struct Model {
    expected: u64,
    early: BTreeMap<u64, u64>,
    /// Sequence and time of every item that was ever buffered.
    came: Vec<(u64, Duration)>,
    missing: BTreeSet<u64>,
}

impl Model {
    fn offer(&mut self, sequence: u64, id: u64, now: Duration) -> Offered<u64> {
        if sequence == self.expected {
            self.expected += 1;
            Offered::Passed(id)
        } else if self.missing.remove(&sequence) {
            Offered::Late(id)
        } else if sequence < self.expected || self.early.contains_key(&sequence) {
            Offered::Duplicate
        } else {
            self.early.insert(sequence, id);
            self.came.push((sequence, now));
            Offered::Buffered
        }
    }

    /// Returns everything that must be released at `now`.
    fn drain(&mut self, partition: u8, now: Duration, wait: Duration) -> Vec<Released<u8, u64>> {
        let mut out = Vec::new();
        loop {
            while let Some(item) = self.early.remove(&self.expected) {
                out.push(Released::Item { partition, sequence: self.expected, item });
                self.expected += 1;
            }
            let above = self.came.iter().filter(|(sequence, _)| *sequence > self.expected);
            let (Some(since), Some((&first, _))) = (above.map(|(_, at)| *at).min(), self.early.first_key_value())
            else {
                return out;
            };
            if now < since + wait {
                return out;
            }
            self.missing.extend(self.expected..first);
            out.push(Released::GapClosed { partition, from: self.expected, to: first - 1, waited: now - since });
            self.expected = first;
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn the_gate_agrees_with_the_model(
        steps in prop::collection::vec((0..3_u8, 0..24_u64, 0..100_u8, 0..4000_u64), 1..300),
    ) {
        const WAIT: Duration = Duration::from_secs(5);
        let mut gate = gate(GatePolicy::default().closed_gaps_max(65_536));
        let mut models: [Model; 3] = Default::default();
        let mut now = T0;
        for (id, (partition, ahead, which, ms)) in steps.into_iter().enumerate() {
            now += Duration::from_millis(if which < 50 { 0 } else { ms });
            let model = &mut models[usize::from(partition)];
            // A sequence around the expected one, mostly above it.
            let sequence = (model.expected + ahead).saturating_sub(if which % 2 == 0 { 0 } else { 12 });
            prop_assert_eq!(gate.offer(partition, sequence, id as u64, now), Ok(model.offer(sequence, id as u64, now)));
            let mut released: [Vec<_>; 3] = Default::default();
            while let Some(one) = gate.next(now) {
                let (Released::Item { partition, .. } | Released::GapClosed { partition, .. }) = &one;
                released[usize::from(*partition)].push(one);
            }
            prop_assert!(gate.next_due().is_none_or(|due| due > now));
            for (partition, model) in models.iter_mut().enumerate() {
                prop_assert_eq!(&released[partition], &model.drain(partition as u8, now, WAIT));
            }
        }
        let statistics = gate.statistics();
        prop_assert_eq!(statistics.waiting as usize, models.iter().map(|model| model.early.len()).sum::<usize>());
        // No partition is listed twice, and every partition with a gap is listed.
        prop_assert_eq!(gate.timed.len(), gate.partitions.values().filter(|known| known.is_timed).count());
        prop_assert!(gate.partitions.values().all(|known| known.early() == 0 || known.is_timed));
    }

    #[test]
    fn a_shuffle_without_losses_is_restored_to_order(window in 1..64_usize, seed: u64, repeated in 0..50_u8) {
        let mut random = crate::consumer::JitterRng::seeded(seed);
        let mut gate = gate(GatePolicy::default());
        let mut out = Vec::new();
        for block in (0..2000_u64).collect::<Vec<_>>().chunks(window) {
            let mut block = block.to_vec();
            for at in 0..block.len() {
                let other = at + (random.next() % (block.len() - at) as u64) as usize;
                block.swap(at, other);
            }
            for sequence in block {
                for _ in 0..1 + u64::from(random.next() % 100 < u64::from(repeated)) {
                    if let Offered::Passed(item) = offer(&mut gate, sequence, T0) {
                        out.push(item);
                    }
                }
                while let Some(one) = gate.next(T0) {
                    let Released::Item { item, .. } = one else { panic!("a gap without a missing item") };
                    out.push(item);
                }
            }
        }
        prop_assert_eq!(out, (0..2000).collect::<Vec<_>>());
    }

    #[test]
    fn items_rise_and_every_item_is_counted_once_for_any_order_of_pulls(
        steps in prop::collection::vec((0..2_u8, 0..40_u64, 0..3_u8, 0..2000_u64), 1..400), closed_gaps in 1..4_usize,
    ) {
        let policy = GatePolicy::default().early_max_per_partition(6).early_max(8).ahead_max(30);
        let policy = policy.closed_gaps_max(closed_gaps);
        let mut gate = gate(policy);
        let mut last: [Option<u64>; 2] = [None; 2];
        let (mut offered, mut now) = (0, T0);
        let mut pass = |partition: u8, from: u64, to: u64| {
            let last = &mut last[usize::from(partition)];
            assert_eq!(from, last.map_or(0, |last| last + 1), "neither a step back nor a silent gap");
            *last = Some(to);
        };
        for (partition, sequence, pulls, ms) in steps {
            now += Duration::from_millis(ms);
            offered += 1;
            if let Ok(Offered::Passed(_)) = gate.offer(partition, sequence, sequence, now) {
                pass(partition, sequence, sequence);
            }
            for _ in 0..pulls {
                match gate.next(now) {
                    Some(Released::Item { partition, sequence, item }) => {
                        prop_assert_eq!(item, sequence);
                        pass(partition, sequence, sequence);
                    }
                    Some(Released::GapClosed { partition, from, to, .. }) => pass(partition, from, to),
                    None => break,
                }
            }
            let s = gate.statistics();
            prop_assert!(s.waiting <= 8);
            let sum = s.in_order + s.reordered + s.waiting + s.duplicates + s.late + s.too_old + s.refused + s.removed;
            prop_assert_eq!(sum, offered);
        }
    }
}

#[test]
fn known_sequences_are_stepped_over_and_not_waited_for_after_a_restart() {
    use partition::Ahead::{Missing, Passed};
    let mut gate = gate(GatePolicy::default().gap_wait_max(S));
    // 5, 6 and 12 were lost; 7 to 9 and 13 have passed; 10 and 11 belong to a closed gap.
    gate.resume(0, 5, vec![(7, 9, Passed), (10, 11, Missing), (13, 13, Passed)]).expect("new");
    assert_eq!(gate.next_due(), None, "no gap is timed before an item comes");
    assert_eq!(offer(&mut gate, 8, T0), Offered::Duplicate);
    assert_eq!(offer(&mut gate, 10, T0), Offered::Late(10), "late once");
    assert_eq!(offer(&mut gate, 10, T0), Offered::Duplicate);
    assert!(gate.is_over(&0, 10) && !gate.is_over(&0, 6));
    assert_eq!(offer(&mut gate, 14, T0), Offered::Buffered);
    assert_eq!(offer(&mut gate, 5, T0), Offered::Passed(5));
    assert_eq!(offer(&mut gate, 6, T0), Offered::Passed(6));
    assert_eq!(gate.expected(&0), Some(12), "steps over known sequences");
    assert_eq!(offer(&mut gate, 11, T0), Offered::Late(11), "still distinguished from a duplicate");
    assert_eq!(offer(&mut gate, 12, T0), Offered::Passed(12));
    assert_eq!([gate.next(T0), gate.next(T0)], [item(14), None]);
    assert_eq!(gate.expected(&0), Some(15));
    assert_eq!(gate.next_due().and_then(|due| gate.next(due)), None);
}

#[test]
fn a_gap_ends_before_a_known_sequence() {
    use partition::Ahead::{Missing, Passed};
    let mut gate = gate(GatePolicy::default().gap_wait_max(S));
    gate.resume(0, 5, vec![(7, 9, Passed), (11, 11, Missing)]).expect("new");
    assert_eq!(offer(&mut gate, 13, T0), Offered::Buffered);
    assert_eq!(gate.next(T0), None);
    let closed = [gate.next(S), gate.next(S), gate.next(S), gate.next(S), gate.next(S)];
    assert_eq!(closed, [gap(5, 6, S), gap(10, 10, S), gap(12, 12, S), item(13), None]);
    assert_eq!(gate.statistics().missing, 4);
}
