//! Callers that wait until the consumer is done with an event, and events that callers will ask about.

use std::sync::Arc;

use super::follower::ShardFollower;
use crate::consumer::dead_letter::LetterStore;
use crate::consumer::outcome::Handled;
use crate::consumer::watches::Watches;
use crate::event::{Event, Key, Offset, ShardId};
use crate::sync::Keeping;

/// A waiter for the unfinished events of a key, up to `offset`.
struct Waiter {
    shard: usize,
    key: Key,
    offset: Offset,
    keeping: Keeping<Handled>,
}

/// All waiters of a consumer, and the events that callers will ask about.
#[derive(Default)]
pub(super) struct HandledWaiters {
    waiters: Vec<Waiter>,
    /// Waiters for the end of the backlog.
    for_all: Vec<Keeping<()>>,
    watches: Arc<Watches>,
}

impl HandledWaiters {
    pub(super) fn watches(&self) -> &Arc<Watches> {
        &self.watches
    }

    pub(super) fn add(&mut self, shard: usize, key: Key, offset: Offset, keeping: Keeping<Handled>) {
        self.forget_abandoned();
        self.waiters.push(Waiter { shard, key, offset, keeping });
    }

    pub(super) fn add_for_all(&mut self, keeping: Keeping<()>) {
        self.forget_abandoned();
        self.for_all.push(keeping);
    }

    /// Forgets waiters that gave up: a waiter may give up and come again for ever while the consumer is paused.
    fn forget_abandoned(&mut self) {
        self.waiters.retain(|waiter| !waiter.keeping.is_abandoned());
        self.for_all.retain(|keeping| !keeping.is_abandoned());
    }

    pub(super) fn awaits_all(&self) -> bool {
        !self.for_all.is_empty()
    }

    /// Answers the waiters for the end of the backlog.
    pub(super) fn answer_for_all(&mut self) {
        self.for_all.drain(..).for_each(|keeping| keeping.keep(()));
    }

    /// Answers every waiter whose events are done.
    pub(super) fn answer<E: Event>(&mut self, followers: &[ShardFollower<E>], letters: &LetterStore) {
        let mut i = 0;
        while let Some(Waiter { shard, key, offset, .. }) = self.waiters.get(i) {
            let follower = &followers[*shard];
            if !follower.is_done(*key, *offset) {
                i += 1;
                continue;
            }
            let id = follower.id(*offset);
            let handled = if letters.has(*key, id) {
                Handled::Recorded
            } else if *offset < follower.known_from() || letters.may_have_forgotten(id) {
                Handled::Unknown
            } else {
                Handled::Yes
            };
            self.waiters.swap_remove(i).keeping.keep(handled);
        }
    }

    /// Returns the lowest offset in `shard`, at most `position`, from which on records must be kept for waiters and
    /// watches.
    pub(super) fn lowest(&self, shard: ShardId, position: Offset) -> Offset {
        let of_shard = self.waiters.iter().filter(|waiter| waiter.shard == usize::from(shard.0));
        let awaited = of_shard.map(|waiter| waiter.offset).min().unwrap_or(position);
        self.watches.lowest(shard, position.min(awaited))
    }
}
