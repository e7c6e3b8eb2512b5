//! Threads and tasks that wait for a position.

use std::task::Waker;

use super::{AtomicBool, Mutex, Ordering, fence, lock};

/// The wakers of threads and tasks that wait for a position, each with its target.
#[derive(Debug)]
pub(crate) struct Waiters {
    any: AtomicBool,
    list: Mutex<Vec<(u64, Waker)>>,
}

impl Waiters {
    pub(crate) fn new() -> Self {
        Self { any: AtomicBool::new(false), list: Mutex::new(Vec::new()) }
    }

    /// Registers `waker` for `target`. The caller must check the position again afterwards.
    pub(crate) fn register(&self, target: u64, waker: &Waker) {
        {
            let mut list = lock(&self.list);
            list.retain(|(at, known)| !(*at == target && known.will_wake(waker)));
            list.push((target, waker.clone()));
            self.any.store(true, Ordering::Relaxed);
        }
        // SeqCst: pairs with the fence in `reached`: either the caller sees the position or the publisher sees the
        // waker.
        fence(Ordering::SeqCst);
    }

    /// Wakes every waiter whose target is at most `position`. Call this after publishing the position.
    #[inline]
    pub(crate) fn reached(&self, position: u64) {
        // SeqCst: pairs with the fence in `register`.
        fence(Ordering::SeqCst);
        if self.any.load(Ordering::Relaxed) {
            self.wake(position);
        }
    }

    #[cold]
    fn wake(&self, position: u64) {
        let mut due = Vec::new();
        {
            let mut list = lock(&self.list);
            list.retain(|(target, waker)| {
                let keep = *target > position;
                if !keep {
                    due.push(waker.clone());
                }
                keep
            });
            self.any.store(!list.is_empty(), Ordering::Relaxed);
        }
        due.into_iter().for_each(wake);
    }
}

/// Calls the waker and catches its panic: a waker is application code, and the calling thread has other wakers to call.
pub(crate) fn wake(waker: Waker) {
    if std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| waker.wake())).is_err() {
        tracing::error!("a waker panicked");
    }
}

#[cfg(all(test, loom))]
mod models {
    use super::*;
    use crate::sync::{Watermark, thread};
    use loom::sync::Arc;
    use loom::sync::atomic::AtomicUsize;

    /// A waiter either sees the position when it registers or is woken.
    #[test]
    fn loom_waiters_are_woken() {
        loom::model(|| {
            let shared = Arc::new((Waiters::new(), Watermark::new(0)));
            let woken = std::sync::Arc::new(Woken(AtomicUsize::new(0)));
            let other = Arc::clone(&shared);
            let mover = thread::spawn(move || {
                other.1.publish(5);
                other.0.reached(5);
            });
            let waker = Waker::from(std::sync::Arc::clone(&woken));
            shared.0.register(5, &waker);
            let seen = shared.1.get() >= 5;
            mover.join().unwrap();
            assert!(seen || woken.0.load(Ordering::Relaxed) > 0, "neither saw the position nor was woken");
        });
    }

    struct Woken(AtomicUsize);
    impl std::task::Wake for Woken {
        fn wake(self: std::sync::Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }
}
