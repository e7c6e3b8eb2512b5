//! The operating system's file system, bound to one opened folder.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, TryLockError};
use std::io::{self, Read as _, Write as _};
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf, absolute};
use std::sync::Arc;

use rustix::fs::{
    AtFlags, Dir, FallocateFlags, Mode, OFlags, Stat, fallocate, fstat, fsync, mkdirat, openat, renameat, statat,
    unlinkat,
};
use rustix::io::{Errno, retry_on_intr};

use super::memory::Memory;
use super::{Lock, SideFile, Storage};
use crate::sync::{Mutex, lock};

#[derive(Debug)]
struct FolderLock(#[expect(dead_code, reason = "held for its lock, which ends when the file is closed")] File);
impl Lock for FolderLock {}

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
        synced(self.sync_data())
    }
}

/// The page size: a page becomes dirty, and is written by a sync, as a whole. Smaller pages cost more instructions per
/// byte, larger ones more bytes per sync (docs/decisions/0006).
const SMALL_PAGE_BYTES: u64 = 32 << 10;

/// Zeroing syncs after this many bytes. This bounds the writes that a concurrent sync finds ahead of itself in the
/// disk's queue.
const ZERO_STEP_BYTES: u64 = 4 << 20;

/// The operating system's files in one folder and its subfolders.
///
/// Bound to the opened folder, not to its name: every operation goes through the folder's descriptor. Changing the
/// working directory, redirecting a link, and renaming or replacing the folder have no effect.
#[derive(Debug)]
pub(crate) struct Files {
    /// The absolute path of the folder. Paths passed to the operations begin with it. Otherwise it appears only in
    /// errors.
    root: PathBuf,
    dir: Arc<OwnedFd>,
    /// Subfolders that have been opened, by their path relative to the root. These are bound to their descriptors too.
    folders: Mutex<HashMap<PathBuf, Arc<OwnedFd>>>,
}

impl Files {
    /// Opens the folder of a store, creating it and its parents durably.
    pub(crate) fn create(dir: &Path) -> io::Result<Self> {
        // Resolved once, because the working directory may change.
        let dir = absolute(dir)?;
        create_dir(&dir)?;
        Self::open(&dir)
    }

    /// Opens the folder of a store.
    pub(crate) fn open(dir: &Path) -> io::Result<Self> {
        let root = absolute(dir)?;
        let dir = open_at(rustix::fs::CWD, root.as_os_str(), FOLDER)?;
        Ok(Self { root, dir: Arc::new(dir), folders: Mutex::default() })
    }

    /// Returns the absolute path that the folder had when it was opened.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// Opens a file for reading.
    pub(crate) fn open_file(&self, path: &Path) -> io::Result<File> {
        self.file(path, OFlags::RDONLY)
    }

    /// Returns the metadata of every entry of a folder, sorted by name. Does not follow links.
    pub(crate) fn list_with_stat(&self, dir: &Path) -> io::Result<Vec<(String, Stat)>> {
        let folder = self.folder(dir)?;
        let mut all = Vec::new();
        for name in names(&folder)? {
            match statat(&*folder, name.as_os_str(), AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => all.push((name.to_string_lossy().into_owned(), stat)),
                // Removed while the folder was being read.
                Err(Errno::NOENT) => {}
                Err(error) => return Err(error.into()),
            }
        }
        all.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(all)
    }

    /// Returns `true` if the folder is locked. Checks by taking the lock for an instant.
    pub(crate) fn is_locked(&self) -> io::Result<bool> {
        match again(&self.dir)?.try_lock_shared() {
            Ok(()) => Ok(false),
            Err(TryLockError::WouldBlock) => Ok(true),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    fn file(&self, path: &Path, flags: OFlags) -> io::Result<File> {
        let (folder, name) = self.locate(path)?;
        open_at(&*folder, name, flags).map(File::from)
    }

    /// Returns the folder of a file, and the name of the file in it.
    fn locate<'p>(&self, path: &'p Path) -> io::Result<(Arc<OwnedFd>, &'p OsStr)> {
        let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
            unreachable!("{}: not a file of the store", path.display());
        };
        Ok((self.folder(folder)?, name))
    }

