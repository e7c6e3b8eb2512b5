//! The clock that stamps events and measures latencies. Only this file reads wall time. (Deadlines are `Instant`s,
//! which the waiting code reads itself.)
//!
//! Latencies are monotonic nanoseconds from the time-stamp counter. Records hold wall time: the same reading plus an
//! offset that a shard renews once per batch. So a jump of the wall clock never distorts a latency.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::event::Time;

/// Monotonic nanoseconds since the clock was created. Comparable between threads of one engine.
pub(crate) type Nanos = u64;

/// The time from an event's due time to its publish time, in 32 bits: below 2³¹ in ns, above that in units of 2²⁰ ns
/// (1.05 ms), rounded up. The error is at most 0.05 %, and the range ends at 26 days. The encoding keeps the order: a
/// longer time is a greater number.
pub(crate) type Lateness = u32;

/// The lateness of an event without a due time.
pub(crate) const NOT_DUE: Lateness = u32::MAX;
const COARSE: Lateness = 1 << 31;
const COARSE_BITS: u32 = 20;

pub(crate) fn lateness(late: Duration) -> Lateness {
    let ns = late.as_nanos();
    if ns < u128::from(COARSE) {
        return ns as Lateness;
    }
    let units = ns.div_ceil(1 << COARSE_BITS).min(u128::from(NOT_DUE - 1 - COARSE));
    COARSE + units as Lateness
}

pub(crate) fn lateness_ns(lateness: Lateness) -> Nanos {
    match lateness.checked_sub(COARSE) {
        None => Nanos::from(lateness),
        Some(units) => Nanos::from(units) << COARSE_BITS,
    }
}

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

    /// Returns monotonic nanoseconds, never 0, so 0 can mean "not stamped".
    #[inline]
    pub(crate) fn now(&self) -> Nanos {
        self.inner.delta_as_nanos(self.start, self.inner.raw()).max(1)
    }

    /// Returns the current difference between wall time and monotonic time.
    #[inline]
    pub(crate) fn wall_offset(&self) -> u64 {
        wall_now().0.wrapping_sub(self.now())
    }
}

/// Returns the current wall time.
pub(crate) fn wall_now() -> Time {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Time(u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
}

/// Returns the wall time that belongs to a publish time.
#[inline]
pub(crate) fn wall_time(published: Nanos, wall_offset: u64) -> Time {
    Time(published.wrapping_add(wall_offset))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lateness_is_never_understated_and_ends_at_26_days() {
        let stored = |late: Duration| Duration::from_nanos(lateness_ns(lateness(late)));
        for ns in [0, 1, 999, 1_000_000_000, (1 << 31) - 1] {
            assert_eq!(stored(Duration::from_nanos(ns)), Duration::from_nanos(ns), "exact");
        }
        let mut before = 0;
        for exponent in 31..50 {
            for ns in [1_u64 << exponent, (1 << exponent) + 1, (1 << exponent) + 12_345_678, (1 << (exponent + 1)) - 1]
            {
                let late = Duration::from_nanos(ns);
                assert!(
                    stored(late) >= late && stored(late) - late <= late / 2000,
                    "{late:?} is stored as {:?}",
                    stored(late)
                );
                assert!(lateness(late) >= before && lateness(late) < NOT_DUE);
                before = lateness(late);
            }
        }
        let days = |days: u64| Duration::from_secs(days * 86_400);
        assert!(stored(days(26)) >= days(26));
        assert!(stored(Duration::MAX) > days(26) && lateness(Duration::MAX) < NOT_DUE, "the end of the range");
    }
}
