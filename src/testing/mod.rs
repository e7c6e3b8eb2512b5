//! For tests: rules without an engine ([`given`]), and a storage that fails on purpose, for what survives.
//!
//! The storage is the faulty twin of the file system.
//! It keeps what is live (written) apart from what is durable (synced). [`FaultyStorage::crash`] throws
//! the difference away, as a power cut does; [`FaultyStorage::fail_sync`] makes the n-th sync fail.

#[cfg(feature = "bench-support")]
#[doc(hidden)]
pub mod bench_support;
mod given;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::engine::Builder;
use crate::state::aggregate::Aggregate;
use crate::storage::memory::{Heap, Memory};
use crate::storage::{Lock, SideFile, Storage};
use crate::sync::{Mutex, lock};

pub use given::{Given, When, given};

impl<A: Aggregate> Builder<A> {
    /// Puts the store on a storage that fails on purpose.
    #[must_use]
    pub fn faulty_storage(self, storage: &FaultyStorage) -> Self {
        self.storage(Arc::new(storage.clone()))
    }
}

/// A disk in memory. Clones are the same disk.
#[derive(Debug, Clone, Default)]
pub struct FaultyStorage(Arc<Mutex<Disk>>);

#[derive(Debug, Default)]
struct Disk {
    files: BTreeMap<PathBuf, File>,
    /// Names as they were when their folder was last synced.
    durable_names: BTreeMap<PathBuf, File>,
    /// Folders whose lock is held.
    locked: BTreeSet<PathBuf>,
    syncs: u64,
    fail_sync_at: Option<u64>,
    segment_bytes_left: Option<u64>,
    operations: u64,
    fail_operation_at: Option<u64>,
    /// From this operation on none but syncs of folders succeeds; the system's number for why.
    exhausted: Option<(u64, i32)>,
    /// Operations and syncs together.
    gone_at: Option<u64>,
    held: bool,
    side_files_refused: bool,
    files_refused: bool,
    /// Which run of the machine this is.
    boot: u64,
}

impl Disk {
    fn takes_files(&self) -> io::Result<()> {
        if self.files_refused { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }

    fn is_gone(&self) -> bool {
        self.gone_at.is_some_and(|at| self.operations + self.syncs >= at)
    }
}

/// Live content, what of it is durable, and whether a sync has anything to write: after one that failed it has not, until it is written
/// again.
type Content = (Vec<u8>, Vec<u8>, bool);

#[derive(Debug, Clone)]
enum File {
    Small(Arc<Mutex<Content>>),
    Segment(Arc<Heap>),
}

/// What a power cut leaves of bytes that had not been synced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unsynced {
    /// Nothing.
    Lost,
    /// Each 512-byte sector by the toss of a coin, from this seed.
    Random(u64),
}

impl Unsynced {
    /// 0 where nothing survives.
    fn seed(self) -> u64 {
        match self {
            Self::Lost => 0,
            Self::Random(seed) => seed | 1,
        }
    }
}

impl FaultyStorage {
    /// An empty disk.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A power cut: what was not synced is lost (or, sector by sector, kept at random). The engine that used the disk must be gone.
    pub fn crash(&self, unsynced: Unsynced) {
        let mut disk = lock(&self.0);
        let mut random = unsynced.seed();
        let names = std::mem::take(&mut disk.durable_names);
        disk.files = names.into_iter().map(|(path, file)| (path, file.after_crash(&mut random))).collect();
        disk.durable_names = disk.files.clone();
        disk.locked.clear();
        disk.gone_at = None;
        disk.boot += 1;
    }

    /// The disk as a power cut at this moment would leave it. The engine on this one goes on and learns nothing of it;
    /// nothing must be being appended meanwhile.
    #[must_use]
    pub fn after_crash(&self, unsynced: Unsynced) -> Self {
        // Under the lock to the end: the keeper of the running engine renames and blanks segments all the time.
        let disk = lock(&self.0);
        let mut random = unsynced.seed();
        let files: BTreeMap<_, _> =
            disk.durable_names.iter().map(|(path, file)| (path.clone(), file.after_crash(&mut random))).collect();
        let boot = disk.boot + 1;
        Self(Arc::new(Mutex::new(Disk { durable_names: files.clone(), files, boot, ..Disk::default() })))
    }

