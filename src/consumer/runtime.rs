//! The tokio runtime that runs a consumer's tasks.

use std::future::poll_fn;
use std::panic::catch_unwind;
use std::task::Poll;
use std::time::Duration;

use tokio::runtime::{Handle, RuntimeFlavor};

use super::error::ConsumerError;
use super::report::ConsumerReport;
use crate::sync::{Mutex, lock, thread};

/// The runtime that runs a consumer's tasks.
#[derive(Debug)]
pub(super) struct OwnRuntime {
    handle: Handle,
    /// The thread that last ran the consumer's own task.
    polled_on: Mutex<Option<thread::ThreadId>>,
}

impl OwnRuntime {
    /// Returns the runtime of the current thread, which must have timers.
    pub(super) fn current() -> Result<Self, ConsumerError> {
        let handle = Handle::try_current().map_err(|_| ConsumerError::NoRuntime)?;
        // The runtime does not say whether it has timers, but a timer panics without them.
        let timer = catch_unwind(|| drop(tokio::time::sleep(Duration::ZERO)));
        timer.map_err(|_| ConsumerError::NoRuntime)?;
        Ok(Self { handle, polled_on: Mutex::new(None) })
    }

    pub(super) fn handle(&self) -> &Handle {
        &self.handle
    }

    /// Notes that the consumer's own task runs on the current thread.
    pub(super) fn note_polled(&self) {
        *lock(&self.polled_on) = Some(thread::current().id());
    }

    /// Returns `true` if the runtime's tasks make no progress while the current thread waits: it is the only thread of
    /// the runtime. A runtime with more threads does not tell which thread is one of them.
    pub(super) fn is_here(&self) -> bool {
        self.handle.runtime_flavor() == RuntimeFlavor::CurrentThread
            && Handle::try_current().is_ok_and(|current| current.id() == self.handle.id())
            && *lock(&self.polled_on) == Some(thread::current().id())
    }
}

/// Returns an error if a consumer has ended because its runtime is shut down: such a runtime drops a new task at once.
pub(super) fn check_started(report: &ConsumerReport) -> Result<(), ConsumerError> {
    match &report.failure {
        Some(failure) if matches!(failure.error(), ConsumerError::RuntimeEnded) => Err(ConsumerError::RuntimeEnded),
        _ => Ok(()),
    }
}

/// Sleeps until the task is woken, at most for `limit`. A wake-up since the task was polled counts.
pub(super) async fn sleep_until_woken(limit: Option<Duration>) {
    let mut was_polled = false;
    let woken = poll_fn(|_| match std::mem::replace(&mut was_polled, true) {
        false => Poll::Pending,
        true => Poll::Ready(()),
    });
    match limit {
        // Woken or due: either way, the caller looks again.
        Some(limit) => drop(tokio::time::timeout(limit, woken).await),
        None => woken.await,
    }
}
