//! Checks a store's files from outside: finds everything that opening the store would refuse or report.
//!
//! A check takes no lock, changes no byte and may run beside a running engine. It reads the files with the decoders
//! that opening uses. [`crate::log::scan`] reads the log's records.

use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::error::{OpenError, ReadError};
use crate::event::{Offset, Sequence, ShardId, Version};
use crate::ingress::gated::{GateFiles, gates_dir};
use crate::log::format::{HEADER_BYTES, OFFSETS_END, is_record_offset};
use crate::log::manifest::spare_number;
use crate::log::manifest::{SPAN, is_folder_name, segment_index};
use crate::log::position::Position;
use crate::log::scan::{SegmentState, Store};
use crate::recovery::boundary::{Boundary, NoBoundary, walk_to};
use crate::recovery::load::is_of;
use crate::state::snapshot::format::{End, FILE_HEADER_BYTES, FileHeader, Kind, Unusable, entry_at};
use crate::state::snapshot::store::{file_number, whole};
use crate::storage::Storage;

/// Number of reads after which an invalid file counts as damaged: until then, a running engine may be writing it.
const LOOKS_MAX: u32 = 5;
/// The pause between two reads of one file.
const LOOK_AGAIN: Duration = Duration::from_millis(2);

fn listing(path: PathBuf) -> impl FnOnce(io::Error) -> OpenError {
    move |source| OpenError::Io { action: "listing", path, source }
}

/// Checks the names, the lengths and the span of a shard's segments. Returns the problems.
///
/// # Errors
/// The error of the file system, or of a damaged span.
pub fn segments(store: &Store, shard: ShardId) -> Result<Vec<String>, OpenError> {
    let dir = store.shard_dir(shard);
    let files = store.shard(shard)?;
    let mut problems = Vec::new();
    for segment in files.segments.iter().filter(|segment| segment.state != SegmentState::Missing) {
        if segment.file.bytes != store.segment_bytes() {
            problems.push(wrong_length(&dir.join(&segment.file.name), segment.file.bytes));
        }
    }
    // Reading the records reports a missing segment before the first blank one.
    let blank = files.segments.iter().position(|segment| segment.state == SegmentState::Blank);
    let behind = blank.map_or(&[][..], |at| &files.segments[at..]);
    if let Some(missing) = behind.iter().find(|segment| segment.state == SegmentState::Missing) {
        problems.push(format!("{} is missing: the span includes it", dir.join(&missing.file.name).display()));
    }
    for file in files.others.iter().filter(|file| file.name.ends_with(".seg")) {
        let path = dir.join(&file.name);
        let index = match segment_index(&file.name) {
            Some(index) if index < OFFSETS_END / store.segment_bytes() => index,
            Some(_) => {
                problems.push(format!("{} is a segment beyond the last possible offset", path.display()));
                continue;
            }
            None if spare_number(&file.name).is_some() => continue,
            None => {
                problems.push(format!("{} does not have the name of a segment", path.display()));
                continue;
            }
        };
        // Freed before a crash: such a file is reused and never read.
        if files.span.is_some_and(|(first, _)| index < first) {
            continue;
        }
        let state = store.segment_state(shard, index)?;
        // The span includes a segment before the segment begins. It may have begun since the span was read.
        match store.shard(shard)?.span {
            Some((first, last)) if (first..=last).contains(&index) || index < first => {}
            _ if state == SegmentState::Missing => {}
            _ if file.bytes != store.segment_bytes() => problems.push(wrong_length(&path, file.bytes)),
            _ if state == SegmentState::Blank => {}
            Some(_) => problems.push(format!("{} is in use but beyond the span", path.display())),
            None => problems.push(format!("{} is in use but {} is missing", path.display(), dir.join(SPAN).display())),
        }
    }
    Ok(problems)
}

fn wrong_length(path: &Path, bytes: u64) -> String {
    format!("{} has {bytes} bytes, which is not the length of a segment", path.display())
}

