//! Threads and tasks that wait for a position.
//!
//! One publisher moves the position and calls [`Waiters::reached`]. Any number of waiters register, and check the
//! position again afterwards. Wakers of threads, and the engine's own, run in the publisher's thread. Wakers of tasks
//! are the application's code: the [`Notifier`] calls them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::task::Waker;

use super::notifier::{Notifier, Wakers, wake};
use super::thread_waker::is_of_this_thread;
use super::{AtomicU64, Mutex, Ordering, fence, lock};

/// The value of `lowest` while no waiter is registered: no position reaches it, so `wake_all` does not use it either.
const NONE: u64 = u64::MAX;
/// The position that reaches every target.
const ALL: u64 = u64::MAX - 1;

/// The threads and tasks that wait for a position, each with its target. Targets are below `u64::MAX - 1`.
#[derive(Debug)]
pub(crate) struct Waiters {
    /// Wakers that run in the publisher's thread: those of threads, and the engine's own.
    own: Arc<WaiterList>,
    tasks: Arc<WaiterList>,
    /// Calls the wakers of tasks. `None`: the publisher calls them.
    notifier: Option<Arc<Notifier>>,
}

/// Waiters ordered by target, so that waking one does not depend on the number of the others.
#[derive(Debug)]
pub(crate) struct WaiterList {
    /// The lowest registered target, or `NONE`. Written under the lock.
    lowest: AtomicU64,
    /// The position up to which the notifier must wake this list; 0 while the list is not in the notifier's queue.
    due: AtomicU64,
    by_target: Mutex<ByTarget>,
}

#[derive(Debug, Default)]
struct ByTarget {
    wakers: BTreeMap<(u64, u64), Waker>,
    /// Number of registrations made; tells waiters with equal targets apart.
    registered: u64,
}

/// A waiter's place in a list. Dropping it takes the waiter out of the list.
#[derive(Debug, Default)]
pub(crate) struct Registration(Option<(Arc<WaiterList>, (u64, u64))>);

impl Waiters {
    /// A target that only [`Waiters::wake_all`] reaches.
    pub(crate) const END: u64 = ALL;

    /// Creates an empty list. `notifier` calls the wakers of tasks.
    pub(crate) fn new(notifier: &Arc<Notifier>) -> Self {
        Self { notifier: Some(Arc::clone(notifier)), ..Self::direct() }
    }

    /// Creates an empty list whose publisher calls all wakers itself. Not for shards, which must not run the
    /// application's code.
    pub(crate) fn direct() -> Self {
        Self { own: Arc::default(), tasks: Arc::default(), notifier: None }
    }

    /// Registers a task, or a thread that blocks on a future, for `target`, or moves its registration there. The caller
    /// must check the position again afterwards.
    pub(crate) fn register(&self, registration: &mut Registration, target: u64, waker: &Waker) {
        // A thread does not wait for the wakers of tasks.
        let list = if is_of_this_thread(waker) { &self.own } else { &self.tasks };
        registration.enter(list, target, waker);
    }

    /// As [`Waiters::register`], for the engine's own code: the publisher calls the waker.
    pub(crate) fn register_own(&self, registration: &mut Registration, target: u64, waker: &Waker) {
        registration.enter(&self.own, target, waker);
    }

    /// As [`Waiters::register`], for a target that may fall. Whoever lowers it calls [`Waiters::wake_all`] afterwards.
    pub(crate) fn register_falling(&self, registration: &mut Registration, target: impl Fn() -> u64, waker: &Waker) {
        loop {
            let wanted = target();
            self.register(registration, wanted, waker);
            // If the target fell before this, `wake_all` may have come before the registration.
            if target() >= wanted {
                return;
            }
        }
    }

    /// Wakes every waiter whose target is at most `position`. Call this after publishing the position.
    #[inline]
    pub(crate) fn reached(&self, position: u64) {
        // SeqCst: pairs with the fence in `enter`: either the waiter sees the position or this thread sees the waiter.
        fence(Ordering::SeqCst);
        if self.own.lowest.load(Ordering::Relaxed) <= position {
            self.own.wake(position);
        }
        if self.tasks.lowest.load(Ordering::Relaxed) <= position {
            self.notify(position);
        }
    }

