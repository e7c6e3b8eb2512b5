//! Pauses and halts: while one lasts, a consumer does not call its handler.

use std::sync::Arc;

use crate::consumer::outcome::HaltCause;

/// The reasons why a consumer calls no handler: a pause, a halt, or both.
#[derive(Debug)]
pub(super) struct Suspension {
    consumer: Arc<str>,
    is_paused: bool,
    halted: Option<HaltCause>,
}

impl Suspension {
    pub(super) fn none(consumer: &Arc<str>) -> Self {
        Self { consumer: Arc::clone(consumer), is_paused: false, halted: None }
    }

    /// Halts the consumer. The first cause stays.
    pub(super) fn halt(&mut self, cause: HaltCause) {
        tracing::error!(consumer = &*self.consumer, ?cause, "a consumer halts until it is resumed");
        self.halted.get_or_insert(cause);
    }

    pub(super) fn halted(&self) -> Option<&HaltCause> {
        self.halted.as_ref()
    }

    pub(super) fn is_halted(&self) -> bool {
        self.halted.is_some()
    }

    /// Returns `true` if the consumer halted because there is no room for more dead letters.
    pub(super) fn is_full(&self) -> bool {
        self.halted == Some(HaltCause::DeadLettersFull)
    }

    pub(super) fn is_paused(&self) -> bool {
        self.is_paused
    }

    pub(super) fn is_active(&self) -> bool {
        self.is_paused || self.is_halted()
    }

    /// Pauses the consumer. Returns `true` if it was paused before.
    pub(super) fn pause(&mut self) -> bool {
        std::mem::replace(&mut self.is_paused, true)
    }

    pub(super) fn end(&mut self) {
        (self.is_paused, self.halted) = (false, None);
    }
}
