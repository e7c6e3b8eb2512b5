//! One error enum per family of operations. Errors carry facts; callers never need to parse their text.
//!
//! # Whose fault
//!
//! The errors that a server's handler meets answer two questions, each with functions of its own and through the trait
//! [`WhoseFault`]. At most one of them is answered with yes:
//!
//! | | means | HTTP |
//! |---|---|---|
//! | `is_client_error()` | The request is at fault: it was rejected, is too large, or refers to something that does not exist (yet, or any more). The same request fails again until the data has changed. | 4xx |
//! | `is_retryable()` | A passing condition is at fault: no room, no space, no time. The same call may succeed later, and repeating it does no harm. | 503 |
//! | neither | The engine, the store or the program is at fault, or the outcome is not known. Log it. | 500 |
//!
//! | error | client error | retryable |
//! |---|---|---|
//! | [`Rejected`], [`RejectedReason`] | `TooLarge`, `Keys` | `Full`, `StorageFull` |
//! | [`CommandError`](crate::CommandError) | `Rejected`, `WrongVersion`, `TooLarge`, `NotSent(TooLarge)`, `NotSent(Keys)` | `NotSent(Full)`, `NotSent(StorageFull)` |
//! | [`WaitError`] | | `TimedOut` (wait again), `CheckpointFailed` |
//! | [`HistoryError`] | `BeyondRetention`, `NotYet` | as its [`ReadError`] or [`WaitError`] |
//! | [`ReadError`] | `BeyondRetention`, `NotARecord`, `Position` | `Io` for want of a resource |
//! | [`PositionError`] | all | |
//! | [`LiveError`] | `UnknownType`, `NoTypes`; as its [`ReadError`] | `Lagged` (the feed continues); as its [`WaitError`] |
//! | [`ConsumerError`](crate::consumer::ConsumerError) | `Name`, `UnknownType`, `NoTypes`, `NotRegistered`, `AlreadyRunning`; as its [`ReadError`] | `Busy`; files or letters for want of a resource; as its [`WaitError`] |
//! | [`PublishSyncError`](crate::engine::PublishSyncError) | as its [`Rejected`] | as its [`Rejected`] |
//! | [`GateError`] | as the error inside | as the error inside |
//! | [`OpenError`] | | `Locked`; `Io` for want of a resource |
//!
//! "For want of a resource" means space, quota, memory or descriptors, or an interrupted call. A [`TimeError`] and a
//! `JsonError` always come from the input.
//!
//! **A command that was sent and not answered** ([`CommandError::Unanswered`](crate::CommandError::Unanswered), also
//! at a deadline) may or may not have been carried out, now or later. It is not retryable in the sense above. With an
//! idempotency key it is safe to send it again: a command that was carried out is then answered with its first outcome.
//! [`CommandError::is_outcome_unknown`](crate::CommandError::is_outcome_unknown) recognises this case, which an HTTP
//! server answers with 504.

mod code_panic;
mod config;
mod failure;
pub(crate) mod fault;
mod gate;
mod keys;
mod live;
mod open;
mod publish;
mod read;
mod time;
mod wait;

pub use code_panic::{CodePanic, PanickedEvent};
pub(crate) use code_panic::{guard, panic_text};
pub use config::ConfigError;
pub use failure::{FailureCause, ShardFailure};
pub use fault::WhoseFault;
pub(crate) use fault::is_exhausted;
pub use gate::{GateError, GateOpenError};
pub use keys::KeysError;
pub use live::LiveError;
pub use open::OpenError;
pub use publish::{Rejected, RejectedReason};
pub use read::{Corruption, HistoryError, PositionError, ReadError};
pub use time::TimeError;
pub use wait::WaitError;

/// The error of a handler: any error type, or text.
pub type HandlerError = Box<dyn std::error::Error + Send + Sync>;

/// Returns the text of `error` followed by the texts of its sources, for a message that is stored or shown on its own.
pub(crate) fn with_sources(error: &dyn std::error::Error) -> String {
    let sources = std::iter::successors(error.source(), |error| error.source());
    sources.fold(error.to_string(), |text, source| format!("{text}: {source}"))
}

#[cfg(test)]
mod tests;