    /// Makes all waiters check again.
    pub(crate) fn wake_all(&self) {
        self.reached(ALL);
    }

    #[cold]
    fn notify(&self, position: u64) {
        let Some(notifier) = &self.notifier else { return self.tasks.wake(position) };
        // Relaxed: the fence in `reached` comes before, and pairs with the Acquire in `wake_due`, so that a woken task sees
        // the position. While the list is in the queue, the notifier sees the later position.
        if self.tasks.due.fetch_max(position.max(1), Ordering::Relaxed) == 0 {
            notifier.wake_some(Arc::clone(&self.tasks) as Arc<dyn Wakers>);
        }
    }
}

impl Default for WaiterList {
    fn default() -> Self {
        Self { lowest: AtomicU64::new(NONE), due: AtomicU64::new(0), by_target: Mutex::new(ByTarget::default()) }
    }
}

impl Wakers for WaiterList {
    /// Wakes the waiters up to the position that the publisher has set.
    fn wake_due(&self) {
        // Acquire: pairs with the fence in `reached`, before the store in `notify`.
        self.wake(self.due.swap(0, Ordering::Acquire));
    }
}

impl WaiterList {
    fn wake(&self, position: u64) {
        let mut due = Vec::new();
        {
            let mut by_target = lock(&self.by_target);
            while let Some(first) = by_target.wakers.first_entry().filter(|first| first.key().0 <= position) {
                due.push(first.remove());
            }
            self.note_lowest(&by_target);
        }
        due.into_iter().for_each(wake);
    }

    fn note_lowest(&self, by_target: &ByTarget) {
        let lowest = by_target.wakers.first_key_value().map_or(NONE, |((target, _), _)| *target);
        self.lowest.store(lowest, Ordering::Relaxed);
    }
}

// A waker is application code, whose clone and drop may call the engine: both happen outside the lock.
impl Registration {
    /// The registration of a waiter that is in no list.
    pub(crate) const NONE: Self = Self(None);

    fn enter(&mut self, list: &Arc<WaiterList>, target: u64, waker: &Waker) {
        if !self.is_in(list, target) {
            self.leave();
        }
        let mut replaced = Some(waker.clone());
        {
            let mut by_target = lock(&list.by_target);
            let place = self.0.take().map_or((target, by_target.registered), |(_, place)| place);
            by_target.registered += 1;
            replaced = replaced.and_then(|waker| by_target.wakers.insert(place, waker));
            list.note_lowest(&by_target);
            self.0 = Some((Arc::clone(list), place));
        }
        drop(replaced);
        // SeqCst: pairs with the fence in `reached`.
        fence(Ordering::SeqCst);
    }

    fn is_in(&self, list: &Arc<WaiterList>, target: u64) -> bool {
        self.0.as_ref().is_some_and(|(at, place)| Arc::ptr_eq(at, list) && place.0 == target)
    }

    /// Takes the waiter out of its list.
    pub(crate) fn leave(&mut self) {
        let Some((list, place)) = self.0.take() else { return };
        let mut by_target = lock(&list.by_target);
        // Dropped after the lock: a waker is application code.
        let waker = by_target.wakers.remove(&place);
        if waker.is_some() {
            list.note_lowest(&by_target);
        }
        drop(by_target);
        drop(waker);
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.leave();
    }
}

#[cfg(all(test, loom))]
mod models {
    use super::*;
    use crate::sync::{Watermark, thread};
    use loom::sync::atomic::AtomicUsize;

    type Shared = loom::sync::Arc<(Waiters, Watermark)>;

    fn shared(waiters: Waiters) -> Shared {
        loom::sync::Arc::new((waiters, Watermark::new(0)))
    }

    /// A waiter either sees the position when it registers or is woken.
    #[test]
    fn loom_waiters_are_woken() {
        loom::model(|| {
            let shared = shared(Waiters::direct());
            let woken = Arc::new(Woken::new(&shared));
            let other = loom::sync::Arc::clone(&shared);
            let mover = thread::spawn(move || {
                other.1.publish(5);
                other.0.reached(5);
            });
            let mut registration = Registration::default();
            shared.0.register_own(&mut registration, 5, &Waker::from(Arc::clone(&woken)));
            let seen = shared.1.get() >= 5;
            mover.join().unwrap();
            assert!(seen || woken.times() > 0, "neither saw the position nor was woken");
        });
    }

