//! The consumers of a store: which are registered, which run, and which part of the log each still needs.
//!
//! A consumer is registered by its position file. From then on retention keeps its unfinished events, whether it runs
//! or not, until it is removed.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use super::assigned_shard::{AssignedShard, start_position};
use super::dead_letter::answer::LetterStatistics;
use super::dead_letter::{FileEnd, statistics_of};
use super::error::{ConsumerError, ConsumerFailure};
use super::life::Life;
use super::position_file::{ConsumerPosition, RegisteredConsumer, clear, consumers_dir};
use super::report::ConsumerReport;
use super::settings::Start;
use crate::config::{Durability, ValidConfig};
use crate::error::{OpenError, WaitError};
use crate::event::{Event, Offset, Router};
use crate::lane::requests::KeeperRequests;
use crate::lane::requests::SyncRequests;
use crate::log::holds::Hold;
use crate::log::manifest::is_folder_name;
use crate::log::segment::ShardLog;
use crate::storage::{Lock, Storage};
use crate::sync::{Mutex, lock};

/// A consumer that has threads.
pub(crate) trait Running: Send + Sync {
    /// Returns the life of its driving thread.
    fn life(&self) -> &Life;
    /// Returns a report of the consumer.
    fn report(&self) -> ConsumerReport;
    /// Waits until the consumer has handled or recorded every event that is visible now.
    ///
    /// # Errors
    /// `Wait` with `TimedOut` at the deadline, and with `OnEngineThread` on the consumer's own threads; `Ended`.
    fn drain(&self, deadline: Option<Instant>) -> Result<(), ConsumerError>;
}

/// A registered consumer.
struct Known {
    holds: Vec<Arc<Hold>>,
    /// `true` if threads or a poller drive it.
    is_driven: bool,
    running: Option<Arc<dyn Running>>,
    /// The last report of its poller, if it has one.
    shown: Option<Arc<Mutex<ConsumerReport>>>,
    /// The reason why it ended by itself, or why its last start failed.
    failure: Option<ConsumerFailure>,
    /// Its dead letters while it does not run. Read on first use.
    letters: Option<LetterStatistics>,
}

impl Known {
    fn registered(holds: Vec<Arc<Hold>>) -> Self {
        Self { holds, is_driven: false, running: None, shown: None, failure: None, letters: None }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Closed {
    No,
    /// No consumer can be started.
    Yes,
    /// As `Yes`, and consumers that hang are not waited for.
    Abandoned,
}

/// All consumers of an engine.
pub(crate) struct Services {
    pub(crate) storage: Arc<dyn Storage>,
    store: PathBuf,
    lock: Arc<dyn Lock>,
    keeper: Arc<KeeperRequests>,
    shards: Vec<(Arc<ShardLog>, Arc<SyncRequests>)>,
    router: Router,
    /// `true` if the durability mode syncs by itself.
    pub(crate) syncs: bool,
    known: Mutex<BTreeMap<String, Known>>,
    /// Says whether the engine has been shut down.
    closed: Mutex<Closed>,
}

impl std::fmt::Debug for Services {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Services").field("store", &self.store).finish_non_exhaustive()
    }
}

impl Services {
    /// Returns the consumers of an engine that is being opened; `known` is the saved state of each.
    pub(crate) fn new(
        storage: Arc<dyn Storage>,
        config: &ValidConfig,
        lock: Arc<dyn Lock>,
        keeper: Arc<KeeperRequests>,
        shards: Vec<(Arc<ShardLog>, Arc<SyncRequests>)>,
        known: Vec<RegisteredConsumer>,
    ) -> Self {
        let register = |RegisteredConsumer { name, position, .. }: RegisteredConsumer| {
            let holds = shards.iter().zip(&position.shards);
            let holds = holds
                .map(|((log, _), progress)| log.holds.hold(&hold_name(&name), progress.position, &keeper.signal))
                .collect();
            (name, Known::registered(holds))
        };
        let known = known.into_iter().map(register).collect();
        let (known, closed) = (Mutex::new(known), Mutex::new(Closed::No));
        let (store, router, syncs) = (config.dir.clone(), config.router(), config.durability != Durability::OsCache);
        Self { storage, store, lock, keeper, shards, router, syncs, known, closed }
    }

    pub(crate) fn router(&self) -> Router {
        self.router
    }

    /// Returns a number that no other living engine has.
    pub(crate) fn identity(&self) -> usize {
        std::ptr::from_ref(self).addr()
    }

    pub(crate) fn dir(&self, name: &str) -> PathBuf {
        consumers_dir(&self.store).join(name)
    }

