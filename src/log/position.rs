//! A position in one shard's log that also identifies the log. A follower saves the position with the data made from
//! the events.
//!
//! Immutable: a reader creates it. A position names the store and the last event before itself, with the CRC of that
//! event. The CRC is seeded with the salt of its segment and covers the event's time. So a log whose history has
//! diverged (restored from a copy, or with a lost tail written anew) has a different CRC there.
//!
//! ```text
//!  0 store u64    8 offset u64   16 last u64   24 sequence u64   32 check u32   36 shard u16   38 version u16
//! ```

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use crate::error::{PositionError, ReadError};
use crate::event::{Offset, Sequence, ShardId};
use crate::log::finder::Finder;
use crate::log::format::is_offset;
use crate::log::segment::ShardLog;
use crate::storage::Lock;
use crate::storage::framed::{u16_at, u32_at, u64_at};
use crate::storage::memory::padded;

/// The version of the layout of [`Position::to_bytes`].
const VERSION: u16 = 1;

/// A position in one shard's log. Save it with the data made from the events before it. The position is verified when
/// reading continues there: [`crate::Engine::reader_from`], [`crate::consumer::Sink::position`].
///
/// A position is opaque. Store its [`Position::BYTES`] bytes in a blob column, or its text ([`fmt::Display`] and
/// [`FromStr`]) with two hexadecimal digits per byte. Both encodings are fixed for ever.
///
/// ```
/// # use corelane::log::Position;
/// # fn example(position: Position) -> Result<(), corelane::error::PositionError> {
/// assert_eq!(Position::from_bytes(&position.to_bytes())?, position);
/// assert_eq!(position.to_string().parse::<Position>()?, position);
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Position {
    store: u64,
    shard: ShardId,
    pub(super) offset: Offset,
    /// The last event before `offset`; 0 if unknown.
    pub(super) last: Offset,
    /// The CRC word of the record at `last`.
    check: u32,
    /// The sequence of the next event.
    pub(super) sequence: Sequence,
}

impl Position {
    /// The length of [`Position::to_bytes`] in bytes.
    pub const BYTES: usize = 40;

    /// Creates a position without a last event: the beginning of a shard's log, or an offset before which the events
    /// are unknown.
    pub(crate) fn unwitnessed(store: u64, shard: ShardId, offset: Offset, sequence: Sequence) -> Self {
        Self { store, shard, offset, last: Offset(0), check: 0, sequence }
    }

    /// Creates the position after the event at `last`, whose CRC word is `check`.
    pub(crate) fn behind(
        store: u64,
        shard: ShardId,
        offset: Offset,
        (last, check): (Offset, u32),
        sequence: Sequence,
    ) -> Self {
        Self { store, shard, offset, last, check, sequence }
    }

    /// Returns the id of the store that the position belongs to.
    #[must_use]
    pub fn store(&self) -> u64 {
        self.store
    }

    /// Returns the shard.
    #[must_use]
    pub fn shard(&self) -> ShardId {
        self.shard
    }

    /// Returns the offset at which reading continues.
    #[must_use]
    pub fn offset(&self) -> Offset {
        self.offset
    }

    /// Returns the sequence of the next event: the number of events of the shard before this position.
    #[must_use]
    pub fn sequence(&self) -> Sequence {
        self.sequence
    }

    /// Returns the position limited to the log's `end`, after everything beyond it was lost.
    pub(crate) fn cut(self, end: Offset) -> Self {
        let (offset, last) = (self.offset.min(end), self.last);
        if last < end { Self { offset, ..self } } else { Self { offset, last: Offset(0), check: 0, ..self } }
    }

    /// Returns the last event before the position and its CRC word; 0 if unknown.
    pub(crate) fn last(&self) -> (Offset, u32) {
        (self.last, self.check)
    }

