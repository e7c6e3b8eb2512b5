//! The only reader of wall time, and of the time by which events are stamped and latencies measured. (Deadlines of
//! waits are `Instant`s, read where somebody waits.)
//!
//! Latencies are monotonic nanoseconds from the time-stamp counter; what is written into records
//! is wall time, derived from the same reading through an offset that a shard renews every batch,
//! so a leap of the wall clock never bends a latency.

use std::time::{SystemTime, UNIX_EPOCH};

use crate::event::Time;

/// Monotonic nanoseconds since the clock was made. Comparable between threads of one engine.
pub(crate) type Nanos = u64;

/// A cheap clock: `now` takes about 10 ns.
#[derive(Debug, Clone)]
pub(crate) struct Clock {
    inner: quanta::Clock,
    start: u64,
}

impl Clock {
    pub(crate) fn new() -> Self {
        let inner = quanta::Clock::new();
        let start = inner.raw();
        Self { inner, start }
    }

    /// Monotonic nanoseconds; never 0, so 0 can mean "not stamped".
    #[inline]
    pub(crate) fn now(&self) -> Nanos {
        self.inner.delta_as_nanos(self.start, self.inner.raw()).max(1)
    }

    /// Wall time minus monotonic time, now.
    #[inline]
    pub(crate) fn wall_offset(&self) -> u64 {
        wall_now().0.wrapping_sub(self.now())
    }
}

/// Wall time, now.
pub(crate) fn wall_now() -> Time {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Time(u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
}
