//! Measures the cost that live consumers add to ingest. Phases with and without them alternate at the same offered
//! rate. The cost of ingest is the processor time of its two threads, the publisher's and the shard's; its success is
//! the share of the rate it keeps.

use std::collections::BTreeMap;
use std::ops::Range;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use corelane::consumer::Consumer;
use corelane::{Config, Deadline, Durability, EventLog, Retention};

use crate::event::GameEvent;
use crate::tools::{median, publish_of, thread_times};

/// Events per batch. Each batch has a due time.
const BATCH: u64 = 1_000;

#[derive(Debug, Clone, Copy)]
pub(crate) struct Phase {
    /// Events per second.
    pub(crate) rate: f64,
    /// Processor time per event of the publishing thread and the shard's thread, in ns.
    pub(crate) ingest_ns: f64,
    /// Processor time of the consumers' threads, as a share of one core.
    consumers: f64,
}

pub(crate) fn run(rate: u64, consumers: usize, phase: Duration, repeats: usize) -> Result<()> {
    let dir = tempfile::tempdir()?;
    // Retention recycles a few segments.
    let retention = Retention::bytes(2 << 30);
    let config = Config::new(dir.path()).durability(Durability::OsCache).retention(retention);
    let engine = EventLog::<GameEvent>::open(config)?;
    let mut tick = 0;
    // Allocates the segments' blocks and pages.
    measure(&engine, &mut tick, 0..10_000, rate, 2 * phase)?;
    let (mut without, mut with) = (Vec::new(), Vec::new());
    for round in 0..repeats {
        without.push(measure(&engine, &mut tick, 0..10_000, rate, phase)?);
        let following: Vec<Consumer<GameEvent>> = (0..consumers)
            .map(|i| engine.subscribe(&format!("follows-{i}")).start(|_, _| Ok(())))
            .collect::<Result<_, _>>()?;
        let before: u64 = following.iter().map(|consumer| consumer.report().handled).sum();
        let first = tick;
        with.push(measure(&engine, &mut tick, 0..10_000, rate, phase)?);
        for consumer in following {
            ensure!(
                consumer.drain(Some(Instant::now() + Duration::from_secs(10))).is_ok(),
                "round {round}: it lags behind"
            );
            let handled = consumer.report().handled;
            ensure!(before == 0 && handled >= tick - first, "round {round}: {handled} of {}", tick - first);
            consumer.stop(Deadline::NEVER)?;
        }
        (0..consumers).try_for_each(|i| engine.remove_consumer(&format!("follows-{i}")))?;
    }
    let of = |phases: &[Phase], figure: fn(&Phase) -> f64| median(phases.iter().map(figure).collect());
    let show = |name: &str, phases: &[Phase]| {
        let (rate, ingest) = (of(phases, |phase| phase.rate) / 1e6, of(phases, |phase| phase.ingest_ns));
        println!(
            "{name}   {rate:5.2} M events/s   ingest {ingest:5.1} ns of processor time per event   consumers {:3.0} % of a core",
            100.0 * of(phases, |phase| phase.consumers)
        );
    };
    println!(
        "{:.1} M events/s offered, {consumers} consumers, medians of {repeats} phases of {phase:?}",
        rate as f64 / 1e6
    );
    show("none      ", &without);
    show("following ", &with);
    let pairs = || without.iter().zip(&with);
    let kept = median(pairs().map(|(without, with)| with.rate / without.rate).collect());
    let cost = median(pairs().map(|(without, with)| with.ingest_ns / without.ingest_ns - 1.0).collect());
    println!("rate kept {:.1} %, cost of ingest {:+.1} %", 100.0 * kept, 100.0 * cost);
    Ok(())
}

/// Runs one phase: publishes each batch when it is due, and measures.
pub(crate) fn measure(
    engine: &EventLog<GameEvent>,
    tick: &mut u64,
    keys: Range<u64>,
    rate: u64,
    phase: Duration,
) -> Result<Phase> {
    let mut producer = engine.producer();
    let (before, began, first) = (thread_times()?, Instant::now(), *tick);
    while began.elapsed() < phase {
        publish_of(&mut producer, *tick, *tick + BATCH, keys.clone())?;
        *tick += BATCH;
        let due = Duration::from_secs_f64((*tick - first) as f64 / rate as f64);
        thread::sleep(due.saturating_sub(began.elapsed()));
    }
    for receipt in producer.receipts() {
        receipt.appended().wait()?;
    }
    let (seconds, after) = (began.elapsed().as_secs_f64(), thread_times()?);
    let events = (*tick - first) as f64;
    let spent = spent(&before, &after);
    let of = |is: fn(&str) -> bool| spent.iter().filter(|(name, _)| is(name)).map(|(_, time)| time.as_secs_f64()).sum();
    let ingest: f64 = of(|name| name == "services" || name.starts_with("corelane-shard"));
    Ok(Phase {
        rate: events / seconds,
        ingest_ns: ingest * 1e9 / events,
        consumers: of(|name| name.starts_with("corelane-follow")) / seconds,
    })
}

type Times = BTreeMap<u64, (String, Duration)>;

fn spent(before: &Times, after: &Times) -> Vec<(String, Duration)> {
    let since = |id: &u64| before.get(id).map_or(Duration::ZERO, |(_, time)| *time);
    after.iter().map(|(id, (name, time))| (name.clone(), time.saturating_sub(since(id)))).collect()
}
