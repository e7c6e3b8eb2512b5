//! Memory of a segment: a mapped file, or plain memory where a test plays the disk.
//!
//! One writer: the holder of the [`WriteHalf`]. It writes only at and above its own position; readers
//! get only bytes below `committed`, which never exceeds that position. So no byte is ever written
//! while somebody may look at it, and that is what every unsafe block here rests on.
//!
//! Besides, it rests on the store's lock: no other process writes these files, and nobody shortens them.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

#[cfg(any(test, feature = "test-util"))]
pub(crate) use heap::Heap;

use crate::event::{Encode, Scratch, has_one_size};
use crate::sync::Watermark;

/// Records begin at multiples of this.
pub(crate) const ALIGN: usize = crate::event::ARCHIVE_ALIGN;

/// Rounds a record's exact length up to where the next one begins.
#[inline]
pub(crate) const fn padded(len: usize) -> usize {
    (len + ALIGN - 1) & !(ALIGN - 1)
}

/// The whole of a segment's memory.
#[derive(Debug)]
pub(crate) struct Memory {
    base: NonNull<u8>,
    bytes: usize,
    /// Readers may see what lies below.
    committed: Watermark,
    /// At and above this, every record was written by this process.
    written_from: usize,
    /// Mapped page by page rather than in large ones.
    small_pages: bool,
    backing: Backing,
}

#[derive(Debug)]
enum Backing {
    /// Kept for its unmapping when dropped.
    File { _map: memmap2::MmapRaw },
    #[cfg(any(test, feature = "test-util"))]
    Heap(Arc<Heap>),
}

// SAFETY: the pointer is to memory that `backing` owns and that any thread may access; who may
// access which bytes when is settled by `committed` and the uniqueness of `WriteHalf`.
unsafe impl Send for Memory {}
// SAFETY: as for Send: shared access reads only below `committed`.
unsafe impl Sync for Memory {}

impl Memory {
    /// Maps a whole file, to be written if `writable`. Everything is readable until a writer takes it.
    pub(crate) fn map(file: &File, writable: bool) -> io::Result<Self> {
        let options = memmap2::MmapOptions::new();
        let map = if writable { options.map_raw(file)? } else { options.map_raw_read_only(file)? };
        let bytes = map.len();
        let base = NonNull::new(map.as_mut_ptr()).ok_or_else(|| io::Error::other("mapped at address 0"))?;
        Ok(Self {
            base,
            bytes,
            committed: Watermark::new(bytes as u64),
            written_from: bytes,
            small_pages: false,
            backing: Backing::File { _map: map },
        })
    }

