//! Reads a store from outside its engine: another process, also while the store is written, also
//! where nothing may be written. Takes no lock and changes no byte.
//!
//! One writer: the engine, elsewhere. It stores a zero length word behind a record before it commits the record's own, so
//! a length word that is not zero means a whole record. What this reader must add: its buffer may be older than the
//! file, so an end is believed only after a second look, taken after the look at the next segment; and between any two looks the
//! file may have been retired and written again (it keeps its inode, so an open descriptor shows that too), so whatever a look
//! seems to say (an end, a tail, damage, a missing file) counts only if afterwards the span still has the segment and the file its
//! header. A segment leaves the span before its file is touched, and its header goes before its records.
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
use crate::event::{EventTypeId, Offset, Sequence, ShardId, Time};
use crate::log::format::{HEADER_BYTES, HeaderError, SegmentHeader};
use crate::log::manifest::{MANIFEST, Manifest, Span, StoredType, segment_index, segment_name, shard_dir};
use crate::storage::{Files, Storage as _};

pub use lookup::{Lookup, RecordPosition};
pub use records::{MissedEvents, Records, ScannedRecord, Tail};

/// Where recovery keeps what it cut.
const QUARANTINE: &str = "quarantine";
/// Fresh looks at bytes that do not hold, before they count as damage. A look at a file that is being written can be
/// torn; the writer needs nanoseconds, so one more look nearly always settles it.
const LOOKS_MAX: u32 = 5;
const LOOK_AGAIN: Duration = Duration::from_millis(1);
/// How many missing segments are named at most.
const MISSING_MAX: usize = 1000;

/// A store, seen from outside. It stays the one that was opened, even if its folder is renamed or replaced.
#[derive(Debug, Clone)]
pub struct Store {
    files: Arc<Files>,
    manifest: Manifest,
}

/// An event type that the store has seen declared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TypeInfo<'a> {
    /// Its stable number.
    pub id: EventTypeId,
    /// The newest version of its layout.
    pub schema_version: u16,
    /// Its stable name.
    pub name: &'a str,
}

