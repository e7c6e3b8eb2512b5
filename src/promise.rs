//! One value from one thread to another that waits for it, by blocking or as a task.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use crate::error::WaitError;
use crate::sync::{Arc, Mutex, lock, may_wait, thread_waker, wake};

#[derive(Debug)]
struct Shared<T> {
    value: Option<T>,
    /// Nobody will keep the promise any more.
    is_broken: bool,
    waker: Option<Waker>,
}

/// Who waits.
#[derive(Debug)]
pub(crate) struct Promise<T>(Arc<Mutex<Shared<T>>>);

/// Who is waited for. Dropped without a value, it breaks the promise.
#[derive(Debug)]
pub(crate) struct Keeping<T>(Arc<Mutex<Shared<T>>>);

/// A promise and who is to keep it.
pub(crate) fn promise<T>() -> (Promise<T>, Keeping<T>) {
    let shared = Arc::new(Mutex::new(Shared { value: None, is_broken: false, waker: None }));
    (Promise(Arc::clone(&shared)), Keeping(shared))
}

impl<T> Keeping<T> {
    pub(crate) fn keep(self, value: T) {
        lock(&self.0).value = Some(value);
    }
}

impl<T> Drop for Keeping<T> {
    fn drop(&mut self) {
        let waker = {
            let mut shared = lock(&self.0);
            shared.is_broken = true;
            shared.waker.take()
        };
        // Not under the lock: a waker may ask again at once.
        if let Some(waker) = waker {
            wake(waker);
        }
    }
}

impl<T> Promise<T> {
    /// Blocks until there is a value. `Ok(None)`: there will be none.
    pub(crate) fn wait(&self, deadline: Option<Instant>) -> Result<Option<T>, WaitError> {
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

/// Blocks until there is an outcome or the deadline has passed. A thread that an engine waits for is refused instead of blocked.
pub(crate) fn block_until<T>(
    deadline: Option<Instant>,
    register: impl Fn(&std::task::Waker),
    outcome: impl Fn() -> Option<Result<T, WaitError>>,
) -> Result<T, WaitError> {
    block(may_wait(), deadline, register, outcome)
}

/// As [`block_until`], for waits of an engine's own threads.
pub(crate) fn block_own<T>(
    register: impl Fn(&std::task::Waker),
    outcome: impl Fn() -> Option<Result<T, WaitError>>,
) -> Result<T, WaitError> {
    block(true, None, register, outcome)
}

fn block<T>(
    may_wait: bool,
    deadline: Option<Instant>,
    register: impl Fn(&std::task::Waker),
    outcome: impl Fn() -> Option<Result<T, WaitError>>,
) -> Result<T, WaitError> {
    let waker = thread_waker();
    loop {
        register(&waker);
        if let Some(outcome) = outcome() {
            return outcome;
        }
        if !may_wait {
            return Err(WaitError::OnEngineThread);
        }
        match deadline.map(|at| at.saturating_duration_since(Instant::now())) {
            Some(Duration::ZERO) => return Err(WaitError::TimedOut),
            Some(left) => crate::sync::thread::park_timeout(left),
            None => crate::sync::thread::park(),
        }
    }
}
