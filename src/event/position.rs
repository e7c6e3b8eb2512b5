//! Numbers and positions of events as newtypes.

use std::fmt;
use std::str::FromStr;

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

            /// Returns the raw value.
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
    /// The number of a shard, from 0.
    ShardId(u16)
);
position!(
    /// A byte position in one shard's log. Offsets only grow and are never reused.
    Offset(u64)
);
position!(
    /// The number of an event in its shard. The first event has sequence 0.
    Sequence(u64)
);
position!(
    /// The number of an event in its key. The first event has version 1; the largest version is 2⁴⁷ − 1.
    Version(u64)
);
position!(
    /// The stable number of an event type. 0 is reserved for the log's own records.
    EventTypeId(u16)
);
position!(
    /// Ties events of one cause together. 0 means none.
    Correlation(u64)
);
position!(
    /// A time in nanoseconds since 1970-01-01 UTC.
    Time(u64)
);

impl Sequence {
    /// An unknown sequence. Records do not store their sequence; a reader counts it while it reads a log in order.
    pub const UNKNOWN: Self = Self(u64::MAX);
}

impl Correlation {
    /// No correlation.
    pub const NONE: Self = Self(0);

    /// Returns the correlation of a text id: its xxh3 hash. A hash of 0 becomes 1, since 0 means none.
    #[must_use]
    pub fn of(text: &str) -> Self {
        Self(xxhash_rust::xxh3::xxh3_64(text.as_bytes()).max(1))
    }
}

/// The unique id of an event, formed from the position of its record: `shard-offset`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EventId {
    /// The shard whose log holds the event.
    pub shard: ShardId,
    /// The offset of the event's record in that log.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_id_parses_from_its_own_text() {
        let id = EventId { shard: ShardId(3), offset: Offset(4096) };
        assert_eq!(id.to_string(), "3-4096");
        assert_eq!("3-4096".parse::<EventId>().ok(), Some(id));
        assert!("3".parse::<EventId>().is_err());
    }
}
