//! The application's handle of a running sink, and the state that it shares with the sink's runner.

use std::sync::Arc;
use std::time::Instant;

#[cfg(feature = "tokio")]
use crate::consumer::ending;
use crate::consumer::error::{ConsumerError, ConsumerFailure};
use crate::consumer::life::Life;
use crate::consumer::report::ConsumerReport;
use crate::consumer::services::Running;
use crate::error::WaitError;
use crate::sync::{AtomicBool, AtomicU64, Deadline, Mutex, Ordering, Waiters, block_until, lock};

/// The state shared by the sink's runner and its handle.
#[derive(Debug)]
pub(super) struct SinkShared {
    pub(super) life: Life,
    pub(super) paused: AtomicBool,
    /// Set to ask for another attempt after a halt.
    pub(super) resumed: AtomicBool,
    pub(super) report: Mutex<ConsumerReport>,
    /// The number of the last call of `drain`.
    drains: AtomicU64,
    /// The number of the last call of `drain` that was answered because its events have been taken in.
    drained: AtomicU64,
    /// Waiters for `drained`.
    draining: Waiters,
}

impl SinkShared {
    pub(super) fn new(life: Life, report: ConsumerReport) -> Self {
        Self {
            life,
            paused: AtomicBool::new(false),
            resumed: AtomicBool::new(false),
            report: Mutex::new(report),
            drains: AtomicU64::new(0),
            drained: AtomicU64::new(0),
            draining: Waiters::new(),
        }
    }

    /// Returns the number of the last call of `drain`. Read it before the logs: the answer covers the events that are
    /// visible when `drain` is called.
    pub(super) fn last_drain(&self) -> u64 {
        self.drains.load(Ordering::SeqCst)
    }

    /// Answers the calls of `drain` up to `question`.
    pub(super) fn answer_drains(&self, question: u64) {
        if self.drained.fetch_max(question, Ordering::SeqCst) < question {
            self.draining.reached(question);
        }
    }

    /// Notes the reason of an end by itself, and wakes every waiter. The runner must have released everything before.
    pub(super) fn end(&self, failure: Option<ConsumerFailure>) {
        lock(&self.report).failure = failure;
        self.life.end();
        self.draining.reached(u64::MAX);
    }

    /// Asks for an answer to a call of `drain`. Returns the call's number.
    fn ask_to_drain(&self) -> u64 {
        let question = self.drains.fetch_add(1, Ordering::SeqCst) + 1;
        self.life.wake();
        question
    }

    /// Returns the answer to a call of `drain`, once there is one.
    fn drain_answer(&self, question: u64) -> Option<Result<(), ConsumerError>> {
        // Read first: the runner may answer and then end.
        let has_ended = self.life.has_ended();
        if self.drained.load(Ordering::SeqCst) >= question {
            return Some(Ok(()));
        }
        has_ended.then(|| Err(ConsumerError::Ended { failure: lock(&self.report).failure.clone() }))
    }
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
        let question = self.ask_to_drain();
        self.life.help(deadline);
        let answer = || self.drain_answer(question).map(Ok::<_, WaitError>);
        block_until(deadline, |waker| self.draining.register(question, waker), answer)?
    }
}

/// A running sink. Dropping it stops it; the drop waits up to 5 s for the end, except of an asynchronous sink.
#[derive(Debug)]
pub struct SinkConsumer {
    shared: Arc<SinkShared>,
    name: String,
}

impl SinkConsumer {
    pub(super) fn new(shared: Arc<SinkShared>, name: String) -> Self {
        Self { shared, name }
    }

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

/// The functions for tasks. They wait as futures, for every sink; deadlines need a tokio runtime with timers.
#[cfg(feature = "tokio")]
impl SinkConsumer {
    /// Waits until the sink has taken in every event that is visible now; see [`SinkConsumer::drain`].
    ///
    /// Cancel safety: nothing changes.
    ///
    /// # Errors
    /// The same as for [`SinkConsumer::drain`].
    pub async fn drain_async(&self, deadline: impl Into<Deadline>) -> Result<(), ConsumerError> {
        let deadline = deadline.into().instant();
        if !self.shared.life.is_outside() {
            return Err(WaitError::OnEngineThread.into());
        }
        let question = self.shared.ask_to_drain();
        let answer = std::future::poll_fn(|context| {
            self.shared.draining.register(question, context.waker());
            self.shared.drain_answer(question).map_or(std::task::Poll::Pending, std::task::Poll::Ready)
        });
        ending::within(deadline, answer).await.unwrap_or(Err(WaitError::TimedOut.into()))
    }

    /// Stops the sink after its present batch. At the deadline returns `Busy` and cancels the batch, if the sink is
    /// asynchronous: its future is dropped at its next `.await`.
    ///
    /// Cancel safety: the sink stops in any case, and a dropped future cancels no batch.
    ///
    /// # Errors
    /// The same as for [`SinkConsumer::stop`].
    pub async fn stop_async(self, deadline: impl Into<Deadline>) -> Result<(), ConsumerError> {
        ending::stop_async(&self.shared.life, &self.name, deadline.into().instant()).await?;
        self.report().failure.map_or(Ok(()), |failure| Err(ConsumerError::Ended { failure: Some(failure) }))
    }
}

impl Drop for SinkConsumer {
    fn drop(&mut self) {
        self.shared.life.stop_dropped(&self.name);
    }
}
