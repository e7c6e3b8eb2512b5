//! The runner of a sink: delivers batches, retries those that fail, and saves the sink's positions. It owns no thread
//! and waits for nothing but the sink.

use std::future::{Future, poll_fn};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use super::backend::AsyncSink;
use super::batch::Batch;
use super::handle::SinkShared;
use crate::config::in_range;
use crate::consumer::assigned_shard::AssignedShard;
use crate::consumer::builder::ConsumerBuilder;
use crate::consumer::dead_letter::answer::LetterStatistics;
use crate::consumer::dead_letter::{FileEnd, statistics_of};
use crate::consumer::error::{ConsumerError, ConsumerFailure};
use crate::consumer::health::{Admission, CallPermit, Health, HealthChange};
use crate::consumer::life::{Host, Life};
use crate::consumer::outcome::HaltCause;
use crate::consumer::position_file::{ConsumerPosition, Progress};
use crate::consumer::report::ConsumerReport;
use crate::consumer::retry::{AfterFailure, JitterRng};
use crate::consumer::services::Services;
use crate::consumer::settings::Settings;
use crate::error::{HandlerError, OpenError, ReadError, panic_text};
use crate::event::{Event, Offset};
use crate::log::holds::Hold;
use crate::log::position::Position;
use crate::log::reader::Reader;
use crate::log::segment::ShardLog;
use crate::sync::{Ordering, Registration, lock};

/// Bytes of an older segment that are read from the disk before a batch of a task begins.
const READ_AHEAD_BYTES: u64 = 4 << 20;
/// Events of other types that a batch of a task passes.
const UNWANTED_MAX: usize = 1 << 16;
/// The distance in bytes at which every page is met.
const PAGE_BYTES_MIN: usize = 4 << 10;

/// One shard of a sink.
struct SinkShard<E: Event> {
    reader: Reader<E>,
    /// The runner's place among the waiters of the log.
    registration: Registration,
    hold: Arc<Hold>,
    /// The sink holds all events before this position.
    position: Position,
    /// The log was read from the disk up to this offset.
    read_ahead: Offset,
}

impl<E: Event> SinkShard<E> {
    fn has_unread(&self) -> bool {
        self.reader.offset() < self.reader.horizon()
    }

    /// Returns `true` if the next event is in a segment that may not be in memory. The newest segment is, since the
    /// shard writes it.
    fn is_in_older_segment(&self, log: &ShardLog) -> bool {
        log.segment_of(self.reader.offset()) < log.segment_of(Offset(log.appended.get()))
    }

    fn must_read_ahead(&self, log: &ShardLog) -> bool {
        self.has_unread() && self.reader.offset() >= self.read_ahead && self.is_in_older_segment(log)
    }

    /// Reads the next part of the log from the disk.
    fn read_ahead(&mut self, log: &ShardLog) {
        let from = self.reader.offset();
        let end = from.0 + READ_AHEAD_BYTES;
        let mut at = from.0;
        while at < end {
            let index = log.segment_of(Offset(at));
            let base = index * log.segment_bytes;
            let Some(segment) = log.segment(index) else { break };
            let until = (end - base).min(segment.memory.committed() as u64).max(at - base);
            let bytes = segment.memory.read((at - base) as usize, (until - (at - base)) as usize);
            for byte in bytes.unwrap_or_default().iter().step_by(PAGE_BYTES_MIN) {
                std::hint::black_box(*byte);
            }
            at = base + log.segment_bytes;
        }
        self.read_ahead = Offset(end);
    }
}

/// The state of one sink.
pub(super) struct SinkRunner<E: Event, S: AsyncSink<E>> {
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
    pub(super) shared: Arc<SinkShared>,
    /// `true` if the thread that calls the sink must not wait for the disk.
    is_task: bool,
    health: Health,
    rng: JitterRng,
    /// Failed attempts at the present batch.
    failures: u32,
    /// `true` if the sink must be asked for its positions, because the fate of the last batch is unknown.
    is_lost: bool,
    /// The positions that the sink returned, and the permit for asking.
    found: Option<(Vec<Option<Position>>, CallPermit)>,
    next_at: Duration,
    saved: Vec<Position>,
    save_at: Duration,
    handled: u64,
    failed: u64,
    save_failures: u64,
    halted: Option<HaltCause>,
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

impl<E: Event, S: AsyncSink<E>> SinkRunner<E, S> {
    /// Opens a sink's files. With a `host`, the sink runs as a task.
    pub(super) fn open(
        builder: ConsumerBuilder<E>,
        batch_max: usize,
        sink: S,
        over: bool,
        host: Option<Arc<dyn Host>>,
    ) -> Result<(Self, Arc<Services>), ConsumerError> {
        in_range("sink_batch_max", batch_max as u64, 1, 1_000_000)?;
        let (services, settings) = builder.settle()?;
        let health = Health::new(&settings.name, settings.health.clone())?;
        let name = settings.name.to_string();
        let (assigned, letters) = services.drive::<E>(&name, settings.start)?;
        let prepared = prepare::<E>(&services, &name, &assigned, letters, over);
        let (progress, letters_left) = prepared.map_err(|error| services.note_refused(&name, error))?;
        let positions = assigned.iter().map(|shard| (&*shard.log, shard.hold.get()));
        let mut report = ConsumerReport::at_rest(&name, positions);
        report.set_letters(letters_left);
        let is_task = host.is_some();
        let shared = Arc::new(SinkShared::new(Life::new(services.identity(), host), report));
        let rng = JitterRng::seeded(settings.jitter_seed);
        let runner = Self {
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
            shared,
            is_task,
            health,
            rng,
            failures: 0,
            is_lost: true,
            found: None,
            next_at: Duration::ZERO,
            save_at: Duration::ZERO,
            handled: 0,
            failed: 0,
            save_failures: 0,
            halted: None,
        };
        Ok((runner, services))
    }

