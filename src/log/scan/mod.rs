//! Reads a store from outside its engine: from another process, even while the engine writes the store, and even on a
//! read-only file system. Takes no lock and changes no byte.
//!
//! One writer: the engine, usually in another process. The engine stores a zero length word after a record before it
//! stores the record's own length word, so a nonzero length word means a complete record. The reader must handle two
//! more cases:
//!
//! - The reader's buffer may be older than the file. So the reader accepts an end of the log only after a second read,
//!   made after reading the next segment.
//! - Between two reads, the file may have been retired and written again. The file keeps its inode, so an open
//!   descriptor shows the new content too. So the reader accepts an end, a tail, damage or a missing file only if
//!   afterwards the span still contains the segment and the file still has the segment's header. A segment leaves the
//!   span before its file is changed, and its header is overwritten before its records.
//!
//! ```no_run
//! use corelane::log::scan::Store;
//! use corelane::ShardId;
//!
//! let store = Store::open("data")?;
//! let mut records = store.records(ShardId(0));
//! while let Some(record) = records.next()? {
//!     println!("{} {} {}", record.meta.id(), record.meta.key, record.body.len());
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod lookup;
mod records;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{FileType, Stat};

use crate::error::{OpenError, ReadError};
use crate::event::{EventTypeId, Key, Offset, PlacementId, Sequence, ShardId, Time};
use crate::log::format::{HEADER_BYTES, HeaderError, SegmentHeader};
use crate::log::manifest::{MANIFEST, Manifest, Span, StoredType, segment_index, segment_name, shard_dir};
use crate::storage::{Files, Storage as _};

pub use lookup::{Lookup, RecordPosition};
pub use records::{MissedEvents, Records, ScannedRecord, Tail};

/// The folder in which recovery keeps the tails that it cut off.
const QUARANTINE: &str = "quarantine";
/// The number of reads after which invalid bytes count as damage. A read of a file that is being written can be torn.
/// The write takes nanoseconds, so a second read nearly always succeeds.
const LOOKS_MAX: u32 = 5;
const LOOK_AGAIN: Duration = Duration::from_millis(1);
/// The largest number of missing segments that are listed.
const MISSING_MAX: usize = 1000;

/// A store, read from outside its engine. This remains the store that was opened, even if its folder is renamed or
/// replaced.
#[derive(Debug, Clone)]
pub struct Store {
    files: Arc<Files>,
    manifest: Manifest,
}

/// An event type that the store knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct TypeInfo<'a> {
    /// The id.
    pub id: EventTypeId,
    /// The newest schema version.
    pub schema_version: u16,
    /// The name.
    pub name: &'a str,
}

