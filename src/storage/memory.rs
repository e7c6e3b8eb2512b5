//! The memory of a segment: a mapped file, or plain memory in tests with a simulated disk.
//!
//! One writer: the holder of the [`WriteHalf`]. It writes only at and above its own position. Readers get only bytes
//! below `committed`, which never exceeds that position. So no byte is written while a reader can see it. Every unsafe
//! block in this file relies on this.
//!
//! The unsafe blocks also rely on the store's lock: no other process writes these files, and no process truncates them.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

#[cfg(any(test, feature = "test-util"))]
pub(crate) use heap::Heap;

use crate::event::{Encode, Scratch, has_one_size};
use crate::sync::Watermark;

/// Records begin at multiples of this many bytes.
pub(crate) const ALIGN: usize = crate::event::ARCHIVE_ALIGN;

/// Rounds the exact length of a record up to the beginning of the next one.
#[inline]
pub(crate) const fn padded(len: usize) -> usize {
    (len + ALIGN - 1) & !(ALIGN - 1)
}

/// The memory of a whole segment.
#[derive(Debug)]
pub(crate) struct Memory {
    base: NonNull<u8>,
    bytes: usize,
    /// Readers may see the bytes below this position.
    committed: Watermark,
    /// This process wrote every record at and above this position.
    written_from: usize,
    /// `true` if the memory is mapped in pages of the smallest size instead of huge pages.
    small_pages: bool,
    backing: Backing,
}

#[derive(Debug)]
enum Backing {
    /// Held for its `Drop`, which unmaps the file.
    File { _map: memmap2::MmapRaw },
    #[cfg(any(test, feature = "test-util"))]
    Heap(Arc<Heap>),
}

// SAFETY: the pointer refers to memory that `backing` owns and that any thread may access. `committed` and the
// uniqueness of `WriteHalf` decide which thread may access which bytes.
unsafe impl Send for Memory {}
// SAFETY: as for Send; shared access reads only below `committed`.
unsafe impl Sync for Memory {}

impl Memory {
    /// Maps a whole file, for writing if `writable`. Everything is readable until a writer takes the memory.
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

    /// Creates memory over `heap`: the live content of a file in a test's storage.
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

    /// Returns the heap behind the memory, in tests with a simulated disk.
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

    /// Returns the committed position, in bytes from the beginning of the segment.
    pub(crate) fn committed(&self) -> usize {
        self.committed.get() as usize
    }

    /// Returns the bytes `[at, at + len)`, or `None` if they are not all committed.
    #[inline]
    pub(crate) fn read(&self, at: usize, len: usize) -> Option<&[u8]> {
        let end = at.checked_add(len)?;
        if end > self.committed() {
            return None;
        }
        // SAFETY: at + len <= committed <= bytes, so the pointer stays inside the memory.
        let start = unsafe { self.base.add(at) };
        // SAFETY: bytes below `committed` are initialised and are not written while `self` lives.
        Some(unsafe { std::slice::from_raw_parts(start.as_ptr(), len) })
    }

    /// Returns `true` if this process wrote the record at `at`; the record then needs no validation.
    #[inline]
    pub(crate) fn is_own(&self, at: usize) -> bool {
        at >= self.written_from
    }

    /// Returns the event archived in `[at, at + len)`. Bytes that this process wrote are trusted; other bytes are
    /// validated (the caller must have verified their CRC). `E` must be the type that the engine carries.
    #[inline]
    pub(crate) fn archived<E: Encode>(&self, at: usize, len: usize) -> Option<&E::Archived> {
        let bytes = self.read(at, len)?;
        if !self.is_own(at) {
            return E::access(bytes).ok();
        }
        // SAFETY: this process wrote these bytes by archiving an `E` here: an engine carries one event type, and
        // creates all readers of its memory. Records are 16-aligned.
        Some(unsafe { rkyv::access_unchecked::<E::Archived>(bytes) })
    }

