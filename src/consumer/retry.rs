//! The delay before a failed attempt is repeated: pure functions of the number of failures and a random number.
//!
//! Independent of the cause of the failure and of the clock. The same policy, failures and seed give the same delays.

use std::time::Duration;

use crate::config::in_range;
use crate::config::whole_ms;
use crate::error::ConfigError;
use crate::event::Key;

/// The growth of the delay with each failure.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Growth {
    /// base
    Fixed,
    /// base × n
    Linear,
    /// base × factor ^ (n − 1)
    Exponential(f64),
}

/// Builds a [`RetryPolicy`]. Every constructor starts from the defaults: 5 attempts, base 100 ms, cap 30 s, jitter 0.5
/// to 1.5.
///
/// ```
/// # use corelane::consumer::Retry;
/// # use std::time::Duration;
/// let policy = Retry::exponential(2.0).attempts(3).base(Duration::from_millis(50)).validate()?;
/// assert_eq!(policy.attempts_max(), 3);
/// assert_eq!(policy.delay(1), Duration::from_millis(50));
/// assert_eq!(policy.delay(2), Duration::from_millis(100));
/// # Ok::<(), corelane::ConfigError>(())
/// ```
#[derive(Debug, Clone)]
pub struct Retry(RetryPolicy);

impl Retry {
    /// The same delay before every retry: base.
    #[must_use]
    pub fn fixed() -> Self {
        Self::growing(Growth::Fixed)
    }

    /// Base, 2 × base, 3 × base, …
    #[must_use]
    pub fn linear() -> Self {
        Self::growing(Growth::Linear)
    }

    /// Base, base × `factor`, base × `factor`², … `factor` must be in 1.0..=100.0. The default policy has 2.0.
    #[must_use]
    pub fn exponential(factor: f64) -> Self {
        Self::growing(Growth::Exponential(factor))
    }

    fn growing(growth: Growth) -> Self {
        Self(RetryPolicy { growth, ..RetryPolicy::default() })
    }

    /// The number of attempts including the first, at least 1. 1 means no retry. Default: 5.
    #[must_use]
    pub fn attempts(mut self, attempts: u32) -> Self {
        self.0.attempts_max = attempts;
        self
    }

    /// The first delay, 1 ms..=24 h. Default: 100 ms.
    #[must_use]
    pub fn base(mut self, base: Duration) -> Self {
        self.0.base = base;
        self
    }

    /// The longest delay, jitter included, from base up to 24 h. Default: 30 s.
    #[must_use]
    pub fn cap(mut self, cap: Duration) -> Self {
        self.0.cap = cap;
        self
    }

    /// The range of the random factor of every delay, so that events that failed together are not retried together:
    /// uniform in `low..=high`, 0.0 ≤ `low` ≤ `high` ≤ 10.0. `jitter(1.0, 1.0)` turns it off. Default: 0.5 to 1.5.
    #[must_use]
    pub fn jitter(mut self, low: f64, high: f64) -> Self {
        self.0.jitter = (low, high);
        self
    }

    /// Checks every value against its range.
    ///
    /// # Errors
    /// The first value that is out of range. Factors are given in thousandths.
    pub fn validate(self) -> Result<RetryPolicy, ConfigError> {
        const DAY_MS: u64 = 24 * 3_600_000;
        let RetryPolicy { growth, attempts_max, base, cap, jitter: (low, high) } = self.0;
        in_range("retry_attempts", u64::from(attempts_max), 1, u64::from(u32::MAX))?;
        in_range("retry_base_ms", whole_ms(base), 1, DAY_MS)?;
        in_range("retry_cap_ms", whole_ms(cap), whole_ms(base), DAY_MS)?;
        if let Growth::Exponential(factor) = growth {
            in_range("retry_factor_thousandths", thousandths(factor), 1000, 100_000)?;
        }
        in_range("retry_jitter_high_thousandths", thousandths(high), 0, 10_000)?;
        in_range("retry_jitter_low_thousandths", thousandths(low), 0, thousandths(high))?;
        Ok(self.0)
    }
}

/// Rounds up. Returns a value outside every range for a negative number or NaN.
fn thousandths(factor: f64) -> u64 {
    if factor >= 0.0 { (factor * 1000.0).ceil() as u64 } else { u64::MAX }
}

