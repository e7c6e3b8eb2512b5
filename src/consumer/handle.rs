//! A running consumer, in the hands of the application.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::dead_letter::answer::DeadLetter;
use super::driver::{Driver, Handled, Letters};
use super::error::ConsumerError;
use super::report::ConsumerReport;
use super::running::Control;
use super::services::Running as _;
use super::settings::Start;
use super::watches::Watch;
use crate::error::WaitError;
use crate::event::{Event, EventId, Key, Offset, ShardId};
use crate::sync::{Deadline, GaveUp, promise};

/// How long a consumer may take to answer: its thread may be inside a handler.
const ANSWER_TIME: Duration = Duration::from_secs(10);

/// A running consumer. Dropping it stops it; in the store it stays registered, and goes on from its checkpoint when it is started
/// again.
#[derive(Debug)]
pub struct Consumer<E: Event> {
    control: Arc<Control<E>>,
    name: String,
}

impl<E: Event> Consumer<E> {
    pub(super) fn new(control: Arc<Control<E>>, name: &str) -> Self {
        Self { control, name: name.to_owned() }
    }

    /// Returns `true` if the current thread may wait for it.
    pub(crate) fn may_await(&self) -> bool {
        self.control.life.may_await()
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What is known of it now.
    #[must_use]
    pub fn report(&self) -> ConsumerReport {
        self.control.report()
    }

    /// Gives nothing out any more, until [`Consumer::resume`]; what runs goes on.
    ///
    /// # Errors
    /// `Ended`; `Busy` when its thread does not answer, since it is inside a handler; `Wait` with `OnEngineThread` from inside that
    /// handler itself, or on a shard's thread: nothing was asked then.
    pub fn pause(&self) -> Result<(), ConsumerError> {
        self.ask(Driver::pause).map(drop)
    }

    /// Goes on after a pause or a halt, with the event that halted first.
    ///
    /// # Errors
    /// As [`Consumer::pause`].
    pub fn resume(&self) -> Result<(), ConsumerError> {
        self.ask(Driver::resume)
    }

    /// Sets it elsewhere: to the beginning for a rebuild, for instance. Waits for running calls. Events before its old position are
    /// handled again, but [`super::Call::effect`] does not repeat side effects that have already run. Waiting dead letters stay, and
    /// older events of their keys wait behind the same fault; skipped and discarded events come again. A halted consumer goes on from there.
    ///
    /// # Errors
    /// As [`Consumer::pause`], and from inside a handler on any of its threads; `Read` where the place is gone.
    pub fn seek(&self, start: Start) -> Result<(), ConsumerError> {
        if !self.control.life.may_await() {
            return Err(WaitError::OnEngineThread.into());
        }
        let deadline = Instant::now() + ANSWER_TIME;
        let was_paused = self.ask(Driver::pause)?;
        let sought = loop {
            let sought = self.ask(move |driver| (driver.running() == 0).then(|| driver.seek(start)))?;
            match sought {
                Some(sought) => break sought,
                None if Instant::now() >= deadline => break Err(ConsumerError::Busy { name: self.name.clone() }),
                None => crate::sync::nap(Duration::from_millis(1)),
            }
        };
        if !was_paused {
            self.resume()?;
        }
        sought
    }

    /// Its dead letters by key, and of a key by age: at most `max` of them, those behind `after`.
    ///
    /// # Errors
    /// As [`Consumer::pause`], and what the files say.
    pub fn dead_letters(&self, after: Option<(Key, Offset)>, max: usize) -> Result<Vec<DeadLetter>, ConsumerError> {
        self.ask(move |driver| driver.letters().list(after, max))?.map_err(Into::into)
    }

    /// Lets dead letters be handled again: oldest first per key, each key until its first failure. With its last letter a key is live
    /// again. Returns how many keys are gone through; [`Consumer::report`] shows what comes of it.
    ///
    /// # Errors
    /// As [`Consumer::pause`].
    pub fn reprocess(&self, which: Letters) -> Result<usize, ConsumerError> {
        self.ask(move |driver| driver.reprocess(which))
    }

    /// Takes dead letters away without handling them, each with a record. Returns how many.
    ///
    /// # Errors
    /// As [`Consumer::pause`], and what the files say.
    pub fn discard(&self, which: Letters) -> Result<u64, ConsumerError> {
        self.ask(move |driver| driver.discard(which))?
    }

    /// What was missing before a key's first event is there: it need not wait any longer. Whether one waited.
    ///
    /// # Errors
    /// As [`Consumer::pause`].
    pub fn gap_filled(&self, key: Key) -> Result<bool, ConsumerError> {
        self.ask(move |driver| driver.gap_filled(key))
    }

    /// Keeps the records of a shard's events from `from` on until the watch is dropped: their end will be asked for.
    pub(crate) fn watch(&self, shard: ShardId, from: Offset) -> Watch {
        self.control.watches.watch(shard, from)
    }

    /// Waits until this consumer is done with the key's events up to this one, and returns how this one ended. For an event that the
    /// consumer had already passed, that may be [`Handled::Unknown`].
    ///
    /// # Errors
    /// `Ended`; `Wait` with `TimedOut` at the deadline, with `OnEngineThread` inside one of its own handlers.
    pub fn wait_handled(&self, key: Key, id: EventId, deadline: impl Into<Deadline>) -> Result<Handled, ConsumerError> {
        let deadline = deadline.into().instant();
        if !self.control.life.may_await() {
            return Err(WaitError::OnEngineThread.into());
        }
        let (handled, keeping) = promise();
        // Not waited for: the answer is the promise.
        drop(self.control.ask(move |driver| driver.wait_for(key, id.offset, keeping)));
        self.answer(handled.wait(deadline))
    }

    /// Waits until everything there is has been handled or recorded. Whether it came to that by the deadline; one that is paused or
    /// halted does not come to it. `false` at once inside one of its own handlers, whose event is not handled yet.
    #[must_use]
    pub fn drain(&self, deadline: impl Into<Deadline>) -> bool {
        let deadline = deadline.into().instant();
        self.control.drain(deadline)
    }

    /// Saves its position now; durable when it returns.
    ///
    /// # Errors
    /// As [`Consumer::pause`], and what the file system says.
    pub fn save(&self) -> Result<(), ConsumerError> {
        self.ask(Driver::save)?
    }

    /// Stops it: what runs is finished, its position is saved. Where a handler hangs, `Busy` at the deadline: the thread stays behind in
    /// it, nothing else waits for it, and what it was handling counts as not done.
    ///
    /// # Errors
    /// `Busy`; `Ended` where it had ended by itself, with the reason. `Wait` with `OnEngineThread` from inside its own handler, or on a
    /// shard's thread: it is asked to stop and not waited for.
    pub fn stop(self, deadline: impl Into<Deadline>) -> Result<(), ConsumerError> {
        let deadline = deadline.into().instant();
        self.control.life.stop(&self.name, deadline, || self.control.report().failure)
    }

    fn ask<T: Send + 'static>(
        &self,
        look: impl FnOnce(&mut Driver<E>) -> T + Send + 'static,
    ) -> Result<T, ConsumerError> {
        if !self.control.life.may_ask() {
            return Err(WaitError::OnEngineThread.into());
        }
        self.answer(self.control.ask(look).wait(Some(Instant::now() + ANSWER_TIME))).map_err(|error| match error {
            ConsumerError::Wait(WaitError::TimedOut) => ConsumerError::Busy { name: self.name.clone() },
            error => error,
        })
    }

    fn answer<T>(&self, answer: Result<Option<T>, GaveUp>) -> Result<T, ConsumerError> {
        let ended = || ConsumerError::Ended { failure: self.control.report().failure };
        answer.map_err(WaitError::from)?.ok_or_else(ended)
    }
}

impl<E: Event> Drop for Consumer<E> {
    fn drop(&mut self) {
        self.control.life.stop_dropped(&self.name);
    }
}