    /// Plays that no sync has ever been asked for: no name is durable, and of the files that `grows` names (which are not replaced
    /// as a whole) no byte is.
    pub fn forget_syncs(&self, grows: impl Fn(&Path) -> bool) {
        let mut disk = lock(&self.0);
        disk.durable_names.clear();
        for (_, file) in disk.files.iter().filter(|(path, _)| grows(path)) {
            match file {
                File::Small(content) => {
                    let (_, durable, is_dirty) = &mut *lock(content);
                    durable.clear();
                    *is_dirty = true;
                }
                File::Segment(heap) => lock(&heap.durable).fill(0),
            }
        }
    }

    /// Every file with its live content. Nothing must be being appended meanwhile.
    #[must_use]
    pub fn files(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let content = |file: &File| match file {
            File::Small(content) => lock(content).0.clone(),
            File::Segment(heap) => Memory::heap(Arc::clone(heap)).read(0, heap.len()).unwrap_or_default().to_vec(),
        };
        lock(&self.0).files.iter().map(|(path, file)| (path.clone(), content(file))).collect()
    }

    /// A disk that holds exactly these files, all of them durable. What is called `*.seg` is a segment.
    #[must_use]
    pub fn with_files(files: impl IntoIterator<Item = (PathBuf, Vec<u8>)>) -> Self {
        let file = |path: &Path, content: Vec<u8>| match path.extension() {
            Some(extension) if extension == "seg" => File::Segment(Arc::new(Heap::new(content))),
            _ => File::Small(Arc::new(Mutex::new((content.clone(), content, false)))),
        };
        let files: BTreeMap<_, _> =
            files.into_iter().map(|(path, content)| (path.clone(), file(&path, content))).collect();
        Self(Arc::new(Mutex::new(Disk { durable_names: files.clone(), files, ..Disk::default() })))
    }

    /// Makes the `n`-th sync from now (1 is the next) fail with an I/O error.
    pub fn fail_sync(&self, n: u64) {
        let mut disk = lock(&self.0);
        disk.fail_sync_at = Some(disk.syncs + n);
    }

    /// Makes the `n`-th operation of any other kind from now fail with an I/O error.
    pub fn fail_operation(&self, n: u64) {
        let mut disk = lock(&self.0);
        disk.fail_operation_at = Some(disk.operations + n);
    }

    /// From the `n`-th operation from now on (1 is the next) every operation fails for want of something, until [`FaultyStorage::heal`]:
    /// `errno` is the system's number for what, such as that for too many open files. Syncs go on.
    pub fn exhaust(&self, n: u64, errno: i32) {
        let mut disk = lock(&self.0);
        disk.exhausted = Some((disk.operations + n, errno));
    }

    /// Whether an operation has failed for what [`FaultyStorage::exhaust`] says.
    #[must_use]
    pub fn is_exhausted(&self) -> bool {
        let disk = lock(&self.0);
        disk.exhausted.is_some_and(|(from, _)| disk.operations >= from)
    }

    /// Before the `n`-th operation or sync from now (1 is the next) the disk is gone: that one and all others fail, and what it holds
    /// stays as it is until a power cut.
    pub fn be_gone(&self, n: u64) {
        let mut disk = lock(&self.0);
        disk.gone_at = Some(disk.operations + disk.syncs + n);
    }

    /// From now on no file of saved states can be made, until this is taken back.
    pub fn refuse_side_files(&self, refused: bool) {
        lock(&self.0).side_files_refused = refused;
    }

    /// No sync and no operation fails any more. A disk that was gone answers again, with what it held: together with
    /// [`FaultyStorage::be_gone`] this plays a process that was killed, whose unsynced bytes the system still has.
    pub fn heal(&self) {
        let mut disk = lock(&self.0);
        (disk.fail_sync_at, disk.fail_operation_at, disk.gone_at) = (None, None, None);
        disk.exhausted = None;
    }

    /// From now on nothing can be written into any file but segments that are there, as on a full disk, until this is taken back.
    pub fn refuse_files(&self, refused: bool) {
        lock(&self.0).files_refused = refused;
    }

    /// Bytes of segments that may still be created before the disk is full; `None` for no limit.
    pub fn set_space(&self, bytes: Option<u64>) {
        lock(&self.0).segment_bytes_left = bytes;
    }

    /// From now on every operation and sync waits, as on a disk that hangs, until this is taken back.
    pub fn hold(&self, held: bool) {
        lock(&self.0).held = held;
    }

    /// The disk, once it is not held.
    fn answering(&self) -> impl std::ops::DerefMut<Target = Disk> {
        loop {
            let disk = lock(&self.0);
            if !disk.held {
                return disk;
            }
            drop(disk);
            crate::sync::nap(Duration::from_millis(1));
        }
    }

    /// Syncs so far, of segments and files.
    #[must_use]
    pub fn syncs(&self) -> u64 {
        lock(&self.0).syncs
    }

