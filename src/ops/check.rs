//! What opening a store would refuse or report of its files, found from outside: beside a running engine, without a lock and without
//! changing a byte. The files are read with the decoders that opening uses; the log's records are read by [`crate::scan`].

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
use crate::recovery::confirm::{Astray, There, lead_to};
use crate::recovery::load::is_of;
use crate::state::snapshot::format::{End, FILE_HEADER_BYTES, FileHeader, Kind, Unusable, entry_at};
use crate::state::snapshot::store::{file_number, whole};
use crate::storage::Storage;

/// Fresh looks at a file that is being written, before it counts as damaged.
const LOOKS_MAX: u32 = 5;
const LOOK_AGAIN: Duration = Duration::from_millis(2);

fn listing(path: PathBuf) -> impl FnOnce(io::Error) -> OpenError {
    move |source| OpenError::Io { action: "listing", path, source }
}

/// Checks the names, the lengths and the span of a shard's segments. Returns the problems.
///
/// # Errors
/// What the file system or a damaged span says.
pub fn segments(store: &Store, shard: ShardId) -> Result<Vec<String>, OpenError> {
    let dir = store.shard_dir(shard);
    let files = store.shard(shard)?;
    let mut problems = Vec::new();
    for segment in files.segments.iter().filter(|segment| segment.state != SegmentState::Missing) {
        if segment.file.bytes != store.segment_bytes() {
            problems.push(wrong_length(&dir.join(&segment.file.name), segment.file.bytes));
        }
    }
    // Up to a blank one the records are followed, and say it themselves.
    let blank = files.segments.iter().position(|segment| segment.state == SegmentState::Blank);
    let behind = blank.map_or(&[][..], |at| &files.segments[at..]);
    if let Some(missing) = behind.iter().find(|segment| segment.state == SegmentState::Missing) {
        problems.push(format!("{} is missing, as its span names it", dir.join(&missing.file.name).display()));
    }
    for file in files.others.iter().filter(|file| file.name.ends_with(".seg")) {
        let path = dir.join(&file.name);
        let index = match segment_index(&file.name) {
            Some(index) if index < OFFSETS_END / store.segment_bytes() => index,
            Some(_) => {
                problems.push(format!("{} is a segment beyond the last offset", path.display()));
                continue;
            }
            None if spare_number(&file.name).is_some() => continue,
            None => {
                problems.push(format!("{} is not named like a segment", path.display()));
                continue;
            }
        };
        // Freed before a crash: written again, never read.
        if files.span.is_some_and(|(first, _)| index < first) {
            continue;
        }
        let state = store.segment_state(shard, index)?;
        // The span names a segment before it is begun, and it may have been begun since the span was read.
        match store.shard(shard)?.span {
            Some((first, last)) if (first..=last).contains(&index) || index < first => {}
            _ if state == SegmentState::Missing => {}
            _ if file.bytes != store.segment_bytes() => problems.push(wrong_length(&path, file.bytes)),
            _ if state == SegmentState::Blank => {}
            Some(_) => problems.push(format!("{} is in use and lies beyond the span", path.display())),
            None => problems.push(format!("{} is in use, and {} is missing", path.display(), dir.join(SPAN).display())),
        }
    }
    Ok(problems)
}

fn wrong_length(path: &Path, bytes: u64) -> String {
    format!("{} is {bytes} bytes long, not as long as a segment", path.display())
}

/// Returns the offset at which a shard's held log begins.
///
/// # Errors
/// What the file system or a damaged span says.
pub fn earliest(store: &Store, shard: ShardId) -> Result<Offset, OpenError> {
    let first = store.shard(shard)?.span.map_or(0, |(first, _)| first);
    Ok(Offset(first * store.segment_bytes() + HEADER_BYTES as u64))
}

/// The saved states of a shard, as they were before its log was read.
#[derive(Debug)]
pub struct SavedStates {
    problems: Vec<String>,
    shard: ShardId,
    /// The offset at which the held log begins.
    earliest: Offset,
    /// Those that are whole, by their numbers.
    files: Vec<Held>,
}

/// A file of saved states that is whole.
#[derive(Debug)]
struct Held {
    path: PathBuf,
    number: u32,
    header: FileHeader,
    /// The end of the log that it knows, and the CRC word of the record that ends there.
    log_end: Offset,
    end_check: u32,
    /// The furthest record that it names, and the highest version.
    head: Offset,
    newest: Version,
}

