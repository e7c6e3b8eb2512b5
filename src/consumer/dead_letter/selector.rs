//! The selection of dead letters for a call.

use crate::event::Key;

/// Selects dead letters of a consumer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum LetterSelector {
    /// All dead letters.
    All,
    /// The dead letters of one key.
    Of(Key),
}
