//! Questions to states: by the shard that owns the key, so that what was appended before is in.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use super::{Engine, Handle};
use crate::error::WaitError;
use crate::error::panic_text;
use crate::event::{Key, Version};
use crate::state::aggregate::Aggregate;
use crate::state::keys::KeyTable;
use crate::sync::may_wait;
use crate::sync::{Promise, promise};

impl<A: Aggregate> Engine<A> {
    /// Lets `look` see a key's state and version on the shard that owns it, between two batches, and returns what it says:
    /// everything whose receipt or answer says appended is in. Brief, please: the shard waits for it. A key without events has the
    /// default state and version 0.
    ///
    /// # Errors
    /// `ShardFailed`; `Closed` when the engine has been shut down; `QuestionPanicked` with what `look` said when it panicked;
    /// `OnEngineThread` on a shard's own thread (inline handlers, `decide`, views, another question), which would wait for itself.
    pub fn ask<T, F>(&self, key: Key, look: F) -> Result<T, WaitError>
    where
        T: Send + 'static,
        F: FnOnce(&A, Version) -> T + Send + 'static,
    {
        if !may_wait() {
            return Err(WaitError::OnEngineThread);
        }
        let shard = self.of(key);
        shard.answer(self.question(key, look), None)
    }

    /// As [`Engine::ask`], for tasks.
    ///
    /// # Errors
    /// As [`Engine::ask`].
    pub async fn ask_async<T, F>(&self, key: Key, look: F) -> Result<T, WaitError>
    where
        T: Send + 'static,
        F: FnOnce(&A, Version) -> T + Send + 'static,
    {
        let shard = self.of(key);
        self.question(key, look).await.map_or_else(|| Err(shard.unanswered()), answered)
    }

    /// A key's state as it is now, and its version; `None` where it has no event.
    ///
    /// # Errors
    /// As [`Engine::ask`].
    pub fn state(&self, key: Key) -> Result<Option<(A, Version)>, WaitError> {
        self.ask(key, |state, version| (version.0 > 0).then(|| (state.clone(), version)))
    }

    fn question<T, F>(&self, key: Key, look: F) -> Promise<Told<T>>
    where
        T: Send + 'static,
        F: FnOnce(&A, Version) -> T + Send + 'static,
    {
        self.of(key).questioned(move |keys| match keys.get(key) {
            Some(slot) => look(&slot.state, slot.version),
            None => look(&A::default(), Version(0)),
        })
    }
}

/// A question's answer, or its panic.
type Told<T> = Result<T, String>;

fn answered<T>(told: Told<T>) -> Result<T, WaitError> {
    told.map_err(WaitError::QuestionPanicked)
}

impl<A: Aggregate> Handle<A> {
    /// Lets `look` see the shard's table between two batches.
    fn questioned<T: Send + 'static>(&self, look: impl FnOnce(&KeyTable<A>) -> T + Send + 'static) -> Promise<Told<T>> {
        let (promise, keeping) = promise();
        let question = Box::new(move |keys: &KeyTable<A>| {
            let told = catch_unwind(AssertUnwindSafe(|| look(keys)));
            keeping.keep(told.map_err(|panic| panic_text(&*panic)));
        });
        // Where the shard has ended, the question is dropped, and with it the promise is broken.
        drop(self.questions.push(question));
        self.door.signal.notify();
        promise
    }

    /// As [`Handle::questioned`], and waits for the answer, until `deadline`. On a thread that must not wait nothing is asked.
    pub(super) fn ask<T: Send + 'static>(
        &self,
        deadline: Option<Instant>,
        look: impl FnOnce(&KeyTable<A>) -> T + Send + 'static,
    ) -> Result<T, WaitError> {
        if may_wait() { self.answer(self.questioned(look), deadline) } else { Err(WaitError::OnEngineThread) }
    }

    fn answer<T>(&self, promise: Promise<Told<T>>, deadline: Option<Instant>) -> Result<T, WaitError> {
        promise.wait(deadline)?.map_or_else(|| Err(self.unanswered()), answered)
    }

    fn unanswered(&self) -> WaitError {
        self.door.log.failure().map_or(WaitError::Closed, |failure| failure.clone().into())
    }
}
