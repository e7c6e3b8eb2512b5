//! An event of a live feed, which owns its place in the log.
//!
//! Immutable. The bytes below a log's published position never change while the segment's memory is shared.

use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

use rkyv::util::AlignedVec;

use crate::event::{Event, Meta};
use crate::storage::Lock;
use crate::storage::memory::{ALIGN, Memory};

/// A segment that events of a feed share.
#[derive(Debug)]
pub(super) struct SharedSegment {
    memory: Arc<Memory>,
    /// The store's lock. Events in place trust the bytes that this process wrote. So no other engine may open the store
    /// and write the segment again while an event lives.
    _lock: Arc<dyn Lock>,
}

impl SharedSegment {
    pub(super) fn new(memory: &Arc<Memory>, lock: &Arc<dyn Lock>) -> Arc<Self> {
        Arc::new(Self { memory: Arc::clone(memory), _lock: Arc::clone(lock) })
    }

    /// Returns `true` if this is the segment with this memory.
    #[inline]
    pub(super) fn is_of(&self, memory: &Arc<Memory>) -> bool {
        Arc::ptr_eq(&self.memory, memory)
    }
}

/// The archive of an event.
#[derive(Clone)]
pub(super) enum Body {
    /// In its segment: its position and its length.
    InPlace(Arc<SharedSegment>, usize, usize),
    /// Upcasted from an older layout.
    Upcasted(Arc<AlignedVec<ALIGN>>),
}

/// An event of a [`super::Live`] feed: its metadata and its archive, in place.
///
/// Cheap to keep and to clone: it shares the segment's memory, and nothing is copied (events of an older layout are
/// upcasted once). While it lives, the segment's file cannot be written again, and the store stays locked; so drop it
/// when it is handled, or deserialize it with [`crate::event::deserialize`].
pub struct LiveEvent<E: Event> {
    meta: Meta,
    body: Body,
    event: PhantomData<fn() -> E>,
}

impl<E: Event> LiveEvent<E> {
    /// `body` must be a valid archive of an `E`.
    #[inline]
    pub(super) fn new(meta: Meta, body: Body) -> Self {
        Self { meta, body, event: PhantomData }
    }

    /// Returns the metadata of the event.
    #[inline]
    #[must_use]
    pub fn meta(&self) -> &Meta {
        &self.meta
    }

    /// Returns the archived event. An event that an earlier process appended is validated by each call, so call it once
    /// and keep the reference.
    ///
    /// # Panics
    /// If the store's file has been damaged since the feed returned the event.
    #[inline]
    #[must_use]
    pub fn event(&self) -> &E::Archived {
        let event = match &self.body {
            Body::InPlace(segment, at, len) => segment.memory.archived::<E>(*at, *len),
            Body::Upcasted(archive) => E::access(archive).ok(),
        };
        event.expect("an archive that was valid when the feed returned it")
    }
}

impl<E: Event> Clone for LiveEvent<E> {
    fn clone(&self) -> Self {
        Self { meta: self.meta, body: self.body.clone(), event: PhantomData }
    }
}

impl<E: Event> fmt::Debug for LiveEvent<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LiveEvent").field("meta", &self.meta).finish_non_exhaustive()
    }
}
