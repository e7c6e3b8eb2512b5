//! Measures commands over several keys: transfers between two of 100,000 accounts, checked against both balances, in
//! turn with commands for one key, checked against its balance. Pipelined, with the log on.
//!
//! ```text
//! cargo run --release -p perf --bin transfers -- 5000000
//! ```
//!
//! For uniform accounts and for Zipf 1.5 it prints the median rates of both kinds and their ratio, and fails if money
//! came or went. The log is in the system's cache (`OsCache`), and neither thread sleeps (`SpinYield`).
#![expect(clippy::print_stdout, reason = "a tool's results belong on standard output")]

use std::collections::VecDeque;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use corelane::command::Sending;
use corelane::state::States;
use corelane::{
    Aggregate, Bounded, Client, CommandError, Config, Deadline, Durability, Emit, Engine, Event, EventType,
    EventTypeId, Key, Meta, Retention, Wait,
};
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};
use rand_distr::{Distribution as _, Zipf};
use rkyv::{Archive, Deserialize, Serialize};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const ACCOUNTS: u64 = 100_000;
const OPENING_CENTS: u64 = 100_000;
const LIMIT_CENTS: u64 = 1 << 50;
/// The most commands in flight.
const IN_FLIGHT_MAX: usize = 2048;
/// Rounds of each kind, which alternate.
const ROUNDS: usize = 9;
/// Drawn before the measurement, and used again and again.
const DRAWN: usize = 1 << 20;

#[derive(Archive, Serialize, Deserialize, Bounded, Debug, Clone)]
enum Money {
    Deposited { cents: u64 },
    Withdrawn { cents: u64 },
}

impl Event for Money {
    const TYPES: &'static [EventType] = &[EventType::new(1, "deposited", 1), EventType::new(2, "withdrawn", 1)];

    fn event_type(&self) -> EventTypeId {
        EventTypeId(match self {
            Self::Deposited { .. } => 1,
            Self::Withdrawn { .. } => 2,
        })
    }
}

#[derive(Archive, Serialize, Deserialize, Bounded, Debug, Clone, Default)]
struct Account {
    cents: u64,
}

#[derive(Archive, Serialize, Deserialize, Bounded, Debug, Clone)]
struct Refused;

impl Aggregate for Account {
    type Event = Money;
    /// An amount: to deposit, or to transfer from the first key to the second.
    type Command = u64;
    type Rejection = Refused;

    fn evolve(&mut self, event: &ArchivedMoney, _meta: &Meta) {
        match event {
            ArchivedMoney::Deposited { cents } => self.cents += cents.to_native(),
            ArchivedMoney::Withdrawn { cents } => self.cents -= cents.to_native(),
        }
    }

    fn decide(&self, cents: u64, emit: &mut Emit<Money>) -> Result<(), Refused> {
        if self.cents + cents > LIMIT_CENTS {
            return Err(Refused);
        }
        emit.event(Money::Deposited { cents });
        Ok(())
    }

    fn decide_many(states: &States<'_, Self>, cents: u64, emit: &mut Emit<Money>) -> Result<(), Refused> {
        let mut accounts = states.iter();
        let (Some((from, payer)), Some((to, payee))) = (accounts.next(), accounts.next()) else { return Err(Refused) };
        if payer.cents < cents || payee.cents + cents > LIMIT_CENTS {
            return Err(Refused);
        }
        emit.event_for(from, Money::Withdrawn { cents });
        emit.event_for(to, Money::Deposited { cents });
        Ok(())
    }
}

/// A pair of different accounts, and an amount.
#[derive(Clone, Copy)]
struct Pair {
    keys: [Key; 2],
    cents: u64,
}

fn draw(exponent: f64) -> Result<Vec<Pair>> {
    let zipf = Zipf::new(ACCOUNTS as f64, exponent)?;
    let mut random = SmallRng::seed_from_u64(7);
    let account = |random: &mut SmallRng| Key::new(zipf.sample(random) as u64 - 1);
    let mut pair = || {
        let from = account(&mut random);
        let mut to = from;
        while to == from {
            to = account(&mut random);
        }
        Pair { keys: [from, to], cents: random.random_range(1..=20) }
    };
    Ok((0..DRAWN).map(|_| pair()).collect())
}

