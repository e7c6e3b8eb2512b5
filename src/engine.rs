//! The composition root: opens a store, starts its threads, stops them. The only module that knows all.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crossbeam::queue::ArrayQueue;

use crate::clock::Clock;
use crate::config::{Checked, Config, Durability};
use crate::error::{OpenError, ReadError, ShardFailure, WaitError};
use crate::event::{Event, Offset, ShardId};
use crate::handler::{Factory, Handler, OnError, Registered};
use crate::log::format::schema_fingerprint;
use crate::log::keeper::{Keeper, KeeperRequests, Kept};
use crate::log::manifest::{Manifest, shard_dir};
use crate::log::reader::Reader;
use crate::log::recovery::{Opening, Recovered, RecoveryReport};
use crate::log::segment::ShardLog;
use crate::log::storage::{Files, Lock, Storage};
use crate::log::syncer::{SyncMark, SyncRequests, Syncer};
use crate::log::writer::Writer;
use crate::metrics::{Counters, Exchange, Metrics, Recorder, ShardMetrics, Stage, Totals};
use crate::producer::{LaneRegistry, LaneShared, Producer, ShardDoor, block_until};
use crate::runner::{RunnerRequests, assign_cores, run};
use crate::shard::{LaneEnd, Shard, Work};
use crate::shared::{SharedLane, SharedProducer};
use crate::sync::{Arc, Arrivals, AtomicBool, Mutex, Ordering, Signal, lock, lock_until, thread};

/// Slots for runs of events between a shard and its syncer.
const SYNC_MARKS: usize = 1 << 16;

/// One store, open and running: the shards' threads, their syncers, and the keeper.
///
/// Dropping it shuts it down, giving up after ten seconds on what a full disk keeps from being appended.
pub struct Engine<E: Event> {
    config: Checked,
    clock: Clock,
    recovery: RecoveryReport,
    shards: Vec<Handle<E>>,
    shared_lanes: std::sync::Arc<[std::sync::Arc<SharedLane<E>>]>,
    keeper: std::sync::Arc<KeeperRequests>,
    totals: Mutex<Totals>,
    threads: Mutex<Vec<thread::JoinHandle<()>>>,
    runner: std::sync::Arc<RunnerRequests>,
    /// Shared with readers: while one lives, its segments are nobody else's to write.
    lock: std::sync::Arc<dyn Lock>,
}

/// What the engine keeps of a running shard.
struct Handle<E> {
    door: std::sync::Arc<ShardDoor>,
    arriving: std::sync::Arc<Arrivals<LaneEnd<E>>>,
    syncer: std::sync::Arc<SyncRequests>,
    counters: std::sync::Arc<Counters>,
    exchanges: [std::sync::Arc<Exchange>; 2],
}

impl<E: Event> std::fmt::Debug for Engine<E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine")
            .field("dir", &self.config.dir)
            .field("shards", &self.shards.len())
            .finish_non_exhaustive()
    }
}

/// An engine about to be opened, with its inline handlers.
pub struct Builder<E: Event> {
    config: Config,
    handlers: Vec<Factory<E>>,
    storage: std::sync::Arc<dyn Storage>,
    threads_max: usize,
}

impl<E: Event> std::fmt::Debug for Builder<E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Builder")
            .field("config", &self.config)
            .field("handlers", &self.handlers.len())
            .finish_non_exhaustive()
    }
}

impl<E: Event> Builder<E> {
    /// Adds an inline handler: `make` is called once per shard, when the engine opens. Handlers run in the order added.
    #[must_use]
    pub fn handler<H: Handler<E> + 'static>(
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

    /// Puts the store on a storage that fails on purpose, for tests.
    #[must_use]
    pub fn faulty_storage(mut self, storage: &crate::testing::FaultyStorage) -> Self {
        self.storage = std::sync::Arc::new(storage.clone());
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
    pub fn open(self) -> Result<Engine<E>, OpenError> {
        Engine::start(self.config.validate()?, &self.handlers, self.storage, Threads { left: self.threads_max })
    }
}

impl<E: Event> Engine<E> {
    /// Opens (or creates) the store that `config` names. `recovery()` says what was found.
    ///
    /// # Errors
    /// Why it could not be opened. No byte of an existing store was changed, except that a torn tail may have been cut.
    pub fn open(config: Config) -> Result<Self, OpenError> {
        Self::builder(config).open()
    }

