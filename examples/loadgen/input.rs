//! Reads the events of a file into memory before the clock starts.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Read};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use corelane::Key;
use corelane::envelope::Envelope;
use flate2::read::MultiGzDecoder;

use crate::events::{Lines, trace_of};
use crate::verify::{ByKey, History};

/// A file's events in memory.
pub(crate) struct Input {
    events: Vec<(Key, Envelope)>,
    pub(crate) loading: Duration,
}

impl Input {
    /// Reads at most `events_max` events from a file of JSON lines, gzipped or not.
    pub(crate) fn load(path: &Path, events_max: Option<u64>) -> Result<Self> {
        let began = Instant::now();
        let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
        let mut file = BufReader::new(file);
        let is_gzip =
            file.fill_buf().with_context(|| format!("reading {}", path.display()))?.starts_with(&[0x1f, 0x8b]);
        let text: Box<dyn Read> = if is_gzip { Box::new(MultiGzDecoder::new(file)) } else { Box::new(file) };
        let most = events_max.map_or(usize::MAX, |most| most as usize);
        let mut events = Vec::new();
        for (n, line) in (1_u64..).zip(BufReader::with_capacity(1 << 18, text).lines()) {
            if events.len() >= most {
                break;
            }
            let line = line.with_context(|| format!("{} line {n}", path.display()))?;
            if line.trim().is_empty() {
                continue;
            }
            let event = Envelope::from_json(&line).with_context(|| format!("{} line {n}", path.display()))?;
            events.push((event.key(), event));
        }
        ensure!(!events.is_empty(), "{} holds no events", path.display());
        Ok(Self { events, loading: began.elapsed() })
    }

    pub(crate) fn len(&self) -> usize {
        self.events.len()
    }

    /// Distributes the events over the producers. Each user's events stay with one producer, in order.
    pub(crate) fn feeds(&self, producers: u16) -> Vec<Lines> {
        let mut shares: Vec<Vec<_>> = (0..producers).map(|_| Vec::new()).collect();
        for event in &self.events {
            shares[producer_of(event.0, producers)].push(event.clone());
        }
        shares.into_iter().map(|share| Lines(share.into_iter())).collect()
    }

    /// Returns the history that a replay must find for every user.
    pub(crate) fn histories(&self) -> ByKey<History> {
        let mut histories = ByKey::<History>::default();
        for (key, event) in &self.events {
            let trace = trace_of(event.event_type(), event.timestamp_ms(), event.correlation_id(), event.payload());
            histories.entry(key.get()).or_default().add(trace);
        }
        histories
    }
}

/// Returns the producer of a key, from the low bits of its hash; the high bits choose the shard.
fn producer_of(key: Key, producers: u16) -> usize {
    (key.hash() % u64::from(producers)) as usize
}
