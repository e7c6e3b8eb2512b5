//! A lane's ring, pushed and popped in chunks by one thread: the cost of moving events, without traffic between cores.

use std::hint::black_box;

use corelane::bench_support::Ring;
use criterion::{BenchmarkId, Criterion, Throughput};

use crate::game::events;

const CAPACITY: usize = 8192;

pub(crate) fn benches(c: &mut Criterion) {
    let mut group = c.benchmark_group("ring");
    for chunk in [1, 16, 256] {
        let events = events(chunk);
        let mut ring = Ring::new(CAPACITY);
        group.throughput(Throughput::Elements(chunk as u64));
        group.bench_function(BenchmarkId::new("push_pop", chunk), |b| {
            b.iter(|| {
                assert_eq!(ring.push(chunk, events.iter().copied()), chunk);
                assert_eq!(ring.pop(chunk, |key, event| _ = black_box((key, event))), chunk);
            });
        });
    }
    group.finish();
}
