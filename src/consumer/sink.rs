//! Sinks that keep their position with their data: what they hold is made of every event once, whatever crashes.
//!
//! One writer: the sink's thread. The position that counts is the sink's own; the consumer's checkpoint only tells retention what may
//! go, and follows it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::builder::ConsumerBuilder;
use super::dead_letter::answer::LetterStatistics;
use super::dead_letter::{FileEnd, statistics_of};
use super::driver::{HaltCause, Place};
use super::error::ConsumerError;
use super::health::{Admission, CallPermit, Health, HealthChange};
use super::life::Life;
use super::position_file::{ConsumerPosition, Progress};
use super::report::ConsumerReport;
use super::retry::{AfterFailure, JitterRng};
use super::running::spawn;
use super::services::{Running, Services};
use super::settings::{Filter, Settings};
use crate::config::in_range;
use crate::error::{HandlerError, panic_text};
use crate::error::{OpenError, ReadError};
use crate::event::{Event, Offset, ShardId};
use crate::log::holds::Hold;
use crate::log::position::Position;
use crate::log::reader::{Reader, Record};
use crate::sync::{AtomicBool, AtomicU64, Deadline, Mutex, Ordering, lock, thread, thread_waker};

/// Takes events in together with the position up to which it took them: a database with transactions. A [`Position`] is a blob of
/// 40 bytes or a text of 80 characters; the sink keeps one per shard and hands it back unchanged. It identifies the log: a position
/// of another store, or of another history of this one (a copy of the store or of the database was put back), ends the sink with
/// a typed failure.
///
/// ```
/// # use corelane::consumer::{Batch, Sink};
/// # use corelane::{Event, HandlerError, Position, ShardId};
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
    /// Returns the position that was kept with the data, or `None` if there is none for this shard yet: delivery then begins where the
    /// sink was registered. If events were delivered before, `None` is [`ConsumerError::PositionGone`]. Called when the sink starts,
    /// and after every failed batch.
    ///
    /// # Errors
    /// Whatever kept it from being read: it is asked again, as the retry policy says.
    fn position(&mut self, shard: ShardId) -> Result<Option<Position>, HandlerError>;

    /// Takes a batch in: what it makes of the events, and [`Batch::end`], in one transaction. All of it or nothing.
    ///
    /// # Errors
    /// Nothing was taken in (or, if it was after all, `position` says so): the batch comes again.
    fn apply(&mut self, batch: &mut Batch<'_, E>) -> Result<(), HandlerError>;
}

/// Events of one shard, in order.
#[derive(Debug)]
pub struct Batch<'a, E: Event> {
    reader: &'a mut Reader<E>,
    begun: Position,
    filter: &'a Filter,
    left: usize,
    events: u64,
    /// The log could not be read on.
    is_cut: bool,
}

impl<E: Event> Batch<'_, E> {
    /// The next event of the batch. A batch ends before a place where the log cannot be read on: what comes before is taken in, and
    /// then the sink ends with that failure.
    ///
    /// # Errors
    /// As [`Reader::next`], where that place comes first: there is nothing to take in. The position stays, and [`Batch::end`] with it.
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

    /// The shard.
    #[must_use]
    pub fn shard(&self) -> ShardId {
        self.reader.shard()
    }

    /// Where the batch goes on behind what was taken from it so far: after its last event, the position to be kept with it.
    #[must_use]
    pub fn end(&self) -> Position {
        self.reader.position_after(&self.begun)
    }
}

/// What the thread and its handle share.
#[derive(Debug)]
struct Control {
    life: Life,
    paused: AtomicBool,
    /// Asks for another attempt after a halt.
    resumed: AtomicBool,
    report: Mutex<ConsumerReport>,
    /// How often it was asked whether everything has been taken in, and which of these questions has that for its answer.
    drains: AtomicU64,
    drained: AtomicU64,
}

impl Running for Control {
    fn life(&self) -> &Life {
        &self.life
    }

