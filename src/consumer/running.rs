//! A consumer's threads: the thin shell around a driver. One thread drives; with a concurrency above one, others call the handler.
//!
//! They sleep while there is nothing to do: the log wakes them, a call of the handle, a worker that is done, or the time.

use std::sync::Arc;
use std::task::Waker;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender, bounded, unbounded};

use super::driver::Driver;
use super::driver::execute::{Failed, Handler, Job};
use super::effects::Call;
use super::error::ConsumerError;
use super::life::Life;
use super::report::ConsumerReport;
use super::services::{Running, Services};
use super::watches::Watches;
use crate::error::HandlerError;
use crate::error::OpenError;
use crate::event::{Event, Meta, Offset};
use crate::log::access::Access;
use crate::log::finder::Finder;
use crate::log::holds::Hold;
use crate::log::segment::ShardLog;
use crate::sync::{Arrivals, Mutex, lock, thread, thread_waker};
use crate::sync::{Promise, promise};

/// Events handled where they lie in one go.
const SLICE: usize = 4096;
/// How long a slice may last before other work has its turn.
const SLICE_TIME: Duration = Duration::from_millis(2);
/// After the last event, so often the log is looked at after so long, before it is asked to wake this thread. Under load the shards
/// have nobody to wake.
const LINGERS: u32 = 8;
const LINGER: Duration = Duration::from_micros(250);

/// Something that is done between two steps, by who drives.
type Ask<E> = Box<dyn FnOnce(&mut Driver<E>) + Send>;

/// What a consumer's thread and its handles share.
pub(super) struct Control<E: Event> {
    pub(super) life: Life,
    asks: Arrivals<Ask<E>>,
    report: Mutex<ConsumerReport>,
    places: Vec<(Arc<ShardLog>, Arc<Hold>)>,
    pub(super) watches: Arc<Watches>,
}

impl<E: Event> std::fmt::Debug for Control<E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Control").finish_non_exhaustive()
    }
}

impl<E: Event> Control<E> {
    fn is_called(&self) -> bool {
        !self.asks.is_empty() || self.life.is_stopping()
    }

    /// Lets `look` see the driver between two steps. The promise is broken where the consumer has ended.
    pub(super) fn ask<T: Send + 'static>(&self, look: impl FnOnce(&mut Driver<E>) -> T + Send + 'static) -> Promise<T> {
        let (promise, keeping) = promise();
        drop(self.asks.push(Box::new(move |driver: &mut Driver<E>| keeping.keep(look(driver)))));
        self.life.wake();
        promise
    }
}

impl<E: Event> Running for Control<E> {
    fn life(&self) -> &Life {
        &self.life
    }

    fn report(&self) -> ConsumerReport {
        let mut report = lock(&self.report).clone();
        report.renew(self.places.iter().map(|(log, hold)| (&**log, hold.get())));
        // Of one at a worker it is known when it went there.
        let at_a_worker = report.running_since.map(|since| self.life.now().saturating_sub(since));
        let inside = self.life.inside_for();
        report.running = report.running.max(usize::from(inside.is_some()));
        report.running_since = inside.or(at_a_worker);
        report.is_running = !self.life.has_ended();
        report
    }

    fn drain(&self, deadline: Option<Instant>) -> bool {
        if !self.life.may_await() {
            return false;
        }
        loop {
            let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return false;
            }
            match self.ask(|driver| driver.is_caught_up()).wait(deadline) {
                Ok(Some(true)) => return true,
                Ok(Some(false)) => crate::sync::nap(Duration::from_millis(1)),
                // It has ended, or the time is over.
                Ok(None) | Err(_) => return false,
            }
        }
    }
}

