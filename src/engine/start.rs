//! Opening an engine, in order: read everything, make the program's handlers and views, start the threads, repair, and
//! only then run.
//!
//! A store that is refused is left unchanged: everything that can fail, except the changes themselves, comes before the
//! first change.

use std::sync::Arc;
use std::time::Instant;

use super::Engine;
use super::background::{run_keeper, run_snapshotter, run_syncer};
use super::build::{Built, Context, ShardCode, shard_code};
use super::closing::{Closing, ClosingShard};
use super::gate_holds::GateHolds;
use super::handle::Handle;
use super::open::{ManifestChange, Repairs, check_placement, load_manifest, logs_of, recover};
use super::runner::{RunnerRequests, assign_cores, run};
use super::store_lock::StoreLock;
use super::threads::{Crew, Threads};
use crate::background::keeper::{Keeper, KeeperRules, KeptShard};
use crate::background::snapshotter::{ShardSnapshots, Snapshotter, SnapshotterRequests};
use crate::background::syncer::Syncer;
use crate::clock::Clock;
use crate::config::ValidConfig;
use crate::consumer::position_file::{RegisteredConsumer, cut_all};
use crate::consumer::services::Services;
use crate::error::OpenError;
use crate::event::{Offset, ShardId};
use crate::ingress::gated::OpenGates;
use crate::lane::requests::KeeperRequests;
use crate::lane::shared::SharedLane;
use crate::log::manifest::{Manifest, shard_dir};
use crate::metrics::Totals;
use crate::recovery::Recovered;
use crate::recovery::report::RecoveryReport;
use crate::shard::Shard;
use crate::shard::handler::Factory;
use crate::state::aggregate::Aggregate;
use crate::state::view::View;
use crate::storage::{Lock, Storage};
use crate::sync::{AtomicBool, Mutex, Notifier, Role, Signal, lock, take_role};

/// The application's code on the shards' threads.
pub(super) struct Code<A: Aggregate> {
    pub(super) handlers: Vec<Factory<A::Event>>,
    pub(super) views: Vec<Box<dyn View<A>>>,
}

impl<A: Aggregate> Default for Code<A> {
    fn default() -> Self {
        Self { handlers: Vec::new(), views: Vec::new() }
    }
}

/// The contents of a store's files, read before anything is changed.
struct Inspected<A: Aggregate> {
    manifest: Manifest,
    change: ManifestChange,
    recovered: Vec<Recovered<A>>,
    consumers: Vec<RegisteredConsumer>,
    holds: GateHolds,
}

/// Opens the store in `config.dir` and starts its threads.
pub(super) fn start<A: Aggregate>(
    config: ValidConfig,
    code: &Code<A>,
    storage: Arc<dyn Storage>,
    mut threads: Threads,
) -> Result<Engine<A>, OpenError> {
    let began = Instant::now();
    let creating = |source| OpenError::Io { action: "creating", path: config.dir.clone(), source };
    storage.create_dir(&config.dir).map_err(creating)?;
    let mut lock = StoreLock::default();
    lock.take(&*storage, &config.dir)?;
    let mut inspected = Inspected::<A>::read(&storage, &config, &mut lock, &mut threads)?;
    let shard_codes = inspected.recovered.iter().enumerate();
    let shard_codes = shard_codes
        .map(|(i, recovered)| shard_code(&config, &code.handlers, &code.views, ShardId(i as u16), recovered));
    let shard_codes: Vec<ShardCode<A>> = shard_codes.collect::<Result<_, _>>()?;
    let mut crew = start_crew(&config, &mut threads)?;
    inspected.repair(&*storage, &config, &mut lock)?;
    let duration_ns = u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX);
    let reports = inspected.recovered.iter().map(|shard| shard.report.clone()).collect();
    let recovery = RecoveryReport { shards: reports, duration_ns };
    let Inspected { manifest, recovered, consumers, holds, .. } = inspected;
    let parts = Parts::build(&config, &storage, manifest.store_id, recovered, shard_codes);
    let (engine, loops) = parts.assemble(config, storage, Arc::new(lock), recovery, consumers);
    engine.hold(&holds.from);
    loops.run(&engine, &mut crew);
    Ok(engine)
}

