//! The segment files of a shard's folder: which of them are the log, and their headers.

use std::io::ErrorKind;
use std::iter::repeat;
use std::path::PathBuf;

use crate::error::OpenError;
use crate::log::format::{
    HEADER_BYTES, HeaderError, LOST_MAGIC, OFFSETS_END, RECORD_HEADER_BYTES, SegmentHeader, archive_fingerprint,
};
use crate::log::manifest::{SPAN, Span, segment_index, spare_number};
use crate::recovery::opening::Opening;
use crate::storage::framed::FORMAT_VERSION;
use crate::storage::memory::Memory;

/// The names of segments and spares in a shard's folder.
#[derive(Debug, Default)]
pub(super) struct SegmentNames {
    pub(super) segments: Vec<u64>,
    pub(super) spares: Vec<PathBuf>,
}

/// A mapped segment of the span.
pub(super) struct OpenedSegment {
    pub(super) index: u64,
    pub(super) memory: Memory,
    /// `None` if the segment was never begun, or its header has lost its magic.
    pub(super) header: Option<SegmentHeader>,
}

/// All segments of the span.
pub(super) struct OpenedSpan {
    pub(super) segments: Vec<OpenedSegment>,
    /// The first segment whose header has lost its magic.
    pub(super) lost_header: Option<u64>,
}

impl Opening<'_> {
    pub(super) fn names(&self) -> Result<SegmentNames, OpenError> {
        let io = |source| OpenError::Io { action: "listing", path: self.dir.to_owned(), source };
        let mut names = SegmentNames::default();
        for name in self.storage.list(self.dir).map_err(io)? {
            let foreign = |why| OpenError::ForeignFile { path: self.dir.join(&name), why };
            if let Some(index) = segment_index(&name) {
                if index >= OFFSETS_END / self.manifest.segment_bytes {
                    return Err(foreign("a segment beyond the last offset"));
                }
                names.segments.push(index);
            } else if spare_number(&name).is_some() {
                names.spares.push(self.dir.join(name));
            } else if name.ends_with(".seg") {
                return Err(foreign("not the name of a segment"));
            }
        }
        Ok(names)
    }

    /// Loads the span of the segments that are the log; `None` if no segment was ever begun.
    pub(super) fn span(&self, names: &SegmentNames) -> Result<Option<Span>, OpenError> {
        match Span::load(&**self.storage, self.dir, self.manifest.segment_bytes)? {
            Some(span) => Ok(Some(span)),
            // The first segment may have been prepared before the span is saved for the first time.
            None if self.all_blank(&names.segments)? => Ok(None),
            None => Err(OpenError::ForeignFile {
                path: self.dir.join(SPAN),
                why: "there are segments, but the span file that names them is missing",
            }),
        }
    }

    fn all_blank(&self, indices: &[u64]) -> Result<bool, OpenError> {
        for &index in indices {
            if self.header(index, &self.open(index)?)?.is_some() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Checks that every segment of the span has a file. Returns the files outside the span, which were freed before a
    /// crash, or prepared and not yet added to the span. Such files are written again, never read.
    pub(super) fn surplus(&self, names: &SegmentNames, span: Span) -> Result<Vec<PathBuf>, OpenError> {
        let (held, surplus): (Vec<u64>, Vec<u64>) =
            names.segments.iter().partition(|&&index| (span.first..=span.last).contains(&index));
        let mut pairs = (span.first..=span.last).zip(held.into_iter().chain(repeat(u64::MAX)));
        if let Some((missing, _)) = pairs.find(|(wanted, held)| wanted != held) {
            return Err(self.corruption(missing, 0, "a segment is missing").into());
        }
        for &index in surplus.iter().filter(|&&index| index > span.last) {
            // The span is saved before the shard gets a segment, so a segment beyond it was never begun.
            if self.header(index, &self.open(index)?)?.is_some() {
                return Err(OpenError::ForeignFile {
                    path: self.path(index),
                    why: "a segment in use is beyond the span: the span is older than the log",
                });
            }
        }
        Ok(surplus.into_iter().map(|index| self.path(index)).collect())
    }

    /// Maps the segments of the span and reads their headers.
    pub(super) fn open_span(&self, span: Span) -> Result<OpenedSpan, OpenError> {
        let (mut segments, mut lost_header) = (Vec::new(), None);
        for index in span.first..=span.last {
            let memory = self.open(index)?;
            let header = match self.header(index, &memory) {
                // Only the log before it shows whether this segment was ever begun.
                Err(OpenError::Corruption(damage)) if damage.why == LOST_MAGIC => {
                    lost_header.get_or_insert(index);
                    None
                }
                header => header?,
            };
            if let (Some(lost), Some(_)) = (lost_header, header) {
                return Err(self.corruption(lost, 0, LOST_MAGIC).into());
            }
            segments.push(OpenedSegment { index, memory, header });
        }
        Ok(OpenedSpan { segments, lost_header })
    }

    /// Maps a segment and syncs it: after a kill of the process its newest bytes may be in the system's cache only, and
    /// they must not vanish once recovery has relied on them.
    fn open(&self, index: u64) -> Result<Memory, OpenError> {
        let io = |action| move |source| OpenError::Io { action, path: self.path(index), source };
        let memory = match self.storage.open_segment(&self.path(index), true) {
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
                return Err(self.corruption(index, 0, "the segment is empty").into());
            }
            opened => opened.map_err(io("opening"))?,
        };
        self.storage.sync(&memory, 0..memory.len()).map_err(io("syncing"))?;
        if memory.len() as u64 != self.manifest.segment_bytes {
            return Err(self
                .corruption(index, memory.len(), "the segment's length is not the one in the manifest")
                .into());
        }
        Ok(memory)
    }

    /// Decodes a segment's header; `None` if the segment was prepared and never begun.
    fn header(&self, index: u64, memory: &Memory) -> Result<Option<SegmentHeader>, OpenError> {
        let page = memory.read(0, (HEADER_BYTES + 4).min(memory.len())).unwrap_or_default();
        let path = || self.path(index);
        let header = match SegmentHeader::decode(page) {
            Ok(header) => header,
            Err(HeaderError::Blank) => return Ok(None),
            Err(HeaderError::Version(found)) => {
                return Err(OpenError::UnknownFormat { path: path(), found, known: FORMAT_VERSION });
            }
            Err(HeaderError::Archive(found)) => {
                return Err(OpenError::ArchiveFormat { path: path(), found, known: archive_fingerprint() });
            }
            Err(HeaderError::Damaged(why)) => return Err(self.corruption(index, 0, why).into()),
        };
        if header.shard != self.shard || header.index != index || header.segment_bytes != self.manifest.segment_bytes {
            return Err(OpenError::ForeignFile {
                path: path(),
                why: "the header names another shard, index or segment size",
            });
        }
        // No record is smaller than its header.
        if header.first_sequence > index.saturating_mul(self.manifest.segment_bytes) / RECORD_HEADER_BYTES as u64 {
            let why = "its first sequence is higher than the number of events that fit before it";
            return Err(self.corruption(index, 0, why).into());
        }
        Ok(Some(header))
    }
}
