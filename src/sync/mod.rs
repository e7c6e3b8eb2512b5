//! The protocols between threads, one per file. This folder names no other module of the crate.
//!
//! For protocols, only this folder imports atomics, locks and threads. One switch, `--cfg loom`, therefore puts all
//! protocols under a model checker (`tests/loom.rs` compiles this folder alone). Code that loom cannot model is
//! elsewhere: the atomic view of mapped bytes, and the code that starts threads. `tests/tidy.rs` lists the exceptions.
//!
//! `Arc` is always the standard library's, in every module: reference counting is not one of our protocols, and loom's
//! `Arc` cannot hold a trait object. Only the models use loom's `Arc`.

mod arrivals;
mod close_gate;
mod cpu;
mod deadline;
mod idle;
mod journal;
mod lock;
mod notifier;
#[cfg(not(loom))]
mod promise;
mod role;
mod seed;
mod seqlock;
mod signal;
mod thread_waker;
mod waiters;
mod watermark;

#[cfg(loom)]
pub(crate) use loom::{
    sync::Mutex,
    sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence},
    thread,
};
#[cfg(not(loom))]
pub(crate) use std::{
    sync::Mutex,
    sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence},
    thread,
};

#[cfg(not(loom))]
pub(crate) use crossbeam::sync::ShardedLock;
pub(crate) use crossbeam::utils::CachePadded;

pub(crate) use arrivals::Arrivals;
pub(crate) use close_gate::{CloseGate, Inside};
pub(crate) use cpu::{cores, nap, prefetch, prefetch_at, prefetch_to_write};
pub use deadline::Deadline;
pub use idle::Wait;
pub(crate) use idle::{Idle, Patience};
pub(crate) use journal::Journal;
pub(crate) use lock::lock;
#[cfg(not(loom))]
pub(crate) use lock::lock_until;
pub(crate) use notifier::{Notifier, wake};
#[cfg(not(loom))]
pub(crate) use promise::{
    GaveUp, Keeping, Promise, block_on, block_own, block_until, promise, promise_of_shard, until,
};
pub(crate) use role::{Role, may_wait, role, take_role};
pub(crate) use seed::{Keyed, keyed, plant};
pub(crate) use seqlock::SeqLock;
pub(crate) use signal::Signal;
pub(crate) use thread_waker::thread_waker;
pub(crate) use waiters::{Registration, Waiters};
pub(crate) use watermark::Watermark;
