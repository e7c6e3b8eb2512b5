//! Runs a consumer that is slow, fails, hangs and is restarted, beside a quick one, while retention recycles a few
//! segments. No event may be lost, every key must stay in order, and memory and disk use must stay bounded.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use corelane::consumer::{Consumer, HealthPolicy, LetterSelector, Retry};
use corelane::{Config, Durability, EventLog, Retention};

use crate::event::{ArchivedGameEvent, GameEvent};
use crate::tools::{memory_bytes, publish};

const KEYS: u64 = 1_000;
/// Events published per second: the most that the slow consumer can handle.
const RATE: u64 = 20_000;

/// The newest tick of each key that a consumer has handled.
#[derive(Clone, Default)]
struct Seen(Arc<Mutex<HashMap<u64, u64>>>, Arc<AtomicU64>);

impl Seen {
    /// Returns `true` if the event is in its key's order. An event handled before a restart may be delivered again.
    fn add(&self, key: u64, event: &ArchivedGameEvent) -> bool {
        let (ArchivedGameEvent::Moved { tick, .. } | ArchivedGameEvent::Attacked { tick, .. }) = event;
        let tick = tick.to_native();
        let Ok(mut seen) = self.0.lock() else { return false };
        let expected = seen.get(&key).map_or(key, |newest| newest + KEYS);
        if tick == expected {
            seen.insert(key, tick);
            self.1.fetch_add(1, Ordering::Relaxed);
        }
        tick <= expected
    }

    fn handled(&self) -> u64 {
        self.1.load(Ordering::Relaxed)
    }
}

pub(crate) fn run(time: Duration) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let retention = Retention::bytes(64 << 20);
    let config =
        Config::new(dir.path()).durability(Durability::GroupCommit).segment_bytes(16 << 20).retention(retention);
    let engine = EventLog::<GameEvent>::open(config)?;
    let (slow_seen, quick_seen) = (Seen::default(), Seen::default());
    let broken = Arc::new(AtomicU64::new(0));
    let start_slow = || slow(&engine, &slow_seen, &broken);
    let quick = {
        let (seen, broken) = (quick_seen.clone(), Arc::clone(&broken));
        engine.subscribe("quick").start(move |event, meta| {
            if !seen.add(meta.key.get(), event) {
                broken.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        })?
    };
    let mut slow = start_slow()?;
    let mut producer = engine.producer();
    let (began, mut tick, mut shown, mut restarts) = (Instant::now(), 0, Duration::ZERO, 0);
    let (mut memory_max, mut segments_max) = (0, 0);
    while began.elapsed() < time {
        publish(&mut producer, tick, tick + RATE / 100, KEYS)?;
        tick += RATE / 100;
        thread::sleep(Duration::from_secs_f64(tick as f64 / RATE as f64).saturating_sub(began.elapsed()));
        if tick.is_multiple_of(RATE) {
            // Reprocessing a key stops at its first failure, so it is requested repeatedly.
            slow.reprocess(LetterSelector::All)?;
        }
        if began.elapsed() >= shown {
            shown += Duration::from_secs(10);
            let report = slow.report();
            memory_max = memory_max.max(memory_bytes()?);
            segments_max = segments_max.max(engine.shard_metrics()[0].segments);
            println!(
                "{:4.0} s   published {tick}   quick {}   slow {} (waiting {}, letters {}, retrying {})   segments {}   {} MiB",
                began.elapsed().as_secs_f64(),
                quick_seen.handled(),
                slow_seen.handled(),
                report.waiting(),
                report.letters.letters,
                report.retrying,
                engine.shard_metrics()[0].segments,
                memory_bytes()? >> 20,
            );
            if (restarts + 1) * 60 < began.elapsed().as_secs() {
                restarts += 1;
                slow.stop(Some(Instant::now() + Duration::from_secs(30)))?;
                slow = start_slow()?;
            }
        }
    }
    // The quick consumer counts no event twice; the slow one finally handles all of them.
    ensure!(
        quick.drain(Some(Instant::now() + Duration::from_secs(60))).is_ok(),
        "the quick consumer lags: {:?}",
        quick.report()
    );
    let end = Instant::now() + Duration::from_secs(120);
    while slow_seen.handled() < tick {
        ensure!(Instant::now() < end, "the slow consumer lags: {:?}", slow.report());
        slow.reprocess(LetterSelector::All)?;
        thread::sleep(Duration::from_millis(100));
    }
    ensure!(broken.load(Ordering::Relaxed) == 0, "{} events out of order", broken.load(Ordering::Relaxed));
    ensure!(quick_seen.handled() == tick, "quick: {} of {tick}", quick_seen.handled());
    println!(
        "{tick} events, each key in order at both consumers, none lost; {restarts} restarts; at most {segments_max} segments, {} MiB",
        memory_max >> 20
    );
    Ok(())
}

/// Starts a consumer that takes 1 ms per event, fails one call in a hundred, and sometimes hangs for half a second.
fn slow(engine: &EventLog<GameEvent>, seen: &Seen, broken: &Arc<AtomicU64>) -> Result<Consumer<GameEvent>> {
    let (seen, broken, calls) = (seen.clone(), Arc::clone(broken), AtomicU64::new(0));
    let retry = Retry::exponential(2.0).base(Duration::from_millis(2)).attempts(3);
    let health = HealthPolicy::default().consecutive_max(1_000).failure_percent_max(50);
    let builder = engine.consumer("slow").concurrency(64).retry(retry).health(health);
    Ok(builder.start(move |event, meta| {
        let call = calls.fetch_add(1, Ordering::Relaxed);
        let random = call.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        match random % 10_000 {
            0..100 => return Err("it fails".into()),
            100 => thread::sleep(Duration::from_millis(500)),
            _ => thread::sleep(Duration::from_millis(1)),
        }
        if !seen.add(meta.key.get(), event) {
            broken.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    })?)
}
