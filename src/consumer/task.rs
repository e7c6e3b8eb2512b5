//! A consumer with an asynchronous handler: the shell around a driver that is a task of the application's runtime. It
//! owns no thread.
//!
//! The driver is in a seat, from where any thread may take a step with it: the task, one of the runtime's blocking
//! threads when a step may wait for the disk, and a thread that waits for the consumer. So a wait ends even if the
//! runtime is not running. The task sleeps until the log, a handler, a handle or a timer wakes it.

use std::collections::HashMap;
use std::future::{Future, poll_fn};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::task::{Poll, Waker};
use std::time::Duration;

use tokio::task::{AbortHandle, spawn_blocking, yield_now};

use super::attempt::{AttemptEnd, AttemptEnds, AttemptReport, JobId, attempt};
use super::delivered::Delivered;
use super::driver::Driver;
use super::driver::job::Job;
use super::error::ConsumerError;
use super::life::{Host, Life};
use super::running::ConsumerShared;
use super::runtime::{OwnRuntime, check_started, sleep_until_woken};
use super::services::{Running, Services};
use crate::error::{HandlerError, panic_text};
use crate::event::Event;
use crate::log::access::Access;
use crate::log::finder::Finder;
use crate::sync::{Mutex, Registration, lock, lock_until};

/// Jobs handed out in one step, before other tasks get their turn.
const JOBS_MAX: usize = 256;
/// The shortest pause between two steps while a stopping consumer waits for running handlers.
const STOPPING_STEP: Duration = Duration::from_millis(10);

/// Starts a consumer's tasks on `runtime`.
pub(super) fn start<E, F, Fut>(
    runtime: OwnRuntime,
    driver: Driver<E>,
    services: Arc<Services>,
    handler: F,
) -> Result<Arc<ConsumerShared<E>>, ConsumerError>
where
    E: Event,
    F: Fn(Delivered<E>) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<(), HandlerError>> + Send + 'static,
{
    let handle = runtime.handle().clone();
    let seat = Arc::new(Seat { shell: Mutex::new(None), ends: Arc::default(), runtime });
    let life = Life::new(services.identity(), Some(Arc::clone(&seat) as Arc<dyn Host>));
    let shared = Arc::new(ConsumerShared::new(&driver, life));
    let (handler, spawner) = (Arc::new(handler), handle.clone());
    let name = driver.settings().name.to_string();
    let shell = Shell {
        finders: driver.followers().iter().map(|follower| follower.finder()).collect(),
        driver,
        shared: Arc::clone(&shared),
        services: Arc::clone(&services),
        ends: Arc::clone(&seat.ends),
        spawn: Box::new(move |event, report| {
            spawner.spawn(attempt(Arc::clone(&handler), event, report)).abort_handle()
        }),
        access: Access::new::<E>(),
        out: HashMap::new(),
        registrations: Vec::new(),
        is_idle: false,
        ending: None,
    };
    *lock(&seat.shell) = Some(shell);
    // Register before the task can unregister itself.
    services.note_running(&name, Arc::clone(&shared) as Arc<dyn Running>);
    drop(handle.spawn(drive(Leaving(seat), Arc::clone(&shared))));
    check_started(&shared.report())?;
    Ok(shared)
}

/// The result of a step.
enum Step {
    Worked,
    Idle,
    Ended,
}

/// A job at a handler.
struct Out {
    job: Job,
    since: Duration,
    task: AbortHandle,
}

struct Shell<E: Event> {
    driver: Driver<E>,
    shared: Arc<ConsumerShared<E>>,
    services: Arc<Services>,
    ends: Arc<AttemptEnds>,
    /// Starts the task of an attempt.
    spawn: Box<dyn Fn(Delivered<E>, AttemptReport<E>) -> AbortHandle + Send>,
    finders: Vec<Finder>,
    access: Access,
    out: HashMap<JobId, Out>,
    /// The task's places among the waiters of each log.
    registrations: Vec<Registration>,
    /// `true` if the last step found nothing to do.
    is_idle: bool,
    /// The reason why the consumer ends by itself.
    ending: Option<ConsumerError>,
}

impl<E: Event> Shell<E> {
    fn now(&self) -> Duration {
        self.shared.life.now()
    }

    /// Returns `true` if the next step may wait for the disk.
    fn may_block(&self) -> bool {
        self.ending.is_some() || self.shared.is_called() || self.driver.may_block(self.now())
    }

    /// Takes a step. Returns the work done.
    fn step(&mut self) -> usize {
        let work = self.guarded(Self::whole_step);
        self.is_idle = work == 0;
        work
    }

    /// Takes a step that does not wait for the disk. Returns the work done.
    fn quick_step(&mut self) -> usize {
        let work = self.guarded(Self::step_in_memory);
        self.is_idle = work == 0;
        work
    }

