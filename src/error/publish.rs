//! Errors of publishing.

use super::{KeysError, ShardFailure};
use crate::event::EventTypeId;

/// A rejected publish: the event, given back, and the reason.
#[derive(thiserror::Error)]
#[non_exhaustive]
pub enum Rejected<E> {
    /// The lane is full, or stayed full until the deadline. An engine's own thread must not wait, so there a full lane
    /// rejects at once.
    #[error("the lane is full")]
    Full(E),
    /// The lane is full because the shard waits for its storage: for space, or because quota, descriptors or memory are
    /// exhausted ([`crate::metrics::ShardMetrics::storage_full_why`]). The shard continues by itself when the resource
    /// is available again.
    #[error("the lane is full: the shard waits for storage (space, quota, descriptors or memory)")]
    StorageFull(E),
    /// The call would wait for its own thread: an engine's thread, or the thread of the consumer it calls. Nothing was
    /// sent.
    #[error("the call would wait for its own thread: make it on another thread")]
    OnEngineThread(E),
    /// The engine is closed, or is shutting down.
    #[error("the engine is closed")]
    Closed(E),
    /// The key's shard failed.
    #[error("{1}")]
    ShardFailed(E, ShardFailure),
    /// The archive would be larger than `event_bytes_max`.
    #[error("the event is larger than {bytes_max} bytes")]
    TooLarge {
        /// The event.
        event: E,
        /// The configured limit in bytes.
        bytes_max: usize,
    },
    /// The event's `event_type()` is not in its `TYPES`, so it could not be read again.
    #[error("the event has type {event_type}, which its TYPES do not declare")]
    UndeclaredType {
        /// The event.
        event: E,
        /// The type that `event_type()` returned.
        event_type: EventTypeId,
    },
    /// The keys of a command for several keys are invalid. Nothing was sent.
    #[error("{1}")]
    Keys(E, KeysError),
}

impl<E> Rejected<E> {
    /// Returns the event.
    pub fn into_event(self) -> E {
        match self {
            Self::Full(e)
            | Self::StorageFull(e)
            | Self::OnEngineThread(e)
            | Self::Closed(e)
            | Self::ShardFailed(e, _)
            | Self::Keys(e, _) => e,
            Self::TooLarge { event, .. } | Self::UndeclaredType { event, .. } => event,
        }
    }

    /// Returns the same rejection with `change` applied to the event.
    pub(crate) fn map<T>(self, change: impl FnOnce(E) -> T) -> Rejected<T> {
        match self {
            Self::Full(e) => Rejected::Full(change(e)),
            Self::StorageFull(e) => Rejected::StorageFull(change(e)),
            Self::OnEngineThread(e) => Rejected::OnEngineThread(change(e)),
            Self::Closed(e) => Rejected::Closed(change(e)),
            Self::ShardFailed(e, failure) => Rejected::ShardFailed(change(e), failure),
            Self::TooLarge { event, bytes_max } => Rejected::TooLarge { event: change(event), bytes_max },
            Self::UndeclaredType { event, event_type } => Rejected::UndeclaredType { event: change(event), event_type },
            Self::Keys(e, fault) => Rejected::Keys(change(e), fault),
        }
    }

    /// Returns the reason without the event.
    pub fn reason(&self) -> RejectedReason {
        match self {
            Self::Full(_) => RejectedReason::Full,
            Self::StorageFull(_) => RejectedReason::StorageFull,
            Self::OnEngineThread(_) => RejectedReason::OnEngineThread,
            Self::Closed(_) => RejectedReason::Closed,
            Self::ShardFailed(_, failure) => RejectedReason::ShardFailed(failure.clone()),
            Self::TooLarge { bytes_max, .. } => RejectedReason::TooLarge { bytes_max: *bytes_max },
            Self::UndeclaredType { event_type, .. } => RejectedReason::UndeclaredType { event_type: *event_type },
            Self::Keys(_, fault) => RejectedReason::Keys(fault.clone()),
        }
    }
}

// Not derived, because an event need not be `Debug`.
impl<E> std::fmt::Debug for Rejected<E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Rejected({:?})", self.reason())
    }
}

/// The reason of a [`Rejected`], without the event.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum RejectedReason {
    /// The lane is full.
    #[error("the lane is full")]
    Full,
    /// The lane is full because the shard waits for its storage.
    #[error("the lane is full: the shard waits for storage (space, quota, descriptors or memory)")]
    StorageFull,
    /// The call would wait for its own thread. Nothing was sent.
    #[error("the call would wait for its own thread: make it on another thread")]
    OnEngineThread,
    /// The engine is closed, or is shutting down.
    #[error("the engine is closed")]
    Closed,
    /// The key's shard failed.
    #[error(transparent)]
    ShardFailed(ShardFailure),
    /// The archive would be larger than `event_bytes_max`.
    #[error("the event is larger than {bytes_max} bytes")]
    TooLarge {
        /// The configured limit in bytes.
        bytes_max: usize,
    },
    /// The event's `event_type()` is not in its `TYPES`.
    #[error("the event has type {event_type}, which its TYPES do not declare")]
    UndeclaredType {
        /// The type that `event_type()` returned.
        event_type: EventTypeId,
    },
    /// The keys of a command for several keys are invalid. Nothing was sent.
    #[error(transparent)]
    Keys(KeysError),
}

impl RejectedReason {
    /// Returns the rejection of `event` for this reason.
    pub(crate) fn of<E>(self, event: E) -> Rejected<E> {
        match self {
            Self::Full => Rejected::Full(event),
            Self::StorageFull => Rejected::StorageFull(event),
            Self::OnEngineThread => Rejected::OnEngineThread(event),
            Self::Closed => Rejected::Closed(event),
            Self::ShardFailed(failure) => Rejected::ShardFailed(event, failure),
            Self::TooLarge { bytes_max } => Rejected::TooLarge { event, bytes_max },
            Self::UndeclaredType { event_type } => Rejected::UndeclaredType { event, event_type },
            Self::Keys(fault) => Rejected::Keys(event, fault),
        }
    }
}
