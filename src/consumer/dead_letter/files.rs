//! The files of one consumer's letters: which of them count and up to where, and reading them in batches.
//!
//! A file names the one it goes on from, and how far that one counts. So what was refused is behind such an end or in a
//! file that none names, and a file that is missing or shorter than it was shows. Of the newest the consumer's checkpoint says it.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use crate::error::OpenError;
use crate::storage::framed::u32_at;
use crate::storage::{SideFile, Storage, is_exhausted};

use super::answer::LettersError;
use super::format::{ALIGN, Change, FILE_HEADER_BYTES, FileEnd, FileHeader, HeaderFault, StoredEntry};
use super::format::{batch_of, check, entry_len};
use super::index::Noted;

/// Read at once, if an entry is not longer.
const WINDOW_BYTES: usize = 256 << 10;
/// What it takes to see an entry's length and batch.
const PEEK_BYTES: usize = 16;

/// The path of file `number`.
pub(super) fn path(dir: &Path, number: u32) -> PathBuf {
    dir.join(format!("letters-{number:06}.log"))
}

/// The number of a file, if its name is that of one.
fn number_of(name: &str) -> Option<u32> {
    let digits = name.strip_prefix("letters-")?.strip_suffix(".log")?;
    let is_number = digits.len() >= 6 && digits.bytes().all(|byte| byte.is_ascii_digit());
    // Counted on from the highest: a name beyond what is ever counted to is not one of letters.
    if is_number { digits.parse().ok().filter(|number| (1..1 << 31).contains(number)) } else { None }
}

/// Whether a file of this name is one of letters.
pub(crate) fn is_letters_name(name: &str) -> bool {
    number_of(name).is_some()
}

/// The numbers of all files there are, rising. None where there is no folder.
pub(super) fn numbers(storage: &dyn Storage, dir: &Path) -> Result<Vec<u32>, LettersError> {
    let names = match storage.list(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        names => names.map_err(|source| LettersError::Io { action: "listing", path: dir.to_owned(), source })?,
    };
    let mut numbers: Vec<u32> = names.iter().filter_map(|name| number_of(name)).collect();
    numbers.sort_unstable();
    Ok(numbers)
}

/// A file that is read, up to where it counts.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) handle: Box<dyn SideFile>,
    pub(super) bytes: u64,
}

/// Why a place could not be read.
#[derive(Debug)]
pub(super) enum ReadFault {
    Io(io::Error),
    /// The bytes do not hold.
    Damaged(&'static str),
    /// They hold, but no build writes such values: this is no write that was cut short.
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

/// Reads a file from its front, batch by batch.
#[derive(Debug)]
pub(super) struct Batches<'a> {
    file: &'a dyn SideFile,
    number: u32,
    /// Nothing beyond it is looked at.
    end: u64,
    /// Where the next batch begins, and which it is.
    pub(super) at: u64,
    batch: u32,
    window: Vec<u8>,
    window_at: u64,
}

impl<'a> Batches<'a> {
    pub(super) fn new(number: u32, held: &'a Held) -> Self {
        let at = FILE_HEADER_BYTES as u64;
        let Held { handle, bytes: end } = held;
        Self { file: &**handle, number, end: *end, at, batch: 0, window: Vec::new(), window_at: 0 }
    }

    /// The next batch; `None` where the file ends behind one.
    pub(super) fn next(&mut self) -> Result<Option<Vec<Noted>>, ReadFault> {
        let mut noted = Vec::new();
        let mut at = self.at;
        while at < self.end {
            let (number, batch) = (self.number, self.batch);
            let bytes = self.entry(at)?;
            if batch_of(bytes) != batch {
                return Err(ReadFault::Damaged("an entry of another batch"));
            }
            let entry = StoredEntry::decode(bytes).map_err(ReadFault::Strange)?;
            noted.push(Noted::new(&entry, number, at));
            at += entry.len() as u64;
            if entry.is_last {
                (self.at, self.batch) = (at, batch + 1);
                return Ok(Some(noted));
            }
        }
        if noted.is_empty() { Ok(None) } else { Err(ReadFault::Damaged("a batch is cut short")) }
    }

