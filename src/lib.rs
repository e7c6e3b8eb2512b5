//! # corelane
//!
//! The hot path of a server, as a library: every event of every user goes through it, is ordered per
//! user, kept durably and handed on, at millions of events per second per core and with nothing lost.
// Under `--cfg loom` this crate is empty: the models build `sync/` alone (`tests/loom.rs`).
#![cfg(not(loom))]

// The derive macro names this crate by its name, here too.
extern crate self as corelane;

mod bounded;
mod config;
mod error;
mod event;
mod sync;

mod aggregate;
#[cfg(feature = "bench-support")]
#[doc(hidden)]
pub mod bench_support;
pub mod check;
mod clock;
mod command;
pub mod consumer;
mod engine;
pub mod envelope;
mod flush;
mod gated;
mod handler;
mod history;
mod keys;
mod log;
mod metrics;
mod producer;
mod ring;
mod runner;
mod shard;
mod shared;
mod snapshot;
pub mod testing;
pub mod view;

pub use bounded::{Bounded, DEPTH_MAX};
pub use config::{Checked, Config, Durability, Pin, Retention};
pub use error::{
    CodePanic, ConfigError, Corruption, FailureCause, GateError, GateOpenError, HistoryError, OpenError, PanickedEvent,
    PositionError, ReadError, Rejected, RejectedReason, ShardFailure, WaitError,
};
pub use event::{
    Correlation, Encode, Event, EventId, EventType, EventTypeId, Key, Meta, Offset, Scratch, Sequence, ShardId, Time,
    Upcaster, Version, deserialize,
};
pub use sync::Wait;
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