/// A handler that many threads may call.
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
) -> Result<Arc<Control<E>>, ConsumerError> {
    let control = Arc::new(Control {
        life: Life::new(&services),
        asks: Arrivals::new(),
        report: Mutex::new(ConsumerReport::of(&driver, Duration::ZERO)),
        places: driver.desks().iter().map(|desk| desk.place()).collect(),
        watches: Arc::clone(driver.watches()),
    });
    let name = driver.settings().name.to_string();
    let handler = Arc::new(handler);
    let concurrency = driver.settings().concurrency;
    let (jobs, jobs_rx) = bounded(concurrency);
    let (outcomes_tx, outcomes) = unbounded();
    let mut shell =
        Shell { driver, control: Arc::clone(&control), jobs, outcomes, out: Vec::new(), idle_rounds: 0, waker: None };
    // The workers before who drives: until it runs, they have nothing to do and end with the channel.
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
    let ending = Arc::clone(&control);
    let left = name.clone();
    // Before the thread may leave.
    services.runs(&name, Arc::clone(&control) as Arc<dyn Running>);
    let spawned = spawn(&services, name.clone(), move || {
        let failure = ending.life.run(&left, || shell.run(&*handler));
        let is_busy = shell.driver.running() > 0;
        lock(&ending.report).failure.clone_from(&failure);
        drop(shell);
        drop(ending.asks.close());
        // Without jobs they end, and with them their holds on the store's lock; one that hangs is left behind.
        if !is_busy && workers.into_iter().map(thread::JoinHandle::join).any(|joined| joined.is_err()) {
            tracing::error!(consumer = left, "a worker panicked outside the handler");
        }
        leaving.left(&left, failure);
        // With it the store's lock: who waits for the end may open the store again.
        drop(leaving);
        ending.life.end();
    });
    if spawned.is_err() {
        // Somebody may have found it meanwhile, and wait for it. That it is driven no more, the caller notes, with the reason.
        drop(control.asks.close());
        control.life.end();
    }
    spawned.map(|_| control)
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

/// What a worker has to report.
type Outcome = (Job, Result<(), Failed>);

struct Shell<E: Event> {
    driver: Driver<E>,
    control: Arc<Control<E>>,
    jobs: Sender<Job>,
    outcomes: Receiver<Outcome>,
    /// Jobs that workers have, since when.
    out: Vec<((usize, Offset), Duration)>,
    idle_rounds: u32,
    /// Wakes this thread; made when it first sleeps.
    waker: Option<Waker>,
}

impl<E: Event> Shell<E> {
    fn now(&self) -> Duration {
        self.control.life.now()
    }

    fn run(&mut self, handler: &impl Serve<E>) -> Result<(), ConsumerError> {
        let driven = self.drive(handler);
        // What could not be recorded comes again, and whoever stops it is told; if it ends by an error, why it ended.
        let saved = self.driver.save();
        if let (Err(_), Err(error)) = (&driven, &saved) {
            let consumer = &*self.driver.settings().name;
            let error = error as &(dyn std::error::Error + 'static);
            tracing::error!(consumer, error, "what was told could not be saved when a consumer ended; it comes again");
        }
        self.report();
        driven.and(saved)
    }

    /// Until it is asked to stop and nothing is out.
    fn drive(&mut self, handler: &impl Serve<E>) -> Result<(), ConsumerError> {
        let mut finders: Vec<_> = self.driver.desks().iter().map(|desk| desk.finder()).collect();
        let mut access = Access::new::<E>();
        let name = Arc::clone(&self.driver.settings().name);
        let is_alone = self.driver.settings().concurrency == 1;
        let mut handler = |event: &E::Archived, meta: &Meta, call: &Call<'_>| handler(event, meta, call);
        loop {
            let asks = self.control.asks.take();
            let mut work = asks.len();
            asks.into_iter().for_each(|ask| ask(&mut self.driver));
            work += self.take_outcomes()?;
            work += self.driver.step(self.now(), self.idle_rounds > 0)?;
            let is_stopping = self.control.life.is_stopping();
            if !is_stopping {
                let until = self.now() + SLICE_TIME;
                while let Some(job) = self.driver.next_job(self.now())? {
                    work += 1;
                    if is_alone {
                        self.control.life.go_inside();
                        let outcome = job.execute::<E>(&name, &mut finders[job.desk], &mut access, &mut handler);
                        let now = self.control.life.come_out();
                        self.driver.done(job, outcome, now)?;
                        if now > until || self.control.is_called() {
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
        self.control.life.go_inside();
        let control = &*self.control;
        let (began, mut events, mut look_at) = (Instant::now(), 0_u32, 1_u32);
        // Looked at before every event; the time soon after the first, and then rarely.
        let is_called = || {
            let is_over = events == look_at && {
                look_at += look_at.min(64);
                began.elapsed() > SLICE_TIME
            };
            events += 1;
            is_over || control.is_called()
        };
        let work = self.driver.run_in_place(SLICE, || control.life.now(), is_called, handler);
        self.control.life.come_out();
        work
    }

    fn hand_out(&mut self, job: Job) -> Result<(), ConsumerError> {
        self.out.push((job.of(), self.now()));
        // There are as many places as jobs may be out.
        self.jobs.try_send(job).map_err(|_| ConsumerError::Panicked { text: "its workers are gone".to_owned() })
    }

    fn take_outcomes(&mut self) -> Result<usize, ConsumerError> {
        let mut taken = 0;
        while let Ok((job, outcome)) = self.outcomes.try_recv() {
            let of = job.of();
            if let Some(at) = self.out.iter().position(|(out, _)| *out == of) {
                self.out.swap_remove(at);
            }
            let now = self.now();
            self.driver.done(job, outcome, now)?;
            taken += 1;
        }
        Ok(taken)
    }

    fn report(&self) {
        let mut report = ConsumerReport::of(&self.driver, self.now());
        report.running_since = self.out.iter().map(|(_, since)| *since).min();
        *lock(&self.control.report) = report;
    }

    /// Sleeps until there may be something to do.
    fn sleep(&mut self, is_stopping: bool) {
        self.idle_rounds = self.idle_rounds.saturating_add(1);
        if self.idle_rounds <= LINGERS {
            return thread::park_timeout(LINGER);
        }
        if !is_stopping {
            let waker = self.waker.get_or_insert_with(thread_waker);
            for desk in self.driver.desks().iter().filter(|_| self.driver.may_read()) {
                desk.register(waker);
            }
            if self.driver.has_unread() {
                return;
            }
        }
        // Who wakes this thread leaves a token, so what came since the last look is not slept over.
        match self.driver.next_due() {
            Some(due) => thread::park_timeout(due.saturating_sub(self.now())),
            None => thread::park(),
        }
    }
}

/// Calls the handler.
struct Worker<E: Event> {
    control: Arc<Control<E>>,
    consumer: Arc<str>,
    finders: Vec<Finder>,
    jobs: Receiver<Job>,
    outcomes: Sender<Outcome>,
}

impl<E: Event> Worker<E> {
    fn new(shell: &Shell<E>, jobs: Receiver<Job>, outcomes: Sender<Outcome>) -> Self {
        let consumer = Arc::clone(&shell.driver.settings().name);
        let finders = shell.driver.desks().iter().map(|desk| desk.finder()).collect();
        Self { control: Arc::clone(&shell.control), consumer, finders, jobs, outcomes }
    }

    /// Until nobody has jobs any more.
    fn run(mut self, handler: &impl Serve<E>) {
        self.control.life.take_thread(false);
        let mut access = Access::new::<E>();
        let mut handler = |event: &E::Archived, meta: &Meta, call: &Call<'_>| handler(event, meta, call);
        while let Ok(job) = self.jobs.recv() {
            let finder = &mut self.finders[job.desk];
            let outcome = job.execute::<E>(&self.consumer, finder, &mut access, &mut handler);
            if self.outcomes.send((job, outcome)).is_err() {
                // Who drives has ended; what was handled now is handled again after a restart.
                break;
            }
            self.control.life.wake();
        }
    }
}
