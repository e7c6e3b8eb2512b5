//! The composition root: opens a store, starts its threads, stops them. The only module that knows all.

mod build;
mod closing;
mod consumers;
mod gated;
mod history;
mod open;
mod queries;
pub(crate) mod runner;
mod threads;

use std::sync::Arc;
use std::time::Instant;

use crate::background::keeper::Keeper;
use crate::background::snapshotter::{Snapshotter, SnapshotterRequests};
use crate::clock::Clock;
use crate::command::{Client, ClientEnd, ClientLane, Question};
use crate::config::{Config, Durability, ValidConfig};
use crate::consumer::position_file::cut_all;
use crate::consumer::services::Services;
use crate::engine::runner::{RunnerRequests, assign_cores, run};
use crate::error::{OpenError, ReadError, ShardFailure, WaitError};
use crate::event::{Offset, Sequence, ShardId};
use crate::ingress::gated::OpenGates;
use crate::ingress::producer::Producer;
use crate::ingress::shared::{SharedLane, SharedProducer};
use crate::lane::counts::LaneShared;
use crate::lane::door::ShardDoor;
use crate::lane::flush::flush_shard;
use crate::lane::requests::CheckpointRequests;
use crate::lane::requests::KeeperRequests;
use crate::lane::requests::SyncRequests;
use crate::log::manifest::shard_dir;
use crate::log::position::Position;
use crate::log::reader::Reader;
use crate::metrics::{Counters, Exchange, Metrics, ShardMetrics, Totals};
use crate::recovery::report::RecoveryReport;
use crate::shard::LaneEnd;
use crate::shard::handler::{Factory, Handler, OnError, Registered};
use crate::state::aggregate::{Aggregate, Stateless};
use crate::state::snapshot::store::SnapshotStore;
use crate::state::view::View;
use crate::storage::{Lock, Storage};
use crate::sync::{Arrivals, AtomicBool, Deadline, Mutex, Ordering, Role, Signal, lock, take_role};
use build::{Context, own as own_of};
use closing::{Closing, ClosingShard};
pub use consumers::PublishSyncError;
pub use history::Comparison;
use open::{Changes, Standing, StoreLock, load_manifest, logs_of, open_files, recover};
use threads::{Crew, Threads};

/// An engine that carries events and keeps no states.
pub type EventLog<E> = Engine<Stateless<E>>;

/// One store, open and running: the shards' threads, their syncers, and the keeper.
///
/// Dropping it shuts it down. The drop gives up after ten seconds on events that a full disk keeps from being appended, and on a
/// shard that ends no turn. On one of the engine's own threads (in an inline handler or a consumer's handler) the drop does not
/// wait; the engine closes behind it.
pub struct Engine<A: Aggregate> {
    config: ValidConfig,
    clock: Clock,
    recovery: RecoveryReport,
    shards: Vec<Handle<A>>,
    shared_lanes: Arc<[Arc<SharedLane<A::Event>>]>,
    keeper: Arc<KeeperRequests>,
    totals: Mutex<Totals>,
    runner: Arc<RunnerRequests>,
    closing: Arc<Closing>,
    services: Arc<Services>,
    /// Shared with readers: while one lives, its segments are nobody else's to write.
    lock: Arc<dyn Lock>,
    storage: Arc<dyn Storage>,
    gates: OpenGates,
}

/// What the engine keeps of a running shard.
struct Handle<A: Aggregate> {
    door: Arc<ShardDoor>,
    arriving: Arc<Arrivals<LaneEnd<A::Event>>>,
    arriving_clients: Arc<Arrivals<ClientEnd<A>>>,
    questions: Arc<Arrivals<Question<A>>>,
    store: Arc<SnapshotStore>,
    checkpoints: Arc<CheckpointRequests>,
    syncer: Arc<SyncRequests>,
    counters: Arc<Counters>,
    exchanges: [Arc<Exchange>; 2],
}

impl<A: Aggregate> std::fmt::Debug for Engine<A> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine")
            .field("dir", &self.config.dir)
            .field("shards", &self.shards.len())
            .finish_non_exhaustive()
    }
}

