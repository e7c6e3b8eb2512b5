//! The unfinished events: a slab of 24 bytes per event, linked in the order offered and in a ring per key. Free slots
//! are reused.

use crate::event::Offset;

/// No slot of a slab.
pub(super) const NONE: u32 = u32::MAX;

#[derive(Debug)]
struct Unfinished {
    offset: Offset,
    /// The key's next event. In the key's newest event: the key's first.
    of_key: u32,
    older: u32,
    /// The next newer event. In a free slot: the next free slot.
    newer: u32,
}

const _: () = assert!(size_of::<Unfinished>() == 24);

#[derive(Debug)]
pub(super) struct Events {
    slab: Vec<Unfinished>,
    free: u32,
    oldest: u32,
    newest: u32,
    len: usize,
}

impl Events {
    pub(super) fn new() -> Self {
        Self { slab: Vec::new(), free: NONE, oldest: NONE, newest: NONE, len: 0 }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn offset(&self, at: u32) -> Offset {
        self.slab[at as usize].offset
    }

    /// Returns the oldest unfinished event's offset.
    pub(super) fn oldest(&self) -> Option<Offset> {
        (self.oldest != NONE).then(|| self.offset(self.oldest))
    }

    /// Returns all offsets, oldest first.
    pub(super) fn offsets(&self) -> impl Iterator<Item = Offset> + '_ {
        let some = |at: u32| (at != NONE).then_some(at);
        std::iter::successors(some(self.oldest), move |at| some(self.slab[*at as usize].newer))
            .map(|at| self.offset(at))
    }

    /// Adds the newest event, after `tail` of its key. Returns the key's new tail.
    pub(super) fn push(&mut self, offset: Offset, tail: u32) -> u32 {
        let event = Unfinished { offset, of_key: NONE, older: self.newest, newer: NONE };
        let at = self.free;
        let at = if at == NONE {
            self.slab.push(event);
            self.slab.len() as u32 - 1
        } else {
            self.free = self.slab[at as usize].newer;
            self.slab[at as usize] = event;
            at
        };
        let first = if tail == NONE { at } else { std::mem::replace(&mut self.slab[tail as usize].of_key, at) };
        self.slab[at as usize].of_key = first;
        match self.newest {
            NONE => self.oldest = at,
            newest => self.slab[newest as usize].newer = at,
        }
        self.newest = at;
        self.len += 1;
        at
    }

    /// Returns the slot of the key's first event.
    pub(super) fn first(&self, tail: u32) -> u32 {
        self.slab[tail as usize].of_key
    }

    /// Removes the key's first event. Returns the key's new tail.
    pub(super) fn pop(&mut self, tail: u32) -> u32 {
        let at = self.first(tail);
        let Unfinished { of_key, older, newer, .. } = self.slab[at as usize];
        match older {
            NONE => self.oldest = newer,
            older => self.slab[older as usize].newer = newer,
        }
        match newer {
            NONE => self.newest = older,
            newer => self.slab[newer as usize].older = older,
        }
        self.slab[at as usize].newer = self.free;
        self.free = at;
        self.len -= 1;
        if at == tail {
            return NONE;
        }
        self.slab[tail as usize].of_key = of_key;
        tail
    }
}
