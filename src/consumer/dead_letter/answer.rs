//! The arguments and results of the dead letters. Data only.

use std::io;
use std::path::PathBuf;

use crate::config::in_range;
use crate::config::setters;
use crate::error::{ConfigError, OpenError};
use crate::event::{Correlation, EventId, EventTypeId, Key, Meta, Sequence, Time, Version};

/// The reason why an event is a dead letter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum LetterKind {
    /// The handler failed on the event.
    Failed,
    /// The event's key was already parked.
    Behind,
    /// The event could not be decoded as one of this program.
    Undecodable,
}

/// An event that was parked. Its archive is stored with it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct DeadLetter {
    /// The event's unique id.
    pub id: EventId,
    /// The event's key.
    pub key: Key,
    /// The event's type.
    pub event_type: EventTypeId,
    /// The version of the type's layout in the archive.
    pub schema_version: u16,
    /// The event's number in its key.
    pub version: Version,
    /// The event's time.
    pub time: Time,
    /// The event's correlation id.
    pub correlation: Correlation,
    /// The reason why it is a dead letter.
    pub why: LetterKind,
    /// The number of attempts. 0 for an event that never ran.
    pub attempts: u32,
    /// The error of the last attempt, cut to 1,024 bytes.
    pub error: String,
    /// The time when it was parked, or failed first.
    pub first_failed: Time,
    /// The time when it failed last.
    pub last_failed: Time,
}

impl DeadLetter {
    /// Returns the event's metadata. Its sequence number and its previous event are unknown.
    #[must_use]
    pub fn meta(&self) -> Meta {
        Meta {
            shard: self.id.shard,
            offset: self.id.offset,
            sequence: Sequence::UNKNOWN,
            key: self.key,
            version: self.version,
            time: self.time,
            event_type: self.event_type,
            schema_version: self.schema_version,
            correlation: self.correlation,
            previous: None,
        }
    }
}

/// The policy for a new letter without room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum WhenFull {
    /// The consumer halts. No event is lost.
    Halt,
    /// The oldest letters are discarded; each leaves a record and is counted.
    DiscardOldest,
}

/// The limits of the dead letters kept, and the policy for further ones.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeadLetterPolicy {
    pub(super) letters_max: usize,
    pub(super) bytes_max: u64,
    pub(super) when_full: WhenFull,
}

impl Default for DeadLetterPolicy {
    fn default() -> Self {
        Self { letters_max: 1 << 20, bytes_max: 1 << 30, when_full: WhenFull::Halt }
    }
}

impl DeadLetterPolicy {
    setters! {
        /// Letters kept, 1..=2³⁰. Default: 1,048,576. Each takes 52 to 67 bytes of memory, and 37 more until the saved
        /// position is past it.
        letters_max: usize,
        /// Bytes of letters kept, with their archives, 4 KiB..=16 GiB. Default: 1 GiB. The files may take twice as
        /// much, and three times during a compaction.
        bytes_max: u64,
        /// The policy for further letters. Default: [`WhenFull::Halt`].
        when_full: WhenFull,
    }

    pub(super) fn check(&self) -> Result<(), ConfigError> {
        in_range("dead_letters_max", self.letters_max as u64, 1, 1 << 30)?;
        in_range("dead_letters_bytes_max", self.bytes_max, 4 << 10, 16 << 30)
    }
}

/// Counts since the consumer was registered, and current gauges. Every letter is in exactly one of `letters`, `handled`
/// and `discarded`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct LetterStatistics {
    /// Letters that wait, now.
    pub letters: usize,
    /// Their bytes in the files, now.
    pub bytes: u64,
    /// Events that became letters.
    pub parked: u64,
    /// Letters that were handled.
    pub handled: u64,
    /// Letters that were discarded.
    pub discarded: u64,
    /// Discarded letters that made room for others.
    pub overflowed: u64,
    /// Events that were skipped.
    pub skipped: u64,
}

/// One entry to record.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Entry<'a> {
    /// An event becomes a letter.
    Parked { letter: &'a DeadLetter, archive: &'a [u8] },
    /// An event is skipped.
    Skipped { letter: &'a DeadLetter, archive: &'a [u8] },
    /// A letter was tried and failed again; `attempts` counts all attempts.
    FailedAgain { id: EventId, key: Key, attempts: u32, error: &'a str, time: Time },
    /// A letter was handled.
    Handled { id: EventId, key: Key, time: Time },
    /// A letter was discarded.
    Discarded { id: EventId, key: Key, time: Time },
}

/// The side effects of a write.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Written {
    /// Letters discarded to make room, oldest first.
    pub(crate) overflowed: Vec<(Key, EventId)>,
}

/// The reason why a batch was refused. None of its entries counts.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WriteRefused {
    /// There is no room for its letters.
    #[error("there is no room for more dead letters")]
    Full,
    /// The file system failed. The batch may be on disk in part; the next try writes it to another file.
    #[error("{action} {}", path.display())]
    Io {
        /// The action that failed.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
}

/// The reason why dead letters could not be read or compacted. Everything recorded is still there.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LettersError {
    /// Bytes that were durable are damaged.
    #[error("{} is damaged at offset {at}: {why}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The offset in it.
        at: u64,
        /// The kind of damage.
        why: &'static str,
    },
    /// The file system failed.
    #[error("{action} {}", path.display())]
    Io {
        /// The action that failed.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
}

impl From<LettersError> for OpenError {
    fn from(error: LettersError) -> Self {
        match error {
            LettersError::Damaged { path, at, why } => Self::DamagedFile { path, at, why },
            LettersError::Io { action, path, source } => Self::Io { action, path, source },
        }
    }
}
