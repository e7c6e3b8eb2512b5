//! The feed: takes its shards in turn, and waits as a thread or as a task.
//!
//! One owner: the application's thread or task.

use std::fmt;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};
use std::time::Instant;

use futures_core::{FusedStream, Stream};

use super::batch::Batch;
use super::event::{LiveBatch, LiveEvent};
use super::shard::{FollowedShard, TurnEnd, Wanted};
use crate::error::{LiveError, WaitError};
use crate::event::Event;
use crate::log::reader::Record;
use crate::sync::{Deadline, may_wait, thread, thread_waker};

/// Turns after which a task that always finds something to read lets other tasks run.
const TURNS_MAX: usize = 16;

/// A live feed: events as they come, for readers that come and go. [`crate::Engine::live`] sets one up.
///
/// A feed is a blocking iterator (`for event in &mut feed`, [`Live::next_until`]), and a `futures_core::Stream` for
/// tasks on any runtime ([`Live::next_async`] without further crates). It returns each shard's events in the order of
/// the log, so each key's events in order; nothing is promised between shards, and no shard keeps others waiting.
///
/// The store keeps nothing for a feed, and retention does not wait for it. A feed that is too slow gets
/// [`LiveError::Lagged`] with the exact number of events missed, and continues with the earliest event held. A shard that
/// failed or cannot be read gives one error, and has then ended for the feed; other shards continue.
///
/// The feed ends, with `None`, when the engine has closed and every event was returned. If a shard has failed, the feed
/// returns what is readable, then [`WaitError::ShardFailed`]. Until it ends or is dropped, it keeps the store locked. A
/// feed that waits holds no segment; while it reads, it holds one segment per shard, whose file then cannot be reused.
pub struct Live<E: Event> {
    /// The shards that have not ended.
    shards: Vec<FollowedShard<E>>,
    wanted: Wanted,
    /// The shard whose turn is next.
    next_shard: usize,
    /// Turns left before other tasks run.
    turns_left: usize,
    /// Events that were found. A batch that nobody else holds is used again.
    batch: Arc<Batch>,
    /// The event of the batch that is returned next.
    next: usize,
}

impl<E: Event> fmt::Debug for Live<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Live").field("shards", &self.shards.len()).field("wanted", &self.wanted).finish_non_exhaustive()
    }
}

/// The result of a look at the shards.
enum Looked {
    /// The batch has events.
    Found,
    /// All visible events are read.
    Nothing,
    /// There may be more to read, but other tasks come first.
    Yield,
    /// All shards have ended.
    Ended,
}

impl<E: Event> Live<E> {
    pub(super) fn new(shards: Vec<FollowedShard<E>>, wanted: Wanted) -> Self {
        Self { shards, wanted, next_shard: 0, turns_left: TURNS_MAX, batch: Arc::default(), next: 0 }
    }