    /// Syncs `range` to the device. `Ok` gives the guarantee of a successful fdatasync, for that range.
    pub(crate) fn sync(&self, range: Range<usize>) -> io::Result<()> {
        if self.is_heap() {
            return Err(io::Error::other("plain memory is synced by the storage that owns it"));
        }
        let page = rustix::param::page_size();
        let start = range.start / page * page;
        let end = range.end.next_multiple_of(page).min(self.bytes);
        if self.small_pages {
            // Whole pages below the end are not written any more. Dropping all their page-table entries at once needs
            // one TLB flush on the other cores; the sync would need one for each page that it cleans. Later reads find
            // the pages in the page cache.
            if let Err(error) = self.advise(start..range.end / page * page, rustix::mm::Advice::LinuxDontNeed) {
                tracing::debug!(%error, "synced pages stay in the page tables");
            }
        }
        // SAFETY: start <= end <= bytes, so the pointer stays inside the memory.
        let at = unsafe { self.base.add(start) };
        Ok(rustix::io::retry_on_intr(|| {
            // SAFETY: the range is mapped for as long as `self` lives, and msync changes no byte.
            unsafe { rustix::mm::msync(at.as_ptr().cast(), end - start, rustix::mm::MsyncFlags::SYNC) }
        })?)
    }

    /// Makes the pages of `range` present and writable, so that stores into them do not fault. May block on the device,
    /// so the shard's thread must not call it.
    pub(crate) fn prefault(&self, range: Range<usize>) -> io::Result<()> {
        match self.advise(range, rustix::mm::Advice::LinuxPopulateWrite) {
            // Linux before 5.14 lacks this advice; the shard's first stores then fault.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(()),
            done => done,
        }
    }

    /// Requests huge pages, which are six times cheaper to prefault, but are synced in units of 2 MiB.
    pub(crate) fn advise_huge(&self) -> io::Result<()> {
        self.advise(0..self.bytes, rustix::mm::Advice::LinuxHugepage)
    }

    /// Requests pages of the smallest size. Turns off read-ahead, which would create larger pages.
    pub(crate) fn advise_small(&mut self) -> io::Result<()> {
        self.small_pages = true;
        self.advise(0..self.bytes, rustix::mm::Advice::Random)
    }

    /// Announces that the whole memory will be read once, front to back.
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
        // SAFETY: start <= end <= bytes, so the pointer stays inside the memory.
        let at = unsafe { self.base.add(start) };
        // SAFETY: none of the advices used here changes the content of a shared file mapping. (`DontNeed` would change
        // that of a private mapping, which `map_raw` never creates.)
        unsafe { rustix::mm::madvise(at.as_ptr().cast(), end - start, advice) }?;
        Ok(())
    }
}

/// The only writer of a segment's memory.
#[derive(Debug)]
pub(crate) struct WriteHalf {
    memory: Arc<Memory>,
    at: usize,
}

impl WriteHalf {
    /// Takes ownership of the memory, for writing at `at` and above.
    pub(crate) fn new(mut memory: Memory, at: usize) -> Self {
        assert!(at <= memory.bytes, "a writer beyond the end of the memory");
        memory.committed = Watermark::new(at as u64);
        memory.written_from = at;
        Self { memory: Arc::new(memory), at }
    }

    /// Returns the memory, all of it readable. Panics if the memory has been shared.
    pub(crate) fn into_memory(self) -> Memory {
        let mut memory = Arc::try_unwrap(self.memory).expect("the memory was not shared");
        memory.committed = Watermark::new(memory.bytes as u64);
        memory.written_from = memory.bytes;
        memory
    }

    pub(crate) fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// Returns the position of the next byte to write.
    #[inline]
    pub(crate) fn at(&self) -> usize {
        self.at
    }

    /// Returns all bytes at and above the position.
    #[inline]
    pub(crate) fn tail(&mut self) -> &mut [u8] {
        // SAFETY: at <= bytes; every change of `at` checks this.
        let start = unsafe { self.memory.base.add(self.at) };
        // SAFETY: [at, bytes) lies inside the memory and at or above `committed`, so no reader has it, and `&mut self`
        // makes this the only writer.
        unsafe { std::slice::from_raw_parts_mut(start.as_ptr(), self.memory.bytes - self.at) }
    }

