//! A shard and everything around it, put together from what recovery found.

use std::sync::Arc;

use crossbeam::queue::ArrayQueue;

use super::Handle;
use crate::background::age::Ages;
use crate::background::keeper::Kept;
use crate::background::snapshotter::{SnapshotterRequests, Sources};
use crate::background::syncer::Syncer;
use crate::clock::{Clock, wall_now};
use crate::config::{Durability, ValidConfig};
use crate::error::{CodePanic, guard};
use crate::event::{Root, Sequence, ShardId};
use crate::ingress::shared::SharedLane;
use crate::lane::counts::LaneShared;
use crate::lane::door::ShardDoor;
use crate::lane::registry::LaneRegistry;
use crate::lane::requests::CheckpointRequests;
use crate::lane::requests::KeeperRequests;
use crate::lane::requests::{SyncRequests, UnsyncedRun};
use crate::log::format::schema_fingerprint;
use crate::log::manifest::shard_dir;
use crate::log::segment::ShardLog;
use crate::log::writer::Writer;
use crate::metrics::{Counters, Recorder, Stage};
use crate::recovery::Recovered;
use crate::recovery::fold::Folder;
use crate::shard::handler::{Factory, Registered};
use crate::shard::{Shard, ShardParts};
use crate::state::aggregate::Aggregate;
use crate::state::keys::KeyTable;
use crate::state::snapshot::format::Chunk;
use crate::state::snapshot::taker::{Message, Taker};
use crate::state::view::{Place, Position, View, ViewWriter};
use crate::storage::Storage;
use crate::sync::{Arrivals, AtomicBool, Signal};

/// Slots for runs of events between a shard and its syncer.
const SYNC_MARKS: usize = 1 << 16;
/// Chunks of 64 KiB for saved states that go between one of `shards` and the snapshotter. With few shards they hold the snapshots
/// of some million events: a snapshotter that waits for a processor or the file system must not make the shard skip any.
fn snapshot_chunks(shards: u16) -> usize {
    (128 / usize::from(shards)).clamp(8, 64)
}

/// What every shard is built from.
pub(super) struct Context<'a> {
    pub(super) config: &'a ValidConfig,
    /// The store's id.
    pub(super) store: u64,
    pub(super) storage: &'a Arc<dyn Storage>,
    pub(super) clock: &'a Clock,
    pub(super) keeper: &'a Arc<KeeperRequests>,
    pub(super) snapshotter: &'a SnapshotterRequests,
    pub(super) quarantine: &'a std::path::Path,
}

/// The program's code on a shard's thread: its inline handlers, and its views' parts, filled with the states that there are.
pub(super) struct Own<A: Aggregate> {
    handlers: Vec<Registered<A::Event>>,
    views: Vec<Box<dyn ViewWriter<A>>>,
}

/// Makes the program's handlers and views for a shard's thread.
pub(super) fn own<A: Aggregate>(
    config: &ValidConfig,
    factories: &[Factory<A::Event>],
    views: &[Box<dyn View<A>>],
    id: ShardId,
    recovered: &Recovered<A>,
) -> Result<Own<A>, CodePanic> {
    let (keys, sequence) = (&recovered.folder.keys, Sequence(recovered.resume.sequence));
    let views = guard("a view", id, || filled(config, views, id, keys, sequence))?;
    let handlers = guard("the factory of a handler", id, || factories.iter().map(|make| make(id)).collect())?;
    Ok(Own { handlers, views })
}

/// A shard's parts of all views, filled with the states that there are.
fn filled<A: Aggregate>(
    config: &ValidConfig,
    views: &[Box<dyn View<A>>],
    id: ShardId,
    keys: &KeyTable<A>,
    sequence: Sequence,
) -> Vec<Box<dyn ViewWriter<A>>> {
    let place = Place::new(id, config.shards, config.keys_expected.max(keys.len()));
    let mut writers: Vec<_> = views.iter().map(|view| view.writer(&place)).collect();
    for writer in &mut writers {
        keys.iter().for_each(|slot| writer.load(slot.key, &slot.state));
        writer.publish(Position { sequence, time: wall_now() });
    }
    writers
}

pub(super) struct Built<A: Aggregate> {
    pub(super) handle: Handle<A>,
    pub(super) kept: Kept,
    pub(super) sources: Sources,
    pub(super) shared: Arc<SharedLane<A::Event>>,
    pub(super) shard: Shard<A>,
    pub(super) syncer: Syncer,
}