    /// Returns the next event in place. Blocks the thread until there is one, or until `deadline`; `Duration::ZERO` does
    /// not block. A call may also reach its deadline while it passes over events that the feed does not want; the next
    /// call continues there. Returns `None` at the end of the feed.
    ///
    /// # Errors
    /// `Lagged`, `Read` or `Wait(ShardFailed)` as described at [`Live`]. `Wait(TimedOut)` at the deadline.
    /// `Wait(OnEngineThread)` if there is no event, on a thread that an engine waits for. The last two lose nothing.
    #[inline]
    pub fn next_until(&mut self, deadline: impl Into<Deadline>) -> Result<Option<Record<'_, E>>, LiveError> {
        if self.next == self.batch.len() && !self.wait(deadline.into().instant())? {
            return Ok(None);
        }
        let index = self.pass();
        Ok(Some(self.batch.record(index)))
    }

    /// Returns the next event in place as soon as there is one, or `None` at the end of the feed. For tasks.
    ///
    /// Cancel safety: a future that is dropped before it is ready has taken no event.
    ///
    /// # Errors
    /// `Lagged`, `Read` or `Wait(ShardFailed)` as described at [`Live`].
    #[inline]
    pub async fn next_async(&mut self) -> Result<Option<Record<'_, E>>, LiveError> {
        if self.next == self.batch.len() && !poll_fn(|context| self.poll_found(context)).await? {
            return Ok(None);
        }
        let index = self.pass();
        Ok(Some(self.batch.record(index)))
    }

    /// Returns a stream of the same events in batches. A task that takes in millions of events a second needs it: a
    /// batch is shared once, where each [`LiveEvent`] is shared on its own.
    #[must_use]
    pub fn batches(self) -> LiveBatches<E> {
        LiveBatches { feed: self }
    }

    /// Moves past the next event of the batch, and returns its index.
    #[inline]
    fn pass(&mut self) -> usize {
        self.next += 1;
        self.next - 1
    }

    /// Blocks until the batch has events. Returns `false` at the end of the feed.
    fn wait(&mut self, deadline: Option<Instant>) -> Result<bool, LiveError> {
        let mut waker: Option<Waker> = None;
        let mut is_registered = false;
        loop {
            match self.look()? {
                Looked::Found => return Ok(true),
                Looked::Ended => return Ok(false),
                Looked::Nothing if !may_wait() => return Err(WaitError::OnEngineThread.into()),
                Looked::Nothing | Looked::Yield if deadline.is_some_and(|at| at <= Instant::now()) => {
                    self.rest();
                    self.shards.iter_mut().for_each(FollowedShard::leave);
                    return Err(WaitError::TimedOut.into());
                }
                Looked::Nothing if is_registered => {
                    self.rest();
                    park_until(deadline);
                    is_registered = false;
                }
                Looked::Nothing => {
                    let waker = waker.get_or_insert_with(thread_waker);
                    self.shards.iter_mut().for_each(|shard| shard.register_thread(waker));
                    is_registered = true;
                }
                Looked::Yield => {}
            }
        }
    }

    /// Completes when the batch has events, or with `false` at the end of the feed. While it is pending, the task's
    /// waker is registered and the feed holds no segment.
    fn poll_found(&mut self, context: &Context<'_>) -> Poll<Result<bool, LiveError>> {
        let mut is_registered = false;
        loop {
            match self.look()? {
                Looked::Found => return Poll::Ready(Ok(true)),
                Looked::Ended => return Poll::Ready(Ok(false)),
                Looked::Yield => {
                    context.waker().wake_by_ref();
                    return Poll::Pending;
                }
                Looked::Nothing if is_registered => {
                    self.rest();
                    return Poll::Pending;
                }
                Looked::Nothing => {
                    self.shards.iter_mut().for_each(|shard| shard.register(context.waker()));
                    // Look once more: an event may have come between the look and the registration.
                    is_registered = true;
                }
            }
        }
    }

    /// Fills the batch, whose events have all been returned, from the shard whose turn it is.
    fn look(&mut self) -> Result<Looked, LiveError> {
        let mut caught_up = 0;
        while caught_up < self.shards.len() {
            if self.turns_left == 0 {
                self.turns_left = TURNS_MAX;
                return Ok(Looked::Yield);
            }
            let batch = exclusive(&mut self.batch);
            batch.clear();
            self.next = 0;
            let at = self.next_shard;
            match self.shards[at].turn(&self.wanted, batch)? {
                // This releases the store's lock with the last shard.
                TurnEnd::Ended => drop(self.shards.remove(at)),
                TurnEnd::CaughtUp => {
                    caught_up += 1;
                    self.next_shard += 1;
                }
                TurnEnd::More => {
                    caught_up = 0;
                    self.next_shard += 1;
                    self.turns_left -= 1;
                }
            }
            self.next_shard = if self.next_shard < self.shards.len() { self.next_shard } else { 0 };
            if !self.batch.is_empty() {
                return Ok(Looked::Found);
            }
        }
        self.turns_left = TURNS_MAX;
        Ok(if self.shards.is_empty() { Looked::Ended } else { Looked::Nothing })
    }

    /// Releases all segments. The batch is empty after a look that found nothing.
    fn rest(&mut self) {
        self.shards.iter_mut().for_each(FollowedShard::rest);
    }
}