    fn folder(&self, path: &Path) -> io::Result<Arc<OwnedFd>> {
        let Ok(below) = path.strip_prefix(&self.root) else {
            unreachable!("{}: not in {}", path.display(), self.root.display());
        };
        self.find(&mut lock(&self.folders), below)
    }

    fn find(&self, folders: &mut HashMap<PathBuf, Arc<OwnedFd>>, below: &Path) -> io::Result<Arc<OwnedFd>> {
        let (Some(parent), Some(name)) = (below.parent(), below.file_name()) else { return Ok(Arc::clone(&self.dir)) };
        if let Some(held) = folders.get(below) {
            // The descriptor of a removed folder is stale; a new folder may have the same name.
            if fstat(held)?.st_nlink > 0 {
                return Ok(Arc::clone(held));
            }
            folders.remove(below);
        }
        let parent = self.find(folders, parent)?;
        let folder = Arc::new(open_at(&*parent, name, FOLDER)?);
        folders.insert(below.to_owned(), Arc::clone(&folder));
        Ok(folder)
    }
}

impl Storage for Files {
    fn create_dir(&self, dir: &Path) -> io::Result<()> {
        if dir == self.root {
            return Ok(());
        }
        match self.folder(dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            // A process may have been killed between creating the folder and syncing its parent.
            found => return found.and_then(|_| sync_folder(&*self.locate(dir)?.0)),
        }
        // The root exists, so the recursion ends.
        self.create_dir(dir.parent().unwrap_or(&self.root))?;
        let (parent, name) = self.locate(dir)?;
        match mkdirat(&*parent, name, Mode::from_raw_mode(0o777)) {
            Err(Errno::EXIST) => {}
            made => made?,
        }
        sync_folder(&*parent)?;
        self.folder(dir).map(drop)
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        let names = names(&*self.folder(dir)?)?;
        let mut names: Vec<_> = names.iter().map(|name| name.to_string_lossy().into_owned()).collect();
        names.sort();
        Ok(names)
    }

