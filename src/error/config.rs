//! Errors of a configuration.

use crate::event::EventTypeId;

/// An invalid configuration, found by [`crate::Config::validate`] or when an engine or a gate opens.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// A value is outside the supported range.
    #[error("{name} is {value}, but must be in {min}..={max}")]
    OutOfRange {
        /// The setting.
        name: &'static str,
        /// The value given.
        value: u64,
        /// The smallest allowed value.
        min: u64,
        /// The largest allowed value.
        max: u64,
    },
    /// A value must be a power of two.
    #[error("{name} is {value}, but must be a power of two")]
    NotPowerOfTwo {
        /// The setting.
        name: &'static str,
        /// The value given.
        value: u64,
    },
    /// An event type id is declared twice, or is 0.
    #[error("event type id {id} is declared twice, or is 0")]
    DuplicateEventType {
        /// The id.
        id: EventTypeId,
    },
    /// Two event types share one name.
    #[error("event types {first} and {second} are both named \"{name}\"")]
    DuplicateEventName {
        /// The name.
        name: String,
        /// The type declared first.
        first: EventTypeId,
        /// The other type.
        second: EventTypeId,
    },
    /// The name of an event type is longer than the manifest can hold.
    #[error("the name of event type {id} has {bytes} bytes, more than {bytes_max}")]
    EventNameTooLong {
        /// The id of the event type.
        id: EventTypeId,
        /// The length of its name in bytes.
        bytes: usize,
        /// The limit in bytes.
        bytes_max: usize,
    },
    /// The name of a placement is empty or too long.
    #[error("the placement's name \"{name}\" must have 1 to {bytes_max} bytes")]
    PlacementName {
        /// The name.
        name: String,
        /// The limit in bytes.
        bytes_max: usize,
    },
    /// An upcaster can never be called: its event type is not declared, its schema version is not older than the
    /// declared one, or another upcaster reads the same version.
    #[error("the upcaster for schema version {schema_version} of event type {event_type} can never be called")]
    UselessUpcaster {
        /// The event type it names.
        event_type: EventTypeId,
        /// The schema version it names.
        schema_version: u16,
    },
}
