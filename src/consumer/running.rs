//! A consumer's threads: the shell around a driver. One thread drives; with a concurrency above 1, worker threads call
//! the handler.
//!
//! Idle threads sleep. They are woken by the log, by a call of the handle, by a worker that is done, or at a due time.

use std::sync::Arc;
use std::task::Waker;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender, bounded, unbounded};

use super::driver::Driver;
use super::driver::job::{Failed, Handler, Job};
use super::effects::Call;
use super::error::ConsumerError;
use super::life::Life;
use super::report::ConsumerReport;
use super::services::{Running, Services};
use super::watches::Watches;
use crate::error::{HandlerError, OpenError, WaitError};
use crate::event::{Event, Meta, Offset};
use crate::log::access::Access;
use crate::log::finder::Finder;
use crate::log::holds::Hold;
use crate::log::segment::ShardLog;
use crate::sync::{Arrivals, Mutex, lock, thread, thread_waker};
use crate::sync::{Promise, Registration, promise};

/// Events handled in place before other work gets its turn.
const SLICE: usize = 4096;
/// The longest time before other work gets its turn.
const SLICE_TIME: Duration = Duration::from_millis(2);
/// Number and length of the naps after the last event, before the thread asks the log to wake it. Under load, the
/// shards then need to wake no thread.
const LINGERS: u32 = 8;
const LINGER: Duration = Duration::from_micros(250);

/// A call that the driver's owner runs between two steps.
type Ask<E> = Box<dyn FnOnce(&mut Driver<E>) + Send>;

/// The state shared by a running consumer and its handles.
pub(super) struct ConsumerShared<E: Event> {
    pub(super) life: Life,
    pub(super) asks: Arrivals<Ask<E>>,
    pub(super) report: Mutex<ConsumerReport>,
    logs: Vec<(Arc<ShardLog>, Arc<Hold>)>,
    pub(super) watches: Arc<Watches>,
}

impl<E: Event> std::fmt::Debug for ConsumerShared<E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ConsumerShared").finish_non_exhaustive()
    }
}

impl<E: Event> ConsumerShared<E> {
    /// Returns the shared state of a consumer that `driver` will drive.
    pub(super) fn new(driver: &Driver<E>, life: Life) -> Self {
        Self {
            life,
            asks: Arrivals::new(),
            report: Mutex::new(ConsumerReport::of(driver, Duration::ZERO)),
            logs: driver.followers().iter().map(|follower| follower.log_and_hold()).collect(),
            watches: Arc::clone(driver.watches()),
        }
    }

    pub(super) fn is_called(&self) -> bool {
        !self.asks.is_empty() || self.life.is_stopping()
    }

    /// Runs the calls that have arrived. Returns their number.
    pub(super) fn run_asks(&self, driver: &mut Driver<E>) -> usize {
        let asks = self.asks.take();
        let count = asks.len();
        asks.into_iter().for_each(|ask| ask(driver));
        count
    }

    /// Saves everything at the end of a run that ended with `driven`. Returns the run's error, otherwise the error of
    /// saving.
    pub(super) fn save_at_end(
        &self,
        driver: &mut Driver<E>,
        driven: Result<(), ConsumerError>,
    ) -> Result<(), ConsumerError> {
        // An event whose record could not be written is judged again in the next run. `stop` returns that error, unless
        // the consumer ended by an earlier one.
        let saved = driver.save();
        if let (Err(_), Err(error)) = (&driven, &saved) {
            let consumer = &*driver.settings().name;
            tracing::error!(
                consumer,
                error = crate::error::with_sources(&error),
                "records could not be saved at the end; their events are handled again"
            );
        }
        driven.and(saved)
    }

    /// Renews the report, and answers the waiters for the end of the backlog. `oldest` is the time when the oldest
    /// running job was handed out.
    pub(super) fn show(&self, driver: &mut Driver<E>, oldest: Option<Duration>) {
        let mut report = ConsumerReport::of(driver, self.life.now());
        report.running_since = oldest;
        *lock(&self.report) = report;
        driver.answer_if_caught_up();
    }

