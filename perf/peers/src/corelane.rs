//! corelane with its log in the system's cache (`OsCache`: it survives a kill of the process, not a power cut).
//!
//! One client, and one shard on its own thread. Opening the store is not timed, as for every contestant.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use corelane::{Bounded, Aggregate, Client, Config, Durability, Emit, Engine, Event, EventType, EventTypeId, Key, Meta, Wait};
use rkyv::{Archive, Deserialize, Serialize};

use crate::bank;
use crate::peer::Peer;

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

struct Deposit {
    cents: u64,
}

#[derive(Archive, Serialize, Deserialize, Bounded, Debug, Clone)]
struct Refused;

impl Aggregate for Account {
    type Event = Deposited;
    type Command = Deposit;
    type Rejection = Refused;

    fn evolve(&mut self, event: &ArchivedDeposited, _meta: &Meta) {
        self.cents += event.cents.to_native();
    }

    fn decide(&self, Deposit { cents }: Deposit, emit: &mut Emit<Deposited>) -> Result<(), Refused> {
        bank::check(self.cents, cents).map_err(|_| Refused)?;
        emit.event(Deposited { cents });
        Ok(())
    }
}

/// How the client sends its commands.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Commands {
    /// Many in flight; every answer is checked, in order.
    Pipelined,
    /// Each waits for the answer to the one before, like the peers.
    OneAtATime,
}

pub(crate) struct Corelane {
    name: &'static str,
    commands: Commands,
    open: Option<Open>,
}

struct Open {
    client: Client<Account>,
    engine: Engine<Account>,
    _dir: tempfile::TempDir,
}

/// The most commands in flight: fewer than a lane has slots.
const ON_THEIR_WAY: usize = 4096;

impl Corelane {
    pub(crate) fn new(commands: Commands) -> Self {
        let name = match commands {
            Commands::Pipelined => "corelane with its log, pipelined",
            Commands::OneAtATime => "corelane with its log, one at a time",
        };
        Self { name, commands, open: None }
    }

    fn begin(&mut self) -> &mut Open {
        self.open = None;
        // Beside the program, since the build directory is on a disk.
        let here = std::env::current_exe().expect("this program has a path");
        let dir = tempfile::tempdir_in(here.parent().expect("in a folder")).expect("a folder for the log");
        let config = Config::new(dir.path().join("store"))
            .durability(Durability::OsCache)
            .wait(Wait::SpinYield)
            .segment_bytes(16 << 20);
        let engine = Engine::open(config).expect("a new store opens");
        // Prepares the first segments. Otherwise the preparing thread would share the two processors with the commands
        // for much of their few milliseconds.
        let mut client = engine.client();
        client.send(Key::new(u64::MAX), Deposit { cents: 1 }).wait().expect("carried out");
        std::thread::sleep(Duration::from_millis(100));
        self.open.insert(Open { client, engine, _dir: dir })
    }
}

impl Peer for Corelane {
    fn name(&self) -> &str {
        self.name
    }

    fn run(&mut self, accounts: u64, deposits: u64) -> Duration {
        let commands = self.commands;
        let client = &mut self.begin().client;
        let mut tickets = VecDeque::with_capacity(ON_THEIR_WAY);
        let start = Instant::now();
        for nth in 0..deposits {
            for account in 0..accounts {
                let deposit = Deposit { cents: bank::deposit_cents(account, nth) };
                let sending = client.send(Key::new(account), deposit);
                if commands == Commands::OneAtATime {
                    sending.wait().expect("within the limit");
                    continue;
                }
                tickets.push_back(sending.ticket().expect("there is room"));
                if tickets.len() == ON_THEIR_WAY {
                    for ticket in tickets.drain(..ON_THEIR_WAY / 2) {
                        client.answer(ticket).wait().expect("within the limit");
                    }
                }
            }
        }
        for ticket in tickets {
            client.answer(ticket).wait().expect("within the limit");
        }
        start.elapsed()
    }

    fn balance_cents(&mut self, account: u64) -> u64 {
        let open = self.open.as_ref().expect("there was a run");
        open.engine.ask(Key::new(account), |state, _| state.cents).wait().expect("the engine runs")
    }

    fn refuses(&mut self, account: u64, deposit_cents: u64) -> bool {
        let open = self.open.as_mut().expect("there was a run");
        open.client.send(Key::new(account), Deposit { cents: deposit_cents }).wait().is_err()
    }
}
