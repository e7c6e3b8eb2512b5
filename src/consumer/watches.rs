//! Events that callers will ask about: their records are kept even after the consumer's position has passed them.
//!
//! Writers: callers of `publish_sync`. The driver reads them when it saves.

use std::sync::Arc;

use crate::event::{Offset, ShardId};
use crate::sync::{Mutex, lock};

/// The watched events of one consumer.
#[derive(Debug, Default)]
pub(crate) struct Watches(Mutex<Vec<(ShardId, Offset)>>);

impl Watches {
    /// Watches events from `from` on until the returned watch is dropped. Call it before the events are published.
    pub(crate) fn watch(self: &Arc<Self>, shard: ShardId, from: Offset) -> Watch {
        lock(&self.0).push((shard, from));
        Watch { watches: Arc::clone(self), shard, from }
    }

    /// Returns the first watched event of a shard if it is below `offset`, otherwise `offset`.
    pub(super) fn lowest(&self, shard: ShardId, offset: Offset) -> Offset {
        let watches = lock(&self.0);
        let of_shard = watches.iter().filter(|(watched, _)| *watched == shard);
        of_shard.map(|(_, from)| *from).min().map_or(offset, |from| from.min(offset))
    }
}

/// The watch of one caller.
#[derive(Debug)]
pub(crate) struct Watch {
    watches: Arc<Watches>,
    shard: ShardId,
    from: Offset,
}

impl Drop for Watch {
    fn drop(&mut self) {
        let mut watches = lock(&self.watches.0);
        let at = watches.iter().position(|watch| *watch == (self.shard, self.from));
        watches.swap_remove(at.expect("a watch is in the list until it is dropped"));
    }
}
