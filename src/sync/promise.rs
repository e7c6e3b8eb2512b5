//! Promises: one thread sends one value to another, which blocks or awaits. Also blocks until an arbitrary condition
//! holds.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use super::{Mutex, lock, may_wait, thread, wake};

/// The reason why a wait ended without a result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum GaveUp {
    /// The deadline passed.
    TimedOut,
    /// The current thread belongs to an engine, and the engine may be waiting for this thread. So this thread must not
    /// wait for an engine.
    OnEngineThread,
}

#[derive(Debug)]
struct Shared<T> {
    value: Option<T>,
    /// The `Keeping` was dropped, so no value can come any more.
    is_broken: bool,
    waker: Option<Waker>,
}

/// The receiving half: waits for the value.
#[derive(Debug)]
pub(crate) struct Promise<T>(Arc<Mutex<Shared<T>>>);

/// The sending half: provides the value. Dropping it without a value breaks the promise.
#[derive(Debug)]
pub(crate) struct Keeping<T>(Arc<Mutex<Shared<T>>>);

/// Returns both halves of a new promise.
pub(crate) fn promise<T>() -> (Promise<T>, Keeping<T>) {
    let shared = Arc::new(Mutex::new(Shared { value: None, is_broken: false, waker: None }));
    (Promise(Arc::clone(&shared)), Keeping(shared))
}

impl<T> Keeping<T> {
    pub(crate) fn keep(self, value: T) {
        lock(&self.0).value = Some(value);
    }

    /// Returns `true` if the promise was dropped: nobody waits for the value any more.
    pub(crate) fn is_abandoned(&self) -> bool {
        Arc::strong_count(&self.0) == 1
    }
}

impl<T> Drop for Keeping<T> {
    fn drop(&mut self) {
        let waker = {
            let mut shared = lock(&self.0);
            shared.is_broken = true;
            shared.waker.take()
        };
        // Called outside the lock, because the waker may poll the promise at once.
        if let Some(waker) = waker {
            wake(waker);
        }
    }
}

impl<T> Promise<T> {
    /// Blocks until the value arrives. Returns `Ok(None)` if the promise is broken.
    pub(crate) fn wait(&self, deadline: Option<Instant>) -> Result<Option<T>, GaveUp> {
        block_until(deadline, |waker| lock(&self.0).waker = Some(waker.clone()), || self.take().map(Ok))
    }

    fn take(&self) -> Option<Option<T>> {
        let mut shared = lock(&self.0);
        match shared.value.take() {
            Some(value) => Some(Some(value)),
            None => shared.is_broken.then_some(None),
        }
    }
}

impl<T> Future for Promise<T> {
    type Output = Option<T>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<T>> {
        lock(&self.0).waker = Some(context.waker().clone());
        self.take().map_or(Poll::Pending, Poll::Ready)
    }
}

/// Blocks until `outcome` returns a result or the deadline passes. On a thread that an engine waits for, this fails
/// instead of blocking.
pub(crate) fn block_until<T, E: From<GaveUp>>(
    deadline: Option<Instant>,
    register: impl Fn(&Waker),
    outcome: impl Fn() -> Option<Result<T, E>>,
) -> Result<T, E> {
    block(may_wait(), deadline, register, outcome)
}

/// As [`block_until`], but without a deadline and for an engine's own threads.
pub(crate) fn block_own<T, E: From<GaveUp>>(
    register: impl Fn(&Waker),
    outcome: impl Fn() -> Option<Result<T, E>>,
) -> Result<T, E> {
    block(true, None, register, outcome)
}

fn block<T, E: From<GaveUp>>(
    may_wait: bool,
    deadline: Option<Instant>,
    register: impl Fn(&Waker),
    outcome: impl Fn() -> Option<Result<T, E>>,
) -> Result<T, E> {
    let waker = thread_waker();
    loop {
        register(&waker);
        if let Some(outcome) = outcome() {
            return outcome;
        }
        if !may_wait {
            return Err(GaveUp::OnEngineThread.into());
        }
        match deadline.map(|at| at.saturating_duration_since(Instant::now())) {
            Some(Duration::ZERO) => return Err(GaveUp::TimedOut.into()),
            Some(left) => thread::park_timeout(left),
            None => thread::park(),
        }
    }
}

/// Returns a waker that unparks the current thread.
pub(crate) fn thread_waker() -> Waker {
    struct Unpark(thread::Thread);
    impl std::task::Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    Waker::from(Arc::new(Unpark(thread::current())))
}
