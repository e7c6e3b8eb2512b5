//! Inline handlers: code that runs on the shard's thread right after an event is appended.
//!
//! A handler sees `&Archived<E>` in place, in the log. Work that takes longer than a microsecond, or that may block,
//! belongs in a consumer, which follows the log on its own thread.

use std::fmt;

use crate::error::HandlerError;
use crate::event::{Event, Meta, ShardId};

/// The end of a batch, as a handler sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct BatchEnd {
    /// The shard.
    pub shard: ShardId,
    /// Events of the batch.
    pub events: usize,
    /// Events still queued in the lane that the batch came from.
    pub queue_depth: usize,
}

/// Code that runs on a shard's thread for every event, in append order. Each shard has its own instance.
///
/// A handler may call the engine but must not wait for it: the shard continues only when the handler returns. A publish
/// into a full lane returns [`Full`](crate::Rejected::Full) at once, and a call that would wait returns
/// `OnEngineThread`; `docs/services.md` has a table of these calls.
pub trait Handler<E: Event>: Send {
    /// Handles one event that was just appended. It may not be durable yet.
    ///
    /// # Errors
    /// Any error; the handler's [`OnError`] policy decides what the shard does.
    fn on_event(&mut self, event: &E::Archived, meta: &Meta) -> Result<(), HandlerError>;

    /// Handles the end of a batch: the place for work that costs less per batch than per event.
    ///
    /// # Errors
    /// The same as for `on_event`. With [`OnError::Quarantine`] the note names no event.
    fn on_batch_end(&mut self, batch: &BatchEnd) -> Result<(), HandlerError> {
        let _unused: &BatchEnd = batch;
        Ok(())
    }
}

impl<E: Event, F> Handler<E> for F
where
    F: FnMut(&E::Archived, &Meta) -> Result<(), HandlerError> + Send,
{
    fn on_event(&mut self, event: &E::Archived, meta: &Meta) -> Result<(), HandlerError> {
        self(event, meta)
    }
}

/// The policy for errors and panics of a handler.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum OnError {
    /// The shard stops, and its publishers and waiters receive the cause at once.
    #[default]
    Halt,
    /// The shard notes the event in `quarantine/handlers.jsonl`, with its offset and the error, and runs the handler on
    /// the next event. After a panic the handler continues with the state that the panic left.
    Quarantine,
}

/// A handler of one shard, with its name and policy.
pub(crate) struct Registered<E: Event> {
    pub(crate) name: String,
    pub(crate) on_error: OnError,
    pub(crate) handler: Box<dyn Handler<E>>,
}

impl<E: Event> fmt::Debug for Registered<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registered").field("name", &self.name).field("on_error", &self.on_error).finish_non_exhaustive()
    }
}

/// Makes a handler for each shard.
pub(crate) type Factory<E> = Box<dyn Fn(ShardId) -> Registered<E>>;
