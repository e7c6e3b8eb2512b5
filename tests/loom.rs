//! The models of the protocols between threads. `just loom` runs every interleaving of each.
//!
//! Compiles `src/sync/` alone, with loom's atomics, locks and threads in place of the standard library's.
#![cfg(loom)]
#![allow(dead_code, unused_imports, unreachable_pub, reason = "the protocols are compiled without their callers")]

#[path = "../src/sync/mod.rs"]
mod sync;
