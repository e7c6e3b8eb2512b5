//! One error enum per family of operations. Errors carry facts; callers never need to parse their text.

mod code_panic;
mod config;
mod failure;
mod gate;
mod live;
mod open;
mod publish;
mod read;
mod wait;

pub use code_panic::{CodePanic, PanickedEvent};
pub(crate) use code_panic::{guard, panic_text};
pub use config::ConfigError;
pub use failure::{FailureCause, ShardFailure};
pub use gate::{GateError, GateOpenError};
pub use live::LiveError;
pub use open::OpenError;
pub use publish::{Rejected, RejectedReason};
pub use read::{Corruption, HistoryError, PositionError, ReadError};
pub use wait::WaitError;

/// The error of a handler: any error type, or text.
pub type HandlerError = Box<dyn std::error::Error + Send + Sync>;

/// Returns the text of `error` followed by the texts of its sources, for a message that is stored or shown on its own.
pub(crate) fn with_sources(error: &dyn std::error::Error) -> String {
    let sources = std::iter::successors(error.source(), |error| error.source());
    sources.fold(error.to_string(), |text, source| format!("{text}: {source}"))
}
