//! The parts of a view, one per shard, and their positions.
//!
//! One writer per part: its shard. A part lives as long as the engine that fills it. The next engine makes new parts,
//! so nothing old is left, and an engine that is still stopping writes to parts that no reader uses.

use std::fmt;
use std::sync::Arc;

use crate::event::{Sequence, ShardId, Time};
use crate::state::view::{Place, Position};
use crate::sync::{AtomicU64, CachePadded, Ordering, SeqLock, ShardedLock};

/// The position of a part, always read atomically.
#[derive(Debug)]
pub(super) struct Progress(CachePadded<(SeqLock, AtomicU64, AtomicU64)>);

impl Progress {
    pub(super) fn new() -> Self {
        Self(CachePadded::new((SeqLock::new(), AtomicU64::new(0), AtomicU64::new(0))))
    }

    /// Publishes a position. Only the writer calls this, after readers can see everything up to `at`.
    pub(super) fn publish(&self, at: Position) {
        let (lock, sequence, time) = &*self.0;
        lock.write(|| {
            sequence.store(at.sequence.0, Ordering::Relaxed);
            time.store(at.time.0, Ordering::Relaxed);
        });
    }

    /// Returns the position. A reader that reads it before the part sees everything up to it.
    pub(super) fn get(&self) -> Position {
        let (lock, sequence, time) = &*self.0;
        lock.read(|| Position {
            sequence: Sequence(sequence.load(Ordering::Relaxed)),
            time: Time(time.load(Ordering::Relaxed)),
        })
    }
}

/// A shard's part of a view.
pub(super) trait Part {
    fn progress(&self) -> &Progress;
}

/// The parts that readers use: those of the newest engine.
///
/// The lock is taken for writing only while an engine opens. No shard touches it, so readers cannot slow a shard.
/// Readers share the lock, each through its own thread's cache line.
pub(super) struct Parts<P>(ShardedLock<Vec<Option<Arc<P>>>>);

impl<P> Parts<P> {
    pub(super) fn new() -> Self {
        Self(ShardedLock::new(Vec::new()))
    }

    /// Replaces the part that an earlier engine left.
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

    /// Passes all parts to `look`: one slot per shard, `None` for a shard that is not open yet.
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
