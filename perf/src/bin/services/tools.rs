//! Shared by the measurements: events, medians, and the system's figures of threads and memory.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Duration;

use anyhow::{Context as _, Result};
use corelane::{Config, Durability, EventLog, Key, Producer};

use crate::event::GameEvent;

/// Opens an engine without states in `dir`.
pub(crate) fn engine(dir: &tempfile::TempDir) -> Result<EventLog<GameEvent>> {
    Ok(EventLog::open(Config::new(dir.path()).durability(Durability::OsCache))?)
}

pub(crate) fn event(tick: u64) -> GameEvent {
    if tick.is_multiple_of(2) {
        GameEvent::Moved { x: 1.0, y: 2.0, heading: 0.5, zone: tick >> 8, tick }
    } else {
        GameEvent::Attacked { target: tick, damage: tick & 0xff, x: 1.0, y: 2.0, tick }
    }
}

/// Publishes the events of ticks `from..to` to the keys `0..keys` in turn.
pub(crate) fn publish(producer: &mut Producer<GameEvent>, from: u64, to: u64, keys: u64) -> Result<()> {
    publish_of(producer, from, to, 0..keys)
}

/// Publishes the events of ticks `from..to` to `keys` in turn.
pub(crate) fn publish_of(producer: &mut Producer<GameEvent>, from: u64, to: u64, keys: Range<u64>) -> Result<()> {
    let mut batch = Vec::with_capacity(256);
    for tick in from..to {
        batch.push((Key::new(keys.start + tick % (keys.end - keys.start)), event(tick)));
        if batch.len() == 256 || tick + 1 == to {
            producer.publish_batch(&mut batch)?;
        }
    }
    Ok(())
}

pub(crate) fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures.get(figures.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Returns the anonymous resident memory of this process in bytes (without mapped files).
pub(crate) fn memory_bytes() -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find(|line| line.starts_with("RssAnon:")).context("no RssAnon")?;
    let kib: u64 = line.split_whitespace().nth(1).context("no figure")?.parse()?;
    Ok(kib << 10)
}

/// Returns the name and the processor time of each thread of this process, by thread id.
pub(crate) fn thread_times() -> Result<BTreeMap<u64, (String, Duration)>> {
    let mut times = BTreeMap::new();
    for entry in std::fs::read_dir("/proc/self/task")? {
        let path = entry?.path();
        let id = path.file_name().and_then(|name| name.to_str()).context("a thread's folder")?.parse()?;
        let read = |file: &str| std::fs::read_to_string(path.join(file));
        // The thread may have ended since the folder was listed.
        let (Ok(name), Ok(schedstat)) = (read("comm"), read("schedstat")) else { continue };
        let ns = schedstat.split_whitespace().next().context("no figure")?.parse()?;
        times.insert(id, (name.trim().to_owned(), Duration::from_nanos(ns)));
    }
    Ok(times)
}
