//! What is known of a service's health, for people.

use std::fmt;
use std::time::Duration;

use super::{HealthStatus, UnhealthyCause};

/// What is known of a service's health. Times are on the clock of `now`.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct HealthReport {
    /// Its name.
    pub service: String,
    /// How it is.
    pub status: HealthStatus,
    /// When this was asked.
    pub now: Duration,
    /// Since when it is healthy, or is not.
    pub since: Duration,
    /// Why it became unhealthy the last time.
    pub cause: Option<UnhealthyCause>,
    /// Failures since the last success, as of when it was last healthy.
    pub consecutive_failures: u32,
    /// How far back the next two look.
    pub window: Duration,
    /// Outcomes in the window; probes are not among them.
    pub window_samples: u64,
    /// Failures in the window.
    pub window_failures: u64,
    /// Calls that went well, since the start.
    pub succeeded: u64,
    /// Calls that failed, since the start; probes that were given up are among them.
    pub failed: u64,
    /// How often leave to call was refused.
    pub held_back: u64,
    /// How often it became unhealthy.
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