/// Returns the offset at which a shard's held log begins.
///
/// # Errors
/// The error of the file system, or of a damaged span.
pub fn earliest(store: &Store, shard: ShardId) -> Result<Offset, OpenError> {
    let first = store.shard(shard)?.span.map_or(0, |(first, _)| first);
    Ok(Offset(first * store.segment_bytes() + HEADER_BYTES as u64))
}

/// The saved states of a shard. Read them before the log.
#[derive(Debug)]
pub struct SavedStates {
    problems: Vec<String>,
    shard: ShardId,
    /// The offset at which the held log begins.
    earliest: Offset,
    /// The undamaged files, by number.
    files: Vec<SavedFile>,
}

/// An undamaged file of saved states.
#[derive(Debug)]
struct SavedFile {
    path: PathBuf,
    number: u32,
    header: FileHeader,
    /// The log's end that the file states.
    log_end: Offset,
    /// The CRC word of the record that ends there.
    end_check: u32,
    /// The highest offset of a record that an entry names.
    head: Offset,
    /// The highest version of an entry.
    newest: Version,
}

impl SavedStates {
    /// Reads every entry of every file. Call this before the log is read: the log then includes every event that the
    /// states do.
    ///
    /// # Errors
    /// The error of the file system, or of a damaged span.
    pub fn read(store: &Store, shard: ShardId) -> Result<Self, OpenError> {
        // The span is read first: retention frees segments only after a checkpoint is written.
        let earliest = earliest(store, shard)?;
        let mut found = Self { problems: Vec::new(), shard, earliest, files: Vec::new() };
        let dir = store.shard_dir(shard);
        for name in store.files().list(&dir).map_err(listing(dir.clone()))? {
            let Some((kind, number)) = file_number(&name) else { continue };
            let path = dir.join(&name);
            let mut looks = 0;
            let read = loop {
                looks += 1;
                match look(&**store.files(), &path, kind, (store.store_id(), shard)) {
                    Err(source) if source.kind() == ErrorKind::NotFound => break None,
                    Err(source) => return Err(OpenError::Io { action: "reading", path, source }),
                    Ok(Err(_)) if looks < LOOKS_MAX => std::thread::sleep(LOOK_AGAIN),
                    Ok(read) => break Some(read),
                }
            };
            match read {
                // The engine has removed a file that nothing needs any more.
                None => {}
                Some(Err(why)) => found.problems.push(format!("{}: {why}", path.display())),
                Some(Ok(file)) => found.files.push(SavedFile { path, number, ..file }),
            }
        }
        found.files.sort_by_key(|file| file.number);
        Ok(found)
    }

    /// Returns the problems of the saved states, given that the log ends at `end` and that the next event there has
    /// this `sequence`.
    ///
    /// # Errors
    /// The error of the file system, or of a damaged span.
    pub fn problems(&self, store: &Store, end: Offset, sequence: Sequence) -> Result<Vec<String>, OpenError> {
        let mut problems = self.problems.clone();
        let mut has_beginning = self.earliest.get() <= HEADER_BYTES as u64;
        let is_checkpoint = |file: &&SavedFile| file.header.kind == Kind::Checkpoint;
        let newest = self.files.iter().rfind(is_checkpoint).map(|file| &file.header);
        for file in &self.files {
            let mut is_usable = true;
            let mut add = |why: &dyn std::fmt::Display| {
                is_usable = false;
                problems.push(format!("{} {why}", file.path.display()));
            };
            if file.log_end > end || file.head >= end {
                add(&"has states of events that the log does not have");
            } else if file.newest.get() > sequence.get() {
                add(&"has a state of more events than the log ever had");
            } else if is_checkpoint(&file)
                && file.header.start >= self.earliest
                && let Some(why) = self.misplaced(store, &file.header)?
            {
                add(&format!("starts at {}: {why}", file.header.start));
            } else if is_checkpoint(&file)
                && let Some(Ok(there)) = led_to(store, self.shard, file.log_end)?
                && there.check != file.end_check
            {
                add(&format!("ends at {}: {OTHER_HISTORY}", file.log_end));
            }
            // Opening ignores such snapshots.
            if !is_checkpoint(&file)
                && let Some(newest) = newest
                && newest.state_version == file.header.state_version
                && newest.state != file.header.state
            {
                add(&format!(
                    "has states that take {}, and the newest checkpoint's take {} under the same state version",
                    file.header.state, newest.state
                ));
            }
            has_beginning |= is_usable && is_checkpoint(&file) && file.header.start >= self.earliest;
        }
        if !has_beginning {
            problems.push(format!(
                "shard {}: the log begins at {} and no undamaged checkpoint starts in it: earlier states are lost, and \
                 opening a store with states is refused",
                self.shard, self.earliest
            ));
        }
        Ok(problems)
    }

