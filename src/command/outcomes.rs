//! What became of commands with idempotency keys: the last so many of every key. One writer: the shard that owns the key.

use std::collections::VecDeque;

use hashbrown::HashMap;
use xxhash_rust::xxh3::Xxh3DefaultBuilder;

use crate::event::{Key, Version};

/// How a command ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Remembered<R> {
    Done { version: Version, events: u32 },
    Rejected(R),
}

/// Outcomes by key and idempotency key; per key the newest `kept`.
#[derive(Debug)]
pub(crate) struct Outcomes<R> {
    kept: usize,
    keys: HashMap<Key, VecDeque<(u64, Remembered<R>)>, Xxh3DefaultBuilder>,
}

impl<R> Outcomes<R> {
    pub(crate) fn new(kept: usize) -> Self {
        Self { kept, keys: HashMap::default() }
    }

    pub(crate) fn find(&self, key: Key, idempotency: u64) -> Option<&Remembered<R>> {
        self.keys.get(&key)?.iter().rev().find(|(id, _)| *id == idempotency).map(|(_, outcome)| outcome)
    }

    pub(crate) fn remember(&mut self, key: Key, idempotency: u64, outcome: Remembered<R>) {
        if self.kept == 0 {
            return;
        }
        let outcomes = self.keys.entry(key).or_default();
        if outcomes.len() == self.kept {
            outcomes.pop_front();
        }
        outcomes.push_back((idempotency, outcome));
    }

    /// Everything remembered of `key`, oldest first.
    pub(crate) fn of(&self, key: Key) -> impl Iterator<Item = &(u64, Remembered<R>)> {
        self.keys.get(&key).into_iter().flatten()
    }

    /// Takes `outcomes` for all that is known of `key`.
    pub(crate) fn restore(&mut self, key: Key, outcomes: VecDeque<(u64, Remembered<R>)>) {
        let skip = outcomes.len().saturating_sub(self.kept);
        if outcomes.len() > skip {
            self.keys.insert(key, outcomes.into_iter().skip(skip).collect());
        }
    }
}