impl Context<'_> {
    pub(super) fn build<A: Aggregate>(&self, id: ShardId, recovered: Recovered<A>, own: Own<A>) -> Built<A> {
        let config = self.config;
        let Recovered { report, segments, resume, folder, saved, span, unused, spares, .. } = recovered;
        let saved = saved.expect("recovery looks for what is saved");
        let Folder { keys, outcomes, .. } = folder;
        let dir = shard_dir(&config.dir, id);
        let log =
            Arc::new(ShardLog::new(self.store, id, dir, config.segment_bytes, report.end, resume.sequence, segments));
        let signal = Arc::new(Signal::new());
        let lanes = Arc::new(LaneRegistry::default());
        let door = Arc::new(ShardDoor {
            log: Arc::clone(&log),
            signal: Arc::clone(&signal),
            closing: AtomicBool::new(false),
            turns_ended: AtomicBool::new(false),
            lanes: Arc::clone(&lanes),
        });
        let shared_end = Arc::new(LaneShared::new(Arc::clone(&log), config.durability));
        lanes.register(&shared_end);
        let shared = Arc::new(SharedLane {
            queue: ArrayQueue::new(config.ring_capacity),
            shared: shared_end,
            door: Arc::clone(&door),
        });
        let arriving = Arc::new(Arrivals::new());
        let arriving_clients = Arc::new(Arrivals::new());
        let questions = Arc::new(Arrivals::new());
        let syncer = Arc::new(SyncRequests::new());
        let counters = Arc::new(Counters::default());
        let prepared = Arc::new(ArrayQueue::new(1));
        let turn_stages = [
            Stage::Ring,
            Stage::Appended,
            Stage::Handled,
            Stage::RingDue,
            Stage::AppendedDue,
            Stage::HandledDue,
            Stage::Turn,
            Stage::Batch,
        ];
        let (recorder, turn_exchange) = Recorder::new(&turn_stages, config.latency);
        let (sync_recorder, sync_exchange) =
            Recorder::new(&[Stage::Durable, Stage::DurableDue, Stage::Sync], config.latency);
        let (marks_tx, marks_rx) = rtrb::RingBuffer::<UnsyncedRun>::new(SYNC_MARKS);
        let checkpoints = Arc::new(CheckpointRequests::new(saved.covered));
        let (messages_tx, messages) = rtrb::RingBuffer::<Message>::new(2 * snapshot_chunks(config.shards));
        let (mut used, used_rx) = rtrb::RingBuffer::<Chunk>::new(snapshot_chunks(config.shards));
        while used.push(Chunk::new()).is_ok() {}
        let store = Arc::new(saved.store);
        let taker = Taker::new::<A>(
            config.snapshot_every,
            config.checkpoint_bytes,
            saved.covered,
            Arc::clone(&checkpoints),
            Arc::clone(&self.snapshotter.signal),
            messages_tx,
            used_rx,
        );
        let sources = Sources {
            log: Arc::clone(&log),
            store: Arc::clone(&store),
            requests: Arc::clone(&checkpoints),
            syncer: Arc::clone(&syncer),
            shard_signal: Arc::clone(&signal),
            messages,
            used,
            state_version: A::STATE_VERSION,
            state: Root::of::<A>(),
            indexed: size_of::<A>() > 0,
            next_number: saved.next_number,
            snapshots: None,
            checkpoint: None,
            finishing: None,
            retry_at: None,
        };
        let kept = Kept {
            log: Arc::clone(&log),
            prepared: Arc::clone(&prepared),
            counters: Arc::clone(&counters),
            shard_signal: Arc::clone(&signal),
            next_index: resume.next_index,
            span,
            spare_number: 0,
            spares: Vec::new(),
            retiring: Vec::new(),
            prefaulted: (u64::MAX, 0),
            retry_at: None,
            checkpoints: Arc::clone(&checkpoints),
            checkpoints_failed: 0,
            ask_at: None,
            waits_for: 0,
            held_to: 0,
            unsynced_to: 0,
            ages: Ages::default(),
        }
        .with_leftovers(unused, spares);
        let shard = Shard::new(ShardParts {
            id,
            clock: self.clock.clone(),
            batch_max: config.batch_max,
            arriving: Arc::clone(&arriving),
            shared_lane: Arc::clone(&shared),
            arriving_clients: Arc::clone(&arriving_clients),
            questions: Arc::clone(&questions),
            keys,
            outcomes,
            views: own.views,
            taker,
            writer: Writer::new(
                Arc::clone(&log),
                prepared,
                resume,
                schema_fingerprint::<A::Event>(),
                config.event_bytes_max,
            ),
            log: Arc::clone(&log),
            syncer: Arc::clone(&syncer),
            syncs: config.durability != Durability::OsCache,
            unsynced_runs: (config.durability != Durability::OsCache && config.latency).then_some(marks_tx),
            keeper: Arc::clone(self.keeper),
            handlers: own.handlers,
            storage: Arc::clone(self.storage),
            quarantine: self.quarantine.to_owned(),
            recorder,
            counters: Arc::clone(&counters),
        });
        let shard_signal = Arc::clone(&door.signal);
        let syncer_parts = Syncer {
            log,
            storage: Arc::clone(self.storage),
            requests: Arc::clone(&syncer),
            lanes,
            shard_signal,
            durability: config.durability,
            marks: marks_rx,
            recorder: sync_recorder,
            counters: Arc::clone(&counters),
            clock: self.clock.clone(),
        };
        let handle = Handle {
            door,
            arriving,
            arriving_clients,
            questions,
            store,
            checkpoints,
            syncer,
            counters,
            exchanges: [turn_exchange, sync_exchange],
        };
        Built { handle, kept, sources, shared, shard, syncer: syncer_parts }
    }
}
