//! Counts the events of recorded matches by type, correctly even if the process is killed and restarted.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use corelane::envelope::Envelope;
use corelane::{Config, EventLog, Key, Version};
use flate2::read::MultiGzDecoder;
use serde_json::{Value, json};

use crate::counts::Counts;
use crate::{Args, soon};

/// The most events of one transaction.
const BATCH_MAX: usize = 10_000;

pub(crate) fn run(input: &Path, args: &Args) -> Result<()> {
    let temporary = tempfile::tempdir()?;
    let dir = args.data_dir.as_deref().unwrap_or(temporary.path());
    fs::create_dir_all(dir)?;
    let began = Instant::now();
    let config = Config::new(dir.join("store")).shards(args.shards).segment_bytes(64 << 20);
    let engine = EventLog::<Envelope>::open(config)?;
    let database = dir.join("analytics.sqlite");
    let analytics = engine.consumer("analytics").start_sink(BATCH_MAX, Counts::open(&database)?)?;

    let Ingested { lines, held } = ingest(&engine, input, args.lines.unwrap_or(u64::MAX))?;
    println!("{lines} events, {held} of them already in the log; {:.1} s", began.elapsed().as_secs_f64());
    ensure!(analytics.drain(soon()).is_ok(), "{:?}", analytics.report());
    let (handled, seconds) = (analytics.report().handled, began.elapsed().as_secs_f64());
    println!("all counted after {seconds:.1} s, {handled} of them in this run");
    analytics.stop(soon())?;
    engine.shutdown(soon())?;

    let counts = Counts::open(&database)?.by_type()?;
    for (event_type, events) in &counts {
        println!("{events:>9} {event_type}");
    }
    if let Some(facts) = &args.facts {
        fs::write(facts, format!("{:#}\n", json!({ "events_by_type": counts })))?;
    }
    let counted: u64 = counts.values().sum();
    ensure!(counted == lines, "{counted} events are counted, but the input has {lines}");
    if let Some(expected) = &args.expect {
        let expected: Value = serde_json::from_reader(File::open(expected)?)?;
        let expected: BTreeMap<String, u64> = serde_json::from_value(expected["events_by_type"].clone())?;
        ensure!(counts == expected, "the expected counts are {expected:?}");
        println!("all {} counts are as expected", counts.len());
    }
    Ok(())
}

struct Ingested {
    lines: u64,
    held: u64,
}

/// Publishes the events that the log does not contain yet.
///
/// One producer publishes the file in order, and the log keeps each key's events in that order. So wherever the process
/// ended, the log holds the first events of each user, and the user's version is their number. (The log need not hold a
/// prefix of the whole file: shards may have advanced differently.)
fn ingest(engine: &EventLog<Envelope>, input: &Path, lines_max: u64) -> Result<Ingested> {
    let mut producer = engine.producer();
    let (mut held_yet, mut ingested) = (HashMap::<Key, u64>::new(), Ingested { lines: 0, held: 0 });
    for line in lines(input)?.lines().take(lines_max as usize) {
        let line = line.with_context(|| format!("reading {}", input.display()))?;
        let event = Envelope::from_json(&line).with_context(|| format!("event {}", ingested.lines + 1))?;
        ingested.lines += 1;
        let key = event.key();
        let left = match held_yet.get_mut(&key) {
            Some(left) => left,
            // Asked before this run publishes an event of the user.
            None => {
                let Version(held) = engine.ask(key, |_, version| version).wait()?;
                held_yet.entry(key).or_insert(held)
            }
        };
        if *left > 0 {
            *left -= 1;
            ingested.held += 1;
        } else {
            producer.publish(key, event)?;
        }
    }
    engine.flush(soon())?;
    Ok(ingested)
}

/// The lines of a file, gzipped or not.
fn lines(path: &Path) -> Result<Box<dyn BufRead>> {
    let mut file = BufReader::new(File::open(path).with_context(|| format!("opening {}", path.display()))?);
    let is_gzip = file.fill_buf()?.starts_with(&[0x1f, 0x8b]);
    Ok(if is_gzip { Box::new(BufReader::with_capacity(1 << 18, MultiGzDecoder::new(file))) } else { Box::new(file) })
}
