//! Retention holds: the lowest offset that each follower of a shard's log (consumer or gate) still needs.
//!
//! Writers: each follower moves its own hold to the offset up to which its progress is durable. Retention only reads.

use std::sync::Arc;

use crate::event::Offset;
use crate::sync::{Mutex, Signal, Watermark, lock};

/// The hold of one follower.
#[derive(Debug)]
pub(crate) struct Hold {
    name: String,
    from: Watermark,
    /// Wakes the thread that frees segments.
    freer: Arc<Signal>,
}

impl Hold {
    /// Moves the hold to `from`, which releases everything below, and wakes the thread that frees segments.
    pub(crate) fn set(&self, from: Offset) {
        self.from.publish(from.0);
        self.freer.notify();
    }

    pub(crate) fn get(&self) -> Offset {
        Offset(self.from.get())
    }
}

/// The holds of one shard.
#[derive(Debug, Default)]
pub(crate) struct Holds(Mutex<Vec<Arc<Hold>>>);

impl Holds {
    /// Moves the hold of this name to `from`, creating it if necessary, and returns it.
    pub(crate) fn hold(&self, name: &str, from: Offset, freer: &Arc<Signal>) -> Arc<Hold> {
        let mut holds = lock(&self.0);
        if let Some(held) = holds.iter().find(|held| held.name == name) {
            held.set(from);
            return Arc::clone(held);
        }
        let (name, from) = (name.to_owned(), Watermark::new(from.0));
        let hold = Arc::new(Hold { name, from, freer: Arc::clone(freer) });
        holds.push(Arc::clone(&hold));
        hold
    }

    pub(crate) fn remove(&self, hold: &Arc<Hold>) {
        lock(&self.0).retain(|other| !Arc::ptr_eq(other, hold));
        hold.freer.notify();
    }

    /// Lowers the hold to `from`. Everything from `from` on that still exists when this returns stays held.
    pub(crate) fn lower(&self, hold: &Hold, from: Offset) {
        let _nothing_is_being_freed = lock(&self.0);
        hold.set(hold.get().min(from));
    }

    /// Lowers the hold to `from`, if the log still begins at or before `from`. Returns `false`, and leaves the hold
    /// unchanged, if `from` is below `earliest`.
    pub(crate) fn reach(&self, hold: &Hold, from: Offset, earliest: impl FnOnce() -> Offset) -> bool {
        let _nothing_is_being_freed = lock(&self.0);
        let is_there = from >= earliest();
        if is_there {
            hold.set(hold.get().min(from));
        }
        is_there
    }

    /// Returns the lowest hold: nothing at or above it may be freed. Returns `None` if there are no holds.
    pub(crate) fn lowest(&self) -> Option<Offset> {
        lock(&self.0).iter().map(|hold| hold.get()).min()
    }

    /// Calls `free` if no hold is below `freed_to`. No hold can be added or lowered while `free` runs.
    pub(crate) fn free<T>(&self, freed_to: Offset, free: impl FnOnce() -> T) -> Option<T> {
        let holds = lock(&self.0);
        let is_held = holds.iter().any(|hold| hold.get() < freed_to);
        (!is_held).then(free)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hold_can_be_lowered_only_to_offsets_still_held() {
        let holds = Holds::default();
        let freer = Arc::new(Signal::new());
        let hold = holds.hold("sink", Offset(50), &freer);
        assert!(!holds.reach(&hold, Offset(20), || Offset(30)));
        assert_eq!(hold.get(), Offset(50), "a failed attempt leaves the hold unchanged");
        assert!(holds.reach(&hold, Offset(30), || Offset(30)));
        assert!(holds.reach(&hold, Offset(40), || Offset(30)));
        assert_eq!(hold.get(), Offset(30));
    }

    #[test]
    fn the_lowest_hold_counts_until_it_is_moved_or_removed() {
        let holds = Holds::default();
        assert_eq!(holds.lowest(), None);
        let freer = Arc::new(Signal::new());
        let slow = holds.hold("slow", Offset(10), &freer);
        let fast = holds.hold("fast", Offset(50), &freer);
        assert_eq!(holds.lowest(), Some(Offset(10)));
        slow.set(Offset(60));
        assert_eq!(holds.lowest(), Some(Offset(50)));
        assert!(Arc::ptr_eq(&fast, &holds.hold("fast", Offset(70), &freer)), "one hold per name");
        assert_eq!(holds.lowest(), Some(Offset(60)));
        holds.remove(&slow);
        assert_eq!(holds.lowest(), Some(Offset(70)));
    }
}
