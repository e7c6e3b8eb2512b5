//! Places of the keys that have something unfinished or are parked: a slab with an index. 32 bytes a key, and 5 to 12
//! for the index; places are used again.

use hashbrown::HashTable;

use crate::event::Key;
use crate::sync::{keyed, plant};

use super::events::NONE;

/// Where a key stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    /// Its first event is in the list of what may run.
    Ready,
    /// Its first event is out.
    Running,
    /// Its first event failed and waits for `due_ns`.
    Retrying,
    /// Its first event waits for what is missing before it, or for `due_ns`.
    AwaitingGap,
    /// Its first event ends when the record of it is durable.
    Recording { is_out: bool, is_skip: bool },
    /// Nothing is unfinished, letters lie in the store of dead letters.
    Parked,
}

#[derive(Debug)]
pub(super) struct Lane {
    pub(super) key: Key,
    /// Time the first event waits for.
    pub(super) due_ns: u64,
    /// Dead letters of the key that are durable and not dealt with.
    pub(super) letters: u32,
    /// The newest unfinished event, or `NONE`. In a free place: the next free one.
    pub(super) tail: u32,
    /// How often the first event failed.
    pub(super) failures: u32,
    pub(super) stage: Stage,
    /// The time for waiting for a gap is over.
    pub(super) is_gap_over: bool,
}

const _: () = assert!(size_of::<Lane>() == 32);

#[derive(Debug)]
pub(super) struct Keys {
    lanes: Vec<Lane>,
    index: HashTable<u32>,
    free: u32,
}

impl Keys {
    pub(super) fn new() -> Self {
        plant();
        Self { lanes: Vec::new(), index: HashTable::new(), free: NONE }
    }

    pub(super) fn len(&self) -> usize {
        self.index.len()
    }

    pub(super) fn find(&self, key: Key) -> Option<u32> {
        self.index.find(keyed(key.0), |at| self.lanes[*at as usize].key == key).copied()
    }

    pub(super) fn lane(&self, at: u32) -> &Lane {
        &self.lanes[at as usize]
    }

    pub(super) fn lane_mut(&mut self, at: u32) -> &mut Lane {
        &mut self.lanes[at as usize]
    }

    /// A place for a key that has none.
    pub(super) fn add(&mut self, key: Key, stage: Stage) -> u32 {
        let lane = Lane { key, due_ns: 0, letters: 0, tail: NONE, failures: 0, stage, is_gap_over: false };
        let at = self.free;
        let at = if at == NONE {
            self.lanes.push(lane);
            self.lanes.len() as u32 - 1
        } else {
            self.free = self.lanes[at as usize].tail;
            self.lanes[at as usize] = lane;
            at
        };
        self.index.insert_unique(keyed(key.0), at, |at| keyed(self.lanes[*at as usize].key.0));
        at
    }

    /// Lets go of a key with nothing unfinished and no letters.
    pub(super) fn remove(&mut self, at: u32) {
        let lane = &mut self.lanes[at as usize];
        assert!(lane.tail == NONE && lane.letters == 0);
        let entry = self.index.find_entry(keyed(lane.key.0), |other| *other == at);
        entry.expect("every lane is in the index").remove();
        lane.tail = self.free;
        self.free = at;
    }
}
