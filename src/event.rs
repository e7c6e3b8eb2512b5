//! What an event is, and the words for where it stands.
//!
//! Leaf module: positions are newtypes, events are data. Nothing here knows how an event travels.

use std::fmt;
use std::num::NonZeroUsize;
use std::str::FromStr;

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

use crate::bounded::Bounded;
use crate::sync::keyed;

pub use crate::bounded::DEPTH_MAX;

macro_rules! position {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub $inner);

        impl $name {
            /// Wraps a raw value.
            #[must_use]
            pub const fn new(value: $inner) -> Self {
                Self(value)
            }

            /// The raw value.
            #[must_use]
            pub const fn get(self) -> $inner {
                self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
    };
}

position!(
    /// A shard's number, from 0.
    ShardId(u16)
);
position!(
    /// A byte position in one shard's log. It grows for ever and is never used twice.
    Offset(u64)
);
position!(
    /// A shard's count of events: the first event of a shard has sequence 0.
    Sequence(u64)
);
position!(
    /// A key's count of events: the first event of a key has version 1. At most 2⁴⁷ − 1.
    Version(u64)
);
position!(
    /// The stable number of an event type. 0 is the log's own and never a user's.
    EventTypeId(u16)
);
position!(
    /// Ties events of one cause together; 0 means none.
    Correlation(u64)
);
position!(
    /// Nanoseconds since 1970-01-01 UTC.
    Time(u64)
);

impl Sequence {
    /// Not known: it is not stored with a record, only counted when a log is read in its order.
    pub const UNKNOWN: Self = Self(u64::MAX);
}

impl Time {
    /// The last time there is. As the end of a span it stands for no end: an event of this very time is in it.
    pub const END: Self = Self(u64::MAX);

    /// A time given in milliseconds since 1970 (saturating in the year 2554).
    #[must_use]
    pub const fn unix_ms(ms: u64) -> Self {
        Self(ms.saturating_mul(1_000_000))
    }

    /// Whole milliseconds since 1970.
    #[must_use]
    pub const fn as_ms(self) -> u64 {
        self.0 / 1_000_000
    }
}

impl Correlation {
    /// Ties an event to nothing.
    pub const NONE: Self = Self(0);

    /// The correlation of a text id: its xxh3 (an id that hashes to 0 becomes 1, since 0 means none).
    #[must_use]
    pub fn of(text: &str) -> Self {
        Self(xxhash_rust::xxh3::xxh3_64(text.as_bytes()).max(1))
    }
}

/// Whose event it is: a user id. Events of one key keep their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Key(pub u64);

impl Key {
    /// A numeric user id.
    #[must_use]
    pub const fn new(id: u64) -> Self {
        Self(id)
    }

    /// A text user id, through xxh3 (64 bits).
    #[must_use]
    pub fn of(text: &str) -> Self {
        Self(xxhash_rust::xxh3::xxh3_64(text.as_bytes()))
    }

    /// The raw id.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// splitmix64's finaliser: the hash that routes. Frozen for ever, and known to everybody: tables use another one.
    #[must_use]
    pub const fn hash(self) -> u64 {
        let mut z = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// The shard this key belongs to among `shards`: multiply-high of the hash. Frozen for ever.
    #[must_use]
    pub const fn shard(self, shards: u16) -> ShardId {
        ShardId(((self.hash() as u128 * shards as u128) >> 64) as u16)
    }
}

/// A key's hash as a shard's key table uses it, another one in every process: made once, by the publisher.
#[derive(Debug, Clone, Copy)]
pub(crate) struct KeyHash(pub(crate) u32);

/// The key of which this is the routing hash: what anybody can work out, and so choose keys by.
#[cfg(test)]
pub(crate) fn key_routed_by(hash: u64) -> Key {
    let inverse = |factor: u64| (0..6).fold(factor, |x, _| x.wrapping_mul(2_u64.wrapping_sub(factor.wrapping_mul(x))));
    let mut z = hash ^ (hash >> 31) ^ (hash >> 62);
    z = z.wrapping_mul(inverse(0x94d0_49bb_1331_11eb));
    z = z ^ (z >> 27) ^ (z >> 54);
    z = z.wrapping_mul(inverse(0xbf58_476d_1ce4_e5b9));
    z = z ^ (z >> 30) ^ (z >> 60);
    let key = Key(z.wrapping_sub(0x9e37_79b9_7f4a_7c15));
    assert_eq!(key.hash(), hash);
    key
}

impl KeyHash {
    #[inline]
    pub(crate) fn of(key: Key) -> Self {
        Self(keyed(key.0) as u32)
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// The unique name of an event, derived from where it lies: `shard-offset`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EventId {
    /// The shard that holds the event.
    pub shard: ShardId,
    /// Where in that shard's log its record begins.
    pub offset: Offset,
}

impl fmt::Display for EventId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.shard, self.offset)
    }
}

