//! The `corelane` command-line tool.
#![expect(clippy::unwrap_used, reason = "a test may unwrap")]

#[path = "../common/mod.rs"]
mod common;

mod dlq;
mod dump;
mod live_tools;
mod tool_edges;
mod typed;
mod verify;
