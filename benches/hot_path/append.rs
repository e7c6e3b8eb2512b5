//! One shard's writer alone: archive, record header, CRC and commit word, into prefaulted pages.

use std::time::{Duration, Instant};

use corelane::bench_support::LogWriter;
use criterion::{Criterion, Throughput};

use crate::game::events;

const EVENTS: usize = 256;
const RECORD_BYTES_MAX: u64 = 128;
const SEGMENT_BYTES: u64 = 64 << 20;

pub(crate) fn benches(c: &mut Criterion) {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let events = events(EVENTS);
    let mut writer = LogWriter::new(dir.path().to_owned(), SEGMENT_BYTES).expect("files for the log");
    let mut group = c.benchmark_group("append");
    group.throughput(Throughput::Elements(EVENTS as u64));
    group.bench_function("writer", |b| {
        b.iter_custom(|iterations| {
            let mut took = Duration::ZERO;
            for _ in 0..iterations {
                writer.make_room(EVENTS as u64 * RECORD_BYTES_MAX).expect("the next segment");
                let began = Instant::now();
                writer.append(&events);
                took += began.elapsed();
            }
            took
        });
    });
    group.finish();
}