    /// Whether an entry holds, anywhere behind, that was written when the batch expected here had been synced.
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

    /// The entry at `at`, its checksum looked at.
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

/// One entry of which the place is known.
pub(super) fn read_entry(held: &Held, number: u32, at: u64, out: &mut Vec<u8>, bytes: usize) -> Result<(), ReadFault> {
    out.resize(bytes, 0);
    held.handle.read_at(at, out)?;
    if u32_at(out, 0) as usize != bytes {
        return Err(ReadFault::Damaged("an entry has another length"));
    }
    check(out, number, at).map_err(ReadFault::Damaged)
}

/// The files that count.
#[derive(Debug, Default)]
pub(super) struct Loaded {
    pub(super) files: BTreeMap<u32, Held>,
    /// Above every file there is, whether it counts or not.
    pub(super) next_number: u32,
}

impl Loaded {
    pub(super) fn end(&self) -> FileEnd {
        let newest = self.files.last_key_value();
        newest.map_or_else(FileEnd::default, |(&number, held)| FileEnd { number, bytes: held.bytes })
    }
}

/// Whether somebody may be writing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    /// Nobody is: what is found is made durable before it is believed.
    Own,
    /// Somebody may be: nothing is touched.
    Outside,
}

/// Finds the files that count and tells `each` entry of whole batches, in the order written. They must reach to `known`, which is
/// known to have been durable.
pub(super) fn load(
    storage: &dyn Storage,
    dir: &Path,
    access: Access,
    known: FileEnd,
    each: impl FnMut(&Noted),
) -> Result<Loaded, OpenError> {
    let loaded = load_all(storage, dir, each)?;
    let end = loaded.end();
    if end < known {
        let at = if end.number == known.number { end.bytes } else { 0 };
        let why = "letters that were durable are gone: the file is missing, or ends too early";
        return Err(OpenError::DamagedFile { path: path(dir, known.number), at, why });
    }
    if let (Access::Own, Some((&number, held))) = (access, loaded.files.last_key_value()) {
        let from = if number == known.number { known.bytes } else { 0 };
        let settled = settle(storage, dir, number, held, from);
        settled.map_err(|source| OpenError::Io { action: "syncing", path: path(dir, number), source })?;
        storage.sync_dir(dir).map_err(|source| OpenError::Io { action: "syncing", path: dir.to_owned(), source })?;
    }
    Ok(loaded)
}

/// Makes a file durable. What stands in it from `from` on is written once more, the same bytes: after a kill it may be in the system's
/// cache only, and after a failed sync marked as written there.
fn settle(storage: &dyn Storage, dir: &Path, number: u32, held: &Held, from: u64) -> io::Result<()> {
    let file = storage.edit_side(&path(dir, number))?;
    let (mut at, mut bytes) = (from, Vec::new());
    while at < held.bytes {
        bytes.resize((held.bytes - at).min(WINDOW_BYTES as u64) as usize, 0);
        held.handle.read_at(at, &mut bytes)?;
        match file.write_at(at, &bytes) {
            // The same bytes are there already.
            Err(error) if is_exhausted(&error) => {}
            written => written?,
        }
        at += bytes.len() as u64;
    }
    file.sync()
}

fn load_all(storage: &dyn Storage, dir: &Path, mut each: impl FnMut(&Noted)) -> Result<Loaded, OpenError> {
    let numbers = numbers(storage, dir)?;
    let Some(&highest) = numbers.last() else { return Ok(Loaded { files: BTreeMap::new(), next_number: 1 }) };
    let mut files = BTreeMap::new();
    let mut link = newest(storage, dir, &numbers)?;
    let mut is_complete = false;
    while let Some((number, header, held)) = link.take() {
        is_complete = header.is_complete;
        files.insert(number, held);
        link = match header.before {
            Some(before) => Some(named(storage, dir, before)?),
            None => None,
        };
    }
    let newest = files.keys().last().copied();
    for (&number, held) in &mut files {
        let must_be_whole = Some(number) != newest;
        read_all(dir, number, held, must_be_whole, std::mem::take(&mut is_complete), &mut each)?;
    }
    Ok(Loaded { files, next_number: highest + 1 })
}

type Link = (u32, FileHeader, Held);

/// The newest file that was begun. Above it there may be such as a crash left without a header.
fn newest(storage: &dyn Storage, dir: &Path, numbers: &[u32]) -> Result<Option<Link>, OpenError> {
    for &number in numbers.iter().rev() {
        let held = open(storage, dir, number)?;
        match header_of(dir, number, &held)? {
            Ok(header) => return Ok(Some((number, header, held))),
            Err(why) => {
                let damaged = OpenError::DamagedFile { path: path(dir, number), at: 0, why };
                let mut behind = Batches { at: 0, ..Batches::new(number, &held) };
                let has_later_batch = behind.has_later_batch().map_err(|error| reading(dir, number, error))?;
                // The first file goes on from none, and files before any other are removed only for one that is whole.
                let is_without_those_before = number == numbers[0] && number > 1;
                if has_later_batch || is_without_those_before {
                    return Err(damaged);
                }
            }
        }
    }
    Ok(None)
}

/// A file that another goes on from.
fn named(storage: &dyn Storage, dir: &Path, end: FileEnd) -> Result<Link, OpenError> {
    let mut held = open(storage, dir, end.number)?;
    let damaged = |at, why| OpenError::DamagedFile { path: path(dir, end.number), at, why };
    let header = header_of(dir, end.number, &held)?.map_err(|why| damaged(0, why))?;
    if held.bytes < end.bytes {
        return Err(damaged(held.bytes, "the file is shorter than it was"));
    }
    held.bytes = end.bytes;
    Ok((end.number, header, held))
}

fn open(storage: &dyn Storage, dir: &Path, number: u32) -> Result<Held, OpenError> {
    let path = path(dir, number);
    let opened = storage.open_side(&path).and_then(|handle| Ok(Held { bytes: handle.len()?, handle }));
    opened.map_err(|source| OpenError::Io { action: "opening", path, source })
}

fn header_of(dir: &Path, number: u32, held: &Held) -> Result<Result<FileHeader, &'static str>, OpenError> {
    let mut head = vec![0; (FILE_HEADER_BYTES as u64).min(held.bytes) as usize];
    held.handle.read_at(0, &mut head).map_err(|error| reading(dir, number, error))?;
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

/// Reads a file to its end, and sets the end to where it counts.
pub(super) fn read_all(
    dir: &Path,
    number: u32,
    held: &mut Held,
    must_be_whole: bool,
    is_complete: bool,
    each: &mut impl FnMut(&Noted),
) -> Result<(), LettersError> {
    let mut batches = Batches::new(number, held);
    let mut has_totals = false;
    loop {
        let fault = match batches.next() {
            Ok(Some(batch)) => {
                has_totals |= batch.iter().any(|noted| matches!(noted.change, Change::Totals(_)));
                batch.iter().for_each(&mut *each);
                continue;
            }
            Ok(None) if is_complete && !has_totals => ReadFault::Damaged("a complete file is cut short"),
            Ok(None) => break,
            Err(fault) => fault,
        };
        let is_torn = matches!(fault, ReadFault::Damaged(_)) && !must_be_whole && (has_totals || !is_complete);
        let later = is_torn.then(|| batches.has_later_batch()).transpose();
        // A write that was cut short: nobody was told that it is durable.
        if later.map_err(|error| ReadFault::Io(error).of(path(dir, number), batches.at))? == Some(false) {
            break;
        }
        return Err(fault.of(path(dir, number), batches.at));
    }
    held.bytes = batches.at;
    Ok(())
}
