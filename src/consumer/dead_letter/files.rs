//! The files of one consumer's letters: which files count and up to which byte, and how to read their batches.
//!
//! A file names its predecessor and the end of the predecessor's valid bytes. A refused batch is therefore after such
//! an end, or in a file that no other file names. A missing or shortened file is noticed. The consumer's position file
//! names the end of the newest file.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use crate::error::OpenError;
use crate::storage::framed::u32_at;
use crate::storage::{SideFile, Storage, is_exhausted};

use super::answer::LettersError;
use super::format::{ALIGN, Change, FILE_HEADER_BYTES, FileEnd, FileHeader, HeaderFault, StoredEntry};
use super::format::{batch_of, check, entry_len};
use super::index::EntrySummary;

/// Bytes read at once; a longer entry is read as a whole.
const WINDOW_BYTES: usize = 256 << 10;
/// Bytes needed to know an entry's length and batch.
const PEEK_BYTES: usize = 16;

/// Returns the path of file `number`.
pub(super) fn path(dir: &Path, number: u32) -> PathBuf {
    dir.join(format!("letters-{number:06}.log"))
}

/// Returns the number in a file's name, if it is a name of letters.
fn number_of(name: &str) -> Option<u32> {
    let digits = name.strip_prefix("letters-")?.strip_suffix(".log")?;
    let is_number = digits.len() >= 6 && digits.bytes().all(|byte| byte.is_ascii_digit());
    // Numbers count up from the highest, so a name above any number in use is not a file of letters.
    if is_number { digits.parse().ok().filter(|number| (1..1 << 31).contains(number)) } else { None }
}

/// Returns `true` if `name` is a name of a file of letters.
pub(crate) fn is_letters_name(name: &str) -> bool {
    number_of(name).is_some()
}

/// Returns the numbers of all files, ascending. Empty if the folder does not exist.
pub(super) fn numbers(storage: &dyn Storage, dir: &Path) -> Result<Vec<u32>, LettersError> {
    let names = match storage.list(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        names => names.map_err(|source| LettersError::Io { action: "listing", path: dir.to_owned(), source })?,
    };
    let mut numbers: Vec<u32> = names.iter().filter_map(|name| number_of(name)).collect();
    numbers.sort_unstable();
    Ok(numbers)
}

/// An open file, and the end of its valid bytes.
#[derive(Debug)]
pub(super) struct LetterFile {
    pub(super) handle: Box<dyn SideFile>,
    pub(super) bytes: u64,
}

