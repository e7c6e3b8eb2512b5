//! Ingress: producers, gated producers, receipts and inline handlers.
#![expect(clippy::unwrap_used, reason = "a test may unwrap")]

#[path = "../common/mod.rs"]
mod common;

mod bounds;
mod engine;
mod gated;
mod handlers;
mod hot_path;
mod latency;
mod own_event;
mod producers;
mod told;
