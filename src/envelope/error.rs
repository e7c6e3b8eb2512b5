//! The reasons why a line of JSON is not an event.

/// The latest timestamp in ms that a [`crate::event::Time`] can hold, in the year 2554.
pub(super) const TIMESTAMP_MS_MAX: u64 = u64::MAX / 1_000_000;

/// The reason why a line of JSON is not an event.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum JsonError {
    /// The text is not JSON.
    #[error("not JSON: {why}")]
    NotJson {
        /// The parser's message, with line and column.
        why: String,
    },
    /// The text is JSON, but not an object.
    #[error("an event is a JSON object")]
    NotAnObject,
    /// A required field is missing.
    #[error("the field {field} is missing")]
    MissingField {
        /// The name of the field.
        field: &'static str,
    },
    /// A field occurs twice.
    #[error("the field {field} occurs twice")]
    DuplicateField {
        /// The name of the field.
        field: &'static str,
    },
    /// A field has a value of the wrong type.
    #[error("the field {field} is not {expected}")]
    WrongType {
        /// The name of the field.
        field: &'static str,
        /// The expected type.
        expected: &'static str,
    },
    /// The timestamp is not a whole number of milliseconds between 1970 and the year 2554.
    #[error("the timestamp {found} is not a whole number of milliseconds in 0..={TIMESTAMP_MS_MAX}")]
    Timestamp {
        /// The value in the line.
        found: String,
    },
    /// The top level has an unknown field.
    #[error("unknown field {field:?}")]
    UnknownField {
        /// The name of the field.
        field: String,
    },
    /// The event type and the payload do not match the Rust type.
    #[error("event_type and payload do not match the Rust type: {why}")]
    Payload {
        /// The deserialiser's message.
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