/// An engine about to be opened, with its inline handlers and views.
pub struct Builder<A: Aggregate> {
    config: Config,
    handlers: Vec<Factory<A::Event>>,
    views: Vec<Box<dyn View<A>>>,
    /// In place of the file system.
    pub(crate) storage: Option<Arc<dyn Storage>>,
    threads_max: usize,
}

impl<A: Aggregate> std::fmt::Debug for Builder<A> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Builder")
            .field("config", &self.config)
            .field("handlers", &self.handlers.len())
            .field("views", &self.views.len())
            .finish_non_exhaustive()
    }
}

impl<A: Aggregate> Builder<A> {
    /// Adds an inline handler: `make` is called once per shard, when the engine opens. Handlers run in the order added.
    #[must_use]
    pub fn handler<H: Handler<A::Event> + 'static>(
        mut self,
        name: &str,
        on_error: OnError,
        make: impl Fn(ShardId) -> H + 'static,
    ) -> Self {
        let name = name.to_owned();
        self.handlers.push(Box::new(move |shard| Registered {
            name: name.clone(),
            on_error,
            handler: Box::new(make(shard)),
        }));
        self
    }

    /// Adds a view. It is filled from the states when the engine opens, and kept up to date from then on.
    #[must_use]
    pub fn view(mut self, view: &(impl View<A> + Clone + 'static)) -> Self {
        self.views.push(Box::new(view.clone()));
        self
    }

    /// Plays a system that starts this many threads and no more, for tests.
    #[must_use]
    pub fn threads_max(mut self, threads_max: usize) -> Self {
        self.threads_max = threads_max;
        self
    }

    /// Opens the store, recovering what is there, and starts the engine.
    ///
    /// # Errors
    /// Why it could not be opened.
    pub fn open(self) -> Result<Engine<A>, OpenError> {
        let Self { config, handlers, views, storage, threads_max } = self;
        let mut config = config.validate()?;
        let storage: Arc<dyn Storage> = match storage {
            Some(storage) => storage,
            None => Arc::new(open_files(&mut config)?),
        };
        Engine::start(config, &handlers, &views, storage, Threads { left: threads_max })
    }
}

impl<A: Aggregate> Engine<A> {
    /// Opens (or creates) the store that `config` names. `recovery()` says what was found.
    ///
    /// # Errors
    /// Why it could not be opened. The store is as it was; only an error while the repairs of a sound store are carried out
    /// (a full disk, say) may leave some of them done.
    pub fn open(config: Config) -> Result<Self, OpenError> {
        Self::builder(config).open()
    }

    /// To add inline handlers and views before opening.
    pub fn builder(config: Config) -> Builder<A> {
        Builder { config, handlers: Vec::new(), views: Vec::new(), storage: None, threads_max: usize::MAX }
    }

