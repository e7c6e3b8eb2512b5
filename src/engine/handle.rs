//! The engine's end of a running shard: its door, its mailboxes and its counters.

use std::sync::Arc;

use super::query::Query;
use crate::command::{ClientEnd, Question};
use crate::event::{Offset, Sequence, ShardId};
use crate::lane::door::ShardDoor;
use crate::lane::requests::{CheckpointRequests, SyncRequests};
use crate::metrics::{Counters, Exchange, ShardMetrics};
use crate::shard::LaneEnd;
use crate::state::aggregate::Aggregate;
use crate::state::keys::KeyTable;
use crate::state::snapshot::store::SnapshotStore;
use crate::sync::{Arrivals, Ordering};

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

impl<A: Aggregate> Handle<A> {
    /// Returns a query that runs `look` on the shard's key table between two batches.
    pub(super) fn query<T: Send + 'static>(
        &self,
        look: impl FnOnce(&KeyTable<A>) -> T + Send + 'static,
    ) -> Query<A, T> {
        Query::new(&self.questions, &self.door, look)
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