    /// Returns the error for a call on a consumer that has ended.
    pub(super) fn ended(&self) -> ConsumerError {
        ConsumerError::Ended { failure: lock(&self.report).failure.clone() }
    }

    /// Runs `look` on the driver between two steps. The promise is broken if the consumer has ended.
    pub(super) fn ask<T: Send + 'static>(&self, look: impl FnOnce(&mut Driver<E>) -> T + Send + 'static) -> Promise<T> {
        let (promise, keeping) = promise();
        drop(self.asks.push(Box::new(move |driver: &mut Driver<E>| keeping.keep(look(driver)))));
        self.life.wake();
        promise
    }
}

impl<E: Event> ConsumerShared<E> {
    /// Returns a promise that is kept once the driver has caught up.
    pub(super) fn ask_for_all(&self) -> Promise<()> {
        let (drained, keeping) = promise();
        // This promise is not needed: the driver keeps the other one.
        drop(self.ask(move |driver| driver.wait_for_all(keeping)));
        drained
    }
}

impl<E: Event> Running for ConsumerShared<E> {
    fn life(&self) -> &Life {
        &self.life
    }

    fn report(&self) -> ConsumerReport {
        let mut report = lock(&self.report).clone();
        report.refresh(self.logs.iter().map(|(log, hold)| (&**log, hold.get())));
        // For jobs at workers: the time when the oldest was sent.
        let at_a_worker = report.running_since.map(|since| self.life.now().saturating_sub(since));
        let inside = self.life.in_handler_for();
        report.running = report.running.max(usize::from(inside.is_some()));
        report.running_since = inside.or(at_a_worker);
        report.is_running = !self.life.has_ended();
        report
    }

    fn drain(&self, deadline: Option<Instant>) -> Result<(), ConsumerError> {
        if !self.life.may_await() {
            return Err(WaitError::OnEngineThread.into());
        }
        let drained = self.ask_for_all();
        self.life.help(deadline);
        drained.wait(deadline).map_err(WaitError::from)?.ok_or_else(|| self.ended())
    }
}

