//! Reads one event in place. An event of an older layout goes through its upcaster.

#[cfg(feature = "tokio")]
use std::sync::Arc;

use rkyv::util::AlignedVec;

use crate::event::{Event, EventTypeId, Schemas, Scratch, upcaster};
use crate::log::format::{RECORD_HEADER_BYTES, RecordHeader};
#[cfg(feature = "tokio")]
use crate::storage::Lock;
use crate::storage::memory::{ALIGN, Memory};

/// Reads events in place, and events of older layouts through their upcasters.
#[derive(Debug)]
pub(crate) struct Access {
    schemas: Schemas,
    upcasted: AlignedVec<ALIGN>,
    /// Allocated on first use.
    scratch: Option<Scratch>,
}

/// The sizes in bytes of the first and of the largest buffer for an upcasted event.
const UPCAST_BYTES_MIN: usize = 4 << 10;
const UPCAST_BYTES_MAX: usize = 16 << 20;
/// The smallest size of a page in bytes.
#[cfg(feature = "tokio")]
const PAGE_BYTES_MIN: usize = 4 << 10;

impl Access {
    pub(crate) fn new<E: Event>() -> Self {
        Self { schemas: Schemas::of::<E>(), upcasted: AlignedVec::new(), scratch: None }
    }

    /// Returns the event of the record at `at` with this exact length and header, or `None` if its archive is invalid.
    /// The caller must have verified the record's CRC, unless this process wrote the record.
    #[inline]
    pub(crate) fn event<'a, E: Event>(
        &'a mut self,
        memory: &'a Memory,
        at: usize,
        len: usize,
        header: &RecordHeader,
    ) -> Option<&'a E::Archived> {
        let (at, len) = (at + RECORD_HEADER_BYTES, len.checked_sub(RECORD_HEADER_BYTES)?);
        if self.is_current(header) {
            return memory.archived::<E>(at, len);
        }
        self.upcast::<E>(memory.read(at, len)?, header.event_type, header.schema_version)
    }

    /// Returns the event of an archive stored outside the log, or `None` if the archive is invalid. The caller must
    /// have verified its CRC.
    pub(crate) fn kept<'a, E: Event>(
        &'a mut self,
        archive: &'a [u8],
        event_type: EventTypeId,
        schema_version: u16,
    ) -> Option<&'a E::Archived> {
        if self.schemas.current(event_type) == Some(schema_version) {
            return E::access(archive).ok();
        }
        self.upcast::<E>(archive, event_type, schema_version)
    }

    /// Returns the archive of the event of an older layout, upcasted, or `None` if the event cannot be upcasted or has
    /// the current layout. The caller must have verified the record's CRC.
    #[cold]
    pub(crate) fn upcasted<E: Event>(&mut self, archive: &[u8], header: &RecordHeader) -> Option<AlignedVec<ALIGN>> {
        let len = self.encode_upcasted::<E>(archive, header.event_type, header.schema_version)?;
        let mut copy = AlignedVec::with_capacity(len);
        copy.extend_from_slice(&self.upcasted[..len]);
        E::access(&copy).is_ok().then_some(copy)
    }

    /// Returns `true` if the program declares this layout as the current one of its type.
    #[inline]
    pub(crate) fn is_current(&self, header: &RecordHeader) -> bool {
        self.schemas.current(header.event_type) == Some(header.schema_version)
    }

    #[cold]
    fn upcast<E: Event>(
        &mut self,
        archive: &[u8],
        event_type: EventTypeId,
        schema_version: u16,
    ) -> Option<&E::Archived> {
        let len = self.encode_upcasted::<E>(archive, event_type, schema_version)?;
        E::access(&self.upcasted[..len]).ok()
    }

    /// Writes the upcasted event into `self.upcasted`. Returns its length.
    fn encode_upcasted<E: Event>(
        &mut self,
        archive: &[u8],
        event_type: EventTypeId,
        schema_version: u16,
    ) -> Option<usize> {
        let event = (upcaster::<E>(event_type, schema_version)?.upcast)(archive).ok()?;
        let scratch = self.scratch.get_or_insert_with(|| Scratch::new(4 * UPCAST_BYTES_MAX.min(1 << 20)));
        let mut bytes = self.upcasted.len().max(UPCAST_BYTES_MIN);
        loop {
            self.upcasted.resize(bytes, 0);
            match event.encode(&mut self.upcasted, scratch) {
                Some(len) => return Some(len),
                None if bytes >= UPCAST_BYTES_MAX => return None,
                None => bytes *= 2,
            }
        }
    }
}

/// An event that stays readable while this value lives, on any thread. A clone shares the bytes.
#[cfg(feature = "tokio")]
#[derive(Debug, Clone)]
pub(crate) enum Held {
    /// In the log. The bytes that this process wrote are trusted, so no other process may write the store meanwhile.
    InLog { memory: Arc<Memory>, at: usize, len: usize, _lock: Arc<dyn Lock> },
    /// An archive of the current schema.
    Copy(Arc<AlignedVec<ALIGN>>),
}

#[cfg(feature = "tokio")]
impl Held {
    /// Returns the event. `E` must be the type that it was held as.
    pub(crate) fn event<E: Event>(&self) -> &E::Archived {
        let event = match self {
            Self::InLog { memory, at, len, .. } => memory.archived::<E>(*at, *len),
            Self::Copy(archive) => E::access(archive).ok(),
        };
        event.expect("the archive was valid when it was held, and its bytes do not change")
    }
}

#[cfg(feature = "tokio")]
impl Access {
    /// As [`Access::event`], for an event that must outlive this borrow of the log. Reads every page of the event, so
    /// that later reads do not wait for the disk.
    pub(crate) fn hold<E: Event>(
        &mut self,
        memory: &Arc<Memory>,
        at: usize,
        len: usize,
        header: &RecordHeader,
        lock: &Arc<dyn Lock>,
    ) -> Option<Held> {
        let (at, len) = (at + RECORD_HEADER_BYTES, len.checked_sub(RECORD_HEADER_BYTES)?);
        let archive = memory.read(at, len)?;
        if self.schemas.current(header.event_type) == Some(header.schema_version) {
            archive.iter().step_by(PAGE_BYTES_MIN).for_each(|byte| {
                std::hint::black_box(*byte);
            });
            memory.archived::<E>(at, len)?;
            return Some(Held::InLog { memory: Arc::clone(memory), at, len, _lock: Arc::clone(lock) });
        }
        self.hold_copy::<E>(archive, header.event_type, header.schema_version)
    }

    /// As [`Access::kept`], for an event that must outlive `archive`.
    pub(crate) fn hold_copy<E: Event>(
        &mut self,
        archive: &[u8],
        event_type: EventTypeId,
        schema_version: u16,
    ) -> Option<Held> {
        let mut copy = AlignedVec::new();
        if self.schemas.current(event_type) == Some(schema_version) {
            copy.extend_from_slice(archive);
        } else {
            let len = self.encode_upcasted::<E>(archive, event_type, schema_version)?;
            copy.extend_from_slice(&self.upcasted[..len]);
        }
        E::access(&copy).ok()?;
        Some(Held::Copy(Arc::new(copy)))
    }
}
