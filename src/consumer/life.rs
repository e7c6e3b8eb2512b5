//! The life cycle of a consumer's thread: stop requests, wake-ups, end.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use super::error::{ConsumerError, ConsumerFailure};
use crate::error::WaitError;
use crate::error::panic_text;
use crate::sync::block_until;
use crate::sync::{AtomicBool, AtomicU64, Mutex, Ordering, Role, Waiters, lock, may_wait, role, take_role, thread};

/// The time that dropping a handle waits for the thread to end.
const DROP_TIME: Duration = Duration::from_secs(5);

/// The state shared by a consumer's thread and its handles.
#[derive(Debug)]
pub(crate) struct Life {
    stopping: AtomicBool,
    /// A call of `stop` has waited until its deadline.
    given_up: AtomicBool,
    thread: Mutex<Option<thread::Thread>>,
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
    /// Returns the life of a consumer that belongs to `engine`.
    pub(super) fn new(engine: usize) -> Self {
        Self {
            stopping: AtomicBool::new(false),
            given_up: AtomicBool::new(false),
            thread: Mutex::new(None),
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

    fn identity(&self) -> usize {
        std::ptr::from_ref(self).addr()
    }

    /// Returns `true` if the current thread may wait for this consumer to finish something, or to end.
    pub(crate) fn may_await(&self) -> bool {
        may_wait() && !matches!(role(), Role::Consumer { consumer, .. } if consumer == self.identity())
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
        if let Some(thread) = &*lock(&self.thread) {
            thread.unpark();
        }
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }

    pub(super) fn has_ended(&self) -> bool {
        // Acquire: pairs with the Release in `end`.
        self.ended.load(Ordering::Acquire) == 1
    }

    /// Asks the thread to stop.
    pub(super) fn ask_to_stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        self.wake();
    }

    /// Waits until the thread has ended. Returns `false` at the deadline.
    pub(super) fn await_end(&self, deadline: Option<Instant>) -> bool {
        let over = || self.has_ended().then_some(Ok::<_, WaitError>(()));
        block_until(deadline, |at, waker| self.ending.register_own(at, 1, waker), over).is_ok()
    }

    /// Stops the thread and waits for its end. `failure` returns the reason if the thread had ended by itself.
    pub(super) fn stop(
        &self,
        name: &str,
        deadline: Option<Instant>,
        failure: impl FnOnce() -> Option<ConsumerFailure>,
    ) -> Result<(), ConsumerError> {
        self.ask_to_stop();
        if !self.may_await() {
            self.given_up.store(true, Ordering::Relaxed);
            return Err(WaitError::OnEngineThread.into());
        }
        if !self.await_end(deadline) {
            self.given_up.store(true, Ordering::Relaxed);
            return Err(ConsumerError::Busy { name: name.to_owned() });
        }
        failure().map_or(Ok(()), |failure| Err(ConsumerError::Ended { failure: Some(failure) }))
    }

    /// Stops the thread of a dropped handle. Waits for the thread's end, unless `stop` has waited before.
    pub(super) fn stop_dropped(&self, name: &str) {
        if self.given_up.load(Ordering::Relaxed) {
            return;
        }
        self.ask_to_stop();
        // If this is the consumer's own thread, the thread ends when its handler returns.
        if self.may_await() && !self.await_end(Some(Instant::now() + DROP_TIME)) {
            tracing::error!(consumer = name, "a consumer's handler hangs; its thread is left behind");
        }
    }

    /// Runs the thread's work and catches panics. Returns the reason if it ended by itself.
    pub(super) fn run(&self, name: &str, body: impl FnOnce() -> Result<(), ConsumerError>) -> Option<ConsumerFailure> {
        *lock(&self.thread) = Some(thread::current());
        self.take_thread(true);
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
