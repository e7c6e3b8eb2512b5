//! Events, and types for their positions.
//!
//! Positions are newtypes, events are data. This folder does not know how an event travels.

mod encode;
mod event_type;
mod filter;
mod key;
mod meta;
mod placement;
mod position;
mod schema;
mod time;

pub use crate::bounded::DEPTH_MAX;
pub(crate) use encode::{ARCHIVE_ALIGN, Root, has_one_size};
pub use encode::{Encode, Scratch, deserialize};
pub use event_type::{EventType, Upcaster};
pub(crate) use filter::{BadTypes, TypeFilter};
pub use key::Key;
pub(crate) use key::KeyHash;
#[cfg(test)]
pub(crate) use key::key_routed_by;
pub use meta::Meta;
pub(crate) use placement::{PLACEMENT_NAME_BYTES_MAX, Router};
pub use placement::{Placement, PlacementId};
pub use position::{Correlation, EventId, EventTypeId, Offset, Sequence, ShardId, Time, Version};
pub(crate) use schema::{Schemas, is_declared, upcaster};

pub use corelane_derive::Event;

/// An event that corelane carries: an rkyv type with stable type ids, normally an enum whose variants are the event
/// types.
///
/// ```
/// use corelane::{Bounded, Event, EventTypeId};
/// use rkyv::{Archive, Deserialize, Serialize};
///
/// #[derive(Archive, Serialize, Deserialize, Bounded, Event)]
/// enum GameEvent {
///     #[event(id = 1, name = "player_moved")]
///     Moved { x: f32, y: f32 },
///     #[event(id = 2, name = "player_levelled_up")]
///     LevelledUp { level: u32 },
/// }
/// assert_eq!(GameEvent::LevelledUp { level: 7 }.event_type(), EventTypeId(2));
/// ```
///
/// The derive macro declares every variant, so no event has an undeclared type. An id of 0, an id or a name used twice,
/// and a variant without an id do not compile:
///
/// ```compile_fail
/// # use corelane::{Bounded, Event};
/// # use rkyv::{Archive, Serialize};
/// #[derive(Archive, Serialize, Bounded, Event)]
/// enum GameEvent {
///     #[event(id = 1, name = "player_moved")]
///     Moved { x: f32, y: f32 },
///     #[event(id = 1, name = "player_left")]
///     Left,
/// }
/// ```
///
/// ```compile_fail
/// # use corelane::{Bounded, Event};
/// # use rkyv::{Archive, Serialize};
/// #[derive(Archive, Serialize, Bounded, Event)]
/// enum GameEvent {
///     #[event(id = 1, name = "player_moved")]
///     Moved { x: f32, y: f32 },
///     Left,
/// }
/// ```
///
/// Without the macro, the declarations are written by hand:
///
/// ```
/// # use corelane::{Bounded, Event, EventType, EventTypeId};
/// # use rkyv::{Archive, Deserialize, Serialize};
/// # #[derive(Archive, Serialize, Deserialize, Bounded)]
/// # enum GameEvent { Moved { x: f32, y: f32 }, LevelledUp { level: u32 } }
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
    /// Every event type that a value can have. Ids and names are fixed for ever, because stores hold them.
    const TYPES: &'static [EventType];

    /// The upcasters for older layouts: one for each (event type, schema version) that a store may still hold. Opening
    /// refuses a store that holds any other version. It also refuses an upcaster that can never be called
    /// ([`crate::ConfigError::UselessUpcaster`]), because its type is not declared, its version is not older than the
    /// declared one, or another upcaster reads the same version.
    const UPCASTERS: &'static [Upcaster<Self>] = &[];

    /// Returns the event type of this value, one of [`Event::TYPES`]. Publishing an event of any other type fails
    /// ([`crate::Rejected::UndeclaredType`]).
    fn event_type(&self) -> EventTypeId;

    /// Returns the time that the event itself carries, or `None` to use its publish time.
    fn time(&self) -> Option<Time> {
        None
    }

    /// Returns the correlation that the event itself carries, if any.
    fn correlation(&self) -> Correlation {
        Correlation::NONE
    }
}