    /// Checks that a checkpoint's start is a place in the log. Returns the reason if it is not.
    fn misplaced(&self, store: &Store, header: &FileHeader) -> Result<Option<&'static str>, OpenError> {
        Ok(match led_to(store, self.shard, header.start)? {
            Some(Ok(led)) if led.is_in_command => Some("that is inside a command"),
            Some(Ok(led)) if led.sequence != header.sequence.get() => Some("the log has another sequence there"),
            Some(Ok(led)) => (led.check != header.check).then_some(OTHER_HISTORY),
            Some(Err(NoBoundary::Inside)) => Some("that is inside a record"),
            Some(Err(NoBoundary::Broken(..))) => Some("the log is damaged before that"),
            // The segment was freed or has not begun.
            None => None,
        })
    }
}

/// The message for a file from a copy of the store, if the copy or the store was written to afterwards.
const OTHER_HISTORY: &str = "the record before it is another one: the file is of another history of this store";

/// Reads a file of saved states once.
fn look(storage: &dyn Storage, path: &Path, kind: Kind, of: (u64, ShardId)) -> io::Result<Result<SavedFile, Unusable>> {
    let bytes = storage.open_side(path).and_then(|file| whole(&*file))?;
    Ok(decode(&bytes, kind, of))
}

/// Decodes a file of saved states, with every entry.
fn decode(bytes: &[u8], kind: Kind, of: (u64, ShardId)) -> Result<SavedFile, Unusable> {
    let header = FileHeader::decode(bytes, of)?;
    if header.kind != kind {
        return Err("its name belongs to another kind of file".into());
    }
    let end = if kind == Kind::Checkpoint { Some(End::decode(bytes)?) } else { None };
    let (log_end, end_check) = end.map_or((Offset(0), 0), |end| (end.log_end, end.check));
    let (mut at, mut entries, mut head, mut newest) = (FILE_HEADER_BYTES, 0, Offset(0), Version(0));
    while let Some(entry) = entry_at(bytes, at)? {
        at += entry.bytes;
        if entry.is_end() && kind == Kind::Checkpoint {
            break;
        }
        entries += 1;
        if !is_of(&entry, end.map_or(Offset(OFFSETS_END), |end| end.log_end)) {
            return Err("an entry names an event that no log can have".into());
        }
        entry.each_outcome(|_| Ok(()))?;
        if entry.version.get() > 0 {
            (head, newest) = (head.max(entry.head), newest.max(entry.version));
        }
    }
    if let Some(end) = end {
        if entries != end.entries || at != bytes.len() {
            return Err("entries of the checkpoint are missing".into());
        }
        if !is_record_offset(header.start) || !is_record_offset(log_end) || header.start > log_end {
            return Err("its start or end is not a place in a log".into());
        }
    }
    Ok(SavedFile { path: PathBuf::new(), number: 0, header, log_end, end_check, head, newest })
}

/// Follows the records of a segment to `place`. Returns `None` if the segment was freed, has not begun, or is
/// incomplete, which reading the log reports.
fn led_to(store: &Store, shard: ShardId, place: Offset) -> Result<Option<Result<Boundary, NoBoundary>>, OpenError> {
    // The end of a segment filled to its last byte still belongs to that segment.
    let index = place.get().saturating_sub(1) / store.segment_bytes();
    let at = (place.get() - index * store.segment_bytes()) as usize;
    let mut looks = 0;
    loop {
        let led =
            store.beginning(shard, index, at.max(HEADER_BYTES))?.map(|(header, whole)| walk_to(&whole, &header, at));
        looks += 1;
        // Checked after the read: a file leaves the span before it is reused.
        if store.span(shard)?.is_none_or(|span| index < span.first) {
            return Ok(None);
        }
        if !matches!(led, Some(Err(_))) || looks == LOOKS_MAX {
            return Ok(led);
        }
        std::thread::sleep(LOOK_AGAIN);
    }
}