    pub(super) fn name(&self) -> &str {
        &self.settings.name
    }

    /// Releases everything and wakes the waiters for the end.
    pub(super) fn end(self, failure: Option<ConsumerFailure>) {
        let (shared, services) = (Arc::clone(&self.shared), Arc::clone(&self.services));
        let name = Arc::clone(&self.settings.name);
        lock(&shared.report).failure.clone_from(&failure);
        drop(self);
        services.note_end(&name, failure.clone());
        // Releases the store's lock: a waiter for the end may open the store again.
        drop(services);
        shared.end(failure);
    }

    fn now(&self) -> Duration {
        self.shared.life.now()
    }

    fn may_run(&self) -> bool {
        self.halted.is_none() && !self.shared.paused.load(Ordering::SeqCst)
    }

    /// Delivers one batch per shard, or asks the sink for its positions, which [`SinkRunner::file_work`] then takes up.
    /// Returns the work done.
    ///
    /// Cancel safety: a dropped round counts as a failed batch.
    pub(super) async fn round(&mut self) -> Result<usize, ConsumerError> {
        if self.shared.resumed.swap(false, Ordering::SeqCst) {
            (self.halted, self.failures, self.next_at) = (None, 0, Duration::ZERO);
        }
        if !self.may_run() || self.now() < self.next_at || self.found.is_some() {
            return Ok(0);
        }
        if self.is_lost {
            return Ok(self.find_positions().await);
        }
        let question = self.shared.last_drain();
        let (mut taken, mut waits) = (0, false);
        for at in 0..self.shards.len() {
            if !self.shards[at].has_unread() {
                continue;
            }
            if self.is_task && self.shards[at].must_read_ahead(&self.assigned[at].log) {
                waits = true;
                continue;
            }
            let Some(permit) = self.admit() else { return Ok(taken) };
            // Until the batch has ended, its fate is unknown.
            self.is_lost = true;
            match self.take_in(at).await? {
                Ok(events) => {
                    self.is_lost = false;
                    let now = self.now();
                    HealthChange::log(self.health.succeeded(permit, now), &self.settings.name);
                    self.failures = 0;
                    self.handled += events;
                    taken += 1;
                }
                Err(error) => {
                    self.failed(permit, &error);
                    return Ok(taken);
                }
            }
        }
        if taken == 0 && !waits {
            self.shared.answer_drains(question);
        }
        Ok(taken)
    }

    /// Returns `true` if [`SinkRunner::file_work`] has something to do.
    #[cfg(feature = "tokio")]
    pub(super) fn has_file_work(&self) -> bool {
        self.found.is_some() || self.must_read_ahead() || self.is_save_due()
    }

    fn must_read_ahead(&self) -> bool {
        let mut shards = self.shards.iter().zip(&self.assigned);
        self.is_task && self.may_run() && shards.any(|(shard, assigned)| shard.must_read_ahead(&assigned.log))
    }

