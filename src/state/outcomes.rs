//! Outcomes of commands with idempotency keys: the newest `outcomes_kept` of every key. The first key of a command owns
//! its outcome. One writer: the shard that owns the key.

use std::collections::VecDeque;

use hashbrown::HashMap;

use super::aggregate::{Aggregate, Stored as _};
use crate::event::Root;
use crate::event::{Key, Version};
use crate::log::other_keys::OtherKeys;
use crate::sync::Keyed;

/// A command's outcome, kept for repeats of the command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Remembered<R> {
    /// The key's version after the command, the number of its events, and the other keys that it named.
    Done {
        version: Version,
        events: u32,
        others: Option<Box<OtherKeys>>,
    },
    Rejected(R),
}

/// Outcomes by key and idempotency key: per key the newest `kept`.
#[derive(Debug)]
pub(crate) struct Outcomes<R> {
    kept: usize,
    keys: HashMap<Key, VecDeque<(u64, Remembered<R>)>, Keyed>,
    /// Keys that had no event at their first outcome, each once. The key table may not have them.
    eventless: Vec<Key>,
}

impl<R> Outcomes<R> {
    pub(crate) fn new(kept: usize) -> Self {
        Self { kept, keys: HashMap::default(), eventless: Vec::new() }
    }

    pub(crate) fn find(&self, key: Key, idempotency: u64) -> Option<&Remembered<R>> {
        self.keys.get(&key)?.iter().rev().find(|(id, _)| *id == idempotency).map(|(_, outcome)| outcome)
    }

    /// Remembers the outcome of a command that left `key` at `version`.
    pub(crate) fn remember(&mut self, key: Key, version: Version, idempotency: u64, outcome: Remembered<R>) {
        if self.kept == 0 {
            return;
        }
        let outcomes = self.keys.entry(key).or_default();
        if outcomes.is_empty() && version.0 == 0 {
            self.eventless.push(key);
        }
        if outcomes.len() == self.kept {
            outcomes.pop_front();
        }
        outcomes.push_back((idempotency, outcome));
    }

    /// The outcomes of `key`, oldest first.
    pub(crate) fn of(&self, key: Key) -> impl Iterator<Item = &(u64, Remembered<R>)> {
        self.keys.get(&key).into_iter().flatten()
    }

    /// Up to `count` keys that had no event at their first outcome, from the `from`-th such key on.
    pub(crate) fn eventless(&self, from: usize, count: usize) -> &[Key] {
        let from = from.min(self.eventless.len());
        &self.eventless[from..(from + count).min(self.eventless.len())]
    }

    /// Replaces all outcomes of `key`, which is at `version`.
    pub(crate) fn restore(&mut self, key: Key, version: Version, outcomes: VecDeque<(u64, Remembered<R>)>) {
        let skip = outcomes.len().saturating_sub(self.kept);
        if outcomes.len() > skip {
            let before = self.keys.insert(key, outcomes.into_iter().skip(skip).collect());
            if before.is_none() && version.0 == 0 {
                self.eventless.push(key);
            }
        }
    }
}

/// Decodes a rejection whose archive has this root, or converts it from an older layout. Returns `None` if it is not
/// valid, or of a layout that the program cannot read.
pub(crate) fn rejection<A: Aggregate>(root: Root, archive: &[u8]) -> Option<A::Rejection> {
    if root == Root::of::<A::Rejection>() { A::Rejection::decode(archive).ok() } else { A::upgrade_rejection(archive) }
}
