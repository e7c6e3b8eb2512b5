//! Events of a live feed that own their place in the log. Immutable.

use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

use super::batch::Batch;
use crate::event::{Event, Meta};
use crate::log::reader::Record;

/// An event of a [`super::Live`] feed, in place.
///
/// Cheap to keep, to clone and to send to another thread: nothing is copied, and an event of an older layout is upcasted
/// once. While it lives, its segment's file cannot be written again, and the store stays locked. So drop it when it is
/// handled, or keep a copy ([`crate::event::deserialize`]).
pub struct LiveEvent<E: Event> {
    batch: Arc<Batch>,
    index: usize,
    event: PhantomData<fn() -> E>,
}

impl<E: Event> LiveEvent<E> {
    #[inline]
    pub(super) fn new(batch: Arc<Batch>, index: usize) -> Self {
        Self { batch, index, event: PhantomData }
    }

    /// Returns the metadata of the event.
    #[inline]
    #[must_use]
    pub fn meta(&self) -> Meta {
        self.batch.meta(self.index)
    }

    /// Returns the archived event. If an earlier process appended the event, each call validates the archive.
    ///
    /// # Panics
    /// If an earlier process appended the event, and its file has been damaged since the feed returned the event.
    #[inline]
    #[must_use]
    pub fn event(&self) -> &E::Archived {
        self.batch.event::<E>(self.index)
    }
}

impl<E: Event> Clone for LiveEvent<E> {
    fn clone(&self) -> Self {
        Self::new(Arc::clone(&self.batch), self.index)
    }
}

impl<E: Event> fmt::Debug for LiveEvent<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LiveEvent").field("meta", &self.meta()).finish_non_exhaustive()
    }
}

/// Events of a [`super::LiveBatches`] stream: 1 to 256 events of one shard, in the order of its log, in place. It holds
/// its segment and the store's lock as a [`LiveEvent`] does.
pub struct LiveBatch<E: Event> {
    batch: Arc<Batch>,
    /// Events before this one were returned one by one.
    from: usize,
    event: PhantomData<fn() -> E>,
}

impl<E: Event> LiveBatch<E> {
    pub(super) fn new(batch: Arc<Batch>, from: usize) -> Self {
        Self { batch, from, event: PhantomData }
    }

    /// Returns the events.
    ///
    /// # Panics
    /// The iterator panics if an earlier process appended an event, and its file has been damaged since the stream
    /// returned the batch.
    #[inline]
    pub fn records(&self) -> impl ExactSizeIterator<Item = Record<'_, E>> {
        (self.from..self.batch.len()).map(|index| self.batch.record(index))
    }
}

impl<E: Event> fmt::Debug for LiveBatch<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LiveBatch").field("events", &(self.batch.len() - self.from)).finish_non_exhaustive()
    }
}
