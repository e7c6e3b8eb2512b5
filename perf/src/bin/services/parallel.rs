//! Runs a sleeping handler for many keys concurrently, each key in order.

use corelane::Deadline;
use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::event::ArchivedGameEvent;
use crate::tools::{engine, median, publish};

pub(crate) fn run(events: u64, keys: u64, concurrency: usize, sleep: Duration, repeats: usize) -> Result<()> {
    let mut seconds = Vec::new();
    for _ in 0..repeats {
        let dir = tempfile::tempdir()?;
        let engine = engine(&dir)?;
        publish(&mut engine.producer(), 0, events, keys)?;
        engine.flush(Deadline::NEVER)?;
        let newest = Arc::new(Mutex::new(HashMap::<u64, u64>::new()));
        let seen = Arc::clone(&newest);
        let began = Instant::now();
        let consumer = engine.consumer("parallel").concurrency(concurrency).start(move |event, meta| {
            thread::sleep(sleep);
            let (ArchivedGameEvent::Moved { tick, .. } | ArchivedGameEvent::Attacked { tick, .. }) = event;
            let tick = tick.to_native();
            let before = seen.lock().map_err(|_| "poisoned")?.insert(meta.key.get(), tick);
            // A retry of this event fails again, so `failed` below stays above 0.
            if before.is_some_and(|before| before >= tick) { Err("out of order".into()) } else { Ok(()) }
        })?;
        consumer.drain(Deadline::NEVER)?;
        seconds.push(began.elapsed().as_secs_f64());
        let report = consumer.report();
        ensure!((report.handled, report.failed) == (events, 0), "{report:?}");
        let newest = newest.lock().map_err(|_| anyhow::anyhow!("poisoned"))?.clone();
        ensure!(newest.len() as u64 == keys.min(events), "{} keys", newest.len());
    }
    let ideal = events as f64 * sleep.as_secs_f64() / concurrency.min(keys as usize) as f64;
    let took = median(seconds);
    println!(
        "{events} events of {keys} keys, {sleep:?} each, {concurrency} at once: {took:.3} s (sleeping alone: {ideal:.3} s)"
    );
    Ok(())
}