    fn report(&self) -> ConsumerReport {
        let mut report = lock(&self.report).clone();
        report.running_since = self.life.inside_for();
        report.running = usize::from(report.running_since.is_some());
        report.is_running = !self.life.has_ended();
        report.is_paused = self.paused.load(Ordering::Relaxed);
        report
    }

    fn drain(&self, deadline: Option<Instant>) -> bool {
        if !self.life.may_await() {
            return false;
        }
        let question = self.drains.fetch_add(1, Ordering::SeqCst) + 1;
        self.life.wake();
        while self.drained.load(Ordering::SeqCst) < question {
            if self.life.has_ended() || deadline.is_some_and(|at| Instant::now() >= at) {
                return false;
            }
            crate::sync::nap(Duration::from_millis(1));
        }
        true
    }
}

/// A running sink. Dropping it stops it.
#[derive(Debug)]
pub struct SinkConsumer {
    control: Arc<Control>,
    name: String,
}

impl SinkConsumer {
    /// What is known of it now; `handled` counts events taken in.
    #[must_use]
    pub fn report(&self) -> ConsumerReport {
        self.control.report()
    }

    /// Takes nothing in any more, until [`SinkConsumer::resume`].
    pub fn pause(&self) {
        self.control.paused.store(true, Ordering::SeqCst);
        self.control.life.wake();
    }

    /// Goes on after a pause, or after it halted because all attempts at a batch had failed.
    pub fn resume(&self) {
        self.control.paused.store(false, Ordering::SeqCst);
        self.control.resumed.store(true, Ordering::SeqCst);
        self.control.life.wake();
    }

    /// Waits until everything there is has been taken in. Whether it came to that by the deadline.
    #[must_use]
    pub fn drain(&self, deadline: impl Into<Deadline>) -> bool {
        let deadline = deadline.into().instant();
        self.control.drain(deadline)
    }

    /// Stops it after the batch it is at.
    ///
    /// # Errors
    /// `Busy` at the deadline; `Ended` where it had ended by itself.
    pub fn stop(self, deadline: impl Into<Deadline>) -> Result<(), ConsumerError> {
        let deadline = deadline.into().instant();
        self.control.life.stop(&self.name, deadline, || self.control.report().failure)
    }
}

impl Drop for SinkConsumer {
    fn drop(&mut self) {
        self.control.life.stop_dropped(&self.name);
    }
}

/// One shard of a sink.
struct Side<E: Event> {
    reader: Reader<E>,
    hold: Arc<Hold>,
    /// Up to where the sink holds all events.
    position: Position,
}

struct Pump<E: Event, S: Sink<E>> {
    sink: S,
    sides: Vec<Side<E>>,
    places: Vec<Place>,
    /// It has no dead letters, but a consumer that had its name may have left some.
    letters: FileEnd,
    letters_left: LetterStatistics,
    /// What is saved of it, shard by shard.
    progress: Vec<Progress>,
    settings: Settings,
    batch_max: usize,
    services: Arc<Services>,
    control: Arc<Control>,
    health: Health,
    rng: JitterRng,
    /// Attempts at the batch in hand that failed.
    failures: u32,
    /// Positions are to be asked for, since what became of the last batch is not known.
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
    /// Starts a sink: batches of at most `batch_max` events of one shard (1..=1,000,000), in order, each of them taken in once. Of the
    /// settings, those of keys do not apply: a batch that fails is tried again as the retry policy says, and when its attempts are used
    /// up the sink halts, since what comes after would not be in order.
    ///
    /// # Errors
    /// As [`ConsumerBuilder::start`].
    pub fn start_sink(self, batch_max: usize, sink: impl Sink<E>) -> Result<SinkConsumer, ConsumerError> {
        self.run_sink(batch_max, sink, false)
    }