/// The rule for repeating a failed attempt, built by [`Retry`]. The default is exponential: 5 attempts, base 100 ms,
/// factor 2, cap 30 s, jitter 0.5 to 1.5.
#[derive(Debug, Clone, PartialEq)]
pub struct RetryPolicy {
    growth: Growth,
    attempts_max: u32,
    base: Duration,
    cap: Duration,
    jitter: (f64, f64),
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            growth: Growth::Exponential(2.0),
            attempts_max: 5,
            base: Duration::from_millis(100),
            cap: Duration::from_secs(30),
            jitter: (0.5, 1.5),
        }
    }
}

/// The consequence of a failed attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AfterFailure {
    /// Try again after this long.
    RetryIn(Duration),
    /// All attempts are used up.
    GiveUp,
}

impl RetryPolicy {
    /// Returns the consequence of the `failures`-th failure of an event (1 is the first). Draws once from `rng` if
    /// there is a retry.
    ///
    /// The delay is uniform in the part of the range delay × jitter that is below the cap. So no delay exceeds the cap,
    /// and delays near the cap still differ.
    ///
    /// # Panics
    /// If `failures` is 0.
    #[must_use]
    pub(crate) fn after(&self, failures: u32, rng: &mut JitterRng) -> AfterFailure {
        assert!(failures > 0, "the first failure is number 1");
        if failures >= self.attempts_max {
            return AfterFailure::GiveUp;
        }
        let delay_s = self.delay(failures).as_secs_f64();
        let cap_s = self.cap.as_secs_f64();
        let (low_s, high_s) = ((delay_s * self.jitter.0).min(cap_s), (delay_s * self.jitter.1).min(cap_s));
        let drawn_s = low_s + (high_s - low_s) * rng.next_fraction();
        AfterFailure::RetryIn(Duration::from_secs_f64(drawn_s).min(self.cap))
    }

    /// Returns the delay after the `failures`-th failure without jitter: at most the cap, and never shorter than the
    /// previous one.
    #[must_use]
    pub fn delay(&self, failures: u32) -> Duration {
        let failures = failures.max(1);
        let factor = match self.growth {
            Growth::Fixed => 1.0,
            Growth::Linear => f64::from(failures),
            // Multiplied in a loop, since powi may differ between platforms. The cap ends the loop after a few rounds.
            Growth::Exponential(factor) => {
                let enough = self.cap.as_secs_f64() / self.base.as_secs_f64();
                let (mut product, mut left) = (1.0, failures - 1);
                while left > 0 && product < enough && factor > 1.0 {
                    product *= factor;
                    left -= 1;
                }
                product
            }
        };
        // Compared as f64: a Duration overflows sooner.
        let delay_s = self.base.as_secs_f64() * factor;
        if delay_s >= self.cap.as_secs_f64() { self.cap } else { Duration::from_secs_f64(delay_s) }
    }

    /// Returns the number of attempts including the first.
    #[must_use]
    pub fn attempts_max(&self) -> u32 {
        self.attempts_max
    }
}

/// A small seeded random number generator (splitmix64) for jitter. Not for secrets.
#[derive(Debug, Clone)]
pub(crate) struct JitterRng(u64);

impl JitterRng {
    /// The same seed gives the same numbers on every platform and in every version.
    #[must_use]
    pub(crate) fn seeded(seed: u64) -> Self {
        Self(seed)
    }

    /// Returns the next number.
    pub(crate) fn next(&mut self) -> u64 {
        let next = Key(self.0).hash();
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        next
    }

