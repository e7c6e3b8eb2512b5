//! A whole engine: one producer's batches through lane, shard, key table and log, with latency histograms. The
//! durability mode is part of each bench's name, since rates depend on it.

use corelane::{Config, Durability, EventLog, Receipt, Retention};
use criterion::{BenchmarkId, Criterion, Throughput};

use crate::game::{GameEvent, events};

const EVENTS: usize = 1 << 16;
const BATCH: usize = 256;
const SEGMENT_BYTES: u64 = 64 << 20;

pub(crate) fn benches(c: &mut Criterion) {
    let events = events(EVENTS);
    let mut group = c.benchmark_group("end_to_end");
    group.sample_size(20).throughput(Throughput::Elements(EVENTS as u64));
    for durability in [Durability::OsCache, Durability::GroupCommit] {
        let dir = tempfile::tempdir().expect("a temporary folder");
        // Retention recycles segments, so that the disk does not fill.
        let retention = Retention::bytes(4 * SEGMENT_BYTES);
        let config = Config::new(dir.path()).durability(durability).segment_bytes(SEGMENT_BYTES).retention(retention);
        let engine = EventLog::<GameEvent>::open(config).expect("the store opens");
        let mut producer = engine.producer();
        let mut batch = Vec::with_capacity(BATCH);
        let mut run = |wait: &dyn Fn(Receipt)| {
            for chunk in events.chunks(BATCH) {
                batch.extend_from_slice(chunk);
                producer.publish_batch(&mut batch).expect("accepted");
            }
            producer.receipts().into_iter().for_each(wait);
        };
        let mode = format!("{durability:?}");
        group.bench_function(BenchmarkId::new("publish_batch_to_appended", &mode), |b| {
            b.iter(|| run(&|receipt| receipt.appended().wait().expect("appended")));
        });
        if durability == Durability::GroupCommit {
            group.bench_function(BenchmarkId::new("publish_batch_to_durable", &mode), |b| {
                b.iter(|| run(&|receipt| receipt.durable().wait().expect("durable")));
            });
        }
    }
    group.finish();
}
