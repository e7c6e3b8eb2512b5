//! A consumer's key queues alone: events are offered, taken and ended, 64 keys at once; all succeed, or 1 in 20 is retried.

use std::time::Duration;

use corelane::bench_support::Queues;
use corelane::consumer::QueuePolicy;
use corelane::{Key, Offset};
use criterion::{BenchmarkId, Criterion, Throughput};

use crate::game::{USERS, events};

const EVENTS: usize = 1 << 16;
const CONCURRENCY: usize = 64;

pub(crate) fn benches(c: &mut Criterion) {
    let keys: Vec<Key> = events(EVENTS).into_iter().map(|(key, _)| key).collect();
    let mut group = c.benchmark_group("key_queues");
    group.throughput(Throughput::Elements(EVENTS as u64));
    for (name, retries_every) in [("all succeed", usize::MAX), ("1 in 20 retried", 20)] {
        group.bench_function(BenchmarkId::new("offer_run_end", name), |b| b.iter(|| run(&keys, retries_every)));
    }
    group.finish();
    assert!(keys.iter().all(|key| key.get() < USERS));
}

fn run(keys: &[Key], retries_every: usize) {
    let policy = QueuePolicy::default().concurrency(CONCURRENCY);
    let mut queues = Queues::new(policy);
    let mut taken = Vec::with_capacity(CONCURRENCY);
    let (mut count, mut ended) = (0, 0);
    let mut now = Duration::ZERO;
    let mut offers = keys.iter().zip(0_u64..);
    while ended < keys.len() {
        for (key, offset) in offers.by_ref().take(CONCURRENCY) {
            queues.offer(*key, Offset(offset));
        }
        now += Duration::from_micros(10);
        queues.tick(now);
        taken.extend(std::iter::from_fn(|| queues.next()));
        for event in taken.drain(..) {
            count += 1;
            if count % retries_every == 0 && event.attempt() == 1 {
                queues.retry(event, Duration::from_millis(1), now);
            } else {
                queues.succeeded(event);
                ended += 1;
            }
        }
    }
    assert_eq!(queues.position(), Offset(keys.len() as u64 - 1));
}