impl Store {
    /// Looks at the store in `dir`, which may be open elsewhere and may be read-only.
    ///
    /// # Errors
    /// `Io` where there is no manifest, `UnknownFormat`, `ArchiveFormat` and `ForeignFile` where it (or
    /// a shard's span) is not of this build's format.
    pub fn open(dir: impl Into<PathBuf>) -> Result<Self, OpenError> {
        let dir = dir.into();
        let nothing = |path: &Path| OpenError::Io {
            action: "reading",
            path: path.join(MANIFEST),
            source: std::io::Error::new(ErrorKind::NotFound, "no store is here, or its manifest is gone"),
        };
        let files = match Files::open(&dir) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Err(nothing(&dir)),
            files => files.map_err(|source| OpenError::Io { action: "opening", path: dir, source })?,
        };
        let manifest = Manifest::load(&files, files.root())?.ok_or_else(|| nothing(files.root()))?;
        let store = Self { files: Arc::new(files), manifest };
        for shard in store.shard_ids() {
            let shard_dir = store.shard_dir(shard);
            // As the engine does: a folder that is gone is no empty shard.
            store.files.list(&shard_dir).map_err(|source| OpenError::Io {
                action: "listing",
                path: shard_dir.clone(),
                source,
            })?;
            store.span(shard)?;
        }
        Ok(store)
    }

    /// Where the store lay when it was opened: an absolute path.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.files.root()
    }

    pub(crate) fn files(&self) -> &Arc<Files> {
        &self.files
    }

    /// The number of shards.
    #[must_use]
    pub fn shards(&self) -> u16 {
        self.manifest.shards
    }

    /// Every shard.
    pub fn shard_ids(&self) -> impl Iterator<Item = ShardId> + use<> {
        (0..self.manifest.shards).map(ShardId)
    }

    /// Bytes of one segment.
    #[must_use]
    pub fn segment_bytes(&self) -> u64 {
        self.manifest.segment_bytes
    }

    /// The event types that the store has seen declared.
    pub fn event_types(&self) -> impl Iterator<Item = TypeInfo<'_>> {
        let types = &self.manifest.types;
        let is_newest = |t: &&StoredType| !types.iter().any(|o| o.id == t.id && o.schema_version > t.schema_version);
        types.iter().filter(is_newest).map(|t| TypeInfo { id: t.id, schema_version: t.schema_version, name: &t.name })
    }

    /// The name of an event type, if the store knows it.
    #[must_use]
    pub fn type_name(&self, id: EventTypeId) -> Option<&str> {
        self.manifest.types.iter().find(|t| t.id == id).map(|t| t.name.as_str())
    }

    /// The folder of one shard.
    #[must_use]
    pub fn shard_dir(&self, shard: ShardId) -> PathBuf {
        shard_dir(self.dir(), shard)
    }

    /// The files of one shard as they are now.
    ///
    /// # Errors
    /// What the file system or a damaged span says. A damaged segment is an entry of the list, not an error; of missing ones the first
    /// thousand are.
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
                // Of as many as a damaged span can name, the first tell enough.
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
            // Looked at one after the other, while retention may free the first of them: those are no part of the log any more.
            if let Some(now) = self.span(shard)?.filter(|now| now.first > first) {
                files.segments.retain(|segment| segment.index >= now.first);
                files.span = Some((now.first, if now.first > last { now.last } else { last }));
            }
        }
        Ok(files)
    }

    /// The records of one shard, from the earliest.
    #[must_use]
    pub fn records(&self, shard: ShardId) -> Records {
        Records::new(self, shard)
    }

    /// The end of a shard's last segment, written or not: an end for reading a log that grows.
    ///
    /// # Errors
    /// What the file system or a damaged span says.
    pub fn horizon(&self, shard: ShardId) -> Result<Offset, OpenError> {
        let span = self.span(shard)?;
        Ok(Offset(span.map_or(0, |span| span.last + 1).saturating_mul(self.segment_bytes())))
    }

    /// Reads single records whose places are known.
    #[must_use]
    pub fn lookup(&self) -> Lookup {
        Lookup::new(self)
    }

    /// Tails that recovery found torn, cut off and kept.
    ///
    /// # Errors
    /// What the file system says.
    pub fn quarantine(&self) -> Result<Vec<FileInfo>, OpenError> {
        let path = self.dir().join(QUARANTINE);
        match self.list(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
            listed => listed.map_err(|source| OpenError::Io { action: "listing", path, source }),
        }
    }

    /// Every file in a folder, sorted by name.
    fn list(&self, dir: &Path) -> io::Result<Vec<FileInfo>> {
        let mut files = self.files.list_with_stat(dir)?;
        files.retain(|(_, stat)| FileType::from_raw_mode(stat.st_mode).is_file());
        // POSIX counts blocks of 512 bytes, whatever the file system's own are.
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

    /// The numbers of the segments that have files, from `first` to `last`, rising.
    fn segments_within(&self, shard: ShardId, first: u64, last: u64) -> Result<Vec<u64>, ReadError> {
        let dir = self.shard_dir(shard);
        let listed = self.files.list(&dir).map_err(|source| ReadError::Io { action: "listing", path: dir, source })?;
        let mut indices: Vec<u64> = listed.iter().filter_map(|name| segment_index(name)).collect();
        indices.retain(|index| (first..=last).contains(index));
        indices.sort_unstable();
        Ok(indices)
    }

    /// The header of segment `index` and its first `bytes` bytes, if so much of it is there and it is no blank one.
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
        // Before its header: of a file that is written again meanwhile, that goes first.
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
            Ok(_) if bytes != self.segment_bytes() => SegmentState::Damaged("the file is not as long as a segment is"),
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

    /// The header of segment `index`, if that is what the file holds.
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
            HeaderError::Version(_) => Unusable::Damaged("the segment is of a format version this build does not know"),
            HeaderError::Archive(_) => Unusable::Damaged("the segment was written with another archive format"),
            HeaderError::Damaged(why) => Unusable::Damaged(why),
        })?;
        if header.index != index {
            return Err(Unusable::Damaged("the segment's header is that of another segment"));
        }
        if header.shard != shard {
            return Err(Unusable::Damaged("the segment's header is that of another shard"));
        }
        if header.segment_bytes != self.segment_bytes() {
            return Err(Unusable::Damaged("the segment's header tells another segment size"));
        }
        Ok(header)
    }
}

/// Why a file holds no records of its segment.
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
    /// First and last of the segments that must exist; `None` where nothing was ever written.
    pub span: Option<(u64, u64)>,
    /// The segments of the span, in order.
    pub segments: Vec<SegmentInfo>,
    /// Everything else in the folder: spares (`spare-…`), surplus segments, small files.
    pub others: Vec<FileInfo>,
}

/// One segment of a shard.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct SegmentInfo {
    /// Its number.
    pub index: u64,
    /// What it is.
    pub state: SegmentState,
    /// Its file.
    pub file: FileInfo,
}

/// What a segment's file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum SegmentState {
    /// It holds records, or is about to.
    Used {
        /// Where its first record begins.
        first_offset: Offset,
        /// The sequence of its first event.
        first_sequence: Sequence,
        /// When it was begun.
        created: Time,
        /// Fingerprint of the event types of the program that began it.
        schema: u32,
    },
    /// Prepared, and not yet written.
    Blank,
    /// Its header does not hold.
    Damaged(&'static str),
    /// In the span, but not there.
    Missing,
}

/// A file of a store.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct FileInfo {
    /// Its name in its folder.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// What it takes on the disk.
    pub allocated_bytes: u64,
}

/// Fills as much of `buffer` as the file has from `at` on.
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