    /// Returns a number in 0.0..1.0, uniformly.
    pub(super) fn next_fraction(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MS: Duration = Duration::from_millis(1);

    fn plain(retry: Retry) -> Vec<u128> {
        let policy = retry.jitter(1.0, 1.0).validate().expect("valid");
        let mut rng = JitterRng::seeded(1);
        (1..)
            .map_while(|failures| match policy.after(failures, &mut rng) {
                AfterFailure::RetryIn(delay) => Some(delay.as_millis()),
                AfterFailure::GiveUp => None,
            })
            .collect()
    }

    #[test]
    fn delays_grow_up_to_the_cap() {
        assert_eq!(plain(Retry::exponential(2.0)), [100, 200, 400, 800]);
        assert_eq!(plain(Retry::fixed().base(20 * MS).attempts(4)), [20, 20, 20]);
        assert_eq!(plain(Retry::linear().base(20 * MS).cap(50 * MS).attempts(6)), [20, 40, 50, 50, 50]);
        assert_eq!(plain(Retry::exponential(10.0).cap(5000 * MS).attempts(5)), [100, 1000, 5000, 5000]);
        assert_eq!(plain(Retry::fixed().attempts(1)), [0; 0], "one attempt is no retry");
    }

    #[test]
    fn the_defaults_are_the_documented_ones() {
        let policy = RetryPolicy::default();
        assert_eq!(policy, Retry::exponential(2.0).validate().expect("valid"));
        assert_eq!((policy.attempts_max, policy.base, policy.cap), (5, 100 * MS, 30_000 * MS));
        assert_eq!(policy.jitter, (0.5, 1.5));
    }

    #[test]
    fn a_policy_out_of_range_is_refused_by_name() {
        let bad = [
            (Retry::fixed().attempts(0), "retry_attempts"),
            (Retry::fixed().base(Duration::ZERO), "retry_base_ms"),
            (Retry::fixed().base(Duration::MAX), "retry_base_ms"),
            (Retry::fixed().cap(99 * MS), "retry_cap_ms"),
            (Retry::fixed().cap(Duration::MAX), "retry_cap_ms"),
            (Retry::exponential(0.5), "retry_factor_thousandths"),
            (Retry::exponential(f64::NAN), "retry_factor_thousandths"),
            (Retry::exponential(f64::INFINITY), "retry_factor_thousandths"),
            (Retry::fixed().jitter(1.0, f64::NAN), "retry_jitter_high_thousandths"),
            (Retry::fixed().jitter(-0.1, 1.0), "retry_jitter_low_thousandths"),
            (Retry::fixed().jitter(1.5, 1.0), "retry_jitter_low_thousandths"),
        ];
        for (retry, expected) in bad {
            match retry.clone().validate() {
                Err(ConfigError::OutOfRange { name, .. }) => assert_eq!(name, expected),
                other => panic!("{retry:?} gave {other:?}"),
            }
        }
    }

    #[test]
    fn delays_at_the_cap_stay_spread() {
        let policy = Retry::exponential(2.0).attempts(u32::MAX).validate().expect("valid");
        let mut rng = JitterRng::seeded(3);
        let mut delays: Vec<u64> = (0..1000)
            .map(|_| match policy.after(1000, &mut rng) {
                AfterFailure::RetryIn(delay) => whole_ms(delay),
                AfterFailure::GiveUp => panic!("attempts are left"),
            })
            .collect();
        delays.sort_unstable();
        assert!(delays[0] >= 15_000 && delays[999] <= 30_000);
        assert!(delays[100] < 17_000 && delays[900] > 28_000, "evenly from half the cap to the cap");
    }

    #[test]
    fn a_seed_always_gives_the_same_numbers() {
        let mut rng = JitterRng::seeded(0);
        assert_eq!([rng.next(), rng.next()], [0xe220_a839_7b1d_cdaf, 0x6e78_9e6a_a1b9_65f4]);
    }

    proptest! {
        #[test]
        fn no_delay_leaves_its_bounds(
            factor in 1.0..100.0_f64, base in 1..86_400_000_u64, more in 0..86_400_000_u64,
            low in 0.0..10.0_f64, wider in 0.0..10.0_f64, failures in 1..u32::MAX, seed: u64,
        ) {
            let high = (low + wider).min(10.0);
            let cap = (base + more).min(86_400_000);
            for retry in [Retry::fixed(), Retry::linear(), Retry::exponential(factor)] {
                let policy = retry
                    .attempts(u32::MAX).base(MS * base as u32).cap(MS * cap as u32).jitter(low, high)
                    .validate().expect("valid");
                let delay = policy.delay(failures);
                prop_assert!(delay >= policy.base && delay <= policy.cap);
                prop_assert!(policy.delay(failures - 1) <= delay);
                let drawn = policy.after(failures, &mut JitterRng::seeded(seed));
                prop_assert_eq!(drawn, policy.after(failures, &mut JitterRng::seeded(seed)));
                let AfterFailure::RetryIn(drawn) = drawn else { panic!("attempts are left") };
                // Rounding errors of f64 at a delay of a day.
                let slack = Duration::from_nanos(100);
                prop_assert!(drawn <= policy.cap && drawn <= delay.mul_f64(high) + slack);
                prop_assert!(drawn + slack >= delay.mul_f64(low).min(policy.cap));
            }
        }
    }
}
