//! The parts of a view, one per shard, and how far each has come.
//!
//! One writer per part: its shard. A part lives as long as the engine that fills it; the next engine brings new ones, so
//! that nothing is left over and an engine that is still stopping writes where nobody looks.

use std::fmt;
use std::sync::Arc;

use crate::event::{Sequence, ShardId, Time};
use crate::state::view::{Place, Position};
use crate::sync::{AtomicU64, CachePadded, Ordering, SeqLock, ShardedLock};

/// A position that is read whole.
#[derive(Debug)]
pub(super) struct Progress(CachePadded<(SeqLock, AtomicU64, AtomicU64)>);

impl Progress {
    pub(super) fn new() -> Self {
        Self(CachePadded::new((SeqLock::new(), AtomicU64::new(0), AtomicU64::new(0))))
    }

    /// Only the one writer calls this, after everything up to `at` can be seen.
    pub(super) fn publish(&self, at: Position) {
        let (lock, sequence, time) = &*self.0;
        lock.write(|| {
            sequence.store(at.sequence.0, Ordering::Relaxed);
            time.store(at.time.0, Ordering::Relaxed);
        });
    }

    /// Who reads a position and then the part, sees at least everything up to the position.
    pub(super) fn get(&self) -> Position {
        let (lock, sequence, time) = &*self.0;
        lock.read(|| Position {
            sequence: Sequence(sequence.load(Ordering::Relaxed)),
            time: Time(time.load(Ordering::Relaxed)),
        })
    }
}

/// What every part has.
pub(super) trait Part {
    fn progress(&self) -> &Progress;
}

/// The parts that readers look at: those of the newest engine.
///
/// The lock is taken for writing only while an engine opens. A shard never touches it, so readers cannot slow one; among
/// themselves they share it, each on a line of its thread.
pub(super) struct Parts<P>(ShardedLock<Vec<Option<Arc<P>>>>);

impl<P> Parts<P> {
    pub(super) fn new() -> Self {
        Self(ShardedLock::new(Vec::new()))
    }

    /// Puts a new part in the place of what a former engine has left there.
    pub(super) fn begin(&self, place: &Place, part: P) -> Arc<P> {
        let part = Arc::new(part);
        let mut parts = self.0.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        if parts.len() != usize::from(place.shards) {
            parts.clear();
            parts.resize_with(usize::from(place.shards), || None);
        }
        parts[usize::from(place.shard.0)] = Some(Arc::clone(&part));
        part
    }

    /// Reads all parts: `look` gets one slot per shard, `None` where the shard has not been opened yet.
    #[inline]
    pub(super) fn read<R>(&self, look: impl FnOnce(&[Option<Arc<P>>]) -> R) -> R {
        look(&self.0.read().unwrap_or_else(std::sync::PoisonError::into_inner))
    }
}

impl<P: Part> Parts<P> {
    pub(super) fn positions(&self) -> Vec<(ShardId, Position)> {
        self.read(|parts| {
            let opened = (0..).zip(parts).filter_map(|(shard, part)| Some((shard, part.as_ref()?)));
            opened.map(|(shard, part)| (ShardId(shard), part.progress().get())).collect()
        })
    }
}

impl<P> fmt::Debug for Parts<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Parts").finish_non_exhaustive()
    }
}
