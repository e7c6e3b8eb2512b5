//! The threads of background work. Each drives one worker: it reads the clock for the worker's steps, and waits between
//! them.

use std::time::Instant;

use crate::background::keeper::Keeper;
use crate::background::snapshotter::Snapshotter;
use crate::background::step::{Now, Step};
use crate::background::syncer::Syncer;
use crate::clock::wall_now;
use crate::sync::{Idle, Wait};

/// Runs a shard's syncer until the shard has ended and everything is synced, or a sync failed.
pub(super) fn run_syncer(mut syncer: Syncer) {
    let mut idle = Idle::new(Wait::Park);
    loop {
        match syncer.step(Instant::now()) {
            Step::Worked => idle.reset(),
            Step::Idle(wake_at) => idle.step(&syncer.requests.signal, wake_at, || syncer.has_work(wake_at)),
            Step::Ended => return,
        }
    }
}

/// Runs the keeper until the engine ends. It never spins: that would take a core from a thread that others wait for.
pub(super) fn run_keeper(mut keeper: Keeper) {
    let mut idle = Idle::sleepy();
    loop {
        match keeper.step(now()) {
            Step::Worked => {}
            Step::Idle(wake_at) => idle.step(&keeper.requests.signal, wake_at, || keeper.has_work()),
            Step::Ended => return,
        }
    }
}

/// Runs the snapshotter until the engine has ended and everything that was sent is written. It never spins either.
pub(super) fn run_snapshotter(mut snapshotter: Snapshotter) {
    let mut idle = Idle::sleepy();
    loop {
        match snapshotter.step(now()) {
            Step::Worked => {}
            Step::Idle(wake_at) => idle.step(&snapshotter.requests.signal, wake_at, || snapshotter.has_work()),
            Step::Ended => return,
        }
    }
}

fn now() -> Now {
    Now { monotonic: Instant::now(), wall: wall_now() }
}
