//! What keeps retention from freeing: for every consumer of a shard, the position from which it still needs the log.
//!
//! Writers: each hold's consumer moves it, to where its checkpoint is durable; the keeper only looks.

use crate::event::Offset;
use crate::log::keeper::KeeperRequests;
use crate::sync::{Arc, Mutex, Watermark, lock};

/// One consumer's.
#[derive(Debug)]
pub(crate) struct Hold {
    from: Watermark,
    keeper: std::sync::Arc<KeeperRequests>,
}

impl Hold {
    /// Everything below may go; the keeper is told.
    pub(crate) fn set(&self, from: Offset) {
        self.from.publish(from.0);
        self.keeper.signal.notify();
    }

    pub(crate) fn get(&self) -> Offset {
        Offset(self.from.get())
    }
}

/// All of a shard's.
#[derive(Debug, Default)]
pub(crate) struct Holds(Mutex<Vec<Arc<Hold>>>);

impl Holds {
    pub(crate) fn add(&self, from: Offset, keeper: &std::sync::Arc<KeeperRequests>) -> Arc<Hold> {
        let hold = Arc::new(Hold { from: Watermark::new(from.0), keeper: std::sync::Arc::clone(keeper) });
        lock(&self.0).push(Arc::clone(&hold));
        hold
    }

    pub(crate) fn remove(&self, hold: &Arc<Hold>) {
        lock(&self.0).retain(|other| !Arc::ptr_eq(other, hold));
        hold.keeper.signal.notify();
    }

    /// Everything from here on is needed again, as far as it is there when this returns.
    pub(crate) fn lower(&self, hold: &Hold, from: Offset) {
        let _nothing_is_being_freed = lock(&self.0);
        hold.set(hold.get().min(from));
    }

    /// Nothing from here on may be freed; `None` where nobody needs anything.
    pub(crate) fn lowest(&self) -> Option<Offset> {
        lock(&self.0).iter().map(|hold| hold.get()).min()
    }

    /// Frees what lies below `freed_to`, if nobody needs it; meanwhile nobody comes who does.
    pub(crate) fn free<T>(&self, freed_to: Offset, free: impl FnOnce() -> T) -> Option<T> {
        let holds = lock(&self.0);
        let is_held = holds.iter().any(|hold| hold.get() < freed_to);
        (!is_held).then(free)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sync::{AtomicBool, Signal};

    #[test]
    fn the_lowest_holds_until_it_moves_or_goes() {
        let holds = Holds::default();
        assert_eq!(holds.lowest(), None);
        let keeper = std::sync::Arc::new(KeeperRequests { signal: Signal::new(), ending: AtomicBool::new(false) });
        let (slow, fast) = (holds.add(Offset(10), &keeper), holds.add(Offset(50), &keeper));
        assert_eq!(holds.lowest(), Some(Offset(10)));
        slow.set(Offset(60));
        assert_eq!(holds.lowest(), Some(Offset(50)));
        holds.remove(&fast);
        assert_eq!(holds.lowest(), Some(Offset(60)));
    }
}