impl SavedStates {
    /// Reads every entry of every file. To be called before the log is read, which then reaches as far as they do.
    ///
    /// # Errors
    /// What the file system or a damaged span says.
    pub fn read(store: &Store, shard: ShardId) -> Result<Self, OpenError> {
        // The span first: retention frees when a checkpoint is there.
        let earliest = earliest(store, shard)?;
        let mut found = Self { problems: Vec::new(), shard, earliest, files: Vec::new() };
        let dir = store.shard_dir(shard);
        for name in store.files().list(&dir).map_err(listing(dir.clone()))? {
            let Some((kind, number)) = file_number(&name) else { continue };
            let path = dir.join(&name);
            let mut looks = 0;
            let held = loop {
                looks += 1;
                match look(&**store.files(), &path, kind, (store.store_id(), shard)) {
                    Err(source) if source.kind() == ErrorKind::NotFound => break None,
                    Err(source) => return Err(OpenError::Io { action: "reading", path, source }),
                    Ok(Err(_)) if looks < LOOKS_MAX => std::thread::sleep(LOOK_AGAIN),
                    Ok(held) => break Some(held),
                }
            };
            match held {
                // It is not needed any more.
                None => {}
                Some(Err(why)) => found.problems.push(format!("{}: {why}", path.display())),
                Some(Ok(held)) => found.files.push(Held { path, number, ..held }),
            }
        }
        found.files.sort_by_key(|file| file.number);
        Ok(found)
    }

    /// What is wrong with them in a log that ends at `end`, where the next event has this sequence.
    ///
    /// # Errors
    /// What the file system or a damaged span says.
    pub fn problems(&self, store: &Store, end: Offset, sequence: Sequence) -> Result<Vec<String>, OpenError> {
        let mut problems = self.problems.clone();
        let mut has_beginning = self.earliest.get() <= HEADER_BYTES as u64;
        let is_checkpoint = |file: &&Held| file.header.kind == Kind::Checkpoint;
        let newest = self.files.iter().rfind(is_checkpoint).map(|file| &file.header);
        for file in &self.files {
            let mut is_usable = true;
            let mut add = |why: &dyn std::fmt::Display| {
                is_usable = false;
                problems.push(format!("{} {why}", file.path.display()));
            };
            if file.log_end > end || file.head >= end {
                add(&"has states of events that the log does not hold");
            } else if file.newest.get() > sequence.get() {
                add(&"has a state with more events than the log ever had");
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
            // Opening passes over them.
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
                "shard {}: the log begins at {}, and no whole checkpoint starts in it: what came before is lost, and a store with \
                 states is refused",
                self.shard, self.earliest
            ));
        }
        Ok(problems)
    }

    /// Why the log does not have the place where a checkpoint starts, if so.
    fn misplaced(&self, store: &Store, header: &FileHeader) -> Result<Option<&'static str>, OpenError> {
        Ok(match led_to(store, self.shard, header.start)? {
            Some(Ok(led)) if led.is_in_command => Some("that lies inside a command"),
            Some(Ok(led)) if led.sequence != header.sequence.get() => Some("the log has another sequence there"),
            Some(Ok(led)) => (led.check != header.check).then_some(OTHER_HISTORY),
            Some(Err(Astray::Inside)) => Some("that lies inside a record"),
            Some(Err(Astray::Broken(..))) => Some("the log does not hold up to there"),
            // Freed, or not begun.
            None => None,
        })
    }
}

/// What a copy of the store that went on differently leaves.
const OTHER_HISTORY: &str = "another record lies before it: that is of another history of this store";

/// One look at a file of saved states.
fn look(storage: &dyn Storage, path: &Path, kind: Kind, of: (u64, ShardId)) -> io::Result<Result<Held, Unusable>> {
    let bytes = storage.open_side(path).and_then(|file| whole(&*file))?;
    Ok(held(&bytes, kind, of))
}

fn held(bytes: &[u8], kind: Kind, of: (u64, ShardId)) -> Result<Held, Unusable> {
    let header = FileHeader::decode(bytes, of)?;
    if header.kind != kind {
        return Err("its name is that of another kind of file".into());
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
            return Err("an entry is of an event that no log has".into());
        }
        entry.each_outcome(|_| Ok(()))?;
        if entry.version.get() > 0 {
            (head, newest) = (head.max(entry.head), newest.max(entry.version));
        }
    }
    if let Some(end) = end {
        if entries != end.entries || at != bytes.len() {
            return Err("a checkpoint's entries are not all there".into());
        }
        if !is_record_offset(header.start) || !is_record_offset(log_end) || header.start > log_end {
            return Err("it begins or ends where no log does".into());
        }
    }
    Ok(Held { path: PathBuf::new(), number: 0, header, log_end, end_check, head, newest })
}

