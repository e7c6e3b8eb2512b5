//! Measures states beyond the hot path: replay, opening from a checkpoint, time travel, and queries of a view.
//!
//! ```text
//! cargo run --release -p perf --bin states -- replay 20000000 10000     events, users
//! cargo run --release -p perf --bin states -- open 100000000 1000000    events, users
//! cargo run --release -p perf --bin states -- travel 1000000            events of the key whose past is queried
//! cargo run --release -p perf --bin states -- area 100000               players
//! ```
//!
//! 48-byte events, a 32-byte state, one shard, `OsCache` (files in the system's cache) unless stated otherwise.
#![expect(clippy::print_stdout, reason = "a tool's results belong on standard output")]

#[path = "../../../examples/shared/event.rs"]
mod event;
#[path = "../player.rs"]
mod player;

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use corelane::view::Area;
use corelane::{Config, Deadline, Durability, Engine, Key, Retention, Version, Wait};
use hdrhistogram::Histogram;

use crate::event::GameEvent;
use crate::player::Player;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Side of the world.
const WORLD: f64 = 1000.0;
const BATCH: usize = 256;

/// Returns the high bits of a linear congruential generator.
fn draw(random: &mut u64) -> u64 {
    *random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *random >> 33
}

fn draw_event(random: &mut u64, tick: u64) -> GameEvent {
    let (x, y) = ((draw(random) % 1_000_000) as f64 / 1000.0, (draw(random) % 1_000_000) as f64 / 1000.0);
    if tick.is_multiple_of(4) {
        GameEvent::Attacked { target: tick ^ 1, damage: tick & 0xff, x, y, tick }
    } else {
        GameEvent::Moved { x, y, heading: 0.5, zone: tick >> 8, tick }
    }
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number =
        |at: usize, default: u64| args.get(at).map_or(Ok(default), |text| text.parse()).context("not a number");
    let dir = tempfile::tempdir_in("target")
        .context("creating a folder for the store in ./target (run from the repository's root)")?;
    match args.first().map(String::as_str) {
        Some("replay") => replay(dir.path(), number(1, 20_000_000)?, number(2, 10_000)?),
        Some("open") => open(dir.path(), number(1, 100_000_000)?, number(2, 1_000_000)?),
        Some("travel") => travel(dir.path(), number(1, 1_000_000)?),
        Some("area") => area(dir.path(), number(1, 100_000)?),
        _ => bail!("usage: states replay|open|travel|area …"),
    }
}

fn config(dir: &Path, users: u64) -> Config {
    Config::new(dir).durability(Durability::OsCache).keys_expected(users as usize)
}

/// Publishes `events` events of random users.
fn fill(engine: &Engine<Player>, events: u64, users: u64) -> Result<()> {
    let (mut producer, mut random, mut batch) = (engine.producer(), 7, Vec::with_capacity(BATCH));
    for tick in 0..events {
        let user = draw(&mut random) % users;
        batch.push((Key::new(user), draw_event(&mut random, tick)));
        if batch.len() == BATCH {
            producer.publish_batch(&mut batch)?;
        }
    }
    producer.publish_batch(&mut batch)?;
    producer.receipts().iter().try_for_each(|receipt| receipt.appended().wait())?;
    Ok(())
}

/// Opens a store without a checkpoint, which folds the whole log: every CRC checked, every archive validated, on one
/// core.
fn replay(dir: &Path, events: u64, users: u64) -> Result<()> {
    let engine = Engine::<Player>::open(config(dir, users).checkpoint_bytes(0))?;
    fill(&engine, events, users)?;
    engine.shutdown(Deadline::NEVER)?;
    drop(engine);
    let mut rates = Vec::new();
    for _ in 0..5 {
        let engine = Engine::<Player>::open(config(dir, users).checkpoint_bytes(0))?;
        ensure!(engine.recovery().events() == events, "recovery did not find every event");
        rates.push(events as f64 / (engine.recovery().duration_ns as f64 / 1e9) / 1e6);
        engine.shutdown(Deadline::NEVER)?;
    }
    rates.sort_by(f64::total_cmp);
    println!(
        "replay into state  {:.1} M events/s (median of 5: {rates:.1?}), {events} events, {users} users",
        rates[2]
    );
    Ok(())
}

