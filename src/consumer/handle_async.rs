//! The functions of a consumer's handle for tasks. They wait without blocking the thread, and work for every consumer,
//! however it was started.

use super::dead_letter::answer::DeadLetter;
use super::dead_letter::selector::LetterSelector;
use super::driver::Driver;
use super::ending::{stop_async, within};
use super::error::ConsumerError;
use super::handle::Consumer;
use super::outcome::Handled;
use super::settings::Start;
use crate::error::WaitError;
use crate::event::{Event, EventId, Key, Offset};
use crate::sync::{Deadline, Promise};

/// The functions for tasks: each does what the function without `_async` does, with the same arguments, and waits as a
/// future. Inside an asynchronous handler of the same consumer, `drain_async`, `wait_handled_async`, `seek_async` and
/// `stop_async` return `OnEngineThread`, because they would wait for that handler; the others work.
///
/// They have no time limit of their own, except where they take a deadline, which needs a tokio runtime with timers.
impl<E: Event> Consumer<E> {
    /// Pauses the consumer; see [`Consumer::pause`].
    ///
    /// Cancel safety: a request that was made is carried out, even if the future is dropped before the answer. A future
    /// that was never polled does nothing.
    ///
    /// # Errors
    /// The same as for [`Consumer::pause`], without `Busy`.
    pub async fn pause_async(&self) -> Result<(), ConsumerError> {
        self.ask_async(Driver::pause).await.map(drop)
    }

    /// Ends a pause or a halt; see [`Consumer::resume`].
    ///
    /// Cancel safety: as [`Consumer::pause_async`].
    ///
    /// # Errors
    /// The same as for [`Consumer::pause_async`].
    pub async fn resume_async(&self) -> Result<(), ConsumerError> {
        self.ask_async(Driver::resume).await
    }

    /// Sets the consumer to another position as soon as no handler is running; see [`Consumer::seek`].
    ///
    /// Cancel safety: if the future is dropped, the position changes or stays, and the consumer continues.
    ///
    /// # Errors
    /// The same as for [`Consumer::seek`], without `Busy`.
    pub async fn seek_async(&self, start: Start) -> Result<(), ConsumerError> {
        self.check_outside()?;
        self.answer_async(self.ask_to_seek(start)).await?
    }

    /// Returns dead letters; see [`Consumer::dead_letters`].
    ///
    /// Cancel safety: nothing changes.
    ///
    /// # Errors
    /// The same as for [`Consumer::dead_letters`], without `Busy`.
    pub async fn dead_letters_async(
        &self,
        after: Option<(Key, Offset)>,
        max: usize,
    ) -> Result<Vec<DeadLetter>, ConsumerError> {
        Ok(self.ask_async(move |driver| driver.letters().list(after, max)).await??)
    }

    /// Starts handling dead letters again; see [`Consumer::reprocess`].
    ///
    /// Cancel safety: as [`Consumer::pause_async`].
    ///
    /// # Errors
    /// The same as for [`Consumer::pause_async`].
    pub async fn reprocess_async(&self, which: LetterSelector) -> Result<usize, ConsumerError> {
        self.ask_async(move |driver| driver.reprocess(which)).await
    }

    /// Discards dead letters; see [`Consumer::discard`].
    ///
    /// Cancel safety: as [`Consumer::pause_async`].
    ///
    /// # Errors
    /// The same as for [`Consumer::discard`], without `Busy`.
    pub async fn discard_async(&self, which: LetterSelector) -> Result<u64, ConsumerError> {
        self.ask_async(move |driver| driver.discard(which)).await?
    }

    /// Lets a key's first event run if it waits for a gap; see [`Consumer::gap_filled`].
    ///
    /// Cancel safety: as [`Consumer::pause_async`].
    ///
    /// # Errors
    /// The same as for [`Consumer::pause_async`].
    pub async fn gap_filled_async(&self, key: Key) -> Result<bool, ConsumerError> {
        self.ask_async(move |driver| driver.gap_filled(key)).await
    }

    /// Saves the position; see [`Consumer::save`].
    ///
    /// Cancel safety: as [`Consumer::pause_async`].
    ///
    /// # Errors
    /// The same as for [`Consumer::save`], without `Busy`.
    pub async fn save_async(&self) -> Result<(), ConsumerError> {
        self.ask_async(Driver::save).await?
    }

    /// Waits until this consumer is done with the key's events up to this one; see [`Consumer::wait_handled`].
    ///
    /// Cancel safety: nothing changes, and nothing of the wait remains.
    ///
    /// # Errors
    /// The same as for [`Consumer::wait_handled`].
    pub async fn wait_handled_async(
        &self,
        key: Key,
        id: EventId,
        deadline: impl Into<Deadline>,
    ) -> Result<Handled, ConsumerError> {
        let deadline = deadline.into().instant();
        self.check_outside()?;
        let answer = within(deadline, self.answer_async(self.ask_for(key, id))).await;
        answer.unwrap_or(Err(WaitError::TimedOut.into()))
    }

    /// Waits until the consumer has handled or recorded every event that is visible when the future is first polled; see
    /// [`Consumer::drain`].
    ///
    /// Cancel safety: nothing changes, and nothing of the wait remains.
    ///
    /// # Errors
    /// The same as for [`Consumer::drain`].
    pub async fn drain_async(&self, deadline: impl Into<Deadline>) -> Result<(), ConsumerError> {
        let deadline = deadline.into().instant();
        self.check_outside()?;
        let answer = within(deadline, self.answer_async(self.shared.ask_for_all())).await;
        answer.unwrap_or(Err(WaitError::TimedOut.into()))
    }

    /// Stops the consumer: running handlers finish, and the position is saved. At the deadline returns `Busy` and cancels
    /// the handlers that are still running, if they are asynchronous: their futures are dropped at their next `.await`,
    /// and their events count as not handled. The consumer ends when the last one is gone.
    ///
    /// Cancel safety: the consumer stops in any case, and a dropped future cancels no handler.
    ///
    /// # Errors
    /// The same as for [`Consumer::stop`].
    pub async fn stop_async(self, deadline: impl Into<Deadline>) -> Result<(), ConsumerError> {
        stop_async(&self.shared.life, self.name(), deadline.into().instant()).await?;
        self.report().failure.map_or(Ok(()), |failure| Err(ConsumerError::Ended { failure: Some(failure) }))
    }

    fn check_outside(&self) -> Result<(), ConsumerError> {
        if self.shared.life.is_outside() { Ok(()) } else { Err(WaitError::OnEngineThread.into()) }
    }

    async fn ask_async<T: Send + 'static>(
        &self,
        look: impl FnOnce(&mut Driver<E>) -> T + Send + 'static,
    ) -> Result<T, ConsumerError> {
        if !self.shared.life.may_ask() {
            return Err(WaitError::OnEngineThread.into());
        }
        self.answer_async(self.shared.ask(look)).await
    }

    async fn answer_async<T>(&self, promise: Promise<T>) -> Result<T, ConsumerError> {
        promise.await.ok_or_else(|| self.shared.ended())
    }
}
