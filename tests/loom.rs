//! The models of the protocols between threads: `just loom` runs every interleaving of each.
//!
//! Builds `src/sync/` alone, with loom's atomics, locks and threads in place of the standard library's.
#![cfg(loom)]
#![allow(dead_code, unused_imports, unreachable_pub, reason = "the protocols without their users")]

#[path = "../src/sync/mod.rs"]
mod sync;
