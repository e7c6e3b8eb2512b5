//! Builds a shard, and the parts of the threads that serve it, from the result of recovery.

use std::path::PathBuf;
use std::sync::Arc;

use crossbeam::queue::ArrayQueue;

use super::handle::Handle;
use crate::background::keeper::KeptShard;
use crate::background::snapshotter::{ShardSnapshots, SnapshotterRequests};
use crate::background::syncer::Syncer;
use crate::clock::{Clock, wall_now};
use crate::config::{Durability, ValidConfig};
use crate::error::{CodePanic, guard};
use crate::event::{Event, Offset, Root, Sequence, ShardId};
use crate::lane::counts::LaneShared;
use crate::lane::door::ShardDoor;
use crate::lane::registry::LaneRegistry;
use crate::lane::requests::{CheckpointRequests, KeeperRequests, SyncRequests, UnsyncedRun};
use crate::lane::shared::SharedLane;
use crate::log::format::schema_fingerprint;
use crate::log::manifest::{Span, shard_dir};
use crate::log::segment::ShardLog;
use crate::log::writer::{PreparedQueue, Resume, Writer};
use crate::metrics::{Counters, Recorder, Stage};
use crate::recovery::Recovered;
use crate::recovery::fold::Folder;
use crate::recovery::saved::SavedFiles;
use crate::shard::handler::{Factory, Registered};
use crate::shard::{Shard, ShardParts};
use crate::state::aggregate::Aggregate;
use crate::state::keys::KeyTable;
use crate::state::snapshot::format::Chunk;
use crate::state::snapshot::taker::{Message, Taker};
use crate::state::view::{Place, Position, View, ViewWriter};
use crate::storage::Storage;
use crate::sync::{Arrivals, AtomicBool, Notifier, Signal};

/// Slots for runs of events between a shard and its syncer.
const SYNC_MARKS: usize = 1 << 16;
/// The stages that a shard's turns record.
const TURN_STAGES: [Stage; 8] = [
    Stage::Ring,
    Stage::Appended,
    Stage::Handled,
    Stage::RingDue,
    Stage::AppendedDue,
    Stage::HandledDue,
    Stage::Turn,
    Stage::Batch,
];
/// The stages that a shard's syncer records.
const SYNC_STAGES: [Stage; 3] = [Stage::Durable, Stage::DurableDue, Stage::Sync];

/// Returns the number of 64 KiB chunks that carry saved states between each of the `shards` shards and the snapshotter.
/// With few shards they hold the snapshots of a few million events: the shard must not skip any while the snapshotter
/// waits for a processor or the file system.
fn snapshot_chunks(shards: u16) -> usize {
    (128 / usize::from(shards)).clamp(8, 64)
}

/// The parts that all shards have in common.
pub(super) struct Context<'a> {
    pub(super) config: &'a ValidConfig,
    /// The store's id.
    pub(super) store: u64,
    pub(super) storage: &'a Arc<dyn Storage>,
    pub(super) clock: &'a Clock,
    pub(super) keeper: &'a Arc<KeeperRequests>,
    pub(super) snapshotter: &'a SnapshotterRequests,
    pub(super) quarantine: &'a std::path::Path,
    pub(super) notifier: &'a Arc<Notifier>,
}

/// The application's code on one shard's thread: its inline handlers, and its parts of the views, already filled.
pub(super) struct ShardCode<A: Aggregate> {
    handlers: Vec<Registered<A::Event>>,
    views: Vec<Box<dyn ViewWriter<A>>>,
}

/// Makes the application's handlers and views for a shard's thread.
pub(super) fn shard_code<A: Aggregate>(
    config: &ValidConfig,
    factories: &[Factory<A::Event>],
    views: &[Box<dyn View<A>>],
    id: ShardId,
    recovered: &Recovered<A>,
) -> Result<ShardCode<A>, CodePanic> {
    let (keys, sequence) = (&recovered.folder.keys, Sequence(recovered.resume.sequence));
    let views = guard("a view", id, || filled(config, views, id, keys, sequence))?;
    let handlers = guard("the factory of a handler", id, || factories.iter().map(|make| make(id)).collect())?;
    Ok(ShardCode { handlers, views })
}