    /// A task either sees the position when it registers, or the notifier wakes it and it sees the position then.
    /// Positions reached while the notifier works are not lost either.
    #[test]
    fn loom_the_notifier_wakes_tasks() {
        loom::model(|| {
            let notifier = Arc::new(Notifier::default());
            let shared = shared(Waiters::new(&notifier));
            let woken = [(); 2].map(|()| Arc::new(Woken::new(&shared)));
            let other = loom::sync::Arc::clone(&shared);
            let publisher = thread::spawn(move || {
                for position in [1, 2] {
                    other.1.publish(position);
                    other.0.reached(position);
                }
            });
            let (mut first, mut second) = (Registration::default(), Registration::default());
            shared.0.register(&mut first, 1, &Waker::from(Arc::clone(&woken[0])));
            shared.0.register(&mut second, 2, &Waker::from(Arc::clone(&woken[1])));
            let seen = shared.1.get();
            // Once while the publisher runs, and once after it. `Signal` has a model of its own.
            notifier.wake_due();
            publisher.join().unwrap();
            notifier.wake_due();
            for (target, woken) in (1..).zip(woken) {
                assert!(seen >= target || woken.times() > 0, "a task neither saw the position nor was woken");
                assert!(woken.lowest_seen.load(Ordering::Relaxed) >= target, "a woken task did not see the position");
            }
        });
    }

    /// A waiter that gives up while it is woken leaves nothing behind.
    #[test]
    fn loom_a_waiter_that_gives_up_leaves_the_list() {
        loom::model(|| {
            let shared = shared(Waiters::direct());
            let woken = Arc::new(Woken::new(&shared));
            let other = loom::sync::Arc::clone(&shared);
            let publisher = thread::spawn(move || {
                other.1.publish(1);
                other.0.reached(1);
            });
            let mut registration = Registration::default();
            shared.0.register_own(&mut registration, 1, &Waker::from(Arc::clone(&woken)));
            drop(registration);
            publisher.join().unwrap();
            assert!(lock(&shared.0.own.by_target).wakers.is_empty(), "a waiter is left");
            assert_eq!(shared.0.own.lowest.load(Ordering::Relaxed), NONE);
        });
    }

    /// A waiter whose target falls while it registers is woken at the lower one, as if it had known it.
    #[test]
    fn loom_a_waiter_for_a_falling_target_is_woken() {
        loom::model(|| {
            let shared = shared(Waiters::direct());
            let target = loom::sync::Arc::new(AtomicU64::new(2));
            let woken = Arc::new(Woken::new(&shared));
            let (other, lowered) = (loom::sync::Arc::clone(&shared), loom::sync::Arc::clone(&target));
            let publisher = thread::spawn(move || {
                lowered.store(1, Ordering::SeqCst);
                other.0.wake_all();
                other.1.publish(1);
                other.0.reached(1);
            });
            let mut registration = Registration::default();
            let wanted = || target.load(Ordering::SeqCst);
            shared.0.register_falling(&mut registration, wanted, &Waker::from(Arc::clone(&woken)));
            let seen = shared.1.get() >= wanted();
            publisher.join().unwrap();
            assert!(seen || woken.times() > 0, "neither saw that the target was reached nor was woken");
        });
    }

    struct Woken {
        times: AtomicUsize,
        shared: Shared,
        lowest_seen: AtomicU64,
    }

    impl Woken {
        fn new(shared: &Shared) -> Self {
            let shared = loom::sync::Arc::clone(shared);
            Self { times: AtomicUsize::new(0), shared, lowest_seen: AtomicU64::new(NONE) }
        }

        fn times(&self) -> usize {
            self.times.load(Ordering::Relaxed)
        }
    }

    impl std::task::Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.times.fetch_add(1, Ordering::Relaxed);
            self.lowest_seen.fetch_min(self.shared.1.get(), Ordering::Relaxed);
        }
    }
}