/// Opens a large store from a recent checkpoint.
fn open(dir: &Path, events: u64, users: u64) -> Result<()> {
    let engine = Engine::<Player>::open(config(dir, users))?;
    fill(&engine, events - events / 100, users)?;
    engine.checkpoint(Deadline::NEVER)?;
    fill(&engine, events / 100, users)?;
    engine.shutdown(Deadline::NEVER)?;
    drop(engine);
    let began = Instant::now();
    let engine = Engine::<Player>::open(config(dir, users))?;
    let seconds = began.elapsed().as_secs_f64();
    ensure!(engine.recovery().events() == events, "recovery did not find every event");
    println!("open  {seconds:.2} s: {events} events, {users} users, the newest 1 % appended after the checkpoint");
    engine.shutdown(Deadline::NEVER)?;
    Ok(())
}

/// Queries random past states of a key with many events, with other keys' events between them.
fn travel(dir: &Path, events: u64) -> Result<()> {
    let engine = Engine::<Player>::open(config(dir, 1000))?;
    let (mut producer, mut random, mut batch) = (engine.producer(), 7, Vec::with_capacity(BATCH));
    for tick in 0..events {
        batch.push((Key::new(1), draw_event(&mut random, tick)));
        for _ in 0..4 {
            let other = 2 + draw(&mut random) % 998;
            batch.push((Key::new(other), draw_event(&mut random, tick)));
        }
        if batch.len() >= BATCH {
            producer.publish_batch(&mut batch)?;
        }
    }
    producer.publish_batch(&mut batch)?;
    producer.receipts().iter().try_for_each(|receipt| receipt.appended().wait())?;
    query_past(&engine, events, "as written")?;
    engine.shutdown(Deadline::NEVER)?;
    drop(engine);
    let engine = Engine::<Player>::open(config(dir, 1000))?;
    query_past(&engine, events, "reopened")?;
    engine.shutdown(Deadline::NEVER)?;
    Ok(())
}

fn query_past(engine: &Engine<Player>, events: u64, name: &str) -> Result<()> {
    let (mut latency, mut applied, mut random) = (Histogram::<u64>::new(3)?, 0, 11);
    for _ in 0..20_000 {
        let version = 1 + draw(&mut random) % events;
        let began = Instant::now();
        let past = engine.state_at(Key::new(1), Version(version))?;
        latency.record(u64::try_from(began.elapsed().as_nanos())?)?;
        ensure!(past.state.tick == version - 1, "the state of version {version} is that of another version");
        applied = applied.max(past.applied);
    }
    let at = |quantile| latency.value_at_quantile(quantile) as f64 / 1e3;
    println!(
        "state_at, {name:<10}  p50 {:.1} µs, p99 {:.1} µs, max {:.0} µs; at most {applied} events applied, of {events}",
        at(0.5),
        at(0.99),
        at(1.0)
    );
    Ok(())
}