    fn start(
        config: ValidConfig,
        factories: &[Factory<A::Event>],
        views: &[Box<dyn View<A>>],
        storage: Arc<dyn Storage>,
        mut threads: Threads,
    ) -> Result<Self, OpenError> {
        let began = Instant::now();
        let creating = |source| OpenError::Io { action: "creating", path: config.dir.clone(), source };
        storage.create_dir(&config.dir).map_err(creating)?;
        let mut lock = StoreLock::default();
        lock.take(&*storage, &config.dir)?;
        // First everything is looked at, then anything is changed: a store that is refused is left as it was.
        let (manifest, standing) = load_manifest::<A::Event>(&*storage, &config)?;
        if standing != Standing::New {
            let mut shard_dirs = (0..config.shards).map(|shard| shard_dir(&config.dir, ShardId(shard)));
            shard_dirs.try_for_each(|dir| lock.take(&*storage, &dir))?;
        }
        let mut recovered = recover::<A>(&storage, &config, &manifest, standing, &mut threads)?;
        let ends: Vec<Offset> = recovered.iter().map(|shard| shard.report.end).collect();
        let consumers = cut_all(&*storage, &config.dir, manifest.store_id, &ends)?;
        let holds = gated::holds(&storage, (&config.dir, manifest.store_id), &logs_of(&config, &manifest, &recovered))?;
        let own = recovered.iter().enumerate();
        let own = own.map(|(i, recovered)| own_of(&config, factories, views, ShardId(i as u16), recovered));
        let own: Vec<_> = own.collect::<Result<_, _>>()?;
        let names = (0..config.shards).flat_map(|i| [format!("corelane-sync-{i}"), format!("corelane-shard-{i}")]);
        let names = ["corelane-keeper".into(), "corelane-save".into()].into_iter().chain(names);
        let mut crew = Crew::start(&mut threads, names).map_err(|source| {
            let path = config.dir.clone();
            OpenError::Io { action: "starting a thread for", path, source }
        })?;
        let changes = Changes { storage: &*storage, dir: &config.dir, manifest: &manifest, standing };
        changes.carry_out(&mut recovered, &consumers, &holds, &mut lock)?;
        let quarantine = config.dir.join("quarantine");
        let duration_ns = u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let recovery =
            RecoveryReport { shards: recovered.iter().map(|shard| shard.report.clone()).collect(), duration_ns };

        let clock = Clock::new();
        let keeper = Arc::new(KeeperRequests { signal: Arc::new(Signal::new()), ending: AtomicBool::new(false) });
        let signal = Arc::new(Signal::new());
        let snapshotter = Arc::new(SnapshotterRequests { signal, ending: AtomicBool::new(false) });
        let runner = Arc::new(RunnerRequests::default());
        let cores = assign_cores(&config.pin, config.shards);
        let context = Context {
            config: &config,
            store: manifest.store_id,
            storage: &storage,
            clock: &clock,
            keeper: &keeper,
            snapshotter: &snapshotter,
            quarantine: &quarantine,
        };
        let (mut handles, mut kept, mut shared, mut parts) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut sources = Vec::new();
        for (i, (recovered, own)) in recovered.into_iter().zip(own).enumerate() {
            let built = context.build(ShardId(i as u16), recovered, own);
            handles.push(built.handle);
            kept.push(built.kept);
            sources.push(built.sources);
            shared.push(built.shared);
            parts.push((built.shard, built.syncer));
        }
        let keeper_parts = Keeper {
            shards: kept,
            storage: Arc::clone(&storage),
            requests: Arc::clone(&keeper),
            durability: config.durability,
            retention: config.retention,
            spares_max: config.spares_max,
            began: std::time::Instant::now(),
        };
        let snapshotter_parts = Snapshotter {
            shards: sources,
            storage: Arc::clone(&storage),
            requests: Arc::clone(&snapshotter),
            keeper: Arc::clone(&keeper),
            durability: config.durability,
        };
        let lock: Arc<dyn Lock> = Arc::new(lock);
        let logs = handles.iter().map(|shard| (Arc::clone(&shard.door.log), Arc::clone(&shard.syncer)));
        let services = Services::new(
            Arc::clone(&storage),
            &config.dir,
            Arc::clone(&lock),
            Arc::clone(&keeper),
            logs.collect(),
            config.durability != Durability::OsCache,
            consumers,
        );
        let services = Arc::new(services);
        let closing = Closing {
            shards: handles.iter().map(ClosingShard::of).collect(),
            keeper: Arc::clone(&keeper),
            snapshotter: Arc::clone(&snapshotter),
            services: Arc::clone(&services),
            runner: Arc::clone(&runner),
            threads: Mutex::new(Vec::new()),
        };
        let engine = Self {
            clock,
            recovery,
            shards: handles,
            shared_lanes: shared.into(),
            keeper,
            totals: Mutex::new(Totals::new()),
            runner,
            closing: Arc::new(closing),
            services,
            lock,
            storage: Arc::clone(&storage),
            gates: OpenGates::default(),
            config,
        };
        engine.hold(&holds.from);
        engine.run(&mut crew, move || keeper_parts.run());
        engine.run(&mut crew, move || snapshotter_parts.run());
        for (i, (shard, syncer)) in parts.into_iter().enumerate() {
            engine.run(&mut crew, move || syncer.run());
            let door = Arc::clone(&engine.shards[i].door);
            let (requests, wait, core) = (Arc::clone(&engine.runner), engine.config.wait, cores[i]);
            engine.run(&mut crew, move || run(shard, &door, &requests, wait, core));
        }
        Ok(engine)
    }

