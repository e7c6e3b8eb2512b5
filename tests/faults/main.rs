//! Faults: disks that fail, fill up or lose power, exhausted resources, and threads that cannot be started.
#![expect(clippy::unwrap_used, reason = "a test may unwrap")]

#[path = "../common/mod.rs"]
mod common;

mod consumer_full_disk;
mod exhausted;
mod full_disk;
mod power_cuts;
mod real_sync;
mod state_failures;
mod sync_failure;
mod threads;