/// Checks that reading a shard can begin at `place`. Returns the reason if it cannot. The log must reach `place`.
///
/// # Errors
/// The error of the file system, or of a damaged span.
pub fn place(store: &Store, shard: ShardId, place: Offset) -> Result<Option<&'static str>, OpenError> {
    Ok(match led_to(store, shard, place)? {
        None | Some(Ok(_)) => None,
        Some(Err(NoBoundary::Inside)) => Some("that is inside a record"),
        Some(Err(NoBoundary::Broken(..))) => Some("the log is damaged before that"),
    })
}

/// Checks that a saved position is one of this shard's log. Returns the reason if it is not. The log must reach the
/// position.
///
/// # Errors
/// The error of the file system, or of a damaged span.
pub fn position(store: &Store, shard: ShardId, position: &Position) -> Result<Option<&'static str>, ReadError> {
    if position.store() != store.store_id() {
        return Ok(Some("that is a position in another store"));
    }
    if position.shard() != shard {
        return Ok(Some("that is a position in another shard"));
    }
    let (last, _) = position.last();
    if last.get() == 0 {
        return Ok(None);
    }
    match store.lookup().check_word(shard, last) {
        Ok((len, word)) => Ok(position.does_not_follow(len, Some(word))),
        Err(ReadError::BeyondRetention { .. }) => Ok(None),
        Err(ReadError::NotARecord { .. }) => Ok(Some("the log has no event at the offset of the last one before it")),
        Err(error) => Err(error),
    }
}

/// A sequence gate of a store.
#[derive(Debug)]
#[non_exhaustive]
pub struct Gate {
    /// Its name.
    pub name: String,
    /// The number of gaps it has recorded.
    pub gaps: usize,
    /// By shard, the position up to which it has counted every event; empty if that is not known.
    pub counted: Vec<Position>,
    /// Everything that opening it would refuse or report.
    pub problems: Vec<String>,
}

/// Reads the sequence gates of a store. Call this before the log is read.
///
/// # Errors
/// The error of the file system.
pub fn gates(store: &Store) -> Result<Vec<Gate>, OpenError> {
    let dir = gates_dir(store.dir());
    let names = match store.files().list(&dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        names => names.map_err(listing(dir))?,
    };
    let storage: Arc<dyn Storage> = Arc::clone(store.files()) as _;
    let look = |name: String| {
        let files = GateFiles::new(&storage, (store.dir(), store.store_id()), &name);
        if !files.exists()? {
            return Ok(None);
        }
        let mut looks = 0;
        loop {
            let gate = gate(&files, &name, usize::from(store.shards()));
            looks += 1;
            // The engine may be writing an entry or creating the folder.
            if gate.problems.is_empty() || looks == LOOKS_MAX {
                return Ok(Some(gate));
            }
            std::thread::sleep(LOOK_AGAIN);
        }
    };
    names.into_iter().filter(|name| is_folder_name(name)).map(look).filter_map(Result::transpose).collect()
}

/// Reads a gate's files once.
fn gate(files: &GateFiles, name: &str, shards: usize) -> Gate {
    let mut gate = Gate { name: name.to_owned(), gaps: 0, counted: Vec::new(), problems: Vec::new() };
    // Read the positions first: the record, read afterwards, then has every gap that they count.
    match files.stored_positions(shards) {
        Ok(positions) => {
            gate.counted = positions.map_or(Vec::new(), |positions| positions.counted);
        }
        Err(error) => gate.problems.push(crate::error::with_sources(&error)),
    }
    match files.look() {
        Ok((gaps, torn)) => {
            gate.gaps = gaps;
            if torn > 0 {
                gate.problems.push(format!("{torn} bytes after its last entry are torn: opening the gate cuts them"));
            }
        }
        Err(error) => gate.problems.push(crate::error::with_sources(&error)),
    }
    gate
}
