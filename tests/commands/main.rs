//! Commands, their events and their outcomes.
#![expect(clippy::unwrap_used, reason = "a test may unwrap")]

#[path = "../common/mod.rs"]
mod common;

mod command_answers;
mod command_groups;
mod command_model;
mod commands;
mod many;
mod many_groups;
mod many_model;