/// Returns a shard's parts of all views, filled with its states.
fn filled<A: Aggregate>(
    config: &ValidConfig,
    views: &[Box<dyn View<A>>],
    id: ShardId,
    keys: &KeyTable<A>,
    sequence: Sequence,
) -> Vec<Box<dyn ViewWriter<A>>> {
    let place = Place::new(id, config.router(), config.keys_expected.max(keys.len()));
    let mut writers: Vec<_> = views.iter().map(|view| view.writer(&place)).collect();
    for writer in &mut writers {
        keys.iter().for_each(|slot| writer.load(slot.key, &slot.state));
        writer.publish(Position { sequence, time: wall_now() });
    }
    writers
}

/// A shard, and the ends of its links that other threads hold.
pub(super) struct Built<A: Aggregate> {
    pub(super) handle: Handle<A>,
    pub(super) kept: KeptShard,
    pub(super) snapshots: ShardSnapshots,
    pub(super) shared: Arc<SharedLane<A::Event>>,
    pub(super) shard: Shard<A>,
    pub(super) syncer: Syncer,
}

/// The ends of one shard's links that several threads share.
struct Links {
    door: Arc<ShardDoor>,
    prepared: Arc<PreparedQueue>,
    counters: Arc<Counters>,
    syncer: Arc<SyncRequests>,
    checkpoints: Arc<CheckpointRequests>,
}

