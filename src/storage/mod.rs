//! What the log asks of a file system, as a trait: the real one here, its faulty twin in `testing`.
//!
//! Every creation, rename and removal is followed by a `sync_dir` of its folder; whoever calls these
//! functions says when, because a crash between two of them is what recovery is tested with.

mod files;
pub(crate) mod framed;
pub(crate) mod memory;

use std::fmt::Debug;
use std::io;
use std::ops::Range;
use std::path::Path;

use rustix::io::Errno;

pub(crate) use files::Files;

use memory::Memory;

/// A held lock; released when dropped.
pub(crate) trait Lock: Debug + Send + Sync {}

/// The file system under a store.
pub(crate) trait Storage: Debug + Send + Sync {
    /// Creates a folder and its parents, durably; makes the name of one that exists durable.
    fn create_dir(&self, dir: &Path) -> io::Result<()>;
    /// The names in a folder, sorted.
    fn list(&self, dir: &Path) -> io::Result<Vec<String>>;
    /// Takes the lock of a folder, whatever its name is now; `None` when somebody else holds it.
    fn lock(&self, dir: &Path) -> io::Result<Option<Box<dyn Lock>>>;
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

/// Returns `true` if an operation other than a sync failed for lack of something that may come back (space, quota, descriptors,
/// memory) or was interrupted. It changed nothing then, and is tried again.
pub(crate) fn is_exhausted(error: &io::Error) -> bool {
    use io::ErrorKind::{Interrupted, OutOfMemory, QuotaExceeded, StorageFull, WouldBlock};
    let kinds = [StorageFull, QuotaExceeded, OutOfMemory, Interrupted, WouldBlock];
    let descriptors = [Errno::MFILE, Errno::NFILE].map(|errno| Some(errno.raw_os_error()));
    kinds.contains(&error.kind()) || descriptors.contains(&error.raw_os_error())
}

/// Replaces a small file so that a crash leaves the old or the new one, whole.
pub(crate) fn replace(storage: &dyn Storage, dir: &Path, name: &str, content: &[u8]) -> io::Result<()> {
    let fresh = dir.join(format!("{name}.new"));
    storage.write(&fresh, content)?;
    storage.rename(&fresh, &dir.join(name))?;
    storage.sync_dir(dir)
}
