//! One player's story, and every way to query it. Each step prints what it shows and checks it.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use corelane::error::HistoryError;
use corelane::{Config, Engine, Key, Time, Version};

use crate::game::{GameEvent, LEVEL_UP, MOVE, Place, Player, Source};
use crate::soon;

const HERO: Key = Key::new(42);
const RIVAL: Key = Key::new(43);
/// The number of the hero's events.
const EVENTS: u64 = 1_000;
/// The time of event 0; each event is a second after the one before.
const BEGAN_MS: u64 = 1_700_000_000_000;
const SNAPSHOT_EVERY: u64 = 100;

pub(crate) fn run(config: Config) -> Result<()> {
    let config = config.snapshot_every(SNAPSHOT_EVERY);
    let engine = Engine::<Player>::open(config.clone())?;

    step("publish");
    let mut producer = engine.producer();
    for n in 1..=EVENTS {
        producer.publish(HERO, story(n))?;
    }
    producer.publish(RIVAL, story(1))?.durable().wait()?;
    producer.receipts().iter().try_for_each(|receipt| receipt.durable().wait())?;
    println!("{EVENTS} events of player {HERO}, one of player {RIVAL}: durable");

    step("state: `evolve` computes it in the turn that appends the event");
    let (hero, version) = engine.state(HERO).wait()?.context("the hero has a state")?;
    println!("version {version}: {hero:?}");
    ensure!(version == Version(EVENTS) && hero == expected(EVENTS));
    ensure!(engine.state(Key::new(7)).wait()?.is_none(), "a key without events has no state");

    step("stream: the events of a key from any version");
    let mut stream = engine.stream(HERO, Version(901))?;
    let (mut events, mut level_ups) = (0, 0);
    while let Some(record) = stream.next()? {
        events += 1;
        level_ups += u64::from(record.meta.event_type == LEVEL_UP);
    }
    println!("from version 901: {events} events, {level_ups} of them level-ups");
    ensure!((events, level_ups) == (100, 1));
    drop(stream);

    step("rebuild: from the first event, without snapshots");
    let (rebuilt, at) = engine.rebuild(HERO)?;
    println!("{at} events produce the current state");
    ensure!((&rebuilt, at) == (&hero, version));

    step("snapshots: one every hundred events of a key");
    // The shard does not wait while they are written.
    let stats = loop {
        let stats = engine.snapshot_stats();
        if stats.count + stats.skipped >= EVENTS / SNAPSHOT_EVERY {
            break stats;
        }
        std::thread::sleep(Duration::from_millis(1));
    };
    println!("{} snapshots, {} bytes each on average, {} skipped", stats.count, stats.bytes_average, stats.skipped);
    ensure!((stats.count, stats.skipped, stats.unreadable) == (EVENTS / SNAPSHOT_EVERY, 0, 0));

    step("time travel: from the nearest snapshot");
    travel(&engine)?;

    step("checkpoint: saves all states, so that opening folds only later events");
    engine.checkpoint(soon())?;
    for n in EVENTS + 1..=EVENTS + 10 {
        producer.publish(HERO, story(n))?;
    }
    println!("{} checkpoint(s) held; ten more events published", engine.snapshot_stats().checkpoints);
    drop(producer);
    engine.shutdown(soon())?;
    drop(engine);

    step("reopen");
    let engine = Engine::<Player>::open(config)?;
    let (hero, version) = engine.state(HERO).wait()?.context("the hero has a state after reopening")?;
    println!(
        "{} events found in {:.1} ms; the hero is at version {version}",
        engine.recovery().events(),
        engine.recovery().duration_ns as f64 / 1e6
    );
    ensure!(version == Version(EVENTS + 10) && hero == expected(EVENTS + 10));
    travel(&engine)?;

    step("compare: folds the whole log again and compares with the current states");
    let comparison = engine.compare()?;
    println!("{} states from {} events: {} differ", comparison.keys, comparison.events, comparison.differing.len());
    ensure!((comparison.keys, comparison.events) == (2, EVENTS + 11) && comparison.differing.is_empty());
    engine.shutdown(soon())?;
    println!("\nevery check passed");
    Ok(())
}

/// Queries every past state, by version and by time, and checks it.
fn travel(engine: &Engine<Player>) -> Result<()> {
    let mut applied_max = 0;
    for n in 0..=EVENTS {
        let by_version = engine.state_at(HERO, Version(n))?;
        // Half a second after event n and before the next event.
        let by_time = engine.state_at(HERO, Time::unix_ms(BEGAN_MS + n * 1_000 + 500))?;
        ensure!(by_version.state == expected(n) && by_time.state == by_version.state, "version {n}: {by_version:?}");
        ensure!(by_version.version == Version(n) && by_time.version == Version(n));
        applied_max = applied_max.max(by_version.applied).max(by_time.applied);
    }
    println!("{EVENTS} versions, each queried by number and by time: at most {applied_max} events applied");
    ensure!(applied_max <= SNAPSHOT_EVERY);
    match engine.state_at(HERO, Version(1_000_000)) {
        Err(HistoryError::NotYet { newest, .. }) => {
            println!("version 1000000 does not exist yet: the newest is {newest}")
        }
        other => anyhow::bail!("a state of the future: {other:?}"),
    }
    Ok(())
}

/// Returns the hero's event number `n`.
fn story(n: u64) -> GameEvent {
    let place = |n: u64| Place { x: n as f64 / 2.0, y: 100.0 };
    let source = |position| Source {
        timestamp_ms: Some(BEGAN_MS + n * 1_000),
        position,
        payload: "{}".into(),
        ..Source::default()
    };
    match n {
        _ if n.is_multiple_of(100) => {
            GameEvent::LevelledUp { new_level: 1 + (n / 100).cast_signed(), source: source(None) }
        }
        _ if n.is_multiple_of(10) => GameEvent::Killed { source: source(None) },
        _ if n.is_multiple_of(25) => GameEvent::PickedUp { item: "arrow".into(), quantity: 20, source: source(None) },
        _ => GameEvent::Other { kind: MOVE.get(), source: source(Some(place(n))) },
    }
}

/// Returns the expected state of the hero after `n` events, computed without folding them.
fn expected(n: u64) -> Player {
    let mut hero = Player::default();
    if n == 0 {
        return hero;
    }
    let (tens, hundreds) = (n / 10, n / 100);
    hero.kills = (tens - hundreds).cast_signed();
    hero.experience = hero.kills * 100;
    hero.level = 1 + hundreds.cast_signed();
    let arrows = ((n + 25) / 50).cast_signed() * 20;
    if arrows > 0 {
        hero.inventory.push(crate::game::Item { name: "arrow".into(), quantity: arrows });
    }
    let moved = (1..=n).rev().find(|n| n % 10 != 0 && n % 25 != 0).unwrap_or(n);
    hero.position = Some(Place { x: moved as f64 / 2.0, y: 100.0 });
    hero.last_update_ms = BEGAN_MS + n * 1_000;
    hero
}

fn step(name: &str) {
    println!("\n== {name}");
}
