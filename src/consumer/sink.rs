//! Sinks that keep their position with their data: every event takes effect exactly once, whatever crashes.
//!
//! One writer: the sink's thread. The sink's own position is authoritative. The consumer's position file follows it and
//! tells retention what to keep.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::assigned_shard::AssignedShard;
use super::builder::ConsumerBuilder;
use super::dead_letter::answer::LetterStatistics;
use super::dead_letter::{FileEnd, statistics_of};
use super::error::ConsumerError;
use super::health::{Admission, CallPermit, Health, HealthChange};
use super::life::Life;
use super::outcome::HaltCause;
use super::position_file::{ConsumerPosition, Progress};
use super::report::ConsumerReport;
use super::retry::{AfterFailure, JitterRng};
use super::running::spawn;
use super::services::{Running, Services};
use super::settings::{Filter, Settings};
use crate::config::in_range;
use crate::error::{HandlerError, OpenError, ReadError, WaitError, panic_text};
use crate::event::{Event, Offset, ShardId};
use crate::log::holds::Hold;
use crate::log::position::Position;
use crate::log::reader::{Reader, Record};
use crate::sync::{AtomicBool, AtomicU64, Deadline, Mutex, Ordering, lock, thread, thread_waker};

/// Takes in events together with the position after them: for example a database with transactions. A [`Position`] is
/// 40 bytes or a text of 80 characters. The sink keeps one position per shard and returns it unchanged. The position
/// identifies the log: a position of another store, or of another history of this store (after restoring a copy of the
/// store or of the database), ends the sink with a typed failure.
///
/// ```
/// # use corelane::consumer::{Batch, Sink};
/// # use corelane::log::Position;
/// # use corelane::{Event, HandlerError, ShardId};
/// # use std::collections::HashMap;
/// # #[derive(Default)] struct Transaction { rows: u64, positions: HashMap<u16, Vec<u8>> }
/// # struct Database { committed: Transaction }
/// # impl Database { fn commit(&mut self, transaction: Transaction) { self.committed = transaction } }
/// impl<E: Event> Sink<E> for Database {
///     fn position(&mut self, shard: ShardId) -> Result<Option<Position>, HandlerError> {
///         let saved = self.committed.positions.get(&shard.0);
///         Ok(saved.map(|bytes| Position::from_bytes(bytes)).transpose()?)
///     }
///
///     fn apply(&mut self, batch: &mut Batch<'_, E>) -> Result<(), HandlerError> {
///         let mut transaction = Transaction::default();
///         while let Some(_record) = batch.next()? {
///             transaction.rows += 1;
///         }
///         transaction.positions.insert(batch.shard().0, batch.end().to_bytes().to_vec());
///         self.commit(transaction);
///         Ok(())
///     }
/// }
/// ```
pub trait Sink<E: Event>: Send + 'static {
    /// Returns the position that was kept with the data, or `None` if there is none for this shard yet: delivery then
    /// begins where the sink was registered. If events were delivered before, `None` ends the sink with
    /// [`ConsumerError::PositionGone`]. Called when the sink starts, and after every failed batch.
    ///
    /// # Errors
    /// Any error of reading the position. The retry policy decides when it is called again.
    fn position(&mut self, shard: ShardId) -> Result<Option<Position>, HandlerError>;

    /// Takes in a batch of events: stores the batch's effects on the data, and [`Batch::end`], in one transaction, all
    /// or nothing.
    ///
    /// # Errors
    /// The batch was not taken in, and is delivered again. If it was taken in after all, `position` must return its
    /// end.
    fn apply(&mut self, batch: &mut Batch<'_, E>) -> Result<(), HandlerError>;
}

/// A batch of events for the sink: events of one shard, in order.
#[derive(Debug)]
pub struct Batch<'a, E: Event> {
    reader: &'a mut Reader<E>,
    begun: Position,
    filter: &'a Filter,
    left: usize,
    events: u64,
    /// `true` if the log could not be read further.
    is_cut: bool,
}

