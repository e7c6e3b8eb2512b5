//! Inline handlers: code that runs on the shard's thread right after an event is appended.
//!
//! They see `&Archived<E>` where it lies in the log. What takes longer than a microsecond or may block
//! does not belong here; it follows the log from a thread of its own.

use std::fmt;

use crate::error::HandlerError;
use crate::event::{Event, Meta, ShardId};

/// What a handler learns at the end of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct BatchEnd {
    /// The shard.
    pub shard: ShardId,
    /// Events of the batch.
    pub events: usize,
    /// Events still waiting in the lane the batch came from.
    pub queue_depth: usize,
}

/// Code run on a shard's thread for every event, in append order. One instance per shard.
///
/// It may call the engine, and must not wait for it: the shard goes on only when it returns. A publish into a full lane is
/// [`Full`](crate::Rejected::Full) at once, a call that would wait says `OnEngineThread`; `docs/services.md` has the table.
pub trait Handler<E: Event>: Send {
    /// One event, just appended. It may not be durable yet.
    ///
    /// # Errors
    /// Whatever the handler's policy is to act on.
    fn on_event(&mut self, event: &E::Archived, meta: &Meta) -> Result<(), HandlerError>;

    /// The batch is over: the place for work that is cheaper for many than for one.
    ///
    /// # Errors
    /// As `on_event`; with the quarantine policy it is counted and logged, since it belongs to no event.
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

/// What happens when a handler returns an error or panics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnError {
    /// The shard stops with the cause: its publishers and waiters are told at once.
    #[default]
    Halt,
    /// The event is noted in `quarantine/handlers.jsonl` with its offset and the error, and the handler goes on with
    /// the next event. After a panic the handler sees later events as it then is.
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
