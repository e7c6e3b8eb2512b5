//! Processes that are killed while they work.
#![expect(clippy::unwrap_used, reason = "a test may unwrap")]

#[path = "../common/mod.rs"]
mod common;

mod kill;
mod kill_commands;
mod kill_transfers;
