//! Sleeping without losing a wake-up.
//!
//! One sleeper, any number of notifiers.

use std::time::Duration;

use super::{AtomicU32, CachePadded, Mutex, Ordering, fence, lock, thread};

const AWAKE: u32 = 0;
const ASLEEP: u32 = 1;

/// Lets one thread sleep until another has work for it.
///
/// The sleeper announces itself, looks for work once more, and only then sleeps; who brings work
/// makes it visible, and then looks whether somebody sleeps. A sequentially consistent fence on
/// both sides makes it impossible that both look too early.
#[derive(Debug)]
pub(crate) struct Signal {
    state: CachePadded<AtomicU32>,
    sleeper: Mutex<Option<thread::Thread>>,
}

impl Signal {
    pub(crate) fn new() -> Self {
        Self { state: CachePadded::new(AtomicU32::new(AWAKE)), sleeper: Mutex::new(None) }
    }

    /// Sleeps until notified or `timeout`, unless `has_work`. May wake for no reason.
    pub(crate) fn sleep(&self, timeout: Option<Duration>, has_work: impl FnOnce() -> bool) {
        *lock(&self.sleeper) = Some(thread::current());
        self.state.store(ASLEEP, Ordering::Relaxed);
        // SeqCst: pairs with the fence in `notify`: either we see the work or the notifier sees us.
        fence(Ordering::SeqCst);
        if !has_work() {
            park(timeout);
        }
        self.state.store(AWAKE, Ordering::Relaxed);
    }

    /// Wakes the sleeper, if there is one. To be called after the work was made visible.
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
        // Once per sleep: a busy notifier does not call into the kernel again and again.
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

// Loom knows no time: a sleep that needs its timeout to end shows as a deadlock, as it should.
#[cfg(loom)]
fn park(_timeout: Option<Duration>) {
    thread::park();
}

#[cfg(all(test, loom))]
mod models {
    use super::*;
    use loom::sync::Arc;
    use loom::sync::atomic::AtomicUsize;

    /// A wake-up is never lost: if it were, the sleeper would stay parked and loom would report a deadlock.
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