impl<A: Aggregate> Inspected<A> {
    /// Reads the manifest, locks the shards' folders, and reads the logs and the positions of consumers and gates.
    fn read(
        storage: &Arc<dyn Storage>,
        config: &ValidConfig,
        lock: &mut StoreLock,
        threads: &mut Threads,
    ) -> Result<Self, OpenError> {
        let (manifest, change) = load_manifest::<A::Event>(&**storage, config)?;
        let is_new = change == ManifestChange::NewStore;
        if !is_new {
            let mut shard_dirs = (0..config.shards).map(|shard| shard_dir(&config.dir, ShardId(shard)));
            shard_dirs.try_for_each(|dir| lock.take(&**storage, &dir))?;
        }
        let recovered = recover::<A>(storage, config, &manifest, is_new, threads)?;
        check_placement(config, &recovered)?;
        let ends: Vec<Offset> = recovered.iter().map(|shard| shard.report.end).collect();
        let consumers = cut_all(&**storage, &config.dir, manifest.store_id, &ends)?;
        let logs = logs_of(config, &manifest, &recovered);
        let holds = GateHolds::read(storage, (&config.dir, manifest.store_id), &logs)?;
        Ok(Self { manifest, change, recovered, consumers, holds })
    }

    /// Brings the files into the state that the engine needs before it appends anything.
    fn repair(&mut self, storage: &dyn Storage, config: &ValidConfig, lock: &mut StoreLock) -> Result<(), OpenError> {
        let repairs = Repairs { storage, dir: &config.dir, manifest: &self.manifest, change: self.change };
        repairs.carry_out(&mut self.recovered, &self.consumers, &self.holds, lock)
    }
}

/// Starts every thread that the engine needs. They wait for their work until [`Loops::run`] hands it out in the same
/// order.
fn start_crew(config: &ValidConfig, threads: &mut Threads) -> Result<Crew, OpenError> {
    let names = (0..config.shards).flat_map(|i| [format!("corelane-sync-{i}"), format!("corelane-shard-{i}")]);
    let names = ["corelane-notify", "corelane-keeper", "corelane-save"].map(String::from).into_iter().chain(names);
    Crew::start(threads, names).map_err(|source| {
        let path = config.dir.clone();
        OpenError::Io { action: "starting a thread for", path, source }
    })
}

/// The parts of all shards, and the mailboxes that they share.
struct Parts<A: Aggregate> {
    clock: Clock,
    notifier: Arc<Notifier>,
    keeper: Arc<KeeperRequests>,
    snapshotter: Arc<SnapshotterRequests>,
    handles: Vec<Handle<A>>,
    shared_lanes: Vec<Arc<SharedLane<A::Event>>>,
    kept: Vec<KeptShard>,
    snapshots: Vec<ShardSnapshots>,
    shards: Vec<(Shard<A>, Syncer)>,
}

impl<A: Aggregate> Parts<A> {
    fn build(
        config: &ValidConfig,
        storage: &Arc<dyn Storage>,
        store: u64,
        recovered: Vec<Recovered<A>>,
        codes: Vec<ShardCode<A>>,
    ) -> Self {
        let signal = || Arc::new(Signal::new());
        let mut parts = Self {
            clock: Clock::new(),
            notifier: Arc::default(),
            keeper: Arc::new(KeeperRequests::new()),
            snapshotter: Arc::new(SnapshotterRequests { signal: signal(), ending: AtomicBool::new(false) }),
            handles: Vec::new(),
            shared_lanes: Vec::new(),
            kept: Vec::new(),
            snapshots: Vec::new(),
            shards: Vec::new(),
        };
        let (clock, notifier) = (parts.clock.clone(), Arc::clone(&parts.notifier));
        let (keeper, snapshotter) = (Arc::clone(&parts.keeper), Arc::clone(&parts.snapshotter));
        let context = Context {
            config,
            store,
            storage,
            clock: &clock,
            keeper: &keeper,
            snapshotter: &snapshotter,
            quarantine: &config.dir.join("quarantine"),
            notifier: &notifier,
        };
        for (i, (recovered, code)) in recovered.into_iter().zip(codes).enumerate() {
            let Built { handle, kept, snapshots, shared, shard, syncer } =
                context.build(ShardId(i as u16), recovered, code);
            parts.handles.push(handle);
            parts.shared_lanes.push(shared);
            parts.kept.push(kept);
            parts.snapshots.push(snapshots);
            parts.shards.push((shard, syncer));
        }
        parts
    }

