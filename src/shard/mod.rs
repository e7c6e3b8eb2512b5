//! The shard: takes events and commands out of its inbox and makes them part of the log.
//!
//! One writer: only this shard writes its log, its key table and the states in it. [`Shard::turn`] is bounded and never
//! waits; the runner owns the thread and the waiting.
//!
//! | file | contents |
//! |---|---|
//! | `turn` | one turn, and how a shard ends |
//! | `inbox` | lanes of producers and clients, and the mailboxes of new ones |
//! | `core` | the writer, the key table, the views and everything else that a batch changes |
//! | `batch` | appends one batch of events |
//! | `commands` | decides commands and appends their events |
//! | `several` | decides commands for several keys |
//! | `targets` | the keys of a decision's events |
//! | `handler` | the trait of inline handlers and their policies |
//! | `handling` | runs the inline handlers over a batch |
//! | `syncer_link` | wakes the syncer, and hands publish times over to it |

mod batch;
mod commands;
mod core;
pub(crate) mod handler;
mod handling;
mod inbox;
mod several;
mod syncer_link;
mod targets;
mod turn;

pub(crate) use inbox::LaneEnd;
pub(crate) use turn::{Shard, ShardParts};