impl<E: Event> Batch<'_, E> {
    /// Returns the next event of the batch. A batch ends before an offset at which the log cannot be read: the sink
    /// takes in the events before it, and then ends with that error.
    ///
    /// # Errors
    /// The same as for [`Reader::next`], if that offset comes first: there is nothing to take in. The position and
    /// [`Batch::end`] stay.
    #[expect(clippy::should_implement_trait, reason = "lends from the log, which Iterator cannot")]
    pub fn next(&mut self) -> Result<Option<Record<'_, E>>, ReadError> {
        if self.left == 0 {
            return Ok(None);
        }
        let filter = self.filter;
        let record = match self.reader.ahead(|header| filter.wants(header.event_type)) {
            Ok(Some(ahead)) => self.reader.take(&ahead),
            Ok(None) => {
                self.left = 0;
                return Ok(None);
            }
            Err(error) => Err(error),
        };
        match record {
            Ok(record) => {
                self.left -= 1;
                self.events += 1;
                Ok(Some(record))
            }
            Err(error) => {
                self.is_cut = true;
                if self.events > 0 { Ok(None) } else { Err(error) }
            }
        }
    }

    /// Returns the shard.
    #[must_use]
    pub fn shard(&self) -> ShardId {
        self.reader.shard()
    }

    /// Returns the position after the events taken from the batch so far. After the last event, it is the position to
    /// keep with the data.
    #[must_use]
    pub fn end(&self) -> Position {
        self.reader.position_after(&self.begun)
    }
}

/// The state shared by the sink's thread and its handle.
#[derive(Debug)]
struct SinkShared {
    life: Life,
    paused: AtomicBool,
    /// Set to ask for another attempt after a halt.
    resumed: AtomicBool,
    report: Mutex<ConsumerReport>,
    /// The number of the last call of `drain`, and of the last call that was answered because its events have been
    /// taken in.
    drains: AtomicU64,
    drained: AtomicU64,
}

impl Running for SinkShared {
    fn life(&self) -> &Life {
        &self.life
    }

    fn report(&self) -> ConsumerReport {
        let mut report = lock(&self.report).clone();
        report.running_since = self.life.in_handler_for();
        report.running = usize::from(report.running_since.is_some());
        report.is_running = !self.life.has_ended();
        report.is_paused = self.paused.load(Ordering::Relaxed);
        report
    }

    fn drain(&self, deadline: Option<Instant>) -> Result<(), ConsumerError> {
        if !self.life.may_await() {
            return Err(WaitError::OnEngineThread.into());
        }
        let question = self.drains.fetch_add(1, Ordering::SeqCst) + 1;
        self.life.wake();
        while self.drained.load(Ordering::SeqCst) < question {
            if self.life.has_ended() {
                return Err(ConsumerError::Ended { failure: lock(&self.report).failure.clone() });
            }
            if deadline.is_some_and(|at| Instant::now() >= at) {
                return Err(WaitError::TimedOut.into());
            }
            crate::sync::nap(Duration::from_millis(1));
        }
        Ok(())
    }
}

/// A running sink. Dropping it stops it.
#[derive(Debug)]
pub struct SinkConsumer {
    shared: Arc<SinkShared>,
    name: String,
}

impl SinkConsumer {
    /// Returns a report of the sink; `handled` counts events taken in.
    #[must_use]
    pub fn report(&self) -> ConsumerReport {
        self.shared.report()
    }

    /// Pauses the sink until [`SinkConsumer::resume`].
    pub fn pause(&self) {
        self.shared.paused.store(true, Ordering::SeqCst);
        self.shared.life.wake();
    }

    /// Ends a pause, or a halt after all attempts at a batch had failed.
    pub fn resume(&self) {
        self.shared.paused.store(false, Ordering::SeqCst);
        self.shared.resumed.store(true, Ordering::SeqCst);
        self.shared.life.wake();
    }

    /// Waits until the sink has taken in every event that is visible now.
    ///
    /// # Errors
    /// `Wait` with `TimedOut` at the deadline (a paused or halted sink takes nothing in), and with `OnEngineThread` on
    /// the sink's own thread; `Ended` if it has ended.
    pub fn drain(&self, deadline: impl Into<Deadline>) -> Result<(), ConsumerError> {
        self.shared.drain(deadline.into().instant())
    }