/// Queries the players in an area, alone and while the shard publishes, and measures the shard's rate meanwhile.
fn area(dir: &Path, players: u64) -> Result<()> {
    let nearby = Area::<Player>::new((0.0, 0.0, WORLD, WORLD), 20.0, |player| Some((player.x, player.y)));
    let retention = Retention::bytes(512 << 20);
    let config = config(dir, players).wait(Wait::SpinYield).retention(retention);
    let engine = Engine::<Player>::builder(config).view(&nearby).open()?;
    let (mut producer, mut random) = (engine.producer(), 7);
    for player in 0..players {
        producer.publish(Key::new(player), draw_event(&mut random, player))?;
    }
    producer.receipts().iter().try_for_each(|receipt| receipt.appended().wait())?;
    // The area of a circle of this radius is a hundredth of the world.
    let radius = (WORLD * WORLD / 100.0 / std::f64::consts::PI).sqrt();
    let mut latency = Histogram::<u64>::new(3)?;
    let (mut found, mut total) = (Vec::new(), 0);
    for _ in 0..20_000 {
        let at = |random: &mut u64| radius + (draw(random) % 1000) as f64 / 1000.0 * (WORLD - 2.0 * radius);
        let (x, y) = (at(&mut random), at(&mut random));
        let began = Instant::now();
        nearby.within_into(x, y, radius, &mut found);
        latency.record(u64::try_from(began.elapsed().as_nanos())?)?;
        total += found.len();
    }
    let at = |quantile| latency.value_at_quantile(quantile) as f64 / 1e3;
    println!(
        "area, no movement  p50 {:.1} µs, p99 {:.1} µs; {players} players, {:.0} found on average",
        at(0.5),
        at(0.99),
        total as f64 / 20_000.0
    );
    // With and without readers in turn; each reader queries a thousand times a second, as a server would.
    for readers in [0, 2, 0, 2, 0, 2] {
        let (rate, queries, median_us) = load(&engine, &nearby, players, readers, radius)?;
        println!("shard with {readers} readers  {rate:.2} M events/s; {queries} queries, p50 {median_us:.1} µs");
    }
    engine.shutdown(Deadline::NEVER)?;
    Ok(())
}

/// Publishes for two seconds while `readers` query the view. Returns the events per second in millions, the number of
/// queries, and their median in µs.
fn load(
    engine: &Engine<Player>,
    nearby: &Area<Player>,
    players: u64,
    readers: usize,
    radius: f64,
) -> Result<(f64, u64, f64)> {
    let (over, asked) = (AtomicBool::new(false), AtomicU64::new(0));
    let latency = std::sync::Mutex::new(Histogram::<u64>::new_with_bounds(1, (1 << 42) - 1, 3)?);
    let rate = thread::scope(|scope| -> Result<f64> {
        for reader in 0..readers {
            let (over, asked, latency) = (&over, &asked, &latency);
            scope.spawn(move || {
                let (mut random, mut found) = (reader as u64 + 100, Vec::new());
                while !over.load(Ordering::Relaxed) {
                    let at = |random: &mut u64| (draw(random) % 1000) as f64;
                    let (x, y) = (at(&mut random), at(&mut random));
                    let began = Instant::now();
                    nearby.within_into(x, y, radius, &mut found);
                    let ns = began.elapsed().as_nanos() as u64;
                    if let Ok(mut latency) = latency.lock() {
                        latency.saturating_record(ns);
                    }
                    asked.fetch_add(1, Ordering::Relaxed);
                    thread::sleep(Duration::from_millis(1));
                }
            });
        }
        let (mut producer, mut random, mut batch) = (engine.producer(), 13, Vec::with_capacity(BATCH));
        let (began, mut sent) = (Instant::now(), 0);
        while began.elapsed() < Duration::from_secs(2) {
            while batch.len() < BATCH {
                let player = draw(&mut random) % players;
                batch.push((Key::new(player), draw_event(&mut random, sent)));
            }
            sent += BATCH as u64;
            producer.publish_batch(&mut batch)?;
        }
        producer.receipts().iter().try_for_each(|receipt| receipt.appended().wait())?;
        let rate = sent as f64 / began.elapsed().as_secs_f64() / 1e6;
        over.store(true, Ordering::Relaxed);
        Ok(rate)
    })?;
    let latency = latency.into_inner().map_err(|_| anyhow::anyhow!("a reader panicked"))?;
    Ok((rate, asked.into_inner(), latency.value_at_quantile(0.5) as f64 / 1e3))
}