    /// To add inline handlers before opening.
    pub fn builder(config: Config) -> Builder<E> {
        Builder { config, handlers: Vec::new(), storage: std::sync::Arc::new(Files), threads_max: usize::MAX }
    }

    fn start(
        config: Checked,
        factories: &[Factory<E>],
        storage: std::sync::Arc<dyn Storage>,
        mut threads: Threads,
    ) -> Result<Self, OpenError> {
        let began = Instant::now();
        let lock = lock_store(&*storage, &config)?;
        let (manifest, is_extended) = load_manifest::<E>(&*storage, &config)?;
        let quarantine = config.dir.join("quarantine");
        let recovered = recover::<E>(&*storage, &config, &manifest, &quarantine, &mut threads)?;
        if is_extended {
            // Only now: a program whose types the log refuses leaves the manifest as it was.
            manifest.save(&*storage, &config.dir)?;
        }
        let duration_ns = u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let recovery =
            RecoveryReport { shards: recovered.iter().map(|shard| shard.report.clone()).collect(), duration_ns };

        let clock = Clock::new();
        let keeper = std::sync::Arc::new(KeeperRequests { signal: Signal::new(), ending: AtomicBool::new(false) });
        let runner = std::sync::Arc::new(RunnerRequests::default());
        let cores = assign_cores(&config.pin, config.shards);
        let context = Context {
            config: &config,
            storage: &storage,
            clock: &clock,
            keeper: &keeper,
            quarantine: &quarantine,
            factories,
        };
        let (mut handles, mut kept, mut shared, mut parts) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for (i, recovered) in recovered.into_iter().enumerate() {
            let built = context.build(ShardId(i as u16), recovered);
            handles.push(built.handle);
            kept.push(built.kept);
            shared.push(built.shared);
            parts.push((built.shard, built.syncer));
        }
        let keeper_parts = Keeper {
            shards: kept,
            storage: std::sync::Arc::clone(&storage),
            requests: std::sync::Arc::clone(&keeper),
            durability: config.durability,
            retention: config.retention,
            spares_max: config.spares_max,
        };
        let engine = Self {
            clock,
            recovery,
            shards: handles,
            shared_lanes: shared.into(),
            keeper,
            totals: Mutex::new(Totals::new()),
            threads: Mutex::new(Vec::new()),
            runner,
            lock: lock.into(),
            config,
        };
        engine.spawn(&mut threads, "corelane-keeper".into(), move || keeper_parts.run())?;
        for (i, (shard, syncer)) in parts.into_iter().enumerate() {
            engine.spawn_shard(&mut threads, i, cores[i], shard, syncer).inspect_err(|_| {
                // A syncer ends when its shard says so, and this one has none.
                engine.shards[i].syncer.ending.store(true, Ordering::SeqCst);
                engine.shards[i].syncer.signal.notify();
            })?;
        }
        Ok(engine)
    }

    fn spawn_shard(
        &self,
        threads: &mut Threads,
        i: usize,
        core: Option<usize>,
        shard: Shard<E>,
        syncer: Syncer,
    ) -> Result<(), OpenError> {
        self.spawn(threads, format!("corelane-sync-{i}"), move || syncer.run())?;
        let (door, requests) = (std::sync::Arc::clone(&self.shards[i].door), std::sync::Arc::clone(&self.runner));
        let wait = self.config.wait;
        self.spawn(threads, format!("corelane-shard-{i}"), move || run(shard, &door, &requests, wait, core))
    }

    fn spawn(
        &self,
        threads: &mut Threads,
        name: String,
        body: impl FnOnce() + Send + 'static,
    ) -> Result<(), OpenError> {
        let thread = threads.named(name).and_then(|thread| thread.spawn(body));
        let thread = thread.map_err(|source| OpenError::Io {
            action: "starting a thread for",
            path: self.config.dir.clone(),
            source,
        })?;
        lock(&self.threads).push(thread);
        Ok(())
    }

