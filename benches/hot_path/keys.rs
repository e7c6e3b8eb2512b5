//! The key table as a turn uses it: buckets are prefetched 16 events ahead, then looked up and updated.

use std::hint::black_box;

use corelane::bench_support::Keys;
use corelane::{Key, Offset};
use criterion::{BenchmarkId, Criterion, Throughput};
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};

const EVENTS: usize = 4096;
/// Random keys, drawn once and reused in turn; enough of them that a million users stay a million.
const DRAWS: usize = 1 << 20;
/// The shard's prefetch distance.
const AHEAD: usize = 16;

pub(crate) fn benches(c: &mut Criterion) {
    let mut group = c.benchmark_group("keys");
    group.throughput(Throughput::Elements(EVENTS as u64));
    for (name, users) in [("1k", 1_000), ("100k", 100_000), ("1M", 1_000_000)] {
        let mut table = Keys::new(users);
        for user in 0..users as u64 {
            table.append(Key::new(user), Offset(1));
        }
        let mut random = SmallRng::seed_from_u64(0x5eed);
        let draws: Vec<Key> = (0..DRAWS).map(|_| Key::new(random.random_range(0..users as u64))).collect();
        let mut rounds = draws.chunks_exact(EVENTS).cycle();
        group.bench_function(BenchmarkId::new("append", name), |b| {
            b.iter(|| {
                let keys = rounds.next().unwrap_or(&draws);
                keys[..AHEAD].iter().for_each(|key| table.prefetch(*key));
                let mut ahead = keys[AHEAD..].iter();
                let mut sum = 0;
                for (i, key) in keys.iter().enumerate() {
                    if let Some(later) = ahead.next() {
                        table.prefetch(*later);
                    }
                    sum += table.append(*key, Offset(i as u64)).0.get();
                }
                black_box(sum)
            });
        });
    }
    group.finish();
}
