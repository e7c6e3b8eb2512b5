//! Event bus: four services follow the log, each at its own pace, and nobody waits for them.
//!
//! ```text
//! cargo run --release --example event_bus
//! cargo run --release --example event_bus -- --input FILE.jsonl.gz --data-dir DIR --facts OUT.json
//! ```
//!
//! Without arguments it publishes at full speed while services that take 3 to 100 ms per event follow. With a file of recorded
//! matches, analytics counts their types in SQLite, each event once, however often the process is killed and run again.
#![expect(clippy::print_stdout, reason = "an example shows what it does")]

mod counts;
mod game;
mod live;
mod recorded;
mod services;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Parser;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[derive(Parser)]
#[command(about = "Services that follow the log, shown and checked")]
struct Args {
    /// For so long it publishes, without services and then with them.
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// How much of their time per event (3 to 100 ms) the services take.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=100))]
    cost_percent: u32,
    /// Recorded matches, as JSON lines, gzipped or not.
    #[arg(long, value_name = "FILE")]
    input: Option<PathBuf>,
    /// Where the store and the database are, and stay: a further run goes on there. Default: a temporary directory.
    #[arg(long, value_name = "DIR", requires = "input")]
    data_dir: Option<PathBuf>,
    /// Where to write the counts.
    #[arg(long, value_name = "FILE", requires = "input")]
    facts: Option<PathBuf>,
    /// Counts that these must be equal to.
    #[arg(long, value_name = "FILE", requires = "input")]
    expect: Option<PathBuf>,
    /// Only the first so many lines of the input.
    #[arg(long, requires = "input")]
    lines: Option<u64>,
    #[arg(long, default_value_t = 2)]
    shards: u16,
}

fn main() -> Result<()> {
    let args = Args::parse();
    match &args.input {
        Some(input) => recorded::run(input, &args),
        None => live::run(&args),
    }
}

fn soon() -> Option<Instant> {
    Some(Instant::now() + Duration::from_secs(60))
}
