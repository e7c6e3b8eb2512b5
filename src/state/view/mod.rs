//! Views: read models that any thread reads without asking the shard and without slowing it.
//!
//! One writer per part: the part's shard, right after it has changed a state. Any thread may read, and no reader makes
//! the writer wait. The module `view` at the crate's root describes the views to their users.

mod area;
mod by_id;
mod grow;
mod key_numbers;
mod leaderboard;
mod parts;
mod status;

use crate::event::{Key, Meta, Router, Sequence, ShardId, Time};
use crate::state::aggregate::Aggregate;

pub use area::{Area, Found};
pub use by_id::{ById, Unreadable};
pub use leaderboard::{Leaderboard, Ranked};
pub use status::{Presence, ServerStatus, Status};

/// A read model of all shards: the handle that readers use, and the factory of its writers.
pub trait View<A: Aggregate>: Send + Sync {
    /// Makes the part of this view that the shard `place.shard` writes. The engine calls this once per shard when it
    /// opens. A view belongs to one engine at a time: a second opening starts it over.
    fn writer(&self, place: &Place) -> Box<dyn ViewWriter<A>>;
}

/// One shard's part of a view. Runs on the shard's thread, so it must neither block nor allocate per event.
pub trait ViewWriter<A: Aggregate>: Send {
    /// Loads a key's state when the store opens. Called once per key, before any other method.
    fn load(&mut self, key: Key, state: &A);

    /// Notes that the event `meta` has just changed a key's state.
    fn changed(&mut self, key: Key, state: &A, meta: &Meta);

    /// Ends a batch: its changes may now be shown. The part now includes every event up to `at`.
    fn publish(&mut self, at: Position);
}

/// The shard that a writer belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Place {
    /// The shard.
    pub shard: ShardId,
    /// The number of shards.
    pub shards: u16,
    /// The number of keys to make room for.
    pub keys_expected: usize,
    pub(super) router: Router,
}

impl Place {
    pub(crate) fn new(shard: ShardId, router: Router, keys_expected: usize) -> Self {
        Self { shard, shards: router.shards(), keys_expected, router }
    }

    /// Returns the shard of `key`.
    #[must_use]
    pub fn shard_of(&self, key: Key) -> ShardId {
        self.router.shard(key)
    }
}

/// The position of a shard's part of a view. Compare it with the log to measure how stale the part is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Position {
    /// The sequence of the next event: the number of the shard's events that are included.
    pub sequence: Sequence,
    /// The time at which the newest included event was appended, by the engine's clock.
    pub time: Time,
}

#[cfg(test)]
mod tests;