    /// Takes the ends of attempts and answers handles, and nothing else.
    fn help(&mut self) {
        self.guarded(Self::answer);
    }

    /// Calls `part` as the consumer's own code. Returns the work done. Notes an error, which ends the consumer.
    fn guarded(&mut self, part: fn(&mut Self) -> Result<usize, ConsumerError>) -> usize {
        let shared = Arc::clone(&self.shared);
        let done = shared.life.on_this_thread(true, || catch_unwind(AssertUnwindSafe(|| part(self))));
        let done = done.unwrap_or_else(|panic| Err(ConsumerError::Panicked { text: panic_text(&*panic) }));
        let work = done.unwrap_or_else(|error| {
            self.ending.get_or_insert(error);
            1
        });
        if self.ending.is_some() || shared.life.is_cancelling() {
            self.out.values().for_each(|out| out.task.abort());
        }
        shared.show(&mut self.driver, self.out.values().map(|out| out.since).min());
        work
    }

    fn answer(&mut self) -> Result<usize, ConsumerError> {
        let ends = self.take_ends()?;
        let asks = if self.ending.is_none() { self.shared.run_asks(&mut self.driver) } else { 0 };
        if asks > 0 {
            // The caller may be the only thread that this consumer gets.
            self.driver.answer_handles();
        }
        Ok(ends + asks)
    }

    fn whole_step(&mut self) -> Result<usize, ConsumerError> {
        let mut work = self.answer()?;
        if self.ending.is_none() {
            work += self.driver.step(self.now(), self.is_idle)?;
            work += self.hand_out_jobs()?;
        }
        Ok(work)
    }

    fn step_in_memory(&mut self) -> Result<usize, ConsumerError> {
        let mut work = self.take_ends()?;
        if self.ending.is_none() {
            work += self.driver.read(self.now())?;
            work += self.hand_out_jobs()?;
        }
        Ok(work)
    }

    fn hand_out_jobs(&mut self) -> Result<usize, ConsumerError> {
        let mut jobs = 0;
        while jobs < JOBS_MAX
            && !self.shared.life.is_stopping()
            && let Some(job) = self.driver.next_job(self.now())?
        {
            self.hand_out(job)?;
            jobs += 1;
        }
        Ok(jobs)
    }

    fn hand_out(&mut self, job: Job) -> Result<(), ConsumerError> {
        let (id, since) = (job.identity(), self.now());
        let consumer = &self.driver.settings().name;
        match job.deliver::<E>(consumer, &mut self.finders[job.shard], &mut self.access) {
            Ok(event) => {
                let task = (self.spawn)(event, AttemptReport::new(id, &self.shared, &self.ends));
                self.out.insert(id, Out { job, since, task });
                Ok(())
            }
            Err(failed) => self.driver.done(job, Err(failed), since),
        }
    }

    fn take_ends(&mut self) -> Result<usize, ConsumerError> {
        let ends = self.ends.take();
        let count = ends.len();
        let mut taken = Ok(count);
        for (id, end) in ends {
            let Out { job, .. } = self.out.remove(&id).expect("each attempt ends once");
            match end {
                // After an error, the other ends are taken all the same: the consumer ends when no handler is running.
                AttemptEnd::Done(outcome) => {
                    let done = self.driver.done(job, outcome, self.shared.life.now());
                    taken = taken.and(done.map(|()| count));
                }
                // The event stays in flight for the driver, so no position passes it.
                AttemptEnd::Cancelled if self.shared.life.is_cancelling() => {}
                AttemptEnd::Cancelled => {
                    self.ending.get_or_insert(ConsumerError::RuntimeEnded);
                }
            }
        }
        taken
    }

    /// Returns `true` if the consumer ends and no handler is running.
    fn is_over(&self) -> bool {
        (self.ending.is_some() || self.shared.life.is_stopping()) && self.out.is_empty()
    }

    /// Ends the consumer: saves, and releases everything.
    fn end(mut self) {
        let (shared, services) = (Arc::clone(&self.shared), Arc::clone(&self.services));
        let name = self.driver.settings().name.to_string();
        let driven = self.ending.take().map_or(Ok(()), Err);
        let failure = shared
            .life
            .on_this_thread(true, || shared.life.outcome(&name, || shared.save_at_end(&mut self.driver, driven)));
        shared.show(&mut self.driver, None);
        lock(&shared.report).failure.clone_from(&failure);
        drop(self);
        drop(shared.asks.close());
        services.note_end(&name, failure);
        // Releases the store's lock: a waiter for the end may open the store again.
        drop(services);
        shared.life.end();
    }

