//! The engine's end of a running shard: its door, its mailboxes and its counters.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

use crate::command::{ClientEnd, Question};
use crate::error::{WaitError, panic_text};
use crate::event::{Key, Offset, Sequence, ShardId, Version};
use crate::lane::door::ShardDoor;
use crate::lane::requests::{CheckpointRequests, SyncRequests};
use crate::metrics::{Counters, Exchange, ShardMetrics};
use crate::shard::LaneEnd;
use crate::state::aggregate::Aggregate;
use crate::state::keys::KeyTable;
use crate::state::snapshot::store::SnapshotStore;
use crate::sync::{Arrivals, Ordering, Promise, may_wait, promise_of_shard};

/// The engine's end of a running shard.
pub(super) struct Handle<A: Aggregate> {
    pub(super) door: Arc<ShardDoor>,
    pub(super) arriving: Arc<Arrivals<LaneEnd<A::Event>>>,
    pub(super) arriving_clients: Arc<Arrivals<ClientEnd<A>>>,
    pub(super) questions: Arc<Arrivals<Question<A>>>,
    pub(super) store: Arc<SnapshotStore>,
    pub(super) checkpoints: Arc<CheckpointRequests>,
    pub(super) syncer: Arc<SyncRequests>,
    pub(super) counters: Arc<Counters>,
    /// Histograms of the shard's turns, and of its syncer.
    pub(super) exchanges: [Arc<Exchange>; 2],
}

/// A question's answer, or the message of its panic.
type Answered<T> = Result<T, String>;

impl<A: Aggregate> Handle<A> {
    /// Runs `look` on the shard's key table between two batches.
    fn question<T: Send + 'static>(
        &self,
        look: impl FnOnce(&KeyTable<A>) -> T + Send + 'static,
    ) -> Promise<Answered<T>> {
        let (promise, keeping) = promise_of_shard(&self.door.log.notifier);
        let question = Box::new(move |keys: &KeyTable<A>| {
            let answer = catch_unwind(AssertUnwindSafe(|| look(keys)));
            keeping.keep(answer.map_err(|panic| panic_text(&*panic)));
        });
        // A shard that has ended drops the question, which breaks the promise.
        drop(self.questions.push(question));
        self.door.signal.notify();
        promise
    }

    /// Runs `look` on the state of `key`; a key without events has the default state and version 0.
    fn question_state<T, F>(&self, key: Key, look: F) -> Promise<Answered<T>>
    where
        T: Send + 'static,
        F: FnOnce(&A, Version) -> T + Send + 'static,
    {
        self.question(move |keys| match keys.get(key) {
            Some(slot) => look(&slot.state, slot.version),
            None => look(&A::default(), Version(0)),
        })
    }

    /// Runs `look` on the shard's key table and waits for the result until `deadline`. On a thread that must not wait,
    /// fails without asking.
    pub(super) fn ask<T: Send + 'static>(
        &self,
        deadline: Option<Instant>,
        look: impl FnOnce(&KeyTable<A>) -> T + Send + 'static,
    ) -> Result<T, WaitError> {
        if may_wait() { self.answer(self.question(look), deadline) } else { Err(WaitError::OnEngineThread) }
    }

    /// Runs `look` on the state of `key` and waits for the result.
    pub(super) fn ask_state<T, F>(&self, key: Key, look: F) -> Result<T, WaitError>
    where
        T: Send + 'static,
        F: FnOnce(&A, Version) -> T + Send + 'static,
    {
        if may_wait() { self.answer(self.question_state(key, look), None) } else { Err(WaitError::OnEngineThread) }
    }

    /// Does the same as [`Handle::ask_state`], for tasks.
    pub(super) async fn ask_state_async<T, F>(&self, key: Key, look: F) -> Result<T, WaitError>
    where
        T: Send + 'static,
        F: FnOnce(&A, Version) -> T + Send + 'static,
    {
        self.question_state(key, look).await.map_or_else(|| Err(self.unanswered()), answered)
    }

    fn answer<T>(&self, promise: Promise<Answered<T>>, deadline: Option<Instant>) -> Result<T, WaitError> {
        promise.wait(deadline)?.map_or_else(|| Err(self.unanswered()), answered)
    }

    fn unanswered(&self) -> WaitError {
        self.door.log.failure().map_or(WaitError::Closed, |failure| failure.clone().into())
    }

    /// The shard's counters at this moment.
    pub(super) fn metrics(&self, id: ShardId) -> ShardMetrics {
        let log = &self.door.log;
        let mut metrics = ShardMetrics::of(id, &self.counters);
        let (mut published, mut appended) = (self.door.lanes.retired_events(), 0);
        appended += published;
        for lane in self.door.lanes.all().iter().filter(|lane| !lane.is_of_commands()) {
            appended += lane.appended_count();
            published += lane.published.load(Ordering::Relaxed);
        }
        metrics.published = published;
        metrics.backlog = published.saturating_sub(appended);
        metrics.sequence = Sequence(log.sequence.get());
        metrics.appended_to = Offset(log.appended.get());
        metrics.durable_to = Offset(log.durable.get());
        metrics.segments = log.segments_len();
        metrics.storage_full_why = log.why_storage_full();
        metrics.storage_full = metrics.storage_full_why.is_some();
        metrics.failure = log.failure().cloned();
        metrics
    }
}

fn answered<T>(answer: Answered<T>) -> Result<T, WaitError> {
    answer.map_err(WaitError::QuestionPanicked)
}
