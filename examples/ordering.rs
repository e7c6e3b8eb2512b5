//! Input that comes shuffled, twice and with holes is put right on its way into the log, and a restart in the middle changes nothing.
//!
//! ```text
//! cargo run --release --example ordering            2 million events
//! cargo run --release --example ordering -- 500     thousands of events
//! ```
//!
//! A source numbers the events of 16 partitions. On their way they are shuffled within 64; some come twice, some never, some far too
//! late. What the log holds in the end, and what the gate says of it, is compared with what was generated; the example fails where they differ.
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
/// After each block the gate is told that time has passed: what is missing then does not come in time.
const BLOCK: usize = 64 * WINDOW;
/// How long a missing event is waited for. The example does not wait: it lets the time pass.
const WAIT: Duration = Duration::from_secs(5);

/// What is offered, and what is to come of it.
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
            // Its gap was closed two blocks ago.
            let mut block: Vec<(u64, u64)> = late.extract_if(.., |(due, _)| *due <= at).map(|(_, what)| what).collect();
            input.late += block.len() as u64;
            while block.len() < BLOCK {
                let partition = random.random_range(0..PARTITIONS);
                let what = (partition as u64, next[partition]);
                next[partition] += 1;
                if at + 4 < events / BLOCK && random.random_ratio(1, 20_000) {
                    input.missing.insert(what);
                    if random.random() {
                        late.push((at + 3, what));
                    }
                    continue;
                }
                input.in_time.insert(what);
                block.push(what);
                if random.random_ratio(1, 50) {
                    block.push(what);
                    input.duplicates += 1;
                }
            }
            block.chunks_mut(WINDOW).for_each(|window| window.shuffle(&mut random));
            input.blocks.push(block);
        }
        input
    }
}

/// What became of what was offered.
#[derive(Debug, Default, Clone, Copy)]
struct Answers {
    taken: u64,
    duplicates: u64,
    late: u64,
    too_old: u64,
}

/// Of a stored event: where it came from. The event itself carries it.
fn source(event: &ArchivedGameEvent) -> Option<(u64, u64)> {
    match event {
        ArchivedGameEvent::Moved { zone, tick, .. } => Some((zone.to_native(), tick.to_native())),
        ArchivedGameEvent::Attacked { target, tick, .. } => Some((target.to_native(), tick.to_native())),
    }
}

fn made(partition: u64, sequence: u64) -> (Key, GameEvent) {
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
            let (key, event) = made(partition, sequence);
            let count = match gated.offer(partition, sequence, key, event)? {
                Accepted::Published(_) | Accepted::Waiting | Accepted::Buffered => &mut answers.taken,
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

/// Everything the log holds. Each shard must hold every partition by rising sequence, and nothing may be there twice.
fn read(engine: &EventLog<GameEvent>) -> Result<BTreeSet<(u64, u64)>> {
    engine.flush(Deadline::NEVER)?;
    let mut all = BTreeSet::new();
    for shard in 0..engine.config().shards() {
        let mut last = [None; PARTITIONS];
        let mut reader = engine.reader(ShardId(shard));
        while let Some(record) = reader.next()? {
            let Some((partition, sequence)) = source(record.event) else { bail!("an event of another kind") };
            let before = last[partition as usize].replace(sequence);
            ensure!(before < Some(sequence), "partition {partition}: {sequence} lies behind {before:?}");
            ensure!(all.insert((partition, sequence)), "partition {partition}: {sequence} is there twice");
        }
    }
    Ok(all)
}

fn sequences(gaps: &[Gap]) -> BTreeSet<(u64, u64)> {
    gaps.iter().flat_map(|gap| (gap.from..=gap.to).map(|sequence| (gap.partition, sequence))).collect()
}

/// How fast the same events go through in order, without a gate and behind one.
fn in_order(events: u64) -> Result<(f64, f64)> {
    let place = |n: u64| (n % PARTITIONS as u64, n / PARTITIONS as u64);
    let dir = tempfile::tempdir()?;
    let (engine, mut gated) = open(dir.path(), Durability::OsCache)?;
    let mut producer = engine.producer();
    let began = Instant::now();
    for n in 0..events {
        let (partition, sequence) = place(n);
        let (key, event) = made(partition, sequence);
        producer.publish(key, event)?;
    }
    let plain = rate(events, began, &producer.receipts())?;
    let began = Instant::now();
    for n in 0..events {
        let (partition, sequence) = place(n);
        let (key, event) = made(partition, sequence);
        let Accepted::Published(_) = gated.offer(partition, sequence, key, event)? else { bail!("{n} is next") };
    }
    let behind_gate = rate(events, began, &gated.receipts())?;
    drop(gated);
    engine.shutdown(Deadline::NEVER)?;
    Ok((plain, behind_gate))
}

/// Millions a second, until the last is appended.
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
        "           {in_time} in time, {} twice, {missing} not in time ({} of them late)",
        input.duplicates, input.late
    );

    let dir = tempfile::tempdir()?;
    let (engine, mut gated) = open(dir.path(), Durability::GroupCommit)?;
    let (first, _) = input.blocks.split_at(input.blocks.len() * 3 / 5);
    offer_all(&mut gated, first)?;
    let held = read(&engine)?.len();
    // No save: the positions on the disk are those of the beginning.
    drop((gated, engine));
    println!("stopped:   after {held} events, nothing saved; the source begins anew");

    let began = Instant::now();
    let (engine, mut gated) = open(dir.path(), Durability::GroupCommit)?;
    println!("reopened:  in {:.0} ms, counted from the log", began.elapsed().as_secs_f64() * 1e3);
    let answers = offer_all(&mut gated, &input.blocks)?;
    gated.finish()?;
    ensure!(answers.taken as usize == in_time - held, "{answers:?}: {held} of {in_time} were there");
    ensure!(read(&engine)? == input.in_time, "the log holds something else than what came in time");
    let gaps = gated.gaps()?;
    ensure!(sequences(&gaps) == input.missing, "the gaps are others than what is missing");
    println!("offered:   again from the beginning: {answers:?}");
    println!(
        "log:       {in_time} events, every partition by rising sequence, each once; {} gaps recorded:",
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

    // Once more without a break, for the figures; in `OsCache`, so that the disk is not what is measured.
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
    let (plain, behind_gate) = in_order(offered as u64)?;
    println!(
        "rate:      {shuffled:.2} M/s shuffled, with a sync for each gap; in order {behind_gate:.2}, without a gate {plain:.2}"
    );
    Ok(())
}
