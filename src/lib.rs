//! The hot path of a server, as a library: per-user order, lock-free lanes, and a durable zero-copy event log.
//!
#![doc = include_str!("../README.md")]
//!
//! # Modules
//!
//! The names that a first program needs are at the root of this crate. Every other name is in the module of its topic,
//! and [`guide`] holds the chapters of the guide.
//!
//! # Cargo features
//!
//! No feature is needed to embed the engine.
//!
//! | feature | adds |
//! |---|---|
//! | `json` | the module `envelope`: events as JSON lines |
//! | `rfc3339` | times as RFC 3339: `Time::from_rfc3339`, `Time::to_rfc3339` |
//! | `hlog` | latency histograms as `.hlog` interval logs |
//! | `tokio` | [`consumer`]s with asynchronous handlers and sinks, on the application's tokio runtime |
//! | `cli` | the operator's tool `corelane`, and the module `tools` that it is made of |
//! | `test-util` | the module `testing`: tests of rules without an engine, and a storage that fails on demand; simulated time |
// Under `--cfg loom` this crate is empty: the models build `sync/` alone (`tests/loom.rs`).
#![cfg(not(loom))]

// The derive macros refer to this crate as `corelane`, inside this crate too.
extern crate self as corelane;

// The layers, lowest first; `tests/tidy.rs` checks that no file names a higher one. A folder whose names an application
// uses is a public module.
mod sync;

mod bounded;
mod clock;
pub mod config;
#[cfg(feature = "json")]
pub mod envelope;
pub mod error;
pub mod event;
pub mod metrics;

mod storage;

pub mod log;

mod lane;

pub mod state;

pub mod command;

pub mod ingress;

mod shard;

pub mod recovery;

mod background;

pub mod consumer;

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
/// | [`ServerStatus`](view::ServerStatus) | How many keys are online, and how high is the load? |
///
/// A view is a cache: the engine fills it from the states when it opens, so a view can be added to an existing store at
/// any time. Handles are cheap to clone and stay valid after the engine is gone: they then show the last published
/// values. A reader may see a change slightly before the position that includes it, never later. [`guide::views`] has
/// examples.
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
    #[doc = include_str!("../docs/tokio.md")]
    pub mod tokio {}
    #[doc = include_str!("../docs/blocking.md")]
    pub mod blocking {}
    #[doc = include_str!("../docs/live.md")]
    pub mod live {}
    #[doc = include_str!("../docs/failures.md")]
    pub mod failures {}
    #[doc = include_str!("../docs/memory.md")]
    pub mod memory {}
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

// Types of these crates appear in the API, and their versions must match the application's: use these re-exports.
pub use {hdrhistogram, rkyv};

#[doc(inline)]
pub use {
    bounded::Bounded,
    command::{Client, CommandError, Outcome, SharedClient},
    config::{Config, Durability, Pin, Retention},
    engine::{Builder, Engine, EventLog},
    error::{ConfigError, HandlerError, OpenError, ReadError, Rejected, WaitError},
    event::{Event, EventType, EventTypeId, Key, Meta, Offset, Placement, Sequence, ShardId, Time, Version},
    ingress::{Producer, Receipt, SharedProducer},
    log::{Reader, Record},
    shard::handler::{Handler, OnError},
    state::{Aggregate, Emit, Stateless, Stored},
    sync::{Deadline, Wait},
};
