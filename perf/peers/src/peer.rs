//! What a library must do to take part, and what polls the futures of those that are async.

use std::time::Duration;

/// One library, used in one way.
pub(crate) trait Peer {
    /// As it stands in the table.
    fn name(&self) -> &str;

    /// Starts from nothing and gives each of `accounts` as many `deposits`: the first of every account, then the second of
    /// every account, and so on, [`bank::deposit_cents`](crate::bank::deposit_cents) each. Returns the time from the first
    /// command until the outcome of the last is known. Every outcome is looked at, and none may be a refusal.
    ///
    /// What is done once (opening a store, naming accounts, giving the last run's memory back) is not timed.
    fn run(&mut self, accounts: u64, deposits: u64) -> Duration;

    /// What the library says an account holds after [`Peer::run`].
    fn balance_cents(&mut self, account: u64) -> u64;

    /// Commands one deposit more after [`Peer::run`]: whether it was refused.
    fn refuses(&mut self, account: u64, deposit_cents: u64) -> bool;
}

/// What polls, on the calling thread alone. The peers' in-memory stores are never pending, so all it costs is its own
/// bookkeeping: within 3 % the two are equally fast.
///
/// More threads were tried too: with the accounts split between two, on a machine of two shared cores, no peer's median was
/// higher than with one. Both of their stores are one map under one lock.
pub(crate) enum Executor {
    Tokio(tokio::runtime::Runtime),
    Pollster,
}

impl Executor {
    pub(crate) fn tokio() -> std::io::Result<Self> {
        tokio::runtime::Builder::new_current_thread().build().map(Self::Tokio)
    }

    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Tokio(_) => "tokio",
            Self::Pollster => "pollster",
        }
    }

    pub(crate) fn block_on<F: Future>(&self, future: F) -> F::Output {
        match self {
            Self::Tokio(runtime) => runtime.block_on(future),
            Self::Pollster => pollster::block_on(future),
        }
    }
}

/// A dependency's name with the version that is built in.
pub(crate) fn versioned(dependency: &str) -> String {
    let (_, version) = include_str!("../Cargo.lock")
        .split_once(&format!("name = \"{dependency}\"\nversion = \""))
        .expect("every dependency is in the lock file");
    let version: String = version.chars().take_while(|&c| c != '"').collect();
    format!("{dependency} {version}")
}
