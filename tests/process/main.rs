//! Tests that measure or limit their whole process: allocations, memory, idle threads, address space. Each runs in a
//! child process.
#![expect(clippy::unwrap_used, reason = "a test may unwrap")]

#[path = "../common/mod.rs"]
mod common;
mod counting;

mod allocation;
mod consumer_memory;
mod idle;
mod live_memory;
mod memory;
mod refused_threads;
