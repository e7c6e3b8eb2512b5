//! Commands: a client sends them to the shard that decides, and receives the answers.
//!
//! | file | contents |
//! |---|---|
//! | `client` | the lanes of one thread, one to every shard |
//! | `sending` | a command before it is sent, with its client |
//! | `prepared` | a command with its options |
//! | `named` | the keys of a command for several keys |
//! | `answer` | the answer to a command, which a thread or a task can wait for |
//! | `expected` | the version that a command may require |
//! | `outcome` | the outcome of a command |
//! | `shared` | the lanes of many threads and tasks |
//! | `room` | the callers that wait for room in such a lane |
//! | `lane` | the rings between a client and one shard |

mod answer;
mod client;
mod expected;
mod lane;
mod named;
mod outcome;
mod prepared;
mod room;
mod sending;
mod shared;

pub use answer::Answer;
pub use client::Client;
pub use expected::ExpectedVersion;
pub use lane::Ticket;
pub(crate) use lane::{ClientEnd, ClientLane, CommandSlot, Question, Reply, WrongVersion};
pub(crate) use named::{Expected, NamedKey, NamedKeys};
pub use outcome::{CommandError, Outcome};
pub use sending::{IdempotencyKey, Sending};
pub use shared::{SharedAnswer, SharedClient, SharedOutcome, SharedSending, Submitting};

pub use crate::state::states::KEYS_MAX;
