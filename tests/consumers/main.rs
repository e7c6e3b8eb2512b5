//! Consumers and sinks.
#![expect(clippy::unwrap_used, reason = "a test may unwrap")]

#[path = "../common/mod.rs"]
mod common;

mod async_handlers;
mod async_sinks;
mod consumer_crashes;
mod consumer_letters;
mod consumer_model;
mod consumer_sinks;
mod consumer_status;
mod consumers;
mod errors_stay;
mod own_threads;
