//! Tasks: what an application on an async runtime meets. The executor is the tests' own; it knows no runtime.
#![expect(clippy::unwrap_used, reason = "a test may unwrap")]

#[path = "../common/mod.rs"]
mod common;

mod executor;
mod publishing;
mod runtimes;
mod shared_client;
mod wakers;
