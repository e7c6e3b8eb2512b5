//! The application's handle of a running consumer.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::dead_letter::answer::DeadLetter;
use super::dead_letter::selector::LetterSelector;
use super::driver::Driver;
use super::error::ConsumerError;
use super::outcome::Handled;
use super::report::ConsumerReport;
use super::running::ConsumerShared;
use super::services::Running as _;
use super::settings::Start;
use super::watches::Watch;
use crate::error::WaitError;
use crate::event::{Event, EventId, Key, Offset, ShardId};
use crate::sync::{Deadline, GaveUp, Promise, promise};

/// The time that a call waits for the consumer's thread, which may be inside a handler.
const ANSWER_TIME: Duration = Duration::from_secs(10);

/// A running consumer. Dropping it stops it: the drop waits up to 5 s for the consumer's thread; an asynchronous
/// consumer is only asked to stop. It stays registered in the store, and the next start continues from its saved
/// position.
///
/// These functions block the thread. For tasks, each has a form `…_async` with the same arguments (feature `tokio`). A
/// thread that is the only one of an asynchronous consumer's runtime must not wait for its handlers: `drain`,
/// `wait_handled`, `seek` and, while a handler is running, `stop` return `Wait` with `OnEngineThread` there.
///
/// ```
/// # use corelane::envelope::Envelope;
/// # use corelane::{Config, Deadline, EventLog};
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let dir = tempfile::tempdir()?;
/// let engine = EventLog::<Envelope>::open(Config::new(dir.path()))?;
/// let mails = engine.consumer("mails").start(|event, _meta| {
///     println!("to send: {}", event.payload());
///     Ok(())
/// })?;
///
/// let event = Envelope::new("player.levelled_up", 42, r#"{"level":7}"#)?;
/// engine.producer().publish(event.key(), event)?;
/// engine.flush(Deadline::NEVER)?;
/// mails.drain(Deadline::NEVER)?;
/// assert_eq!(mails.report().handled, 1);
/// mails.stop(Deadline::NEVER)?;
/// # engine.shutdown(Deadline::NEVER)?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Consumer<E: Event> {
    pub(super) shared: Arc<ConsumerShared<E>>,
    name: String,
}

impl<E: Event> Consumer<E> {
    pub(super) fn new(shared: Arc<ConsumerShared<E>>, name: &str) -> Self {
        Self { shared, name: name.to_owned() }
    }

    /// Returns `true` if the current thread may wait for this consumer.
    pub(crate) fn may_await(&self) -> bool {
        self.shared.life.may_await()
    }

    /// Returns the consumer's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns a report of the consumer.
    #[must_use]
    pub fn report(&self) -> ConsumerReport {
        self.shared.report()
    }

    /// Pauses the consumer until [`Consumer::resume`]. It starts no further handler; running ones finish.
    ///
    /// # Errors
    /// `Ended`; `Busy` if its thread is inside a handler and does not answer; `Wait` with `OnEngineThread` from inside
    /// that handler, or on a shard's thread: the call then has no effect.
    pub fn pause(&self) -> Result<(), ConsumerError> {
        self.ask(Driver::pause).map(drop)
    }

    /// Ends a pause or a halt. The event that halted the consumer runs first.
    ///
    /// # Errors
    /// The same as for [`Consumer::pause`].
    pub fn resume(&self) -> Result<(), ConsumerError> {
        self.ask(Driver::resume)
    }

    /// Sets the consumer to another position, for example to the beginning for a rebuild. Waits for running handlers.
    /// Events before the old position are handled again, but [`super::Call::effect`] does not repeat side effects that
    /// have already run. Waiting dead letters stay, and older events of their keys become dead letters too; skipped and
    /// discarded events are delivered again. A halted consumer resumes.
    ///
    /// # Errors
    /// The same as for [`Consumer::pause`], and from inside a handler on any of its threads; `Read` if the log no
    /// longer holds the position.
    pub fn seek(&self, start: Start) -> Result<(), ConsumerError> {
        if !self.shared.life.may_await() {
            return Err(WaitError::OnEngineThread.into());
        }
        let deadline = Some(Instant::now() + ANSWER_TIME);
        let sought = self.ask_to_seek(start);
        self.shared.life.help(deadline);
        self.answer(sought.wait(deadline)).map_err(|error| self.busy(error))?
    }

    /// Returns up to `max` dead letters that follow `after`, ordered by key and offset.
    ///
    /// # Errors
    /// The same as for [`Consumer::pause`]; errors of the dead letters' files.
    pub fn dead_letters(&self, after: Option<(Key, Offset)>, max: usize) -> Result<Vec<DeadLetter>, ConsumerError> {
        self.ask(move |driver| driver.letters().list(after, max))?.map_err(Into::into)
    }

    /// Starts handling dead letters again: oldest first per key, each key until its first failure. A key without
    /// letters is live again. Returns the number of keys started; [`Consumer::report`] shows the outcome.
    ///
    /// # Errors
    /// The same as for [`Consumer::pause`].
    pub fn reprocess(&self, which: LetterSelector) -> Result<usize, ConsumerError> {
        self.ask(move |driver| driver.reprocess(which))
    }

