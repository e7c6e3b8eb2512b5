//! The metadata of events.

use super::key::Key;
use super::position::{Correlation, EventId, EventTypeId, Offset, Sequence, ShardId, Time, Version};

/// The metadata of an event: everything the log records about it besides its body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Meta {
    /// The shard that owns the key.
    pub shard: ShardId,
    /// The offset of the event's record.
    pub offset: Offset,
    /// The number of the event in its shard, from 0.
    pub sequence: Sequence,
    /// The key that the event belongs to.
    pub key: Key,
    /// The number of the event in its key, from 1.
    pub version: Version,
    /// The time that the event itself carries or, if it carries none, its publish time.
    pub time: Time,
    /// The event type.
    pub event_type: EventTypeId,
    /// The schema version of the event type.
    pub schema_version: u16,
    /// Ties events of one cause together; [`Correlation::NONE`] if the event has none.
    pub correlation: Correlation,
    /// The key's previous record, if any.
    pub previous: Option<Offset>,
}

impl Meta {
    /// Returns the metadata of a key's first event, at offset 0 of shard 0 and at time 0. This is for tests of code
    /// that takes a `Meta`; set the other fields as needed.
    ///
    /// ```
    /// # use corelane::{EventTypeId, Key, Meta, Version};
    /// let mut meta = Meta::new(Key::new(42), EventTypeId::new(1));
    /// meta.version = Version::new(7);
    /// ```
    #[must_use]
    pub const fn new(key: Key, event_type: EventTypeId) -> Self {
        Self {
            shard: ShardId(0),
            offset: Offset(0),
            sequence: Sequence(0),
            key,
            version: Version(1),
            time: Time(0),
            event_type,
            schema_version: 1,
            correlation: Correlation::NONE,
            previous: None,
        }
    }

    /// Returns the unique id of the event.
    #[must_use]
    pub const fn id(&self) -> EventId {
        EventId { shard: self.shard, offset: self.offset }
    }
}
