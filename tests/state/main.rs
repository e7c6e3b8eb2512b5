//! States, snapshots, checkpoints and views.
#![expect(clippy::unwrap_used, reason = "a test may unwrap")]

#[path = "../common/mod.rs"]
mod common;

mod derived_events;
mod given;
mod sentinels;
mod state_checkpoints;
mod state_corners;
mod state_damage;
mod state_model;
mod states;
mod views;