    fn operation<T>(&self, body: impl FnOnce(&mut Disk) -> io::Result<T>) -> io::Result<T> {
        self.numbered(|disk| {
            if let Some((from, errno)) = disk.exhausted
                && disk.operations >= from
            {
                return Err(io::Error::from_raw_os_error(errno));
            }
            body(disk)
        })
    }

    fn numbered<T>(&self, body: impl FnOnce(&mut Disk) -> io::Result<T>) -> io::Result<T> {
        let mut disk = self.answering();
        disk.operations += 1;
        if disk.is_gone() || disk.fail_operation_at == Some(disk.operations) {
            return Err(io::Error::other("injected failure of an operation"));
        }
        body(&mut disk)
    }
}

impl File {
    fn after_crash(&self, random: &mut u64) -> Self {
        match self {
            Self::Small(content) => {
                let (live, durable, _) = &*lock(content);
                let mut durable = durable.clone();
                // A file that grew may keep any part of what it grew by.
                if *random != 0 && live.starts_with(&durable) {
                    let grown = live.len() - durable.len();
                    durable.extend_from_slice(&live[durable.len()..][..*random as usize % (grown + 1)]);
                }
                Self::Small(Arc::new(Mutex::new((durable.clone(), durable, false))))
            }
            Self::Segment(heap) => {
                let live = Memory::heap(Arc::clone(heap));
                let mut content = lock(&heap.durable).clone();
                let live = if *random == 0 { &[] } else { live.read(0, content.len()).unwrap_or_default() };
                for (sector, written) in content.chunks_mut(512).zip(live.chunks(512)) {
                    if *random != 0 {
                        *random ^= *random << 13;
                        *random ^= *random >> 7;
                        *random ^= *random << 17;
                        if *random & 1 == 0 {
                            sector.copy_from_slice(written);
                        }
                    }
                }
                Self::Segment(Arc::new(Heap::new(content)))
            }
        }
    }
}

fn not_found() -> io::Error {
    io::Error::from(io::ErrorKind::NotFound)
}

#[derive(Debug)]
struct Held(FaultyStorage, PathBuf);
impl Lock for Held {}
impl Drop for Held {
    fn drop(&mut self) {
        lock(&self.0.0).locked.remove(&self.1);
    }
}

/// A small file that is kept open.
#[derive(Debug)]
struct Side(FaultyStorage, Arc<Mutex<Content>>);

impl SideFile for Side {
    fn append(&self, content: &[u8]) -> io::Result<()> {
        self.0.operation(|disk| {
            disk.takes_files()?;
            let file = &mut *lock(&self.1);
            file.0.extend_from_slice(content);
            file.2 = true;
            Ok(())
        })
    }

    /// On a full disk a part is written, which is the harder case.
    fn write_at(&self, at: u64, content: &[u8]) -> io::Result<()> {
        self.0.operation(|disk| {
            let taken = disk.takes_files();
            let content = if taken.is_ok() { content } else { &content[..content.len() / 2] };
            let (live, _, is_dirty) = &mut *lock(&self.1);
            let end = at as usize + content.len();
            live.resize(live.len().max(end), 0);
            live[at as usize..end].copy_from_slice(content);
            *is_dirty = true;
            taken
        })
    }

    fn read_at(&self, at: u64, out: &mut [u8]) -> io::Result<()> {
        let content = lock(&self.1);
        let end = (at as usize).saturating_add(out.len());
        out.copy_from_slice(content.0.get(at as usize..end).ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(lock(&self.1).0.len() as u64)
    }

    fn sync(&self) -> io::Result<()> {
        let mut disk = self.0.answering();
        disk.syncs += 1;
        let (live, durable, is_dirty) = &mut *lock(&self.1);
        // A killed process has asked for nothing.
        let is_gone = disk.is_gone();
        let was_dirty = !is_gone && std::mem::take(is_dirty);
        if is_gone || disk.fail_sync_at == Some(disk.syncs) {
            return Err(io::Error::other("injected failure of a sync"));
        }
        if was_dirty {
            durable.clone_from(live);
        }
        Ok(())
    }
}

impl Storage for FaultyStorage {
    fn boot_id(&self) -> u64 {
        lock(&self.0).boot + 1
    }

    fn create_dir(&self, _dir: &Path) -> io::Result<()> {
        self.operation(|_| Ok(()))
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        self.operation(|disk| {
            let mut names: Vec<String> = disk
                .files
                .keys()
                .filter_map(|path| path.strip_prefix(dir).ok()?.components().next())
                .map(|name| name.as_os_str().to_string_lossy().into_owned())
                .collect();
            names.dedup();
            Ok(names)
        })
    }