    /// Registers `waker` for everything that may give the driver work. Returns the time until the driver's next due
    /// time, if any; `None` if there may be work now.
    fn arm(&mut self, waker: &Waker) -> Option<Option<Duration>> {
        if self.driver.may_read() && !self.shared.life.is_stopping() {
            let followers = self.driver.followers();
            self.registrations.resize_with(followers.len(), Registration::default);
            followers.iter().zip(&mut self.registrations).for_each(|(follower, at)| follower.register(at, waker));
        }
        let has_work = self.ending.is_some()
            || self.is_over()
            || !self.shared.asks.is_empty()
            || !self.ends.is_empty()
            || (self.driver.has_unread() && !self.shared.life.is_stopping());
        let due = self.driver.next_due().map(|due| due.saturating_sub(self.now()));
        // A stopping consumer starts nothing that is due.
        let due = due.map(|due| if self.shared.life.is_stopping() { due.max(STOPPING_STEP) } else { due });
        (!has_work && due != Some(Duration::ZERO)).then_some(due)
    }
}

/// The place of a consumer's driver between two steps.
struct Seat<E: Event> {
    /// `None` once the consumer has ended.
    shell: Mutex<Option<Shell<E>>>,
    ends: Arc<AttemptEnds>,
    runtime: OwnRuntime,
}

impl<E: Event> std::fmt::Debug for Seat<E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Seat").finish_non_exhaustive()
    }
}

impl<E: Event> Seat<E> {
    /// Takes a step that does not wait. Returns `None` if the step may wait.
    fn try_step(&self) -> Option<Step> {
        let mut slot = self.shell.try_lock().ok()?;
        let Some(shell) = &mut *slot else { return Some(Step::Ended) };
        if shell.may_block() {
            return None;
        }
        Some(if shell.quick_step() > 0 { Step::Worked } else { Step::Idle })
    }

    /// Takes a step. May wait for the disk.
    fn step(&self) -> Step {
        let mut slot = lock(&self.shell);
        let Some(shell) = &mut *slot else { return Step::Ended };
        let step = if shell.step() > 0 { Step::Worked } else { Step::Idle };
        if !shell.is_over() {
            return step;
        }
        let shell = slot.take();
        drop(slot);
        shell.into_iter().for_each(Shell::end);
        Step::Ended
    }

    /// Sleeps until there may be something to do.
    async fn sleep(&self, life: &Life) {
        let waker = poll_fn(|context| Poll::Ready(context.waker().clone())).await;
        // Set before `arm` looks at the requests: a later request finds this waker.
        life.woken_by(&waker);
        let armed = self.shell.try_lock().ok().and_then(|mut slot| slot.as_mut().and_then(|shell| shell.arm(&waker)));
        let Some(due) = armed else { return yield_now().await };
        sleep_until_woken(due).await;
    }
}

impl<E: Event> Host for Seat<E> {
    fn is_here(&self) -> bool {
        self.runtime.is_here()
    }

    fn is_busy(&self) -> bool {
        lock(&self.shell).as_ref().is_some_and(|shell| !shell.out.is_empty())
    }

    fn help(&self, deadline: Option<std::time::Instant>) {
        let Some(mut slot) = lock_until(&self.shell, deadline) else { return };
        let Some(shell) = &mut *slot else { return };
        let shared = Arc::clone(&shell.shared);
        shell.help();
        if shell.is_over() {
            let shell = slot.take();
            drop(slot);
            return shell.into_iter().for_each(Shell::end);
        }
        drop(slot);
        shared.life.wake();
    }
}

/// Ends the consumer if the runtime drops the driver's task, polled or not.
struct Leaving<E: Event>(Arc<Seat<E>>);

impl<E: Event> Drop for Leaving<E> {
    fn drop(&mut self) {
        // Attempts that end from now on make the driver take their ends themselves.
        self.0.ends.leave();
        if let Some(shell) = &mut *lock(&self.0.shell) {
            shell.help();
            if !shell.is_over() {
                shell.ending.get_or_insert(ConsumerError::RuntimeEnded);
            }
        }
        self.0.help(None);
    }
}

/// The driver's task.
async fn drive<E: Event>(leaving: Leaving<E>, shared: Arc<ConsumerShared<E>>) {
    let seat = &leaving.0;
    loop {
        seat.runtime.note_polled();
        let step = match seat.try_step() {
            Some(step) => step,
            None => {
                let seat = Arc::clone(seat);
                match spawn_blocking(move || seat.step()).await {
                    Ok(step) => step,
                    // The runtime is being shut down.
                    Err(_) => return,
                }
            }
        };
        match step {
            Step::Worked => yield_now().await,
            Step::Idle => seat.sleep(&shared.life).await,
            Step::Ended => return,
        }
    }
}
