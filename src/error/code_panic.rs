//! Turns panics of application code into errors while the engine reads stored data.

use crate::event::{EventTypeId, Key, Offset, ShardId};

/// A panic of application code that the engine called while it read stored data: during open, or while reading history.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub struct CodePanic {
    /// The code that panicked: `evolve or an upcaster`, `upgrade`, `a view`, `the factory of a handler`.
    pub code: &'static str,
    /// The shard.
    pub shard: ShardId,
    /// The event that was being read, if any.
    pub event: Option<PanickedEvent>,
    /// The text of the panic.
    pub message: String,
}

/// The event on which application code panicked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct PanickedEvent {
    /// The offset of its record.
    pub offset: Offset,
    /// Its key.
    pub key: Key,
    /// Its type.
    pub event_type: EventTypeId,
}

impl std::fmt::Display for CodePanic {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { code, shard, event, message } = self;
        match event {
            Some(PanickedEvent { offset, key, event_type }) => {
                write!(
                    f,
                    "shard {shard}, offset {offset}: {code} panicked on an event of key {key}, type {event_type}: {message}"
                )
            }
            None => write!(f, "shard {shard}: {code} panicked: {message}"),
        }
    }
}

/// Runs application code and turns a panic into an error.
pub(crate) fn guard<T>(code: &'static str, shard: ShardId, body: impl FnOnce() -> T) -> Result<T, CodePanic> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(body)).map_err(|panic| CodePanic {
        code,
        shard,
        event: None,
        message: panic_text(&*panic),
    })
}

/// Returns the message of a panic, or `no text` if its payload is not text.
pub(crate) fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    panic
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "no text".to_owned())
}
