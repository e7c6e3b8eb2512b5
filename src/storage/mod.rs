//! The file system under a store, as a trait. The real implementation is in `files`, its fault-injecting twin in
//! `testing`.
//!
//! Every creation, rename and removal must be followed by a `sync_dir` of its folder. The caller makes that call,
//! because the tests of recovery crash between the two steps.

mod files;
pub(crate) mod framed;
pub(crate) mod memory;

use std::fmt::Debug;
use std::io;
use std::ops::Range;
use std::path::Path;

pub(crate) use crate::error::is_exhausted;
pub(crate) use files::Files;

use memory::Memory;

/// A held lock of a folder. Dropping it releases the lock.
pub(crate) trait Lock: Debug + Send + Sync {}

/// The file system under a store.
pub(crate) trait Storage: Debug + Send + Sync {
    /// Creates a folder and its parents, durably. If the folder exists, makes its name durable.
    fn create_dir(&self, dir: &Path) -> io::Result<()>;
    /// Returns the names in a folder, sorted.
    fn list(&self, dir: &Path) -> io::Result<Vec<String>>;
    /// Locks a folder; renaming the folder later does not affect the lock. Returns `None` if the lock is already held.
    fn lock(&self, dir: &Path) -> io::Result<Option<Box<dyn Lock>>>;
    /// Returns the content of a small file.
    fn read(&self, path: &Path) -> io::Result<Vec<u8>>;
    /// Creates or replaces a small file and syncs its content (not its folder).
    fn write(&self, path: &Path, content: &[u8]) -> io::Result<()>;
    /// Appends to a small file, creating it if necessary, and syncs it.
    fn append(&self, path: &Path, content: &[u8]) -> io::Result<()>;
    /// Creates an empty side file, or truncates an existing one.
    fn create_side(&self, path: &Path) -> io::Result<Box<dyn SideFile>>;
    /// Opens a side file for reading.
    fn open_side(&self, path: &Path) -> io::Result<Box<dyn SideFile>>;
    /// Opens an existing side file for reading and writing.
    fn edit_side(&self, path: &Path) -> io::Result<Box<dyn SideFile>>;
    /// Creates a file of `bytes` allocated blocks and maps it. Leaves no file behind if it fails.
    fn create_segment(&self, path: &Path, bytes: u64) -> io::Result<Memory>;
    /// Fills an unused file with zeros from `from` on, which makes the kernel cache its content in pages of
    /// `SMALL_PAGE_BYTES`. Syncs the zeros in steps.
    fn zero(&self, path: &Path, from: u64) -> io::Result<()>;
    /// Maps an existing file. If `writable`, allocates all its blocks first.
    fn open_segment(&self, path: &Path, writable: bool) -> io::Result<Memory>;
    /// Syncs a range of a mapped file, with the guarantee of fdatasync for that range.
    fn sync(&self, memory: &Memory, range: Range<usize>) -> io::Result<()>;
    /// Renames a file, replacing an existing target.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Removes a file.
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// Makes creations, renames and removals in a folder durable.
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;
    /// Returns the id of the current boot of the machine, or 0 if it is unknown. Within one boot, reads return
    /// everything written, synced or not.
    fn boot_id(&self) -> u64;
}

/// A file that grows at its end and can be read at any position.
pub(crate) trait SideFile: Debug + Send + Sync {
    /// Appends to the file. The content then survives a kill of the process; only a sync makes it durable.
    fn append(&self, content: &[u8]) -> io::Result<()>;
    /// Overwrites the content at `at`, growing the file if necessary. A failed write may have written part of the
    /// content.
    fn write_at(&self, at: u64, content: &[u8]) -> io::Result<()>;
    /// Fills `out` with the content at `at`.
    fn read_at(&self, at: u64, out: &mut [u8]) -> io::Result<()>;
    /// Returns the length of the file in bytes.
    fn len(&self) -> io::Result<u64>;
    /// Makes the whole file durable.
    fn sync(&self) -> io::Result<()>;
}

/// Replaces a small file atomically: after a crash it has either its old or its new content.
pub(crate) fn replace(storage: &dyn Storage, dir: &Path, name: &str, content: &[u8]) -> io::Result<()> {
    let fresh = dir.join(format!("{name}.new"));
    storage.write(&fresh, content)?;
    storage.rename(&fresh, &dir.join(name))?;
    storage.sync_dir(dir)
}
