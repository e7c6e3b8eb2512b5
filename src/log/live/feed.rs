//! The feed: takes its shards in turn, and waits as a thread or as a task.
//!
//! One owner: the application's thread or task.

use std::fmt;
use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use futures_core::{FusedStream, Stream};

use super::event::LiveEvent;
use super::shard::{FollowedShard, Wanted};
use crate::error::{LiveError, WaitError};
use crate::event::Event;
use crate::sync::{Deadline, may_wait, thread, thread_waker};

/// Events of one shard that a feed looks at before the next shard gets its turn.
const TURN: usize = 256;
/// Turns after which a task that always finds something to read lets other tasks run.
const TURNS_MAX: usize = 16;

/// A live feed: events as they come, for readers that come and go. Made by [`crate::Engine::live`].
///
/// A feed is a blocking iterator (`for event in &mut feed`, [`Live::next_until`]), and a `futures_core::Stream` for
/// tasks on any runtime ([`Live::next_async`] without further crates). It returns each shard's events in the order of
/// the log, so each key's events in order; nothing is promised between shards, and no shard keeps others waiting.
///
/// The store keeps nothing for a feed, and retention does not wait for it. A feed that is too slow gets
/// [`LiveError::Lagged`] with the exact number of events missed, and continues with the earliest event held. After any
/// other error the shard concerned has ended for the feed; other shards continue.
///
/// The feed ends, with `None`, when the engine has closed and every event was returned. If a shard has failed, the feed
/// returns what is readable, then [`WaitError::ShardFailed`]. Until it ends or is dropped, it keeps the store locked. A
/// feed that waits holds no segment; while it reads, it holds one segment per shard, whose file then cannot be reused.
pub struct Live<E: Event> {
    /// The shards that have not ended.
    shards: Vec<FollowedShard<E>>,
    wanted: Wanted,
    /// The shard whose turn it is.
    current: usize,
    /// Events that this turn may still look at.
    left: usize,
    /// Turns left before other tasks run.
    turns_left: usize,
}

impl<E: Event> fmt::Debug for Live<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Live").field("shards", &self.shards.len()).field("wanted", &self.wanted).finish_non_exhaustive()
    }
}

/// The result of a look at the shards.
enum Looked<E: Event> {
    Found(Result<LiveEvent<E>, LiveError>),
    /// All visible events are read.
    Nothing,
    /// There may be more to read, but other tasks come first.
    Yield,
    /// All shards have ended.
    Ended,
}

impl<E: Event> Live<E> {
    pub(super) fn new(shards: Vec<FollowedShard<E>>, wanted: Wanted) -> Self {
        Self { shards, wanted, current: 0, left: TURN, turns_left: TURNS_MAX }
    }

    /// Returns the next event. Blocks the thread until there is one, or until `deadline`; `Duration::ZERO` does not
    /// block. Returns `None` at the end of the feed.
    ///
    /// # Errors
    /// `Lagged`, `Read` or `Wait(ShardFailed)` as described at [`Live`]. `Wait(TimedOut)` at the deadline.
    /// `Wait(OnEngineThread)` if there is no event, on a thread that an engine waits for. The last two lose nothing.
    #[inline]
    pub fn next_until(&mut self, deadline: impl Into<Deadline>) -> Result<Option<LiveEvent<E>>, LiveError> {
        match self.look() {
            Looked::Found(found) => found.map(Some),
            Looked::Ended => Ok(None),
            Looked::Nothing | Looked::Yield => self.wait(deadline.into().instant()),
        }
    }

    #[cold]
    fn wait(&mut self, deadline: Option<Instant>) -> Result<Option<LiveEvent<E>>, LiveError> {
        let mut waker: Option<Waker> = None;
        let mut is_registered = false;
        loop {
            match self.look() {
                Looked::Found(found) => return found.map(Some),
                Looked::Ended => return Ok(None),
                Looked::Nothing if !may_wait() => return Err(WaitError::OnEngineThread.into()),
                Looked::Nothing if is_registered => {
                    self.rest();
                    park_until(deadline);
                    is_registered = false;
                }
                Looked::Nothing => {
                    self.register(waker.get_or_insert_with(thread_waker));
                    is_registered = true;
                    continue;
                }
                Looked::Yield => {}
            }
            if deadline.is_some_and(|at| at <= Instant::now()) {
                return Err(WaitError::TimedOut.into());
            }
        }
    }

    /// Returns the next event as soon as there is one, or `None` at the end of the feed. For tasks.
    ///
    /// Cancel safety: a future that is dropped before it is ready has taken no event.
    ///
    /// # Errors
    /// `Lagged`, `Read` or `Wait(ShardFailed)` as described at [`Live`].
    pub async fn next_async(&mut self) -> Result<Option<LiveEvent<E>>, LiveError> {
        poll_fn(|context| self.poll_event(context)).await.transpose()
    }

