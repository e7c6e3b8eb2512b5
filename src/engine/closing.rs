//! The end of an engine: everything that is needed to close it, apart from the engine itself, so that a drop which must not
//! wait, or has waited long enough, can leave the rest to a thread of its own.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::threads::join_until;
use super::{Engine, Handle};
use crate::background::snapshotter::SnapshotterRequests;
use crate::consumer::services::Services;
use crate::engine::runner::RunnerRequests;
use crate::error::{ShardFailure, WaitError};
use crate::lane::door::ShardDoor;
use crate::lane::requests::CheckpointRequests;
use crate::lane::requests::KeeperRequests;
use crate::metrics::Exchange;
use crate::state::aggregate::Aggregate;
use crate::sync::{Mutex, Ordering, Role, lock_until, role, thread};

/// How long a drop waits where nothing moves: for a full disk, a consumer's handler, a shard that ends no turn.
const DROP_TIME: Duration = Duration::from_secs(10);

/// Everything that is needed to close an engine.
pub(super) struct Closing {
    pub(super) shards: Vec<ClosingShard>,
    pub(super) keeper: Arc<KeeperRequests>,
    pub(super) snapshotter: Arc<SnapshotterRequests>,
    pub(super) services: Arc<Services>,
    pub(super) runner: Arc<RunnerRequests>,
    pub(super) threads: Mutex<Vec<thread::JoinHandle<()>>>,
}

pub(super) struct ClosingShard {
    door: Arc<ShardDoor>,
    checkpoints: Arc<CheckpointRequests>,
    /// Answered between two turns.
    turns: Arc<Exchange>,
}

impl ClosingShard {
    pub(super) fn of<A: Aggregate>(shard: &Handle<A>) -> Self {
        Self {
            door: Arc::clone(&shard.door),
            checkpoints: Arc::clone(&shard.checkpoints),
            turns: Arc::clone(&shard.exchanges[0]),
        }
    }

    /// Asks the shard to answer at the end of its turn.
    fn ask(&self) {
        self.turns.ask();
        self.door.signal.notify();
    }

    /// Returns `true` while the shard has ended no turn since it was asked.
    fn is_stuck(&self) -> bool {
        self.turns.is_wanted() && !self.door.turns_ended.load(Ordering::SeqCst)
    }
}

impl Closing {
    /// Whether waiting for the end would be waiting for this very thread.
    pub(super) fn is_own_thread(&self) -> bool {
        match role() {
            Role::Application => false,
            Role::Engine => true,
            Role::Consumer { engine, .. } => engine == self.services.identity(),
        }
    }

    /// Refuses further events, appends what was accepted, syncs, and joins every thread, until `deadline`.
    pub(super) fn close(&self, deadline: Option<Instant>) -> Result<(), WaitError> {
        for shard in &self.shards {
            shard.door.closing.store(true, Ordering::SeqCst);
            shard.door.signal.notify();
            // No further checkpoint will come: its waiters must look again.
            shard.checkpoints.wake_all();
        }
        // Another caller may hold the list for as long as it waits.
        let Some(mut threads) = lock_until(&self.threads, deadline) else { return Err(WaitError::TimedOut) };
        // Keeper and snapshotter, which were started first, go last: the shards may need segments, and retention saved states,
        // to the end.
        let helpers: [&dyn Fn(); 2] = [&|| self.keeper.end(), &|| {
            self.snapshotter.ending.store(true, Ordering::SeqCst);
            self.snapshotter.signal.notify();
        }];
        for left in (0..=helpers.len()).rev() {
            while threads.len() > left {
                if !join_until(&mut threads, deadline) {
                    return Err(WaitError::TimedOut);
                }
            }
            if left == helpers.len() && !self.services.close(deadline) {
                return Err(WaitError::TimedOut);
            }
            if let Some(end) = left.checked_sub(1).map(|at| helpers[at]) {
                end();
            }
        }
        match self.failures().next() {
            Some(failure) => Err(failure.into()),
            None => Ok(()),
        }
    }

    fn failures(&self) -> impl Iterator<Item = ShardFailure> {
        self.shards.iter().filter_map(|shard| shard.door.log.failure().cloned())
    }

    /// Closes an engine that is dropped. A shard that moves is waited for; whatever does not is given up after ten seconds: what a
    /// full disk keeps from being appended, consumers that do not end, and a shard that ends no turn.
    fn close_dropped(self: &Arc<Self>) {
        if self.is_own_thread() {
            return self.leave("the engine was dropped on a thread of its own; it closes when that is done");
        }
        let mut has_abandoned = false;
        loop {
            self.shards.iter().for_each(ClosingShard::ask);
            match self.close(Some(Instant::now() + DROP_TIME)) {
                Ok(()) => return,
                Err(WaitError::TimedOut) => {}
                Err(error) if has_abandoned => {
                    tracing::error!(%error, "the engine was dropped before everything accepted was appended");
                    return;
                }
                // Its threads are gone, and the failure was told when it happened.
                Err(_) => return,
            }
            if !std::mem::replace(&mut has_abandoned, true) {
                self.services.abandon();
                self.runner.abandon.store(true, Ordering::SeqCst);
                self.shards.iter().for_each(|shard| shard.door.signal.notify());
            }
            if self.shards.iter().any(ClosingShard::is_stuck) {
                return self.leave("the engine was dropped while a shard hangs in the application's code");
            }
        }
    }

    /// Leaves the closing to a thread of its own. The store stays locked until that is done.
    fn leave(self: &Arc<Self>, why: &str) {
        tracing::warn!("{why}");
        let closing = Arc::clone(self);
        let rest = move || {
            if let Err(error) = closing.close(None) {
                tracing::error!(%error, "an engine that was dropped is closed");
            }
        };
        if let Err(error) = thread::Builder::new().name("corelane-close".to_owned()).spawn(rest) {
            tracing::error!(%error, "no thread to close a dropped engine; its threads stay");
        }
    }
}

impl<A: Aggregate> Drop for Engine<A> {
    fn drop(&mut self) {
        self.closing.close_dropped();
    }
}
