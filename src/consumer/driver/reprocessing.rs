//! The keys whose dead letters are handled again, and their order.

use std::collections::{BTreeMap, VecDeque};

use crate::event::{EventId, Key};

/// Keys whose letters are handled again: oldest first per key, each key until its first failure.
#[derive(Debug, Default)]
pub(super) struct Reprocessing {
    /// Keys whose next letter waits for its turn.
    waiting: VecDeque<Key>,
    /// All keys, each with the letter that is in flight: being handled, or its outcome waiting to be recorded.
    keys: BTreeMap<Key, Option<EventId>>,
}

impl Reprocessing {
    pub(super) fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    pub(super) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    pub(super) fn contains(&self, key: Key) -> bool {
        self.keys.contains_key(&key)
    }

    /// Adds a key behind the others. Returns `false` if it was there before.
    pub(super) fn add(&mut self, key: Key) -> bool {
        let is_new = !self.keys.contains_key(&key);
        if is_new {
            self.requeue(key);
        }
        is_new
    }

    /// Puts a key behind the others for its next letter.
    pub(super) fn requeue(&mut self, key: Key) {
        self.keys.insert(key, None);
        self.waiting.push_back(key);
    }

    /// Puts a key before the others: its letter was taken and is not handled now.
    pub(super) fn put_back(&mut self, key: Key) {
        self.keys.insert(key, None);
        self.waiting.push_front(key);
    }

    pub(super) fn take(&mut self) -> Option<Key> {
        self.waiting.pop_front()
    }

    pub(super) fn set_in_flight(&mut self, key: Key, id: EventId) {
        self.keys.insert(key, Some(id));
    }

    pub(super) fn is_in_flight(&self, key: Key, id: EventId) -> bool {
        self.keys.get(&key) == Some(&Some(id))
    }

    pub(super) fn has_in_flight(&self, key: Key) -> bool {
        self.keys.get(&key).is_some_and(Option::is_some)
    }

    pub(super) fn end(&mut self, key: Key) {
        self.keys.remove(&key);
    }

    /// Removes the given keys that have no letter in flight, and returns them.
    pub(super) fn end_where(&mut self, keys: &[Key]) -> Vec<Key> {
        let ended: Vec<Key> = keys.iter().copied().filter(|key| !self.has_in_flight(*key)).collect();
        ended.iter().for_each(|key| self.end(*key));
        let keys = &self.keys;
        self.waiting.retain(|key| keys.contains_key(key));
        ended
    }
}
