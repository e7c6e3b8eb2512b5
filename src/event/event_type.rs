//! Event types and the upcasters for their older layouts.

use rkyv::rancor::Error as RkyvError;

use super::position::EventTypeId;

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
/// use corelane::{Stored, Upcaster};
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

impl<E> Upcaster<E> {
    /// Reads records of this type and schema version with `upcast`.
    #[must_use]
    pub const fn new(event_type: u16, schema_version: u16, upcast: fn(&[u8]) -> Result<E, RkyvError>) -> Self {
        Self { event_type: EventTypeId(event_type), schema_version, upcast }
    }
}
