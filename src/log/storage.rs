//! What the log asks of a file system, as a trait: the real one here, its faulty twin in `testing`.
//!
//! Every creation, rename and removal is followed by a `sync_dir` of its folder; whoever calls these
//! functions says when, because a crash between two of them is what recovery is tested with.

use std::fmt::Debug;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write as _};
use std::ops::Range;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;

use rustix::fs::FallocateFlags;

use crate::log::mmap::Memory;

/// A held lock; released when dropped.
pub(crate) trait Lock: Debug + Send + Sync {}

#[derive(Debug)]
struct FileLock(#[expect(dead_code, reason = "held for its lock, which ends when it is closed")] File);
impl Lock for FileLock {}

/// The file system under a store.
pub(crate) trait Storage: Debug + Send + Sync {
    /// Creates a folder and its parents, durably; makes the name of one that exists durable.
    fn create_dir(&self, dir: &Path) -> io::Result<()>;
    /// The names in a folder, sorted.
    fn list(&self, dir: &Path) -> io::Result<Vec<String>>;
    /// Takes the store's lock; `None` when somebody else holds it.
    fn lock(&self, path: &Path) -> io::Result<Option<Box<dyn Lock>>>;
    /// A small file's content.
    fn read(&self, path: &Path) -> io::Result<Vec<u8>>;
    /// Creates or replaces a small file and syncs its content (not its folder).
    fn write(&self, path: &Path, content: &[u8]) -> io::Result<()>;
    /// Adds to a small file, creating it if need be, and syncs it.
    fn append(&self, path: &Path, content: &[u8]) -> io::Result<()>;
    /// Creates an empty side file, or makes one empty.
    fn create_side(&self, path: &Path) -> io::Result<Box<dyn SideFile>>;
    /// Opens a side file for reading.
    fn open_side(&self, path: &Path) -> io::Result<Box<dyn SideFile>>;
    /// Opens a side file that exists, for reading and writing.
    fn edit_side(&self, path: &Path) -> io::Result<Box<dyn SideFile>>;
    /// Creates a file of `bytes` real blocks and maps it. Leaves no file behind when it fails.
    fn create_segment(&self, path: &Path, bytes: u64) -> io::Result<Memory>;
    /// Fills a file that nobody uses with zeros from `from` on, so that its content is present in pages of
    /// [`SMALL_PAGE_BYTES`], and lets them reach the disk step by step.
    fn zero(&self, path: &Path, from: u64) -> io::Result<()>;
    /// Maps an existing file; to be written: with all its blocks really there.
    fn open_segment(&self, path: &Path, writable: bool) -> io::Result<Memory>;
    /// Syncs a range of a mapped file (fdatasync's promise, for the range).
    fn sync(&self, memory: &Memory, range: Range<usize>) -> io::Result<()>;
    /// Renames; an existing target is replaced.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Removes a file.
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// Makes creations, renames and removals in a folder durable.
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;
    /// Which run of the machine this is: within it, what was written is read, synced or not. 0 where the system does not say.
    fn boot_id(&self) -> u64;
}

/// A file that grows at its end and is read anywhere.
pub(crate) trait SideFile: Debug + Send + Sync {
    /// Adds to its end. The operating system has it then; a sync makes it durable.
    fn append(&self, content: &[u8]) -> io::Result<()>;
    /// Writes over what stands at `at`, and grows the file if need be. A failed write may have written a part.
    fn write_at(&self, at: u64, content: &[u8]) -> io::Result<()>;
    /// Fills `out` with what stands at `at`.
    fn read_at(&self, at: u64, out: &mut [u8]) -> io::Result<()>;
    /// Its length.
    fn len(&self) -> io::Result<u64>;
    /// Makes all of it durable.
    fn sync(&self) -> io::Result<()>;
}

impl SideFile for File {
    fn append(&self, content: &[u8]) -> io::Result<()> {
        (&*self).write_all(content)
    }

    fn write_at(&self, at: u64, content: &[u8]) -> io::Result<()> {
        self.write_all_at(content, at)
    }

    fn read_at(&self, at: u64, out: &mut [u8]) -> io::Result<()> {
        self.read_exact_at(out, at)
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }
}

/// What becomes dirty, and is written by a sync, as a whole. Smaller costs more instructions a byte, larger more bytes
/// a sync (docs/decisions/0006).
const SMALL_PAGE_BYTES: u64 = 32 << 10;

/// How much a sync may find before it in the disk's queue.
const ZERO_STEP_BYTES: u64 = 4 << 20;

/// The operating system's files.
#[derive(Debug)]
pub(crate) struct Files;

impl Storage for Files {
    fn create_dir(&self, dir: &Path) -> io::Result<()> {
        let parent = match dir.parent() {
            Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
            Some(parent) => parent,
            None if dir.is_dir() => return Ok(()),
            None => return fs::create_dir(dir),
        };
        if dir.is_dir() {
            return sync_found(dir, parent);
        }
        self.create_dir(parent)?;
        match fs::create_dir(dir) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && dir.is_dir() => Ok(()),
            Err(error) => Err(error),
            Ok(()) => self.sync_dir(parent),
        }
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(dir)? {
            names.push(entry?.file_name().to_string_lossy().into_owned());
        }
        names.sort();
        Ok(names)
    }

    fn lock(&self, path: &Path) -> io::Result<Option<Box<dyn Lock>>> {
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(path)?;
        match file.try_lock() {
            Ok(()) => Ok(Some(Box::new(FileLock(file)))),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        fs::read(path)
    }

    fn write(&self, path: &Path, content: &[u8]) -> io::Result<()> {
        let mut file = File::create(path)?;
        file.write_all(content)?;
        file.sync_all()
    }

    fn append(&self, path: &Path, content: &[u8]) -> io::Result<()> {
        let mut file = OpenOptions::new().create(true).append(true).open(path)?;
        file.write_all(content)?;
        file.sync_all()
    }

    fn create_side(&self, path: &Path) -> io::Result<Box<dyn SideFile>> {
        let file = OpenOptions::new().create(true).truncate(true).read(true).write(true).open(path)?;
        Ok(Box::new(file))
    }

    fn open_side(&self, path: &Path) -> io::Result<Box<dyn SideFile>> {
        Ok(Box::new(File::open(path)?))
    }

    fn edit_side(&self, path: &Path) -> io::Result<Box<dyn SideFile>> {
        Ok(Box::new(OpenOptions::new().read(true).write(true).open(path)?))
    }

    fn create_segment(&self, path: &Path, bytes: u64) -> io::Result<Memory> {
        let file = OpenOptions::new().create_new(true).read(true).write(true).open(path)?;
        let made = rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, bytes)
            .map_err(io::Error::from)
            .and_then(|()| file.sync_all())
            .and_then(|()| Memory::map(&file, true));
        if made.is_err()
            && let Err(error) = fs::remove_file(path)
        {
            tracing::warn!(path = %path.display(), %error, "an unfinished segment stays behind");
        }
        made
    }

    fn zero(&self, path: &Path, from: u64) -> io::Result<()> {
        let file = OpenOptions::new().write(true).open(path)?;
        let bytes = file.metadata()?.len();
        let zeros = [0; SMALL_PAGE_BYTES as usize];
        let mut at = from;
        while at < bytes {
            // ext4 caches what one call writes in one page of that size, if nothing is cached there yet.
            let end = (at + 1).next_multiple_of(SMALL_PAGE_BYTES).min(bytes);
            file.write_all_at(&zeros[..(end - at) as usize], at)?;
            // Left to the system, all of it would be written at some time between two syncs that somebody waits for.
            if end.is_multiple_of(ZERO_STEP_BYTES) {
                file.sync_data()?;
            }
            at = end;
        }
        file.sync_data()
    }

    fn open_segment(&self, path: &Path, writable: bool) -> io::Result<Memory> {
        let file = OpenOptions::new().read(true).write(writable).open(path)?;
        let bytes = file.metadata()?.len();
        if bytes == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file is empty"));
        }
        if writable {
            // A copied or restored file may have holes; storing into one could be a SIGBUS on a full disk.
            rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, bytes)?;
        }
        Memory::map(&file, writable)
    }

    fn sync(&self, memory: &Memory, range: Range<usize>) -> io::Result<()> {
        memory.sync(range)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        File::open(dir)?.sync_all()
    }

    fn boot_id(&self) -> u64 {
        let id = fs::read("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        if id.is_empty() { 0 } else { xxhash_rust::xxh3::xxh3_64(&id).max(1) }
    }
}

