//! `cqrs-es` with its `MemStore`.
//!
//! `MemStore` writes two lines per command to stdout and has no switch for that. `main` redirects stdout to
//! `/dev/null`; the lines still take about 0.7 of a command's 2.9 µs (measured with the same two `println!` alone), so
//! without them this contestant would be about 1.3 times as fast.

use std::time::{Duration, Instant};

use cqrs_es::event_sink::EventSink;
use cqrs_es::mem_store::MemStore;
use cqrs_es::{Aggregate, AggregateContext as _, AggregateError, CqrsFramework, DomainEvent, EventStore as _};
use serde::{Deserialize, Serialize};

use crate::bank::{self, Refused};
use crate::peer::{self, Executor, Peer};

#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
struct Account {
    cents: u64,
}

struct Deposit {
    cents: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
struct Deposited {
    cents: u64,
}

impl DomainEvent for Deposited {
    fn event_type(&self) -> String {
        "deposited".to_owned()
    }

    fn event_version(&self) -> String {
        "1".to_owned()
    }
}

impl Aggregate for Account {
    const TYPE: &'static str = "account";
    type Command = Deposit;
    type Event = Deposited;
    type Error = Refused;
    type Services = ();

    async fn handle(
        &mut self,
        Deposit { cents }: Deposit,
        _services: &(),
        sink: &EventSink<Self>,
    ) -> Result<(), Refused> {
        bank::check(self.cents, cents)?;
        sink.write(Deposited { cents }, self).await;
        Ok(())
    }

    fn apply(&mut self, event: Deposited) {
        self.cents += event.cents;
    }
}

/// Loads and folds an account's events for every command, the only way that the framework offers.
pub(crate) struct CqrsEs {
    name: String,
    executor: Executor,
    store: MemStore<Account>,
    framework: CqrsFramework<Account, MemStore<Account>>,
}

impl CqrsEs {
    pub(crate) fn new(executor: Executor) -> Self {
        let name = format!("{} ({})", peer::versioned("cqrs-es"), executor.name());
        let (store, framework) = empty();
        Self { name, executor, store, framework }
    }
}

/// Without queries: no other component receives events.
fn empty() -> (MemStore<Account>, CqrsFramework<Account, MemStore<Account>>) {
    let store = MemStore::default();
    (store.clone(), CqrsFramework::new(store, vec![], ()))
}

impl Peer for CqrsEs {
    fn name(&self) -> &str {
        &self.name
    }

    fn run(&mut self, accounts: u64, deposits: u64) -> Duration {
        (self.store, self.framework) = empty();
        let framework = &self.framework;
        let ids: Vec<String> = (0..accounts).map(|account| account.to_string()).collect();
        self.executor.block_on(async move {
            let start = Instant::now();
            for nth in 0..deposits {
                for (account, id) in (0..).zip(&ids) {
                    let command = Deposit { cents: bank::deposit_cents(account, nth) };
                    framework.execute(id, command).await.expect("within the limit");
                }
            }
            start.elapsed()
        })
    }

    fn balance_cents(&mut self, account: u64) -> u64 {
        let id = account.to_string();
        let mut loaded = self.executor.block_on(self.store.load_aggregate(&id)).expect("memory can be read");
        loaded.aggregate().cents
    }

    fn refuses(&mut self, account: u64, deposit_cents: u64) -> bool {
        let id = account.to_string();
        let command = Deposit { cents: deposit_cents };
        match self.executor.block_on(self.framework.execute(&id, command)) {
            Ok(()) => false,
            Err(AggregateError::UserError(_)) => true,
            Err(error) => panic!("no other writer appends: {error}"),
        }
    }
}
