//! Reads single records with known positions.

use std::collections::HashMap;
use std::fs::File;
use std::io::ErrorKind;

use rkyv::util::AlignedVec;

use super::records::ScannedRecord;
use super::{Store, io_error, read_up_to};
use crate::error::ReadError;
use crate::event::{Offset, Sequence, ShardId, Time};
use crate::log::format::{HEADER_BYTES, RECORD_HEADER_BYTES, RecordAt, RecordHeader, SegmentHeader, record_at};
use crate::log::manifest::segment_name;
use crate::storage::framed::u32_at;
use crate::storage::memory::{ALIGN, padded};

/// The position of a record, with everything needed to read that record alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct RecordPosition {
    /// The time of the event.
    pub time: Time,
    /// The shard.
    pub shard: ShardId,
    /// The offset of the record.
    pub offset: Offset,
    /// The number of the event in its shard. (The log does not store it with the record.)
    pub sequence: Sequence,
    /// The length of the record in bytes, without its padding.
    pub record_bytes: u32,
}

const _: () = assert!(size_of::<RecordPosition>() == 32, "an index holds one per event");

/// Reads single records by their [`RecordPosition`]. Reading is cheapest if the positions ascend.
#[derive(Debug)]
pub struct Lookup {
    store: Store,
    open: HashMap<(ShardId, u64), (File, SegmentHeader)>,
    window: AlignedVec<16>,
    /// The shard, the segment and the position of the window's first byte.
    window_at: Option<(ShardId, u64, usize)>,
}

impl Lookup {
    /// The number of bytes read at once while positions ascend in short steps.
    const WINDOW_BYTES: usize = 256 << 10;
    /// The largest number of open files.
    const OPEN_MAX: usize = 256;

    pub(super) fn new(store: &Store) -> Self {
        Self { store: store.clone(), open: HashMap::new(), window: AlignedVec::new(), window_at: None }
    }

    /// Reads the record at `place`.
    ///
    /// # Errors
    /// Returns `BeyondRetention` if the record has been freed, `NotARecord` if there is no such record or it is
    /// damaged, or `Io`. A later call reads the file again.
    pub fn get(&mut self, place: &RecordPosition) -> Result<ScannedRecord<'_>, ReadError> {
        let segment_bytes = self.store.segment_bytes();
        let (index, at) = (place.offset.get() / segment_bytes, (place.offset.get() % segment_bytes) as usize);
        let len = place.record_bytes as usize;
        let end = at + padded(len);
        if at % ALIGN != 0 || at < HEADER_BYTES || len < RECORD_HEADER_BYTES || end as u64 > segment_bytes {
            return Err(ReadError::NotARecord { shard: place.shard, offset: place.offset });
        }
        let salt = match self.salt(place.shard, index)? {
            Some(salt) => salt,
            None => return Err(self.gone(place)),
        };
        let start = match self.window_at {
            Some((shard, segment, from))
                if (shard, segment) == (place.shard, index) && from <= at && end <= from + self.window.len() =>
            {
                at - from
            }
            _ => {
                self.move_window(place.shard, index, at, end)?;
                0
            }
        };
        let tail = self.window.get(start..start + padded(len)).unwrap_or_default();
        if record_at(tail, salt) != RecordAt::Record(len) {
            return Err(self.gone(place));
        }
        let header = RecordHeader::decode(tail);
        let body = &self.window[start + RECORD_HEADER_BYTES..start + len];
        Ok(ScannedRecord { meta: header.meta(place.shard, place.offset, place.sequence), body })
    }

    /// Returns the length and the CRC word of the record at `offset`.
    pub(crate) fn check_word(&mut self, shard: ShardId, offset: Offset) -> Result<(usize, u32), ReadError> {
        let place = |record_bytes| RecordPosition { time: Time(0), shard, offset, sequence: Sequence(0), record_bytes };
        let (index, at) = (offset.get() / self.store.segment_bytes(), offset.get() % self.store.segment_bytes());
        let mut head = [0; 8];
        if self.salt(shard, index)?.is_some()
            && let Some((file, _)) = self.open.get(&(shard, index))
        {
            let path = || self.store.shard_dir(shard).join(segment_name(index));
            read_up_to(file, &mut head, at).map_err(|source| io_error(&path(), source))?;
        }
        let (len, word) = (u32_at(&head, 0), u32_at(&head, 4));
        self.get(&place(len)).map(|_| (len as usize, word))
    }

    fn move_window(&mut self, shard: ShardId, index: u64, at: usize, end: usize) -> Result<(), ReadError> {
        // A short step forward suggests that more will follow, so it reads a whole window. A longer jump reads only the
        // record.
        let near = self.window_at.is_some_and(|(was_shard, was_index, from)| {
            (was_shard, was_index) == (shard, index)
                && from <= at
                && at <= from + self.window.len() + Self::WINDOW_BYTES
        });
        let room = self.store.segment_bytes() as usize - at;
        let wanted = if near { Self::WINDOW_BYTES.max(end - at).min(room) } else { end - at };
        // The window is invalid until it has been read.
        self.window_at = None;
        self.window.resize(wanted, 0);
        let Some((file, _)) = self.open.get(&(shard, index)) else { return Ok(()) };
        let read = read_up_to(file, &mut self.window, at as u64)
            .map_err(|source| io_error(&self.store.shard_dir(shard).join(segment_name(index)), source))?;
        self.window.resize(read, 0);
        self.window_at = Some((shard, index, at));
        Ok(())
    }

    fn salt(&mut self, shard: ShardId, index: u64) -> Result<Option<u32>, ReadError> {
        if let Some((_, header)) = self.open.get(&(shard, index)) {
            return Ok(Some(header.salt));
        }
        let path = self.store.shard_dir(shard).join(segment_name(index));
        let file = match self.store.files.open_file(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(io_error(&path, source)),
        };
        let Ok(header) = self.store.header(&file, shard, index).map_err(|source| io_error(&path, source))? else {
            return Ok(None);
        };
        if self.open.len() >= Self::OPEN_MAX {
            self.open.clear();
        }
        self.open.insert((shard, index), (file, header));
        Ok(Some(header.salt))
    }

    fn gone(&mut self, place: &RecordPosition) -> ReadError {
        // The file may have been written again since it was opened; the next call opens it again.
        self.window_at = None;
        let shard = place.shard;
        self.open.remove(&(shard, place.offset.get() / self.store.segment_bytes()));
        // Checked after the read: a segment leaves the span before its file is written again.
        match self.store.span(shard) {
            Ok(Some(span)) if place.offset.get() / self.store.segment_bytes() < span.first => {
                let earliest = Offset(span.first * self.store.segment_bytes() + HEADER_BYTES as u64);
                ReadError::BeyondRetention { shard, asked: place.offset, earliest }
            }
            _ => ReadError::NotARecord { shard, offset: place.offset },
        }
    }
}