/// Returns the batch if nobody else holds it, or replaces it.
fn exclusive(batch: &mut Arc<Batch>) -> &mut Batch {
    if Arc::get_mut(batch).is_none() {
        *batch = Arc::default();
    }
    Arc::get_mut(batch).expect("a batch that nobody else holds")
}

/// Blocks the thread until it is woken, at most until `deadline`.
fn park_until(deadline: Option<Instant>) {
    match deadline {
        Some(at) => thread::park_timeout(at.saturating_duration_since(Instant::now())),
        None => thread::park(),
    }
}

/// Cancel safety: an event is taken only by the poll that returns it. A stream that is never polled costs nothing. After
/// several thousand events without a pause, a poll wakes its own task and returns `Pending`, so that other tasks run.
impl<E: Event> Stream for Live<E> {
    type Item = Result<LiveEvent<E>, LiveError>;

    #[inline]
    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let feed = self.get_mut();
        if feed.next == feed.batch.len() {
            match ready!(feed.poll_found(context)) {
                Ok(true) => {}
                Ok(false) => return Poll::Ready(None),
                Err(error) => return Poll::Ready(Some(Err(error))),
            }
        }
        let index = feed.pass();
        Poll::Ready(Some(Ok(LiveEvent::new(Arc::clone(&feed.batch), index))))
    }
}

impl<E: Event> FusedStream for Live<E> {
    fn is_terminated(&self) -> bool {
        self.shards.is_empty() && self.next == self.batch.len()
    }
}

/// The events of a [`Live`] feed in batches.
///
/// Cancel safety: a batch is taken only by the poll that returns it.
#[derive(Debug)]
pub struct LiveBatches<E: Event> {
    feed: Live<E>,
}

impl<E: Event> Stream for LiveBatches<E> {
    type Item = Result<LiveBatch<E>, LiveError>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let feed = &mut self.get_mut().feed;
        if feed.next == feed.batch.len() {
            match ready!(feed.poll_found(context)) {
                Ok(true) => {}
                Ok(false) => return Poll::Ready(None),
                Err(error) => return Poll::Ready(Some(Err(error))),
            }
        }
        let from = std::mem::replace(&mut feed.next, feed.batch.len());
        Poll::Ready(Some(Ok(LiveBatch::new(Arc::clone(&feed.batch), from))))
    }
}

impl<E: Event> FusedStream for LiveBatches<E> {
    fn is_terminated(&self) -> bool {
        self.feed.is_terminated()
    }
}

impl<'a, E: Event> IntoIterator for &'a mut Live<E> {
    type Item = Result<LiveEvent<E>, LiveError>;
    type IntoIter = LiveIter<'a, E>;

    fn into_iter(self) -> LiveIter<'a, E> {
        LiveIter { feed: self, is_over: false }
    }
}

/// The events of a [`Live`] feed. Blocks the thread until there is one. On a thread that must not wait, it returns
/// [`WaitError::OnEngineThread`] instead, and ends.
#[derive(Debug)]
pub struct LiveIter<'a, E: Event> {
    feed: &'a mut Live<E>,
    is_over: bool,
}

impl<E: Event> Iterator for LiveIter<'_, E> {
    type Item = Result<LiveEvent<E>, LiveError>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        let feed = &mut *self.feed;
        if self.is_over {
            return None;
        }
        if feed.next == feed.batch.len() {
            match feed.wait(None) {
                Ok(true) => {}
                Ok(false) => return None,
                Err(error) => {
                    self.is_over = matches!(error, LiveError::Wait(WaitError::OnEngineThread));
                    return Some(Err(error));
                }
            }
        }
        let index = feed.pass();
        Some(Ok(LiveEvent::new(Arc::clone(&feed.batch), index)))
    }
}