    fn lock(&self, dir: &Path) -> io::Result<Option<Box<dyn Lock>>> {
        let folder = again(&*self.folder(dir)?)?;
        match folder.try_lock() {
            Ok(()) => Ok(Some(Box::new(FolderLock(folder)))),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        let mut content = Vec::new();
        self.open_file(path)?.read_to_end(&mut content)?;
        Ok(content)
    }

    fn write(&self, path: &Path, content: &[u8]) -> io::Result<()> {
        let mut file = self.file(path, OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC)?;
        file.write_all(content)?;
        synced(file.sync_all())
    }

    fn append(&self, path: &Path, content: &[u8]) -> io::Result<()> {
        let mut file = self.file(path, OFlags::WRONLY | OFlags::CREATE | OFlags::APPEND)?;
        let before = file.metadata()?.len();
        file.write_all(content).inspect_err(|error| {
            // A retry must not append behind a partial write of the same content.
            if let Err(again) = file.set_len(before) {
                tracing::warn!(path = %path.display(), %error, %again, "a failed append left a part of its content in the file");
            }
        })?;
        synced(file.sync_all())
    }

    fn create_side(&self, path: &Path) -> io::Result<Box<dyn SideFile>> {
        Ok(Box::new(self.file(path, OFlags::RDWR | OFlags::CREATE | OFlags::TRUNC)?))
    }

    fn open_side(&self, path: &Path) -> io::Result<Box<dyn SideFile>> {
        Ok(Box::new(self.open_file(path)?))
    }

    fn edit_side(&self, path: &Path) -> io::Result<Box<dyn SideFile>> {
        Ok(Box::new(self.file(path, OFlags::RDWR)?))
    }

    fn create_segment(&self, path: &Path, bytes: u64) -> io::Result<Memory> {
        let file = self.file(path, OFlags::RDWR | OFlags::CREATE | OFlags::EXCL)?;
        let made =
            allocate(&file, bytes).and_then(|()| synced(file.sync_all())).and_then(|()| Memory::map(&file, true));
        if made.is_err()
            && let Err(error) = self.remove(path)
        {
            tracing::warn!(path = %path.display(), %error, "an unfinished segment could not be removed");
        }
        made
    }

    fn zero(&self, path: &Path, from: u64) -> io::Result<()> {
        let file = self.file(path, OFlags::WRONLY)?;
        let bytes = file.metadata()?.len();
        let zeros = [0; SMALL_PAGE_BYTES as usize];
        let mut at = from;
        while at < bytes {
            // ext4 caches the bytes of one call in one page of this size, unless some of them are cached already.
            let end = (at + 1).next_multiple_of(SMALL_PAGE_BYTES).min(bytes);
            file.write_all_at(&zeros[..(end - at) as usize], at)?;
            // Without these syncs the kernel would write everything at once, possibly ahead of a sync that publishers
            // wait for.
            if end.is_multiple_of(ZERO_STEP_BYTES) {
                synced(file.sync_data())?;
            }
            at = end;
        }
        synced(file.sync_data())
    }

    fn open_segment(&self, path: &Path, writable: bool) -> io::Result<Memory> {
        let file = self.file(path, if writable { OFlags::RDWR } else { OFlags::RDONLY })?;
        let bytes = file.metadata()?.len();
        if bytes == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file is empty"));
        }
        if writable {
            // A copied or restored file may have holes. On a full disk, storing into a hole could raise SIGBUS.
            allocate(&file, bytes)?;
        }
        Memory::map(&file, writable)
    }

    fn sync(&self, memory: &Memory, range: Range<usize>) -> io::Result<()> {
        synced(memory.sync(range))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let ((from_folder, from), (to_folder, to)) = (self.locate(from)?, self.locate(to)?);
        Ok(renameat(&*from_folder, from, &*to_folder, to)?)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let (folder, name) = self.locate(path)?;
        Ok(unlinkat(&*folder, name, AtFlags::empty())?)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        sync_folder(&*self.folder(dir)?)
    }

    fn boot_id(&self) -> u64 {
        let id = fs::read("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        if id.is_empty() { 0 } else { xxhash_rust::xxh3::xxh3_64(&id).max(1) }
    }
}

/// Makes the name of an existing folder durable, because the process that created it may have been killed before
/// syncing it.
fn sync_found(dir: &Path, parent: &Path) -> io::Result<()> {
    // A mount point is not created by creating a folder, and its parent may be in a file system that cannot sync.
    if fs::metadata(dir)?.dev() != fs::metadata(parent)?.dev() {
        return Ok(());
    }
    match File::open(parent) {
        // A folder in an unreadable parent could not be made durable when it was created; that was an error at the
        // time.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(()),
        parent => parent?.sync_all(),
    }
}

/// A failed sync. Any error is final: unsynced data may be lost, and the next sync would not report the loss.
#[derive(Debug, thiserror::Error)]
#[error("a sync failed: {0}")]
struct SyncFailed(io::Error);

fn synced(result: io::Result<()>) -> io::Result<()> {
    result.map_err(|error| io::Error::other(SyncFailed(error)))
}

/// Syncs an open folder. Retries if a signal interrupts it.
fn sync_folder(folder: impl AsFd) -> io::Result<()> {
    synced(retry_on_intr(|| fsync(&folder)).map_err(io::Error::from))
}

/// Allocates all blocks of a file up to `bytes`.
fn allocate(file: &File, bytes: u64) -> io::Result<()> {
    Ok(retry_on_intr(|| fallocate(file, FallocateFlags::empty(), 0, bytes))?)
}

/// The flags for opening a folder. A read-only descriptor suffices for syncing and locking.
const FOLDER: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY);

