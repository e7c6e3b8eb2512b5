//! Encoding an event, and accessing its archive in place: checked, as for bytes from a disk, and unchecked, as for
//! bytes that this process wrote.

use std::hint::black_box;

use corelane::bench_support::Archives;
use corelane::event::{Encode as _, Scratch};
use criterion::{Criterion, Throughput};

use crate::game::{GameEvent, events, tick};

const EVENTS: usize = 1024;

pub(crate) fn benches(c: &mut Criterion) {
    let events: Vec<GameEvent> = events(EVENTS).into_iter().map(|(_, event)| event).collect();
    let archives = Archives::new(&events);
    let mut group = c.benchmark_group("codec");
    group.throughput(Throughput::Elements(EVENTS as u64));

    #[repr(align(16))]
    struct Page([u8; 48 * EVENTS]);
    let mut page = Box::new(Page([0; 48 * EVENTS]));
    let mut scratch = Scratch::new(1024);
    group.bench_function("encode", |b| {
        b.iter(|| {
            let mut bytes = 0;
            for (event, out) in events.iter().zip(page.0.chunks_exact_mut(48)) {
                bytes += event.encode(out, &mut scratch).unwrap_or(0);
            }
            assert_eq!(bytes, 48 * EVENTS);
            black_box(&mut page);
        });
    });
    let sum: u64 = (0..EVENTS as u64).sum();
    group.bench_function("access_checked", |b| {
        b.iter(|| {
            let ticks = black_box(&archives).bytes().filter_map(|bytes| GameEvent::access(bytes).ok()).map(tick);
            assert_eq!(ticks.sum::<u64>(), sum);
        });
    });
    group.bench_function("access_unchecked", |b| {
        b.iter(|| assert_eq!(black_box(&archives).unchecked().map(tick).sum::<u64>(), sum));
    });
    group.finish();
}
