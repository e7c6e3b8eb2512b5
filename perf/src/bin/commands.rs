//! Measures commands: one client, 1,000 accounts, every deposit checked against the current balance.
//!
//! ```text
//! cargo run --release -p perf --bin commands -- 5000000
//! ```
//!
//! First pipelined, with every answer checked; then one at a time, each timed. The log is in the system's cache
//! (`OsCache`), and neither thread sleeps (`SpinYield`).
#![expect(clippy::print_stdout, reason = "a tool's results belong on standard output")]

use std::collections::VecDeque;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use corelane::{
    Aggregate, Bounded, Config, Deadline, Durability, Emit, Engine, Event, EventType, EventTypeId, Key, Meta,
    Retention, Wait,
};
use hdrhistogram::Histogram;
use rkyv::{Archive, Deserialize, Serialize};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const ACCOUNTS: u64 = 1000;
const LIMIT_CENTS: u64 = 1 << 50;
/// The most commands in flight.
const IN_FLIGHT_MAX: usize = 2048;
const ONE_AT_A_TIME: u64 = 200_000;

#[derive(Archive, Serialize, Deserialize, Bounded, Debug, Clone)]
struct Deposited {
    cents: u64,
}

impl Event for Deposited {
    const TYPES: &'static [EventType] = &[EventType::new(1, "deposited", 1)];

    fn event_type(&self) -> EventTypeId {
        EventTypeId(1)
    }
}

#[derive(Archive, Serialize, Deserialize, Bounded, Debug, Clone, Default)]
struct Account {
    cents: u64,
}

#[derive(Archive, Serialize, Deserialize, Bounded, Debug, Clone)]
struct Refused;

impl Aggregate for Account {
    type Event = Deposited;
    type Command = u64;
    type Rejection = Refused;

    fn evolve(&mut self, event: &ArchivedDeposited, _meta: &Meta) {
        self.cents += event.cents.to_native();
    }

    fn decide(&self, cents: u64, emit: &mut Emit<Deposited>) -> Result<(), Refused> {
        if cents == 0 || self.cents + cents > LIMIT_CENTS {
            return Err(Refused);
        }
        emit.event(Deposited { cents });
        Ok(())
    }
}

fn main() -> Result<()> {
    let commands: u64 =
        std::env::args().nth(1).map_or(Ok(5_000_000), |text| text.parse()).context("usage: commands [COMMANDS]")?;
    let dir = tempfile::tempdir_in("target")
        .context("creating a folder for the store in ./target (run from the repository's root)")?;
    let retention = Retention::bytes(512 << 20);
    let config = Config::new(dir.path()).durability(Durability::OsCache).wait(Wait::SpinYield).retention(retention);
    let engine = Engine::<Account>::open(config)?;
    let mut client = engine.client();
    // Prepares the first segment.
    client.send(Key::new(0), 1).wait()?;

    let mut tickets = VecDeque::with_capacity(IN_FLIGHT_MAX);
    let began = Instant::now();
    for i in 0..commands {
        tickets.push_back(client.send(Key::new(i % ACCOUNTS), 1 + i % 100).ticket()?);
        if tickets.len() == IN_FLIGHT_MAX {
            for ticket in tickets.drain(..IN_FLIGHT_MAX / 2) {
                client.answer(ticket).wait()?;
            }
        }
    }
    for ticket in tickets {
        client.answer(ticket).wait()?;
    }
    let seconds = began.elapsed().as_secs_f64();
    println!("pipelined      {:.2} M commands/s: {commands} in {seconds:.3} s", commands as f64 / seconds / 1e6);

    let mut latency = Histogram::<u64>::new(3)?;
    for i in 0..ONE_AT_A_TIME {
        let began = Instant::now();
        client.send(Key::new(i % ACCOUNTS), 1).wait()?;
        latency.record(u64::try_from(began.elapsed().as_nanos())?)?;
    }
    let at = |quantile| latency.value_at_quantile(quantile) as f64 / 1e3;
    println!(
        "one at a time  p50 {:.2} µs, p90 {:.2} µs, p99 {:.2} µs, max {:.0} µs",
        at(0.5),
        at(0.9),
        at(0.99),
        at(1.0)
    );

    let mut total = 0;
    for account in 0..ACCOUNTS {
        total += engine.ask(Key::new(account), |state, _| state.cents).wait()?;
    }
    let expected = 1 + ONE_AT_A_TIME + (0..commands).map(|i| 1 + i % 100).sum::<u64>();
    ensure!(total == expected, "the accounts hold {total} cents instead of {expected}");
    engine.shutdown(Deadline::NEVER)?;
    Ok(())
}
