//! A reader from the earliest event to the end: of a live store (bytes that this process wrote, not checked again) and
//! of a recovered one (every CRC and every archive checked).

use corelane::{Config, Deadline, Durability, EventLog, ShardId};
use criterion::{Criterion, Throughput};

use crate::game::{GameEvent, events, tick};

const EVENTS: usize = 1 << 20;

pub(crate) fn benches(c: &mut Criterion) {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let open = || {
        EventLog::<GameEvent>::open(Config::new(dir.path()).durability(Durability::OsCache)).expect("the store opens")
    };
    let mut group = c.benchmark_group("replay");
    group.sample_size(10).throughput(Throughput::Elements(EVENTS as u64));
    let engine = open();
    let mut producer = engine.producer();
    producer.publish_batch(&mut events(EVENTS)).expect("accepted");
    engine.flush(Deadline::NEVER).expect("flushed");
    group.bench_function("live", |b| b.iter(|| replay(&engine)));
    drop(producer);
    engine.shutdown(Deadline::NEVER).expect("shut down");
    drop(engine);
    let engine = open();
    group.bench_function("recovered", |b| b.iter(|| replay(&engine)));
    group.finish();
}

fn replay(engine: &EventLog<GameEvent>) {
    let mut reader = engine.reader(ShardId(0));
    let (mut count, mut sum) = (0, 0);
    while let Some(record) = reader.next().expect("the log reads") {
        count += 1;
        sum += tick(record.event);
    }
    assert_eq!((count, sum), (EVENTS, (0..EVENTS as u64).sum()));
}
