//! Read models: what other threads see of the states, without asking the shard and without slowing it.
//!
//! One writer per shard: the shard itself, right after it has changed a state. Readers are any threads; they never lock
//! and never make the writer wait. A view is a cache: it is filled from the states when the store opens, so one can be
//! added to an existing store at any time.
//!
//! Ready to use: [`ById`] (one value per key), [`Area`] (who is near a place), [`Leaderboard`] (the best) and
//! [`ServerStatus`] (who is online, and the load). `docs/views.md` shows them. Their handles are cheap to clone and stay
//! valid when the engine is gone: they then show what was published last. Their writers never wait; a reader may see a
//! change a little before the position that it belongs to, and never after.

mod area;
mod by_id;
mod grow;
mod index;
mod leaderboard;
mod parts;
mod status;

use crate::event::{Key, Meta, Sequence, ShardId, Time};
use crate::state::aggregate::Aggregate;

pub use area::{Area, Found};
pub use by_id::{ById, Unreadable};
pub use leaderboard::{Leaderboard, Ranked};
pub use status::{Presence, ServerStatus, Status};

/// A read model of all shards: the handle that readers use, and the maker of its writers.
pub trait View<A: Aggregate>: Send + Sync {
    /// The part of this view that shard `place.shard` will write. Called once per shard when an engine opens. A view
    /// belongs to one engine at a time: a second opening begins it anew.
    fn writer(&self, place: &Place) -> Box<dyn ViewWriter<A>>;
}

/// One shard's part of a view. Runs on the shard's thread, so it must neither block nor allocate per event.
pub trait ViewWriter<A: Aggregate>: Send {
    /// A state as it is when the store opens; once per key, before anything else.
    fn load(&mut self, key: Key, state: &A);

    /// An event has just changed a state.
    fn changed(&mut self, key: Key, state: &A, meta: &Meta);

    /// The batch is over: what it changed may be shown. Everything up to `at` is in.
    fn publish(&mut self, at: Position);
}

/// Which shard a writer is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Place {
    /// The shard.
    pub shard: ShardId,
    /// How many there are.
    pub shards: u16,
    /// Keys to make room for.
    pub keys_expected: usize,
}

impl Place {
    pub(crate) fn new(shard: ShardId, shards: u16, keys_expected: usize) -> Self {
        Self { shard, shards, keys_expected }
    }
}

/// How far a shard's part of a view has come: what staleness is measured by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Position {
    /// Events of the shard that are in: the sequence of the next one.
    pub sequence: Sequence,
    /// When the newest of them was appended, by the engine's clock.
    pub time: Time,
}

#[cfg(test)]
mod tests;
