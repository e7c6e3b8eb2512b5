//! Questions to states: by the shard that owns the key, so that what was appended before is in.

use super::Engine;
use crate::aggregate::Aggregate;
use crate::error::WaitError;
use crate::event::{Key, Version};
use crate::promise::{Promise, promise};

impl<A: Aggregate> Engine<A> {
    /// Lets `look` see a key's state and version on the shard that owns it, between two batches, and returns what it says:
    /// everything whose receipt or answer says appended is in. Brief, please: the shard waits for it. A key without events has the
    /// default state and version 0. Not from the shard's own thread (inline handlers, `decide`, views): it would wait for itself.
    ///
    /// # Errors
    /// `ShardFailed`; `Closed` when the engine has been shut down.
    pub fn ask<T, F>(&self, key: Key, look: F) -> Result<T, WaitError>
    where
        T: Send + 'static,
        F: FnOnce(&A, Version) -> T + Send + 'static,
    {
        let promise = self.question(key, look);
        promise.wait(None)?.ok_or_else(|| self.unanswered(key))
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
        self.question(key, look).await.ok_or_else(|| self.unanswered(key))
    }

    /// A key's state as it is now, and its version; `None` where it has no event.
    ///
    /// # Errors
    /// As [`Engine::ask`].
    pub fn state(&self, key: Key) -> Result<Option<(A, Version)>, WaitError> {
        self.ask(key, |state, version| (version.0 > 0).then(|| (state.clone(), version)))
    }

    fn question<T, F>(&self, key: Key, look: F) -> Promise<T>
    where
        T: Send + 'static,
        F: FnOnce(&A, Version) -> T + Send + 'static,
    {
        let (promise, keeping) = promise();
        let shard = &self.shards[usize::from(key.shard(self.config.shards).0)];
        let question = Box::new(move |keys: &crate::keys::KeyTable<A>| {
            keeping.keep(match keys.get(key) {
                Some(slot) => look(&slot.state, slot.version),
                None => look(&A::default(), Version(0)),
            });
        });
        // Where the shard has ended, the question is dropped, and with it the promise is broken.
        drop(shard.questions.push(question));
        shard.door.signal.notify();
        promise
    }

    pub(super) fn unanswered(&self, key: Key) -> WaitError {
        let shard = &self.shards[usize::from(key.shard(self.config.shards).0)];
        shard.door.log.failure().map_or(WaitError::Closed, |failure| failure.clone().into())
    }
}
