//! The health of one service: failure detector and circuit breaker in one.
//!
//! One writer: the owner. Bounded memory: 60 counters in a sliding window, whatever the rate of calls. It calls nothing
//! and waits for nothing: the caller asks [`Health::admit`] before each call and reports the outcome.
//!
//! ```text
//!             5 failures in a row, or > 10 % of the window
//!   Healthy ─────────────────────────────────────────────▶ Unhealthy: no calls until `probe_at`
//!      ▲                                                      │   ▲
//!      │ 3 probes in a row succeeded                one probe │   │ it failed or was not reported:
//!      └────────────────────────────────────────── Probing ◀──┘───┘ the pause doubles, up to the cap
//! ```

use std::time::Duration;

use crate::config::in_range;
use crate::config::setters;
use crate::config::whole_ms;
use crate::error::ConfigError;

pub(super) mod report;
mod window;

use report::{HealthReport, HealthStatus, UnhealthyCause};
use window::{PARTS, Window};

const HOUR_MS: u64 = 3_600_000;

/// The rules by which a service counts as unhealthy, and by which it is then probed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HealthPolicy {
    consecutive_max: u32,
    failure_percent_max: u32,
    window: Duration,
    samples_min: u32,
    pause: Duration,
    pause_max: Duration,
    probe_wait_max: Duration,
    probes: u32,
}

impl Default for HealthPolicy {
    fn default() -> Self {
        Self {
            consecutive_max: 5,
            failure_percent_max: 10,
            window: Duration::from_secs(60),
            samples_min: 100,
            pause: Duration::from_secs(1),
            pause_max: Duration::from_secs(30),
            probe_wait_max: Duration::from_secs(30),
            probes: 3,
        }
    }
}

impl HealthPolicy {
    setters! {
        /// Failures in a row that make the service unhealthy, 1..=1,000,000. Default: 5.
        consecutive_max: u32,
        /// The share of failures in the window above which the service is unhealthy, 0..=100 percent. 100 turns the
        /// rule off. Default: 10.
        failure_percent_max: u32,
        /// The length of the window, 60 ms..=1 h. It moves in 60 steps, so it covers between 59 and 60 sixtieths of
        /// this. Default: 60 s.
        window: Duration,
        /// Outcomes in the window below which the share of failures is ignored, 1..=1,000,000. Default: 100.
        samples_min: u32,
        /// The pause from becoming unhealthy to the first probe, 1 ms..=1 h; doubled after every failed probe. Default:
        /// 1 s.
        pause: Duration,
        /// The longest pause, from `pause` up to 1 h. Default: 30 s.
        pause_max: Duration,
        /// The time after which an unreported probe counts as failed, 1 ms..=1 h. Default: 30 s.
        probe_wait_max: Duration,
        /// Successful probes in a row, one at a time, that make the service healthy again, 1..=1000. Default: 3.
        probes: u32,
    }

    fn check(&self) -> Result<(), ConfigError> {
        in_range("health_consecutive_max", self.consecutive_max.into(), 1, 1_000_000)?;
        in_range("health_failure_percent_max", self.failure_percent_max.into(), 0, 100)?;
        in_range("health_window_ms", whole_ms(self.window), PARTS as u64, HOUR_MS)?;
        in_range("health_samples_min", self.samples_min.into(), 1, 1_000_000)?;
        in_range("health_pause_ms", whole_ms(self.pause), 1, HOUR_MS)?;
        in_range("health_pause_max_ms", whole_ms(self.pause_max), whole_ms(self.pause), HOUR_MS)?;
        in_range("health_probe_wait_max_ms", whole_ms(self.probe_wait_max), 1, HOUR_MS)?;
        in_range("health_probes", self.probes.into(), 1, 1000)
    }
}

/// Permission for one call. Its outcome goes to [`Health::succeeded`], [`Health::failed`] or [`Health::inconclusive`].
#[derive(Debug)]
#[must_use = "the outcome of the call is to be reported"]
pub(crate) struct CallPermit {
    epoch: u64,
    is_probe: bool,
}

impl CallPermit {
    /// Returns `true` if the call probes an unhealthy service.
    #[must_use]
    pub(crate) fn is_probe(&self) -> bool {
        self.is_probe
    }
}

