//! What consumers cost and reach: the figures of the README's table of services, each measured against something in the same run.
//!
//! ```text
//! cargo run --release -p perf --bin services -- read       # a consumer doing nothing, against a bare reader
//! cargo run --release -p perf --bin services -- follow     # four consumers at 5 M events/s offered, against none
//! cargo run --release -p perf --bin services -- parallel   # concurrency(64) over a handler of 2.5 ms
//! cargo run --release -p perf --bin services -- million retrying   # a million keys; or parked
//! cargo run --release -p perf --bin services -- soak       # a slow and failing consumer, for ten minutes
//! ```
//!
//! Durability mode `OsCache` where nothing else is printed. Every measure checks what it measured: an event that is missing, or out of
//! its key's order, ends it with an error.

#![expect(clippy::print_stdout, reason = "the figures are its output")]

#[path = "../../../../examples/shared/event.rs"]
mod event;
mod follow;
mod million;
mod parallel;
mod read;
mod soak;
mod tools;

use std::time::Duration;

use anyhow::Result;
use clap::{Parser, Subcommand};
use mimalloc::MiMalloc;

#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

#[derive(Debug, Parser)]
struct Cli {
    #[command(subcommand)]
    measure: Measure,
}

#[derive(Debug, Subcommand)]
enum Measure {
    /// A consumer doing nothing, against a bare reader of the same log.
    Read {
        #[arg(long, default_value_t = 20_000_000)]
        events: u64,
        #[arg(long, default_value_t = 5)]
        repeats: usize,
    },
    /// What consumers that follow live cost the way of an event into the log.
    Follow {
        /// Events per second.
        #[arg(long, default_value_t = 5_000_000)]
        rate: u64,
        #[arg(long, default_value_t = 4)]
        consumers: usize,
        /// Seconds of each of the phases, which alternate.
        #[arg(long, default_value_t = 3)]
        seconds: u64,
        #[arg(long, default_value_t = 5)]
        repeats: usize,
    },
    /// Many keys at once over a handler that sleeps.
    Parallel {
        #[arg(long, default_value_t = 10_000)]
        events: u64,
        #[arg(long, default_value_t = 100)]
        keys: u64,
        #[arg(long, default_value_t = 64)]
        concurrency: usize,
        #[arg(long, default_value_t = 2_500)]
        micros: u64,
        #[arg(long, default_value_t = 5)]
        repeats: usize,
    },
    /// So many keys whose event fails: retrying all at once, or parked.
    Million {
        #[arg(long, default_value_t = 1_000_000)]
        keys: u64,
        #[arg(value_enum, default_value_t = million::What::Retrying)]
        what: million::What,
    },
    /// A consumer that is slow, fails, hangs and is restarted, while the log goes round in few segments.
    Soak {
        #[arg(long, default_value_t = 600)]
        seconds: u64,
    },
}

fn main() -> Result<()> {
    match Cli::parse().measure {
        Measure::Read { events, repeats } => read::run(events, repeats),
        Measure::Follow { rate, consumers, seconds, repeats } => {
            follow::run(rate, consumers, Duration::from_secs(seconds), repeats)
        }
        Measure::Parallel { events, keys, concurrency, micros, repeats } => {
            parallel::run(events, keys, concurrency, Duration::from_micros(micros), repeats)
        }
        Measure::Million { keys, what } => million::run(keys, what),
        Measure::Soak { seconds } => soak::run(Duration::from_secs(seconds)),
    }
}
