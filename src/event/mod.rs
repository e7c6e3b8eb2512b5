//! What an event is, and the words for where it stands.
//!
//! Leaf module: positions are newtypes, events are data. Nothing here knows how an event travels.

mod encode;
mod event_type;
mod key;
mod meta;
mod position;
mod schema;

pub(crate) use encode::{ARCHIVE_ALIGN, Root, has_one_size};
pub use encode::{Encode, Scratch, deserialize};
pub use event_type::{EventType, Upcaster};
pub use key::Key;
pub(crate) use key::KeyHash;
#[cfg(test)]
pub(crate) use key::key_routed_by;
pub use meta::Meta;
pub use position::{Correlation, EventId, EventTypeId, Offset, Sequence, ShardId, Time, Version};
pub(crate) use schema::{Schemas, is_declared, upcaster};

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
