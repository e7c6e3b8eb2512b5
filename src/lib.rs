//! # corelane
//!
//! The hot path of a server, as a library: every event of every user goes through it, is ordered per
//! user, kept durably and handed on, at millions of events per second per core and with nothing lost.
// Under `--cfg loom` this crate is empty: the models build `sync/` alone (`tests/loom.rs`).
#![cfg(not(loom))]

// The derive macro names this crate by its name, here too.
extern crate self as corelane;

// The layers, lowest first; `tests/tidy.rs` checks that no file names a higher one.
mod sync;

mod bounded;
mod clock;
mod config;
#[cfg(feature = "json")]
pub mod envelope;
mod error;
mod event;
mod metrics;

mod storage;

mod log;

mod lane;

mod state;

mod command;

pub mod ingress;

mod shard;

mod recovery;

mod background;

pub mod consumer;

mod engine;

mod ops;
#[cfg(any(test, feature = "test-util"))]
pub mod testing;
#[cfg(feature = "cli")]
pub mod tools;

pub use bounded::{Bounded, DEPTH_MAX};
pub use config::{Config, Durability, Pin, Retention, ValidConfig};
pub use error::{
    CodePanic, ConfigError, Corruption, FailureCause, GateError, GateOpenError, HandlerError, HistoryError, OpenError,
    PanickedEvent, PositionError, ReadError, Rejected, RejectedReason, ShardFailure, WaitError,
};
pub use event::{
    Correlation, Encode, Event, EventId, EventType, EventTypeId, Key, Meta, Offset, Scratch, Sequence, ShardId, Time,
    Upcaster, Version, deserialize,
};
#[cfg(feature = "hlog")]
pub use metrics::write_hlog;
pub use sync::{Deadline, Wait};
#[cfg(feature = "bench-support")]
#[doc(hidden)]
pub use testing::bench_support;
pub use {
    command::{Answer, Client, CommandError, ExpectedVersion, IdempotencyKey, Outcome, Sending, Ticket},
    engine::{Builder, Engine, EventLog},
    engine::{Comparison, PublishSyncError},
    ingress::gated::{Accepted, Gap, GateRefused, GatedProducer, LateEvent},
    ingress::producer::{BatchRejected, Producer},
    ingress::shared::{SharedProducer, SharedReceipt},
    lane::receipt::{Pending, Receipt},
    log::position::Position,
    log::reader::{Reader, Record},
    log::scan,
    metrics::{Metrics, ShardMetrics, Stage, write_hgrm},
    ops::check,
    recovery::report::{RecoveryReport, ShardRecovery, TornTail},
    shard::handler::{BatchEnd, Handler, OnError},
    state::aggregate::{Aggregate, Emit, Stateless, Stored},
    state::history::{AsOf, Counts, EventsBetween, PastState, Stream},
    state::snapshot::store::SnapshotStats,
    state::view,
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