/// A handler that several threads may call.
pub(super) trait Serve<E: Event>:
    Fn(&E::Archived, &Meta, &Call<'_>) -> Result<(), HandlerError> + Send + Sync + 'static
{
}

impl<E: Event, F> Serve<E> for F where
    F: Fn(&E::Archived, &Meta, &Call<'_>) -> Result<(), HandlerError> + Send + Sync + 'static
{
}

/// Starts a consumer's threads.
pub(super) fn start<E: Event>(
    driver: Driver<E>,
    services: Arc<Services>,
    handler: impl Serve<E>,
) -> Result<Arc<ConsumerShared<E>>, ConsumerError> {
    let shared = Arc::new(ConsumerShared::new(&driver, Life::new(services.identity(), None)));
    let name = driver.settings().name.to_string();
    let handler = Arc::new(handler);
    let concurrency = driver.settings().concurrency;
    let (jobs, jobs_rx) = bounded(concurrency);
    let (outcomes_tx, outcomes) = unbounded();
    let mut shell = Shell {
        driver,
        shared: Arc::clone(&shared),
        jobs,
        outcomes,
        out: Vec::new(),
        idle_rounds: 0,
        waker: None,
        registrations: Vec::new(),
    };
    // Workers first: until the driver runs they are idle, and they end with their channel.
    let mut workers = Vec::new();
    if concurrency > 1 {
        for i in 0..concurrency {
            let worker = Worker::new(&shell, jobs_rx.clone(), outcomes_tx.clone());
            let handler = Arc::clone(&handler);
            workers.push(spawn(&services, format!("{name}-{i}"), move || worker.run(&*handler))?);
        }
    }
    drop((jobs_rx, outcomes_tx));
    let leaving = Arc::clone(&services);
    let ending = Arc::clone(&shared);
    let left = name.clone();
    // Register before the thread can unregister itself.
    services.note_running(&name, Arc::clone(&shared) as Arc<dyn Running>);
    let spawned = spawn(&services, name.clone(), move || {
        let failure = ending.life.run(&left, || shell.run(&*handler));
        let is_busy = shell.driver.running() > 0;
        lock(&ending.report).failure.clone_from(&failure);
        drop(shell);
        drop(ending.asks.close());
        // Without jobs the workers end and release the store's lock. A worker that hangs is left behind.
        if !is_busy && workers.into_iter().map(thread::JoinHandle::join).any(|joined| joined.is_err()) {
            tracing::error!(consumer = left, "a consumer's worker panicked outside the handler");
        }
        leaving.note_end(&left, failure);
        // Releases the store's lock: a waiter for the end may open the store again.
        drop(leaving);
        ending.life.end();
    });
    if spawned.is_err() {
        // A caller may have found the consumer meanwhile, and may be waiting for it. The caller of `start` notes the
        // failure.
        drop(shared.asks.close());
        shared.life.end();
    }
    spawned.map(|_| shared)
}

pub(super) fn spawn(
    services: &Services,
    name: String,
    body: impl FnOnce() + Send + 'static,
) -> Result<thread::JoinHandle<()>, ConsumerError> {
    let spawned = thread::Builder::new().name(format!("corelane-{name}")).spawn(body);
    let io = |source| OpenError::Io { action: "starting a thread for", path: services.dir(&name), source };
    spawned.map_err(|source| io(source).into())
}

/// A job that a worker has finished.
type Outcome = (Job, Result<(), Failed>);

struct Shell<E: Event> {
    driver: Driver<E>,
    shared: Arc<ConsumerShared<E>>,
    jobs: Sender<Job>,
    outcomes: Receiver<Outcome>,
    /// Jobs at workers, each with the time when it was sent.
    out: Vec<((usize, Offset), Duration)>,
    idle_rounds: u32,
    /// Wakes this thread. Created when it first sleeps.
    waker: Option<Waker>,
    /// This thread's places among the waiters of each log.
    registrations: Vec<Registration>,
}

impl<E: Event> Shell<E> {
    fn now(&self) -> Duration {
        self.shared.life.now()
    }

    fn run(&mut self, handler: &impl Serve<E>) -> Result<(), ConsumerError> {
        let driven = self.drive(handler);
        let ended = self.shared.save_at_end(&mut self.driver, driven);
        self.report();
        ended
    }

    /// Drives the consumer until it is asked to stop and no job is in flight.
    fn drive(&mut self, handler: &impl Serve<E>) -> Result<(), ConsumerError> {
        let mut finders: Vec<_> = self.driver.followers().iter().map(|follower| follower.finder()).collect();
        let mut access = Access::new::<E>();
        let name = Arc::clone(&self.driver.settings().name);
        let is_alone = self.driver.settings().concurrency == 1;
        let mut handler = |event: &E::Archived, meta: &Meta, call: &Call<'_>| handler(event, meta, call);
        loop {
            let mut work = self.shared.run_asks(&mut self.driver);
            work += self.take_outcomes()?;
            work += self.driver.step(self.now(), self.idle_rounds > 0)?;
            let is_stopping = self.shared.life.is_stopping();
            if !is_stopping {
                let until = self.now() + SLICE_TIME;
                while let Some(job) = self.driver.next_job(self.now())? {
                    work += 1;
                    if is_alone {
                        self.shared.life.enter_handler();
                        let outcome = job.execute::<E>(&name, &mut finders[job.shard], &mut access, &mut handler);
                        let now = self.shared.life.leave_handler();
                        self.driver.done(job, outcome, now)?;
                        if now > until || self.shared.is_called() {
                            break;
                        }
                    } else {
                        self.hand_out(job)?;
                    }
                }
                if is_alone {
                    work += self.run_in_place(&mut handler)?;
                }
            }
            self.report();
            if is_stopping && self.driver.running() == 0 {
                return Ok(());
            }
            if work == 0 {
                self.sleep(is_stopping);
            } else {
                self.idle_rounds = 0;
            }
        }
    }

    fn run_in_place(&mut self, handler: &mut Handler<'_, E>) -> Result<usize, ConsumerError> {
        self.shared.life.enter_handler();
        let shared = &*self.shared;
        let (began, mut events, mut look_at) = (Instant::now(), 0_u32, 1_u32);
        // Checked before every event. The time is read soon after the first, then rarely.
        let is_called = || {
            let is_over = events == look_at && {
                look_at += look_at.min(64);
                began.elapsed() > SLICE_TIME
            };
            events += 1;
            is_over || shared.is_called()
        };
        let work = self.driver.run_in_place(SLICE, || shared.life.now(), is_called, handler);
        self.shared.life.leave_handler();
        work
    }

    fn hand_out(&mut self, job: Job) -> Result<(), ConsumerError> {
        self.out.push((job.identity(), self.now()));
        // The channel has room for every job in flight.
        self.jobs.try_send(job).map_err(|_| ConsumerError::Panicked { text: "its workers are gone".to_owned() })
    }

    fn take_outcomes(&mut self) -> Result<usize, ConsumerError> {
        let mut taken = 0;
        while let Ok((job, outcome)) = self.outcomes.try_recv() {
            let of = job.identity();
            if let Some(at) = self.out.iter().position(|(out, _)| *out == of) {
                self.out.swap_remove(at);
            }
            let now = self.now();
            self.driver.done(job, outcome, now)?;
            taken += 1;
        }
        Ok(taken)
    }

    fn report(&mut self) {
        self.shared.show(&mut self.driver, self.out.iter().map(|(_, since)| *since).min());
    }

    /// Sleeps until there may be something to do.
    fn sleep(&mut self, is_stopping: bool) {
        self.idle_rounds = self.idle_rounds.saturating_add(1);
        if self.idle_rounds <= LINGERS {
            return thread::park_timeout(LINGER);
        }
        if !is_stopping {
            let waker = self.waker.get_or_insert_with(thread_waker);
            let followers = self.driver.followers();
            self.registrations.resize_with(followers.len(), Registration::default);
            for (follower, at) in followers.iter().zip(&mut self.registrations).filter(|_| self.driver.may_read()) {
                follower.register_thread(at, waker);
            }
            if self.driver.has_unread() {
                return;
            }
        }
        // A wake-up before this leaves a token, so `park` returns at once.
        match self.driver.next_due() {
            Some(due) => thread::park_timeout(due.saturating_sub(self.now())),
            None => thread::park(),
        }
    }
}

/// Calls the handler on its own thread.
struct Worker<E: Event> {
    shared: Arc<ConsumerShared<E>>,
    consumer: Arc<str>,
    finders: Vec<Finder>,
    jobs: Receiver<Job>,
    outcomes: Sender<Outcome>,
}

impl<E: Event> Worker<E> {
    fn new(shell: &Shell<E>, jobs: Receiver<Job>, outcomes: Sender<Outcome>) -> Self {
        let consumer = Arc::clone(&shell.driver.settings().name);
        let finders = shell.driver.followers().iter().map(|follower| follower.finder()).collect();
        Self { shared: Arc::clone(&shell.shared), consumer, finders, jobs, outcomes }
    }

    /// Runs until the job channel is closed.
    fn run(mut self, handler: &impl Serve<E>) {
        self.shared.life.take_thread(false);
        let mut access = Access::new::<E>();
        let mut handler = |event: &E::Archived, meta: &Meta, call: &Call<'_>| handler(event, meta, call);
        while let Ok(job) = self.jobs.recv() {
            let finder = &mut self.finders[job.shard];
            let outcome = job.execute::<E>(&self.consumer, finder, &mut access, &mut handler);
            if self.outcomes.send((job, outcome)).is_err() {
                // The driving thread has ended. The event is handled again after a restart.
                break;
            }
            self.shared.life.wake();
        }
    }
}