    /// Encodes the position as bytes.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; Self::BYTES] {
        let mut out = [0; Self::BYTES];
        for (at, word) in [self.store, self.offset.0, self.last.0, self.sequence.0].into_iter().enumerate() {
            out[8 * at..][..8].copy_from_slice(&word.to_le_bytes());
        }
        out[32..36].copy_from_slice(&self.check.to_le_bytes());
        out[36..38].copy_from_slice(&self.shard.0.to_le_bytes());
        out[38..40].copy_from_slice(&VERSION.to_le_bytes());
        out
    }

    /// Decodes a position from the bytes of [`Position::to_bytes`].
    ///
    /// # Errors
    /// Returns [`PositionError::Malformed`] if the bytes are not a position.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, PositionError> {
        let malformed = |why| PositionError::Malformed { why };
        if bytes.len() != Self::BYTES {
            return Err(malformed("it does not have 40 bytes"));
        }
        if u16_at(bytes, 38) != VERSION {
            return Err(malformed("it has a version that this build does not know"));
        }
        let (offset, last) = (Offset(u64_at(bytes, 8)), Offset(u64_at(bytes, 16)));
        if !is_offset(offset) || !is_offset(last) || (last >= offset && last.0 > 0) {
            return Err(malformed("no event can be at its offsets"));
        }
        let (store, sequence, check) = (u64_at(bytes, 0), Sequence(u64_at(bytes, 24)), u32_at(bytes, 32));
        Ok(Self { store, shard: ShardId(u16_at(bytes, 36)), offset, last, check, sequence })
    }

    /// Verifies that this is a position of `log`: the store and the shard are those of the log, the position is not
    /// beyond the log's end, and the event before it matches. If retention has freed that event, only store, shard and
    /// end are compared.
    pub(crate) fn check(&self, log: &Arc<ShardLog>, lock: &Arc<dyn Lock>) -> Result<(), ReadError> {
        let (shard, position) = (log.shard, self.offset);
        if self.store != log.store {
            return Err(PositionError::OtherStore { shard, position: self.store, store: log.store }.into());
        }
        if self.shard != shard {
            return Err(PositionError::OtherShard { shard, position: self.shard }.into());
        }
        let end = Offset(log.appended.get());
        if position > end {
            return Err(PositionError::AheadOfLog { shard, position, end }.into());
        }
        if self.last.0 == 0 || self.last < log.earliest() {
            return Ok(());
        }
        let other = |why| PositionError::OtherHistory { shard, position, why }.into();
        let mut finder = Finder::new(Arc::clone(log), Arc::clone(lock));
        let place = match finder.find(self.last) {
            Ok(place) => place,
            // Retention freed it just now.
            Err(ReadError::BeyondRetention { .. }) => return Ok(()),
            Err(ReadError::NotARecord { .. }) => {
                return Err(other("no event begins at the offset of the last event before the position"));
            }
            Err(error) => return Err(error),
        };
        match self.does_not_follow(place.len, finder.check_word(&place)) {
            Some(why) => Err(other(why)),
            None => Ok(()),
        }
    }

    /// Returns the reason why the record at `last`, with this length and CRC word, is not the event before the
    /// position, or `None` if it is.
    pub(crate) fn does_not_follow(&self, len: usize, check_word: Option<u32>) -> Option<&'static str> {
        if check_word != Some(self.check) {
            return Some("the last event before the position differs");
        }
        let is_before = self.last.0 + padded(len) as u64 <= self.offset.0;
        (!is_before).then_some("the last event before the position ends after it")
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.to_bytes().iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl FromStr for Position {
    type Err = PositionError;

    fn from_str(text: &str) -> Result<Self, PositionError> {
        let malformed = |why| PositionError::Malformed { why };
        if text.len() != 2 * Self::BYTES || !text.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return Err(malformed("it does not have 80 hexadecimal digits"));
        }
        let mut bytes = [0; Self::BYTES];
        for (byte, digits) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
            let digits =
                std::str::from_utf8(digits).map_err(|_| malformed("it does not have 80 hexadecimal digits"))?;
            *byte = u8::from_str_radix(digits, 16).map_err(|_| malformed("it does not have 80 hexadecimal digits"))?;
        }
        Self::from_bytes(&bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Position {
        let store = 0x0102_0304_0506_0708;
        Position::behind(store, ShardId(3), Offset(0x2010), (Offset(0x1000), 0x0a0b_0c0d), Sequence(17))
    }

    #[test]
    fn the_encodings_as_bytes_and_text_are_fixed() {
        let text = "0807060504030201102000000000000000100000000000001100000000000000\
                    0d0c0b0a03000100";
        assert_eq!(example().to_string(), text);
        assert_eq!(text.parse(), Ok(example()));
        assert_eq!(Position::from_bytes(&example().to_bytes()), Ok(example()));
    }

    #[test]
    fn malformed_bytes_and_texts_are_refused() {
        let bytes = example().to_bytes();
        for len in 0..bytes.len() {
            assert!(Position::from_bytes(&bytes[..len]).is_err(), "{len} bytes");
        }
        for (at, byte) in [(38, 2), (8, 1), (16, 8), (17, 0x21)] {
            let mut bytes = bytes;
            bytes[at] = byte;
            assert!(Position::from_bytes(&bytes).is_err(), "byte {at}");
        }
        let text = example().to_string();
        for wrong in [&text[1..], &format!("{text}0"), &text.replacen('0', "g", 1), &text.replacen("08", "é", 1)] {
            assert!(wrong.parse::<Position>().is_err(), "{wrong}");
        }
    }
}