    fn lock(&self, dir: &Path) -> io::Result<Option<Box<dyn Lock>>> {
        let is_free = lock(&self.0).locked.insert(dir.to_owned());
        Ok(is_free.then(|| Box::new(Held(self.clone(), dir.to_owned())) as Box<dyn Lock>))
    }

    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        self.operation(|disk| match disk.files.get(path) {
            Some(File::Small(content)) => Ok(lock(content).0.clone()),
            _ => Err(not_found()),
        })
    }

    fn write(&self, path: &Path, content: &[u8]) -> io::Result<()> {
        self.operation(|disk| {
            disk.takes_files()?;
            disk.files.insert(
                path.to_owned(),
                File::Small(Arc::new(Mutex::new((content.to_vec(), content.to_vec(), false)))),
            );
            Ok(())
        })
    }

    fn append(&self, path: &Path, content: &[u8]) -> io::Result<()> {
        let file = self.operation(|disk| {
            let file = disk.files.entry(path.to_owned()).or_insert_with(|| File::Small(Arc::default()));
            match file {
                File::Small(small) => Ok(Side(self.clone(), Arc::clone(small))),
                File::Segment(_) => Err(io::ErrorKind::InvalidInput.into()),
            }
        })?;
        file.append(content)?;
        file.sync()
    }

    fn create_side(&self, path: &Path) -> io::Result<Box<dyn SideFile>> {
        self.operation(|disk| {
            disk.takes_files()?;
            if disk.side_files_refused {
                return Err(io::Error::other("injected refusal of a side file"));
            }
            let content = Arc::default();
            disk.files.insert(path.to_owned(), File::Small(Arc::clone(&content)));
            Ok(Box::new(Side(self.clone(), content)) as Box<dyn SideFile>)
        })
    }

    fn open_side(&self, path: &Path) -> io::Result<Box<dyn SideFile>> {
        self.operation(|disk| match disk.files.get(path) {
            Some(File::Small(content)) => Ok(Box::new(Side(self.clone(), Arc::clone(content))) as Box<dyn SideFile>),
            _ => Err(not_found()),
        })
    }

    fn edit_side(&self, path: &Path) -> io::Result<Box<dyn SideFile>> {
        self.open_side(path)
    }

    fn create_segment(&self, path: &Path, bytes: u64) -> io::Result<Memory> {
        self.operation(|disk| {
            if let Some(left) = &mut disk.segment_bytes_left {
                *left = left.checked_sub(bytes).ok_or_else(|| io::Error::from(io::ErrorKind::StorageFull))?;
            }
            let heap = Arc::new(Heap::new(vec![0; bytes as usize]));
            disk.files.insert(path.to_owned(), File::Segment(Arc::clone(&heap)));
            Ok(Memory::heap(heap))
        })
    }

    /// Leaves the old content, which is the harder case.
    fn zero(&self, path: &Path, _from: u64) -> io::Result<()> {
        self.operation(|disk| match disk.files.contains_key(path) {
            true => Ok(()),
            false => Err(io::ErrorKind::NotFound.into()),
        })
    }

    fn open_segment(&self, path: &Path, _writable: bool) -> io::Result<Memory> {
        self.operation(|disk| match disk.files.get(path) {
            Some(File::Segment(heap)) => Ok(Memory::heap(Arc::clone(heap))),
            _ => Err(not_found()),
        })
    }

    fn sync(&self, memory: &Memory, range: Range<usize>) -> io::Result<()> {
        // Locked to the end, so that a power cut comes before or after it.
        let mut disk = self.answering();
        disk.syncs += 1;
        if disk.is_gone() || disk.fail_sync_at == Some(disk.syncs) {
            return Err(io::Error::other("injected failure of a sync"));
        }
        memory.heap_backing().ok_or_else(|| io::Error::other("not a segment of this disk"))?.sync(range);
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.operation(|disk| {
            let file = disk.files.remove(from).ok_or_else(not_found)?;
            disk.files.insert(to.to_owned(), file);
            Ok(())
        })
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.operation(|disk| disk.files.remove(path).map(drop).ok_or_else(not_found))
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.numbered(|disk| {
            let here = |path: &PathBuf| path.parent() == Some(dir);
            disk.durable_names.retain(|path, _| !here(path));
            let live: Vec<_> = disk
                .files
                .iter()
                .filter(|(path, _)| here(path))
                .map(|(path, file)| (path.clone(), file.clone()))
                .collect();
            disk.durable_names.extend(live);
            Ok(())
        })
    }
}
