//! Compares event sourcing crates by commands per second, interleaved in one run: 1,000 accounts × 50 deposits, each
//! checked against the current balance. `README.md` explains the figures.
//!
//! Results go to stderr. Stdout is redirected to `/dev/null`, since one library writes to it for every command.

mod bank;
mod corelane;
mod cqrs;
mod eventually;
mod peer;
mod report;

use std::fs::OpenOptions;
use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use clap::Parser;

use crate::corelane::{Commands, Corelane};
use crate::cqrs::CqrsEs;
use crate::eventually::{Eventually, State};
use crate::peer::{Executor, Peer};
use crate::report::Outcome;

/// The load generator's allocator. cqrs-es is 1.4 times as fast with it as with glibc's, eventually about 5 % slower.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Compares event sourcing crates by validated commands per second.
#[derive(Parser)]
struct Args {
    /// Number of accounts.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    accounts: u64,
    /// Deposits per account, one command each.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    deposits: u64,
    /// Number of rounds. Each contestant runs once per round; an additional first round is not counted.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    repeat: u32,
    /// Run the peers under the other executor too, to check that it makes no difference.
    #[arg(long)]
    executors: bool,
    /// File for the figures, as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Returns the contestants: each peer under the simplest executor, and under the other one if requested.
fn contestants(args: &Args) -> Result<Vec<Box<dyn Peer>>> {
    let mut peers: Vec<Box<dyn Peer>> = vec![
        Box::new(CqrsEs::new(Executor::Pollster)),
        Box::new(Eventually::new(State::Loaded, Executor::Pollster)),
        Box::new(Eventually::new(State::Held, Executor::Pollster)),
        Box::new(Corelane::new(Commands::Pipelined)),
        Box::new(Corelane::new(Commands::OneAtATime)),
    ];
    if args.executors {
        peers.push(Box::new(CqrsEs::new(Executor::tokio()?)));
        peers.push(Box::new(Eventually::new(State::Loaded, Executor::tokio()?)));
        peers.push(Box::new(Eventually::new(State::Held, Executor::tokio()?)));
    }
    Ok(peers)
}

fn main() -> Result<()> {
    let args = Args::parse();
    const { assert!(100_000 * bank::DEPOSIT_CENTS_MAX <= bank::LIMIT_CENTS, "all deposits that can be asked for fit") };
    silence_stdout()?;
    let mut peers = contestants(&args)?;
    let mut outcomes: Vec<Outcome> =
        peers.iter().map(|peer| Outcome { name: peer.name().to_owned(), rates: Vec::new() }).collect();
    for round in 0..=args.repeat as usize {
        for turn in 0..peers.len() {
            // Another contestant begins in each round.
            let at = (turn + round) % peers.len();
            let rate = run(peers[at].as_mut(), args.accounts, args.deposits)?;
            // Round 0 warms up: memory, caches, clocks.
            if round > 0 {
                outcomes[at].rates.push(rate);
            }
        }
    }
    eprintln!("{} accounts × {} deposits, median of {}:\n", args.accounts, args.deposits, args.repeat);
    eprint!("{}", report::table(&outcomes));
    if let Some(file) = &args.json {
        let figures = serde_json::json!({
            "accounts": args.accounts,
            "deposits": args.deposits,
            "repeat": args.repeat,
            "contestants": report::json(&outcomes),
        });
        std::fs::write(file, format!("{figures:#}\n")).with_context(|| format!("writing {}", file.display()))?;
    }
    Ok(())
}

/// Runs a contestant, checks its work, and returns the commands per second.
fn run(peer: &mut dyn Peer, accounts: u64, deposits: u64) -> Result<f64> {
    let time = peer.run(accounts, deposits);
    let name = peer.name().to_owned();
    ensure!(peer.refuses(0, 0), "{name} accepts a deposit of 0");
    ensure!(peer.refuses(0, bank::LIMIT_CENTS), "{name} accepts a deposit above the limit");
    for account in 0..accounts {
        let (holds, should) = (peer.balance_cents(account), bank::balance_cents(account, deposits));
        ensure!(holds == should, "{name}: account {account} holds {holds} cents instead of {should}");
    }
    Ok((accounts * deposits) as f64 / time.as_secs_f64())
}

fn silence_stdout() -> Result<()> {
    let null = OpenOptions::new().write(true).open("/dev/null").context("opening /dev/null")?;
    rustix::stdio::dup2_stdout(null).context("pointing stdout at /dev/null")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Skips one deposit of account 3.
    struct Forgetful;

    impl Peer for Forgetful {
        fn name(&self) -> &str {
            "forgetful"
        }

        fn run(&mut self, _accounts: u64, _deposits: u64) -> std::time::Duration {
            std::time::Duration::from_secs(1)
        }

        fn balance_cents(&mut self, account: u64) -> u64 {
            bank::balance_cents(account, if account == 3 { 4 } else { 5 })
        }

        fn refuses(&mut self, _account: u64, _deposit_cents: u64) -> bool {
            true
        }
    }

    #[test]
    fn a_run_that_skips_work_does_not_count() {
        let error = run(&mut Forgetful, 10, 5).expect_err("account 3 lacks a deposit");
        assert!(error.to_string().contains("account 3 holds"), "{error}");
        assert!(run(&mut Forgetful, 3, 5).is_ok(), "the accounts before it lack nothing");
    }

    #[test]
    fn every_contestant_does_the_work_more_than_once() -> Result<()> {
        for mut peer in contestants(&Args::parse_from(["peers", "--executors"]))? {
            for _ in 0..2 {
                run(peer.as_mut(), 20, 5)?;
            }
        }
        Ok(())
    }
}
