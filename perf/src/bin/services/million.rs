//! Lets the event of a million keys fail, so that all keys retry at once or all are parked. Measures memory per key and
//! the effect on ingest.

use corelane::Deadline;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use corelane::consumer::{ConsumerReport, DeadLetterPolicy, HealthPolicy, LetterSelector, QueuePolicy, Retry, Start};

use crate::follow::measure;
use crate::tools::{engine, memory_bytes, publish};

/// The state that all keys enter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum KeyState {
    Retrying,
    Parked,
}

pub(crate) fn run(keys: u64, state: KeyState) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let engine = engine(&dir)?;
    publish(&mut engine.producer(), 0, keys, keys)?;
    engine.flush(Deadline::NEVER)?;
    let is_well = Arc::new(AtomicBool::new(true));
    let room = usize::try_from(keys)? + 1024;
    let well = Arc::clone(&is_well);
    let attempts = if state == KeyState::Parked { 1 } else { 5 };
    let builder = engine
        .consumer("million")
        .queues(QueuePolicy::default().unfinished_max(room).keys_max(room))
        .retry(Retry::fixed().base(Duration::from_secs(600)).cap(Duration::from_secs(600)).attempts(attempts))
        .health(HealthPolicy::default().samples_min(1_000_000).consecutive_max(1_000_000).failure_percent_max(100))
        .dead_letters(DeadLetterPolicy::default().letters_max(room));
    let consumer = builder.start(move |_, meta| {
        if meta.key.get() < FREE_KEY && !well.load(Ordering::Relaxed) { Err("down".into()) } else { Ok(()) }
    })?;
    consumer.drain(Deadline::NEVER)?;
    // First a baseline: the same consumer follows, and no key fails.
    let (mut tick, phase) = (0, Duration::from_secs(5));
    let mut ingest = || measure(&engine, &mut tick, FREE_KEY..FREE_KEY + 10_000, RATE, phase);
    ingest()?;
    let quiet = ingest()?;
    consumer.drain(Deadline::NEVER)?;
    is_well.store(false, Ordering::Relaxed);
    let (before, began) = (memory_bytes()?, Instant::now());
    consumer.seek(Start::Beginning)?;
    let has_entered = |report: &ConsumerReport| match state {
        KeyState::Parked => report.letters.letters as u64 == keys,
        KeyState::Retrying => report.retrying as u64 == keys,
    };
    while !has_entered(&consumer.report()) {
        ensure!(consumer.report().is_running, "{:?}", consumer.report());
        std::thread::sleep(Duration::from_millis(20));
    }
    let (took, grown) = (began.elapsed().as_secs_f64(), memory_bytes()?.saturating_sub(before));
    let busy = ingest()?;
    println!(
        "{keys} keys {state:?}: after {took:.1} s, {} bytes a key; ingest {:.1} ns of processor time per event, {:.1} without them, at {:.2} and {:.2} M events/s",
        grown / keys,
        busy.ingest_ns,
        quiet.ingest_ns,
        busy.rate / 1e6,
        quiet.rate / 1e6,
    );
    is_well.store(true, Ordering::Relaxed);
    if state == KeyState::Parked {
        let began = Instant::now();
        consumer.reprocess(LetterSelector::All)?;
        while consumer.report().letters.letters > 0 {
            std::thread::sleep(Duration::from_millis(20));
        }
        println!("{keys} keys reprocessed in {:.1} s", began.elapsed().as_secs_f64());
    }
    consumer.stop(Deadline::NEVER)?;
    Ok(())
}

/// Keys from this one on never fail.
const FREE_KEY: u64 = 1 << 40;
/// Events per second published meanwhile.
const RATE: u64 = 2_000_000;
