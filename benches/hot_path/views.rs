//! The other views with 100,000 keys: the cost of an event on the shard, the cost of a query for its caller, and the
//! time in which a leaderboard of a million goes through all scores.

use std::hint::black_box;
use std::time::{Duration, Instant};

use corelane::Key;
use corelane::bench_support::only_place;
use corelane::view::{ById, Leaderboard, Position, Presence, ServerStatus, View};
use criterion::{BenchmarkId, Criterion, Throughput};
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};

use crate::area::{Walker, meta};

const KEYS: u64 = 100_000;
const EVENTS: usize = 1 << 16;
/// Events between two publications of the position.
const BATCH: usize = 256;

pub(crate) fn benches(c: &mut Criterion) {
    let mut random = SmallRng::seed_from_u64(0x5eed);
    let events: Vec<(Key, Walker)> = (0..EVENTS)
        .map(|_| {
            let place = Walker { x: random.random_range(0.0..1e6), y: random.random_range(0.0..1e6) };
            (Key(random.random_range(0..KEYS)), place)
        })
        .collect();
    let by_id = ById::new(32, |walker: &Walker| (walker.x, walker.y));
    let best = Leaderboard::new(100, |walker: &Walker| walker.x as i64);
    let status = ServerStatus::new(|walker: &Walker| if walker.x < 5e5 { Presence::Online } else { Presence::Offline });
    change(c, "by_id", &by_id, &events);
    change(c, "leaderboard", &best, &events);
    change(c, "status", &status, &events);

    let mut group = c.benchmark_group("views");
    let mut keys = events.iter().map(|(key, _)| *key).cycle();
    group.bench_function(BenchmarkId::new("ask", "by_id"), |b| {
        b.iter(|| black_box(by_id.get(keys.next().unwrap_or_default())));
    });
    group.bench_function(BenchmarkId::new("ask", "leaderboard"), |b| b.iter(|| black_box(best.top(100))));
    group.bench_function(BenchmarkId::new("ask", "status"), |b| b.iter(|| black_box(status.get())));
    group.sample_size(10);
    group.bench_function(BenchmarkId::new("refill", "1M"), |b| b.iter_custom(|rounds| refill(rounds, &best)));
    group.finish();
}

fn change(c: &mut Criterion, name: &str, view: &dyn View<Walker>, events: &[(Key, Walker)]) {
    let mut writer = view.writer(&only_place(KEYS as usize));
    (0..KEYS).for_each(|key| writer.load(Key(key), &Walker::default()));
    let meta = meta();
    let mut group = c.benchmark_group("views");
    group.throughput(Throughput::Elements(events.len() as u64));
    group.bench_function(BenchmarkId::new("change", name), |b| {
        b.iter(|| {
            for batch in events.chunks(BATCH) {
                batch.iter().for_each(|(key, walker)| writer.changed(*key, walker, &meta));
                writer.publish(Position::default());
            }
        });
    });
    group.finish();
}

/// Times the first publication after loading, which reads all scores.
fn refill(rounds: u64, view: &dyn View<Walker>) -> Duration {
    let mut random = SmallRng::seed_from_u64(0x5eed);
    let mut one = || {
        let mut writer = view.writer(&only_place(1_000_000));
        (0..1_000_000).for_each(|key| writer.load(Key(key), &Walker { x: random.random_range(0.0..1e6), y: 0.0 }));
        let begin = Instant::now();
        writer.publish(Position::default());
        begin.elapsed()
    };
    (0..rounds).map(|_| one()).sum()
}