    /// Stops the sink after its present batch.
    ///
    /// # Errors
    /// `Busy` at the deadline; `Wait` with `OnEngineThread` on the sink's own thread; `Ended` with the reason if the sink
    /// had ended by itself.
    pub fn stop(self, deadline: impl Into<Deadline>) -> Result<(), ConsumerError> {
        let deadline = deadline.into().instant();
        self.shared.life.stop(&self.name, deadline, || self.shared.report().failure)
    }
}

impl Drop for SinkConsumer {
    fn drop(&mut self) {
        self.shared.life.stop_dropped(&self.name);
    }
}

/// One shard of a sink.
struct SinkShard<E: Event> {
    reader: Reader<E>,
    hold: Arc<Hold>,
    /// The sink holds all events before this position.
    position: Position,
}

/// The work of a sink's thread.
struct SinkRunner<E: Event, S: Sink<E>> {
    sink: S,
    shards: Vec<SinkShard<E>>,
    assigned: Vec<AssignedShard>,
    /// The end of the dead letters. A sink has none, but a consumer of the same name may have left some.
    letters: FileEnd,
    letters_left: LetterStatistics,
    /// The saved progress, shard by shard.
    progress: Vec<Progress>,
    settings: Settings,
    batch_max: usize,
    services: Arc<Services>,
    shared: Arc<SinkShared>,
    health: Health,
    rng: JitterRng,
    /// Failed attempts at the present batch.
    failures: u32,
    /// `true` if the sink must be asked for its positions, because the fate of the last batch is unknown.
    is_lost: bool,
    next_at: Duration,
    saved: Vec<Position>,
    save_at: Duration,
    handled: u64,
    failed: u64,
    save_failures: u64,
    halted: Option<HaltCause>,
}

impl<E: Event> ConsumerBuilder<E> {
    /// Starts a sink: delivers batches of up to `batch_max` events of one shard (1..=1,000,000), in order, each taken
    /// in once. Settings about keys do not apply. A batch that fails is retried as the retry policy says. When its
    /// attempts are used up the sink halts, to keep the order.
    ///
    /// # Errors
    /// The same as for [`ConsumerBuilder::start`].
    pub fn start_sink(self, batch_max: usize, sink: impl Sink<E>) -> Result<SinkConsumer, ConsumerError> {
        self.run_sink(batch_max, sink, false)
    }

    /// Starts a sink whose data is gone, as [`ConsumerBuilder::start_sink`] does. For a shard without a position,
    /// delivery begins again where the sink was registered, although events were delivered before. Use it for one
    /// start, then [`ConsumerBuilder::start_sink`] again.
    ///
    /// # Errors
    /// The same as for [`ConsumerBuilder::start`], and `BeginningGone` if retention has freed events that were
    /// delivered before: remove the consumer and register it again, to begin with the earliest event held.
    pub fn start_sink_over(self, batch_max: usize, sink: impl Sink<E>) -> Result<SinkConsumer, ConsumerError> {
        self.run_sink(batch_max, sink, true)
    }