/// The answer of [`Health::admit`].
#[derive(Debug)]
#[must_use]
pub(crate) enum Admission {
    /// Call the service.
    Go(CallPermit),
    /// Do not call. Ask again at this time, or after an outcome was reported.
    Wait {
        /// On the clock of `now`.
        until: Duration,
    },
}

/// A change of health that a reported outcome caused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use = "a change of health is to be reported"]
pub(crate) enum HealthChange {
    /// From now on only probes are admitted.
    BecameUnhealthy {
        /// Why.
        cause: UnhealthyCause,
        /// The time of the first probe.
        probe_at: Duration,
    },
    /// A probe failed.
    ProbeFailed {
        /// The time of the next probe.
        probe_at: Duration,
    },
    /// Enough probes succeeded. Every call is admitted again.
    Recovered {
        /// The time for which the service was unhealthy.
        after: Duration,
    },
}

impl HealthChange {
    /// Logs a change, if there was one.
    pub(super) fn log(change: Option<Self>, consumer: &str) {
        match change {
            Some(Self::BecameUnhealthy { cause, .. }) => {
                tracing::warn!(consumer, ?cause, "a service is unhealthy: only probes are sent to it");
            }
            Some(Self::Recovered { after }) => tracing::info!(consumer, ?after, "a service has recovered"),
            Some(Self::ProbeFailed { .. }) | None => {}
        }
    }
}

/// The health of one service.
#[derive(Debug)]
pub(crate) struct Health {
    service: String,
    policy: HealthPolicy,
    status: HealthStatus,
    /// The time when it became healthy or unhealthy.
    since: Duration,
    now: Duration,
    /// Permits of older epochs change nothing. Every probe has its own epoch.
    epoch: u64,
    consecutive: u32,
    cause: Option<UnhealthyCause>,
    pause: Duration,
    probes_succeeded: u32,
    window: Window,
    totals: Totals,
}

#[derive(Debug, Default, Clone, Copy)]
struct Totals {
    succeeded: u64,
    failed: u64,
    held_back: u64,
    outages: u64,
}

impl Health {
    /// Returns a healthy service. `service` is its name in reports.
    ///
    /// # Errors
    /// The first value of the policy that is out of range.
    pub(crate) fn new(service: &str, policy: HealthPolicy) -> Result<Self, ConfigError> {
        policy.check()?;
        Ok(Self {
            service: service.to_owned(),
            status: HealthStatus::Healthy,
            since: Duration::ZERO,
            now: Duration::ZERO,
            epoch: 0,
            consecutive: 0,
            cause: None,
            pause: policy.pause,
            probes_succeeded: 0,
            window: Window::new(policy.window),
            totals: Totals::default(),
            policy,
        })
    }

    /// Asks for permission to call the service. If `now` is earlier than before, the time counts as unchanged.
    #[inline]
    pub(crate) fn admit(&mut self, now: Duration) -> Admission {
        self.now = self.now.max(now);
        match self.status {
            HealthStatus::Healthy => return Admission::Go(CallPermit { epoch: self.epoch, is_probe: false }),
            HealthStatus::Probing { give_up_at } if give_up_at <= self.now => {
                self.epoch += 1;
                self.totals.failed += 1;
                self.pause_longer(give_up_at);
            }
            _ => {}
        }
        match self.status {
            HealthStatus::Unhealthy { probe_at } if probe_at <= self.now => {
                self.epoch += 1;
                self.status = HealthStatus::Probing { give_up_at: self.now + self.policy.probe_wait_max };
                Admission::Go(CallPermit { epoch: self.epoch, is_probe: true })
            }
            HealthStatus::Unhealthy { probe_at: until } | HealthStatus::Probing { give_up_at: until } => {
                self.totals.held_back += 1;
                Admission::Wait { until }
            }
            HealthStatus::Healthy => Admission::Go(CallPermit { epoch: self.epoch, is_probe: false }),
        }
    }

    /// Reports a call that succeeded. A call admitted before the last change of health is counted and changes nothing.
    pub(crate) fn succeeded(&mut self, permit: CallPermit, now: Duration) -> Option<HealthChange> {
        self.now = self.now.max(now);
        self.totals.succeeded += 1;
        if permit.epoch != self.epoch {
            return None;
        }
        if !permit.is_probe {
            self.consecutive = 0;
            self.window.add(self.now, true);
            return self.judge();
        }
        self.epoch += 1;
        self.probes_succeeded += 1;
        if self.probes_succeeded < self.policy.probes {
            self.status = HealthStatus::Unhealthy { probe_at: self.now };
            return None;
        }
        let after = self.now.saturating_sub(self.since);
        self.status = HealthStatus::Healthy;
        self.since = self.now;
        self.consecutive = 0;
        self.window.clear();
        Some(HealthChange::Recovered { after })
    }

