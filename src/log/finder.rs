//! Reads single records of a shard's log in place, by their offsets. Any thread may use a finder; it sees the log up to
//! `appended`.

use std::sync::Arc;

use crate::error::{Corruption, ReadError};
use crate::event::Offset;
use crate::log::format::{RECORD_HEADER_BYTES, RecordAt, RecordHeader, record_at};
use crate::log::segment::{Segment, ShardLog};
use crate::storage::Lock;
use crate::storage::framed::u32_at;
use crate::storage::memory::Memory;
use crate::storage::memory::padded;

/// Finds records by offset. Holds on to the segment of the last record found.
#[derive(Debug)]
pub(crate) struct Finder {
    log: Arc<ShardLog>,
    segment: Option<Segment>,
    /// The store's lock. A finder trusts the bytes that this process wrote, so no other process may write while the
    /// finder lives.
    #[cfg_attr(not(feature = "tokio"), expect(dead_code, reason = "held for its drop"))]
    lock: Arc<dyn Lock>,
}

/// A record in [`Finder::memory`]: its position, exact length and header.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RecordPlace {
    pub(crate) at: usize,
    pub(crate) len: usize,
    pub(crate) header: RecordHeader,
}

impl Finder {
    pub(crate) fn new(log: Arc<ShardLog>, lock: Arc<dyn Lock>) -> Self {
        Self { log, segment: None, lock }
    }

    pub(crate) fn log(&self) -> &Arc<ShardLog> {
        &self.log
    }

    /// Finds the record at `offset`, which must come from the log itself and lie below `appended`.
    #[inline]
    pub(crate) fn find(&mut self, offset: Offset) -> Result<RecordPlace, ReadError> {
        let index = self.log.segment_of(offset);
        if self.segment.as_ref().is_none_or(|segment| segment.index != index) {
            self.segment = self.log.segment(index);
        }
        let shard = self.log.shard;
        let Some(segment) = &self.segment else {
            return Err(ReadError::BeyondRetention { shard, asked: offset, earliest: self.log.earliest() });
        };
        let at = (offset.0 - index * self.log.segment_bytes) as usize;
        let not_a_record = || ReadError::NotARecord { shard, offset };
        let room = segment.memory.committed().checked_sub(at).filter(|&room| room >= RECORD_HEADER_BYTES);
        let tail = room.and_then(|room| segment.memory.read(at, room)).ok_or_else(not_a_record)?;
        let damaged = |why| Corruption { shard, segment: index, offset, why };
        let len = if segment.memory.is_own(at) {
            u32_at(tail, 0) as usize
        } else {
            match record_at(tail, segment.salt) {
                RecordAt::Record(len) => len,
                // The offset comes from the log itself, so a zero length word there is a hole.
                RecordAt::End => return Err(damaged("a record that the log refers to is missing").into()),
                RecordAt::Damaged(why) => return Err(damaged(why).into()),
            }
        };
        if len < RECORD_HEADER_BYTES || padded(len) > tail.len() {
            return Err(not_a_record());
        }
        Ok(RecordPlace { at, len, header: RecordHeader::decode(tail) })
    }

    /// Returns the CRC word of the last record found.
    pub(crate) fn check_word(&self, place: &RecordPlace) -> Option<u32> {
        self.memory()?.read(place.at, RECORD_HEADER_BYTES).map(|head| u32_at(head, 4))
    }

    /// Returns the memory that holds the last record found.
    pub(crate) fn memory(&self) -> Option<&Memory> {
        self.segment.as_ref().map(|segment| &*segment.memory)
    }

    /// Returns the memory that holds the last record found, and the store's lock, which must be kept with it.
    #[cfg(feature = "tokio")]
    pub(crate) fn shared_memory(&self) -> Option<(&Arc<Memory>, &Arc<dyn Lock>)> {
        self.segment.as_ref().map(|segment| (&segment.memory, &self.lock))
    }

    /// Returns the archive of the last record found.
    pub(crate) fn body(&self, place: &RecordPlace) -> &[u8] {
        let body = self
            .memory()
            .and_then(|memory| memory.read(place.at + RECORD_HEADER_BYTES, place.len - RECORD_HEADER_BYTES));
        body.unwrap_or_default()
    }

    pub(crate) fn corruption(&self, offset: Offset, why: &'static str) -> ReadError {
        Corruption { shard: self.log.shard, segment: self.log.segment_of(offset), offset, why }.into()
    }
}