    fn run_sink(self, batch_max: usize, sink: impl Sink<E>, over: bool) -> Result<SinkConsumer, ConsumerError> {
        in_range("sink_batch_max", batch_max as u64, 1, 1_000_000)?;
        let (services, settings) = self.settle()?;
        let health = Health::new(&settings.name, settings.health.clone())?;
        let name = settings.name.to_string();
        let (assigned, letters) = services.drive::<E>(&name, settings.start)?;
        let prepared = prepare::<E>(&services, &name, &assigned, letters, over);
        let (progress, letters_left) = prepared.map_err(|error| services.note_refused(&name, error))?;
        let positions = assigned.iter().map(|shard| (&*shard.log, shard.hold.get()));
        let mut report = ConsumerReport::at_rest(&name, positions);
        report.set_letters(letters_left);
        let shared = Arc::new(SinkShared {
            life: Life::new(services.identity(), None),
            paused: AtomicBool::new(false),
            resumed: AtomicBool::new(false),
            report: Mutex::new(report),
            drains: AtomicU64::new(0),
            drained: AtomicU64::new(0),
        });
        let rng = JitterRng::seeded(settings.jitter_seed);
        let runner = SinkRunner {
            sink,
            shards: Vec::new(),
            saved: progress.iter().map(|progress| progress.seen).collect(),
            assigned,
            letters,
            letters_left,
            progress,
            settings,
            batch_max,
            services: Arc::clone(&services),
            shared: Arc::clone(&shared),
            health,
            rng,
            failures: 0,
            is_lost: true,
            next_at: Duration::ZERO,
            save_at: Duration::ZERO,
            handled: 0,
            failed: 0,
            save_failures: 0,
            halted: None,
        };
        services.note_running(&name, Arc::clone(&shared) as Arc<dyn Running>);
        // The handle waits for the life's end, not for the thread.
        let spawned = spawn(&services, name.clone(), move || runner.run_to_the_end());
        drop(spawned.map_err(|error| {
            let error = services.note_refused(&name, error);
            // A caller may have found the sink meanwhile, and may be waiting for it.
            shared.life.end();
            error
        })?);
        Ok(SinkConsumer { shared, name })
    }
}

/// Returns the error for a panic of the sink.
fn panicked(panic: &(dyn std::any::Any + Send)) -> HandlerError {
    format!("the sink panicked: {}", panic_text(panic)).into()
}

/// Returns the saved progress of a sink, and the dead letters that a consumer of its name has left. If the sink starts
/// over, saves its beginning first.
fn prepare<E: Event>(
    services: &Services,
    name: &str,
    assigned: &[AssignedShard],
    letters: FileEnd,
    over: bool,
) -> Result<(Vec<Progress>, LetterStatistics), ConsumerError> {
    let dir = services.dir(name);
    let left = statistics_of(&services.storage, &dir, letters, assigned.len())?;
    let mut progress: Vec<Progress> = assigned.iter().map(|shard| shard.progress.clone()).collect();
    if over {
        for (AssignedShard { log, lock, hold, .. }, progress) in assigned.iter().zip(&mut progress) {
            let (shard, began) = (log.shard, progress.began);
            if !log.holds.reach(hold, began, || log.earliest()) {
                let earliest = log.earliest();
                return Err(ConsumerError::BeginningGone { shard, began, earliest });
            }
            let reader = Reader::<E>::at(Arc::clone(log), began, Arc::clone(lock))?;
            *progress = progress.at(reader.position()?);
        }
        // Save before anything is delivered: the next start must find the beginning even if this one takes in nothing.
        let position = ConsumerPosition { letters, shards: progress.clone() };
        let saved = position.save(&*services.storage, &dir);
        saved.map_err(|source| OpenError::Io { action: "writing the position file in", path: dir, source })?;
    }
    Ok((progress, left))
}

impl<E: Event, S: Sink<E>> SinkRunner<E, S> {
    fn run_to_the_end(mut self) {
        let (shared, services) = (Arc::clone(&self.shared), Arc::clone(&self.services));
        let name = Arc::clone(&self.settings.name);
        let failure = shared.life.run(&name, || self.run());
        lock(&shared.report).failure.clone_from(&failure);
        drop(self);
        services.note_end(&name, failure);
        // Releases the store's lock: a waiter for the end may open the store again.
        drop(services);
        shared.life.end();
    }

    fn run(&mut self) -> Result<(), ConsumerError> {
        while !self.shared.life.is_stopping() {
            let mut taken = 0;
            if self.shared.resumed.swap(false, Ordering::SeqCst) {
                (self.halted, self.failures, self.next_at) = (None, 0, Duration::ZERO);
            }
            let may_run = self.halted.is_none() && !self.shared.paused.load(Ordering::SeqCst);
            if may_run && self.now() >= self.next_at {
                taken = self.step()?;
            }
            self.save_if_due();
            self.report();
            if taken == 0 {
                self.sleep(may_run);
            }
        }
        self.save_at = Duration::ZERO;
        self.save_if_due();
        self.report();
        Ok(())
    }

