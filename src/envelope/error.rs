//! Why a line of JSON is not an event.

/// Latest timestamp in ms that a [`Time`] can hold (in the year 2554).
pub(super) const TIMESTAMP_MS_MAX: u64 = u64::MAX / 1_000_000;

/// Why a line of JSON is not an event.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum JsonError {
    /// The text is not JSON.
    #[error("not JSON: {why}")]
    NotJson {
        /// What the parser said, with line and column.
        why: String,
    },
    /// The text is JSON, but no object.
    #[error("an event is a JSON object")]
    NotAnObject,
    /// A field that every event has is not there.
    #[error("the field {field} is missing")]
    MissingField {
        /// Its name.
        field: &'static str,
    },
    /// A field stands there twice.
    #[error("the field {field} stands there twice")]
    DuplicateField {
        /// Its name.
        field: &'static str,
    },
    /// A field has a value of another type.
    #[error("the field {field} is not {expected}")]
    WrongType {
        /// Its name.
        field: &'static str,
        /// What it should be.
        expected: &'static str,
    },
    /// The timestamp is no whole number of milliseconds from 1970 up to the year 2554.
    #[error("the timestamp {found} is not a whole number of milliseconds in 0..={TIMESTAMP_MS_MAX}")]
    Timestamp {
        /// What stands there.
        found: String,
    },
    /// A field at the top level that no event has.
    #[error("unknown field {field:?}")]
    UnknownField {
        /// Its name.
        field: String,
    },
    /// The event type and its payload do not fit the Rust type asked for.
    #[error("event_type and payload do not fit: {why}")]
    Payload {
        /// What the deserialiser said.
        why: String,
    },
}

pub(super) fn not_json(error: &serde_json::Error) -> JsonError {
    JsonError::NotJson { why: error.to_string() }
}

pub(super) fn without_place(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let place = format!(" at line {} column {}", error.line(), error.column());
    text.strip_suffix(&place).map_or(text.clone(), str::to_owned)
}
