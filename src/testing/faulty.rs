//! A disk in memory that fails on demand: the faulty twin of the file system.
//!
//! It keeps live content (written) apart from durable content (synced). A crash discards the difference, as a power cut
//! does.

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

impl<A: Aggregate> Builder<A> {
    /// Puts the store on a storage that fails on demand, instead of the file system.
    #[must_use]
    pub fn faulty_storage(self, storage: &FaultyStorage) -> Self {
        self.storage(Arc::new(storage.clone()))
    }
}

/// A disk in memory that fails on demand. Clones are the same disk.
///
/// It keeps live content (written) apart from durable content (synced). [`FaultyStorage::crash`] discards the
/// difference, as a power cut does; [`FaultyStorage::fail_sync`] makes the n-th sync fail.
///
/// ```
/// use corelane::envelope::Envelope;
/// use corelane::testing::{FaultyStorage, Unsynced};
/// use corelane::{Config, Deadline, EventLog, Sequence, ShardId};
///
/// let disk = FaultyStorage::new();
/// let config = || Config::new("/store").segment_bytes(64 << 10);
/// let engine = EventLog::<Envelope>::builder(config()).faulty_storage(&disk).open()?;
/// let event = Envelope::from_json(r#"{"event_type":"joined","timestamp":0,"user_id":7,"payload":{}}"#)?;
/// engine.producer().publish(event.key(), event)?;
/// engine.flush(Deadline::NEVER)?;
/// drop(engine);
/// disk.crash(Unsynced::Lost);
///
/// let engine = EventLog::<Envelope>::builder(config()).faulty_storage(&disk).open()?;
/// assert_eq!(engine.shard_metrics()[0].sequence, Sequence(1), "the event was durable");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Default)]
pub struct FaultyStorage(Arc<Mutex<Disk>>);

#[derive(Debug, Default)]
struct Disk {
    files: BTreeMap<PathBuf, File>,
    /// Names as of their folder's last sync.
    durable_names: BTreeMap<PathBuf, File>,
    /// Locked folders.
    locked: BTreeSet<PathBuf>,
    syncs: u64,
    fail_sync_at: Option<u64>,
    segment_bytes_left: Option<u64>,
    operations: u64,
    fail_operation_at: Option<u64>,
    /// From this operation on, every operation except a sync fails with this errno.
    exhausted: Option<(u64, i32)>,
    /// The disk is gone once operations and syncs together reach this number.
    gone_at: Option<u64>,
    held: bool,
    side_files_refused: bool,
    files_refused: bool,
    /// Number of crashes, each of which is followed by a boot.
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

/// Live content, durable content, and `true` if a sync has something to write. A failed sync clears the flag too: later
/// syncs write nothing until the file is written again.
type Content = (Vec<u8>, Vec<u8>, bool);

#[derive(Debug, Clone)]
enum File {
    Small(Arc<Mutex<Content>>),
    Segment(Arc<Heap>),
}

/// The fate of unsynced bytes in a power cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unsynced {
    /// All are lost.
    Lost,
    /// Each 512-byte sector survives or not at random, from this seed.
    Random(u64),
}

impl Unsynced {
    /// The state of the random generator; 0 if nothing survives.
    fn seed(self) -> u64 {
        match self {
            Self::Lost => 0,
            Self::Random(seed) => seed | 1,
        }
    }
}

impl FaultyStorage {
    /// Returns an empty disk.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Simulates a power cut: unsynced bytes are lost or, sector by sector, kept at random. The engine that used the
    /// disk must be gone.
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

    /// Returns the disk that a power cut at this moment would leave. This disk and its engine continue unharmed;
    /// nothing may be appended during the call.
    #[must_use]
    pub fn after_crash(&self, unsynced: Unsynced) -> Self {
        // Locked to the end: the running engine's keeper renames and blanks segments at any time.
        let disk = lock(&self.0);
        let mut random = unsynced.seed();
        let files: BTreeMap<_, _> =
            disk.durable_names.iter().map(|(path, file)| (path.clone(), file.after_crash(&mut random))).collect();
        let boot = disk.boot + 1;
        Self(Arc::new(Mutex::new(Disk { durable_names: files.clone(), files, boot, ..Disk::default() })))
    }

