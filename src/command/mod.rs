//! Commands: a client sends them to the shard that decides, and receives the answers.
//!
//! | file | contents |
//! |---|---|
//! | `client` | the lanes of one thread, one to every shard |
//! | `sending` | a command before it is sent, with its options |
//! | `answer` | the answer to a command, which a thread or a task can wait for |
//! | `outcome` | the outcome of a command, and the version that it may require |
//! | `shared` | the lanes of many threads and tasks |
//! | `lane` | the rings between a client and one shard |

mod answer;
mod client;
mod lane;
mod outcome;
mod sending;
mod shared;

pub use answer::Answer;
pub use client::Client;
pub use lane::Ticket;
pub(crate) use lane::{ClientEnd, ClientLane, CommandSlot, Question, Reply};
pub use outcome::{CommandError, ExpectedVersion, Outcome};
pub use sending::{IdempotencyKey, Sending};
pub use shared::{SharedAnswer, SharedClient, SharedOutcome, SharedSending, Submitting};
