//! Puts shuffled, duplicated and incomplete input in order before it reaches the log; a restart in the middle changes
//! nothing.
//!
//! ```text
//! cargo run --release --example ordering            2 million events
//! cargo run --release --example ordering -- 500     thousands of events
//! ```
//!
//! A source numbers the events of 16 partitions. They arrive shuffled within 64; some arrive twice, some never, some
//! far too late. The example compares the final log and the gate's figures with the generated input, and fails if they
//! differ.
#![expect(clippy::print_stdout, reason = "an example shows what it does")]

#[path = "shared/event.rs"]
mod event;

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use corelane::ingress::{Accepted, Gap, GatePolicy, GatedProducer};
use corelane::{Config, Deadline, Durability, EventLog, Key, Receipt, ShardId};
use event::{ArchivedGameEvent, GameEvent};
use rand::rngs::SmallRng;
use rand::seq::SliceRandom as _;
use rand::{Rng as _, SeedableRng as _};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const PARTITIONS: usize = 16;
const USERS: u64 = 10_000;
const WINDOW: usize = 64;
/// After each block the gate's time advances by `WAIT`, so that events missing by then count as missing.
const BLOCK: usize = 64 * WINDOW;
/// The gate's time limit for a missing event. The example does not wait: it simulates the passing of time.
const WAIT: Duration = Duration::from_secs(5);

/// The generated input, and the expected result.
struct Input {
    blocks: Vec<Vec<(u64, u64)>>,
    in_time: BTreeSet<(u64, u64)>,
    missing: BTreeSet<(u64, u64)>,
    duplicates: u64,
    late: u64,
}

impl Input {
    fn generate(events: usize) -> Self {
        let mut random = SmallRng::seed_from_u64(0x05de_ad5e);
        let mut input =
            Self { blocks: Vec::new(), in_time: BTreeSet::new(), missing: BTreeSet::new(), duplicates: 0, late: 0 };
        let (mut next, mut late) = ([0; PARTITIONS], Vec::new());
        for at in 0..events / BLOCK {
            // Adds the late events that are due; their gaps were closed two blocks ago.
            let mut block: Vec<(u64, u64)> =
                late.extract_if(.., |(due, _)| *due <= at).map(|(_, event)| event).collect();
            input.late += block.len() as u64;
            while block.len() < BLOCK {
                let partition = random.random_range(0..PARTITIONS);
                let event = (partition as u64, next[partition]);
                next[partition] += 1;
                if at + 4 < events / BLOCK && random.random_ratio(1, 20_000) {
                    input.missing.insert(event);
                    if random.random() {
                        late.push((at + 3, event));
                    }
                    continue;
                }
                input.in_time.insert(event);
                block.push(event);
                if random.random_ratio(1, 50) {
                    block.push(event);
                    input.duplicates += 1;
                }
            }
            block.chunks_mut(WINDOW).for_each(|window| window.shuffle(&mut random));
            input.blocks.push(block);
        }
        input
    }
}

/// The answers to the offers, counted by kind.
#[derive(Debug, Default, Clone, Copy)]
struct Answers {
    accepted: u64,
    duplicates: u64,
    late: u64,
    too_old: u64,
}

/// Returns the partition and the sequence of a stored event, which the event itself carries.
fn source(event: &ArchivedGameEvent) -> Option<(u64, u64)> {
    match event {
        ArchivedGameEvent::Moved { zone, tick, .. } => Some((zone.to_native(), tick.to_native())),
        ArchivedGameEvent::Attacked { target, tick, .. } => Some((target.to_native(), tick.to_native())),
    }
}

fn event_of(partition: u64, sequence: u64) -> (Key, GameEvent) {
    let key = Key::new(sequence.wrapping_mul(31) % USERS);
    let event = if sequence.is_multiple_of(4) {
        GameEvent::Attacked { target: partition, damage: 7, x: 1.0, y: 2.0, tick: sequence }
    } else {
        GameEvent::Moved { x: 1.0, y: 2.0, heading: 0.5, zone: partition, tick: sequence }
    };
    (key, event)
}

fn open(dir: &Path, durability: Durability) -> Result<(EventLog<GameEvent>, GatedProducer<GameEvent>)> {
    let engine = EventLog::open(Config::new(dir).shards(2).durability(durability))?;
    let gated = engine.gated("game", GatePolicy::default().gap_wait_max(WAIT), source)?;
    Ok((engine, gated))
}

fn offer_all(gated: &mut GatedProducer<GameEvent>, blocks: &[Vec<(u64, u64)>]) -> Result<Answers> {
    let mut answers = Answers::default();
    for block in blocks {
        for (partition, sequence) in block.iter().copied() {
            let (key, event) = event_of(partition, sequence);
            let count = match gated.offer(partition, sequence, key, event)? {
                Accepted::Published(_) | Accepted::Waiting | Accepted::Buffered => &mut answers.accepted,
                Accepted::Duplicate => &mut answers.duplicates,
                Accepted::Late(_) => &mut answers.late,
                Accepted::TooOld(_) => &mut answers.too_old,
            };
            *count += 1;
        }
        gated.pass_time(WAIT);
        gated.pump()?;
    }
    Ok(answers)
}

/// Reads the whole log. Each shard must hold every partition in ascending sequence, and no event twice.
fn read(engine: &EventLog<GameEvent>) -> Result<BTreeSet<(u64, u64)>> {
    engine.flush(Deadline::NEVER)?;
    let mut all = BTreeSet::new();
    for shard in 0..engine.config().shards() {
        let mut last = [None; PARTITIONS];
        let mut reader = engine.reader(ShardId(shard));
        while let Some(record) = reader.next()? {
            let Some((partition, sequence)) = source(record.event) else { bail!("an event of an unknown kind") };
            let before = last[partition as usize].replace(sequence);
            ensure!(before < Some(sequence), "partition {partition}: {sequence} follows {before:?}");
            ensure!(all.insert((partition, sequence)), "partition {partition}: {sequence} occurs twice");
        }
    }
    Ok(all)
}

