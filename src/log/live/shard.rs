//! One shard's part of a live feed.
//!
//! One owner: the feed. It reads the shard's log in order, and knows nothing of other shards.

use std::task::Waker;

use super::batch::Batch;
use crate::error::{LiveError, ReadError, WaitError};
use crate::event::{Event, Key, Sequence, TypeFilter};
use crate::log::format::RecordHeader;
use crate::log::reader::{Ahead, Reader};
use crate::sync::Registration;

/// Events of one shard that a feed looks at before the next shard gets its turn.
const TURN: usize = 256;

/// The events that a feed wants.
#[derive(Debug)]
pub(super) struct Wanted {
    /// `None` for all keys.
    pub(super) key: Option<Key>,
    pub(super) types: TypeFilter,
    /// The feed skips a shard's unread events when there are more than this number.
    pub(super) lag_max: u64,
}

impl Wanted {
    #[inline]
    fn wants(&self, header: &RecordHeader) -> bool {
        self.key.is_none_or(|key| key == header.key) && self.types.wants(header.event_type)
    }
}

/// The end of a shard's turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TurnEnd {
    /// All visible events are read.
    CaughtUp,
    /// There may be more to read.
    More,
    /// No more events will come.
    Ended,
}

/// A shard's log, as far as a feed has read it.
pub(super) struct FollowedShard<E: Event> {
    reader: Reader<E>,
    /// The feed's place among the waiters of the log, while it waits.
    registration: Registration,
    /// `true` if the shard has no more events for the feed.
    has_ended: bool,
}

impl<E: Event> FollowedShard<E> {
    pub(super) fn new(reader: Reader<E>) -> Self {
        let mut shard = Self { reader, registration: Registration::default(), has_ended: false };
        shard.rest();
        shard
    }

    /// Looks at the next [`TURN`] events at most, and adds those that the feed wants to the empty `batch`.
    ///
    /// # Errors
    /// Only if it adds nothing.
    pub(super) fn turn(&mut self, wanted: &Wanted, batch: &mut Batch) -> Result<TurnEnd, LiveError> {
        if self.has_ended {
            return Ok(TurnEnd::Ended);
        }
        self.skip_lag(wanted.lag_max)?;
        let mut left = TURN;
        while left > 0 {
            let ahead = self.reader.ahead(|header| {
                left -= 1;
                left == 0 || wanted.wants(header)
            });
            match ahead {
                Ok(Some(ahead)) if !wanted.wants(&ahead.header) => self.reader.pass(&ahead),
                Ok(Some(ahead)) => match self.add(&ahead, batch) {
                    Some(()) => self.reader.pass(&ahead),
                    // The event comes first in the next batch.
                    None if !batch.is_empty() => break,
                    None => return Err(self.invalid()),
                },
                Ok(None) if !self.reader.log().has_ended() => return Ok(TurnEnd::CaughtUp),
                // Events were appended after the log was read and before it ended.
                Ok(None) if self.reader.offset() < self.reader.horizon() => {}
                // The shard ends with the next turn.
                Ok(None) if !batch.is_empty() => break,
                Ok(None) => return self.end(),
                // The next turn meets the same error.
                Err(_) if !batch.is_empty() => break,
                Err(error) => self.failed(error)?,
            }
        }
        Ok(TurnEnd::More)
    }

    /// Adds the event ahead to the batch. Returns `None` if it is in another segment than the batch, or invalid.
    #[inline]
    fn add(&mut self, ahead: &Ahead, batch: &mut Batch) -> Option<()> {
        let upcasted = if self.reader.is_valid(ahead) { None } else { Some(self.reader.upcasted(ahead)?) };
        let memory = self.reader.memory().filter(|memory| batch.takes(memory))?;
        if batch.is_empty() {
            let base = self.reader.offset().0 - ahead.at as u64;
            batch.begin(self.reader.shard(), base, memory, self.reader.lock());
        }
        batch.push(ahead.at, ahead.len, Sequence(self.reader.sequence()), upcasted);
        Some(())
    }

    #[cold]
    fn invalid(&mut self) -> LiveError {
        self.has_ended = true;
        ReadError::from(self.reader.corruption("an archive is not valid")).into()
    }

    /// Handles an error of reading. Returns `Ok` if the feed has missed no event and continues.
    #[cold]
    fn failed(&mut self, error: ReadError) -> Result<(), LiveError> {
        if let ReadError::BeyondRetention { shard, .. } = error
            && let Some(missed) = self.reader.skip_freed()
        {
            return if missed > 0 { Err(LiveError::Lagged { shard, missed }) } else { Ok(()) };
        }
        // The log cannot be read further, now or later.
        self.has_ended = true;
        Err(error.into())
    }

    /// Skips the unread events if there are more than the feed allows.
    fn skip_lag(&mut self, lag_max: u64) -> Result<(), LiveError> {
        let before = self.reader.sequence();
        if self.reader.log().sequence.get().saturating_sub(before) <= lag_max {
            return Ok(());
        }
        if self.reader.skip_to_latest().is_err() {
            // The feed reads on, and meets the error itself.
            return Ok(());
        }
        let missed = self.reader.sequence().saturating_sub(before);
        if missed > 0 { Err(LiveError::Lagged { shard: self.reader.shard(), missed }) } else { Ok(()) }
    }

    /// Ends the shard's part, with the failure if the shard failed.
    #[cold]
    fn end(&mut self) -> Result<TurnEnd, LiveError> {
        self.has_ended = true;
        match self.reader.log().failure() {
            Some(failure) => Err(WaitError::from(failure.clone()).into()),
            None => Ok(TurnEnd::Ended),
        }
    }

    /// Registers a task, which is woken when more events become visible or the log ends. The caller must look again
    /// afterwards.
    pub(super) fn register(&mut self, waker: &Waker) {
        self.reader.register(&mut self.registration, waker);
    }

    /// As [`FollowedShard::register`], for a thread.
    pub(super) fn register_thread(&mut self, waker: &Waker) {
        self.reader.register_thread(&mut self.registration, waker);
    }

    /// Takes the feed out of the log's waiters.
    pub(super) fn leave(&mut self) {
        self.registration.leave();
    }

    /// Releases the segment: a feed that waits holds nothing.
    pub(super) fn rest(&mut self) {
        self.reader.release();
    }
}