    /// Memory that a test's storage keeps as a file's live content.
    #[cfg(any(test, feature = "test-util"))]
    pub(crate) fn heap(heap: Arc<Heap>) -> Self {
        let (base, bytes) = (heap.base, heap.layout.size());
        Self {
            base,
            bytes,
            committed: Watermark::new(bytes as u64),
            written_from: bytes,
            small_pages: false,
            backing: Backing::Heap(heap),
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.bytes
    }

    /// The heap behind it, if a test plays the disk.
    #[cfg(any(test, feature = "test-util"))]
    pub(crate) fn heap_backing(&self) -> Option<&Arc<Heap>> {
        match &self.backing {
            Backing::Heap(heap) => Some(heap),
            Backing::File { .. } => None,
        }
    }

    fn is_heap(&self) -> bool {
        match self.backing {
            Backing::File { .. } => false,
            #[cfg(any(test, feature = "test-util"))]
            Backing::Heap(_) => true,
        }
    }

    /// The committed position, in bytes from the segment's beginning.
    pub(crate) fn committed(&self) -> usize {
        self.committed.get() as usize
    }

    /// Bytes `[at, at + len)`, or `None` where they are not (yet) committed.
    #[inline]
    pub(crate) fn read(&self, at: usize, len: usize) -> Option<&[u8]> {
        let end = at.checked_add(len)?;
        if end > self.committed() {
            return None;
        }
        // SAFETY: at + len <= committed <= bytes, so the place lies in the memory.
        let start = unsafe { self.base.add(at) };
        // SAFETY: bytes below `committed` are initialised and are not written while `self` lives.
        Some(unsafe { std::slice::from_raw_parts(start.as_ptr(), len) })
    }

    /// Whether this process wrote what stands at `at`, so that it needs no checking.
    #[inline]
    pub(crate) fn is_own(&self, at: usize) -> bool {
        at >= self.written_from
    }

    /// The event archived in `[at, at + len)`. What this process wrote is taken as it is; other bytes
    /// are checked (their CRC is the caller's business). `E` must be the type the engine carries.
    #[inline]
    pub(crate) fn archived<E: Encode>(&self, at: usize, len: usize) -> Option<&E::Archived> {
        let bytes = self.read(at, len)?;
        if !self.is_own(at) {
            return E::access(bytes).ok();
        }
        // SAFETY: this process wrote these bytes by archiving an `E` here (one engine carries one
        // type, and readers of its memory are made by it alone); records are 16-aligned.
        Some(unsafe { rkyv::access_unchecked::<E::Archived>(bytes) })
    }

    /// Syncs `range` to the device; `Ok` means what fdatasync's success means, for that range.
    pub(crate) fn sync(&self, range: Range<usize>) -> io::Result<()> {
        if self.is_heap() {
            return Err(io::Error::other("plain memory is synced by the storage that owns it"));
        }
        let page = rustix::param::page_size();
        let start = range.start / page * page;
        let end = range.end.next_multiple_of(page).min(self.bytes);
        if self.small_pages {
            // Whole pages below the end are not written any more. Taken out of the address space all at once they need
            // one flush of the other cores' translations; the sync would make one for every page it cleans. Whoever
            // reads them finds them again in the system's cache.
            if let Err(error) = self.advise(start..range.end / page * page, rustix::mm::Advice::LinuxDontNeed) {
                tracing::debug!(%error, "synced pages stay in the address space");
            }
        }
        // SAFETY: start <= end <= bytes: the place lies in the memory.
        let at = unsafe { self.base.add(start) };
        Ok(rustix::io::retry_on_intr(|| {
            // SAFETY: the range is mapped for as long as `self` lives, and msync changes no byte.
            unsafe { rustix::mm::msync(at.as_ptr().cast(), end - start, rustix::mm::MsyncFlags::SYNC) }
        })?)
    }

    /// Makes the pages of `range` present and writable, so that storing into them does not fault.
    /// May wait for the device; not for the shard's thread.
    pub(crate) fn prefault(&self, range: Range<usize>) -> io::Result<()> {
        match self.advise(range, rustix::mm::Advice::LinuxPopulateWrite) {
            // Before Linux 5.14 there is no such advice; the shard's first stores then fault.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(()),
            done => done,
        }
    }

    /// Asks for huge pages: six times cheaper to prefault, but synced in units of 2 MiB.
    pub(crate) fn advise_huge(&self) -> io::Result<()> {
        self.advise(0..self.bytes, rustix::mm::Advice::LinuxHugepage)
    }

    /// Asks for pages of the smallest size: no read-ahead, which would bring larger ones.
    pub(crate) fn advise_small(&mut self) -> io::Result<()> {
        self.small_pages = true;
        self.advise(0..self.bytes, rustix::mm::Advice::Random)
    }

    /// Says that the whole is about to be read once, front to back.
    pub(crate) fn advise_sequential(&self) -> io::Result<()> {
        self.advise(0..self.bytes, rustix::mm::Advice::Sequential)
    }

    fn advise(&self, range: Range<usize>, advice: rustix::mm::Advice) -> io::Result<()> {
        if self.is_heap() || range.is_empty() {
            return Ok(());
        }
        let page = rustix::param::page_size();
        let start = range.start / page * page;
        let end = range.end.next_multiple_of(page).min(self.bytes);
        // SAFETY: start <= end <= bytes: the place lies in the memory.
        let at = unsafe { self.base.add(start) };
        // SAFETY: none of the advices used here changes the content of a shared file mapping (`DontNeed` would that of
        // a private one, which `map_raw` never makes).
        unsafe { rustix::mm::madvise(at.as_ptr().cast(), end - start, advice) }?;
        Ok(())
    }
}

/// The one writer of a segment's memory.
#[derive(Debug)]
pub(crate) struct WriteHalf {
    memory: Arc<Memory>,
    at: usize,
}

impl WriteHalf {
    /// Takes the memory, whose sole owner the caller is, for writing at `at` and above.
    pub(crate) fn new(mut memory: Memory, at: usize) -> Self {
        assert!(at <= memory.bytes, "a writer beyond the end");
        memory.committed = Watermark::new(at as u64);
        memory.written_from = at;
        Self { memory: Arc::new(memory), at }
    }

    /// Gives the memory back, readable as a whole. Only for who has not shared it.
    pub(crate) fn into_memory(self) -> Memory {
        let mut memory = Arc::try_unwrap(self.memory).expect("the memory was not shared");
        memory.committed = Watermark::new(memory.bytes as u64);
        memory.written_from = memory.bytes;
        memory
    }

    pub(crate) fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// Where the next byte goes.
    #[inline]
    pub(crate) fn at(&self) -> usize {
        self.at
    }

    /// Everything at and above the position.
    #[inline]
    pub(crate) fn tail(&mut self) -> &mut [u8] {
        // SAFETY: at <= bytes, checked whenever it moves.
        let start = unsafe { self.memory.base.add(self.at) };
        // SAFETY: [at, bytes) lies in the memory, at or above `committed`, so no reader has it, and
        // `&mut self` makes this the only writer.
        unsafe { std::slice::from_raw_parts_mut(start.as_ptr(), self.memory.bytes - self.at) }
    }

    /// Moves past bytes written through `tail`.
    #[inline]
    pub(crate) fn skip(&mut self, bytes: usize) {
        assert!(bytes <= self.memory.bytes - self.at, "a writer beyond the end");
        self.at += bytes;
    }