/// The reason why an entry could not be read.
#[derive(Debug)]
pub(super) enum ReadFault {
    Io(io::Error),
    /// The checksum or the structure is wrong.
    Damaged(&'static str),
    /// The checksum matches, but no build writes such values: this is not a write that was cut short.
    Strange(&'static str),
}

impl From<io::Error> for ReadFault {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl ReadFault {
    pub(super) fn of(self, path: PathBuf, at: u64) -> LettersError {
        match self {
            Self::Io(source) => LettersError::Io { action: "reading", path, source },
            Self::Damaged(why) | Self::Strange(why) => LettersError::Damaged { path, at, why },
        }
    }
}

/// Reads a file from its start, batch by batch.
#[derive(Debug)]
pub(super) struct Batches<'a> {
    file: &'a dyn SideFile,
    number: u32,
    /// The end of the readable bytes.
    end: u64,
    /// The offset of the next batch.
    pub(super) at: u64,
    batch: u32,
    window: Vec<u8>,
    window_at: u64,
}

impl<'a> Batches<'a> {
    pub(super) fn new(number: u32, file: &'a LetterFile) -> Self {
        let at = FILE_HEADER_BYTES as u64;
        let LetterFile { handle, bytes: end } = file;
        Self { file: &**handle, number, end: *end, at, batch: 0, window: Vec::new(), window_at: 0 }
    }

    /// Returns the next batch; `None` at the end of the file.
    pub(super) fn next(&mut self) -> Result<Option<Vec<EntrySummary>>, ReadFault> {
        let mut entries = Vec::new();
        let mut at = self.at;
        while at < self.end {
            let (number, batch) = (self.number, self.batch);
            let bytes = self.entry(at)?;
            if batch_of(bytes) != batch {
                return Err(ReadFault::Damaged("an entry belongs to another batch"));
            }
            let entry = StoredEntry::decode(bytes).map_err(ReadFault::Strange)?;
            entries.push(EntrySummary::new(&entry, number, at));
            at += entry.len() as u64;
            if entry.is_last {
                (self.at, self.batch) = (at, batch + 1);
                return Ok(Some(entries));
            }
        }
        if entries.is_empty() { Ok(None) } else { Err(ReadFault::Damaged("a batch is cut short")) }
    }

    /// Returns `true` if a valid entry of a later batch follows. It was written after the batch expected here had been
    /// synced.
    pub(super) fn has_later_batch(&mut self) -> io::Result<bool> {
        for at in (self.at..self.end).step_by(ALIGN).skip(1) {
            if at + PEEK_BYTES as u64 > self.end {
                break;
            }
            let expected = self.batch;
            if batch_of(self.bytes(at, PEEK_BYTES)?) <= expected {
                continue;
            }
            match self.entry(at) {
                Ok(_) => return Ok(true),
                Err(ReadFault::Damaged(_) | ReadFault::Strange(_)) => {}
                Err(ReadFault::Io(error)) => return Err(error),
            }
        }
        Ok(false)
    }

    /// Returns the entry at `at` after checking its checksum.
    fn entry(&mut self, at: u64) -> Result<&[u8], ReadFault> {
        const SHORT: ReadFault = ReadFault::Damaged("an entry is cut short");
        let (number, left) = (self.number, self.end.saturating_sub(at));
        if left < PEEK_BYTES as u64 {
            return Err(SHORT);
        }
        let len = entry_len(self.bytes(at, PEEK_BYTES)?).map_err(ReadFault::Damaged)?;
        if left < len as u64 {
            return Err(SHORT);
        }
        let entry = self.bytes(at, len)?;
        check(entry, number, at).map_err(ReadFault::Damaged)?;
        Ok(entry)
    }

    fn bytes(&mut self, at: u64, len: usize) -> io::Result<&[u8]> {
        let is_here = at >= self.window_at && at + len as u64 <= self.window_at + self.window.len() as u64;
        if !is_here {
            let window = (len.max(WINDOW_BYTES) as u64).min(self.end - at) as usize;
            self.window.resize(window, 0);
            self.window_at = at;
            self.file.read_at(at, &mut self.window)?;
        }
        let begun = (at - self.window_at) as usize;
        Ok(&self.window[begun..begun + len])
    }
}

/// Reads one entry at a known place.
pub(super) fn read_entry(
    file: &LetterFile,
    number: u32,
    at: u64,
    out: &mut Vec<u8>,
    bytes: usize,
) -> Result<(), ReadFault> {
    out.resize(bytes, 0);
    file.handle.read_at(at, out)?;
    if u32_at(out, 0) as usize != bytes {
        return Err(ReadFault::Damaged("an entry has another length"));
    }
    check(out, number, at).map_err(ReadFault::Damaged)
}

/// The files that count.
#[derive(Debug, Default)]
pub(super) struct Loaded {
    pub(super) files: BTreeMap<u32, LetterFile>,
    /// A number above every existing file, whether it counts or not.
    pub(super) next_number: u32,
}

impl Loaded {
    pub(super) fn end(&self) -> FileEnd {
        let newest = self.files.last_key_value();
        newest.map_or_else(FileEnd::default, |(&number, file)| FileEnd { number, bytes: file.bytes })
    }
}

/// The owner of the files: this process or another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum OpenMode {
    /// The caller owns the files: they are made durable before they are used.
    Own,
    /// Another process may own the files: they are not changed.
    Outside,
}

/// Finds the files that count and calls `each` with every entry of complete batches, in the order written. The files
/// must reach to `known`, an end that was durable.
pub(super) fn load(
    storage: &dyn Storage,
    dir: &Path,
    mode: OpenMode,
    known: FileEnd,
    each: impl FnMut(&EntrySummary),
) -> Result<Loaded, OpenError> {
    let loaded = load_all(storage, dir, each)?;
    let end = loaded.end();
    if end < known {
        let at = if end.number == known.number { end.bytes } else { 0 };
        let why = "letters that were durable are gone: the file is missing, or ends too early";
        return Err(OpenError::DamagedFile { path: path(dir, known.number), at, why });
    }
    if let (OpenMode::Own, Some((&number, file))) = (mode, loaded.files.last_key_value()) {
        let from = if number == known.number { known.bytes } else { 0 };
        let settled = settle(storage, dir, number, file, from);
        settled.map_err(|source| OpenError::Io { action: "syncing", path: path(dir, number), source })?;
        storage.sync_dir(dir).map_err(|source| OpenError::Io { action: "syncing", path: dir.to_owned(), source })?;
    }
    Ok(loaded)
}

/// Makes a file durable. Rewrites the bytes from `from` on unchanged: after a kill they may be in the page cache only,
/// and after a failed sync the cache may hold them marked as clean.
fn settle(storage: &dyn Storage, dir: &Path, number: u32, file: &LetterFile, from: u64) -> io::Result<()> {
    let editable = storage.edit_side(&path(dir, number))?;
    let (mut at, mut bytes) = (from, Vec::new());
    while at < file.bytes {
        bytes.resize((file.bytes - at).min(WINDOW_BYTES as u64) as usize, 0);
        file.handle.read_at(at, &mut bytes)?;
        match editable.write_at(at, &bytes) {
            // A full disk does no harm: the same bytes are already in the file.
            Err(error) if is_exhausted(&error) => {}
            written => written?,
        }
        at += bytes.len() as u64;
    }
    editable.sync()
}

fn load_all(storage: &dyn Storage, dir: &Path, mut each: impl FnMut(&EntrySummary)) -> Result<Loaded, OpenError> {
    let numbers = numbers(storage, dir)?;
    let Some(&highest) = numbers.last() else { return Ok(Loaded { files: BTreeMap::new(), next_number: 1 }) };
    let mut files = BTreeMap::new();
    let mut link = newest(storage, dir, &numbers)?;
    let mut is_complete = false;
    while let Some((number, header, file)) = link.take() {
        is_complete = header.is_complete;
        files.insert(number, file);
        link = match header.before {
            Some(before) => Some(named(storage, dir, before)?),
            None => None,
        };
    }
    let newest = files.keys().last().copied();
    for (&number, file) in &mut files {
        let must_be_whole = Some(number) != newest;
        read_all(dir, number, file, must_be_whole, std::mem::take(&mut is_complete), &mut each)?;
    }
    Ok(Loaded { files, next_number: highest + 1 })
}

type Link = (u32, FileHeader, LetterFile);

/// Returns the newest file with a valid header. A crash may have left newer files without one.
fn newest(storage: &dyn Storage, dir: &Path, numbers: &[u32]) -> Result<Option<Link>, OpenError> {
    for &number in numbers.iter().rev() {
        let file = open(storage, dir, number)?;
        match header_of(dir, number, &file)? {
            Ok(header) => return Ok(Some((number, header, file))),
            Err(why) => {
                let damaged = OpenError::DamagedFile { path: path(dir, number), at: 0, why };
                let mut behind = Batches { at: 0, ..Batches::new(number, &file) };
                let has_later_batch = behind.has_later_batch().map_err(|error| reading(dir, number, error))?;
                // The first file has no predecessor, and a predecessor is removed only when a complete file replaces
                // it.
                let is_without_those_before = number == numbers[0] && number > 1;
                if has_later_batch || is_without_those_before {
                    return Err(damaged);
                }
            }
        }
    }
    Ok(None)
}

/// Opens a file that another file names as its predecessor.
fn named(storage: &dyn Storage, dir: &Path, end: FileEnd) -> Result<Link, OpenError> {
    let mut file = open(storage, dir, end.number)?;
    let damaged = |at, why| OpenError::DamagedFile { path: path(dir, end.number), at, why };
    let header = header_of(dir, end.number, &file)?.map_err(|why| damaged(0, why))?;
    if file.bytes < end.bytes {
        return Err(damaged(file.bytes, "the file is shorter than it was"));
    }
    file.bytes = end.bytes;
    Ok((end.number, header, file))
}

fn open(storage: &dyn Storage, dir: &Path, number: u32) -> Result<LetterFile, OpenError> {
    let path = path(dir, number);
    let opened = storage.open_side(&path).and_then(|handle| Ok(LetterFile { bytes: handle.len()?, handle }));
    opened.map_err(|source| OpenError::Io { action: "opening", path, source })
}

fn header_of(dir: &Path, number: u32, file: &LetterFile) -> Result<Result<FileHeader, &'static str>, OpenError> {
    let mut head = vec![0; (FILE_HEADER_BYTES as u64).min(file.bytes) as usize];
    file.handle.read_at(0, &mut head).map_err(|error| reading(dir, number, error))?;
    match FileHeader::decode(&head, number) {
        Err(HeaderFault::Version(found)) => {
            let known = crate::storage::framed::FORMAT_VERSION;
            Err(OpenError::UnknownFormat { path: path(dir, number), found, known })
        }
        Err(HeaderFault::Damaged(why)) => Ok(Err(why)),
        Err(HeaderFault::Strange(why)) => Err(OpenError::DamagedFile { path: path(dir, number), at: 0, why }),
        Ok(header) => Ok(Ok(header)),
    }
}

