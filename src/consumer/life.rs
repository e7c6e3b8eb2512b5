//! The life of a consumer's thread, as its handles see it: asked to stop, woken, ended.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use super::error::{ConsumerError, ConsumerFailure};
use super::services::Services;
use crate::error::WaitError;
use crate::error::panic_text;
use crate::sync::block_until;
use crate::sync::{AtomicBool, AtomicU64, Mutex, Ordering, Role, Waiters, lock, may_wait, role, take_role, thread};

/// How long dropping a handle waits for the thread to end.
const DROP_TIME: Duration = Duration::from_secs(5);

/// Shared by a thread and its handles.
#[derive(Debug)]
pub(crate) struct Life {
    stopping: AtomicBool,
    /// Who stopped it has waited long enough.
    given_up: AtomicBool,
    thread: Mutex<Option<thread::Thread>>,
    began: Instant,
    /// Since when the thread is inside a handler, in ns since `began`; 0: it is not.
    inside_since_ns: AtomicU64,
    /// 1 once the thread has ended.
    ended: AtomicU64,
    /// Who waits for that.
    ending: Waiters,
    /// Which engine it belongs to.
    engine: usize,
}

impl Life {
    /// Of a consumer of `services`.
    pub(super) fn new(services: &Services) -> Self {
        Self {
            stopping: AtomicBool::new(false),
            given_up: AtomicBool::new(false),
            thread: Mutex::new(None),
            began: Instant::now(),
            inside_since_ns: AtomicU64::new(0),
            ended: AtomicU64::new(0),
            ending: Waiters::new(),
            engine: services.identity(),
        }
    }

    /// Makes the current thread this consumer's until it ends.
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

    /// Returns `true` if the current thread may wait for an answer of the driving thread: a worker may.
    pub(super) fn may_ask(&self) -> bool {
        may_wait() && !matches!(role(), Role::Consumer { consumer, drives: true, .. } if consumer == self.identity())
    }

    /// The time since it began: what everything here is told as `now`.
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

    /// Waits until it has ended. Whether it has, by the deadline.
    pub(super) fn await_end(&self, deadline: Option<Instant>) -> bool {
        let over = || self.has_ended().then_some(Ok::<_, WaitError>(()));
        block_until(deadline, |waker| self.ending.register(1, waker), over).is_ok()
    }

    /// Stops it; `failure` says why it had ended by itself, if it had.
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

    /// A handle is dropped: waits, unless that was done before, until a deadline that its owner had set.
    pub(super) fn stop_dropped(&self, name: &str) {
        if self.given_up.load(Ordering::Relaxed) {
            return;
        }
        self.ask_to_stop();
        // On its own thread: it ends when its handler has returned.
        if self.may_await() && !self.await_end(Some(Instant::now() + DROP_TIME)) {
            tracing::error!(consumer = name, "a consumer's handler hangs; its thread stays behind");
        }
    }

    /// Runs the thread's work, whatever it does. Returns why it ended by itself, if it did.
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

    /// The thread's last word: who waits for the end may do whatever it kept from being done.
    pub(super) fn end(&self) {
        // Release: pairs with the Acquire in `has_ended`.
        self.ended.store(1, Ordering::Release);
        self.ending.reached(1);
    }

    /// A handler is about to be called.
    pub(super) fn go_inside(&self) {
        let now_ns = u64::try_from(self.now().as_nanos()).unwrap_or(u64::MAX);
        self.inside_since_ns.store(now_ns.max(1), Ordering::Relaxed);
    }

    /// It has returned. Says when.
    pub(super) fn come_out(&self) -> Duration {
        self.inside_since_ns.store(0, Ordering::Relaxed);
        self.now()
    }

    /// For how long the thread has been inside a handler, if it is.
    pub(super) fn inside_for(&self) -> Option<Duration> {
        let since_ns = self.inside_since_ns.load(Ordering::Relaxed);
        (since_ns > 0).then(|| self.now().saturating_sub(Duration::from_nanos(since_ns)))
    }
}
