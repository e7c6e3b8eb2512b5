//! Archives events into bytes and reads them in place.

use std::fmt;
use std::num::NonZeroUsize;

use rkyv::api::access_with_context;
use rkyv::api::low::{LowDeserializer, LowSerializer, LowValidator};
use rkyv::bytecheck::CheckBytes;
use rkyv::primitive::FixedUsize;
use rkyv::rancor::Error as RkyvError;
use rkyv::ser::allocator::SubAllocator;
use rkyv::ser::writer::Buffer;
use rkyv::validation::Validator;
use rkyv::validation::archive::ArchiveValidator;
use rkyv::{Archive, Deserialize, Serialize};

use crate::bounded::{Bounded, DEPTH_MAX};

/// A type that can be archived into bytes and read in place. Implemented for every suitable rkyv type; do not implement
/// it by hand.
///
/// Archives begin at multiples of 16 bytes. A type with a larger alignment does not compile:
///
/// ```compile_fail,E0080
/// use corelane::Bounded;
/// use corelane::event::{Encode, Scratch};
///
/// #[derive(rkyv::Archive, rkyv::Serialize, Bounded)]
/// #[rkyv(attr(repr(C, align(32))))]
/// struct Wide { bytes: [u8; 32] }
///
/// Wide { bytes: [0; 32] }.encode(&mut [0; 64], &mut Scratch::new(0));
/// ```
///
/// Neither does a type that nests deeper than [`DEPTH_MAX`] levels:
///
/// ```compile_fail,E0080
/// use corelane::Bounded;
/// use corelane::event::{Encode, Scratch};
///
/// #[derive(rkyv::Archive, rkyv::Serialize)]
/// struct Deep(u8);
///
/// impl Bounded for Deep {
///     const DEPTH: u32 = 65;
/// }
///
/// Deep(0).encode(&mut [0; 64], &mut Scratch::new(0));
/// ```
pub trait Encode: Archive<Archived: Send> + Bounded + Sized {
    /// Archives `self` into `out`, using `scratch` for unsized parts. Returns the exact length in bytes, or `None` if
    /// the archive does not fit.
    fn encode(&self, out: &mut [u8], scratch: &mut Scratch) -> Option<usize>;

    /// Reads an archive in place after validating every byte (bytecheck).
    ///
    /// # Errors
    /// Returns the validator's error if the bytes are not a valid archive, or nest deeper than [`DEPTH_MAX`] levels.
    fn access(bytes: &[u8]) -> Result<&Self::Archived, RkyvError>;
}

impl<T> Encode for T
where
    T: for<'a> Serialize<LowSerializer<Buffer<'a>, SubAllocator<'a>, RkyvError>>,
    T: Archive<Archived: Send + for<'a> CheckBytes<LowValidator<'a, RkyvError>>>,
    T: Bounded,
{
    #[inline]
    fn encode(&self, out: &mut [u8], scratch: &mut Scratch) -> Option<usize> {
        const { assert_storable::<T>() };
        let allocator = SubAllocator::new(&mut scratch.0);
        rkyv::api::low::to_bytes_in_with_alloc::<_, _, RkyvError>(self, Buffer::from(out), allocator)
            .ok()
            .map(|written| written.len())
    }

    #[inline]
    fn access(bytes: &[u8]) -> Result<&Self::Archived, RkyvError> {
        const { assert_storable::<T>() };
        let archive = ArchiveValidator::with_max_depth(bytes, NonZeroUsize::new(LEVELS_MAX));
        access_with_context::<Self::Archived, _, RkyvError>(bytes, &mut Validator::new(archive, ()))
    }
}

/// [`DEPTH_MAX`] levels as the validator counts them: the root is one level, and the validator stops before its count
/// reaches 0.
const LEVELS_MAX: usize = DEPTH_MAX as usize + 2;

/// Fails to compile for a type that could not be read back.
const fn assert_storable<T: Archive + Bounded>() {
    assert!(align_of::<T::Archived>() <= ARCHIVE_ALIGN, "an archive cannot be aligned to more than 16 bytes");
    assert!(T::DEPTH <= DEPTH_MAX, "a stored type nests deeper than DEPTH_MAX levels");
}

/// Archives begin at multiples of this many bytes.
pub(crate) const ARCHIVE_ALIGN: usize = 16;

/// Returns `true` if every archive of `T` consists of its root alone; all archives then have one size. If a part were
/// stored elsewhere, the resolver would contain its position.
pub(crate) const fn has_one_size<T: Archive>() -> bool {
    align_of::<T::Resolver>() < align_of::<FixedUsize>()
}

/// The size and alignment of an archive's root. An archive is read from its end, so size and alignment must be the same
/// as when it was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Root {
    pub(crate) bytes: u32,
    pub(crate) align: u16,
}

impl Root {
    pub(crate) const fn of<T: Archive>() -> Self {
        Self { bytes: size_of::<T::Archived>() as u32, align: align_of::<T::Archived>() as u16 }
    }
}

impl fmt::Display for Root {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes (aligned to {})", self.bytes, self.align)
    }
}

/// Deserialises an archived event into an owned one.
///
/// # Errors
/// Returns rkyv's error if it cannot rebuild a value.
pub fn deserialize<E>(archived: &E::Archived) -> Result<E, RkyvError>
where
    E: Archive<Archived: Deserialize<E, LowDeserializer<RkyvError>>>,
{
    rkyv::api::low::deserialize::<E, RkyvError>(archived)
}

/// Scratch memory for the encoding of one thread, allocated once.
#[derive(Debug)]
pub struct Scratch(Box<[std::mem::MaybeUninit<u8>]>);

impl Scratch {
    /// Allocates `bytes` bytes of scratch memory, for the unsized parts of one event while it is archived.
    #[must_use]
    pub fn new(bytes: usize) -> Self {
        Self(vec![std::mem::MaybeUninit::uninit(); bytes].into_boxed_slice())
    }
}