/// What the records of its segment lead to at `place`. `None`: the segment was freed, is not begun, or is not there as a whole, which
/// reading the log tells.
fn led_to(store: &Store, shard: ShardId, place: Offset) -> Result<Option<Result<There, Astray>>, OpenError> {
    // The end of a segment filled to its last byte still belongs to that segment.
    let index = place.get().saturating_sub(1) / store.segment_bytes();
    let at = (place.get() - index * store.segment_bytes()) as usize;
    let mut looks = 0;
    loop {
        let led =
            store.beginning(shard, index, at.max(HEADER_BYTES))?.map(|(header, whole)| lead_to(&whole, &header, at));
        looks += 1;
        // After the look: a file goes out of the span before it is written again.
        if store.span(shard)?.is_none_or(|span| index < span.first) {
            return Ok(None);
        }
        if !matches!(led, Some(Err(_))) || looks == LOOKS_MAX {
            return Ok(led);
        }
        std::thread::sleep(LOOK_AGAIN);
    }
}

/// Why reading a shard cannot begin at `place`, which its log reaches, if so.
///
/// # Errors
/// What the file system or a damaged span says.
pub fn place(store: &Store, shard: ShardId, place: Offset) -> Result<Option<&'static str>, OpenError> {
    Ok(match led_to(store, shard, place)? {
        None | Some(Ok(_)) => None,
        Some(Err(Astray::Inside)) => Some("that lies inside a record"),
        Some(Err(Astray::Broken(..))) => Some("the log does not hold up to there"),
    })
}

/// Why a saved position, which is not beyond the log's end, is none of this shard's log, if so.
///
/// # Errors
/// What the file system or a damaged span says.
pub fn position(store: &Store, shard: ShardId, position: &Position) -> Result<Option<&'static str>, ReadError> {
    if position.store() != store.store_id() {
        return Ok(Some("that is of another store"));
    }
    if position.shard() != shard {
        return Ok(Some("that is of another shard"));
    }
    let (last, _) = position.last();
    if last.get() == 0 {
        return Ok(None);
    }
    match store.lookup().check_word(shard, last) {
        Ok((len, word)) => Ok(position.does_not_follow(len, Some(word))),
        Err(ReadError::BeyondRetention { .. }) => Ok(None),
        Err(ReadError::NotARecord { .. }) => Ok(Some("no event lies where the last one before it lay")),
        Err(error) => Err(error),
    }
}

/// A sequence gate of a store.
#[derive(Debug)]
#[non_exhaustive]
pub struct Gate {
    /// Its name.
    pub name: String,
    /// How many gaps it has recorded.
    pub gaps: usize,
    /// By shard: up to where it has counted every event; empty where that is not known.
    pub counted: Vec<Position>,
    /// What opening it would refuse or report.
    pub problems: Vec<String>,
}

/// The sequence gates of a store, as they were before its log was read.
///
/// # Errors
/// What the file system says.
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
            // An entry that is being written, or a folder that is being made, is whole soon.
            if gate.problems.is_empty() || looks == LOOKS_MAX {
                return Ok(Some(gate));
            }
            std::thread::sleep(LOOK_AGAIN);
        }
    };
    names.into_iter().filter(|name| is_folder_name(name)).map(look).filter_map(Result::transpose).collect()
}

/// One look at a gate.
fn gate(files: &GateFiles, name: &str, shards: usize) -> Gate {
    let mut gate = Gate { name: name.to_owned(), gaps: 0, counted: Vec::new(), problems: Vec::new() };
    // Positions first: what they count was recorded by then.
    match files.stored_positions(shards) {
        Ok(positions) => {
            gate.counted = positions.map_or(Vec::new(), |positions| positions.counted);
        }
        Err(error) => gate.problems.push(error.to_string()),
    }
    match files.look() {
        Ok((gaps, torn)) => {
            gate.gaps = gaps;
            if torn > 0 {
                gate.problems.push(format!("{torn} bytes behind its last entry are torn: opening the gate cuts them"));
            }
        }
        Err(error) => gate.problems.push(error.to_string()),
    }
    gate
}
