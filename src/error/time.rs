//! Errors of converting times.

/// The reason why a text or a system time is not a [`crate::Time`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TimeError {
    /// The text is not an RFC 3339 time, or names a time that does not exist (30 February, second 60).
    #[error("{text:?} is not an RFC 3339 time such as 2026-11-30T07:40:51.123Z: {why}")]
    Malformed {
        /// The text, cut to 64 characters.
        text: String,
        /// The first fault.
        why: String,
    },
    /// The time is before 1970, or after 2554-07-21T23:34:33.709551615Z, where 64 bits of nanoseconds end.
    #[error("the time is before 1970 or after the year 2554")]
    OutOfRange,
}