    fn run(&self, crew: &mut Crew, body: impl FnOnce() + Send + 'static) {
        let body = move || {
            take_role(Role::Engine);
            body();
        };
        lock(&self.closing.threads).push(crew.run(body));
    }

    /// What opening the store found.
    #[must_use]
    pub fn recovery(&self) -> &RecoveryReport {
        &self.recovery
    }

    /// The configuration in force.
    #[must_use]
    pub fn config(&self) -> &ValidConfig {
        &self.config
    }

    /// A way in for one thread: a lane to every shard. Any number, at any time; dropping it ends its lanes.
    #[must_use]
    pub fn producer(&self) -> Producer<A::Event> {
        let lanes = self.shards.iter().map(|shard| {
            let (tx, ring) = rtrb::RingBuffer::new(self.config.ring_capacity);
            let shared = Arc::new(LaneShared::new(Arc::clone(&shard.door.log), self.config.durability));
            shard.door.lanes.register(&shared);
            if let Err(end) = shard.arriving.push(LaneEnd { ring, shared: Arc::clone(&shared), appended: 0 }) {
                // The shard has ended: nobody may be let in.
                end.shared.close_gate.close();
            }
            shard.door.signal.notify();
            (tx, shared, Arc::clone(&shard.door))
        });
        Producer::new(lanes.collect(), self.clock.clone(), self.config.wait, self.config.event_bytes_max)
    }

    /// A way in that any number of threads may clone and share.
    #[must_use]
    pub fn shared_producer(&self) -> SharedProducer<A::Event> {
        SharedProducer::new(
            Arc::clone(&self.shared_lanes),
            self.clock.clone(),
            self.config.wait,
            self.config.event_bytes_max,
        )
    }

    /// A way to give commands for one thread: a lane to every shard, and one back. Any number, at any time.
    #[must_use]
    pub fn client(&self) -> Client<A> {
        let lanes = self.shards.iter().map(|shard| {
            let (orders_tx, orders) = rtrb::RingBuffer::new(self.config.ring_capacity);
            let (answers, answers_rx) = rtrb::RingBuffer::new(self.config.ring_capacity);
            let shared = Arc::new(LaneShared::of_commands(Arc::clone(&shard.door.log), self.config.durability));
            shard.door.lanes.register(&shared);
            let end = ClientEnd { orders, answers, shared: Arc::clone(&shared), answered: 0 };
            if let Err(end) = shard.arriving_clients.push(end) {
                // The shard has ended: nobody may be let in.
                end.shared.close_gate.close();
            }
            shard.door.signal.notify();
            ClientLane::new(orders_tx, answers_rx, shared, Arc::clone(&shard.door))
        });
        Client::new(lanes.collect(), self.clock.clone(), self.config.wait)
    }

    /// Reads a shard's log from the earliest event held.
    ///
    /// # Panics
    /// When the store has no such shard.
    #[must_use]
    pub fn reader(&self, shard: ShardId) -> Reader<A::Event> {
        Reader::earliest(Arc::clone(&self.shards[usize::from(shard.0)].door.log), Arc::clone(&self.lock))
    }

    /// Reads a shard's log from the record that begins at `offset`.
    ///
    /// # Errors
    /// `BeyondRetention`, `NotARecord`, or what reading found.
    ///
    /// # Panics
    /// When the store has no such shard.
    pub fn reader_at(&self, shard: ShardId, offset: Offset) -> Result<Reader<A::Event>, ReadError> {
        Reader::at(Arc::clone(&self.shards[usize::from(shard.0)].door.log), offset, Arc::clone(&self.lock))
    }

