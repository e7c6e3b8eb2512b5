//! The wakers of threads.
//!
//! A thread uses one waker for all its waits, so that lists of waiters recognise it: it only unparks the thread, so any
//! thread may call it.

use std::cell::OnceCell;
use std::sync::Arc;
use std::task::Waker;

use super::thread;

thread_local! {
    static OWN: OnceCell<Waker> = const { OnceCell::new() };
}

struct Unpark(thread::Thread);

impl std::task::Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Returns the waker that unparks the current thread.
pub(crate) fn thread_waker() -> Waker {
    let new = || Waker::from(Arc::new(Unpark(thread::current())));
    // A thread that ends has lost it already.
    OWN.try_with(|own| own.get_or_init(new).clone()).unwrap_or_else(|_| new())
}

/// Returns `true` if `waker` is the current thread's, from [`thread_waker`].
pub(super) fn is_of_this_thread(waker: &Waker) -> bool {
    // The address is enough: the thread's waker lives, so nothing else is there.
    OWN.try_with(|own| own.get().is_some_and(|own| own.data() == waker.data())).unwrap_or(false)
}
