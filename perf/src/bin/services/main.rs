//! Measures consumers: the figures of the README's table of services, each compared with a baseline in the same run.
//!
//! ```text
//! cargo run --release -p perf --bin services -- read       # a consumer doing nothing, against a bare reader
//! cargo run --release -p perf --bin services -- live       # live feeds, against a bare reader
//! cargo run --release -p perf --bin services -- follow     # four consumers at 5 M events/s offered, against none
//! cargo run --release -p perf --bin services -- parallel   # concurrency(64) over a handler of 2.5 ms
//! cargo run --release -p perf --bin services -- million retrying   # a million keys; or parked
//! cargo run --release -p perf --bin services -- soak       # a slow and failing consumer, for ten minutes
//! ```
//!
//! The durability mode is `OsCache` unless printed otherwise. Every measurement fails if an event is missing or out of
//! its key's order.

#![expect(clippy::print_stdout, reason = "a tool's results belong on standard output")]

#[path = "../../../../examples/shared/event.rs"]
mod event;
mod follow;
mod live;
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
    /// Compares a consumer that does nothing with a bare reader of the same log.
    Read {
        #[arg(long, default_value_t = 20_000_000)]
        events: u64,
        #[arg(long, default_value_t = 5)]
        repeats: usize,
    },
    /// Compares live feeds, as streams and as iterators, with a bare reader of the same log.
    Live {
        #[arg(long, default_value_t = 20_000_000)]
        events: u64,
        #[arg(long, default_value_t = 9)]
        repeats: usize,
    },
    /// Measures the cost that live consumers add to ingest.
    Follow {
        /// Events per second.
        #[arg(long, default_value_t = 5_000_000)]
        rate: u64,
        #[arg(long, default_value_t = 4)]
        consumers: usize,
        /// Seconds of each phase; phases with and without consumers alternate.
        #[arg(long, default_value_t = 3)]
        seconds: u64,
        #[arg(long, default_value_t = 5)]
        repeats: usize,
    },
    /// Runs a sleeping handler for many keys concurrently.
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
    /// Lets the event of every key fail: all keys retry at once, or all are parked.
    Million {
        #[arg(long, default_value_t = 1_000_000)]
        keys: u64,
        #[arg(value_enum, default_value_t = million::KeyState::Retrying)]
        state: million::KeyState,
    },
    /// Runs a consumer that is slow, fails, hangs and is restarted, while retention recycles a few segments.
    Soak {
        #[arg(long, default_value_t = 600)]
        seconds: u64,
    },
}

fn main() -> Result<()> {
    match Cli::parse().measure {
        Measure::Read { events, repeats } => read::run(events, repeats),
        Measure::Live { events, repeats } => live::run(events, repeats),
        Measure::Follow { rate, consumers, seconds, repeats } => {
            follow::run(rate, consumers, Duration::from_secs(seconds), repeats)
        }
        Measure::Parallel { events, keys, concurrency, micros, repeats } => {
            parallel::run(events, keys, concurrency, Duration::from_micros(micros), repeats)
        }
        Measure::Million { keys, state } => million::run(keys, state),
        Measure::Soak { seconds } => soak::run(Duration::from_secs(seconds)),
    }
}