    /// Marks a consumer as driven, and registers it if it is new. A new position file is durable before this returns.
    /// Returns the shards with the consumer's progress, and the end of its durable dead letters.
    pub(crate) fn drive<E: Event>(
        &self,
        name: &str,
        start: Start,
    ) -> Result<(Vec<AssignedShard>, FileEnd), ConsumerError> {
        if !is_folder_name(name) {
            return Err(ConsumerError::Name { name: name.to_owned() });
        }
        if *lock(&self.closed) != Closed::No {
            return Err(ConsumerError::Closed);
        }
        let mut known = lock(&self.known);
        if known.get(name).is_some_and(|known| known.is_driven) {
            return Err(ConsumerError::AlreadyRunning { name: name.to_owned() });
        }
        let position = self.saved_position::<E>(&mut known, name, start).inspect_err(|error| {
            if let Some(known) = known.get_mut(name) {
                known.failure = Some(error.to_failure());
            }
        })?;
        let consumer = known.get_mut(name).expect("the consumer was registered above");
        (consumer.is_driven, consumer.failure, consumer.letters) = (true, None, None);
        let holds = consumer.holds.iter();
        let assigned =
            self.shards.iter().zip(holds).zip(position.shards).map(|(((log, syncer), hold), progress)| AssignedShard {
                log: Arc::clone(log),
                syncer: Arc::clone(syncer),
                lock: Arc::clone(&self.lock),
                hold: Arc::clone(hold),
                progress,
            });
        Ok((assigned.collect(), position.letters))
    }

    /// Returns the saved state of a consumer, which must be of this log. Registers a new consumer.
    fn saved_position<E: Event>(
        &self,
        known: &mut BTreeMap<String, Known>,
        name: &str,
        start: Start,
    ) -> Result<ConsumerPosition, ConsumerError> {
        let dir = self.dir(name);
        let position = match known.get(name) {
            Some(_) => ConsumerPosition::load(&*self.storage, &dir)?.ok_or_else(|| OpenError::Io {
                action: "reading the position file in",
                path: dir.clone(),
                source: ErrorKind::NotFound.into(),
            })?,
            None => {
                let (position, holds) = self.register::<E>(name, &dir, start)?;
                known.insert(name.to_owned(), Known::registered(holds));
                position
            }
        };
        for ((log, _), progress) in self.shards.iter().zip(&position.shards) {
            progress.seen.check(log, &self.lock)?;
        }
        Ok(position)
    }

    fn register<E: Event>(
        &self,
        name: &str,
        dir: &Path,
        start: Start,
    ) -> Result<(ConsumerPosition, Vec<Arc<Hold>>), ConsumerError> {
        // From here on nothing is freed, so the positions stay valid.
        let holds: Vec<_> = self
            .shards
            .iter()
            .map(|(log, _)| log.holds.hold(&hold_name(name), Offset(0), &self.keeper.signal))
            .collect();
        let registered = self.saved_at::<E>(dir, start);
        match registered {
            Ok(position) => {
                holds.iter().zip(&position.shards).for_each(|(hold, progress)| hold.set(progress.position));
                Ok((position, holds))
            }
            Err(error) => {
                self.release(&holds);
                Err(error)
            }
        }
    }

    fn saved_at<E: Event>(&self, dir: &Path, start: Start) -> Result<ConsumerPosition, ConsumerError> {
        let positions = self.shards.iter().map(|(log, _)| start_position::<E>(log, &self.lock, start));
        let position = ConsumerPosition::begin(positions.collect::<Result<Vec<_>, _>>()?);
        let io = |action| move |source| OpenError::Io { action, path: dir.to_owned(), source };
        self.storage.create_dir(dir).map_err(io("creating"))?;
        clear(&*self.storage, dir).map_err(io("clearing"))?;
        position.save(&*self.storage, dir).map_err(io("writing the position file in"))?;
        Ok(position)
    }

    fn release(&self, holds: &[Arc<Hold>]) {
        self.shards.iter().zip(holds).for_each(|((log, _), hold)| log.holds.remove(hold));
    }

    /// Notes the threads of a consumer. If the engine was closed meanwhile, they are asked to stop at once.
    pub(crate) fn note_running(&self, name: &str, running: Arc<dyn Running>) {
        if let Some(known) = lock(&self.known).get_mut(name) {
            known.running = Some(Arc::clone(&running));
        }
        // Checked after noting the threads: `close` either finds them there, or this finds `closed` set.
        if *lock(&self.closed) != Closed::No {
            running.life().ask_to_stop();
        }
    }

    /// Notes the report of a consumer's poller.
    pub(crate) fn note_report(&self, name: &str, shown: &Arc<Mutex<ConsumerReport>>) {
        if let Some(known) = lock(&self.known).get_mut(name) {
            known.shown = Some(Arc::clone(shown));
        }
    }

    /// Marks a consumer as not driven. A failure is kept until the next start.
    pub(crate) fn note_end(&self, name: &str, failure: Option<ConsumerFailure>) {
        if let Some(known) = lock(&self.known).get_mut(name) {
            (known.is_driven, known.running, known.shown) = (false, None, None);
            known.failure = failure;
        }
    }

    /// Notes that a start failed.
    pub(crate) fn note_refused(&self, name: &str, error: ConsumerError) -> ConsumerError {
        self.note_end(name, Some(error.to_failure()));
        error
    }

