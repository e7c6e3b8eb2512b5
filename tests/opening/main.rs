//! Opening a store: locks, refusals, older layouts, exchanged files.
#![expect(clippy::unwrap_used, reason = "a test may unwrap")]

#[path = "../common/mod.rs"]
mod common;

mod clocks;
mod locked;
mod opened_store;
mod opening;
mod refused_stores;
mod stored_layouts;
mod swapped_files;
mod upcast;
