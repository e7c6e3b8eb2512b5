//! Tests of an application: rules without an engine, and an engine on a disk that fails on demand.
//!
//! [`given`] tests an aggregate alone: given these events, when this command, then those events. [`given_many`] does
//! the same for commands for several keys. [`FaultyStorage`]
//! replaces the file system under an engine, loses unsynced bytes in a crash and fails on demand.
//!
//! This module needs the feature `test-util`: enable it among the dev-dependencies.

#[cfg(feature = "bench-support")]
#[doc(hidden)]
pub mod bench_support;
mod faulty;
mod given;
mod given_many;

pub use faulty::{FaultyStorage, Unsynced};
pub use given::{Given, When, given};
pub use given_many::{GivenMany, WhenMany, given_many};
