//! Whether one service works, and whether it may be called now: failure detector and circuit in one.
//!
//! One writer: whoever owns it. Bounded: 60 counters of the sliding window, whatever the rate of calls.
//! It calls nothing and waits for nothing; the caller asks [`Health::admit`] before each call and reports what came of it.
//!
//! ```text
//!             5 failures in a row, or > 10 % of the window
//!   Healthy ─────────────────────────────────────────────▶ Unhealthy: nobody calls until `probe_at`
//!      ▲                                                      │   ▲
//!      │ 3 probes in a row went well                one probe │   │ it failed or was never reported:
//!      └────────────────────────────────────────── Probing ◀──┘───┘ the pause doubles, up to the cap
//! ```

use std::time::Duration;

use crate::config::in_range;
use crate::config::setters;
use crate::config::whole_ms;
use crate::error::ConfigError;

pub(super) mod report;
mod window;

use report::HealthReport;
use window::{PARTS, Window};

const HOUR_MS: u64 = 3_600_000;

/// When a service counts as unhealthy, and how it is tried again.
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
        /// So many failures in a row make the service unhealthy, 1..=1,000,000. Default: 5.
        consecutive_max: u32,
        /// More than this share of the window failing makes it unhealthy, 0..=100 percent. 100 turns the rule off. Default: 10.
        failure_percent_max: u32,
        /// How far back the share of failures looks, 60 ms..=1 h. It slides in 60 steps, so it covers between 59 and 60
        /// sixtieths of this. Default: 60 s.
        window: Duration,
        /// With fewer outcomes than this in the window the share says nothing, 1..=1,000,000. Default: 100.
        samples_min: u32,
        /// From getting unhealthy to the first probe, 1 ms..=1 h; doubled after every failed probe. Default: 1 s.
        pause: Duration,
        /// The longest pause, from `pause` up to 1 h. Default: 30 s.
        pause_max: Duration,
        /// A probe that is not reported for so long counts as failed, 1 ms..=1 h. Default: 30 s.
        probe_wait_max: Duration,
        /// So many probes in a row, one at a time, make the service healthy again, 1..=1000. Default: 3.
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

/// Leave for one call; its outcome goes to [`Health::succeeded`] or [`Health::failed`].
#[derive(Debug)]
#[must_use = "the outcome of the call is to be reported"]
pub struct CallPermit {
    epoch: u64,
    is_probe: bool,
}

impl CallPermit {
    /// Whether it is the one call by which an unhealthy service is tried.
    #[must_use]
    pub fn is_probe(&self) -> bool {
        self.is_probe
    }
}

/// The answer to [`Health::admit`].
#[derive(Debug)]
#[must_use]
pub enum Admission {
    /// Call.
    Go(CallPermit),
    /// Do not call; ask again at this time, or when an outcome was reported.
    Wait {
        /// On the clock of `now`.
        until: Duration,
    },
}

/// Why a service became unhealthy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnhealthyCause {
    /// So many failures in a row.
    Consecutive(u32),
    /// Too large a share of the window.
    Share {
        /// Failures in the window.
        failures: u64,
        /// Outcomes in the window.
        samples: u64,
    },
}

/// A change that a reported outcome brought about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use = "a change of health is to be reported"]
pub enum HealthChange {
    /// From now on only probes are let through.
    BecameUnhealthy {
        /// Why.
        cause: UnhealthyCause,
        /// When the first probe may go.
        probe_at: Duration,
    },
    /// A probe failed.
    ProbeFailed {
        /// When the next may go.
        probe_at: Duration,
    },
    /// Enough probes went well; everybody may call again.
    Recovered {
        /// How long it was unhealthy.
        after: Duration,
    },
}

impl HealthChange {
    /// Notes a change, if there was one.
    pub(super) fn note(change: Option<Self>, consumer: &str) {
        match change {
            Some(Self::BecameUnhealthy { cause, .. }) => {
                tracing::warn!(consumer, ?cause, "a service is unhealthy: only probes go to it");
            }
            Some(Self::Recovered { after }) => tracing::info!(consumer, ?after, "a service has recovered"),
            Some(Self::ProbeFailed { .. }) | None => {}
        }
    }
}

