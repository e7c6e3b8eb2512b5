//! The time limit of a wait.

use std::time::{Duration, Instant};

/// The time limit of a wait: a moment, or no limit.
///
/// Every waiting call takes `impl Into<Deadline>`: a [`Duration`] from now, an [`Instant`], or [`Deadline::NEVER`].
///
/// ```
/// # use corelane::Deadline;
/// # use std::time::{Duration, Instant};
/// let soon = Deadline::after(Duration::from_secs(5));
/// assert!(soon.instant().is_some_and(|at| at > Instant::now()));
/// assert_eq!(Deadline::NEVER.instant(), None);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deadline(Option<Instant>);

impl Deadline {
    /// No limit: the call waits until it has its result.
    pub const NEVER: Self = Self(None);

    /// Creates a deadline `limit` from now. A limit beyond the range of [`Instant`] becomes [`Deadline::NEVER`].
    #[must_use]
    pub fn after(limit: Duration) -> Self {
        Self(Instant::now().checked_add(limit))
    }

    /// Creates a deadline at `instant`.
    #[must_use]
    pub fn at(instant: Instant) -> Self {
        Self(Some(instant))
    }

    /// Returns the moment, or `None` for [`Deadline::NEVER`].
    #[must_use]
    pub fn instant(self) -> Option<Instant> {
        self.0
    }
}

impl From<Duration> for Deadline {
    fn from(limit: Duration) -> Self {
        Self::after(limit)
    }
}

impl From<Instant> for Deadline {
    fn from(instant: Instant) -> Self {
        Self::at(instant)
    }
}

impl From<Option<Instant>> for Deadline {
    fn from(instant: Option<Instant>) -> Self {
        Self(instant)
    }
}