fn sequences(gaps: &[Gap]) -> BTreeSet<(u64, u64)> {
    gaps.iter().flat_map(|gap| (gap.from..=gap.to).map(|sequence| (gap.partition, sequence))).collect()
}

/// Returns the rates of events in order, without a gate and with one.
fn in_order(events: u64) -> Result<(f64, f64)> {
    let place = |n: u64| (n % PARTITIONS as u64, n / PARTITIONS as u64);
    let dir = tempfile::tempdir()?;
    let (engine, mut gated) = open(dir.path(), Durability::OsCache)?;
    let mut producer = engine.producer();
    let began = Instant::now();
    for n in 0..events {
        let (partition, sequence) = place(n);
        let (key, event) = event_of(partition, sequence);
        producer.publish(key, event)?;
    }
    let plain = rate(events, began, &producer.receipts())?;
    let began = Instant::now();
    for n in 0..events {
        let (partition, sequence) = place(n);
        let (key, event) = event_of(partition, sequence);
        let Accepted::Published(_) = gated.offer(partition, sequence, key, event)? else {
            bail!("event {n} was not published at once")
        };
    }
    let with_gate = rate(events, began, &gated.receipts())?;
    drop(gated);
    engine.shutdown(Deadline::NEVER)?;
    Ok((plain, with_gate))
}

/// Returns millions of events per second, measured until the last is appended.
fn rate(events: u64, began: Instant, receipts: &[Receipt]) -> Result<f64> {
    receipts.iter().try_for_each(|receipt| receipt.appended().wait())?;
    Ok(events as f64 / began.elapsed().as_secs_f64() / 1e6)
}

fn main() -> Result<()> {
    let thousands: usize = std::env::args().nth(1).map_or(Ok(2000), |text| text.parse())?;
    let input = Input::generate(thousands * 1000);
    let offered: usize = input.blocks.iter().map(Vec::len).sum();
    let (missing, in_time) = (input.missing.len(), input.in_time.len());
    println!("generated: {offered} offers of {PARTITIONS} partitions, shuffled within {WINDOW}");
    println!(
        "           {in_time} in time, {} duplicated, {missing} not in time ({} of them late)",
        input.duplicates, input.late
    );

    let dir = tempfile::tempdir()?;
    let (engine, mut gated) = open(dir.path(), Durability::GroupCommit)?;
    let (first, _) = input.blocks.split_at(input.blocks.len() * 3 / 5);
    offer_all(&mut gated, first)?;
    let held = read(&engine)?.len();
    // Without a save the stored positions are the initial ones.
    drop((gated, engine));
    println!("stopped:   after {held} events, without saving; the source starts over");

    let began = Instant::now();
    let (engine, mut gated) = open(dir.path(), Durability::GroupCommit)?;
    println!(
        "reopened:  in {:.0} ms; the gate recovered its positions from the log",
        began.elapsed().as_secs_f64() * 1e3
    );
    let answers = offer_all(&mut gated, &input.blocks)?;
    gated.finish()?;
    ensure!(answers.accepted as usize == in_time - held, "{answers:?}: the log already held {held} of {in_time}");
    ensure!(read(&engine)? == input.in_time, "the log differs from the events that came in time");
    let gaps = gated.gaps()?;
    ensure!(sequences(&gaps) == input.missing, "the gaps differ from the missing events");
    println!("offered:   all input again: {answers:?}");
    println!(
        "log:       {in_time} events, every partition in ascending sequence, each once; {} gaps recorded:",
        gaps.len()
    );
    for gap in gaps.iter().take(3) {
        println!(
            "           partition {} lacks {}..={}, given up at {} ms",
            gap.partition,
            gap.from,
            gap.to,
            gap.time.as_ms()
        );
    }
    gated.close(Deadline::NEVER)?;
    engine.shutdown(Deadline::NEVER)?;
    drop(engine);

    // Once more without a restart, for the figures; in `OsCache`, so that the disk does not limit the rate.
    let dir = tempfile::tempdir()?;
    let (engine, mut gated) = open(dir.path(), Durability::OsCache)?;
    let began = Instant::now();
    let answers = offer_all(&mut gated, &input.blocks)?;
    gated.finish()?;
    let shuffled = rate(offered as u64, began, &gated.receipts())?;
    let figures = gated.statistics();
    ensure!((figures.in_order + figures.reordered) as usize == in_time, "{figures:?}");
    ensure!(figures.duplicates == input.duplicates && answers.duplicates == input.duplicates, "{figures:?}");
    ensure!(figures.late == input.late && figures.missing as usize == missing, "{figures:?}");
    ensure!((figures.too_old, figures.refused, figures.waiting) == (0, 0, 0), "{figures:?}");
    println!(
        "unbroken:  {} in order, {} reordered, {} duplicates, {} late",
        figures.in_order, figures.reordered, figures.duplicates, figures.late
    );
    println!("           {} gaps closed over {} events", figures.gaps_closed, figures.missing);
    drop(gated);
    engine.shutdown(Deadline::NEVER)?;
    let (plain, with_gate) = in_order(offered as u64)?;
    println!(
        "rate:      {shuffled:.2} M/s shuffled, with a sync for each gap; in order {with_gate:.2}, without a gate {plain:.2}"
    );
    Ok(())
}
