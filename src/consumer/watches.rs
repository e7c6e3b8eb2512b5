//! The events whose end a caller will ask for: their records are kept although the position is past them.
//!
//! Writers: callers of `publish_sync`. The driver looks when it saves.

use std::sync::Arc;

use crate::event::{Offset, ShardId};
use crate::sync::{Mutex, lock};

/// All of a consumer's.
#[derive(Debug, Default)]
pub(crate) struct Watches(Mutex<Vec<(ShardId, Offset)>>);

impl Watches {
    /// Events from `from` on are asked about until the watch is dropped. To be noted before they are published.
    pub(crate) fn watch(self: &Arc<Self>, shard: ShardId, from: Offset) -> Watch {
        lock(&self.0).push((shard, from));
        Watch { watches: Arc::clone(self), shard, from }
    }

    /// The first event of a shard that is asked about, if it lies before `offset`; else `offset`.
    pub(super) fn lowest(&self, shard: ShardId, offset: Offset) -> Offset {
        let watches = lock(&self.0);
        let of_shard = watches.iter().filter(|(watched, _)| *watched == shard);
        of_shard.map(|(_, from)| *from).min().map_or(offset, |from| from.min(offset))
    }
}

/// One caller that will ask.
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
        watches.swap_remove(at.expect("it was noted"));
    }
}