    /// Simulates that nothing was ever synced: no name is durable, and no byte of the files that `grows` accepts. (Pass
    /// the files that grow in place; files that are replaced as a whole keep their content.)
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

    /// Returns every file with its live content. Nothing may be appended during the call.
    #[must_use]
    pub fn files(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let content = |file: &File| match file {
            File::Small(content) => lock(content).0.clone(),
            File::Segment(heap) => Memory::heap(Arc::clone(heap)).read(0, heap.len()).unwrap_or_default().to_vec(),
        };
        lock(&self.0).files.iter().map(|(path, file)| (path.clone(), content(file))).collect()
    }

    /// Returns a disk that holds exactly these files, all durable. Files named `*.seg` are segments.
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

    /// Makes the `n`-th sync from now fail with an I/O error; 1 is the next.
    pub fn fail_sync(&self, n: u64) {
        let mut disk = lock(&self.0);
        disk.fail_sync_at = Some(disk.syncs + n);
    }

    /// Makes the `n`-th operation from now fail with an I/O error, not counting syncs; 1 is the next.
    pub fn fail_operation(&self, n: u64) {
        let mut disk = lock(&self.0);
        disk.fail_operation_at = Some(disk.operations + n);
    }

    /// Makes every operation fail with `errno`, from the `n`-th operation from now (1 is the next) until
    /// [`FaultyStorage::heal`]. Syncs still succeed. Use it for exhausted resources, such as file descriptors.
    pub fn exhaust(&self, n: u64, errno: i32) {
        let mut disk = lock(&self.0);
        disk.exhausted = Some((disk.operations + n, errno));
    }

    /// Returns `true` if an operation has failed because of [`FaultyStorage::exhaust`].
    #[must_use]
    pub fn is_exhausted(&self) -> bool {
        let disk = lock(&self.0);
        disk.exhausted.is_some_and(|(from, _)| disk.operations >= from)
    }

    /// Takes the disk away before the `n`-th operation or sync from now (1 is the next). That one and all later ones
    /// fail, and the content stays as it is until a crash.
    pub fn be_gone(&self, n: u64) {
        let mut disk = lock(&self.0);
        disk.gone_at = Some(disk.operations + disk.syncs + n);
    }

    /// Refuses to create files of saved states while `refused` is `true`.
    pub fn refuse_side_files(&self, refused: bool) {
        lock(&self.0).side_files_refused = refused;
    }

    /// Ends every failure. A disk that was gone comes back with its live content. [`FaultyStorage::be_gone`] followed
    /// by this simulates a killed process, whose unsynced bytes the operating system still has.
    pub fn heal(&self) {
        let mut disk = lock(&self.0);
        (disk.fail_sync_at, disk.fail_operation_at, disk.gone_at) = (None, None, None);
        disk.exhausted = None;
    }

    /// Refuses writes to every file except existing segments while `refused` is `true`, as a full disk does.
    pub fn refuse_files(&self, refused: bool) {
        lock(&self.0).files_refused = refused;
    }

    /// Sets how many bytes of segments may still be created before the disk is full; `None` means no limit.
    pub fn set_space(&self, bytes: Option<u64>) {
        lock(&self.0).segment_bytes_left = bytes;
    }

    /// Makes every operation and sync wait while `held` is `true`, as on a disk that hangs.
    pub fn hold(&self, held: bool) {
        lock(&self.0).held = held;
    }

    /// Waits until the disk is not held, and locks it.
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

    /// The number of syncs of segments and files.
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
                // A file that grew may keep any part of its growth.
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

/// The lock of a folder; dropping it unlocks the folder.
#[derive(Debug)]
struct FolderLock(FaultyStorage, PathBuf);

impl Lock for FolderLock {}

impl Drop for FolderLock {
    fn drop(&mut self) {
        lock(&self.0.0).locked.remove(&self.1);
    }
}

/// An open small file.
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

    /// On a full disk, writes a part of the content, which is the harder case for the engine.
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
        // A disk that is gone keeps the file dirty: a killed process has synced nothing.
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
        Ok(is_free.then(|| Box::new(FolderLock(self.clone(), dir.to_owned())) as Box<dyn Lock>))
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

    /// Leaves the old content, which is the harder case for the engine.
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
        // Locked to the end: a crash comes before or after this sync.
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
