//! The callers that wait for room in the lane of a shared client, in order of arrival.
//!
//! One of them watches the lane: it waits until half of the commands in flight are answered, and then wakes as many
//! callers as there is room for. So an answer does not wake them all, and a caller that sends many commands does not go
//! to the end of the queue for each. Invariant: while a caller sleeps, another one watches, or is woken and has not left.

use std::collections::BTreeMap;
use std::task::Waker;

/// The callers that wait for room.
#[derive(Debug, Default)]
pub(super) struct RoomQueue {
    /// By number. `None` for a caller that is woken.
    waiting: BTreeMap<u64, Option<Waker>>,
    /// The number of callers that sleep.
    sleeping: usize,
    watcher: Option<u64>,
    next_number: u64,
}

impl RoomQueue {
    /// Returns `true` if a caller that does not wait yet may take one of `free` slots, and leaves the others enough.
    pub(super) fn lets_in(&self, free: impl FnOnce() -> usize) -> bool {
        self.waiting.is_empty() || (self.sleeping == 0 && free() > self.waiting.len())
    }

    /// Puts the caller to sleep, in its place if it has one. Returns `true` if it must watch the lane, and the waker that
    /// this replaces, which must be dropped outside the lock.
    pub(super) fn sleep(&mut self, number: &mut Option<u64>, waker: Waker) -> (bool, Option<Waker>) {
        let number = *number.get_or_insert_with(|| {
            self.next_number += 1;
            self.next_number
        });
        let replaced = self.waiting.insert(number, Some(waker)).flatten();
        self.sleeping += usize::from(replaced.is_none());
        (*self.watcher.get_or_insert(number) == number, replaced)
    }

    /// Takes a caller out. Returns its waker, which must be dropped outside the lock, and the wakers to call there: if
    /// nobody watches, those of as many callers as there are `free` slots, and of one more, which then watches.
    pub(super) fn leave(&mut self, number: u64, free: usize) -> (Option<Waker>, Vec<Waker>) {
        let own = self.waiting.remove(&number).flatten();
        self.sleeping -= usize::from(own.is_some());
        if self.watcher == Some(number) {
            self.watcher = None;
        }
        if self.watcher.is_some() || self.sleeping == 0 {
            return (own, Vec::new());
        }
        let woken = self.waiting.len() - self.sleeping;
        let count = free.saturating_sub(woken) + 1;
        let wakers: Vec<_> = self.waiting.values_mut().filter_map(Option::take).take(count).collect();
        self.sleeping -= wakers.len();
        (own, wakers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::Wake;

    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn sleep(queue: &mut RoomQueue, number: &mut Option<u64>) -> bool {
        queue.sleep(number, Waker::from(Arc::new(Count::default()))).0
    }

    /// Whatever callers do, none sleeps while nobody watches and nobody is woken.
    #[test]
    fn a_caller_sleeps_only_while_another_one_watches_or_is_woken() {
        for seed in 0..500_u64 {
            let mut random = seed;
            let mut next = move |below: u64| {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (random >> 33) % below
            };
            let (mut queue, mut callers) = (RoomQueue::default(), Vec::<Option<u64>>::new());
            for _ in 0..200 {
                match next(4) {
                    // A new caller waits, or a waiting one is polled and finds no room.
                    0 => {
                        callers.push(None);
                        sleep(&mut queue, callers.last_mut().expect("it was pushed"));
                    }
                    1 if !callers.is_empty() => {
                        let at = next(callers.len() as u64) as usize;
                        sleep(&mut queue, &mut callers[at]);
                    }
                    // One sends its command, or gives up.
                    _ if !callers.is_empty() => {
                        let at = next(callers.len() as u64) as usize;
                        drop(queue.leave(callers.swap_remove(at).expect("it waits"), next(3) as usize));
                    }
                    _ => {}
                }
                let woken = queue.waiting.values().filter(|waker| waker.is_none()).count();
                assert_eq!((queue.waiting.len(), queue.sleeping), (callers.len(), callers.len() - woken));
                assert!(queue.sleeping == 0 || queue.watcher.is_some() || woken > 0, "seed {seed}: nobody watches");
                assert!(queue.watcher.is_none_or(|watcher| queue.waiting.contains_key(&watcher)), "seed {seed}");
            }
        }
    }

    #[test]
    fn callers_are_woken_in_order_and_one_more_than_there_is_room_for() {
        let (mut queue, mut numbers) = (RoomQueue::default(), [None; 6]);
        let watch = numbers.each_mut().map(|number| sleep(&mut queue, number));
        assert_eq!(watch, [true, false, false, false, false, false]);
        assert!(!queue.lets_in(|| 100), "others sleep");
        assert_eq!(queue.leave(numbers[0].expect("it waits"), 2).1.len(), 3);
        assert!(
            queue.waiting[&numbers[3].expect("it waits")].is_none()
                && queue.waiting[&numbers[4].expect("it waits")].is_some()
        );
        assert_eq!(queue.leave(numbers[1].expect("it waits"), 1).1.len(), 1, "two are woken and wait for the one slot");
        assert!(sleep(&mut queue, &mut numbers[2]), "it found no room, so it watches");
        assert_eq!(queue.leave(numbers[3].expect("it waits"), 5).1.len(), 0);
        assert_eq!(queue.leave(numbers[2].expect("it waits"), 5).1.len(), 1);
        assert!(queue.lets_in(|| 3) && !queue.lets_in(|| 2), "woken callers keep their room");
    }
}
