//! A mailbox with any number of senders and one receiver, which closes it.

use super::{AtomicBool, Mutex, Ordering, lock};

/// A mailbox: any thread leaves items, one thread takes them until it closes the mailbox.
#[derive(Debug)]
pub(crate) struct Arrivals<T> {
    any: AtomicBool,
    /// `None` once closed.
    list: Mutex<Option<Vec<T>>>,
}

impl<T> Arrivals<T> {
    pub(crate) fn new() -> Self {
        Self { any: AtomicBool::new(false), list: Mutex::new(Some(Vec::new())) }
    }

    /// Leaves `item`, or returns it if the mailbox is closed. The caller wakes the receiver afterwards.
    pub(crate) fn push(&self, item: T) -> Result<(), T> {
        match &mut *lock(&self.list) {
            Some(list) => {
                list.push(item);
                // Relaxed: the lock orders the items. A receiver that sees `false` too long is woken by the sender.
                self.any.store(true, Ordering::Relaxed);
                Ok(())
            }
            None => Err(item),
        }
    }

    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        !self.any.load(Ordering::Relaxed)
    }

    /// Takes the items that have arrived.
    pub(crate) fn take(&self) -> Vec<T> {
        let mut list = lock(&self.list);
        // Under the lock, so that it cannot overwrite the `true` of a later push.
        self.any.store(false, Ordering::Relaxed);
        list.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Takes the items that have arrived and closes the mailbox: every later `push` fails.
    pub(crate) fn close(&self) -> Vec<T> {
        let mut list = lock(&self.list);
        // As in `take`.
        self.any.store(false, Ordering::Relaxed);
        list.take().unwrap_or_default()
    }
}

#[cfg(all(test, loom))]
mod models {
    use super::*;
    use crate::sync::{CloseGate, thread};
    use loom::sync::Arc;

    /// A lane that is registered while the shard closes is closed by either thread: the shard never adopts and then
    /// forgets it.
    #[test]
    fn loom_a_lane_registered_during_close_is_always_closed() {
        loom::model(|| {
            let arrivals = Arc::new(Arrivals::<Arc<CloseGate>>::new());
            let lane = Arc::new(CloseGate::new());
            let (other, registered) = (Arc::clone(&arrivals), Arc::clone(&lane));
            let registrar = thread::spawn(move || {
                if let Err(lane) = other.push(registered) {
                    lane.close();
                }
            });
            let mut adopted = if arrivals.is_empty() { Vec::new() } else { arrivals.take() };
            adopted.extend(arrivals.close());
            adopted.iter().for_each(|lane| lane.close());
            registrar.join().unwrap();
            assert!(lane.is_closed(), "the lane stayed open");
        });
    }
}