    /// Makes the engine, and the loops that its threads will run.
    fn assemble(
        self,
        config: ValidConfig,
        storage: Arc<dyn Storage>,
        lock: Arc<dyn Lock>,
        recovery: RecoveryReport,
        consumers: Vec<RegisteredConsumer>,
    ) -> (Engine<A>, Loops<A>) {
        let rules =
            KeeperRules { durability: config.durability, retention: config.retention, spares_max: config.spares_max };
        let keeper = Keeper::new(rules, &storage, Arc::clone(&self.keeper), self.kept);
        let snapshotter = Snapshotter {
            shards: self.snapshots,
            storage: Arc::clone(&storage),
            requests: Arc::clone(&self.snapshotter),
            keeper: Arc::clone(&self.keeper),
            durability: config.durability,
        };
        let logs = self.handles.iter().map(|shard| (Arc::clone(&shard.door.log), Arc::clone(&shard.syncer)));
        let services = Arc::new(Services::new(
            Arc::clone(&storage),
            &config,
            Arc::clone(&lock),
            Arc::clone(&self.keeper),
            logs.collect(),
            consumers,
        ));
        let closing = Closing {
            shards: self.handles.iter().map(ClosingShard::of).collect(),
            notifier: Arc::clone(&self.notifier),
            keeper: Arc::clone(&self.keeper),
            snapshotter: self.snapshotter,
            services: Arc::clone(&services),
            runner: Arc::new(RunnerRequests::default()),
            threads: Mutex::new(Vec::new()),
        };
        let engine = Engine {
            clock: self.clock,
            recovery,
            shards: self.handles,
            shared_lanes: self.shared_lanes.into(),
            keeper: self.keeper,
            totals: Mutex::new(Totals::new()),
            closing: Arc::new(closing),
            services,
            lock,
            storage,
            gates: OpenGates::default(),
            config,
        };
        (engine, Loops { notifier: self.notifier, keeper, snapshotter, shards: self.shards })
    }
}

/// The loops of an engine's threads.
struct Loops<A: Aggregate> {
    notifier: Arc<Notifier>,
    keeper: Keeper,
    snapshotter: Snapshotter,
    shards: Vec<(Shard<A>, Syncer)>,
}

impl<A: Aggregate> Loops<A> {
    /// Hands the loops to the threads of [`start_crew`], in the order of their names.
    fn run(self, engine: &Engine<A>, crew: &mut Crew) {
        let Self { notifier, keeper, snapshotter, shards } = self;
        let cores = assign_cores(&engine.config.pin, engine.config.shards);
        engine.run(crew, move || notifier.run());
        engine.run(crew, move || run_keeper(keeper));
        engine.run(crew, move || run_snapshotter(snapshotter));
        for (i, (shard, syncer)) in shards.into_iter().enumerate() {
            engine.run(crew, move || run_syncer(syncer));
            let door = Arc::clone(&engine.shards[i].door);
            let (requests, wait, core) = (Arc::clone(&engine.closing.runner), engine.config.wait, cores[i]);
            engine.run(crew, move || run(shard, &door, &requests, wait, core));
        }
    }
}

impl<A: Aggregate> Engine<A> {
    fn run(&self, crew: &mut Crew, body: impl FnOnce() + Send + 'static) {
        let body = move || {
            take_role(Role::Engine);
            body();
        };
        lock(&self.closing.threads).push(crew.run(body));
    }
}
