//! How an event becomes bytes and is read in place.

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

/// How an event becomes bytes and is read in place. Implemented for every fitting rkyv type;
/// nobody implements it by hand.
///
/// A type that is aligned to more than 16 bytes, where archives begin, does not compile:
///
/// ```compile_fail,E0080
/// use corelane::{Bounded, Encode, Scratch};
///
/// #[derive(rkyv::Archive, rkyv::Serialize, Bounded)]
/// #[rkyv(attr(repr(C, align(32))))]
/// struct Wide { bytes: [u8; 32] }
///
/// Wide { bytes: [0; 32] }.encode(&mut [0; 64], &mut Scratch::new(0));
/// ```
///
/// Neither does one that nests deeper than [`DEPTH_MAX`] levels:
///
/// ```compile_fail,E0080
/// use corelane::{Bounded, Encode, Scratch};
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
    /// Archives `self` into `out`, with `scratch` for unsized parts. Returns the exact length,
    /// or `None` when it does not fit.
    fn encode(&self, out: &mut [u8], scratch: &mut Scratch) -> Option<usize>;

    /// Reads an archive in place after checking every byte of it (bytecheck). More than [`DEPTH_MAX`] levels are an error.
    ///
    /// # Errors
    /// What the validator found wrong.
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

/// The validator's count for [`DEPTH_MAX`] levels: the root is one, and it stops before it has counted down to nothing.
const LEVELS_MAX: usize = DEPTH_MAX as usize + 2;

/// Fails to compile for a type that could not be read back.
const fn assert_storable<T: Archive + Bounded>() {
    assert!(align_of::<T::Archived>() <= ARCHIVE_ALIGN, "an archive cannot be aligned to more than 16 bytes");
    assert!(T::DEPTH <= DEPTH_MAX, "a stored type nests deeper than DEPTH_MAX levels");
}

/// Archives begin at multiples of this.
pub(crate) const ARCHIVE_ALIGN: usize = 16;

/// Whether all archives of `T` are just its root, and so of one size: of a part that stands elsewhere, the resolver would know
/// the position.
pub(crate) const fn has_one_size<T: Archive>() -> bool {
    align_of::<T::Resolver>() < align_of::<FixedUsize>()
}

/// Size and alignment of an archive's root. An archive is read from its end, so both must be what they were when it was
/// written.
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

/// An archived event turned back into an owned one.
///
/// # Errors
/// What rkyv could not rebuild.
pub fn deserialize<E>(archived: &E::Archived) -> Result<E, RkyvError>
where
    E: Archive<Archived: Deserialize<E, LowDeserializer<RkyvError>>>,
{
    rkyv::api::low::deserialize::<E, RkyvError>(archived)
}

/// Scratch memory for one thread's encoding; allocated once.
#[derive(Debug)]
pub struct Scratch(Box<[std::mem::MaybeUninit<u8>]>);

impl Scratch {
    /// Scratch of `bytes` bytes: what unsized parts of one event need while it is archived.
    #[must_use]
    pub fn new(bytes: usize) -> Self {
        Self(vec![std::mem::MaybeUninit::uninit(); bytes].into_boxed_slice())
    }
}