impl Context<'_> {
    /// Makes a shard from the result of recovery, and the parts of the other threads that serve it.
    pub(super) fn build<A: Aggregate>(&self, id: ShardId, recovered: Recovered<A>, code: ShardCode<A>) -> Built<A> {
        let config = self.config;
        let Recovered { report, segments, resume, folder, saved, span, unused, spares, .. } = recovered;
        let saved = saved.expect("recovery reads the saved states");
        let Folder { keys, outcomes, .. } = folder;
        let dir = shard_dir(&config.dir, id);
        let (begin, sequence) = (report.end, resume.sequence);
        let log = ShardLog::new((self.store, id), dir, config.segment_bytes, begin, sequence, segments, self.notifier);
        let log = Arc::new(log);
        let links = Links::new(&log, saved.covered);
        let Links { door, prepared, counters, syncer, checkpoints } = &links;
        let shared = self.shared_lane(door);
        let (arriving, arriving_clients, questions) =
            (Arc::new(Arrivals::new()), Arc::new(Arrivals::new()), Arc::new(Arrivals::new()));
        let (recorder, turn_exchange) = Recorder::new(&TURN_STAGES, config.latency);
        let (sync_recorder, sync_exchange) = Recorder::new(&SYNC_STAGES, config.latency);
        let (marks_tx, marks) = rtrb::RingBuffer::<UnsyncedRun>::new(SYNC_MARKS);
        let (taker, snapshots) = self.snapshots::<A>(&links, saved);
        let store = Arc::clone(&snapshots.store);
        let kept = kept(&links, resume.next_index, span, unused, spares);
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
            views: code.views,
            taker,
            writer: self.writer::<A>(&log, prepared, resume),
            log: Arc::clone(&log),
            syncer: Arc::clone(syncer),
            syncs: config.durability != Durability::OsCache,
            unsynced_runs: (config.durability != Durability::OsCache && config.latency).then_some(marks_tx),
            keeper: Arc::clone(self.keeper),
            handlers: code.handlers,
            storage: Arc::clone(self.storage),
            quarantine: self.quarantine.to_owned(),
            recorder,
            counters: Arc::clone(counters),
        });
        let handle = Handle {
            door: Arc::clone(door),
            arriving,
            arriving_clients,
            questions,
            store,
            checkpoints: Arc::clone(checkpoints),
            syncer: Arc::clone(syncer),
            counters: Arc::clone(counters),
            exchanges: [turn_exchange, sync_exchange],
        };
        Built { handle, kept, snapshots, shared, shard, syncer: self.syncer(&links, marks, sync_recorder) }
    }

    /// Makes the lane that all shared producers use.
    fn shared_lane<E: Event>(&self, door: &Arc<ShardDoor>) -> Arc<SharedLane<E>> {
        let shared = Arc::new(LaneShared::new(Arc::clone(&door.log), self.config.durability));
        door.lanes.register(&shared);
        Arc::new(SharedLane::new(ArrayQueue::new(self.config.ring_capacity), shared, Arc::clone(door)))
    }

    /// Makes the shard's and the snapshotter's ends of saving states.
    fn snapshots<A: Aggregate>(&self, links: &Links, saved: SavedFiles) -> (Taker, ShardSnapshots) {
        let config = self.config;
        let (messages_tx, messages) = rtrb::RingBuffer::<Message>::new(2 * snapshot_chunks(config.shards));
        let (mut used, used_rx) = rtrb::RingBuffer::<Chunk>::new(snapshot_chunks(config.shards));
        while used.push(Chunk::new()).is_ok() {}
        let taker = Taker::new::<A>(
            config.snapshot_every,
            config.checkpoint_bytes,
            saved.covered,
            Arc::clone(&links.checkpoints),
            Arc::clone(&self.snapshotter.signal),
            messages_tx,
            used_rx,
        );
        let sources = ShardSnapshots {
            log: Arc::clone(&links.door.log),
            store: Arc::new(saved.store),
            requests: Arc::clone(&links.checkpoints),
            syncer: Arc::clone(&links.syncer),
            shard_signal: Arc::clone(&links.door.signal),
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
        (taker, sources)
    }

    fn writer<A: Aggregate>(&self, log: &Arc<ShardLog>, prepared: &Arc<PreparedQueue>, resume: Resume) -> Writer {
        let schema = schema_fingerprint::<A::Event>();
        Writer::new(Arc::clone(log), Arc::clone(prepared), resume, schema, self.config.event_bytes_max)
    }

    fn syncer(&self, links: &Links, marks: rtrb::Consumer<UnsyncedRun>, recorder: Recorder) -> Syncer {
        Syncer {
            log: Arc::clone(&links.door.log),
            storage: Arc::clone(self.storage),
            requests: Arc::clone(&links.syncer),
            lanes: Arc::clone(&links.door.lanes),
            shard_signal: Arc::clone(&links.door.signal),
            durability: self.config.durability,
            marks,
            recorder,
            counters: Arc::clone(&links.counters),
            clock: self.clock.clone(),
            synced_at: None,
        }
    }
}

impl Links {
    /// Makes the links of a shard whose newest checkpoint covers its log up to `covered`.
    fn new(log: &Arc<ShardLog>, covered: Offset) -> Self {
        let checkpoints = Arc::new(CheckpointRequests::new(covered, &log.notifier));
        let door = Arc::new(ShardDoor {
            log: Arc::clone(log),
            signal: Arc::new(Signal::new()),
            closing: AtomicBool::new(false),
            turns_ended: AtomicBool::new(false),
            lanes: Arc::new(LaneRegistry::new(&log.notifier)),
        });
        Self {
            door,
            prepared: Arc::new(ArrayQueue::new(1)),
            counters: Arc::new(Counters::default()),
            syncer: Arc::new(SyncRequests::new()),
            checkpoints,
        }
    }
}

/// Makes the keeper's end of a shard.
fn kept(links: &Links, next_index: u64, span: Span, unused: Vec<PathBuf>, spares: Vec<PathBuf>) -> KeptShard {
    KeptShard {
        log: Arc::clone(&links.door.log),
        prepared: Arc::clone(&links.prepared),
        counters: Arc::clone(&links.counters),
        shard_signal: Arc::clone(&links.door.signal),
        checkpoints: Arc::clone(&links.checkpoints),
        span,
        next_index,
        spares,
        unused,
    }
}