    /// Starts a sink whose data is gone, as [`ConsumerBuilder::start_sink`] does. Where it has no position, it begins again where it was
    /// registered, whatever was delivered before. For one start; from then on use [`ConsumerBuilder::start_sink`].
    ///
    /// # Errors
    /// As [`ConsumerBuilder::start`], and `BeginningGone` where retention has freed events that it was given before: remove the consumer and
    /// register it again to begin with the earliest event held.
    pub fn start_sink_over(self, batch_max: usize, sink: impl Sink<E>) -> Result<SinkConsumer, ConsumerError> {
        self.run_sink(batch_max, sink, true)
    }

    fn run_sink(self, batch_max: usize, sink: impl Sink<E>, over: bool) -> Result<SinkConsumer, ConsumerError> {
        in_range("sink_batch_max", batch_max as u64, 1, 1_000_000)?;
        let (services, settings) = self.settle()?;
        let health = Health::new(&settings.name, settings.health.clone())?;
        let name = settings.name.to_string();
        let (places, letters) = services.drive::<E>(&name, settings.start)?;
        let prepared = prepare::<E>(&services, &name, &places, letters, over);
        let (progress, letters_left) = prepared.map_err(|error| services.refused(&name, error))?;
        let positions = places.iter().map(|place| (&*place.log, place.hold.get()));
        let mut report = ConsumerReport::at_rest(&name, positions);
        report.has_letters(letters_left);
        let control = Arc::new(Control {
            life: Life::new(&services),
            paused: AtomicBool::new(false),
            resumed: AtomicBool::new(false),
            report: Mutex::new(report),
            drains: AtomicU64::new(0),
            drained: AtomicU64::new(0),
        });
        let rng = JitterRng::seeded(settings.jitter_seed);
        let pump = Pump {
            sink,
            sides: Vec::new(),
            saved: progress.iter().map(|progress| progress.seen).collect(),
            places,
            letters,
            letters_left,
            progress,
            settings,
            batch_max,
            services: Arc::clone(&services),
            control: Arc::clone(&control),
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
        services.runs(&name, Arc::clone(&control) as Arc<dyn Running>);
        // Waited for by its `ended`.
        let spawned = spawn(&services, name.clone(), move || pump.run_to_the_end());
        drop(spawned.map_err(|error| {
            let error = services.refused(&name, error);
            // Somebody may have found it meanwhile, and wait for it.
            control.life.end();
            error
        })?);
        Ok(SinkConsumer { control, name })
    }
}

/// The error that stands for a sink's panic.
fn panicked(panic: &(dyn std::any::Any + Send)) -> HandlerError {
    format!("the sink panicked: {}", panic_text(panic)).into()
}

/// What is saved of a sink, and the dead letters that a consumer of its name has left. To start it over, its beginning is saved.
fn prepare<E: Event>(
    services: &Services,
    name: &str,
    places: &[Place],
    letters: FileEnd,
    over: bool,
) -> Result<(Vec<Progress>, LetterStatistics), ConsumerError> {
    let dir = services.dir(name);
    let left = statistics_of(&services.storage, &dir, letters, places.len())?;
    let mut progress: Vec<Progress> = places.iter().map(|place| place.progress.clone()).collect();
    if over {
        for (Place { log, lock, hold, .. }, progress) in places.iter().zip(&mut progress) {
            let (shard, began) = (log.shard, progress.began);
            if !log.holds.reach(hold, began, || log.earliest()) {
                let earliest = log.earliest();
                return Err(ConsumerError::BeginningGone { shard, began, earliest });
            }
            let reader = Reader::<E>::at(Arc::clone(log), began, Arc::clone(lock))?;
            *progress = progress.at(reader.position()?);
        }
        // Before anything is delivered: a sink that takes nothing now must find it so next time.
        let checkpoint = ConsumerPosition { letters, shards: progress.clone() };
        let saved = checkpoint.save(&*services.storage, &dir);
        saved.map_err(|source| OpenError::Io { action: "writing the checkpoint in", path: dir, source })?;
    }
    Ok((progress, left))
}

impl<E: Event, S: Sink<E>> Pump<E, S> {
    fn run_to_the_end(mut self) {
        let (control, services) = (Arc::clone(&self.control), Arc::clone(&self.services));
        let name = Arc::clone(&self.settings.name);
        let failure = control.life.run(&name, || self.run());
        lock(&control.report).failure.clone_from(&failure);
        drop(self);
        services.left(&name, failure);
        // With it the store's lock: who waits for the end may open the store again.
        drop(services);
        control.life.end();
    }

