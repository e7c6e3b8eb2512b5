//! The life cycle of a consumer: stop requests, wake-ups, end. The consumer runs on a thread of its own, or as tasks of a
//! [`Host`].

use std::fmt::Debug;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::task::Waker;
use std::time::{Duration, Instant};

use super::error::{ConsumerError, ConsumerFailure};
use crate::error::WaitError;
use crate::error::panic_text;
use crate::sync::block_until;
use crate::sync::{AtomicBool, AtomicU64, Mutex, Ordering, Role, Waiters};
use crate::sync::{lock, may_wait, role, take_role, thread_waker};

/// The time that dropping a handle waits for the thread to end.
const DROP_TIME: Duration = Duration::from_secs(5);

/// Runs a consumer that has no thread of its own. The threads that run its tasks may be the very threads that wait for
/// it, so a thread that waits helps first.
pub(super) trait Host: Debug + Send + Sync {
    /// Returns `true` if the consumer's handlers make no progress while the current thread waits.
    fn is_here(&self) -> bool;
    /// Returns `true` if a handler is running.
    fn is_busy(&self) -> bool;
    /// Answers the requests of handles on the current thread. If the consumer is to stop and no handler is running, ends
    /// it.
    fn help(&self, deadline: Option<Instant>);
}

/// The state shared by a running consumer and its handles.
#[derive(Debug)]
pub(crate) struct Life {
    stopping: AtomicBool,
    /// A call of `stop` has waited until its deadline.
    given_up: AtomicBool,
    /// Running handlers are to be cancelled. Only a host can do that.
    cancelling: AtomicBool,
    /// Wakes the thread or the task that drives the consumer.
    waker: Mutex<Option<Waker>>,
    host: Option<Arc<dyn Host>>,
    began: Instant,
    /// The time when the thread entered its handler, in ns since `began`; 0 if it is not inside a handler.
    in_handler_since_ns: AtomicU64,
    /// 1 once the thread has ended.
    ended: AtomicU64,
    /// Waiters for the thread's end.
    ending: Waiters,
    /// The identity of its engine.
    engine: usize,
}

impl Life {
    /// Returns the life of a consumer that belongs to `engine`. Without a `host`, it has a thread of its own.
    pub(super) fn new(engine: usize, host: Option<Arc<dyn Host>>) -> Self {
        Self {
            stopping: AtomicBool::new(false),
            given_up: AtomicBool::new(false),
            cancelling: AtomicBool::new(false),
            waker: Mutex::new(None),
            host,
            began: Instant::now(),
            in_handler_since_ns: AtomicU64::new(0),
            ended: AtomicU64::new(0),
            ending: Waiters::direct(),
            engine,
        }
    }

    /// Assigns the current thread to this consumer until the thread ends. `drives` is `true` for the thread that owns
    /// the driver.
    pub(super) fn take_thread(&self, drives: bool) {
        take_role(Role::Consumer { engine: self.engine, consumer: self.identity(), drives });
    }

    /// Assigns the current thread to this consumer while `body` runs.
    pub(super) fn on_this_thread<T>(&self, drives: bool, body: impl FnOnce() -> T) -> T {
        struct Restore(Role);
        impl Drop for Restore {
            fn drop(&mut self) {
                take_role(self.0);
            }
        }
        let _restore = Restore(role());
        self.take_thread(drives);
        body()
    }

    fn identity(&self) -> usize {
        std::ptr::from_ref(self).addr()
    }

    /// Returns `true` if the current thread is not inside this consumer's code, and not one of an engine's own.
    pub(super) fn is_outside(&self) -> bool {
        may_wait() && !matches!(role(), Role::Consumer { consumer, .. } if consumer == self.identity())
    }

    /// Returns `true` if the consumer's handlers make no progress while the current thread waits.
    pub(crate) fn is_here(&self) -> bool {
        self.host.as_ref().is_some_and(|host| host.is_here())
    }

    /// Returns `true` if the current thread may wait for this consumer to finish something.
    pub(crate) fn may_await(&self) -> bool {
        self.is_outside() && !self.is_here()
    }

    /// Returns `true` if waiting for this consumer's end on the current thread would wait for a handler that runs on
    /// this thread.
    pub(crate) fn holds_up_this_thread(&self) -> bool {
        self.host.as_ref().is_some_and(|host| host.is_here() && host.is_busy())
    }

    /// Returns `true` if the current thread may wait for an answer of the driving thread. A worker may.
    pub(super) fn may_ask(&self) -> bool {
        may_wait() && !matches!(role(), Role::Consumer { consumer, drives: true, .. } if consumer == self.identity())
    }

    /// Returns the time since the consumer began: the clock of its driver.
    pub(super) fn now(&self) -> Duration {
        self.began.elapsed()
    }

    pub(super) fn wake(&self) {
        let waker = lock(&self.waker).clone();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Sets the waker of the task that drives the consumer.
    #[cfg(feature = "tokio")]
    pub(super) fn woken_by(&self, waker: &Waker) {
        let mut known = lock(&self.waker);
        if !known.as_ref().is_some_and(|known| known.will_wake(waker)) {
            *known = Some(waker.clone());
        }
    }

    /// Answers the requests of handles on the current thread, if the consumer has no thread of its own.
    pub(super) fn help(&self, deadline: Option<Instant>) {
        if let Some(host) = &self.host {
            host.help(deadline);
        }
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }

    pub(super) fn has_ended(&self) -> bool {
        // Acquire: pairs with the Release in `end`.
        self.ended.load(Ordering::Acquire) == 1
    }

    /// Asks the consumer to stop.
    pub(super) fn ask_to_stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        self.wake();
    }

