//! Event types, and upcasters for their older layouts.

use rkyv::rancor::Error as RkyvError;

use super::position::EventTypeId;

/// An event type: a stable number, a stable name and the version of its layout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct EventType {
    /// The id: fixed for ever, never 0.
    pub id: EventTypeId,
    /// The name that people and JSON see: fixed for ever.
    pub name: &'static str,
    /// The schema version: the version of this type's archived layout.
    pub schema_version: u16,
}

impl EventType {
    /// Describes an event type. With an `id` of 0, a constant does not compile, and a call at run time panics.
    #[must_use]
    pub const fn new(id: u16, name: &'static str, schema_version: u16) -> Self {
        assert!(id != 0, "event type id 0 is reserved for the log's own records");
        Self { id: EventTypeId(id), name, schema_version }
    }
}

/// Converts archives of an older layout of an event type into current events.
///
/// ```
/// use corelane::Stored;
/// use corelane::event::Upcaster;
/// # use corelane::{Bounded, Event, EventType, EventTypeId};
/// use rkyv::{Archive, Deserialize, Serialize};
///
/// /// The event as it was in schema version 1, kept for reading.
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
#[non_exhaustive]
pub struct Upcaster<E> {
    /// The event type.
    pub event_type: EventTypeId,
    /// The older schema version that this upcaster reads.
    pub schema_version: u16,
    /// Converts the bytes of an archive, which begin at a multiple of 16, into a current event. It must be
    /// deterministic.
    pub upcast: fn(&[u8]) -> Result<E, RkyvError>,
}

/// An archive holds a variant that does not belong to the event type of its record.
#[derive(Debug, thiserror::Error)]
#[error("the archive holds another variant than its event type says")]
struct AnotherVariant;

impl<E> Upcaster<E> {
    /// Reads records of this event type and schema version with `upcast`.
    #[must_use]
    pub const fn new(event_type: u16, schema_version: u16, upcast: fn(&[u8]) -> Result<E, RkyvError>) -> Self {
        Self { event_type: EventTypeId(event_type), schema_version, upcast }
    }

    /// Returns the error of an upcaster that meets a variant other than its own. Called by code from
    /// `#[derive(Event)]`.
    #[doc(hidden)]
    #[must_use]
    pub fn another_variant() -> RkyvError {
        <RkyvError as rkyv::rancor::Source>::new(AnotherVariant)
    }
}
