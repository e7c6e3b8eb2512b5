//! A lane's ring: rtrb's ring with corelane's slots.
//!
//! Two ends: one producer and one shard, with one thread each. Slots below the ring's tail are complete; a chunk
//! becomes visible with one release store.

use crate::clock::{Lateness, Nanos};
use crate::event::{Key, KeyHash};
use crate::sync::prefetch_to_write;

/// One event on its way to a shard.
#[derive(Debug)]
pub(crate) struct Slot<E> {
    pub(crate) key: Key,
    pub(crate) published: Nanos,
    /// The delay of `published` after the event's due time; [`crate::clock::NOT_DUE`] if the event had none.
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

/// Returns the number of free slots, at most `count`. Reads the shard's position in the ring only if the cached
/// position shows fewer than `count`.
#[inline]
pub(crate) fn free_slots<E>(ring: &rtrb::Producer<Slot<E>>, count: usize) -> usize {
    if ring.cached_slots() >= count { count } else { ring.slots().min(count) }
}

/// The prefetch distance ahead of the slot being written, in slots. The cache lines of these slots are on the shard's
/// core, and a store would wait for them.
const PREFETCH_SLOTS: usize = 24;

/// Moves up to `count` of `events` into the ring, in order, and makes them visible at once. Returns the number moved.
///
/// Takes exactly the returned number of events from the iterator. If the iterator panics, the events taken are lost and
/// the chunk does not become visible.
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
    let prefetch = |at: usize| {
        if at < first_len {
            prefetch_to_write(first.wrapping_add(at));
        } else if at < room {
            prefetch_to_write(second.wrapping_add(at - first_len));
        }
    };
    (0..PREFETCH_SLOTS).for_each(prefetch);
    let events = events.take(room).enumerate().inspect(|(at, _)| prefetch(at + PREFETCH_SLOTS));
    chunk.fill_from_iter(events.map(|(_, event)| event))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::NOT_DUE;
    use std::collections::VecDeque;

    #[test]
    fn the_ring_behaves_like_a_queue() {
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
                let chunk = rx.read_chunk(count).expect("the ring holds `count` slots");
                let (a, b) = chunk.as_slices();
                for slot in a.iter().chain(b) {
                    assert_eq!(Some(slot.event), model.pop_front());
                }
                chunk.commit_all();
            }
        }
    }
}