/// Sends `commands` commands, pipelined, and claims every answer. Returns the commands per second and the number of
/// rejections.
fn measure(
    client: &mut Client<Account>,
    pairs: &[Pair],
    commands: usize,
    send: impl for<'c> Fn(&'c mut Client<Account>, &Pair) -> Sending<'c, Account>,
) -> Result<(f64, u64)> {
    let mut tickets = VecDeque::with_capacity(IN_FLIGHT_MAX);
    let mut rejected = 0;
    let mut claim = |client: &mut Client<Account>, ticket| match client.answer(ticket).wait() {
        Ok(_) => Ok(()),
        Err(CommandError::Rejected(_)) => {
            rejected += 1;
            Ok(())
        }
        Err(error) => Err(error),
    };
    let began = Instant::now();
    for pair in pairs.iter().cycle().take(commands) {
        tickets.push_back(send(client, pair).ticket()?);
        if tickets.len() == IN_FLIGHT_MAX {
            for ticket in tickets.drain(..IN_FLIGHT_MAX / 2) {
                claim(client, ticket)?;
            }
        }
    }
    for ticket in tickets {
        claim(client, ticket)?;
    }
    Ok((commands as f64 / began.elapsed().as_secs_f64(), rejected))
}

fn median(mut rates: Vec<f64>) -> f64 {
    rates.sort_by(f64::total_cmp);
    rates[rates.len() / 2]
}

fn run(exponent: f64, commands: usize) -> Result<()> {
    let dir = tempfile::tempdir_in("target")
        .context("creating a folder for the store in ./target (run from the repository's root)")?;
    let config = Config::new(dir.path()).durability(Durability::OsCache).wait(Wait::SpinYield);
    let config = config.retention(Retention::bytes(512 << 20)).keys_expected(ACCOUNTS as usize);
    let engine = Engine::<Account>::open(config)?;
    let mut client = engine.client();
    for account in 0..ACCOUNTS {
        client.send(Key::new(account), OPENING_CENTS).tell()?;
    }
    let pairs = draw(exponent)?;
    let (mut singles, mut transfers, mut rejected) = (Vec::new(), Vec::new(), [0, 0]);
    let mut total = ACCOUNTS * OPENING_CENTS;
    for round in 0..=ROUNDS {
        let single = measure(&mut client, &pairs, commands, |client, pair| client.send(pair.keys[0], pair.cents))?;
        let transfer = measure(&mut client, &pairs, commands, |client, pair| client.send_many(&pair.keys, pair.cents))?;
        total += pairs.iter().cycle().take(commands).map(|pair| pair.cents).sum::<u64>();
        // The first round warms up.
        if round > 0 {
            singles.push(single.0);
            transfers.push(transfer.0);
            rejected = [rejected[0] + single.1, rejected[1] + transfer.1];
        }
    }
    let mut found = 0;
    for account in 0..ACCOUNTS {
        found += engine.ask(Key::new(account), |state, _| state.cents).wait()?;
    }
    ensure!(rejected[0] == 0, "{} deposits were rejected", rejected[0]);
    ensure!(found == total, "the accounts hold {found} cents instead of {total}");
    let ratios: Vec<f64> = singles.iter().zip(&transfers).map(|(single, transfer)| transfer / single).collect();
    let (single, transfer, ratio) = (median(singles), median(transfers), median(ratios));
    println!(
        "zipf {exponent}: one key {:.2} M commands/s, transfers {:.2} M/s, ratio {ratio:.2} (medians of {ROUNDS} rounds of \
         {commands} each; {} transfers rejected); money conserved",
        single / 1e6,
        transfer / 1e6,
        rejected[1]
    );
    engine.shutdown(Deadline::NEVER)?;
    Ok(())
}

fn main() -> Result<()> {
    let commands: usize =
        std::env::args().nth(1).map_or(Ok(5_000_000), |text| text.parse()).context("usage: transfers [COMMANDS]")?;
    // Each kind gets half of the commands, in rounds.
    let of_a_round = (commands / 2 / ROUNDS).max(1);
    [0.0, 1.5].into_iter().try_for_each(|exponent| run(exponent, of_a_round))
}
