//! Waits of tasks: with a deadline, and for the end of a consumer or sink.

use std::future::{Future, poll_fn};
use std::task::Poll;
use std::time::Instant;

use super::error::ConsumerError;
use super::life::Life;
use crate::sync::Registration;

/// Awaits `future` until the deadline. A deadline needs a tokio runtime with timers.
pub(super) async fn within<F: Future>(deadline: Option<Instant>, future: F) -> Option<F::Output> {
    match deadline {
        Some(at) => tokio::time::timeout_at(at.into(), future).await.ok(),
        None => Some(future.await),
    }
}

/// Stops the consumer or sink of this life and awaits its end. Returns an error if it has not ended by the deadline.
pub(super) async fn stop_async(life: &Life, name: &str, deadline: Option<Instant>) -> Result<(), ConsumerError> {
    life.ask_to_stop();
    if !life.is_outside() {
        return Err(life.stop_unwaited());
    }
    let mut registration = Registration::default();
    let ended = poll_fn(|context| {
        life.ending().register(&mut registration, 1, context.waker());
        if life.has_ended() { Poll::Ready(()) } else { Poll::Pending }
    });
    within(deadline, ended).await.ok_or_else(|| life.give_up(name))
}
