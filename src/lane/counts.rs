//! What the two ends of a lane share besides its ring: how many events were accepted, appended and made durable.
//!
//! Writers: the producer counts what it published, the shard what it appended, the syncer what is durable.

use std::sync::Arc;

use crate::config::Durability;
use crate::log::segment::ShardLog;
use crate::sync::{AtomicBool, AtomicU64, CloseGate, Inside, Ordering, Signal, Waiters, Watermark};

/// What the two ends of a lane share besides the ring.
#[derive(Debug)]
pub(crate) struct LaneShared {
    pub(crate) log: Arc<ShardLog>,
    /// Whether this engine ever syncs by itself.
    pub(super) syncs: bool,
    pub(crate) close_gate: CloseGate,
    /// Wakes the producer when there is room again.
    pub(crate) space: Signal,
    /// Events accepted; in a shared lane also those being pushed, which may yet be refused. Written by producers.
    pub(crate) published: AtomicU64,
    /// Of those, how many are appended. Written by the shard.
    pub(super) appended: Watermark,
    /// Of those, how many are durable. Written by the syncer.
    pub(super) durable: Watermark,
    pub(super) waiting_appended: Waiters,
    pub(super) waiting_durable: Waiters,
    /// The producer is gone and its ring is empty.
    pub(super) retired: AtomicBool,
    /// It carries commands: what it counts are no events.
    pub(super) of_commands: bool,
}

impl LaneShared {
    pub(crate) fn new(log: Arc<ShardLog>, durability: Durability) -> Self {
        Self {
            log,
            syncs: durability != Durability::OsCache,
            close_gate: CloseGate::new(),
            space: Signal::new(),
            published: AtomicU64::new(0),
            appended: Watermark::new(0),
            durable: Watermark::new(0),
            waiting_appended: Waiters::new(),
            waiting_durable: Waiters::new(),
            retired: AtomicBool::new(false),
            of_commands: false,
        }
    }

    /// A lane that carries commands.
    pub(crate) fn of_commands(log: Arc<ShardLog>, durability: Durability) -> Self {
        Self { of_commands: true, ..Self::new(log, durability) }
    }

    pub(crate) fn is_of_commands(&self) -> bool {
        self.of_commands
    }

    /// Lets a publisher in, unless the lane is closed or its shard has failed. A failure closes lanes only when
    /// the shard's thread sees it, and until then nobody must be let in either.
    #[inline]
    pub(crate) fn enter(&self) -> Option<Inside<'_>> {
        if self.log.failure().is_some() { None } else { self.close_gate.enter() }
    }

    /// The shard has appended `count` events of this lane in all; the log's watermark is already published.
    #[inline]
    pub(crate) fn appended_reached(&self, count: u64) {
        self.appended.publish(count);
        self.waiting_appended.reached(count);
    }

    /// The first `count` events of this lane are durable.
    pub(crate) fn durable_reached(&self, count: u64) {
        self.durable.publish(count);
        self.waiting_durable.reached(count);
    }

    /// Registers for the `count`-th event of this lane to be appended.
    pub(crate) fn register_appended(&self, count: u64, waker: &std::task::Waker) {
        self.waiting_appended.register(count, waker);
    }

    /// Whether everything among the first `published` events that was not refused is appended.
    pub(crate) fn is_appended(&self, published: u64) -> bool {
        let appended = self.appended.get();
        appended >= published || appended >= self.published.load(Ordering::SeqCst)
    }

    /// Takes back the count of an event that was refused. Who waits for it must look again.
    pub(crate) fn unpublish(&self) {
        self.published.fetch_sub(1, Ordering::SeqCst);
        self.waiting_appended.reached(u64::MAX);
    }

    /// Registers for the `count`-th event of this lane to be durable.
    pub(crate) fn register_durable(&self, count: u64, waker: &std::task::Waker) {
        self.waiting_durable.register(count, waker);
    }

    /// Registers for the next event of this lane that is appended.
    pub(crate) fn register_any(&self, waker: &std::task::Waker) {
        self.waiting_appended.register(self.appended.get() + 1, waker);
    }

    pub(crate) fn durable_count(&self) -> u64 {
        self.durable.get()
    }

    pub(crate) fn appended_count(&self) -> u64 {
        self.appended.get()
    }

    /// The shard has taken the last event of a lane whose producer is gone.
    pub(crate) fn retire(&self) {
        self.retired.store(true, Ordering::Release);
    }

    pub(super) fn wake_all(&self) {
        self.space.notify();
        self.waiting_appended.reached(u64::MAX);
        self.waiting_durable.reached(u64::MAX);
    }
}
