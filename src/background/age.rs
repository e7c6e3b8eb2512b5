//! The age of a segment, measured by clocks that may be wrong. Time is an argument.
//!
//! A segment's records are at least as old as the next segment's header, and headers carry wall times. A header's time
//! is believed unless it is below a floor, above now, or before the time of an earlier segment. "Now" is the wall time,
//! limited by the monotonic clock. If the next segment's header cannot be believed, the first later header that can be
//! believed replaces it; the age is then also at least the monotonic time since this process first saw the next
//! segment.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::step::Now;
use crate::event::Time;

/// 2020-01-01: no store is older. A clock that was never set shows an earlier time.
const EARLIEST: u64 = 1_577_836_800_000_000_000;

/// The two times known of a segment.
#[derive(Debug, Clone, Copy)]
struct Seen {
    /// The time in its header.
    created: Time,
    /// The time at which this process first saw it.
    at: Instant,
}

/// The ages of one shard's segments.
#[derive(Debug, Default)]
pub(crate) struct Ages {
    began: Option<Now>,
    seen: BTreeMap<u64, Seen>,
    /// The latest time of a segment that was freed for its age: later segments are not older.
    freed: u64,
    has_warned: bool,
}

impl Ages {
    /// Returns `true` if the newest record of segment `oldest` is older than `max`. `begun` returns the time at which a
    /// segment was begun, if the log still holds the segment.
    pub(crate) fn is_over(
        &mut self,
        oldest: u64,
        max: Duration,
        now: Now,
        begun: impl Fn(u64) -> Option<Time>,
    ) -> bool {
        self.update(oldest, now, begun);
        let believed = self.believed_now(now);
        let Some(next) = self.seen.get(&(oldest + 1)).copied() else { return false };
        let before = self.freed.max(self.own_time(oldest, believed));
        let is_believed = |created: Time| (before..=believed).contains(&created.0);
        let is_old = |created: Time| Duration::from_nanos(believed - created.0) > max;
        if is_believed(next.created) {
            return is_old(next.created);
        }
        if !std::mem::replace(&mut self.has_warned, true) {
            tracing::warn!(
                segment = oldest + 1,
                created_ms = next.created.as_ms(),
                now_ms = now.wall.as_ms(),
                "the time in a segment's header cannot be right, or the clock is wrong now; the segment's age is taken \
                 from later segments and from the time since this process first saw it"
            );
        }
        let later = self.seen.range(oldest + 2..).map(|(_, seen)| seen.created).find(|created| is_believed(*created));
        later.is_some_and(is_old) || now.monotonic.saturating_duration_since(next.at) > max
    }

    /// The time at which a segment was begun, or the floor if that time cannot be believed. No later segment is older.
    fn own_time(&self, index: u64, believed: u64) -> u64 {
        let created = self.seen.get(&index).map(|seen| seen.created.0);
        created.filter(|created| (EARLIEST..=believed).contains(created)).unwrap_or(EARLIEST)
    }

    /// Notes that segment `oldest` was freed, after [`Ages::is_over`] returned `true` for it.
    pub(crate) fn freed(&mut self, oldest: u64, now: Now) {
        self.freed = self.freed.max(self.own_time(oldest, self.believed_now(now)));
    }

    /// Adds segments begun since the last call, and forgets freed ones.
    fn update(&mut self, oldest: u64, now: Now, begun: impl Fn(u64) -> Option<Time>) {
        self.began.get_or_insert(now);
        self.seen = self.seen.split_off(&oldest);
        let mut index = self.seen.last_key_value().map_or(oldest, |(last, _)| last + 1);
        while let Some(created) = begun(index) {
            self.seen.insert(index, Seen { created, at: now.monotonic });
            index += 1;
        }
    }

