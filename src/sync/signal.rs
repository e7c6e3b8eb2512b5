//! Sleeping without losing a wake-up.
//!
//! One sleeper, any number of notifiers.

use std::time::Duration;

use super::{AtomicU32, CachePadded, Mutex, Ordering, fence, lock, thread};

const AWAKE: u32 = 0;
const ASLEEP: u32 = 1;

/// Lets one thread sleep until another thread has work for it.
///
/// The sleeper announces itself, checks for work once more, and only then sleeps. A notifier makes its work visible
/// first and then checks whether the sleeper has announced itself. A sequentially consistent fence on both sides
/// ensures that at least one of them sees the other.
#[derive(Debug)]
pub(crate) struct Signal {
    state: CachePadded<AtomicU32>,
    sleeper: Mutex<Option<thread::Thread>>,
}

impl Signal {
    pub(crate) fn new() -> Self {
        Self { state: CachePadded::new(AtomicU32::new(AWAKE)), sleeper: Mutex::new(None) }
    }

    /// Sleeps until a notification or until `timeout` has passed, unless `has_work` returns `true`. May wake
    /// spuriously.
    pub(crate) fn sleep(&self, timeout: Option<Duration>, has_work: impl FnOnce() -> bool) {
        *lock(&self.sleeper) = Some(thread::current());
        self.state.store(ASLEEP, Ordering::Relaxed);
        // SeqCst: pairs with the fence in `notify`: either this thread sees the work or the notifier sees the sleeper.
        fence(Ordering::SeqCst);
        if !has_work() {
            park(timeout);
        }
        self.state.store(AWAKE, Ordering::Relaxed);
    }

    /// Wakes the sleeper, if any. Call this after making the work visible.
    #[inline]
    pub(crate) fn notify(&self) {
        // SeqCst: pairs with the fence in `sleep`.
        fence(Ordering::SeqCst);
        if self.state.load(Ordering::Relaxed) == ASLEEP {
            self.wake();
        }
    }

    #[cold]
    fn wake(&self) {
        // Only the first notifier of a sleep makes the system call.
        if self.state.swap(AWAKE, Ordering::Relaxed) == ASLEEP
            && let Some(sleeper) = &*lock(&self.sleeper)
        {
            sleeper.unpark();
        }
    }
}

#[cfg(not(loom))]
fn park(timeout: Option<Duration>) {
    match timeout {
        Some(timeout) => thread::park_timeout(timeout),
        None => thread::park(),
    }
}

// Loom has no time: a sleep that only its timeout would end is reported as a deadlock.
#[cfg(loom)]
fn park(_timeout: Option<Duration>) {
    thread::park();
}

#[cfg(all(test, loom))]
mod models {
    use super::*;
    use loom::sync::Arc;
    use loom::sync::atomic::AtomicUsize;

    /// A wake-up is never lost. If it were, the sleeper would stay parked and loom would report a deadlock.
    #[test]
    fn loom_parking_never_loses_a_wake_up() {
        loom::model(|| {
            let shared = Arc::new((Signal::new(), AtomicUsize::new(0)));
            let other = Arc::clone(&shared);
            let producer = thread::spawn(move || {
                other.1.store(1, Ordering::Release);
                other.0.notify();
            });
            while shared.1.load(Ordering::Acquire) == 0 {
                shared.0.sleep(None, || shared.1.load(Ordering::Acquire) != 0);
            }
            producer.join().unwrap();
        });
    }
}
