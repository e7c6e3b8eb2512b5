//! The queues of keys that have unfinished events or are parked: a slab of 32 bytes per key, and an index of 5 to 12
//! bytes per key. Free slots are reused.

use hashbrown::HashTable;

use crate::event::Key;
use crate::sync::{keyed, plant};

use super::events::NONE;

/// The state of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    /// The first event may run and is in the ready list.
    Ready,
    /// The first event is in flight.
    Running,
    /// The first event failed and waits until `due_ns`.
    Retrying,
    /// The first event waits for an event that is missing before it, at most until `due_ns`.
    AwaitingGap,
    /// The first event ends when its record is durable. `is_out`: the caller is writing the record.
    Recording { is_out: bool, is_skip: bool },
    /// No event is unfinished, and the key has dead letters.
    Parked,
}

#[derive(Debug)]
pub(super) struct KeyQueue {
    pub(super) key: Key,
    /// The time until which the first event waits.
    pub(super) due_ns: u64,
    /// Durable dead letters of the key that still wait.
    pub(super) letters: u32,
    /// The newest unfinished event, or `NONE`. In a free slot: the next free slot.
    pub(super) tail: u32,
    /// Failures of the first event.
    pub(super) failures: u32,
    pub(super) stage: Stage,
}

const _: () = assert!(size_of::<KeyQueue>() == 32);

#[derive(Debug)]
pub(super) struct Keys {
    queues: Vec<KeyQueue>,
    index: HashTable<u32>,
    free: u32,
}

impl Keys {
    pub(super) fn new() -> Self {
        plant();
        Self { queues: Vec::new(), index: HashTable::new(), free: NONE }
    }

    pub(super) fn len(&self) -> usize {
        self.index.len()
    }

    pub(super) fn find(&self, key: Key) -> Option<u32> {
        self.index.find(keyed(key.0), |at| self.queues[*at as usize].key == key).copied()
    }

    pub(super) fn queue(&self, at: u32) -> &KeyQueue {
        &self.queues[at as usize]
    }

    pub(super) fn queue_mut(&mut self, at: u32) -> &mut KeyQueue {
        &mut self.queues[at as usize]
    }

    /// Adds a key that has no queue.
    pub(super) fn add(&mut self, key: Key, stage: Stage) -> u32 {
        let queue = KeyQueue { key, due_ns: 0, letters: 0, tail: NONE, failures: 0, stage };
        let at = self.free;
        let at = if at == NONE {
            self.queues.push(queue);
            self.queues.len() as u32 - 1
        } else {
            self.free = self.queues[at as usize].tail;
            self.queues[at as usize] = queue;
            at
        };
        self.index.insert_unique(keyed(key.0), at, |at| keyed(self.queues[*at as usize].key.0));
        at
    }

    /// Removes a key without unfinished events and letters.
    pub(super) fn remove(&mut self, at: u32) {
        let queue = &mut self.queues[at as usize];
        assert!(queue.tail == NONE && queue.letters == 0);
        let entry = self.index.find_entry(keyed(queue.key.0), |other| *other == at);
        entry.expect("every queue is in the index").remove();
        queue.tail = self.free;
        self.free = at;
    }
}
