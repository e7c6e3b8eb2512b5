//! What keeps retention from freeing: for everybody who follows a shard's log (consumers, gates), from where on it is still needed.
//!
//! Writers: whoever has a hold moves it, to where its own progress is durable; the keeper only looks.

use std::sync::Arc;

use crate::event::Offset;
use crate::sync::{Mutex, Signal, Watermark, lock};

/// One follower's.
#[derive(Debug)]
pub(crate) struct Hold {
    name: String,
    from: Watermark,
    /// Wakes the thread that frees segments.
    freer: Arc<Signal>,
}

impl Hold {
    /// Everything below may go; the keeper is told.
    pub(crate) fn set(&self, from: Offset) {
        self.from.publish(from.0);
        self.freer.notify();
    }

    pub(crate) fn get(&self) -> Offset {
        Offset(self.from.get())
    }
}

/// All of a shard's.
#[derive(Debug, Default)]
pub(crate) struct Holds(Mutex<Vec<Arc<Hold>>>);

impl Holds {
    /// The hold of this name, which is made if there is none, at `from`.
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

    /// Everything from here on is needed again, as far as it is there when this returns.
    pub(crate) fn lower(&self, hold: &Hold, from: Offset) {
        let _nothing_is_being_freed = lock(&self.0);
        hold.set(hold.get().min(from));
    }

    /// As [`Holds::lower`], where that is still there: nothing before `earliest` is. `false`: it is not, and the hold stays as it is.
    pub(crate) fn reach(&self, hold: &Hold, from: Offset, earliest: impl FnOnce() -> Offset) -> bool {
        let _nothing_is_being_freed = lock(&self.0);
        let is_there = from >= earliest();
        if is_there {
            hold.set(hold.get().min(from));
        }
        is_there
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

    #[test]
    fn a_hold_reaches_back_only_to_what_is_there() {
        let holds = Holds::default();
        let freer = Arc::new(Signal::new());
        let hold = holds.hold("sink", Offset(50), &freer);
        assert!(!holds.reach(&hold, Offset(20), || Offset(30)));
        assert_eq!(hold.get(), Offset(50), "retention goes on where nothing can be kept");
        assert!(holds.reach(&hold, Offset(30), || Offset(30)));
        assert!(holds.reach(&hold, Offset(40), || Offset(30)));
        assert_eq!(hold.get(), Offset(30));
    }

    #[test]
    fn the_lowest_holds_until_it_moves_or_goes() {
        let holds = Holds::default();
        assert_eq!(holds.lowest(), None);
        let freer = Arc::new(Signal::new());
        let slow = holds.hold("slow", Offset(10), &freer);
        let fast = holds.hold("fast", Offset(50), &freer);
        assert_eq!(holds.lowest(), Some(Offset(10)));
        slow.set(Offset(60));
        assert_eq!(holds.lowest(), Some(Offset(50)));
        assert!(Arc::ptr_eq(&fast, &holds.hold("fast", Offset(70), &freer)), "one of a name");
        assert_eq!(holds.lowest(), Some(Offset(60)));
        holds.remove(&slow);
        assert_eq!(holds.lowest(), Some(Offset(70)));
    }
}
