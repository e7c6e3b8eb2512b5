//! The area view with 100,000 evenly spread players: queries that find 1 % of them, alone and while a writer moves
//! players without pause, and the cost of a move on the shard.

use std::convert::Infallible;
use std::hint::black_box;
use std::sync::atomic::{AtomicBool, Ordering};

use corelane::bench_support::only_place;
use corelane::view::{Area, View as _, ViewWriter};
use corelane::{Aggregate, Bounded, Emit, Event, EventTypeId, Key, Meta};
use criterion::{BenchmarkId, Criterion, Throughput};
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};
use rkyv::{Archive, Deserialize, Serialize};

use crate::game::{ArchivedGameEvent, GameEvent};

const PLAYERS: u64 = 100_000;
const SIDE: f64 = 10_000.0;
/// About ten players per cell.
const CELL: f64 = 100.0;
const MOVES: usize = 1 << 16;

#[derive(Archive, Serialize, Deserialize, Bounded, Clone, Default)]
pub(crate) struct Walker {
    pub(crate) x: f64,
    pub(crate) y: f64,
}

impl Aggregate for Walker {
    type Event = GameEvent;
    type Command = Infallible;
    type Rejection = ();
    fn evolve(&mut self, _event: &ArchivedGameEvent, _meta: &Meta) {}
    fn decide(&self, command: Infallible, _emit: &mut Emit<GameEvent>) -> Result<(), ()> {
        match command {}
    }
}

pub(crate) fn meta() -> Meta {
    let kind = GameEvent::TYPES.first().map_or(EventTypeId(1), |kind| kind.id);
    Meta::new(Key(0), kind)
}

type Filled = (Area<Walker>, Box<dyn ViewWriter<Walker>>, Vec<Walker>);

/// Returns the view with all players, its writer, and the players' positions.
fn filled(random: &mut SmallRng) -> Filled {
    let area = Area::new((0.0, 0.0, SIDE, SIDE), CELL, |walker: &Walker| Some((walker.x, walker.y)));
    let mut writer = area.writer(&only_place(PLAYERS as usize));
    let mut place = || random.random_range(0.0..SIDE);
    let walkers: Vec<Walker> = (0..PLAYERS).map(|_| Walker { x: place(), y: place() }).collect();
    (0..).zip(&walkers).for_each(|(key, walker)| writer.load(Key(key), walker));
    (area, writer, walkers)
}

/// Moves random players, each by up to `step` in both directions.
fn moves(random: &mut SmallRng, walkers: &mut [Walker], step: f64) -> Vec<(Key, Walker)> {
    let mut next = || {
        let key = random.random_range(0..walkers.len());
        let walker = &mut walkers[key];
        walker.x = (walker.x + random.random_range(-step..step)).clamp(0.0, SIDE);
        walker.y = (walker.y + random.random_range(-step..step)).clamp(0.0, SIDE);
        (Key(key as u64), walker.clone())
    };
    (0..MOVES).map(|_| next()).collect()
}

pub(crate) fn benches(c: &mut Criterion) {
    let mut random = SmallRng::seed_from_u64(0x5eed);
    queries(c, &mut random);
    let mut group = c.benchmark_group("area");
    group.throughput(Throughput::Elements(MOVES as u64));
    for (name, step) in [("walk", 5.0), ("teleport", SIDE)] {
        let (_area, mut writer, mut walkers) = filled(&mut random);
        let moves = moves(&mut random, &mut walkers, step);
        let meta = meta();
        group.bench_function(BenchmarkId::new("move", name), |b| {
            b.iter(|| moves.iter().for_each(|(key, walker)| writer.changed(*key, walker, &meta)));
        });
    }
    group.finish();
}

fn queries(c: &mut Criterion, random: &mut SmallRng) {
    let (area, mut writer, mut walkers) = filled(random);
    let radius = (SIDE * SIDE / 100.0 / std::f64::consts::PI).sqrt();
    let centres: Vec<(f64, f64)> = (0..1024)
        .map(|_| (random.random_range(radius..SIDE - radius), random.random_range(radius..SIDE - radius)))
        .collect();
    let mut group = c.benchmark_group("area");
    let mut within = |name: &str| {
        let mut centres = centres.iter().cycle();
        let mut found = Vec::new();
        group.bench_function(BenchmarkId::new("within", name), |b| {
            b.iter(|| {
                let (x, y) = centres.next().copied().unwrap_or_default();
                area.within_into(x, y, radius, &mut found);
                black_box(found.len())
            });
        });
    };
    within("still");
    let moves = moves(random, &mut walkers, 5.0);
    let (is_over, meta) = (AtomicBool::new(false), meta());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                moves.iter().for_each(|(key, walker)| writer.changed(*key, walker, &meta));
            }
        });
        within("moving");
        is_over.store(true, Ordering::Relaxed);
    });
    group.finish();
}
