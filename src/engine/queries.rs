//! Queries: the shard that owns a key answers them, so an answer includes everything appended before the question.

use super::Engine;
use crate::error::WaitError;
use crate::event::{Key, Version};
use crate::state::aggregate::Aggregate;

impl<A: Aggregate> Engine<A> {
    /// Runs `look` on a key's state and version, on the shard that owns the key, and returns its result. The state
    /// includes every event whose receipt or answer says "appended". `look` runs between two batches and the shard
    /// waits for it, so keep it short. A key without events has the default state and version 0.
    ///
    /// # Errors
    /// `ShardFailed`; `Closed` after the engine was shut down; `QuestionPanicked` with the message if `look` panicked;
    /// `OnEngineThread` on a shard's own thread (inline handlers, `decide`, views, another question), which would wait
    /// for itself.
    pub fn ask<T, F>(&self, key: Key, look: F) -> Result<T, WaitError>
    where
        T: Send + 'static,
        F: FnOnce(&A, Version) -> T + Send + 'static,
    {
        self.of(key).ask_state(key, look)
    }

    /// Does the same as [`Engine::ask`], for tasks.
    ///
    /// # Errors
    /// The same as for [`Engine::ask`].
    pub async fn ask_async<T, F>(&self, key: Key, look: F) -> Result<T, WaitError>
    where
        T: Send + 'static,
        F: FnOnce(&A, Version) -> T + Send + 'static,
    {
        self.of(key).ask_state_async(key, look).await
    }

    /// Returns a key's current state and its version; `None` if the key has no event.
    ///
    /// # Errors
    /// The same as for [`Engine::ask`].
    pub fn state(&self, key: Key) -> Result<Option<(A, Version)>, WaitError> {
        self.ask(key, |state, version| (version.0 > 0).then(|| (state.clone(), version)))
    }
}