    /// Does the work that may wait for the disk: begins to read at the positions that the sink returned, reads ahead,
    /// and saves.
    pub(super) fn file_work(&mut self) -> Result<(), ConsumerError> {
        if let Some((positions, permit)) = self.found.take() {
            self.begin_at(&positions)?;
            self.is_lost = false;
            // A probe without an outcome would count as failed. Other calls of `position` say nothing about health:
            // only batches do.
            if permit.is_probe() {
                HealthChange::log(self.health.succeeded(permit, self.shared.life.now()), &self.settings.name);
            }
        }
        if self.must_read_ahead() {
            for (shard, assigned) in self.shards.iter_mut().zip(&self.assigned) {
                if shard.must_read_ahead(&assigned.log) {
                    shard.read_ahead(&assigned.log);
                }
            }
        }
        if self.is_save_due() {
            self.save();
        }
        Ok(())
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

    /// Asks the sink for its position in every shard. Returns the work done.
    async fn find_positions(&mut self) -> usize {
        let Some(permit) = self.admit() else { return 0 };
        let mut positions = Vec::with_capacity(self.assigned.len());
        for assigned in &self.assigned {
            let position = guarded(&self.shared.life, self.sink.position(assigned.log.shard)).await;
            match position {
                Ok(position) => positions.push(position),
                Err(error) => {
                    self.failed(permit, &error);
                    return 0;
                }
            }
        }
        self.found = Some((positions, permit));
        1
    }

    /// Begins to read at the sink's positions.
    fn begin_at(&mut self, positions: &[Option<Position>]) -> Result<(), ConsumerError> {
        let mut shards = Vec::with_capacity(self.assigned.len());
        for (i, (assigned, progress)) in self.assigned.iter().zip(&self.progress).enumerate() {
            let AssignedShard { log, lock, hold, .. } = assigned;
            let shard = log.shard;
            let (reader, position) = match positions[i] {
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
            shards.push(SinkShard {
                reader,
                registration: Registration::default(),
                hold: Arc::clone(hold),
                position,
                read_ahead: Offset(0),
            });
        }
        self.shards = shards;
        Ok(())
    }

    /// Delivers a batch to the sink. Returns the number of events or the sink's error, and an outer error if the log
    /// cannot be read.
    async fn take_in(&mut self, at: usize) -> Result<Result<u64, HandlerError>, ConsumerError> {
        let log = &self.assigned[at].log;
        let shard = &mut self.shards[at];
        let is_limited = self.is_task && shard.is_in_older_segment(log);
        let mut batch = Batch {
            begun: shard.position,
            filter: &self.settings.filter,
            left: self.batch_max,
            until: if is_limited { shard.read_ahead } else { Offset(u64::MAX) },
            unwanted_left: if self.is_task { UNWANTED_MAX } else { usize::MAX },
            events: 0,
            is_cut: false,
            reader: &mut shard.reader,
        };
        self.shared.life.enter_handler();
        let applied = guarded(&self.shared.life, self.sink.apply(&mut batch)).await;
        self.shared.life.leave_handler();
        let (events, is_cut) = (batch.events, batch.is_cut);
        if is_cut && events == 0 {
            // Report the log's error, whatever error the sink returned.
            shard.reader.next()?;
            return Ok(Err("the log could not be read further".into()));
        }
        if let Err(error) = applied {
            return Ok(Err(error));
        }
        if shard.reader.offset() == shard.position.offset() {
            return Ok(Err("the sink took nothing from its batch".into()));
        }
        shard.position = shard.reader.position_after(&shard.position);
        Ok(Ok(events))
    }

    fn positions(&self) -> impl Iterator<Item = Position> {
        self.shards.iter().map(|shard| shard.position)
    }

    fn is_saved(&self) -> bool {
        self.shards.is_empty() || self.positions().eq(self.saved.iter().copied())
    }

    fn is_save_due(&self) -> bool {
        self.now() >= self.save_at && !self.is_saved()
    }

    /// Saves the sink's positions, and lets retention free the events below.
    pub(super) fn save(&mut self) {
        if self.is_saved() {
            return;
        }
        let (now, positions) = (self.now(), self.positions().collect::<Vec<_>>());
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

    /// Renews the report.
    pub(super) fn report(&self) {
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

    /// Registers the caller with each log. Returns the time for which there is nothing to do, without limit if `None`
    /// within; `None` if there may be work now.
    pub(super) fn rest(&mut self, register: impl Fn(&Reader<E>, &mut Registration)) -> Option<Option<Duration>> {
        let now = self.now();
        let mut due = (self.save_at > now && !self.is_saved()).then_some(self.save_at);
        if self.may_run() {
            if self.next_at > now {
                due = Some(due.map_or(self.next_at, |due| due.min(self.next_at)));
            } else if self.is_lost {
                return None;
            } else {
                self.shards.iter_mut().for_each(|shard| register(&shard.reader, &mut shard.registration));
                if self.shards.iter().any(SinkShard::has_unread) {
                    return None;
                }
            }
        }
        Some(due.map(|due| due.saturating_sub(now)))
    }
}

/// Awaits the sink as a part of its consumer: from there, waiting for the consumer is an error. Turns a panic, and a
/// cancellation of the running batch, into an error.
async fn guarded<T>(life: &Life, future: impl Future<Output = Result<T, HandlerError>>) -> Result<T, HandlerError> {
    let mut future = pin!(future);
    poll_fn(|context| {
        if life.is_cancelling() {
            return Poll::Ready(Err("the sink was stopped at its deadline".into()));
        }
        let polled = life.on_this_thread(true, || catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(context))));
        polled.unwrap_or_else(|panic| Poll::Ready(Err(panicked(&*panic))))
    })
    .await
}