    /// Discards dead letters, each with a record. Returns the number discarded.
    ///
    /// # Errors
    /// The same as for [`Consumer::pause`]; errors of the dead letters' files.
    pub fn discard(&self, which: LetterSelector) -> Result<u64, ConsumerError> {
        self.ask(move |driver| driver.discard(which))?
    }

    /// Lets a key's first event run if it waits for a gap: the missing event has arrived, or never will. Returns `true`
    /// if an event waited.
    ///
    /// # Errors
    /// The same as for [`Consumer::pause`].
    pub fn gap_filled(&self, key: Key) -> Result<bool, ConsumerError> {
        self.ask(move |driver| driver.gap_filled(key))
    }

    /// Keeps the records of a shard's events from `from` on until the watch is dropped. The caller will ask how these
    /// events ended.
    pub(crate) fn watch(&self, shard: ShardId, from: Offset) -> Watch {
        self.shared.watches.watch(shard, from)
    }

    /// Waits until this consumer is done with the key's events up to this one, and returns how this one ended. For an
    /// event that the consumer passed before the call, that may be [`Handled::Unknown`].
    ///
    /// # Errors
    /// `Ended`; `Wait` with `TimedOut` at the deadline, and with `OnEngineThread` inside one of its own handlers.
    pub fn wait_handled(&self, key: Key, id: EventId, deadline: impl Into<Deadline>) -> Result<Handled, ConsumerError> {
        let deadline = deadline.into().instant();
        if !self.shared.life.may_await() {
            return Err(WaitError::OnEngineThread.into());
        }
        let handled = self.ask_for(key, id);
        self.shared.life.help(deadline);
        self.answer(handled.wait(deadline))
    }

    /// Waits until the consumer has handled or recorded every event that is visible now.
    ///
    /// # Errors
    /// `Wait` with `TimedOut` at the deadline (a paused or halted consumer handles nothing), and at once with
    /// `OnEngineThread` inside one of its own handlers; `Ended` if it has ended.
    pub fn drain(&self, deadline: impl Into<Deadline>) -> Result<(), ConsumerError> {
        self.shared.drain(deadline.into().instant())
    }

    /// Saves the position now. It is durable when this returns.
    ///
    /// # Errors
    /// The same as for [`Consumer::pause`]; errors of the file system.
    pub fn save(&self) -> Result<(), ConsumerError> {
        self.ask(Driver::save)?
    }

    /// Stops the consumer: running handlers finish, and the position is saved. If a handler hangs, returns `Busy` at
    /// the deadline, and its event counts as not handled. The handler's thread is left behind; an asynchronous handler
    /// is cancelled.
    ///
    /// # Errors
    /// `Busy`; `Ended` with the reason if the consumer had ended by itself; `Wait` with `OnEngineThread` from inside
    /// its own handler, or on a shard's thread: the consumer stops without being waited for.
    pub fn stop(self, deadline: impl Into<Deadline>) -> Result<(), ConsumerError> {
        let deadline = deadline.into().instant();
        self.shared.life.stop(&self.name, deadline, || self.shared.report().failure)
    }

    /// Returns a promise that is kept when the key's events up to this one are done.
    pub(super) fn ask_for(&self, key: Key, id: EventId) -> Promise<Handled> {
        let (handled, keeping) = promise();
        // This promise is not needed: the driver keeps the other one.
        drop(self.shared.ask(move |driver| driver.wait_for(key, id.offset, keeping)));
        handled
    }

    /// Returns a promise that is kept when the consumer was set to another position.
    pub(super) fn ask_to_seek(&self, start: Start) -> Promise<Result<(), ConsumerError>> {
        let (sought, keeping) = promise();
        drop(self.shared.ask(move |driver| driver.seek_when_idle(start, keeping)));
        sought
    }

    fn ask<T: Send + 'static>(
        &self,
        look: impl FnOnce(&mut Driver<E>) -> T + Send + 'static,
    ) -> Result<T, ConsumerError> {
        if !self.shared.life.may_ask() {
            return Err(WaitError::OnEngineThread.into());
        }
        let deadline = Some(Instant::now() + ANSWER_TIME);
        let answer = self.shared.ask(look);
        self.shared.life.help(deadline);
        self.answer(answer.wait(deadline)).map_err(|error| self.busy(error))
    }

    /// Names the consumer in the error of a call that it did not answer in time.
    fn busy(&self, error: ConsumerError) -> ConsumerError {
        match error {
            ConsumerError::Wait(WaitError::TimedOut) => ConsumerError::Busy { name: self.name.clone() },
            error => error,
        }
    }

    fn answer<T>(&self, answer: Result<Option<T>, GaveUp>) -> Result<T, ConsumerError> {
        answer.map_err(WaitError::from)?.ok_or_else(|| self.shared.ended())
    }
}

impl<E: Event> Drop for Consumer<E> {
    fn drop(&mut self) {
        self.shared.life.stop_dropped(&self.name);
    }
}
