//! Events of one segment that a feed has found, and that readers share.
//!
//! One writer: the feed, while nobody else holds the batch. Bytes below a log's published position never change while
//! the segment's memory is held.

use std::collections::BTreeMap;
use std::sync::Arc;

use rkyv::util::AlignedVec;

use crate::event::{Event, Meta, Offset, Sequence, ShardId};
use crate::log::format::{RECORD_HEADER_BYTES, RecordHeader};
use crate::log::reader::Record;
use crate::storage::Lock;
use crate::storage::memory::{ALIGN, Memory};

/// Events in one segment, in the order of the log.
#[derive(Debug, Default)]
pub(super) struct Batch {
    /// `None` while the batch is empty.
    segment: Option<BatchSegment>,
    places: Vec<Place>,
    /// The archives of events with an older layout, upcasted, by their index.
    upcasted: BTreeMap<usize, AlignedVec<ALIGN>>,
}

/// The segment of a batch.
#[derive(Debug)]
struct BatchSegment {
    shard: ShardId,
    /// The offset of the segment's first byte.
    base: u64,
    memory: Arc<Memory>,
    /// The store's lock. Events in place trust the bytes that this process wrote. So no other engine may open the store
    /// and write the segment again while an event lives.
    _lock: Arc<dyn Lock>,
}

/// The place of an event in its segment.
#[derive(Debug, Clone, Copy)]
struct Place {
    at: usize,
    len: usize,
    sequence: Sequence,
}

impl Batch {
    pub(super) fn len(&self) -> usize {
        self.places.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// Forgets all events, and lets go of the segment.
    pub(super) fn clear(&mut self) {
        self.segment = None;
        self.places.clear();
        self.upcasted.clear();
    }

    /// Returns `true` if the batch has no segment yet, or the segment with this memory.
    #[inline]
    pub(super) fn takes(&self, memory: &Arc<Memory>) -> bool {
        self.segment.as_ref().is_none_or(|segment| Arc::ptr_eq(&segment.memory, memory))
    }

    /// Sets the segment of an empty batch. `base` is the offset of the segment's first byte.
    pub(super) fn begin(&mut self, shard: ShardId, base: u64, memory: &Arc<Memory>, lock: &Arc<dyn Lock>) {
        let (memory, lock) = (Arc::clone(memory), Arc::clone(lock));
        self.segment = Some(BatchSegment { shard, base, memory, _lock: lock });
    }

    /// Adds the event whose record begins at `at`. `upcasted` is its archive if the record has an older layout.
    #[inline]
    pub(super) fn push(&mut self, at: usize, len: usize, sequence: Sequence, upcasted: Option<AlignedVec<ALIGN>>) {
        if let Some(upcasted) = upcasted {
            self.upcasted.insert(self.places.len(), upcasted);
        }
        self.places.push(Place { at, len, sequence });
    }

    fn segment(&self) -> &BatchSegment {
        self.segment.as_ref().expect("a batch with events has a segment")
    }

    /// Returns the metadata of an event.
    #[inline]
    pub(super) fn meta(&self, index: usize) -> Meta {
        let (segment, place) = (self.segment(), self.places[index]);
        let head = segment.memory.read(place.at, RECORD_HEADER_BYTES).expect("the header of a record read before");
        RecordHeader::decode(head).meta(segment.shard, Offset(segment.base + place.at as u64), place.sequence)
    }

    /// Returns an event. `E` must be the event type of the store.
    ///
    /// # Panics
    /// If an earlier process wrote the event and its bytes have been damaged since they were read.
    #[inline]
    pub(super) fn event<E: Event>(&self, index: usize) -> &E::Archived {
        let (segment, place) = (self.segment(), self.places[index]);
        let event = if self.upcasted.is_empty() || !self.upcasted.contains_key(&index) {
            segment.memory.archived::<E>(place.at + RECORD_HEADER_BYTES, place.len - RECORD_HEADER_BYTES)
        } else {
            E::access(&self.upcasted[&index]).ok()
        };
        event.expect("an archive that was valid when it was read")
    }

    #[inline]
    pub(super) fn record<E: Event>(&self, index: usize) -> Record<'_, E> {
        Record { meta: self.meta(index), event: self.event::<E>(index) }
    }
}
