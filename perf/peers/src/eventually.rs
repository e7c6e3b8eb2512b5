//! `eventually` with its in-memory event store, in the two ways of using its repository.

use std::future::{Future, ready};
use std::pin::Pin;
use std::time::{Duration, Instant};

use eventually::inmemory::{EventStore, EventStoreBuilder};
use eventually::{Aggregate, AggregateRoot, AggregateRootBuilder, Repository};

use crate::bank::{self, Refused};
use crate::peer::{self, Executor, Peer};

#[derive(Debug, Clone, Copy)]
struct Account;

#[derive(Debug, Clone, Copy, Default)]
struct Balance {
    cents: u64,
}

#[derive(Debug, Clone, Copy)]
struct Deposit {
    cents: u64,
}

#[derive(Debug, Clone, Copy)]
struct Deposited {
    cents: u64,
}

impl Aggregate for Account {
    type Id = u64;
    type State = Balance;
    type Event = Deposited;
    type Command = Deposit;
    type Error = Refused;

    fn apply(balance: Balance, event: Deposited) -> Result<Balance, Refused> {
        Ok(Balance { cents: balance.cents + event.cents })
    }

    fn handle<'a, 's: 'a>(
        &'a self,
        _id: &'s u64,
        balance: &'s Balance,
        Deposit { cents }: Deposit,
    ) -> Pin<Box<dyn Future<Output = Result<Option<Vec<Deposited>>, Refused>> + Send + 'a>> {
        // A ready future is smaller to box than an async block.
        Box::pin(ready(bank::check(balance.cents, cents).map(|()| Some(vec![Deposited { cents }]))))
    }
}

type Root = AggregateRoot<Account>;
type Accounts = Repository<Account, EventStore<u64, Deposited>>;

/// The source of the state that checks a command.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum State {
    /// The repository, which folds all events of the account for every command: the way shown in the crate's
    /// documentation, and that of a server that keeps no accounts in memory.
    Loaded,
    /// The account, loaded once and kept in memory; the store's version check still guards every append. The fastest
    /// use of the crate.
    Held,
}

pub(crate) struct Eventually {
    name: String,
    executor: Executor,
    state: State,
    repository: Accounts,
}

impl Eventually {
    pub(crate) fn new(state: State, executor: Executor) -> Self {
        let state_name = match state {
            State::Loaded => "loaded per command",
            State::Held => "held",
        };
        let name = format!("{}, state {state_name} ({})", peer::versioned("eventually"), executor.name());
        Self { name, executor, state, repository: empty() }
    }
}

fn empty() -> Accounts {
    Repository::new(AggregateRootBuilder::from(Account), EventStoreBuilder::for_aggregate(&Account))
}

/// Carries out one command: the account decides, and its event is appended with the version of the decision.
async fn deposit(repository: &mut Accounts, mut root: Root, cents: u64) -> Result<Root, Refused> {
    root.handle(Deposit { cents }).await?;
    Ok(repository.add(root).await.expect("no other writer appends"))
}

async fn load(repository: &Accounts, account: u64) -> Root {
    repository.get(account).await.expect("memory can be read")
}

impl Peer for Eventually {
    fn name(&self) -> &str {
        &self.name
    }

    fn run(&mut self, accounts: u64, deposits: u64) -> Duration {
        self.repository = empty();
        let repository = &mut self.repository;
        let state = self.state;
        self.executor.block_on(async move {
            let mut held = Vec::new();
            if state == State::Held {
                for account in 0..accounts {
                    held.push(Some(load(repository, account).await));
                }
            }
            let start = Instant::now();
            for nth in 0..deposits {
                for account in 0..accounts {
                    let cents = bank::deposit_cents(account, nth);
                    match state {
                        State::Loaded => {
                            let root = load(repository, account).await;
                            deposit(repository, root, cents).await.expect("within the limit");
                        }
                        State::Held => {
                            let slot = &mut held[account as usize];
                            let root = slot.take().expect("put back each time");
                            *slot = Some(deposit(repository, root, cents).await.expect("within the limit"));
                        }
                    }
                }
            }
            start.elapsed()
        })
    }

    /// Reads the events in the store, even if states are kept in memory.
    fn balance_cents(&mut self, account: u64) -> u64 {
        self.executor.block_on(load(&self.repository, account)).state().cents
    }

    fn refuses(&mut self, account: u64, deposit_cents: u64) -> bool {
        let repository = &mut self.repository;
        self.executor.block_on(async move {
            let root = load(repository, account).await;
            deposit(repository, root, deposit_cents).await.is_err()
        })
    }
}