    /// Returns the next event if there is one. Otherwise registers the task's waker, and lets go of all segments.
    #[inline]
    fn poll_event(&mut self, context: &Context<'_>) -> Poll<Option<Result<LiveEvent<E>, LiveError>>> {
        match self.look() {
            Looked::Found(found) => Poll::Ready(Some(found)),
            Looked::Ended => Poll::Ready(None),
            Looked::Nothing => self.poll_registered(context),
            Looked::Yield => {
                context.waker().wake_by_ref();
                Poll::Pending
            }
        }
    }

    #[cold]
    fn poll_registered(&mut self, context: &Context<'_>) -> Poll<Option<Result<LiveEvent<E>, LiveError>>> {
        self.register(context.waker());
        // Look once more: an event may have come between the look and the registration.
        match self.look() {
            Looked::Found(found) => Poll::Ready(Some(found)),
            Looked::Ended => Poll::Ready(None),
            Looked::Nothing => {
                self.rest();
                Poll::Pending
            }
            Looked::Yield => {
                context.waker().wake_by_ref();
                Poll::Pending
            }
        }
    }

    /// Looks for the next event, in the current shard first.
    #[inline]
    fn look(&mut self) -> Looked<E> {
        let mut without_events = 0;
        while without_events < self.shards.len() {
            let shard = &mut self.shards[self.current];
            if self.left == TURN
                && let Some(lagged) = shard.skip_lag(self.wanted.lag_max)
            {
                return Looked::Found(Err(lagged));
            }
            if let Some(found) = shard.next(&self.wanted, &mut self.left) {
                return Looked::Found(found);
            }
            if shard.has_ended() {
                // This releases the store's lock with the last shard.
                drop(self.shards.remove(self.current));
                self.next_turn(self.current);
                continue;
            }
            let is_cut = self.left == 0;
            without_events = if is_cut { 0 } else { without_events + 1 };
            self.next_turn(self.current + 1);
            if is_cut && self.is_time_to_yield() {
                return Looked::Yield;
            }
        }
        self.turns_left = TURNS_MAX;
        if self.shards.is_empty() { Looked::Ended } else { Looked::Nothing }
    }

    fn next_turn(&mut self, shard: usize) {
        self.current = if shard < self.shards.len() { shard } else { 0 };
        self.left = TURN;
    }

    fn is_time_to_yield(&mut self) -> bool {
        self.turns_left -= 1;
        let is_time = self.turns_left == 0;
        if is_time {
            self.turns_left = TURNS_MAX;
        }
        is_time
    }

    fn register(&mut self, waker: &Waker) {
        self.shards.iter_mut().for_each(|shard| shard.register(waker));
    }

    fn rest(&mut self) {
        self.shards.iter_mut().for_each(FollowedShard::rest);
    }
}

/// Blocks the thread until it is woken, at most until `deadline`.
fn park_until(deadline: Option<Instant>) {
    match deadline.map(|at| at.saturating_duration_since(Instant::now())) {
        Some(Duration::ZERO) => {}
        Some(left) => thread::park_timeout(left),
        None => thread::park(),
    }
}

/// Cancel safety: an event is taken only by the poll that returns it. A stream that is never polled costs nothing. After
/// several thousand events without a pause, a poll wakes its own task and returns `Pending`, so that other tasks run.
impl<E: Event> Stream for Live<E> {
    type Item = Result<LiveEvent<E>, LiveError>;

    #[inline]
    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.get_mut().poll_event(context)
    }
}

impl<E: Event> FusedStream for Live<E> {
    fn is_terminated(&self) -> bool {
        self.shards.is_empty()
    }
}

impl<'a, E: Event> IntoIterator for &'a mut Live<E> {
    type Item = Result<LiveEvent<E>, LiveError>;
    type IntoIter = LiveIter<'a, E>;

    fn into_iter(self) -> LiveIter<'a, E> {
        LiveIter { feed: Some(self) }
    }
}

/// The events of a [`Live`] feed. Blocks the thread until there is one. On a thread that must not wait, it returns
/// [`WaitError::OnEngineThread`] instead, and ends.
#[derive(Debug)]
pub struct LiveIter<'a, E: Event> {
    /// `None` after the end.
    feed: Option<&'a mut Live<E>>,
}

impl<E: Event> Iterator for LiveIter<'_, E> {
    type Item = Result<LiveEvent<E>, LiveError>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        let found = self.feed.as_mut()?.next_until(Deadline::NEVER).transpose();
        if matches!(found, None | Some(Err(LiveError::Wait(WaitError::OnEngineThread)))) {
            self.feed = None;
        }
        found
    }
}
