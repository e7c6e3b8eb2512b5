//! Event sourcing: the store keeps events only; current and past states are computed from them.
//!
//! ```text
//! cargo run --release --example event_sourcing
//! cargo run --release --example event_sourcing -- --input FILE.jsonl.gz --facts OUT.json
//! ```
//!
//! Without arguments it demonstrates every kind of query and checks each answer. With a file of recorded matches it
//! answers questions about them, reopens the store, and checks that the answers are the same.
#![expect(clippy::print_stdout, reason = "an example shows what it does")]

mod facts;
mod file;
mod game;
mod tour;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use corelane::{Config, Engine};
use serde_json::json;

use crate::facts::answer;
use crate::game::Player;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[derive(Parser)]
#[command(about = "Demonstrates event sourcing, and checks it")]
struct Args {
    /// Recorded matches, as JSON lines, gzipped or not.
    #[arg(long, value_name = "FILE", requires = "facts")]
    input: Option<PathBuf>,
    /// File to write the answers to.
    #[arg(long, value_name = "FILE", requires = "input")]
    facts: Option<PathBuf>,
    /// Directory of the store, empty or not yet created [default: a temporary directory].
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    #[arg(long, default_value_t = 2)]
    shards: u16,
    /// Keep the store.
    #[arg(long)]
    keep: bool,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let temporary = tempfile::tempdir()?;
    let dir = args.data_dir.clone().unwrap_or_else(|| temporary.path().join("store"));
    let is_empty = !dir.exists() || fs::read_dir(&dir)?.next().is_none();
    ensure!(is_empty, "{} is not empty", dir.display());
    let config = Config::new(&dir).shards(args.shards).segment_bytes(64 << 20);
    match args.input.as_deref().zip(args.facts.as_deref()) {
        Some((input, facts)) => recorded(config, input, facts)?,
        None => tour::run(config)?,
    }
    if args.keep {
        let kept = if args.data_dir.is_none() { temporary.keep().join("store") } else { dir };
        println!("the store is kept in {}", kept.display());
    } else {
        fs::remove_dir_all(&dir).with_context(|| format!("removing {}", dir.display()))?;
    }
    Ok(())
}

pub(crate) fn soon() -> Option<Instant> {
    Some(Instant::now() + Duration::from_secs(60))
}

/// Publishes a file and answers all questions, before and after reopening the store.
fn recorded(config: Config, input: &Path, facts: &Path) -> Result<()> {
    let began = Instant::now();
    let engine = Engine::<Player>::open(config.clone())?;
    let mut producer = engine.producer();
    let jsonl_sha256 = file::read(input, |key, event| {
        producer.publish(key, event)?;
        Ok(())
    })
    .with_context(|| format!("reading {}", input.display()))?;
    engine.flush(soon())?;
    println!("published and durable after {:.1} s", began.elapsed().as_secs_f64());

    let live = timed("answered from the running engine", &engine)?;
    let comparison = engine.compare()?;
    ensure!(comparison.differing.is_empty(), "rebuilt states differ: {:?}", comparison.differing);
    println!("{} states rebuilt from {} events: each equals the current state", comparison.keys, comparison.events);
    drop(producer);
    engine.shutdown(soon())?;
    drop(engine);

    let engine = Engine::<Player>::open(config)?;
    println!("reopened in {:.2} s", engine.recovery().duration_ns as f64 / 1e9);
    let reopened = timed("answered from the reopened engine", &engine)?;
    ensure!(live == reopened, "the answers differ:\n{live:?}\n{reopened:?}");
    println!("the answers are the same");
    engine.shutdown(soon())?;

    let name = input.file_name().unwrap_or_default().to_string_lossy();
    let mut all = json!({ "file": name, "jsonl_sha256": jsonl_sha256 });
    if let (Some(all), serde_json::Value::Object(answers)) = (all.as_object_mut(), serde_json::to_value(&live)?) {
        all.extend(answers);
    }
    fs::write(facts, format!("{all:#}\n")).with_context(|| format!("writing {}", facts.display()))
}

fn timed(name: &str, engine: &Engine<Player>) -> Result<facts::Facts> {
    let began = Instant::now();
    let (facts, applied_max) = answer(engine)?;
    let seconds = began.elapsed().as_secs_f64();
    println!("{name} in {seconds:.2} s; a past state took at most {applied_max} events");
    let stats = engine.snapshot_stats();
    println!("{} states saved, {} skipped, {} unreadable", stats.count, stats.skipped, stats.unreadable);
    Ok(facts)
}