    /// Asks a host to cancel the running handlers. A thread cannot be cancelled.
    pub(super) fn cancel_handlers(&self) {
        self.cancelling.store(true, Ordering::SeqCst);
        self.wake();
    }

    pub(super) fn is_cancelling(&self) -> bool {
        self.cancelling.load(Ordering::SeqCst)
    }

    /// Returns the waiters for the end, at position 1.
    #[cfg(feature = "tokio")]
    pub(super) fn ending(&self) -> &Waiters {
        &self.ending
    }

    /// Waits until the consumer has ended. Returns `false` at the deadline, and at once if the consumer cannot end while
    /// the current thread waits.
    pub(super) fn await_end(&self, deadline: Option<Instant>) -> bool {
        self.help(deadline);
        if self.is_here() {
            return self.has_ended();
        }
        let over = || self.has_ended().then_some(Ok::<_, WaitError>(()));
        block_until(deadline, |at, waker| self.ending.register_own(at, 1, waker), over).is_ok()
    }

    /// Stops the consumer and waits for its end. `failure` returns the reason if the thread had ended by itself.
    pub(super) fn stop(
        &self,
        name: &str,
        deadline: Option<Instant>,
        failure: impl FnOnce() -> Option<ConsumerFailure>,
    ) -> Result<(), ConsumerError> {
        self.ask_to_stop();
        if !self.is_outside() {
            return Err(self.stop_unwaited());
        }
        if !self.await_end(deadline) {
            return Err(if self.is_here() { self.stop_unwaited() } else { self.give_up(name) });
        }
        failure().map_or(Ok(()), |failure| Err(ConsumerError::Ended { failure: Some(failure) }))
    }

    /// Returns the error of a call of `stop` on a thread that must not wait.
    pub(super) fn stop_unwaited(&self) -> ConsumerError {
        self.given_up.store(true, Ordering::Relaxed);
        WaitError::OnEngineThread.into()
    }

    /// Returns the error of a call of `stop` that waited in vain.
    pub(super) fn give_up(&self, name: &str) -> ConsumerError {
        self.given_up.store(true, Ordering::Relaxed);
        self.cancel_handlers();
        ConsumerError::Busy { name: name.to_owned() }
    }

    /// Stops the consumer of a dropped handle. Waits for the end of its thread, unless `stop` has waited before. Tasks
    /// are not waited for: they may need the current thread.
    pub(super) fn stop_dropped(&self, name: &str) {
        if self.given_up.load(Ordering::Relaxed) {
            return;
        }
        self.ask_to_stop();
        if self.host.is_some() {
            return;
        }
        // If this is the consumer's own thread, the thread ends when its handler returns.
        if self.may_await() && !self.await_end(Some(Instant::now() + DROP_TIME)) {
            tracing::error!(consumer = name, "a consumer's handler hangs; its thread is left behind");
        }
    }

    /// Runs the thread's work and catches panics. Returns the reason if it ended by itself.
    pub(super) fn run(&self, name: &str, body: impl FnOnce() -> Result<(), ConsumerError>) -> Option<ConsumerFailure> {
        *lock(&self.waker) = Some(thread_waker());
        self.take_thread(true);
        self.outcome(name, body)
    }

    /// Calls `body` and catches panics. Returns and logs the reason if the consumer ends by itself.
    pub(super) fn outcome(
        &self,
        name: &str,
        body: impl FnOnce() -> Result<(), ConsumerError>,
    ) -> Option<ConsumerFailure> {
        let failure = match catch_unwind(AssertUnwindSafe(body)) {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(error.into()),
            Err(panic) => Some(ConsumerError::Panicked { text: panic_text(&*panic) }.into()),
        };
        if let Some(failure) = &failure {
            tracing::error!(consumer = name, %failure, "a consumer ended");
        }
        failure
    }

    /// Wakes waiters for the end. The thread must have released everything before.
    pub(super) fn end(&self) {
        // Release: pairs with the Acquire in `has_ended`.
        self.ended.store(1, Ordering::Release);
        self.ending.reached(1);
    }

    /// Notes that a handler is about to be called.
    pub(super) fn enter_handler(&self) {
        let now_ns = u64::try_from(self.now().as_nanos()).unwrap_or(u64::MAX);
        self.in_handler_since_ns.store(now_ns.max(1), Ordering::Relaxed);
    }

    /// Notes that the handler has returned. Returns the time.
    pub(super) fn leave_handler(&self) -> Duration {
        self.in_handler_since_ns.store(0, Ordering::Relaxed);
        self.now()
    }

    /// Returns the time that the thread has been inside a handler, if it is.
    pub(super) fn in_handler_for(&self) -> Option<Duration> {
        let since_ns = self.in_handler_since_ns.load(Ordering::Relaxed);
        (since_ns > 0).then(|| self.now().saturating_sub(Duration::from_nanos(since_ns)))
    }
}