    /// What opening the store found.
    #[must_use]
    pub fn recovery(&self) -> &RecoveryReport {
        &self.recovery
    }

    /// The configuration in force.
    #[must_use]
    pub fn config(&self) -> &Checked {
        &self.config
    }

    /// A way in for one thread: a lane to every shard. Any number, at any time; dropping it ends its lanes.
    #[must_use]
    pub fn producer(&self) -> Producer<E> {
        let lanes = self.shards.iter().map(|shard| {
            let (tx, ring) = rtrb::RingBuffer::new(self.config.ring_capacity);
            let shared = Arc::new(LaneShared::new(Arc::clone(&shard.door.log), self.config.durability));
            shard.door.lanes.register(&shared);
            if let Err(end) = shard.arriving.push(LaneEnd { ring, shared: Arc::clone(&shared), appended: 0 }) {
                // The shard has ended: nobody may be let in.
                end.shared.gate.close();
            }
            shard.door.signal.notify();
            (tx, shared, std::sync::Arc::clone(&shard.door))
        });
        Producer::new(lanes.collect(), self.clock.clone(), self.config.wait, self.config.event_bytes_max)
    }

    /// A way in that any number of threads may clone and share.
    #[must_use]
    pub fn shared_producer(&self) -> SharedProducer<E> {
        SharedProducer::new(
            std::sync::Arc::clone(&self.shared_lanes),
            self.clock.clone(),
            self.config.wait,
            self.config.event_bytes_max,
        )
    }

    /// Reads a shard's log from the earliest event held.
    ///
    /// # Panics
    /// When the store has no such shard.
    #[must_use]
    pub fn reader(&self, shard: ShardId) -> Reader<E> {
        Reader::earliest(Arc::clone(&self.shards[usize::from(shard.0)].door.log), std::sync::Arc::clone(&self.lock))
    }

    /// Reads a shard's log from the record that begins at `offset`.
    ///
    /// # Errors
    /// `BeyondRetention`, `NotARecord`, or what reading found.
    ///
    /// # Panics
    /// When the store has no such shard.
    pub fn reader_at(&self, shard: ShardId, offset: Offset) -> Result<Reader<E>, ReadError> {
        Reader::at(Arc::clone(&self.shards[usize::from(shard.0)].door.log), offset, std::sync::Arc::clone(&self.lock))
    }