    /// Moves the position past `bytes` bytes written through `tail`.
    #[inline]
    pub(crate) fn skip(&mut self, bytes: usize) {
        assert!(bytes <= self.memory.bytes - self.at, "a writer beyond the end of the memory");
        self.at += bytes;
    }

    /// Lets readers see all bytes below the position.
    #[inline]
    pub(crate) fn publish(&self) {
        self.memory.committed.publish(self.at as u64);
    }
}

/// Archives `event` after `HEAD` bytes at the beginning of `out`, which must begin at a multiple of 16. Zeroes the
/// padding up to the next multiple of 16. Returns the first `HEAD` bytes, the archived event, and the exact length of
/// its archive, or `None` if the archive does not fit or is longer than `bytes_max`.
#[inline(always)]
pub(crate) fn archive<'o, const HEAD: usize, E: Encode>(
    event: &E,
    out: &'o mut [u8],
    bytes_max: usize,
    scratch: &mut Scratch,
) -> Option<(&'o mut [u8; HEAD], &'o E::Archived, usize)> {
    const { assert!(HEAD.is_multiple_of(ALIGN)) };
    let (head, out) = out.split_first_chunk_mut()?;
    assert!(out.as_ptr().addr().is_multiple_of(ALIGN), "archives begin at multiples of 16");
    let len = match encode_sized(event, out, bytes_max, scratch) {
        Some(len) => len,
        None => encode(event, out, bytes_max, scratch)?,
    };
    let body = &out[..len];
    // SAFETY: `body` is the archive of an `E`, written above, with its root at the end. It begins at a multiple of 16,
    // as rkyv requires.
    Some((head, unsafe { rkyv::access_unchecked::<E::Archived>(body) }, len))
}

/// Archives an event of a type whose archives all have one size, known at compile time. Returns `None` if the archive
/// does not fit.
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

/// Archives any event. Returns `None` if the archive does not fit.
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
        /// The synced content.
        pub(crate) durable: crate::sync::Mutex<Vec<u8>>,
    }

    // SAFETY: plain owned memory; `Memory` decides which thread may access which bytes.
    unsafe impl Send for Heap {}
    // SAFETY: as for Send.
    unsafe impl Sync for Heap {}

    impl std::fmt::Debug for Heap {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.debug_struct("Heap").field("bytes", &self.layout.size()).finish_non_exhaustive()
        }
    }

    impl Heap {
        /// Creates a file whose live and durable content is `content`.
        pub(crate) fn new(content: Vec<u8>) -> Self {
            assert!(!content.is_empty(), "an empty segment");
            let layout = Layout::from_size_align(content.len(), 4096).expect("a segment's size is a valid layout");
            // SAFETY: the layout has a size above zero.
            let base = unsafe { alloc_zeroed(layout) };
            let Some(base) = NonNull::new(base) else { handle_alloc_error(layout) };
            // SAFETY: both are of `content.len()` bytes, and freshly allocated memory overlaps nothing.
            unsafe { std::ptr::copy_nonoverlapping(content.as_ptr(), base.as_ptr(), content.len()) };
            Self { base, layout, durable: crate::sync::Mutex::new(content) }
        }

        pub(crate) fn len(&self) -> usize {
            self.layout.size()
        }

        /// Makes `range` of the live content durable. The caller syncs only committed bytes.
        pub(crate) fn sync(&self, range: Range<usize>) {
            let end = range.end.min(self.layout.size());
            let mut durable = crate::sync::lock(&self.durable);
            let start = range.start.min(end);
            // SAFETY: start <= size.
            let from = unsafe { self.base.add(start) };
            // SAFETY: [start, end) is in bounds and initialised; no thread writes committed bytes.
            let live = unsafe { std::slice::from_raw_parts(from.as_ptr(), end - start) };
            durable[start..end].copy_from_slice(live);
        }
    }

    impl Drop for Heap {
        fn drop(&mut self) {
            // SAFETY: allocated in `new` with this layout, and deallocated once.
            unsafe { dealloc(self.base.as_ptr(), self.layout) };
        }
    }
}