fn reading(dir: &Path, number: u32, error: io::Error) -> OpenError {
    ReadFault::Io(error).of(path(dir, number), 0).into()
}

/// Reads a whole file, and sets its end to that of the last valid batch.
pub(super) fn read_all(
    dir: &Path,
    number: u32,
    file: &mut LetterFile,
    must_be_whole: bool,
    is_complete: bool,
    each: &mut impl FnMut(&EntrySummary),
) -> Result<(), LettersError> {
    let mut batches = Batches::new(number, file);
    let mut has_totals = false;
    loop {
        let fault = match batches.next() {
            Ok(Some(batch)) => {
                has_totals |= batch.iter().any(|entry| matches!(entry.change, Change::Totals(_)));
                batch.iter().for_each(&mut *each);
                continue;
            }
            Ok(None) if is_complete && !has_totals => ReadFault::Damaged("a complete file is cut short"),
            Ok(None) => break,
            Err(fault) => fault,
        };
        let is_torn = matches!(fault, ReadFault::Damaged(_)) && !must_be_whole && (has_totals || !is_complete);
        let later = is_torn.then(|| batches.has_later_batch()).transpose();
        // A write that was cut short: it was not acknowledged as durable.
        if later.map_err(|error| ReadFault::Io(error).of(path(dir, number), batches.at))? == Some(false) {
            break;
        }
        return Err(fault.of(path(dir, number), batches.at));
    }
    file.bytes = batches.at;
    Ok(())
}