impl Store {
    /// Opens the store in `dir`. An engine may have it open, and it may be read-only.
    ///
    /// # Errors
    /// Returns `Io` if there is no manifest, and `UnknownFormat`, `ArchiveFormat` or `ForeignFile` if the manifest, or
    /// the span of a shard, does not have this build's format.
    pub fn open(dir: impl Into<PathBuf>) -> Result<Self, OpenError> {
        let dir = dir.into();
        let nothing = |path: &Path| OpenError::Io {
            action: "reading",
            path: path.join(MANIFEST),
            source: std::io::Error::new(ErrorKind::NotFound, "there is no store here, or its manifest is missing"),
        };
        let files = match Files::open(&dir) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Err(nothing(&dir)),
            files => files.map_err(|source| OpenError::Io { action: "opening", path: dir, source })?,
        };
        let manifest = Manifest::load(&files, files.root())?.ok_or_else(|| nothing(files.root()))?;
        let store = Self { files: Arc::new(files), manifest };
        for shard in store.shard_ids() {
            let shard_dir = store.shard_dir(shard);
            // As for the engine, a missing folder is not an empty shard.
            store.files.list(&shard_dir).map_err(|source| OpenError::Io {
                action: "listing",
                path: shard_dir.clone(),
                source,
            })?;
            store.span(shard)?;
        }
        Ok(store)
    }

    /// Returns the absolute path that the store had when it was opened.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.files.root()
    }

    pub(crate) fn files(&self) -> &Arc<Files> {
        &self.files
    }

    /// Returns the number of shards.
    #[must_use]
    pub fn shards(&self) -> u16 {
        self.manifest.shards
    }

    /// Returns the placement of keys, or `None` if each key's own hash chooses its shard. The function itself is in the
    /// application: nothing outside it can tell which shard a key belongs to.
    #[must_use]
    pub fn placement(&self) -> Option<&PlacementId> {
        self.manifest.placement.as_ref()
    }

    /// Returns the shards that may hold `key`: one, or all if the store has a placement.
    #[must_use]
    pub fn shards_of(&self, key: Key) -> Vec<ShardId> {
        self.shard_ids().filter(|shard| self.may_hold(*shard, key)).collect()
    }

    /// Returns `false` if `key` belongs to another shard.
    pub(crate) fn may_hold(&self, shard: ShardId, key: Key) -> bool {
        self.manifest.placement.is_some() || key.shard(self.manifest.shards) == shard
    }

    /// Returns the ids of all shards.
    pub fn shard_ids(&self) -> impl Iterator<Item = ShardId> + use<> {
        (0..self.manifest.shards).map(ShardId)
    }

    /// Returns the size of a segment in bytes.
    #[must_use]
    pub fn segment_bytes(&self) -> u64 {
        self.manifest.segment_bytes
    }

    /// Returns the event types that programs have declared to the store.
    pub fn event_types(&self) -> impl Iterator<Item = TypeInfo<'_>> {
        let types = &self.manifest.types;
        let is_newest = |t: &&StoredType| !types.iter().any(|o| o.id == t.id && o.schema_version > t.schema_version);
        types.iter().filter(is_newest).map(|t| TypeInfo { id: t.id, schema_version: t.schema_version, name: &t.name })
    }

    /// Returns the name of an event type, or `None` if the store does not know it.
    #[must_use]
    pub fn type_name(&self, id: EventTypeId) -> Option<&str> {
        self.manifest.types.iter().find(|t| t.id == id).map(|t| t.name.as_str())
    }

    /// Returns the folder of a shard.
    #[must_use]
    pub fn shard_dir(&self, shard: ShardId) -> PathBuf {
        shard_dir(self.dir(), shard)
    }

    /// Lists the current files of a shard. A damaged segment is an entry of the list, not an error. At most 1,000
    /// missing segments are listed.
    ///
    /// # Errors
    /// Returns the error of the file system, or that of a damaged span.
    pub fn shard(&self, shard: ShardId) -> Result<ShardFiles, OpenError> {
        let dir = self.shard_dir(shard);
        let span = self.span(shard)?;
        let mut files = ShardFiles {
            shard,
            span: span.map(|span| (span.first, span.last)),
            segments: Vec::new(),
            others: Vec::new(),
        };
        let listed = match self.list(&dir) {
            Err(error) if error.kind() == ErrorKind::NotFound && span.is_none() => return Ok(files),
            listed => listed.map_err(|source| OpenError::Io { action: "listing", path: dir.clone(), source })?,
        };
        for file in listed {
            match segment_index(&file.name)
                .filter(|index| span.is_some_and(|span| (span.first..=span.last).contains(index)))
            {
                Some(index) => {
                    let state = self.segment_state(shard, index)?;
                    files.segments.push(SegmentInfo { index, state, file });
                }
                None => files.others.push(file),
            }
        }
        if let Some((first, last)) = files.span {
            let mut missing = Vec::new();
            let mut next = first;
            for index in files.segments.iter().map(|segment| segment.index).chain([last + 1]) {
                // A damaged span can name any number of segments; listing the first ones suffices.
                missing.extend((next..index).take(MISSING_MAX - missing.len()));
                next = index + 1;
            }
            let missing = missing.into_iter().map(|index| SegmentInfo {
                index,
                state: SegmentState::Missing,
                file: FileInfo { name: segment_name(index), bytes: 0, allocated_bytes: 0 },
            });
            files.segments.extend(missing);
            files.segments.sort_by_key(|segment| segment.index);
            // Retention may have freed the first segments during the listing; these no longer belong to the log.
            if let Some(now) = self.span(shard)?.filter(|now| now.first > first) {
                files.segments.retain(|segment| segment.index >= now.first);
                files.span = Some((now.first, if now.first > last { now.last } else { last }));
            }
        }
        Ok(files)
    }

    /// Returns a reader of one shard's records, from the earliest.
    #[must_use]
    pub fn records(&self, shard: ShardId) -> Records {
        Records::new(self, shard)
    }

    /// Returns the end of a shard's last segment, written or not: a limit for reading a log that grows.
    ///
    /// # Errors
    /// Returns the error of the file system, or that of a damaged span.
    pub fn horizon(&self, shard: ShardId) -> Result<Offset, OpenError> {
        let span = self.span(shard)?;
        Ok(Offset(span.map_or(0, |span| span.last + 1).saturating_mul(self.segment_bytes())))
    }

    /// Returns a reader of single records with known positions.
    #[must_use]
    pub fn lookup(&self) -> Lookup {
        Lookup::new(self)
    }

    /// Lists the torn tails that recovery cut off and kept.
    ///
    /// # Errors
    /// Returns the error of the file system.
    pub fn quarantine(&self) -> Result<Vec<FileInfo>, OpenError> {
        let path = self.dir().join(QUARANTINE);
        match self.list(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
            listed => listed.map_err(|source| OpenError::Io { action: "listing", path, source }),
        }
    }

    /// Lists the files in a folder, sorted by name.
    fn list(&self, dir: &Path) -> io::Result<Vec<FileInfo>> {
        let mut files = self.files.list_with_stat(dir)?;
        files.retain(|(_, stat)| FileType::from_raw_mode(stat.st_mode).is_file());
        // POSIX counts blocks of 512 bytes, regardless of the file system's block size.
        let info = |(name, stat): (String, Stat)| FileInfo {
            name,
            bytes: stat.st_size as u64,
            allocated_bytes: stat.st_blocks as u64 * 512,
        };
        Ok(files.into_iter().map(info).collect())
    }

    pub(crate) fn span(&self, shard: ShardId) -> Result<Option<Span>, OpenError> {
        Span::load(&*self.files, &self.shard_dir(shard), self.manifest.segment_bytes)
    }

    /// Returns the indices of the segments between `first` and `last` that have files, ascending.
    fn segments_within(&self, shard: ShardId, first: u64, last: u64) -> Result<Vec<u64>, ReadError> {
        let dir = self.shard_dir(shard);
        let listed = self.files.list(&dir).map_err(|source| ReadError::Io { action: "listing", path: dir, source })?;
        let mut indices: Vec<u64> = listed.iter().filter_map(|name| segment_index(name)).collect();
        indices.retain(|index| (first..=last).contains(index));
        indices.sort_unstable();
        Ok(indices)
    }

    /// Returns the header of segment `index` and its first `bytes` bytes, or `None` if the file is shorter or has no
    /// valid header.
    pub(crate) fn beginning(
        &self,
        shard: ShardId,
        index: u64,
        bytes: usize,
    ) -> Result<Option<(SegmentHeader, Vec<u8>)>, OpenError> {
        let path = self.shard_dir(shard).join(segment_name(index));
        let io = |source| OpenError::Io { action: "reading", path: path.clone(), source };
        let file = match self.files.open_file(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            file => file.map_err(io)?,
        };
        if file.metadata().map_err(io)?.len() < bytes as u64 {
            return Ok(None);
        }
        // Read before the header: when a file is written again, its header is overwritten first.
        let mut content = vec![0; bytes];
        if read_up_to(&file, &mut content, 0).map_err(io)? < bytes {
            return Ok(None);
        }
        Ok(self.header(&file, shard, index).map_err(io)?.ok().map(|header| (header, content)))
    }

    pub(crate) fn store_id(&self) -> u64 {
        self.manifest.store_id
    }

    pub(crate) fn segment_state(&self, shard: ShardId, index: u64) -> Result<SegmentState, OpenError> {
        let path = self.shard_dir(shard).join(segment_name(index));
        let io = |source| OpenError::Io { action: "reading", path: path.clone(), source };
        let file = match self.files.open_file(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(SegmentState::Missing),
            Err(error) => return Err(io(error)),
        };
        let bytes = file.metadata().map_err(io)?.len();
        Ok(match self.header(&file, shard, index).map_err(io)? {
            Ok(_) if bytes != self.segment_bytes() => {
                SegmentState::Damaged("the file does not have the length of a segment")
            }
            Ok(header) => SegmentState::Used {
                first_offset: header.first_offset(),
                first_sequence: Sequence(header.first_sequence),
                created: header.created,
                schema: header.schema,
            },
            Err(Unusable::Blank) => SegmentState::Blank,
            Err(Unusable::Damaged(why)) => SegmentState::Damaged(why),
        })
    }

    /// Reads the header of segment `index`.
    fn header(&self, file: &File, shard: ShardId, index: u64) -> io::Result<Result<SegmentHeader, Unusable>> {
        let mut page = [0; HEADER_BYTES + 4];
        let mut looks = 0;
        loop {
            let read = read_up_to(file, &mut page, 0)?;
            let seen = self.expected_header(&page[..read], shard, index);
            looks += 1;
            if !matches!(seen, Err(Unusable::Damaged(_))) || looks == LOOKS_MAX {
                return Ok(seen);
            }
            std::thread::sleep(LOOK_AGAIN);
        }
    }

    fn expected_header(&self, page: &[u8], shard: ShardId, index: u64) -> Result<SegmentHeader, Unusable> {
        let header = SegmentHeader::decode(page).map_err(|error| match error {
            HeaderError::Blank => Unusable::Blank,
            HeaderError::Version(_) => {
                Unusable::Damaged("the segment has a format version that this build does not know")
            }
            HeaderError::Archive(_) => Unusable::Damaged("the segment was written with another archive format"),
            HeaderError::Damaged(why) => Unusable::Damaged(why),
        })?;
        if header.index != index {
            return Err(Unusable::Damaged("the header belongs to another segment"));
        }
        if header.shard != shard {
            return Err(Unusable::Damaged("the header belongs to another shard"));
        }
        if header.segment_bytes != self.segment_bytes() {
            return Err(Unusable::Damaged("the header states a different segment size"));
        }
        Ok(header)
    }
}

