//! Positions and numbers as newtypes.

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_id_reads_back_as_written() {
        let id = EventId { shard: ShardId(3), offset: Offset(4096) };
        assert_eq!(id.to_string(), "3-4096");
        assert_eq!("3-4096".parse::<EventId>().ok(), Some(id));
        assert!("3".parse::<EventId>().is_err());
    }
}
