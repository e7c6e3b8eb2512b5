//! Event bus: four services follow the log, each at its own pace, and the publisher never waits for them.
//!
//! ```text
//! cargo run --release --example event_bus
//! cargo run --release --example event_bus -- --input FILE.jsonl.gz --data-dir DIR --facts OUT.json
//! ```
//!
//! Without arguments it publishes at full speed while services that take 3 to 100 ms per event follow. With a file of
//! recorded matches, analytics counts events by type in SQLite, each event once, even if the process is killed and
//! restarted.
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
#[command(about = "Runs services that follow the log, and checks them")]
struct Args {
    /// Seconds to publish without services, and again with them.
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// Percentage of the services' time per event (3 to 100 ms) that they take.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=100))]
    cost_percent: u32,
    /// Recorded matches, as JSON lines, gzipped or not.
    #[arg(long, value_name = "FILE")]
    input: Option<PathBuf>,
    /// Directory of the store and the database; a later run continues there [default: a temporary directory].
    #[arg(long, value_name = "DIR", requires = "input")]
    data_dir: Option<PathBuf>,
    /// File to write the counts to.
    #[arg(long, value_name = "FILE", requires = "input")]
    facts: Option<PathBuf>,
    /// File with the expected counts.
    #[arg(long, value_name = "FILE", requires = "input")]
    expect: Option<PathBuf>,
    /// The most lines of the input to read.
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