    fn run(&mut self) -> Result<(), ConsumerError> {
        while !self.control.life.is_stopping() {
            let mut taken = 0;
            if self.control.resumed.swap(false, Ordering::SeqCst) {
                (self.halted, self.failures, self.next_at) = (None, 0, Duration::ZERO);
            }
            let may_run = self.halted.is_none() && !self.control.paused.load(Ordering::SeqCst);
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
        self.control.life.now()
    }

    /// A batch of every shard, or a look at where the sink stands. Returns the work done.
    fn step(&mut self) -> Result<usize, ConsumerError> {
        if self.is_lost {
            let Some(pass) = self.admit() else { return Ok(0) };
            let found = catch_unwind(AssertUnwindSafe(|| self.find_positions()));
            match found.unwrap_or_else(|panic| Ok(Err(panicked(&*panic))))? {
                Ok(()) => {
                    self.is_lost = false;
                    // A probe that nobody reports would count as failed. Else only batches tell how the sink is.
                    if pass.is_probe() {
                        HealthChange::note(self.health.succeeded(pass, self.control.life.now()), &self.settings.name);
                    }
                }
                Err(error) => self.failed(pass, &error),
            }
            return Ok(usize::from(!self.is_lost));
        }
        // Before the logs are looked at: what is there when the question is asked must be seen.
        let question = self.control.drains.load(Ordering::SeqCst);
        let mut taken = 0;
        for at in 0..self.sides.len() {
            if self.sides[at].reader.offset() >= self.sides[at].reader.horizon() {
                continue;
            }
            let Some(pass) = self.admit() else { return Ok(taken) };
            match self.take_in(at)? {
                Ok(events) => {
                    let now = self.now();
                    HealthChange::note(self.health.succeeded(pass, now), &self.settings.name);
                    self.failures = 0;
                    self.handled += events;
                    taken += 1;
                }
                Err(error) => {
                    self.is_lost = true;
                    self.failed(pass, &error);
                    return Ok(taken);
                }
            }
        }
        if taken == 0 {
            self.control.drained.store(question, Ordering::SeqCst);
        }
        Ok(taken)
    }

    fn admit(&mut self) -> Option<CallPermit> {
        let now = self.now();
        match self.health.admit(now) {
            Admission::Go(pass) => Some(pass),
            Admission::Wait { until } => {
                self.next_at = until;
                None
            }
        }
    }

    fn failed(&mut self, pass: CallPermit, error: &HandlerError) {
        let now = self.now();
        HealthChange::note(self.health.failed(pass, now), &self.settings.name);
        self.failures = self.failures.saturating_add(1);
        self.failed += 1;
        let consumer = &*self.settings.name;
        match self.settings.retry.after(self.failures, &mut self.rng) {
            AfterFailure::RetryIn(after) => {
                tracing::warn!(consumer, %error, ?after, "a sink failed; it is tried again");
                self.next_at = now + after;
            }
            AfterFailure::GiveUp => {
                tracing::error!(consumer, %error, "a sink halts until it is told to go on");
                self.halted = Some(HaltCause::Batch { error: error.to_string() });
            }
        }
    }

    /// Stands where the sink stands.
    fn find_positions(&mut self) -> Result<Result<(), HandlerError>, ConsumerError> {
        let mut sides = Vec::with_capacity(self.places.len());
        for (i, (place, progress)) in self.places.iter().zip(&self.progress).enumerate() {
            let Place { log, lock, hold, .. } = place;
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
                        // Of another log, if it says so, or freed.
                        position.check(log, lock)?;
                        let earliest = log.earliest();
                        return Err(ReadError::BeyondRetention { shard, asked: from, earliest }.into());
                    }
                }
                None => {
                    let taken = self.sides.get(i).map_or(Offset(0), |side| side.position.offset());
                    let delivered = progress.read.max(taken);
                    if delivered > progress.began {
                        return Err(ConsumerError::PositionGone { shard, delivered });
                    }
                    // It holds that itself: nothing was delivered, so nothing was let go.
                    let reader = Reader::<E>::at(Arc::clone(log), progress.began, Arc::clone(lock))?;
                    let position = reader.position()?;
                    (reader, position)
                }
            };
            let reader = reader.with_sight(self.settings.sight);
            sides.push(Side { reader, hold: Arc::clone(hold), position });
        }
        self.sides = sides;
        Ok(Ok(()))
    }

    /// Lets the sink take a batch in. Returns how many events, or what the sink said; an error where the log cannot be read on.
    fn take_in(&mut self, at: usize) -> Result<Result<u64, HandlerError>, ConsumerError> {
        self.control.life.go_inside();
        let side = &mut self.sides[at];
        let (filter, left) = (&self.settings.filter, self.batch_max);
        let mut batch =
            Batch { reader: &mut side.reader, begun: side.position, filter, left, events: 0, is_cut: false };
        let sink = &mut self.sink;
        let applied = catch_unwind(AssertUnwindSafe(|| sink.apply(&mut batch)));
        let (events, is_cut) = (batch.events, batch.is_cut);
        self.control.life.come_out();
        if is_cut && events == 0 {
            // Whichever error the sink returned: the log's own says why.
            side.reader.next()?;
            return Ok(Err("the log could not be read on".into()));
        }
        if let Err(error) = applied.unwrap_or_else(|panic| Err(panicked(&*panic))) {
            return Ok(Err(error));
        }
        if side.reader.offset() == side.position.offset() {
            return Ok(Err("the sink took nothing from its batch".into()));
        }
        side.position = side.reader.position_after(&side.position);
        Ok(Ok(events))
    }

    /// Tells retention how far the sink is.
    fn save_if_due(&mut self) {
        let now = self.now();
        let positions: Vec<Position> = self.sides.iter().map(|side| side.position).collect();
        if now < self.save_at || positions.is_empty() || positions == self.saved {
            return;
        }
        self.save_at = now + self.settings.checkpoint_every;
        let shards = self.progress.iter().zip(&positions).map(|(progress, position)| progress.at(*position)).collect();
        let checkpoint = ConsumerPosition { letters: self.letters, shards };
        let dir = self.services.dir(&self.settings.name);
        match checkpoint.save(&*self.services.storage, &dir) {
            Ok(()) => {
                self.sides.iter().for_each(|side| side.hold.set(side.position.offset()));
                (self.saved, self.progress) = (positions, checkpoint.shards);
            }
            Err(source) => {
                let error = OpenError::Io { action: "writing the checkpoint in", path: dir, source };
                tracing::error!(consumer = &*self.settings.name, %error, "retention waits");
                self.save_failures += 1;
            }
        }
    }

    fn report(&self) {
        let places = self.places.iter().map(|place| (&*place.log, place.hold.get()));
        let mut report = ConsumerReport::at_rest(&self.settings.name, places);
        (report.handled, report.failed) = (self.handled, self.failed);
        report.has_read(self.sides.iter().map(|side| side.reader.sequence()).sum());
        report.halted.clone_from(&self.halted);
        report.health = Some(self.health.report(self.now()));
        report.write_failures.0 = self.save_failures;
        report.has_letters(self.letters_left);
        *lock(&self.control.report) = report;
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
                for side in &self.sides {
                    side.reader.register(&waker);
                }
                if self.sides.iter().any(|side| side.reader.offset() < side.reader.horizon()) {
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