    /// Reads a shard's log from a saved position on.
    ///
    /// # Errors
    /// `Position` where it was not taken in this log, or the log has gone another way since; `BeyondRetention`, or what reading found.
    pub fn reader_from(&self, position: &Position) -> Result<Reader<A::Event>, ReadError> {
        let (shard, shards) = (position.shard(), self.shards.len());
        // A position of a shard that this store does not have is of another store: any shard's log reports that.
        let log = &self.shards[usize::from(shard.0).min(shards - 1)].door.log;
        position.reader(log, &self.lock)
    }

    /// Waits until everything accepted before this call is appended and durable, in every mode, together with everything it depends
    /// on: where retention has freed events in `OsCache`, the checkpoint that stands for them becomes durable first. If a shard
    /// fails, the others are still flushed.
    ///
    /// # Errors
    /// `ShardFailed`, of the first shard that failed; `TimedOut` at `deadline`.
    pub fn flush(&self, deadline: impl Into<Deadline>) -> Result<(), WaitError> {
        let deadline = deadline.into().instant();
        let accepted: Vec<_> = self
            .shards
            .iter()
            .map(|shard| {
                shard
                    .door
                    .lanes
                    .all()
                    .into_iter()
                    .map(|lane| {
                        let published = lane.published.load(Ordering::SeqCst);
                        (lane, published)
                    })
                    .collect::<Vec<_>>()
            })
            .collect();
        // What is appended already can be synced while a slower shard is waited for.
        self.shards.iter().for_each(|shard| shard.syncer.flush(shard.door.log.appended.get()));
        let mut outcome = Ok(());
        for (shard, lanes) in self.shards.iter().zip(accepted) {
            // To the last shard, whatever becomes of one. A failure says more than a deadline.
            match flush_shard(&shard.door, &shard.syncer, lanes, deadline) {
                Err(failed @ WaitError::ShardFailed(_)) if !matches!(outcome, Err(WaitError::ShardFailed(_))) => {
                    outcome = Err(failed);
                }
                flushed => outcome = outcome.and(flushed),
            }
        }
        outcome
    }

    /// All counters and histograms at this moment.
    #[must_use]
    pub fn metrics(&self) -> Metrics {
        let mut totals = lock(&self.totals);
        for shard in &self.shards {
            let [turns, syncs] = &shard.exchanges;
            totals.fetch(turns, || shard.door.signal.notify());
            totals.fetch(syncs, || shard.syncer.signal.notify());
        }
        let shards = self.shards.iter().enumerate().map(|(i, shard)| shard_metrics(ShardId(i as u16), shard)).collect();
        Metrics::new(shards, totals.snapshot())
    }

    /// Counters alone: cheap enough for every second, wakes nobody.
    #[must_use]
    pub fn shard_metrics(&self) -> Vec<ShardMetrics> {
        self.shards.iter().enumerate().map(|(i, shard)| shard_metrics(ShardId(i as u16), shard)).collect()
    }

    /// The failures of shards that have failed.
    #[must_use]
    pub fn failures(&self) -> Vec<ShardFailure> {
        self.shards.iter().filter_map(|shard| shard.door.log.failure().cloned()).collect()
    }

    /// Refuses further events, appends what was accepted, syncs, and joins every thread. A second call is
    /// harmless and returns the same.
    ///
    /// # Errors
    /// The first shard's failure; `TimedOut` when the deadline passes first (the threads then go on, and a
    /// later call or the drop waits again); `OnEngineThread` on a thread of this engine or its consumers, and nothing is closed.
    pub fn shutdown(&self, deadline: impl Into<Deadline>) -> Result<(), WaitError> {
        let deadline = deadline.into().instant();
        if self.closing.is_own_thread() {
            return Err(WaitError::OnEngineThread);
        }
        self.closing.close(deadline)
    }
}

fn shard_metrics<A: Aggregate>(id: ShardId, shard: &Handle<A>) -> ShardMetrics {
    let log = &shard.door.log;
    let mut metrics = ShardMetrics::of(id, &shard.counters);
    let (mut published, mut appended) = (shard.door.lanes.retired_events(), 0);
    appended += published;
    for lane in shard.door.lanes.all().iter().filter(|lane| !lane.is_of_commands()) {
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
