//! An event on its way through an asynchronous handler: owned, so that the handler's future may keep it.

use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

use super::effects::Call;
use crate::event::{Event, Meta};
use crate::log::access::Held;

/// An event that an asynchronous handler was called with. A clone costs a few reference counts: the event is read in
/// place, in the log.
///
/// While it lives, its segment cannot be written again and the store stays locked, even after the engine is closed. So
/// drop it when the handler ends, and copy what must live longer.
pub struct Delivered<E: Event> {
    held: Held,
    meta: Meta,
    consumer: Arc<str>,
    attempt: u32,
    is_rebuild: bool,
    event: PhantomData<fn() -> E>,
}

impl<E: Event> fmt::Debug for Delivered<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Delivered").field("meta", &self.meta).field("attempt", &self.attempt).finish_non_exhaustive()
    }
}

impl<E: Event> Clone for Delivered<E> {
    fn clone(&self) -> Self {
        Self { held: self.held.clone(), consumer: Arc::clone(&self.consumer), ..*self }
    }
}

impl<E: Event> Delivered<E> {
    /// Returns a delivered event. `held` must hold an `E`.
    pub(super) fn new(held: Held, meta: Meta, consumer: Arc<str>, attempt: u32, is_rebuild: bool) -> Self {
        Self { held, meta, consumer, attempt, is_rebuild, event: PhantomData }
    }

    /// Returns the archived event in place. An event that an earlier process wrote is validated with each call.
    ///
    /// A future that keeps the reference across an `.await` is `Send` only if the archived type is `Sync`. Types made of
    /// numbers, strings and collections are.
    #[must_use]
    pub fn event(&self) -> &E::Archived {
        self.held.event::<E>()
    }

    /// Returns the metadata of the event; `meta.sequence` is unknown.
    #[must_use]
    pub fn meta(&self) -> &Meta {
        &self.meta
    }

    /// Returns this call of the handler: the attempt's number, and the identity of its side effects.
    #[must_use]
    pub fn call(&self) -> Call<'_> {
        Call::new(&self.consumer, self.meta.id(), self.attempt, self.is_rebuild)
    }
}
