//! Closing an engine. [`Closing`] holds everything that this needs without the engine itself. A drop that must not
//! wait, or has waited long enough, can leave the rest to another thread.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::handle::Handle;
use super::runner::RunnerRequests;
use super::threads::join_until;
use crate::background::snapshotter::SnapshotterRequests;
use crate::consumer::services::Services;
use crate::error::{ShardFailure, WaitError};
use crate::lane::door::ShardDoor;
use crate::lane::requests::{CheckpointRequests, KeeperRequests};
use crate::metrics::Exchange;
use crate::state::aggregate::Aggregate;
use crate::sync::{Mutex, Notifier, Ordering, Role, lock, lock_until, role, thread};

/// The time that a drop waits for something that makes no progress: a full disk, a consumer's handler, a shard whose
/// turn does not end.
const DROP_TIME: Duration = Duration::from_secs(10);
/// A drop that waits longer than this is logged.
const DROP_QUIET_TIME: Duration = Duration::from_millis(100);

/// Everything that is needed to close an engine.
pub(super) struct Closing {
    pub(super) shards: Vec<ClosingShard>,
    pub(super) notifier: Arc<Notifier>,
    pub(super) keeper: Arc<KeeperRequests>,
    pub(super) snapshotter: Arc<SnapshotterRequests>,
    pub(super) services: Arc<Services>,
    pub(super) runner: Arc<RunnerRequests>,
    pub(super) threads: Mutex<Vec<thread::JoinHandle<()>>>,
}

/// The part of a shard that closing needs.
pub(super) struct ClosingShard {
    door: Arc<ShardDoor>,
    checkpoints: Arc<CheckpointRequests>,
    /// The shard answers it between two turns.
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

    /// Returns `true` if the shard has ended no turn since [`ClosingShard::ask`].
    fn is_stuck(&self) -> bool {
        self.turns.is_wanted() && !self.door.turns_ended.load(Ordering::SeqCst)
    }
}

impl Closing {
    /// Returns `true` if the calling thread belongs to this engine: if it waited for the end, it would wait for itself.
    pub(super) fn is_own_thread(&self) -> bool {
        match role() {
            Role::Application => self.services.hold_up_this_thread(),
            Role::Engine => true,
            Role::Consumer { engine, .. } => engine == self.services.identity() || self.services.hold_up_this_thread(),
        }
    }

    /// Refuses further events, appends what was accepted, syncs, and joins every thread, until `deadline`.
    pub(super) fn close(&self, deadline: Option<Instant>) -> Result<(), WaitError> {
        for shard in &self.shards {
            shard.door.closing.store(true, Ordering::SeqCst);
            shard.door.signal.notify();
            // No further checkpoint begins. Wake the waiters for one, so that they notice.
            shard.checkpoints.wake_all();
        }
        // Another caller may hold the list until its own deadline.
        let Some(mut threads) = lock_until(&self.threads, deadline) else { return Err(WaitError::TimedOut) };
        // These threads were started first and end last: until the shards have ended, they may need segments, retention
        // may need saved states, and tasks must be woken.
        let helpers: [&dyn Fn(); 3] = [&|| self.notifier.end(), &|| self.keeper.end(), &|| {
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

    pub(super) fn failures(&self) -> impl Iterator<Item = ShardFailure> {
        self.shards.iter().filter_map(|shard| shard.door.log.failure().cloned())
    }

    /// Closes an engine that is being dropped. A drop that takes longer than [`DROP_QUIET_TIME`] logs what it waits for.
    pub(super) fn close_dropped(self: &Arc<Self>) {
        if self.is_own_thread() {
            return self.leave("the engine was dropped on one of its own threads and closes in the background");
        }
        let began = Instant::now();
        self.shards.iter().for_each(ClosingShard::ask);
        if !matches!(self.close(Some(began + DROP_QUIET_TIME)), Err(WaitError::TimedOut)) {
            // All threads have ended. A shard's failure was logged when it happened.
            return;
        }
        let waits_for = self.waits_for();
        tracing::warn!(%waits_for, "the drop of an engine waits (call shutdown with a deadline to choose the time)");
        self.close_slowly(began);
        tracing::warn!(%waits_for, waited_ms = began.elapsed().as_millis() as u64, "the drop of an engine waited");
    }

    /// Waits for shards that make progress, and gives up after [`DROP_TIME`] on everything else: events that a full disk
    /// keeps from being appended, consumers that do not end, shards whose turn does not end, and wakers that do not
    /// return.
    fn close_slowly(self: &Arc<Self>, began: Instant) {
        let mut has_abandoned = false;
        let mut deadline = began + DROP_TIME;
        loop {
            match self.close(Some(deadline)) {
                Ok(()) => return,
                Err(WaitError::TimedOut) => {}
                Err(error) if has_abandoned => {
                    tracing::error!(%error, "the engine was dropped before it could append every accepted event");
                    return;
                }
                // All threads have ended, and the failure was logged when it happened.
                Err(_) => return,
            }
            if !std::mem::replace(&mut has_abandoned, true) {
                let (waits_for, waited_ms) = (self.waits_for(), began.elapsed().as_millis() as u64);
                tracing::error!(%waits_for, waited_ms, "the drop of an engine gives up on what makes no progress");
                self.services.abandon();
                self.runner.abandon.store(true, Ordering::SeqCst);
                self.shards.iter().for_each(|shard| shard.door.signal.notify());
            }
            if self.shards.iter().any(ClosingShard::is_stuck) {
                return self.leave("the engine was dropped while a shard hangs in the application's code");
            }
            // Everything is saved: only the notifier is left, which ends last.
            if lock(&self.threads).len() == 1 {
                return self.leave("the engine was dropped while a waker of the application hangs");
            }
            self.shards.iter().for_each(ClosingShard::ask);
            deadline = Instant::now() + DROP_TIME;
        }
    }

    /// Describes what keeps the engine from closing.
    fn waits_for(&self) -> String {
        let busy = self.shards.iter().enumerate().filter(|(_, shard)| !shard.door.turns_ended.load(Ordering::SeqCst));
        let mut all: Vec<String> = busy
            .map(|(i, shard)| match shard.door.log.why_storage_full() {
                Some(why) => format!("shard {i} (its storage is full: {why})"),
                None if shard.is_stuck() => format!("shard {i} (its turn does not end)"),
                None => format!("shard {i} (it has events to append)"),
            })
            .collect();
        all.extend(self.services.running_names().into_iter().map(|name| format!("consumer {name}")));
        if all.is_empty() {
            let threads = lock(&self.threads);
            let running = threads.iter().filter(|thread| !thread.is_finished());
            all.extend(running.filter_map(|thread| Some(format!("thread {}", thread.thread().name()?))));
        }
        all.join(", ")
    }

    /// Leaves the closing to another thread. The store stays locked until it is done.
    fn leave(self: &Arc<Self>, why: &str) {
        tracing::warn!("{why}");
        let closing = Arc::clone(self);
        let rest = move || {
            if let Err(error) = closing.close(None) {
                tracing::error!(%error, "a dropped engine closed with an error");
            }
        };
        if let Err(error) = thread::Builder::new().name("corelane-close".to_owned()).spawn(rest) {
            tracing::error!(%error, "cannot start a thread to close a dropped engine; its threads keep running");
        }
    }
}