    /// The wall time, limited by the monotonic clock: since `began` it may have run at most twice as fast. (The
    /// monotonic clock stops while the machine sleeps.)
    fn believed_now(&self, now: Now) -> u64 {
        let Some(began) = self.began else { return now.wall.0 };
        let passed = now.monotonic.saturating_duration_since(began.monotonic).as_nanos();
        let passed = u64::try_from(passed).unwrap_or(u64::MAX);
        now.wall.0.min(began.wall.0.saturating_add(passed.saturating_mul(2)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: u64 = 86_400;
    const WEEK: Duration = Duration::from_secs(7 * DAY);
    /// 2026-11-01, in seconds.
    const NOVEMBER: u64 = 1_793_491_200;
    const YEAR_2090: u64 = 3_786_912_000;

    fn time(seconds: u64) -> Time {
        Time::unix_ms(seconds * 1000)
    }

    /// A shard's segments, by the times in their headers, in seconds; the oldest has number 3.
    struct Log {
        begun: Vec<u64>,
        freed: usize,
        ages: Ages,
        /// Second 0 of the monotonic clock.
        start: Instant,
    }

    const FIRST: u64 = 3;

    impl Log {
        fn new(begun: &[u64]) -> Self {
            Self { begun: begun.to_vec(), freed: 0, ages: Ages::default(), start: Instant::now() }
        }

        /// Frees segments over a week old, as retention does. Returns the number of segments freed since the beginning.
        fn retain(&mut self, wall: u64, monotonic: u64) -> usize {
            let now = Now { wall: time(wall), monotonic: self.start + Duration::from_secs(monotonic) };
            while self.freed + 1 < self.begun.len() {
                let oldest = FIRST + self.freed as u64;
                let begun = |index| self.begun.get((index - FIRST) as usize).map(|begun| time(*begun));
                if !self.ages.is_over(oldest, WEEK, now, begun) {
                    break;
                }
                self.ages.freed(oldest, now);
                self.freed += 1;
            }
            self.freed
        }

        fn restart(&mut self) {
            self.ages = Ages::default();
        }
    }

    /// Days of November 2026.
    fn days(days: &[u64]) -> Vec<u64> {
        days.iter().map(|day| NOVEMBER + (day - 1) * DAY).collect()
    }

    fn day(day: u64) -> u64 {
        days(&[day])[0]
    }

    #[test]
    fn with_right_clocks_a_segment_is_freed_when_the_next_one_is_old_enough() {
        let mut log = Log::new(&days(&[1, 2, 3, 4]));
        assert_eq!(log.retain(day(9), 0), 0, "its newest record is of the 2nd");
        assert_eq!(log.retain(day(9) + 1, 1), 1);
        assert_eq!(log.retain(day(10) + 1, DAY + 1), 2);
        assert_eq!(log.retain(day(30), 21 * DAY), 3, "the last stays");
    }

    #[test]
    fn segments_begun_in_the_future_are_freed_with_later_ones_that_were_not() {
        let mut log = Log::new(&[vec![YEAR_2090; 10], days(&[20, 21])].concat());
        for (at, freed) in [(20, 0), (26, 0), (27, 10), (28, 11)] {
            log.restart();
            assert_eq!(log.retain(day(at) + 1, 5), freed, "on the {at}th, after a restart");
        }
    }

    #[test]
    fn without_a_later_segment_to_tell_the_time_the_process_measures_it() {
        for wrong in [YEAR_2090, 0, 1_000_000] {
            let mut log = Log::new(&[wrong; 4]);
            assert_eq!(log.retain(day(20), 100), 0);
            assert!(log.ages.has_warned);
            assert_eq!(log.retain(day(27), 100 + 7 * DAY), 0);
            assert_eq!(log.retain(day(27) + 1, 101 + 7 * DAY), 3);
        }
    }

    #[test]
    fn a_clock_that_reads_the_past_for_a_while_frees_nothing_early() {
        let a_month_back = NOVEMBER - 5 * DAY;
        for wrong in [0, a_month_back] {
            // Four segments of the 25th, whose headers carry another time.
            let begun = [days(&[23, 24]), vec![wrong; 4], days(&[26, 27])].concat();
            let mut log = Log::new(&begun);
            assert_eq!(log.retain(day(26), 0), 0, "{wrong}");
            assert_eq!(log.retain(wrong, 10), 0, "{wrong}: while the clock is wrong");
            log.restart();
            assert_eq!(log.retain(wrong, 0), 0, "{wrong}: opened while the clock is wrong");
            assert_eq!(log.retain(day(27), DAY), 0, "{wrong}: and then the clock is set right");
            log.restart();
            assert_eq!(log.retain(day(30), 0), 0, "{wrong}");
            assert_eq!(log.retain(day(31) + 1, DAY), 1, "{wrong}: the segment of the 23rd");
            assert_eq!(log.retain(day(32) + 1, 2 * DAY), 1, "{wrong}: the segments of the 25th count as of the 26th");
            assert_eq!(log.retain(day(33) + 1, 3 * DAY), 6, "{wrong}");
            assert_eq!(log.retain(day(34) + 1, 4 * DAY), 7, "{wrong}: in the end all");
        }
    }

    #[test]
    fn a_clock_that_jumps_ahead_frees_nothing() {
        let mut log = Log::new(&days(&[23, 24, 25]));
        assert_eq!(log.retain(day(26), 1000), 0);
        assert_eq!(log.retain(YEAR_2090, 1010), 0, "ten seconds later");
        assert_eq!(log.retain(day(26) + 20, 1020), 0);
        assert_eq!(log.retain(day(31) + 1, 1000 + 5 * DAY), 1);
        // If it jumps because it is set right, the monotonic clock measures the age.
        let mut log = Log::new(&days(&[23, 24, 25]));
        assert_eq!(log.retain(0, 0), 0);
        assert_eq!(log.retain(day(30), 10), 0);
        assert_eq!(log.retain(day(37) + 1, 7 * DAY + 1), 2);
    }
}