/// Makes the name of a folder that is there durable: a process that was killed may have made it and not come to its sync.
fn sync_found(dir: &Path, parent: &Path) -> io::Result<()> {
    // Nobody makes a mount point by making a folder; and it may lie in a file system that cannot sync.
    if fs::metadata(dir)?.dev() != fs::metadata(parent)?.dev() {
        return Ok(());
    }
    match File::open(parent) {
        // Whoever may not read it could not make a folder there durably, and would have been told.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(()),
        parent => parent?.sync_all(),
    }
}

/// Whether somebody holds the lock of a file, which may be missing. It is held for an instant itself to find out.
pub(crate) fn is_locked(path: &Path) -> io::Result<bool> {
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        file => file?,
    };
    match file.try_lock_shared() {
        Ok(()) => Ok(false),
        Err(TryLockError::WouldBlock) => Ok(true),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// Replaces a small file so that a crash leaves the old or the new one, whole.
pub(crate) fn replace(storage: &dyn Storage, dir: &Path, name: &str, content: &[u8]) -> io::Result<()> {
    let fresh = dir.join(format!("{name}.new"));
    storage.write(&fresh, content)?;
    storage.rename(&fresh, &dir.join(name))?;
    storage.sync_dir(dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeroing_leaves_what_lies_before_it_and_nothing_behind() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("segment");
        for bytes in [1, 4096, 4097, 32 << 10, 100_000] {
            for from in [0, 1, 4096] {
                fs::write(&path, vec![0xff; bytes]).expect("written");
                Files.zero(&path, from).expect("zeroed");
                let kept = bytes.min(from as usize);
                let found = fs::read(&path).expect("read");
                assert_eq!(found.len(), bytes);
                assert!(found[..kept].iter().all(|&byte| byte == 0xff), "{bytes} bytes from {from}");
                assert!(found[kept..].iter().all(|&byte| byte == 0), "{bytes} bytes from {from}");
            }
        }
    }
}
