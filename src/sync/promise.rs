//! Promises: one thread sends one value to another, which blocks or awaits. Also blocks until an arbitrary condition
//! holds.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use super::{Mutex, Notifier, Registration, lock, may_wait, thread, thread_waker, wake};

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
    /// Waits for the value.
    waiter: Option<Waiter>,
}

#[derive(Debug)]
enum Waiter {
    /// The keeping thread wakes it.
    Thread(Waker),
    /// Its waker is application code: the notifier calls it, if there is one.
    Task(Waker),
}

/// The receiving half: waits for the value.
#[derive(Debug)]
pub(crate) struct Promise<T>(Arc<Mutex<Shared<T>>>);

/// The sending half: provides the value. Dropping it without a value breaks the promise.
#[derive(Debug)]
pub(crate) struct Keeping<T> {
    shared: Arc<Mutex<Shared<T>>>,
    /// Wakes a task that waits. `None`: the keeping thread does.
    notifier: Option<Arc<Notifier>>,
}

/// Returns both halves of a new promise. The thread that keeps it wakes the waiter.
pub(crate) fn promise<T>() -> (Promise<T>, Keeping<T>) {
    kept_by(None)
}

/// Returns both halves of a promise that a shard keeps: if a task waits, `notifier` wakes it.
pub(crate) fn promise_of_shard<T>(notifier: &Arc<Notifier>) -> (Promise<T>, Keeping<T>) {
    kept_by(Some(Arc::clone(notifier)))
}

fn kept_by<T>(notifier: Option<Arc<Notifier>>) -> (Promise<T>, Keeping<T>) {
    let shared = Arc::new(Mutex::new(Shared { value: None, is_broken: false, waiter: None }));
    (Promise(Arc::clone(&shared)), Keeping { shared, notifier })
}

impl<T> Keeping<T> {
    pub(crate) fn keep(self, value: T) {
        lock(&self.shared).value = Some(value);
    }

    /// Returns `true` if the promise was dropped: nobody waits for the value any more.
    pub(crate) fn is_abandoned(&self) -> bool {
        Arc::strong_count(&self.shared) == 1
    }
}

impl<T> Drop for Keeping<T> {
    fn drop(&mut self) {
        let waiter = {
            let mut shared = lock(&self.shared);
            shared.is_broken = true;
            shared.waiter.take()
        };
        // Called outside the lock, because the waker may poll the promise at once.
        match (waiter, &self.notifier) {
            (Some(Waiter::Task(waker)), Some(notifier)) => notifier.wake(waker),
            (Some(Waiter::Task(waker) | Waiter::Thread(waker)), _) => wake(waker),
            (None, _) => {}
        }
    }
}

impl<T> Promise<T> {
    /// Blocks until the value arrives. Returns `Ok(None)` if the promise is broken.
    pub(crate) fn wait(&self, deadline: Option<Instant>) -> Result<Option<T>, GaveUp> {
        let register = |_: &mut Registration, waker: &Waker| self.register(Waiter::Thread(waker.clone()));
        block_until(deadline, register, || self.take().map(Ok))
    }

    fn register(&self, waiter: Waiter) {
        let replaced = lock(&self.0).waiter.replace(waiter);
        // Outside the lock, because dropping a waker may run application code.
        drop(replaced);
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
        self.register(Waiter::Task(context.waker().clone()));
        self.take().map_or(Poll::Pending, Poll::Ready)
    }
}

impl<T> Drop for Promise<T> {
    /// Takes the waker back: the value may come late, and a waker keeps its task's memory.
    fn drop(&mut self) {
        let waiter = lock(&self.0).waiter.take();
        // Outside the lock, because dropping a waker may run application code.
        drop(waiter);
    }
}

/// Blocks until `outcome` returns a result or the deadline passes. On a thread that an engine waits for, this fails
/// instead of blocking.
pub(crate) fn block_until<T, E: From<GaveUp>>(
    deadline: Option<Instant>,
    register: impl FnMut(&mut Registration, &Waker),
    outcome: impl Fn() -> Option<Result<T, E>>,
) -> Result<T, E> {
    block(may_wait(), deadline, register, outcome)
}

/// As [`block_until`], but without a deadline and for an engine's own threads.
pub(crate) fn block_own<T, E: From<GaveUp>>(
    register: impl FnMut(&mut Registration, &Waker),
    outcome: impl Fn() -> Option<Result<T, E>>,
) -> Result<T, E> {
    block(true, None, register, outcome)
}

fn block<T, E: From<GaveUp>>(
    may_wait: bool,
    deadline: Option<Instant>,
    mut register: impl FnMut(&mut Registration, &Waker),
    outcome: impl Fn() -> Option<Result<T, E>>,
) -> Result<T, E> {
    let (waker, mut registration) = (thread_waker(), Registration::default());
    loop {
        register(&mut registration, &waker);
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

/// Completes as soon as `outcome` returns a result. `register` registers the task for its next change.
pub(crate) async fn until<T, const N: usize>(
    mut register: impl FnMut(&mut [Registration; N], &Waker),
    outcome: impl Fn() -> Option<T>,
) -> T {
    let mut registrations = [const { Registration::NONE }; N];
    std::future::poll_fn(|context| {
        if let Some(outcome) = outcome() {
            return Poll::Ready(outcome);
        }
        register(&mut registrations, context.waker());
        // Check once more: the result may have come between the check and the registration.
        outcome().map_or(Poll::Pending, Poll::Ready)
    })
    .await
}

/// Blocks until the future completes or the deadline passes. On a thread that an engine waits for, this fails instead of
/// blocking. A future that has completed by the deadline wins.
pub(crate) fn block_on<F: Future + Unpin>(deadline: Option<Instant>, future: &mut F) -> Result<F::Output, GaveUp> {
    let waker = thread_waker();
    let mut context = Context::from_waker(&waker);
    loop {
        if let Poll::Ready(output) = Pin::new(&mut *future).poll(&mut context) {
            return Ok(output);
        }
        if !may_wait() {
            return Err(GaveUp::OnEngineThread);
        }
        match deadline.map(|at| at.saturating_duration_since(Instant::now())) {
            Some(Duration::ZERO) => return Err(GaveUp::TimedOut),
            Some(left) => thread::park_timeout(left),
            None => thread::park(),
        }
    }
}