    fn now(&self) -> Duration {
        self.shared.life.now()
    }

    /// Delivers one batch per shard, or asks the sink for its positions. Returns the work done.
    fn step(&mut self) -> Result<usize, ConsumerError> {
        if self.is_lost {
            let Some(permit) = self.admit() else { return Ok(0) };
            let found = catch_unwind(AssertUnwindSafe(|| self.find_positions()));
            match found.unwrap_or_else(|panic| Ok(Err(panicked(&*panic))))? {
                Ok(()) => {
                    self.is_lost = false;
                    // A probe without an outcome would count as failed. Other calls of `position` say nothing about
                    // health: only batches do.
                    if permit.is_probe() {
                        HealthChange::log(self.health.succeeded(permit, self.shared.life.now()), &self.settings.name);
                    }
                }
                Err(error) => self.failed(permit, &error),
            }
            return Ok(usize::from(!self.is_lost));
        }
        // Read the number before the logs: the answer covers the events that are visible when `drain` is called.
        let question = self.shared.drains.load(Ordering::SeqCst);
        let mut taken = 0;
        for at in 0..self.shards.len() {
            if self.shards[at].reader.offset() >= self.shards[at].reader.horizon() {
                continue;
            }
            let Some(permit) = self.admit() else { return Ok(taken) };
            match self.take_in(at)? {
                Ok(events) => {
                    let now = self.now();
                    HealthChange::log(self.health.succeeded(permit, now), &self.settings.name);
                    self.failures = 0;
                    self.handled += events;
                    taken += 1;
                }
                Err(error) => {
                    self.is_lost = true;
                    self.failed(permit, &error);
                    return Ok(taken);
                }
            }
        }
        if taken == 0 {
            self.shared.drained.store(question, Ordering::SeqCst);
        }
        Ok(taken)
    }

    fn admit(&mut self) -> Option<CallPermit> {
        let now = self.now();
        match self.health.admit(now) {
            Admission::Go(permit) => Some(permit),
            Admission::Wait { until } => {
                self.next_at = until;
                None
            }
        }
    }

    fn failed(&mut self, permit: CallPermit, error: &HandlerError) {
        let now = self.now();
        HealthChange::log(self.health.failed(permit, now), &self.settings.name);
        self.failures = self.failures.saturating_add(1);
        self.failed += 1;
        let consumer = &*self.settings.name;
        match self.settings.retry.after(self.failures, &mut self.rng) {
            AfterFailure::RetryIn(after) => {
                tracing::warn!(consumer, %error, ?after, "a sink failed and is retried");
                self.next_at = now + after;
            }
            AfterFailure::GiveUp => {
                tracing::error!(consumer, %error, "a sink halts until it is resumed");
                self.halted = Some(HaltCause::Batch { error: error.to_string() });
            }
        }
    }

    /// Asks the sink for its position in every shard, and continues there.
    fn find_positions(&mut self) -> Result<Result<(), HandlerError>, ConsumerError> {
        let mut shards = Vec::with_capacity(self.assigned.len());
        for (i, (assigned, progress)) in self.assigned.iter().zip(&self.progress).enumerate() {
            let AssignedShard { log, lock, hold, .. } = assigned;
            let shard = log.shard;
            let position = match self.sink.position(shard) {
                Ok(position) => position,
                Err(error) => return Ok(Err(error)),
            };
            let (reader, position) = match position {
                Some(position) => {
                    let from = position.offset();
                    if log.holds.reach(hold, from, || log.earliest()) {
                        (position.reader::<E>(log, lock)?, position)
                    } else {
                        // The position is of another log, or its events were freed.
                        position.check(log, lock)?;
                        let earliest = log.earliest();
                        return Err(ReadError::BeyondRetention { shard, asked: from, earliest }.into());
                    }
                }
                None => {
                    let taken = self.shards.get(i).map_or(Offset(0), |shard| shard.position.offset());
                    let delivered = progress.read.max(taken);
                    if delivered > progress.began {
                        return Err(ConsumerError::PositionGone { shard, delivered });
                    }
                    // The consumer's hold is still there: no event was delivered, so none was released.
                    let reader = Reader::<E>::at(Arc::clone(log), progress.began, Arc::clone(lock))?;
                    let position = reader.position()?;
                    (reader, position)
                }
            };
            let reader = reader.with_sight(self.settings.sight);
            shards.push(SinkShard { reader, hold: Arc::clone(hold), position });
        }
        self.shards = shards;
        Ok(Ok(()))
    }