impl FromStr for EventId {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (shard, offset) = text.split_once('-').unwrap_or((text, ""));
        Ok(Self { shard: ShardId(shard.parse()?), offset: Offset(offset.parse()?) })
    }
}

/// One kind of event: a stable number, a stable name and the version of its layout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EventType {
    /// Stable for ever; never 0.
    pub id: EventTypeId,
    /// Stable for ever; what people and JSON see.
    pub name: &'static str,
    /// Version of the archived layout of this type.
    pub schema_version: u16,
}

impl EventType {
    /// Describes a type. Fails to compile (in a const) or panics when `id` is 0.
    #[must_use]
    pub const fn new(id: u16, name: &'static str, schema_version: u16) -> Self {
        assert!(id != 0, "event type id 0 belongs to the log itself");
        Self { id: EventTypeId(id), name, schema_version }
    }
}

/// Makes an event of today from the archive of an older layout of its type.
///
/// ```
/// use corelane::event::Upcaster;
/// use corelane::Stored;
/// # use corelane::{Bounded, Event, EventType, EventTypeId};
/// use rkyv::{Archive, Deserialize, Serialize};
///
/// /// As the program was when schema version 1 was current; kept for reading.
/// #[derive(Archive, Serialize, Deserialize, Bounded, Clone)]
/// enum GameEventV1 { Moved { x: i32, y: i32 } }
///
/// #[derive(Archive, Serialize, Deserialize, Bounded, Clone, PartialEq, Debug)]
/// enum GameEvent { Moved { x: f64, y: f64 } }
///
/// impl Event for GameEvent {
///     const TYPES: &'static [EventType] = &[EventType::new(1, "player_moved", 2)];
///     const UPCASTERS: &'static [Upcaster<Self>] = &[Upcaster::new(1, 1, |archive| {
///         let GameEventV1::Moved { x, y } = GameEventV1::decode(archive)?;
///         Ok(GameEvent::Moved { x: x.into(), y: y.into() })
///     })];
/// #     fn event_type(&self) -> EventTypeId { EventTypeId(1) }
/// }
/// ```
#[derive(Debug)]
pub struct Upcaster<E> {
    /// The type.
    pub event_type: EventTypeId,
    /// The older schema version that it reads.
    pub schema_version: u16,
    /// From the archive's bytes, which begin at a multiple of 16, to an event of today. It must be deterministic.
    pub upcast: fn(&[u8]) -> Result<E, RkyvError>,
}

/// An archive holds a variant that does not belong to the event type of its record.
#[derive(Debug, thiserror::Error)]
#[error("the archive holds another variant than its event type says")]
struct AnotherVariant;

impl<E> Upcaster<E> {
    /// Reads records of this type and schema version with `upcast`.
    #[must_use]
    pub const fn new(event_type: u16, schema_version: u16, upcast: fn(&[u8]) -> Result<E, RkyvError>) -> Self {
        Self { event_type: EventTypeId(event_type), schema_version, upcast }
    }

    /// The error of an upcaster that meets a variant other than its own. For code that `#[derive(Event)]` writes.
    #[doc(hidden)]
    #[must_use]
    pub fn another_variant() -> RkyvError {
        <RkyvError as rkyv::rancor::Source>::new(AnotherVariant)
    }
}

/// The schema versions that are current, by event type.
#[derive(Debug, Clone)]
pub(crate) struct Schemas(Box<[Option<u16>]>);

impl Schemas {
    pub(crate) fn of<E: Event>() -> Self {
        let mut versions = vec![None; E::TYPES.iter().map(|t| usize::from(t.id.0) + 1).max().unwrap_or(0)];
        for t in E::TYPES {
            versions[usize::from(t.id.0)] = Some(t.schema_version);
        }
        Self(versions.into())
    }

    /// The current version of a type; `None` where the program does not declare it.
    #[inline]
    pub(crate) fn current(&self, event_type: EventTypeId) -> Option<u16> {
        self.0.get(usize::from(event_type.0)).copied().flatten()
    }
}

/// The ids of a program's event types, as a constant.
#[derive(Debug)]
struct DeclaredIds {
    first: u16,
    last: u16,
    /// There is a type for every id in between.
    is_dense: bool,
}

impl DeclaredIds {
    const fn of(types: &[EventType]) -> Self {
        let (mut first, mut last, mut i) = (u16::MAX, 0, 0);
        while i < types.len() {
            let id = types[i].id.0;
            first = if id < first { id } else { first };
            last = if id > last { id } else { last };
            i += 1;
        }
        // No two types of an engine have one id.
        Self { first, last, is_dense: !types.is_empty() && (last - first) as usize + 1 == types.len() }
    }
}

