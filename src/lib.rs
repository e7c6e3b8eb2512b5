//! # corelane
//!
//! The hot path of a server, as a library: every event of every user goes through it, is ordered per
//! user, kept durably and handed on, at millions of events per second per core and with nothing lost.
#![cfg_attr(loom, allow(dead_code, unused_imports, reason = "loom models the protocols, not the engine"))]

#[cfg(all(feature = "bench-support", not(loom)))]
#[doc(hidden)]
pub mod bench_support;
mod clock;
mod config;
mod engine;
pub mod envelope;
mod error;
mod event;
mod handler;
mod keys;
mod log;
mod metrics;
mod producer;
mod ring;
mod runner;
mod shard;
mod shared;
mod sync;
pub mod testing;

pub use config::{Checked, Config, Durability, Pin, Retention, Wait};
pub use engine::{Builder, Engine};
pub use error::{ConfigError, Corruption, FailureCause, OpenError, ReadError, Rejected, RejectedReason, ShardFailure, WaitError};
pub use event::{
    Correlation, Encode, Event, EventId, EventType, EventTypeId, Key, Meta, Offset, Scratch, Sequence, ShardId, Time, Version, deserialize,
};
pub use handler::{BatchEnd, Handler, HandlerError, OnError};
pub use log::reader::{Reader, Record};
pub use log::recovery::{RecoveryReport, ShardRecovery, TornTail};
pub use log::scan;
pub use metrics::{Metrics, ShardMetrics, Stage, write_hgrm, write_hlog};
pub use producer::{BatchRejected, Pending, Producer, Receipt};
pub use shared::{SharedProducer, SharedReceipt};
