//! The hot path and little else, for tools that count or sample instructions: one producer, one shard,
//! 48-byte events of 10,000 users with a 32-byte state each, `OsCache`. `perf/callgrind.sh` runs it.
//!
//! ```text
//! cargo run --release --example hotpath -- 1000000
//! cargo run --release --example hotpath -- 1000000 stateless
//! ```
//!
//! The same events in the same batches every time: the ring is filled, and the next events are not made
//! before all of it is appended. So no full ring is waited for, and the shard finds whole batches.

#[path = "shared/event.rs"]
mod event;
#[path = "shared/player.rs"]
mod player;

use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use corelane::{Aggregate, Config, Durability, Engine, Key, Pin, Producer, Stateless, Wait};

use crate::event::GameEvent;
use crate::player::Player;

const USERS: u64 = 10_000;
const SEED: u64 = 0x5eed;
/// Events of one `publish_batch`, and of one batch of the shard.
const BATCH: usize = 256;
/// Events between two waits. Large, so that looking for events where there are none is rare.
const ROUND: usize = 1 << 16;

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let events = args.next().context("usage: hotpath EVENTS [stateless]")?.parse().context("EVENTS is a number")?;
    match args.next().as_deref() {
        None => run::<Player>(events),
        Some("stateless") => run::<Stateless<GameEvent>>(events),
        Some(other) => bail!("{other:?} is not \"stateless\""),
    }
}

fn run<A: Aggregate<Event = GameEvent>>(events: u64) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let config = Config::new(dir.path())
        .durability(Durability::OsCache)
        .wait(Wait::Park)
        .pin(Pin::None)
        .ring_capacity(ROUND)
        .batch_max(BATCH);
    let engine = Engine::<A>::open(config)?;
    let mut producer = engine.producer();
    let (mut made, mut random, mut batch) = (0, SEED, Vec::with_capacity(BATCH));
    while made < events {
        for _ in 0..ROUND / BATCH {
            while batch.len() < BATCH && made < events {
                batch.push(draw(&mut random, made));
                made += 1;
            }
            publish_batch_counted(&mut producer, &mut batch)?;
        }
        await_appended(&engine, &producer)?;
    }
    drop(producer);
    engine.shutdown(None)?;
    ensure!(
        engine.shard_metrics().iter().map(|shard| shard.appended).sum::<u64>() == events,
        "not every event was appended"
    );
    Ok(())
}

/// The next event and whose it is (a linear congruential generator's high bits).
fn draw(random: &mut u64, tick: u64) -> (Key, GameEvent) {
    *random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    let (user, x) = ((*random >> 33) % USERS, (tick & 0xffff) as f64);
    let event = if *random >> 63 == 0 {
        GameEvent::Moved { x, y: 2.0, heading: 0.5, zone: tick >> 8, tick }
    } else {
        GameEvent::Attacked { target: user ^ 1, damage: tick & 0xff, x, y: 2.0, tick }
    };
    (Key::new(user), event)
}

/// A function of its own, so that the counting can be switched on for it by name.
#[inline(never)]
fn publish_batch_counted(producer: &mut Producer<GameEvent>, batch: &mut Vec<(Key, GameEvent)>) -> Result<()> {
    producer.publish_batch(batch).map_err(Into::into)
}

/// Looks now and then; a waiter of its own would be work of the shard that no event has.
fn await_appended<A: Aggregate>(engine: &Engine<A>, producer: &Producer<GameEvent>) -> Result<()> {
    while !producer.receipts().iter().all(corelane::Receipt::is_appended) {
        ensure!(engine.failures().is_empty(), "the shard failed: {:?}", engine.failures());
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}
