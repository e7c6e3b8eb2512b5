#![doc = include_str!("../README.md")]
//!
//! # Modules
//!
//! The names that a first program needs are at the root of this crate. Every other name is in the module of its topic, and
//! [`guide`] holds the chapters of the guide.
//!
//! # Cargo features
//!
//! No feature is needed to embed the engine.
//!
//! | feature | adds |
//! |---|---|
//! | `cli` | the operator's tool `corelane`, and the module `tools` that it is made of |
//! | `test-util` | for tests: a storage that fails on demand, time that passes on demand, a limit on threads |
// Under `--cfg loom` this crate is empty: the models build `sync/` alone (`tests/loom.rs`).
#![cfg(not(loom))]

// The derive macros name this crate by its name, here too.
extern crate self as corelane;

// The layers, lowest first; `tests/tidy.rs` checks that no file names a higher one. A folder whose names an application uses
// is a public module.
mod sync;

mod bounded;
mod clock;
/// How an engine is set up.
pub mod config;
#[cfg(feature = "json")]
pub mod envelope;
/// The errors of every call.
pub mod error;
/// Events: their types, their positions in the log, their bytes, and how older layouts are read.
pub mod event;
/// Counters and latency histograms, as text for Prometheus and as files for HdrHistogram.
pub mod metrics;

mod storage;

/// Reading a shard's log: through a running engine, or from the files beside it.
pub mod log;

mod lane;

/// State: aggregates, their history and time travel.
pub mod state;

/// Commands: a client sends them, the shard that owns the key decides, and the answer comes back.
pub mod command;

/// Ingress: producers, receipts and sequence gates.
pub mod ingress;

mod shard;

/// What the opening of a store reports.
pub mod recovery;

mod background;

/// Services that follow the log: durable consumers, retries, dead letters, sinks and pollers.
pub mod consumer;

/// The engine itself, and the results of its methods that belong to no other topic.
pub mod engine;

mod ops;
#[cfg(any(test, feature = "test-util"))]
pub mod testing;
#[cfg(feature = "cli")]
pub mod tools;

/// Inline handlers: code that runs on the shard's thread right after an event is appended.
pub mod handler {
    pub use crate::error::HandlerError;
    pub use crate::shard::handler::{BatchEnd, Handler, OnError};
}

/// Views: read models that any thread reads without asking the shard and without slowing it.
///
/// | view | question it answers |
/// |---|---|
/// | [`ById`](view::ById) | What is the value of this key? |
/// | [`Area`](view::Area) | Which keys are near this place? |
/// | [`Leaderboard`](view::Leaderboard) | Which keys have the highest scores? |
/// | [`ServerStatus`](view::ServerStatus) | Which keys are online, and how high is the load? |
///
/// A view is a cache: the engine fills it from the states when it opens, so a view can be added to an existing store at any
/// time. Handles are cheap to clone and stay valid after the engine is gone: they then show what was published last. A reader
/// may see a change a little before the position that it belongs to, and never after. [`guide::views`] shows them at work.
pub mod view {
    pub use crate::state::view::{
        Area, ById, Found, Leaderboard, Place, Position, Presence, Ranked, ServerStatus, Status, Unreadable, View,
        ViewWriter,
    };
}

/// The chapters of the guide. Their examples are compiled and run as tests.
pub mod guide {
    #[doc = include_str!("../docs/event-sourcing.md")]
    pub mod event_sourcing {}
    #[doc = include_str!("../docs/commands.md")]
    pub mod commands {}
    #[doc = include_str!("../docs/views.md")]
    pub mod views {}
    #[doc = include_str!("../docs/ordering.md")]
    pub mod ordering {}
    #[doc = include_str!("../docs/services.md")]
    pub mod services {}
    #[doc = include_str!("../docs/schema-evolution.md")]
    pub mod schema_evolution {}
    #[doc = include_str!("../docs/testing.md")]
    pub mod testing {}
}

#[doc(inline)]
pub use ops::check;
#[cfg(feature = "bench-support")]
#[doc(hidden)]
pub use testing::bench_support;

// These crates' types appear in the API. The application's versions must match: use these.
pub use {hdrhistogram, rkyv};

#[doc(inline)]
pub use {
    bounded::Bounded,
    command::{Client, CommandError, Outcome},
    config::{Config, Durability, Pin, Retention},
    engine::{Builder, Engine, EventLog},
    error::{ConfigError, HandlerError, OpenError, ReadError, Rejected, WaitError},
    event::{Event, EventType, EventTypeId, Key, Meta, Offset, Sequence, ShardId, Time, Version},
    ingress::{Producer, Receipt, SharedProducer},
    log::{Reader, Record},
    shard::handler::{Handler, OnError},
    state::{Aggregate, Emit, Stateless, Stored},
    sync::{Deadline, Wait},
};
