//! What the dead letters are told and what they answer. Data only.

use std::io;
use std::path::PathBuf;

use crate::config::in_range;
use crate::config::setters;
use crate::error::{ConfigError, OpenError};
use crate::event::{Correlation, EventId, EventTypeId, Key, Meta, Sequence, Time, Version};

/// Why an event is a dead letter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LetterKind {
    /// The service failed on it.
    Failed,
    /// Its key was parked before it came.
    Behind,
    /// It could not be read as an event of this program.
    Undecodable,
}

/// An event that was set aside, and what is known of it. Its archive is kept beside it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct DeadLetter {
    /// The event's unique id.
    pub id: EventId,
    /// Whose event.
    pub key: Key,
    /// Which type.
    pub event_type: EventTypeId,
    /// Version of the type's layout in the archive.
    pub schema_version: u16,
    /// The event's number in its key.
    pub version: Version,
    /// The event's time.
    pub time: Time,
    /// Ties events of one cause together.
    pub correlation: Correlation,
    /// Why it is here.
    pub why: LetterKind,
    /// How often it was tried. 0 for what never ran.
    pub attempts: u32,
    /// What the last attempt said: at most 1,024 bytes of it are kept.
    pub error: String,
    /// When it was set aside.
    pub first_failed: Time,
    /// When it failed last.
    pub last_failed: Time,
}

impl DeadLetter {
    /// What the log knew of its event; the sequence is not known, nor what came before it.
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

/// What happens when there is no room for a further letter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WhenFull {
    /// It is refused and the consumer stops. Nothing is lost.
    Halt,
    /// The letters that were written first make room; each leaves a record and is counted.
    DiscardOldest,
}

/// How many dead letters are kept, and what happens to more.
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
        /// Letters kept, 1..=2³⁰. Default: 1,048,576. Each takes 52 to 67 bytes of memory, and 37 more while the
        /// checkpoint is not past it.
        letters_max: usize,
        /// Bytes of letters kept, with their archives, 4 KiB..=16 GiB. Default: 1 GiB. The files may take twice as much, and
        /// three times while they are being made smaller.
        bytes_max: u64,
        /// What happens to more. Default: [`WhenFull::Halt`].
        when_full: WhenFull,
    }

    pub(super) fn check(&self) -> Result<(), ConfigError> {
        in_range("dead_letters_max", self.letters_max as u64, 1, 1 << 30)?;
        in_range("dead_letters_bytes_max", self.bytes_max, 4 << 10, 16 << 30)
    }
}

/// Counts since the consumer was made, and what is there now. Every letter is in exactly one of `letters`, `handled` and
/// `discarded`.
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
    /// Those of the discarded that made room for others.
    pub overflowed: u64,
    /// Events that were skipped.
    pub skipped: u64,
}

/// One thing to be recorded.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Entry<'a> {
    /// An event becomes a letter.
    Parked { letter: &'a DeadLetter, archive: &'a [u8] },
    /// An event is left out.
    Skipped { letter: &'a DeadLetter, archive: &'a [u8] },
    /// A letter was tried and failed again; `attempts` counts all of them.
    FailedAgain { id: EventId, key: Key, attempts: u32, error: &'a str, time: Time },
    /// A letter was tried and done.
    Handled { id: EventId, key: Key, time: Time },
    /// A letter was given up.
    Discarded { id: EventId, key: Key, time: Time },
}

/// What a write did besides.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Written {
    /// Letters that made room, oldest first.
    pub(crate) overflowed: Vec<(Key, EventId)>,
}

/// Nothing of the batch counts.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WriteRefused {
    /// There is no room for its letters.
    #[error("there is no room for more dead letters")]
    Full,
    /// The file system refused. What of the batch is on the disk is unknown; it is written again to another file.
    #[error("{action} {}: {source}", path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// To which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// Why dead letters could not be read or their files not be made smaller. What was recorded still is.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LettersError {
    /// Bytes that had been durable are damaged.
    #[error("{}, at {at}: {why}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where in it.
        at: u64,
        /// What does not hold.
        why: &'static str,
    },
    /// The file system refused.
    #[error("{action} {}: {source}", path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// To which file.
        path: PathBuf,
        /// What the system said.
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
