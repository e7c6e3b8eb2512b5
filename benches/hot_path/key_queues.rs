//! The consumer's key queues alone: events are offered, started and ended, 64 at a time; all succeed, or 1 in 20 is
//! retried.

use std::time::Duration;

use corelane::consumer::{KeyQueues, QueuePolicy, Verdict};
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
    let mut queues = KeyQueues::new(policy, Offset(0)).expect("the policy holds");
    let mut runs = Vec::with_capacity(CONCURRENCY);
    let (mut count, mut ended) = (0, 0);
    let mut now = Duration::ZERO;
    let mut offers = keys.iter().zip(0_u64..);
    while ended < keys.len() {
        for (key, offset) in offers.by_ref().take(CONCURRENCY) {
            queues.offer(*key, Offset(offset)).expect("there is room");
        }
        now += Duration::from_micros(10);
        queues.tick(now);
        runs.extend(std::iter::from_fn(|| queues.next()));
        for run in runs.drain(..) {
            count += 1;
            if count % retries_every == 0 && run.attempt() == 1 {
                let record = queues.failed(run, Verdict::Retry { after: Duration::from_millis(1) }, now);
                assert!(record.is_none());
            } else {
                queues.succeeded(run);
                ended += 1;
            }
        }
    }
    assert_eq!(queues.checkpoint(), Offset(keys.len() as u64 - 1));
}