    /// Waits until everything accepted before this call is appended and durable, in every mode. Where a shard fails, the
    /// others are still flushed.
    ///
    /// # Errors
    /// `ShardFailed`, of the first shard that failed; `TimedOut` at `deadline`.
    pub fn flush(&self, deadline: Option<Instant>) -> Result<(), WaitError> {
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
            match flush_shard(shard, lanes, deadline) {
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
    /// later call or the drop waits again).
    pub fn shutdown(&self, deadline: Option<Instant>) -> Result<(), WaitError> {
        for shard in &self.shards {
            shard.door.closing.store(true, Ordering::SeqCst);
            shard.door.signal.notify();
        }
        // Another caller may hold the list for as long as it waits.
        let Some(mut threads) = lock_until(&self.threads, deadline) else { return Err(WaitError::TimedOut) };
        // The keeper, which was started first, goes last: the shards may need segments to the end.
        while threads.len() > 1 {
            if !join_until(&mut threads, deadline) {
                return Err(WaitError::TimedOut);
            }
        }
        self.keeper.ending.store(true, Ordering::SeqCst);
        self.keeper.signal.notify();
        while !threads.is_empty() {
            if !join_until(&mut threads, deadline) {
                return Err(WaitError::TimedOut);
            }
        }
        match self.failures().into_iter().next() {
            Some(failure) => Err(failure.into()),
            None => Ok(()),
        }
    }
}

/// How long a flush waits for a lane to be told, before it asks again.
const SETTLE_EVERY: Duration = Duration::from_millis(1);

/// Waits until so many events of each of a shard's lanes are appended and durable.
fn flush_shard<E>(
    shard: &Handle<E>,
    lanes: Vec<(Arc<LaneShared>, u64)>,
    deadline: Option<Instant>,
) -> Result<(), WaitError> {
    let failed = || shard.door.log.failure().map(|failure| Err(failure.clone().into()));
    let mut counted = Vec::with_capacity(lanes.len());
    for (lane, published) in lanes {
        let reached = || if lane.is_appended(published) { Some(Ok(())) } else { failed() };
        block_until(deadline, |waker| lane.register_appended(published, waker), reached)?;
        counted.push((lane.appended_count(), lane));
    }
    let end = shard.door.log.appended.get();
    shard.syncer.flush(end);
    let reached = || if shard.door.log.durable.get() >= end { Some(Ok(())) } else { failed() };
    block_until(deadline, |waker| shard.door.lanes.waiting_flush().register(end, waker), reached)?;
    for (count, lane) in counted {
        // A sync may have covered an event before its lane counted it; the next one tells the lane, or the syncer where
        // nothing is left to sync. Asked for again and again: the one under way may have looked at the lanes too early
        // as well. Never beyond what is appended: a syncer that waits for that could not sleep.
        while lane.durable_count() < count {
            shard.syncer.flush(shard.door.log.appended.get());
            let soon = Instant::now() + SETTLE_EVERY;
            let reached = || if lane.durable_count() >= count { Some(Ok(())) } else { failed() };
            let settled = block_until(
                Some(deadline.map_or(soon, |deadline| deadline.min(soon))),
                |waker| lane.register_durable(count, waker),
                reached,
            );
            match settled {
                Err(WaitError::TimedOut) if deadline.is_none_or(|deadline| Instant::now() < deadline) => {}
                settled => settled?,
            }
        }
    }
    Ok(())
}

/// How many threads the system will still start; as many as it can, outside of tests.
struct Threads {
    left: usize,
}

impl Threads {
    fn named(&mut self, name: String) -> std::io::Result<std::thread::Builder> {
        self.left = self.left.checked_sub(1).ok_or(std::io::ErrorKind::WouldBlock)?;
        Ok(std::thread::Builder::new().name(name))
    }
}

/// Joins the last thread of the list, or gives up at the deadline.
fn join_until(threads: &mut Vec<thread::JoinHandle<()>>, deadline: Option<Instant>) -> bool {
    let Some(last) = threads.last() else { return true };
    while let Some(deadline) = deadline
        && !last.is_finished()
    {
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    if let Some(last) = threads.pop()
        && last.join().is_err()
    {
        tracing::error!("a thread of the engine panicked outside a turn");
    }
    true
}

impl<E: Event> Drop for Engine<E> {
    fn drop(&mut self) {
        // Ten seconds for a disk that is full now; then what cannot be appended is given up, and said so.
        if let Err(WaitError::TimedOut) = self.shutdown(Some(Instant::now() + Duration::from_secs(10))) {
            self.runner.abandon.store(true, Ordering::SeqCst);
            self.shards.iter().for_each(|shard| shard.door.signal.notify());
            if let Err(error) = self.shutdown(None) {
                tracing::error!(%error, "the engine was dropped before everything accepted was appended");
            }
        }
    }
}

fn shard_metrics<E>(id: ShardId, shard: &Handle<E>) -> ShardMetrics {
    let log = &shard.door.log;
    let mut metrics = ShardMetrics::of(id, &shard.counters);
    let (mut published, mut appended) = (shard.door.lanes.retired_events(), 0);
    appended += published;
    for lane in shard.door.lanes.all() {
        appended += lane.appended_count();
        published += lane.published.load(Ordering::Relaxed);
    }
    metrics.published = published;
    metrics.backlog = published.saturating_sub(appended);
    metrics.appended_to = Offset(log.appended.get());
    metrics.durable_to = Offset(log.durable.get());
    metrics.segments = log.segments_len();
    metrics.storage_full = log.storage_full.load(Ordering::Relaxed);
    metrics.failure = log.failure().cloned();
    metrics
}

fn lock_store(storage: &dyn Storage, config: &Checked) -> Result<Box<dyn Lock>, OpenError> {
    let dir = &config.dir;
    let io = |action, path: PathBuf| move |source| OpenError::Io { action, path, source };
    storage.create_dir(dir).map_err(io("creating", dir.clone()))?;
    let path = dir.join("lock");
    match storage.lock(&path).map_err(io("locking", path.clone()))? {
        Some(lock) => Ok(lock),
        None => Err(OpenError::Locked { dir: dir.clone() }),
    }
}

/// The store's manifest: as it is, extended by types that are new (`true`: still to be saved), or written for a new store.
fn load_manifest<E: Event>(storage: &dyn Storage, config: &Checked) -> Result<(Manifest, bool), OpenError> {
    let dir = &config.dir;
    let stored = Manifest::load(storage, dir)?;
    let is_new = stored.is_none();
    if is_new {
        let list = |path: &PathBuf| {
            storage.list(path).map_err(|source| OpenError::Io { action: "listing", path: path.clone(), source })
        };
        for name in list(dir)?.iter().filter(|name| name.starts_with("shard-")) {
            // Empty folders are what a crash leaves of a store that was being created.
            if !list(&dir.join(name))?.is_empty() {
                return Err(OpenError::ForeignFile {
                    path: dir.join(crate::log::manifest::MANIFEST),
                    why: "there are shards, but the manifest is missing",
                });
            }
        }
    }
    let mut manifest =
        stored.unwrap_or(Manifest { shards: config.shards, segment_bytes: config.segment_bytes, types: Vec::new() });
    if manifest.shards != config.shards {
        return Err(OpenError::ShardCount { stored: manifest.shards, asked: config.shards });
    }
    if manifest.segment_bytes != config.segment_bytes {
        return Err(OpenError::SegmentBytes { stored: manifest.segment_bytes, asked: config.segment_bytes });
    }
    let changed = manifest.declare::<E>()?;
    if is_new {
        // Folders before the manifest that promises them. A crash in between leaves empty folders, which
        // the next attempt must accept.
        for shard in 0..config.shards {
            let path = shard_dir(dir, ShardId(shard));
            storage.create_dir(&path).map_err(|source| OpenError::Io { action: "creating", path, source })?;
        }
    }
    if is_new {
        manifest.save(storage, dir)?;
    }
    Ok((manifest, changed && !is_new))
}

/// Recovers all shards, side by side.
fn recover<E: Event>(
    storage: &dyn Storage,
    config: &Checked,
    manifest: &Manifest,
    quarantine: &std::path::Path,
    threads: &mut Threads,
) -> Result<Vec<Recovered>, OpenError> {
    let known = |id: u16, schema: u16| E::TYPES.iter().any(|t| t.id.0 == id && t.schema_version == schema);
    let helpers = crate::sync::cores().min(usize::from(config.shards)) - 1;
    let next = std::sync::atomic::AtomicUsize::new(0);
    let results: Mutex<VecDeque<(usize, Result<Recovered, OpenError>)>> = Mutex::new(VecDeque::new());
    let work = || {
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            if i >= usize::from(config.shards) {
                break;
            }
            let dir = shard_dir(&config.dir, ShardId(i as u16));
            let opening = Opening {
                storage,
                dir: &dir,
                quarantine,
                shard: ShardId(i as u16),
                manifest,
                keys_expected: config.keys_expected,
                known: &known,
            };
            let result = opening.recover();
            lock(&results).push_back((i, result));
        }
    };
    std::thread::scope(|scope| {
        for i in 0..helpers {
            let helper = threads.named(format!("corelane-open-{i}"));
            if let Err(error) = helper.and_then(|helper| helper.spawn_scoped(scope, work)) {
                tracing::warn!(%error, "no thread to help opening the shards; it takes longer");
            }
        }
        work();
    });
    let mut results: Vec<_> = std::mem::take(&mut *lock(&results)).into();
    results.sort_by_key(|(i, _)| *i);
    results.into_iter().map(|(_, result)| result).collect()
}

/// What every shard is built from.
struct Context<'a, E: Event> {
    config: &'a Checked,
    storage: &'a std::sync::Arc<dyn Storage>,
    clock: &'a Clock,
    keeper: &'a std::sync::Arc<KeeperRequests>,
    quarantine: &'a std::path::Path,
    factories: &'a [Factory<E>],
}

struct Built<E: Event> {
    handle: Handle<E>,
    kept: Kept,
    shared: std::sync::Arc<SharedLane<E>>,
    shard: Shard<E>,
    syncer: Syncer,
}

impl<E: Event> Context<'_, E> {
    fn build(&self, id: ShardId, recovered: Recovered) -> Built<E> {
        let config = self.config;
        let Recovered { report, segments, resume, keys, span, unused, spares } = recovered;
        let dir = shard_dir(&config.dir, id);
        let log = Arc::new(ShardLog::new(id, dir, config.segment_bytes, report.end, resume.sequence, segments));
        let signal = std::sync::Arc::new(Signal::new());
        let lanes = std::sync::Arc::new(LaneRegistry::default());
        let door = std::sync::Arc::new(ShardDoor {
            log: Arc::clone(&log),
            signal: std::sync::Arc::clone(&signal),
            closing: AtomicBool::new(false),
            lanes: std::sync::Arc::clone(&lanes),
        });
        let shared_end = Arc::new(LaneShared::new(Arc::clone(&log), config.durability));
        lanes.register(&shared_end);
        let shared = std::sync::Arc::new(SharedLane {
            queue: ArrayQueue::new(config.ring_capacity),
            shared: shared_end,
            door: std::sync::Arc::clone(&door),
        });
        let arriving = std::sync::Arc::new(Arrivals::new());
        let syncer = std::sync::Arc::new(SyncRequests::new());
        let counters = std::sync::Arc::new(Counters::default());
        let prepared = std::sync::Arc::new(ArrayQueue::new(1));
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
        let (marks_tx, marks_rx) = rtrb::RingBuffer::<SyncMark>::new(SYNC_MARKS);
        let kept = Kept {
            log: Arc::clone(&log),
            prepared: std::sync::Arc::clone(&prepared),
            counters: std::sync::Arc::clone(&counters),
            shard_signal: std::sync::Arc::clone(&signal),
            next_index: resume.next_index,
            span,
            spare_number: 0,
            spares: Vec::new(),
            retiring: Vec::new(),
            prefaulted: (u64::MAX, 0),
            retry_at: None,
        }
        .with_leftovers(unused, spares);
        let shard = Shard {
            id,
            clock: self.clock.clone(),
            batch_max: config.batch_max,
            arriving: std::sync::Arc::clone(&arriving),
            lanes: Vec::new(),
            shared_lane: std::sync::Arc::clone(&shared),
            keys,
            writer: Writer::new(Arc::clone(&log), prepared, resume, schema_fingerprint::<E>(), config.event_bytes_max),
            log: Arc::clone(&log),
            syncer: std::sync::Arc::clone(&syncer),
            syncs: config.durability != Durability::OsCache,
            sync_marks: (config.durability != Durability::OsCache && config.latency).then_some(marks_tx),
            keeper: std::sync::Arc::clone(self.keeper),
            handlers: self.factories.iter().map(|make| make(id)).collect(),
            storage: std::sync::Arc::clone(self.storage),
            quarantine: self.quarantine.to_owned(),
            recorder,
            counters: std::sync::Arc::clone(&counters),
            work: Work::new(config.batch_max),
        };
        let shard_signal = std::sync::Arc::clone(&door.signal);
        let syncer_parts = Syncer {
            log,
            storage: std::sync::Arc::clone(self.storage),
            requests: std::sync::Arc::clone(&syncer),
            lanes,
            shard_signal,
            durability: config.durability,
            marks: marks_rx,
            recorder: sync_recorder,
            counters: std::sync::Arc::clone(&counters),
            clock: self.clock.clone(),
        };
        let handle = Handle { door, arriving, syncer, counters, exchanges: [turn_exchange, sync_exchange] };
        Built { handle, kept, shared, shard, syncer: syncer_parts }
    }
}
