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
use crate::sync::{AtomicBool, Deadline, Keeping, Mutex, Ordering, Promise, lock, promise};

/// The state shared by the sink's runner and its handle.
#[derive(Debug)]
pub(super) struct SinkShared {
    pub(super) life: Life,
    pub(super) paused: AtomicBool,
    /// Set to ask for another attempt after a halt.
    pub(super) resumed: AtomicBool,
    pub(super) report: Mutex<ConsumerReport>,
    drains: Mutex<Drains>,
}

/// The calls of `drain` that wait.
#[derive(Debug, Default)]
struct Drains {
    /// The number of the last call.
    last: u64,
    waiting: Vec<(u64, Keeping<()>)>,
}

impl SinkShared {
    pub(super) fn new(life: Life, report: ConsumerReport) -> Self {
        let (paused, resumed) = (AtomicBool::new(false), AtomicBool::new(false));
        Self { life, paused, resumed, report: Mutex::new(report), drains: Mutex::default() }
    }

    /// Returns the number of the last call of `drain`. Read it before the logs: the answer covers the events that are
    /// visible when `drain` is called.
    pub(super) fn last_drain(&self) -> u64 {
        lock(&self.drains).last
    }

    /// Answers the calls of `drain` up to `last`: their events have been taken in.
    pub(super) fn answer_drains(&self, last: u64) {
        let answered: Vec<_> = lock(&self.drains).waiting.extract_if(.., |(number, _)| *number <= last).collect();
        answered.into_iter().for_each(|(_, keeping)| keeping.keep(()));
    }

    /// Notes the reason of an end by itself, and wakes every waiter. The runner must have released everything before.
    pub(super) fn end(&self, failure: Option<ConsumerFailure>) {
        lock(&self.report).failure = failure;
        self.life.end();
        let unanswered = std::mem::take(&mut lock(&self.drains).waiting);
        drop(unanswered);
    }

    /// Asks for an answer to a call of `drain`. The promise is broken if the sink ends first.
    fn ask_to_drain(&self) -> Promise<()> {
        let (drained, keeping) = promise();
        {
            let mut drains = lock(&self.drains);
            // Callers may give up and come again for ever while the sink is paused.
            drains.waiting.retain(|(_, keeping)| !keeping.is_abandoned());
            drains.last += 1;
            let number = drains.last;
            // An ended sink answers nothing: `end` sets the end before it takes the list.
            if !self.life.has_ended() {
                drains.waiting.push((number, keeping));
            }
        }
        self.life.wake();
        drained
    }

    fn drained(&self, answer: Option<()>) -> Result<(), ConsumerError> {
        answer.ok_or_else(|| ConsumerError::Ended { failure: lock(&self.report).failure.clone() })
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
        let drained = self.ask_to_drain();
        self.life.help(deadline);
        self.drained(drained.wait(deadline).map_err(WaitError::from)?)
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
    /// Waits until the sink has taken in every event that is visible when the future is first polled; see
    /// [`SinkConsumer::drain`].
    ///
    /// Cancel safety: nothing changes, and nothing of the wait remains.
    ///
    /// # Errors
    /// The same as for [`SinkConsumer::drain`].
    pub async fn drain_async(&self, deadline: impl Into<Deadline>) -> Result<(), ConsumerError> {
        let deadline = deadline.into().instant();
        if !self.shared.life.is_outside() {
            return Err(WaitError::OnEngineThread.into());
        }
        match ending::within(deadline, self.shared.ask_to_drain()).await {
            Some(answer) => self.shared.drained(answer),
            None => Err(WaitError::TimedOut.into()),
        }
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
