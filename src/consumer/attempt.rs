//! One attempt at an event: the future of an asynchronous handler, as a task of the application's runtime.
//!
//! Every attempt reports its end exactly once, also when it panics or is dropped.

use std::future::{Future, poll_fn};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;

use super::delivered::Delivered;
use super::driver::job::Failed;
use super::life::Life;
use super::running::ConsumerShared;
use crate::error::{HandlerError, panic_text};
use crate::event::{Event, Offset};
use crate::sync::{Mutex, lock, thread};

/// The identity of a job: the index of its shard, and its event's offset.
pub(super) type JobId = (usize, Offset);

/// The end of an attempt.
#[derive(Debug)]
pub(super) enum AttemptEnd {
    Done(Result<(), Failed>),
    /// The future was dropped before it completed. The event counts as not handled.
    Cancelled,
}

/// The ends of attempts on their way to the driver.
#[derive(Debug, Default)]
pub(super) struct AttemptEnds(Mutex<Ends>);

#[derive(Debug, Default)]
struct Ends {
    list: Vec<(JobId, AttemptEnd)>,
    /// `true` if no task takes them any more: the runtime has dropped the driver's task.
    is_left: bool,
}

impl AttemptEnds {
    /// Adds an end. Returns `true` if the caller must make the driver take it.
    fn add(&self, job: JobId, end: AttemptEnd) -> bool {
        let mut ends = lock(&self.0);
        ends.list.push((job, end));
        ends.is_left
    }

    pub(super) fn take(&self) -> Vec<(JobId, AttemptEnd)> {
        std::mem::take(&mut lock(&self.0).list)
    }

    pub(super) fn is_empty(&self) -> bool {
        lock(&self.0).list.is_empty()
    }

    /// Notes that the driver's task is gone.
    pub(super) fn leave(&self) {
        lock(&self.0).is_left = true;
    }
}

/// Reports the end of one attempt, when it is dropped at the latest.
pub(super) struct AttemptReport<E: Event> {
    /// `None` once reported.
    job: Option<JobId>,
    shared: Arc<ConsumerShared<E>>,
    ends: Arc<AttemptEnds>,
}

impl<E: Event> AttemptReport<E> {
    pub(super) fn new(job: JobId, shared: &Arc<ConsumerShared<E>>, ends: &Arc<AttemptEnds>) -> Self {
        Self { job: Some(job), shared: Arc::clone(shared), ends: Arc::clone(ends) }
    }

    fn end(&mut self, end: AttemptEnd) {
        let Some(job) = self.job.take() else { return };
        let is_left = self.ends.add(job, end);
        let life = &self.shared.life;
        life.wake();
        // Inside a step of the driver, the end is taken after the step.
        if is_left && life.may_ask() {
            life.help(None);
        }
    }
}

impl<E: Event> Drop for AttemptReport<E> {
    fn drop(&mut self) {
        self.end(if thread::panicking() {
            AttemptEnd::Done(Err(Failed::Panic("while its future was dropped".to_owned())))
        } else {
            AttemptEnd::Cancelled
        });
    }
}

/// Calls `handler` once and reports the outcome.
pub(super) async fn attempt<E, F, Fut>(handler: Arc<F>, event: Delivered<E>, mut report: AttemptReport<E>)
where
    E: Event,
    F: Fn(Delivered<E>) -> Fut,
    Fut: Future<Output = Result<(), HandlerError>>,
{
    // The future is dropped before the end is reported: the key's next event may run from then on.
    let outcome = {
        let life = &report.shared.life;
        match guarded(life, || handler(event)) {
            Ok(future) => {
                let mut future = pin!(future);
                poll_fn(|context| match guarded(life, || future.as_mut().poll(context)) {
                    Ok(Poll::Pending) => Poll::Pending,
                    Ok(Poll::Ready(outcome)) => Poll::Ready(outcome.map_err(Failed::Handler)),
                    Err(failed) => Poll::Ready(Err(failed)),
                })
                .await
            }
            Err(failed) => Err(failed),
        }
    };
    report.end(AttemptEnd::Done(outcome));
}

/// Runs the handler's code as a part of its consumer: from there, waiting for the consumer is an error. Turns a panic
/// into a failure.
fn guarded<T>(life: &Life, body: impl FnOnce() -> T) -> Result<T, Failed> {
    life.on_this_thread(false, || catch_unwind(AssertUnwindSafe(body)))
        .map_err(|panic| Failed::Panic(panic_text(&*panic)))
}
