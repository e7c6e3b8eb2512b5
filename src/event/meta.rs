//! What the log knows of an event besides its body.

use super::key::Key;
use super::position::{Correlation, EventId, EventTypeId, Offset, Sequence, ShardId, Time, Version};

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
