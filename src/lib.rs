//! # corelane
//!
//! The hot path of a server, as a library: every event of every user goes through it, is ordered per
//! user, kept durably and handed on, at millions of events per second per core and with nothing lost.
#![cfg_attr(loom, allow(dead_code, unused_imports, reason = "loom builds the protocols without their users"))]

// The derive macro names this crate by its name, here too.
extern crate self as corelane;

// Under `--cfg loom` only the protocols between threads are built, for their models.
mod bounded;
mod config;
mod error;
mod event;
mod sync;

#[cfg(not(loom))]
mod aggregate;
#[cfg(all(feature = "bench-support", not(loom)))]
#[doc(hidden)]
pub mod bench_support;
#[cfg(not(loom))]
pub mod check;
#[cfg(not(loom))]
mod clock;
#[cfg(not(loom))]
mod command;
#[cfg(not(loom))]
pub mod consumer;
#[cfg(not(loom))]
mod engine;
#[cfg(not(loom))]
pub mod envelope;
#[cfg(not(loom))]
mod flush;
#[cfg(not(loom))]
mod gated;
#[cfg(not(loom))]
mod handler;
#[cfg(not(loom))]
mod history;
#[cfg(not(loom))]
mod keys;
#[cfg(not(loom))]
mod log;
#[cfg(not(loom))]
mod metrics;
#[cfg(not(loom))]
mod producer;
#[cfg(not(loom))]
mod promise;
#[cfg(not(loom))]
mod ring;
#[cfg(not(loom))]
mod runner;
#[cfg(not(loom))]
mod shard;
#[cfg(not(loom))]
mod shared;
#[cfg(not(loom))]
mod snapshot;
#[cfg(not(loom))]
pub mod testing;
#[cfg(not(loom))]
pub mod view;

pub use bounded::{Bounded, DEPTH_MAX};
pub use config::{Checked, Config, Durability, Pin, Retention, Wait};
pub use error::{
    CodePanic, ConfigError, Corruption, FailureCause, GateError, GateOpenError, HistoryError, OpenError, PanickedEvent,
    PositionError, ReadError, Rejected, RejectedReason, ShardFailure, WaitError,
};
pub use event::{
    Correlation, Encode, Event, EventId, EventType, EventTypeId, Key, Meta, Offset, Scratch, Sequence, ShardId, Time,
    Upcaster, Version, deserialize,
};
#[cfg(not(loom))]
pub use {
    aggregate::{Aggregate, Emit, Stateless, Stored},
    command::{Answer, Client, CommandError, ExpectedVersion, IdempotencyKey, Outcome, Sending, Ticket},
    engine::{Builder, Engine, EventLog},
    engine::{Comparison, SyncError},
    gated::{Accepted, Gap, GateRefused, GatedProducer, LateEvent},
    handler::{BatchEnd, Handler, HandlerError, OnError},
    history::{At, Between, Counts, Past, Stream},
    log::position::Position,
    log::reader::{Reader, Record},
    log::report::{RecoveryReport, ShardRecovery, TornTail},
    log::scan,
    metrics::{Metrics, ShardMetrics, Stage, write_hgrm, write_hlog},
    producer::{BatchRejected, Pending, Producer, Receipt},
    shared::{SharedProducer, SharedReceipt},
    snapshot::store::SnapshotStats,
};

/// The README's quick start is compiled and run with the other examples.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

/// The chapters' examples, likewise.
#[cfg(doctest)]
#[doc = include_str!("../docs/event-sourcing.md")]
#[doc = include_str!("../docs/commands.md")]
#[doc = include_str!("../docs/views.md")]
#[doc = include_str!("../docs/ordering.md")]
#[doc = include_str!("../docs/services.md")]
#[doc = include_str!("../docs/schema-evolution.md")]
#[doc = include_str!("../docs/testing.md")]
struct Chapters;