fn open_at(folder: impl AsFd, name: &OsStr, flags: OFlags) -> io::Result<OwnedFd> {
    let mode = Mode::from_raw_mode(0o666);
    Ok(retry_on_intr(|| openat(&folder, name, flags | OFlags::CLOEXEC, mode))?)
}

/// Opens a folder again through its descriptor. A lock belongs to one open file description, and ends when that
/// description is closed.
fn again(folder: &OwnedFd) -> io::Result<File> {
    open_at(folder, OsStr::new("."), FOLDER).map(File::from)
}

fn names(folder: &OwnedFd) -> io::Result<Vec<OsString>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(folder)? {
        let entry = entry?;
        let name = OsStr::from_bytes(entry.file_name().to_bytes());
        if name != "." && name != ".." {
            names.push(name.to_owned());
        }
    }
    Ok(names)
}

/// Creates a folder and its parents durably. Succeeds if the folder exists.
fn create_dir(dir: &Path) -> io::Result<()> {
    let Some(parent) = dir.parent() else { return Ok(()) };
    if dir.is_dir() {
        return sync_found(dir, parent);
    }
    create_dir(parent)?;
    match fs::create_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && dir.is_dir() => Ok(()),
        Err(error) => Err(error),
        Ok(()) => File::open(parent)?.sync_all(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::is_exhausted;
    use super::*;

    #[test]
    fn zeroing_keeps_the_bytes_before_its_start_and_the_length_of_the_file() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("segment");
        let files = Files::open(dir.path()).expect("opened");
        for bytes in [1, 4096, 4097, 32 << 10, 100_000] {
            for from in [0, 1, 4096] {
                fs::write(&path, vec![0xff; bytes]).expect("written");
                files.zero(&path, from).expect("zeroed");
                let kept = bytes.min(from as usize);
                let found = fs::read(&path).expect("read");
                assert_eq!(found.len(), bytes);
                assert!(found[..kept].iter().all(|&byte| byte == 0xff), "{bytes} bytes from {from}");
                assert!(found[kept..].iter().all(|&byte| byte == 0), "{bytes} bytes from {from}");
            }
        }
    }

    #[test]
    fn only_a_lack_of_resources_may_be_retried_and_a_failed_sync_never() {
        let again = [Errno::NOSPC, Errno::DQUOT, Errno::MFILE, Errno::NFILE, Errno::NOMEM, Errno::INTR, Errno::AGAIN];
        for errno in again {
            assert!(is_exhausted(&errno.into()), "{errno}");
            let error = synced(Err(errno.into())).expect_err("failed");
            assert!(!is_exhausted(&error), "{error}");
            assert!(error.to_string().contains(&io::Error::from(errno).to_string()), "{error}");
        }
        for errno in [Errno::IO, Errno::NOENT, Errno::ACCESS, Errno::ROFS, Errno::NODEV, Errno::FBIG, Errno::BADF] {
            assert!(!is_exhausted(&errno.into()), "{errno}");
        }
    }

    #[test]
    fn a_partial_append_is_undone() {
        let dir = tempfile::tempdir().expect("a folder");
        let mount = |args: &[&str]| {
            let mounted = std::process::Command::new(args[0]).args(&args[1..]).arg(dir.path()).output();
            mounted.is_ok_and(|output| output.status.success())
        };
        if !mount(&["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs"]) {
            eprintln!("skipped: mounting needs root");
            return;
        }
        let path = dir.path().join("notes");
        let files = Files::open(dir.path()).expect("opened");
        let done = files.append(&path, b"one\n").map(|()| files.append(&path, &[b'x'; 100_000]).err());
        let left = files.read(&path);
        drop(files);
        assert!(mount(&["umount"]));
        let error = done.expect("there is room for the first").expect("there is none for the second");
        assert!(is_exhausted(&error), "{error}");
        assert_eq!(left.expect("read"), b"one\n");
    }
}
