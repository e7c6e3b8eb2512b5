//! One shard's part of a live feed.
//!
//! One owner: the feed. It reads the shard's log in order, and knows nothing of other shards.

use std::sync::Arc;
use std::task::Waker;

use super::event::{Body, LiveEvent, SharedSegment};
use crate::error::{LiveError, ReadError, WaitError};
use crate::event::{Event, Key, TypeFilter};
use crate::log::format::{RECORD_HEADER_BYTES, RecordHeader};
use crate::log::reader::{Ahead, Reader};

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

/// A shard's log, as far as a feed has read it.
pub(super) struct FollowedShard<E: Event> {
    reader: Reader<E>,
    /// The segment of the last event returned, which later events share.
    segment: Option<Arc<SharedSegment>>,
    /// `true` if the shard has no more events for the feed.
    has_ended: bool,
}

impl<E: Event> FollowedShard<E> {
    pub(super) fn new(reader: Reader<E>) -> Self {
        let mut shard = Self { reader, segment: None, has_ended: false };
        shard.rest();
        shard
    }

    /// Returns `true` if the shard has no more events for the feed.
    pub(super) fn has_ended(&self) -> bool {
        self.has_ended
    }

    /// Returns the next event that the feed wants, or an error. `None` if all visible events are read, or if `left`
    /// events have been looked at. Takes the number of events looked at from `left`.
    #[inline]
    pub(super) fn next(&mut self, wanted: &Wanted, left: &mut usize) -> Option<Result<LiveEvent<E>, LiveError>> {
        loop {
            let ahead = self.reader.ahead(|header| {
                *left -= 1;
                *left == 0 || wanted.wants(header)
            });
            match ahead {
                Ok(Some(ahead)) if wanted.wants(&ahead.header) => return Some(self.take(&ahead)),
                Ok(Some(ahead)) => {
                    self.reader.pass(&ahead);
                    return None;
                }
                Ok(None) if !self.reader.log().has_ended() => return None,
                // Events were appended after the log was read and before it ended.
                Ok(None) if self.reader.offset() < self.reader.horizon() => {}
                Ok(None) => return self.end().map(Err),
                Err(error) => {
                    if let Some(error) = self.failed(error) {
                        return Some(Err(error));
                    }
                }
            }
        }
    }

    /// Returns the event ahead, and moves past it.
    #[inline]
    fn take(&mut self, ahead: &Ahead) -> Result<LiveEvent<E>, LiveError> {
        let meta = self.reader.meta(ahead);
        match self.body(ahead) {
            Some(body) => {
                self.reader.pass(ahead);
                Ok(LiveEvent::new(meta, body))
            }
            None => Err(self.invalid()),
        }
    }

    /// Returns the archive of the event ahead, or `None` if it is invalid.
    #[inline]
    fn body(&mut self, ahead: &Ahead) -> Option<Body> {
        if !self.reader.is_valid(ahead) {
            return self.reader.upcasted(ahead).map(|archive| Body::Upcasted(Arc::new(archive)));
        }
        let memory = self.reader.memory()?;
        let segment = match &self.segment {
            Some(segment) if segment.is_of(memory) => Arc::clone(segment),
            _ => Arc::clone(self.segment.insert(SharedSegment::new(memory, self.reader.lock()))),
        };
        Some(Body::InPlace(segment, ahead.at + RECORD_HEADER_BYTES, ahead.len - RECORD_HEADER_BYTES))
    }

    #[cold]
    fn invalid(&mut self) -> LiveError {
        self.has_ended = true;
        ReadError::from(self.reader.corruption("an archive is not valid")).into()
    }

    /// Handles an error of reading. Returns `None` if the feed has lost no event and continues.
    #[cold]
    fn failed(&mut self, error: ReadError) -> Option<LiveError> {
        if let ReadError::BeyondRetention { shard, .. } = error
            && let Some(missed) = self.reader.skip_freed()
        {
            return (missed > 0).then_some(LiveError::Lagged { shard, missed });
        }
        // The log cannot be read further, now or later.
        self.has_ended = true;
        Some(error.into())
    }

    /// Skips the unread events if there are more than the feed allows. Returns the error that says so.
    #[inline]
    pub(super) fn skip_lag(&mut self, lag_max: u64) -> Option<LiveError> {
        let unread = self.reader.log().sequence.get().saturating_sub(self.reader.sequence());
        if unread > lag_max { self.skip_unread() } else { None }
    }

    #[cold]
    fn skip_unread(&mut self) -> Option<LiveError> {
        let before = self.reader.sequence();
        match self.reader.skip_to_latest() {
            Ok(()) => {
                let missed = self.reader.sequence().saturating_sub(before);
                (missed > 0).then_some(LiveError::Lagged { shard: self.reader.shard(), missed })
            }
            // The feed reads on, and meets the error itself.
            Err(_) => None,
        }
    }

    /// Ends the shard's part. Returns the failure, if the shard failed.
    #[cold]
    fn end(&mut self) -> Option<LiveError> {
        self.has_ended = true;
        let failure = self.reader.log().failure()?;
        Some(WaitError::from(failure.clone()).into())
    }

    /// Registers a waker, which is woken when more events become visible or the log ends. The caller must look again
    /// afterwards.
    pub(super) fn register(&mut self, waker: &Waker) {
        self.reader.register(waker);
    }

    /// Lets go of the segment: a feed that waits holds nothing.
    pub(super) fn rest(&mut self) {
        self.segment = None;
        self.reader.release();
    }
}