    /// Delivers a batch to the sink. Returns the number of events or the sink's error, and an outer error if the log
    /// cannot be read.
    fn take_in(&mut self, at: usize) -> Result<Result<u64, HandlerError>, ConsumerError> {
        self.shared.life.enter_handler();
        let shard = &mut self.shards[at];
        let (filter, left) = (&self.settings.filter, self.batch_max);
        let mut batch =
            Batch { reader: &mut shard.reader, begun: shard.position, filter, left, events: 0, is_cut: false };
        let sink = &mut self.sink;
        let applied = catch_unwind(AssertUnwindSafe(|| sink.apply(&mut batch)));
        let (events, is_cut) = (batch.events, batch.is_cut);
        self.shared.life.leave_handler();
        if is_cut && events == 0 {
            // Report the log's error, whatever error the sink returned.
            shard.reader.next()?;
            return Ok(Err("the log could not be read further".into()));
        }
        if let Err(error) = applied.unwrap_or_else(|panic| Err(panicked(&*panic))) {
            return Ok(Err(error));
        }
        if shard.reader.offset() == shard.position.offset() {
            return Ok(Err("the sink took nothing from its batch".into()));
        }
        shard.position = shard.reader.position_after(&shard.position);
        Ok(Ok(events))
    }

    /// Saves the sink's positions, and lets retention free the events below.
    fn save_if_due(&mut self) {
        let now = self.now();
        let positions: Vec<Position> = self.shards.iter().map(|shard| shard.position).collect();
        if now < self.save_at || positions.is_empty() || positions == self.saved {
            return;
        }
        self.save_at = now + self.settings.save_every;
        let shards = self.progress.iter().zip(&positions).map(|(progress, position)| progress.at(*position)).collect();
        let position = ConsumerPosition { letters: self.letters, shards };
        let dir = self.services.dir(&self.settings.name);
        match position.save(&*self.services.storage, &dir) {
            Ok(()) => {
                self.shards.iter().for_each(|shard| shard.hold.set(shard.position.offset()));
                (self.saved, self.progress) = (positions, position.shards);
            }
            Err(source) => {
                let error = OpenError::Io { action: "writing the position file in", path: dir, source };
                tracing::error!(
                    consumer = &*self.settings.name,
                    error = crate::error::with_sources(&error),
                    "a sink's position cannot be saved"
                );
                self.save_failures += 1;
            }
        }
    }

    fn report(&self) {
        let assigned = self.assigned.iter().map(|shard| (&*shard.log, shard.hold.get()));
        let mut report = ConsumerReport::at_rest(&self.settings.name, assigned);
        (report.handled, report.failed) = (self.handled, self.failed);
        report.set_read(self.shards.iter().map(|shard| shard.reader.sequence()).sum());
        report.halted.clone_from(&self.halted);
        report.health = Some(self.health.report(self.now()));
        report.write_failures.0 = self.save_failures;
        report.set_letters(self.letters_left);
        *lock(&self.shared.report) = report;
    }

    fn sleep(&mut self, may_run: bool) {
        let waker = thread_waker();
        let mut due = (self.save_at > self.now()).then_some(self.save_at);
        if may_run {
            if self.next_at > self.now() {
                due = Some(due.map_or(self.next_at, |due| due.min(self.next_at)));
            } else if self.is_lost {
                return;
            } else {
                for shard in &self.shards {
                    shard.reader.register(&waker);
                }
                if self.shards.iter().any(|shard| shard.reader.offset() < shard.reader.horizon()) {
                    return;
                }
            }
        }
        match due {
            Some(due) => thread::park_timeout(due.saturating_sub(self.now())),
            None => thread::park(),
        }
    }
}
