//! The state, besides the ring, that both ends of a lane share: the numbers of events accepted, appended and made
//! durable.
//!
//! Writers: the producer counts published events, the shard counts appended events, and the syncer counts durable
//! events.

use std::sync::Arc;
use std::task::Waker;

use crate::config::Durability;
use crate::log::segment::ShardLog;
use crate::sync::{AtomicBool, AtomicU64, CloseGate, Inside, Ordering, Registration, Signal, Waiters, Watermark};

/// The state, besides the ring, that both ends of a lane share.
#[derive(Debug)]
pub(crate) struct LaneShared {
    pub(crate) log: Arc<ShardLog>,
    /// `true` if the syncer syncs without being asked, that is, in every mode except `OsCache`.
    pub(super) syncs: bool,
    pub(crate) close_gate: CloseGate,
    /// Wakes the producer when the lane has room again.
    pub(crate) space: Signal,
    /// The number of events accepted. In a shared lane it includes events that are being pushed and may still be
    /// refused. Written by producers.
    pub(crate) published: AtomicU64,
    /// The number of events appended. Written by the shard.
    pub(super) appended: Watermark,
    /// The number of durable events. Written by the syncer.
    pub(super) durable: Watermark,
    pub(super) waiting_appended: Waiters,
    pub(super) waiting_durable: Waiters,
    /// `true` once the producer is gone and its ring is empty.
    pub(super) retired: AtomicBool,
    /// `true` if the lane carries commands; it then counts commands instead of events.
    pub(super) of_commands: bool,
}

impl LaneShared {
    pub(crate) fn new(log: Arc<ShardLog>, durability: Durability) -> Self {
        let waiters = || Waiters::new(&log.notifier);
        let (waiting_appended, waiting_durable) = (waiters(), waiters());
        Self {
            log,
            syncs: durability != Durability::OsCache,
            close_gate: CloseGate::new(),
            space: Signal::new(),
            published: AtomicU64::new(0),
            appended: Watermark::new(0),
            durable: Watermark::new(0),
            waiting_appended,
            waiting_durable,
            retired: AtomicBool::new(false),
            of_commands: false,
        }
    }

    /// Creates the counts of a lane that carries commands.
    pub(crate) fn of_commands(log: Arc<ShardLog>, durability: Durability) -> Self {
        Self { of_commands: true, ..Self::new(log, durability) }
    }

    pub(crate) fn is_of_commands(&self) -> bool {
        self.of_commands
    }

    /// Enters the lane to publish. Returns `None` if the lane is closed or its shard has failed. (A failure closes the
    /// lanes only after the shard's thread has seen it, so the failure is checked here too.)
    #[inline]
    pub(crate) fn enter(&self) -> Option<Inside<'_>> {
        if self.log.failure().is_some() { None } else { self.close_gate.enter() }
    }

    /// Records that the shard has appended the first `count` events of this lane. The log's watermark must be published
    /// first.
    #[inline]
    pub(crate) fn appended_reached(&self, count: u64) {
        self.appended.publish(count);
        self.waiting_appended.reached(count);
    }

    /// Records that the first `count` events of this lane are durable.
    pub(crate) fn durable_reached(&self, count: u64) {
        self.durable.publish(count);
        self.waiting_durable.reached(count);
    }

    /// Registers a task or thread for the append of the first `count` events of this lane, not counting events that are
    /// refused.
    pub(crate) fn register_appended(&self, registration: &mut Registration, count: u64, waker: &Waker) {
        self.waiting_appended.register_falling(registration, || self.at_most_published(count), waker);
    }

    /// Registers a task for the end of the lane: its closing, or the failure of its shard.
    pub(crate) fn register_end(&self, registration: &mut Registration, waker: &Waker) {
        self.waiting_appended.register(registration, Waiters::END, waker);
    }

    fn at_most_published(&self, count: u64) -> u64 {
        // SeqCst: pairs with `unpublish`.
        count.min(self.published.load(Ordering::SeqCst))
    }

    /// Returns `true` if the first `published` events are appended, not counting events that were refused.
    pub(crate) fn is_appended(&self, published: u64) -> bool {
        let appended = self.appended.get();
        // SeqCst: one order with the counting in `SharedProducer` and `unpublish`, so a refused event is not waited for.
        appended >= published || appended >= self.published.load(Ordering::SeqCst)
    }

    /// Takes a refused event out of the count, and makes all waiters for appends check again.
    pub(crate) fn unpublish(&self) {
        // SeqCst: pairs with the loads in `is_appended` and `at_most_published`; the waiters check again afterwards.
        self.published.fetch_sub(1, Ordering::SeqCst);
        self.waiting_appended.wake_all();
    }

    /// Registers a task for the time when the `count`-th event of this lane becomes durable.
    pub(crate) fn register_durable(&self, registration: &mut Registration, count: u64, waker: &Waker) {
        self.waiting_durable.register(registration, count, waker);
    }

    /// Registers a task for the next append to this lane.
    pub(crate) fn register_any(&self, registration: &mut Registration, waker: &Waker) {
        self.waiting_appended.register(registration, self.appended.get() + 1, waker);
    }

    pub(crate) fn durable_count(&self) -> u64 {
        self.durable.get()
    }

    pub(crate) fn appended_count(&self) -> u64 {
        self.appended.get()
    }

    /// Records that the producer is gone and the shard has taken the lane's last event.
    pub(crate) fn retire(&self) {
        // Release: pairs with the Acquire in `LaneRegistry::forget_retired`: the counts are final.
        self.retired.store(true, Ordering::Release);
    }

    pub(super) fn wake_all(&self) {
        self.space.notify();
        self.waiting_appended.wake_all();
        self.waiting_durable.wake_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{Offset, ShardId};
    use crate::sync::Notifier;
    use std::collections::VecDeque;
    use std::path::PathBuf;

    struct Counted(std::sync::atomic::AtomicUsize);

    impl std::task::Wake for Counted {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        }
    }

    /// A flush may read the count while an event is being pushed that is refused later.
    #[test]
    fn a_wait_for_a_refused_event_ends_with_the_accepted_ones() {
        let notifier = Arc::new(Notifier::default());
        let log = ShardLog::new((1, ShardId(0)), PathBuf::new(), 8192, Offset(4096), 0, VecDeque::new(), &notifier);
        let lane = LaneShared::new(Arc::new(log), Durability::OsCache);
        lane.published.store(2, Ordering::SeqCst);
        let covered = lane.published.load(Ordering::SeqCst);
        let woken = Arc::new(Counted(0.into()));
        let (mut before, mut registration) = (Registration::default(), Registration::default());
        lane.register_appended(&mut before, covered, &Waker::from(Arc::clone(&woken)));
        lane.unpublish();
        lane.register_appended(&mut registration, covered, &Waker::from(Arc::clone(&woken)));
        assert!(!lane.is_appended(covered));
        lane.appended_reached(1);
        assert!(lane.is_appended(covered));
        // Runs once: calls what is due.
        notifier.end();
        notifier.run();
        assert_eq!(woken.0.load(std::sync::atomic::Ordering::SeqCst), 2, "a waiter sleeps for ever");
    }
}
