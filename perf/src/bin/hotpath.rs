//! Runs the hot path for tools that count or sample instructions: one producer, one shard, 48-byte events of 10,000
//! users with a 32-byte state each, `OsCache`. `perf/callgrind.sh` runs it.
//!
//! ```text
//! cargo run --release -p perf --bin hotpath -- 1000000             publish in batches of 256
//! cargo run --release -p perf --bin hotpath -- 1000000 stateless   in batches of 256, without states
//! cargo run --release -p perf --bin hotpath -- 1000000 publish     publish one event per call
//! cargo run --release -p perf --bin hotpath -- 1000000 command     send commands of one event each, pipelined
//! cargo run --release -p perf --bin hotpath -- 1000000 read        in batches, then read the events
//! cargo run --release -p perf --bin hotpath -- 1000000 recovered   in batches, reopen the store, then read the events
//! ```
//!
//! The events are the same in every run. A round fills the ring, and the next round starts when all of it is appended,
//! so no producer waits for a full ring and the shard finds whole batches. Callgrind counts the functions named
//! `…_counted`.

#[path = "../../../examples/shared/event.rs"]
mod event;
#[path = "../player.rs"]
mod player;

use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use corelane::command::Ticket;
use corelane::{
    Aggregate, Bounded, Client, Config, Deadline, Durability, Emit, Engine, Key, Meta, Pin, Producer, Reader, ShardId,
    Stateless, Wait,
};
use rkyv::{Archive, Deserialize, Serialize};

use crate::event::{ArchivedGameEvent, GameEvent};
use crate::player::Player;

const USERS: u64 = 10_000;
const SEED: u64 = 0x5eed;
/// Events of one `publish_batch`, and of one batch of the shard.
const BATCH: usize = 256;
/// Events between two waits. Large, so that the shard rarely polls empty lanes.
const ROUND: usize = 1 << 16;

/// A player whose commands are the events to append.
#[derive(Archive, Serialize, Deserialize, Bounded, Clone, Debug, Default, PartialEq)]
struct Commanded(Player);

impl Aggregate for Commanded {
    type Event = GameEvent;
    type Command = GameEvent;
    type Rejection = ();

    #[inline]
    fn evolve(&mut self, event: &ArchivedGameEvent, meta: &Meta) {
        self.0.evolve(event, meta);
    }

    #[inline]
    fn decide(&self, command: GameEvent, emit: &mut Emit<GameEvent>) -> Result<(), ()> {
        emit.event(command);
        Ok(())
    }
}

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let usage = "usage: hotpath EVENTS [stateless|publish|command|read|recovered]";
    let events = args.next().context(usage)?.parse().context("EVENTS is a number")?;
    let dir = tempfile::tempdir()?;
    match args.next().as_deref() {
        None => drop(publish::<Player>(dir.path(), events, publish_batch_counted)?),
        Some("stateless") => drop(publish::<Stateless<GameEvent>>(dir.path(), events, publish_batch_counted)?),
        Some("publish") => drop(publish::<Player>(dir.path(), events, publish_counted)?),
        Some("command") => command(dir.path(), events)?,
        Some("read") => {
            let engine = publish::<Player>(dir.path(), events, publish_batch_counted)?;
            read_counted(&mut engine.reader(ShardId(0)), events)?;
        }
        Some("recovered") => {
            drop(publish::<Player>(dir.path(), events, publish_batch_counted)?);
            let engine = Engine::<Player>::open(config(dir.path()))?;
            read_counted(&mut engine.reader(ShardId(0)), events)?;
        }
        Some(_) => bail!(usage),
    }
    Ok(())
}

fn config(dir: &Path) -> Config {
    Config::new(dir)
        .durability(Durability::OsCache)
        .wait(Wait::Park)
        .pin(Pin::None)
        .ring_capacity(ROUND)
        .batch_max(BATCH)
}

type Batch = Vec<(Key, GameEvent)>;

/// Publishes `events` events, shuts the engine down, and returns it.
fn publish<A: Aggregate<Event = GameEvent>>(
    dir: &Path,
    events: u64,
    send: fn(&mut Producer<GameEvent>, &mut Batch) -> Result<()>,
) -> Result<Engine<A>> {
    let engine = Engine::<A>::open(config(dir))?;
    let mut producer = engine.producer();
    let (mut created, mut random, mut batch) = (0, SEED, Batch::with_capacity(BATCH));
    while created < events {
        for _ in 0..ROUND / BATCH {
            while batch.len() < BATCH && created < events {
                batch.push(draw(&mut random, created));
                created += 1;
            }
            send(&mut producer, &mut batch)?;
        }
        await_appended(&engine, created)?;
    }
    drop(producer);
    engine.shutdown(Deadline::NEVER)?;
    ensure!(appended(&engine) == events, "not every event was appended");
    Ok(engine)
}

fn command(dir: &Path, events: u64) -> Result<()> {
    let engine = Engine::<Commanded>::open(config(dir))?;
    let mut client = engine.client();
    let (mut created, mut random) = (0, SEED);
    let (mut batch, mut tickets) = (Batch::with_capacity(ROUND), Vec::with_capacity(ROUND));
    while created < events {
        while batch.len() < ROUND && created < events {
            batch.push(draw(&mut random, created));
            created += 1;
        }
        send_counted(&mut client, &mut batch, &mut tickets)?;
        await_appended(&engine, created)?;
        claim_counted(&mut client, &mut tickets)?;
    }
    drop(client);
    engine.shutdown(Deadline::NEVER)?;
    ensure!(appended(&engine) == events, "not every command was appended");
    Ok(())
}

/// Returns the next event and its key, from the high bits of a linear congruential generator.
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

// Functions of their own, so that the counting can be switched on for each by its name.

#[inline(never)]
fn publish_batch_counted(producer: &mut Producer<GameEvent>, batch: &mut Batch) -> Result<()> {
    producer.publish_batch(batch).map_err(Into::into)
}

#[inline(never)]
fn publish_counted(producer: &mut Producer<GameEvent>, batch: &mut Batch) -> Result<()> {
    for (key, event) in batch.drain(..) {
        producer.publish(key, event).map_err(|rejected| anyhow!("{rejected}"))?;
    }
    Ok(())
}

#[inline(never)]
fn send_counted(client: &mut Client<Commanded>, batch: &mut Batch, tickets: &mut Vec<Ticket>) -> Result<()> {
    for (key, command) in batch.drain(..) {
        tickets.push(client.send(key, command).ticket().map_err(|rejected| anyhow!("{rejected}"))?);
    }
    Ok(())
}

#[inline(never)]
fn claim_counted(client: &mut Client<Commanded>, tickets: &mut Vec<Ticket>) -> Result<()> {
    for ticket in tickets.drain(..) {
        client.answer(ticket).wait().map_err(|error| anyhow!("{error:?}"))?;
    }
    Ok(())
}

#[inline(never)]
fn read_counted(reader: &mut Reader<GameEvent>, events: u64) -> Result<()> {
    let mut read = 0;
    while reader.next()?.is_some() {
        read += 1;
    }
    ensure!(read == events, "{read} of {events} events were read");
    Ok(())
}

fn appended<A: Aggregate>(engine: &Engine<A>) -> u64 {
    engine.shard_metrics().iter().map(|shard| shard.appended).sum()
}

/// Polls: waking a waiter would add instructions to the shard that belong to no event.
fn await_appended<A: Aggregate>(engine: &Engine<A>, events: u64) -> Result<()> {
    while appended(engine) < events {
        ensure!(engine.failures().is_empty(), "the shard failed: {:?}", engine.failures());
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}