    /// Unregisters a consumer and removes its files.
    pub(crate) fn remove(&self, name: &str) -> Result<(), ConsumerError> {
        let mut all = lock(&self.known);
        let known = all.get(name).ok_or_else(|| ConsumerError::NotRegistered { name: name.to_owned() })?;
        if known.is_driven {
            return Err(ConsumerError::AlreadyRunning { name: name.to_owned() });
        }
        let dir = self.dir(name);
        let io = |source| OpenError::Io { action: "removing a consumer from", path: dir.clone(), source };
        // Remove the position file first: without it the consumer does not exist, whatever files remain.
        ConsumerPosition::remove(&*self.storage, &dir).map_err(io)?;
        self.release(&known.holds);
        all.remove(name);
        clear(&*self.storage, &dir).map_err(io)?;
        Ok(())
    }

    /// Returns a report of every registered consumer.
    pub(crate) fn reports(&self) -> Vec<ConsumerReport> {
        let mut known = lock(&self.known);
        let report = |(name, known): (&String, &mut Known)| match (&known.running, &known.shown) {
            (Some(running), _) => running.report(),
            (None, Some(shown)) => {
                let mut report = lock(shown).clone();
                report.refresh(self.positions(known));
                report
            }
            (None, None) => self.report_at_rest(name, known),
        };
        known.iter_mut().map(report).collect()
    }

    fn positions<'a>(&'a self, known: &'a Known) -> impl Iterator<Item = (&'a ShardLog, Offset)> {
        self.shards.iter().map(|(log, _)| &**log).zip(known.holds.iter().map(|hold| hold.get()))
    }

    fn report_at_rest(&self, name: &str, known: &mut Known) -> ConsumerReport {
        let mut report = ConsumerReport::at_rest(name, self.positions(known));
        report.failure.clone_from(&known.failure);
        // The letters stay unchanged until the consumer is started again.
        if known.letters.is_none() && !known.is_driven {
            let dir = self.dir(name);
            let saved = ConsumerPosition::load(&*self.storage, &dir).map(Option::unwrap_or_default);
            match saved.and_then(|saved| statistics_of(&self.storage, &dir, saved.letters, self.shards.len())) {
                Ok(letters) => known.letters = Some(letters),
                Err(error) => drop(report.failure.get_or_insert_with(|| ConsumerError::from(error).into())),
            }
        }
        if let Some(letters) = known.letters {
            report.set_letters(letters);
        }
        report
    }

    fn running(&self) -> Vec<Arc<dyn Running>> {
        lock(&self.known).values().filter_map(|known| known.running.clone()).collect()
    }

    /// Returns the names of the consumers that have threads.
    pub(crate) fn running_names(&self) -> Vec<String> {
        lock(&self.known).iter().filter(|(_, known)| known.running.is_some()).map(|(name, _)| name.clone()).collect()
    }

    /// Waits until every running consumer has handled or recorded every event that is visible now.
    ///
    /// # Errors
    /// The error of [`Running::drain`] for the first consumer that cannot be drained; `Ended` if a registered consumer
    /// has failed.
    pub(crate) fn drain(&self, deadline: Option<Instant>) -> Result<(), ConsumerError> {
        self.check_none_failed()?;
        let running = self.running();
        // Check before waiting for any: one of them may own the current thread.
        if !running.iter().all(|running| running.life().may_await()) {
            return Err(WaitError::OnEngineThread.into());
        }
        running.iter().try_for_each(|running| running.drain(deadline))?;
        self.check_none_failed()
    }

    fn check_none_failed(&self) -> Result<(), ConsumerError> {
        let failure = lock(&self.known).values().find_map(|known| known.failure.clone());
        failure.map_or(Ok(()), |failure| Err(ConsumerError::Ended { failure: Some(failure) }))
    }

    /// Stops waiting for consumers that do not end. A thread that hangs in a handler is left behind, and holds the
    /// store's lock until it ends.
    pub(crate) fn abandon(&self) {
        *lock(&self.closed) = Closed::Abandoned;
        for running in self.running() {
            running.life().ask_to_stop();
            running.life().cancel_handlers();
            let ConsumerReport { name, running_since, .. } = running.report();
            tracing::error!(consumer = name, ?running_since, "a consumer has not ended; the engine closes without it");
        }
    }

    /// Returns `true` if the current thread runs a handler of an asynchronous consumer's task, or would have to.
    pub(crate) fn hold_up_this_thread(&self) -> bool {
        self.running().iter().any(|running| running.life().holds_up_this_thread())
    }

    /// Stops every running consumer and lets none start. Returns `true` if all have ended by the deadline.
    pub(crate) fn close(&self, deadline: Option<Instant>) -> bool {
        {
            let mut closed = lock(&self.closed);
            match *closed {
                Closed::Abandoned => return true,
                _ => *closed = Closed::Yes,
            }
        }
        let running = self.running();
        // All are asked before the first is waited for.
        running.iter().for_each(|running| running.life().ask_to_stop());
        running.iter().all(|running| running.life().await_end(deadline))
    }
}

/// A gate may have the same name.
fn hold_name(consumer: &str) -> String {
    format!("consumer {consumer}")
}
