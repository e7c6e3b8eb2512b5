//! Opening a store: locks, refused stores, older layouts, files of other stores.
#![expect(clippy::unwrap_used, reason = "a test may unwrap")]

#[path = "../common/mod.rs"]
mod common;

mod clocks;
mod locked;
mod opened_store;
mod opening;
mod placement;
mod refused_stores;
mod stored_layouts;
mod swapped_files;
mod upcast;
