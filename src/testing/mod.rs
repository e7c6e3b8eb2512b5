//! Tests of an application: rules without an engine, and an engine on a disk that fails on demand.
//!
//! [`given`] tests an aggregate alone: given these events, when this command, then those events. `FaultyStorage` (feature
//! `test-util`) replaces the file system under an engine, loses unsynced bytes in a crash and fails on demand.

#[cfg(feature = "bench-support")]
#[doc(hidden)]
pub mod bench_support;
#[cfg(any(test, feature = "test-util"))]
mod faulty;
mod given;

#[cfg(any(test, feature = "test-util"))]
pub use faulty::{FaultyStorage, Unsynced};
pub use given::{Given, When, given};
