//! A lane: rtrb's ring with what corelane puts into it.
//!
//! Two sides, one thread each. Positions below the ring's tail are whole slots; a chunk of them becomes
//! visible with one release store.

use crate::clock::{Lateness, Nanos};
use crate::event::{Key, KeyHash};
use crate::sync::prefetch_to_write;

/// One event on its way to a shard.
#[derive(Debug)]
pub(crate) struct Slot<E> {
    pub(crate) key: Key,
    pub(crate) published: Nanos,
    /// Between when it was due and `published`; [`crate::clock::NOT_DUE`] where nothing was due.
    pub(crate) late: Lateness,
    /// The key's hash, for the shard's key table.
    pub(crate) hash: KeyHash,
    pub(crate) event: E,
}

impl<E> Slot<E> {
    #[inline]
    pub(crate) fn new(key: Key, published: Nanos, late: Lateness, event: E) -> Self {
        Self { key, published, late, hash: KeyHash::of(key), event }
    }
}

/// Up to `count` free slots; looks at the other side only when the last look does not suffice.
#[inline]
pub(crate) fn free_slots<E>(ring: &rtrb::Producer<Slot<E>>, count: usize) -> usize {
    if ring.cached_slots() >= count { count } else { ring.slots().min(count) }
}

/// How many slots ahead of the one being written the ring's memory is brought near: its lines are the shard's, and a store has to
/// wait until they are not.
const NEAR_SLOTS: usize = 24;

/// Moves as many of `events` as fit into the ring, in order, visible at once. Returns how many.
///
/// The iterator is asked for exactly as many as are moved; when it panics, those taken from it are lost with it
/// and nothing of the chunk becomes visible.
#[inline]
pub(crate) fn push_chunk<E>(
    ring: &mut rtrb::Producer<Slot<E>>,
    count: usize,
    events: impl Iterator<Item = Slot<E>>,
) -> usize {
    let room = free_slots(ring, count);
    let Ok(mut chunk) = ring.write_chunk_uninit(room) else { return 0 };
    let (first, second) = chunk.as_mut_slices();
    let ((first, first_len), second) = ((first.as_ptr(), first.len()), second.as_ptr());
    let bring_near = |at: usize| {
        if at < first_len {
            prefetch_to_write(first.wrapping_add(at));
        } else if at < room {
            prefetch_to_write(second.wrapping_add(at - first_len));
        }
    };
    (0..NEAR_SLOTS).for_each(bring_near);
    let events = events.take(room).enumerate().inspect(|(at, _)| bring_near(at + NEAR_SLOTS));
    chunk.fill_from_iter(events.map(|(_, event)| event))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::NOT_DUE;
    use std::collections::VecDeque;

    #[test]
    fn behaves_like_a_queue() {
        let (mut tx, mut rx) = rtrb::RingBuffer::<Slot<u64>>::new(8);
        let mut model = VecDeque::new();
        let (mut next, mut x) = (0_u64, 7_u64);
        for _ in 0..10_000 {
            x = x.wrapping_mul(6364136223846793005).wrapping_add(1);
            let count = (x >> 60) as usize;
            if x & 1 == 0 {
                let first = next;
                let slots = (first..).map(|i| Slot::new(Key(i), 1, NOT_DUE, i));
                let pushed = push_chunk(&mut tx, count, slots);
                assert_eq!(pushed, count.min(8 - model.len()));
                model.extend(first..first + pushed as u64);
                next += pushed as u64;
            } else {
                let count = count.min(rx.slots());
                let chunk = rx.read_chunk(count).expect("count slots are there");
                let (a, b) = chunk.as_slices();
                for slot in a.iter().chain(b) {
                    assert_eq!(Some(slot.event), model.pop_front());
                }
                chunk.commit_all();
            }
        }
    }
}