/// How a service is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HealthStatus {
    /// Everybody may call.
    Healthy,
    /// Nobody may call.
    Unhealthy {
        /// When a probe may go.
        probe_at: Duration,
    },
    /// One probe is under way.
    Probing {
        /// When it counts as failed if nothing is heard of it.
        give_up_at: Duration,
    },
}

/// The health of one service.
///
/// ```
/// # use corelane::consumer::{Admission, Health, HealthPolicy, HealthStatus};
/// # use std::time::Duration;
/// let mut mail = Health::new("mail", HealthPolicy::default().consecutive_max(2))?;
/// let now = Duration::from_secs(10);
/// for _ in 0..2 {
///     let Admission::Go(pass) = mail.admit(now) else { panic!("healthy so far") };
///     if let Some(change) = mail.failed(pass, now) {
///         println!("mail: {change:?}");
///     }
/// }
/// assert!(matches!(mail.admit(now), Admission::Wait { .. }));
/// assert!(matches!(mail.admit(now + Duration::from_secs(1)), Admission::Go(pass) if pass.is_probe()));
/// # Ok::<(), corelane::ConfigError>(())
/// ```
#[derive(Debug)]
pub struct Health {
    service: String,
    policy: HealthPolicy,
    status: HealthStatus,
    /// When it became what it is: healthy, or not.
    since: Duration,
    now: Duration,
    /// Passes of older epochs no longer change anything. Every probe has one of its own.
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
    /// A healthy service. `service` is its name in reports.
    ///
    /// # Errors
    /// The first value of the policy that cannot be used.
    pub fn new(service: &str, policy: HealthPolicy) -> Result<Self, ConfigError> {
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

    /// Asks for leave to call the service. Time that steps back is taken for standing still.
    #[inline]
    pub fn admit(&mut self, now: Duration) -> Admission {
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

    /// A call went well. One that was let through before the last change of health is counted and changes nothing.
    pub fn succeeded(&mut self, pass: CallPermit, now: Duration) -> Option<HealthChange> {
        self.now = self.now.max(now);
        self.totals.succeeded += 1;
        if pass.epoch != self.epoch {
            return None;
        }
        if !pass.is_probe {
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

    /// So many calls went well since [`Health::is_healthy`] said that it was; each passes as [`Health::succeeded`] would have it.
    pub fn succeeded_while_healthy(&mut self, calls: u64, now: Duration) {
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

    /// Whether everybody may call.
    #[must_use]
    pub fn is_healthy(&self) -> bool {
        self.status == HealthStatus::Healthy
    }

    /// A call failed. One that was let through before the last change of health is counted and changes nothing.
    pub fn failed(&mut self, pass: CallPermit, now: Duration) -> Option<HealthChange> {
        self.now = self.now.max(now);
        self.totals.failed += 1;
        if pass.epoch != self.epoch {
            return None;
        }
        if !pass.is_probe {
            self.consecutive += 1;
            self.window.add(self.now, false);
            return self.judge();
        }
        self.epoch += 1;
        Some(HealthChange::ProbeFailed { probe_at: self.pause_longer(self.now) })
    }

    /// A call failed, and that says nothing about the service: its event had failed before, and others have gone well since. A
    /// probe then told nothing: the next goes after the same pause again.
    pub fn told_nothing(&mut self, pass: CallPermit, now: Duration) {
        self.now = self.now.max(now);
        self.totals.failed += 1;
        if pass.epoch == self.epoch && pass.is_probe {
            self.epoch += 1;
            self.status = HealthStatus::Unhealthy { probe_at: self.now + self.pause };
        }
    }

    /// After an outcome while healthy: does it still count as such?
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

    /// How it is. A probe that nobody reports is given up by the next [`Health::admit`].
    #[must_use]
    pub fn status(&self) -> HealthStatus {
        self.status
    }

    /// All that is known of the service at `now`.
    #[must_use]
    pub fn report(&self, now: Duration) -> HealthReport {
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