/// The reason why a file holds no records of its segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Unusable {
    Blank,
    Damaged(&'static str),
}

/// The files of one shard.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ShardFiles {
    /// The shard.
    pub shard: ShardId,
    /// The first and the last segment that must exist; `None` if nothing was ever written.
    pub span: Option<(u64, u64)>,
    /// The segments of the span, in order.
    pub segments: Vec<SegmentInfo>,
    /// All other files in the folder: spares (`spare-…`), surplus segments, small files.
    pub others: Vec<FileInfo>,
}

/// One segment of a shard.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct SegmentInfo {
    /// The number of the segment.
    pub index: u64,
    /// The state of its file.
    pub state: SegmentState,
    /// Its file.
    pub file: FileInfo,
}

/// The state of a segment's file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum SegmentState {
    /// The file holds records or is about to.
    Used {
        /// The offset of the first record.
        first_offset: Offset,
        /// The sequence of its first event.
        first_sequence: Sequence,
        /// The time at which the segment was begun.
        created: Time,
        /// The fingerprint of the event types of the program that began the segment.
        schema: u32,
    },
    /// The file is prepared, but not yet written.
    Blank,
    /// The header is invalid, for this reason.
    Damaged(&'static str),
    /// The segment is in the span, but has no file.
    Missing,
}

/// A file of a store.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct FileInfo {
    /// The name of the file in its folder.
    pub name: String,
    /// The length in bytes.
    pub bytes: u64,
    /// The bytes allocated on the disk.
    pub allocated_bytes: u64,
}

/// Fills as much of `buffer` as the file has from `at` on. Returns the number of bytes read.
fn read_up_to(file: &File, buffer: &mut [u8], at: u64) -> io::Result<usize> {
    let mut read = 0;
    while read < buffer.len() {
        match file.read_at(&mut buffer[read..], at + read as u64) {
            Ok(0) => break,
            Ok(bytes) => read += bytes,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(read)
}

fn io_error(path: &Path, source: io::Error) -> ReadError {
    ReadError::Io { action: "reading", path: path.to_owned(), source }
}