    /// Reports calls that succeeded since [`Health::is_healthy`] returned `true`. Has the same effect as one call of
    /// [`Health::succeeded`] for each.
    pub(crate) fn succeeded_while_healthy(&mut self, calls: u64, now: Duration) {
        if calls == 0 {
            return;
        }
        self.now = self.now.max(now);
        self.totals.succeeded += calls;
        if self.is_healthy() {
            self.consecutive = 0;
            self.window.add_successes(self.now, calls);
        }
    }

    /// Returns `true` if every call is admitted.
    #[must_use]
    pub(crate) fn is_healthy(&self) -> bool {
        self.status == HealthStatus::Healthy
    }

    /// Reports a call that failed. A call admitted before the last change of health is counted and changes nothing.
    pub(crate) fn failed(&mut self, permit: CallPermit, now: Duration) -> Option<HealthChange> {
        self.now = self.now.max(now);
        self.totals.failed += 1;
        if permit.epoch != self.epoch {
            return None;
        }
        if !permit.is_probe {
            self.consecutive += 1;
            self.window.add(self.now, false);
            return self.judge();
        }
        self.epoch += 1;
        Some(HealthChange::ProbeFailed { probe_at: self.pause_longer(self.now) })
    }

    /// Reports a failed call that is no evidence against the service: its event had failed before, and other calls have
    /// succeeded since. If it was a probe, the next one follows after the same pause.
    pub(crate) fn inconclusive(&mut self, permit: CallPermit, now: Duration) {
        self.now = self.now.max(now);
        self.totals.failed += 1;
        if permit.epoch == self.epoch && permit.is_probe {
            self.epoch += 1;
            self.status = HealthStatus::Unhealthy { probe_at: self.now + self.pause };
        }
    }

    /// Decides, after an outcome, whether a healthy service is still healthy.
    fn judge(&mut self) -> Option<HealthChange> {
        let (samples, failures) = (self.window.samples, self.window.failures);
        let is_share = samples >= u64::from(self.policy.samples_min)
            && failures * 100 > samples * u64::from(self.policy.failure_percent_max);
        let cause = if self.consecutive >= self.policy.consecutive_max {
            UnhealthyCause::Consecutive(self.consecutive)
        } else if is_share {
            UnhealthyCause::Share { failures, samples }
        } else {
            return None;
        };
        self.epoch += 1;
        self.totals.outages += 1;
        self.cause = Some(cause);
        self.since = self.now;
        self.pause = self.policy.pause;
        self.probes_succeeded = 0;
        let probe_at = self.now + self.pause;
        self.status = HealthStatus::Unhealthy { probe_at };
        Some(HealthChange::BecameUnhealthy { cause, probe_at })
    }

    fn pause_longer(&mut self, from: Duration) -> Duration {
        self.probes_succeeded = 0;
        self.pause = (self.pause * 2).min(self.policy.pause_max);
        let probe_at = from + self.pause;
        self.status = HealthStatus::Unhealthy { probe_at };
        probe_at
    }

    /// Returns the state. The next [`Health::admit`] gives up a probe that was not reported in time.
    #[must_use]
    pub(crate) fn status(&self) -> HealthStatus {
        self.status
    }

    /// Returns a report of the service at `now`.
    #[must_use]
    pub(crate) fn report(&self, now: Duration) -> HealthReport {
        let now = now.max(self.now);
        let mut window = self.window.clone();
        window.move_to(now);
        HealthReport {
            service: self.service.clone(),
            status: self.status,
            now,
            since: self.since,
            cause: self.cause,
            consecutive_failures: self.consecutive,
            window: self.policy.window,
            window_samples: window.samples,
            window_failures: window.failures,
            succeeded: self.totals.succeeded,
            failed: self.totals.failed,
            held_back: self.totals.held_back,
            outages: self.totals.outages,
        }
    }
}

#[cfg(test)]
mod tests;
