//! The log: its contents, its readers, and damage to its files.
#![expect(clippy::unwrap_used, reason = "a test may unwrap")]

#[path = "../common/mod.rs"]
mod common;

mod bit_flips;
mod holes;
mod last_offset;
mod live;
mod live_tasks;
mod marks;
mod model;
mod pollers;
mod reader;
mod spares;
mod torn_tail;