    /// Lets readers see everything below the position.
    #[inline]
    pub(crate) fn publish(&self) {
        self.memory.committed.publish(self.at as u64);
    }
}

/// Archives `event` behind `HEAD` bytes at the beginning of `out`, which lies at a multiple of 16, with zeros behind it up to the
/// next such multiple. Returns the bytes before the archive, the event as it now stands there, and how long its archive is;
/// `None` when it does not fit or takes more than `bytes_max`.
#[inline(always)]
pub(crate) fn archive<'o, const HEAD: usize, E: Encode>(
    event: &E,
    out: &'o mut [u8],
    bytes_max: usize,
    scratch: &mut Scratch,
) -> Option<(&'o mut [u8; HEAD], &'o E::Archived, usize)> {
    const { assert!(HEAD.is_multiple_of(ALIGN)) };
    let (head, out) = out.split_first_chunk_mut()?;
    assert!(out.as_ptr().addr().is_multiple_of(ALIGN), "archives begin at 16-byte steps");
    let len = match encode_sized(event, out, bytes_max, scratch) {
        Some(len) => len,
        None => encode(event, out, bytes_max, scratch)?,
    };
    let body = &out[..len];
    // SAFETY: these bytes are the archive of an `E`, written just now, with its root at their end; they begin at a
    // multiple of 16, as rkyv took it that they do.
    Some((head, unsafe { rkyv::access_unchecked::<E::Archived>(body) }, len))
}

/// Archives an event of a type whose archives have one size, which the compiler then knows, if it fits.
#[inline(always)]
fn encode_sized<E: Encode>(event: &E, out: &mut [u8], bytes_max: usize, scratch: &mut Scratch) -> Option<usize> {
    let len = size_of::<E::Archived>();
    if !has_one_size::<E>() || len > bytes_max {
        return None;
    }
    let (body, padding) = out.get_mut(..padded(len))?.split_at_mut(len);
    if event.encode(body, scratch)? != len {
        return None;
    }
    padding.fill(0);
    Some(len)
}

/// Archives any event, if it fits.
#[inline(never)]
fn encode<E: Encode>(event: &E, out: &mut [u8], bytes_max: usize, scratch: &mut Scratch) -> Option<usize> {
    let room = out.len().min(bytes_max);
    let len = event.encode(&mut out[..room], scratch)?;
    out[len..padded(len)].fill(0);
    Some(len)
}

#[cfg(any(test, feature = "test-util"))]
mod heap {
    use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
    use std::ops::Range;
    use std::ptr::NonNull;

    /// Page-aligned plain memory: the live content of a file in a test's storage.
    pub(crate) struct Heap {
        pub(super) base: NonNull<u8>,
        pub(super) layout: Layout,
        /// What has been synced.
        pub(crate) durable: crate::sync::Mutex<Vec<u8>>,
    }

    // SAFETY: plain owned memory; who may touch which byte is settled by `Memory`.
    unsafe impl Send for Heap {}
    // SAFETY: as for Send.
    unsafe impl Sync for Heap {}

    impl std::fmt::Debug for Heap {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.debug_struct("Heap").field("bytes", &self.layout.size()).finish_non_exhaustive()
        }
    }

    impl Heap {
        /// A file whose durable and live content is `content`.
        pub(crate) fn new(content: Vec<u8>) -> Self {
            assert!(!content.is_empty(), "an empty segment");
            let layout = Layout::from_size_align(content.len(), 4096).expect("a segment's size is a valid layout");
            // SAFETY: the layout is not empty.
            let base = unsafe { alloc_zeroed(layout) };
            let Some(base) = NonNull::new(base) else { handle_alloc_error(layout) };
            // SAFETY: both are of `content.len()` bytes, and freshly allocated memory overlaps nothing.
            unsafe { std::ptr::copy_nonoverlapping(content.as_ptr(), base.as_ptr(), content.len()) };
            Self { base, layout, durable: crate::sync::Mutex::new(content) }
        }

        pub(crate) fn len(&self) -> usize {
            self.layout.size()
        }

        /// Makes exactly `range` of the live content durable. The caller syncs only committed bytes.
        pub(crate) fn sync(&self, range: Range<usize>) {
            let end = range.end.min(self.layout.size());
            let mut durable = crate::sync::lock(&self.durable);
            let start = range.start.min(end);
            // SAFETY: start <= size.
            let from = unsafe { self.base.add(start) };
            // SAFETY: [start, end) is in bounds and initialised; committed bytes are written by nobody.
            let live = unsafe { std::slice::from_raw_parts(from.as_ptr(), end - start) };
            durable[start..end].copy_from_slice(live);
        }
    }

    impl Drop for Heap {
        fn drop(&mut self) {
            // SAFETY: allocated in `new` with this layout, and dropped once.
            unsafe { dealloc(self.base.as_ptr(), self.layout) };
        }
    }
}
