//! The report of a service's health, for people.

use std::fmt;
use std::time::Duration;

/// The state of a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum HealthStatus {
    /// Every call is admitted.
    Healthy,
    /// No call is admitted.
    Unhealthy {
        /// The time when a probe is admitted.
        probe_at: Duration,
    },
    /// One probe is in flight.
    Probing {
        /// The time when the probe counts as failed, if its outcome is not reported before.
        give_up_at: Duration,
    },
}

/// The reason why a service became unhealthy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum UnhealthyCause {
    /// The number of failures in a row.
    Consecutive(u32),
    /// Too large a share of failures in the window.
    Share {
        /// Failures in the window.
        failures: u64,
        /// Outcomes in the window.
        samples: u64,
    },
}

/// The health of a service. Times are on the clock of `now`.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct HealthReport {
    /// The service's name.
    pub service: String,
    /// The state.
    pub status: HealthStatus,
    /// The time of the report.
    pub now: Duration,
    /// The time since which it is healthy or unhealthy.
    pub since: Duration,
    /// The reason why it last became unhealthy.
    pub cause: Option<UnhealthyCause>,
    /// Failures since the last success, as of the last time when it was healthy.
    pub consecutive_failures: u32,
    /// The length of the window.
    pub window: Duration,
    /// Outcomes in the window, without probes.
    pub window_samples: u64,
    /// Failures in the window.
    pub window_failures: u64,
    /// Calls that succeeded since the start.
    pub succeeded: u64,
    /// Calls that failed since the start, including probes that were given up.
    pub failed: u64,
    /// Calls that were not admitted.
    pub held_back: u64,
    /// The number of times that it became unhealthy.
    pub outages: u64,
}

impl fmt::Display for UnhealthyCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Consecutive(count) => write!(f, "{count} failures in a row"),
            Self::Share { failures, samples } => write!(f, "{failures} of {samples} failed"),
        }
    }
}

impl fmt::Display for HealthReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = |duration: Duration| format!("{:.1} s", duration.as_secs_f64());
        let lasting = seconds(self.now.saturating_sub(self.since));
        let cause = self.cause.map_or_else(String::new, |cause| format!(" ({cause})"));
        write!(f, "{}: ", self.service)?;
        match self.status {
            HealthStatus::Healthy => write!(f, "healthy for {lasting}")?,
            HealthStatus::Unhealthy { probe_at } => {
                let wait = seconds(probe_at.saturating_sub(self.now));
                write!(f, "unhealthy for {lasting}{cause}, next probe in {wait}")?;
            }
            HealthStatus::Probing { .. } => write!(f, "unhealthy for {lasting}{cause}, a probe is under way")?,
        }
        write!(
            f,
            "; last {}: {} of {} failed; in all {} succeeded, {} failed, {} held back, {} outages",
            seconds(self.window),
            self.window_failures,
            self.window_samples,
            self.succeeded,
            self.failed,
            self.held_back,
            self.outages
        )
    }
}