/// Whether `event_type` is one of `E::TYPES`. Where their ids are consecutive, which they nearly always are, one comparison, and
/// often none: the compiler knows what `event_type()` can return.
#[inline(always)]
pub(crate) fn is_declared<E: Event>(event_type: EventTypeId) -> bool {
    let declared = const { DeclaredIds::of(E::TYPES) };
    if declared.is_dense {
        (declared.first..=declared.last).contains(&event_type.0)
    } else {
        E::TYPES.iter().any(|declared| declared.id == event_type)
    }
}

/// The upcaster for records of this kind, if there is one.
pub(crate) fn upcaster<E: Event>(event_type: EventTypeId, schema_version: u16) -> Option<&'static Upcaster<E>> {
    E::UPCASTERS.iter().find(|u| u.event_type == event_type && u.schema_version == schema_version)
}

pub use corelane_derive::Event;

/// An event that corelane carries: an rkyv type with stable type ids. Normally an enum whose
/// variants are the event types.
///
/// ```
/// use corelane::{Bounded, Event, EventType, EventTypeId};
/// use rkyv::{Archive, Deserialize, Serialize};
///
/// #[derive(Archive, Serialize, Deserialize, Bounded)]
/// enum GameEvent { Moved { x: f32, y: f32 }, LevelledUp { level: u32 } }
///
/// impl Event for GameEvent {
///     const TYPES: &'static [EventType] =
///         &[EventType::new(1, "player_moved", 1), EventType::new(2, "player_levelled_up", 1)];
///     fn event_type(&self) -> EventTypeId {
///         match self {
///             GameEvent::Moved { .. } => EventTypeId(1),
///             GameEvent::LevelledUp { .. } => EventTypeId(2),
///         }
///     }
/// }
/// ```
pub trait Event: Encode + Send + 'static {
    /// Every type this enum can carry. Ids and names are data: stable for ever.
    const TYPES: &'static [EventType];

    /// How events that were written under older layouts are read: one for each (type, schema version) that a store may
    /// still hold. A store that holds another is refused when it is opened, and so is an upcaster that reads nothing: of a
    /// type that is not declared, or of a version that is not older than the type's ([`crate::ConfigError::UselessUpcaster`]).
    const UPCASTERS: &'static [Upcaster<Self>] = &[];

    /// Which of [`Event::TYPES`] this one is. An event of another type is refused when it is published
    /// ([`crate::Rejected::UndeclaredType`]).
    fn event_type(&self) -> EventTypeId;

    /// The time the event itself carries; `None` means its publish time.
    fn time(&self) -> Option<Time> {
        None
    }

    /// The correlation the event itself carries.
    fn correlation(&self) -> Correlation {
        Correlation(0)
    }
}

/// How an event becomes bytes and is read in place. Implemented for every fitting rkyv type;
/// nobody implements it by hand.
///
/// A type that is aligned to more than 16 bytes, where archives begin, does not compile:
///
/// ```compile_fail,E0080
/// use corelane::event::{Encode, Scratch};
/// use corelane::Bounded;
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
/// use corelane::event::{Encode, Scratch};
/// use corelane::Bounded;
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

/// What the log knows of an event besides its body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Meta {
    /// The shard that owns the key.
    pub shard: ShardId,
    /// Where the record begins.
    pub offset: Offset,
    /// The event's number in its shard.
    pub sequence: Sequence,
    /// Whose event it is.
    pub key: Key,
    /// The event's number in its key.
    pub version: Version,
    /// The event's own time or, where it carries none, its publish time.
    pub time: Time,
    /// Which type.
    pub event_type: EventTypeId,
    /// Version of the type's layout.
    pub schema_version: u16,
    /// Ties events of one cause together.
    pub correlation: Correlation,
    /// The key's previous record, if it has one.
    pub previous: Option<Offset>,
}

impl Meta {
    /// The event's unique id.
    #[must_use]
    pub const fn id(&self) -> EventId {
        EventId { shard: self.shard, offset: self.offset }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn routing_is_frozen() {
        let golden = [(0u64, 0xe220a8397b1dcdaf_u64), (1, 0x910a2dec89025cc1), (42, 0xbdd732262feb6e95)];
        for (key, hash) in golden {
            assert_eq!(Key(key).hash(), hash, "splitmix64({key})");
        }
        let shards: Vec<u16> = (0..12).map(|key| Key(key).shard(4).0).collect();
        assert_eq!(shards, [3, 2, 2, 0, 1, 1, 2, 1, 2, 2, 0, 1], "keys 0..12 over 4 shards");
        assert_eq!(Key::of("alice"), Key::of("alice"));
        assert_eq!(Key(u64::MAX).shard(1), ShardId(0));
    }

    #[test]
    fn an_event_id_reads_back_as_written() {
        let id = EventId { shard: ShardId(3), offset: Offset(4096) };
        assert_eq!(id.to_string(), "3-4096");
        assert_eq!("3-4096".parse::<EventId>().ok(), Some(id));
        assert!("3".parse::<EventId>().is_err());
    }
}
