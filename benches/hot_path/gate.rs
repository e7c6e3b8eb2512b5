//! The sequence gate: items in order, in order over many partitions, and shuffled within 64.

use std::hint::black_box;
use std::time::Duration;

use corelane::ingress::{GatePolicy, Offered, Released, SequenceGate};
use criterion::{BenchmarkId, Criterion, Throughput};
use rand::rngs::SmallRng;
use rand::seq::SliceRandom as _;
use rand::{Rng as _, SeedableRng as _};

use crate::game::{GameEvent, USERS, events};

const ITEMS: usize = 1 << 16;
const WINDOW: usize = 64;

pub(crate) fn benches(c: &mut Criterion) {
    let events: Vec<GameEvent> = events(ITEMS).into_iter().map(|(_, event)| event).collect();
    let mut random = SmallRng::seed_from_u64(0x5eed);
    let mut group = c.benchmark_group("gate");
    group.throughput(Throughput::Elements(ITEMS as u64));

    let in_order: Vec<(u64, u64)> = (0..ITEMS as u64).map(|sequence| (0, sequence)).collect();
    group.bench_function(BenchmarkId::new("in_order", "1 partition"), |b| b.iter(|| run(&in_order, &events)));

    // Each user is a partition; users come in random order.
    let mut numbered = |users: u64| -> Vec<(u64, u64)> {
        let mut sequences = vec![0; users as usize];
        let mut next = |user: u64| {
            sequences[user as usize] += 1;
            (user, sequences[user as usize] - 1)
        };
        (0..ITEMS).map(|_| next(random.random_range(0..users))).collect()
    };
    let (few, many) = (numbered(8), numbered(USERS));
    group.bench_function(BenchmarkId::new("in_order", "10k partitions"), |b| b.iter(|| run(&many, &events)));

    for (name, input) in [("1 partition", in_order), ("8 partitions", few)] {
        let mut shuffled = input;
        shuffled.chunks_mut(WINDOW).for_each(|block| block.shuffle(&mut random));
        group.bench_function(BenchmarkId::new("shuffled_within_64", name), |b| b.iter(|| run(&shuffled, &events)));
    }
    group.finish();
}

/// Offers all items and takes all released ones. Creates a new gate each time, since a gate accepts a sequence only
/// once.
fn run(input: &[(u64, u64)], events: &[GameEvent]) {
    let now = Duration::ZERO;
    let mut gate = SequenceGate::new(GatePolicy::default()).expect("the default policy holds");
    let mut out = 0;
    for ((partition, sequence), event) in input.iter().zip(events) {
        let offered = gate.offer(*partition, *sequence, *event, now).expect("there is room");
        if let Offered::Passed(event) = offered {
            black_box(event);
            out += 1;
            while let Some(Released::Item { item, .. }) = gate.next(now) {
                black_box(item);
                out += 1;
            }
        }
    }
    assert_eq!(out, input.len());
}
