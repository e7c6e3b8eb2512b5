//! The trait of a contestant, and the executors that poll the async ones.

use std::time::Duration;

/// A library used in one way.
pub(crate) trait Peer {
    /// The name in the table.
    fn name(&self) -> &str;

    /// Starts from an empty store and makes `deposits` deposits to each of `accounts` accounts, of
    /// [`bank::deposit_cents`](crate::bank::deposit_cents) each: the first of every account, then the second of every
    /// account, and so on. Returns the time from the first command to the last outcome. Checks every outcome; none may
    /// be a rejection.
    ///
    /// Work done once (opening a store, naming accounts, freeing the last run's memory) is not timed.
    fn run(&mut self, accounts: u64, deposits: u64) -> Duration;

    /// Returns an account's balance after [`Peer::run`], according to the library.
    fn balance_cents(&mut self, account: u64) -> u64;

    /// Makes one more deposit after [`Peer::run`]. Returns `true` if it was rejected.
    fn refuses(&mut self, account: u64, deposit_cents: u64) -> bool;
}

/// The executor, on the calling thread only. The peers' in-memory stores are never pending, so its cost is only its own
/// bookkeeping: the two are equally fast within 3 %.
///
/// More threads do not help: with the accounts split between two threads, on a machine of two shared cores, no peer's
/// median was higher. Both stores are one map under one lock.
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

/// Returns a dependency's name and version.
pub(crate) fn versioned(dependency: &str) -> String {
    let (_, version) = include_str!("../Cargo.lock")
        .split_once(&format!("name = \"{dependency}\"\nversion = \""))
        .expect("every dependency is in the lock file");
    let version: String = version.chars().take_while(|&c| c != '"').collect();
    format!("{dependency} {version}")
}
