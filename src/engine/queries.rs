//! Queries: the shard that owns a key answers them, so an answer includes everything appended before the query.

use super::Engine;
use super::query::Query;
use crate::event::{Key, Version};
use crate::state::aggregate::Aggregate;

impl<A: Aggregate> Engine<A> {
    /// Returns a query that runs `look` on a key's state and version, on the shard that owns the key. Wait for it
    /// ([`Query::wait`], [`Query::wait_until`]) or `.await` it. The state includes every event whose receipt or answer
    /// says "appended". `look` runs between two batches and the shard waits for it, so keep it short. A key without
    /// events has the default state and version 0.
    pub fn ask<T, F>(&self, key: Key, look: F) -> Query<A, T>
    where
        T: Send + 'static,
        F: FnOnce(&A, Version) -> T + Send + 'static,
    {
        self.of(key).query(move |keys| match keys.get(key) {
            Some(slot) => look(&slot.state, slot.version),
            None => look(&A::default(), Version(0)),
        })
    }

    /// Returns a query for a key's current state and its version; `None` if the key has no event.
    pub fn state(&self, key: Key) -> Query<A, Option<(A, Version)>> {
        self.ask(key, |state, version| (version.0 > 0).then(|| (state.clone(), version)))
    }
}
