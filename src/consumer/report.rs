//! Reports of consumers, for people and for metrics.

use std::time::Duration;

use super::dead_letter::answer::LetterStatistics;
use super::driver::Driver;
use super::error::ConsumerFailure;
use super::health::report::{HealthReport, HealthStatus};
use super::outcome::HaltCause;
use crate::config::whole_ms;
use crate::event::{Event, Offset};
use crate::log::segment::ShardLog;

/// The state of a consumer. Counts cover its present run, except those of dead letters.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct ConsumerReport {
    /// The consumer's name.
    pub name: String,
    /// `true` while threads or a poller drive it. If not, only positions, lag, dead letters and the failure are known.
    pub is_running: bool,
    /// `true` if it handles no event until it is resumed.
    pub is_paused: bool,
    /// The cause, if it halted.
    pub halted: Option<HaltCause>,
    /// The reason why it ended by itself, or why its last start failed. Kept until the next start.
    pub failure: Option<ConsumerFailure>,
    /// Events in the logs that it reads, of any type, now.
    pub published: u64,
    /// Events handled.
    pub handled: u64,
    /// Failed attempts.
    pub failed: u64,
    /// Events skipped, each with a record.
    pub skipped: u64,
    /// Events that became dead letters.
    pub parked: u64,
    /// Events being handled.
    pub running: usize,
    /// The time for which the oldest of them has been running.
    pub running_since: Option<Duration>,
    /// Keys that wait for a retry or a gap.
    pub retrying: usize,
    /// Events read and not done.
    pub unfinished: usize,
    /// Events, of any type, that are not read yet. Known while it runs.
    pub unread: u64,
    /// Bytes of the logs after its saved positions.
    pub lag_bytes: u64,
    /// Its saved position in every shard. Retention keeps every event at or after it.
    pub positions: Vec<Offset>,
    /// Its dead letters, also while it does not run. If their files cannot be read, all counts are 0, and `failure`
    /// says why.
    pub letters: LetterStatistics,
    /// The health of its service.
    pub health: Option<HealthReport>,
    /// Failed saves of the position, and failed writes of records, which are repeated.
    pub write_failures: (u64, u64),
    /// Events read.
    read: u64,
    /// `true` if the files of dead letters could be read.
    knows_letters: bool,
}

impl ConsumerReport {
    /// Returns a report of a consumer that does not run.
    pub(crate) fn at_rest<'a>(name: &str, places: impl Iterator<Item = (&'a ShardLog, Offset)>) -> Self {
        let mut report = Self {
            name: name.to_owned(),
            is_running: false,
            is_paused: false,
            halted: None,
            failure: None,
            published: 0,
            handled: 0,
            failed: 0,
            skipped: 0,
            parked: 0,
            running: 0,
            running_since: None,
            retrying: 0,
            unfinished: 0,
            unread: 0,
            lag_bytes: 0,
            positions: Vec::new(),
            letters: LetterStatistics::default(),
            health: None,
            write_failures: (0, 0),
            read: 0,
            knows_letters: false,
        };
        report.refresh(places);
        report
    }

    /// Updates the figures of the logs, which grow while a consumer is inside a handler.
    pub(crate) fn refresh<'a>(&mut self, places: impl Iterator<Item = (&'a ShardLog, Offset)>) {
        (self.published, self.lag_bytes) = (0, 0);
        self.positions.clear();
        for (log, position) in places {
            self.published += log.sequence.get();
            self.lag_bytes += log.appended.get().saturating_sub(position.0);
            self.positions.push(position);
        }
        self.unread = if self.is_running { self.published.saturating_sub(self.read) } else { 0 };
    }

    /// Notes the number of events that the consumer has read, of all events ever appended.
    pub(crate) fn set_read(&mut self, events: u64) {
        (self.read, self.is_running) = (events, true);
        self.unread = self.published.saturating_sub(events);
    }

    /// Notes the counts of dead letters.
    pub(crate) fn set_letters(&mut self, letters: LetterStatistics) {
        (self.letters, self.knows_letters) = (letters, true);
    }

    /// Returns a report of a driver at `now`.
    pub(crate) fn of<E: Event>(driver: &Driver<E>, now: Duration) -> Self {
        let followers = driver.followers();
        let places = followers.iter().map(|follower| (follower.log(), follower.held_from()));
        let mut report = Self::at_rest(&driver.settings().name, places);
        for follower in followers {
            let queues = follower.queues().statistics();
            report.handled += queues.succeeded;
            report.failed += queues.failures;
            report.skipped += queues.skipped;
            report.parked += queues.parked;
            report.retrying += queues.waiting;
            report.unfinished += queues.unfinished;
        }
        report.set_read(followers.iter().map(|follower| follower.reader().sequence()).sum());
        report.is_paused = driver.is_paused();
        report.halted = driver.halted().cloned();
        report.running = driver.running();
        report.set_letters(driver.letters().statistics());
        report.health = Some(driver.health().report(now));
        report.write_failures = driver.write_failures();
        report
    }

    /// Returns the number of events that are unread, or read and not done.
    #[must_use]
    pub fn waiting(&self) -> u64 {
        self.unread + self.unfinished as u64
    }

    /// Returns the share of successful attempts, 0.0 to 1.0; 1.0 before the first.
    #[must_use]
    pub fn success_rate(&self) -> f64 {
        let attempts = self.handled + self.failed;
        if attempts == 0 { 1.0 } else { self.handled as f64 / attempts as f64 }
    }
}

/// A figure of a report: its Prometheus name and type, and its value.
type Figure = (&'static str, &'static str, fn(&ConsumerReport) -> u64);

const FIGURES: [Figure; 16] = [
    ("handled_total", "counter", |report| report.handled),
    ("failed_attempts_total", "counter", |report| report.failed),
    ("skipped_total", "counter", |report| report.skipped),
    ("parked_total", "counter", |report| report.parked),
    ("running", "gauge", |report| report.running as u64),
    ("retrying_keys", "gauge", |report| report.retrying as u64),
    ("waiting_events", "gauge", ConsumerReport::waiting),
    ("lag_bytes", "gauge", |report| report.lag_bytes),
    (DEAD_LETTERS, "gauge", |report| report.letters.letters as u64),
    ("running_longest_ms", "gauge", |report| report.running_since.map_or(0, whole_ms)),
    ("is_running", "gauge", |report| u64::from(report.is_running)),
    ("is_failed", "gauge", |report| u64::from(report.failure.is_some())),
    ("is_paused", "gauge", |report| u64::from(report.is_paused)),
    ("is_halted", "gauge", |report| u64::from(report.halted.is_some())),
    ("is_unhealthy", "gauge", |report| {
        u64::from(report.health.as_ref().is_some_and(|health| health.status != HealthStatus::Healthy))
    }),
    ("write_failures_total", "counter", |report| report.write_failures.0 + report.write_failures.1),
];

/// Figures that are known of a consumer that does not run.
const KNOWN_AT_REST: [&str; 4] = ["lag_bytes", "is_running", "is_failed", DEAD_LETTERS];
const DEAD_LETTERS: &str = "dead_letters";

/// Returns the reports as Prometheus text, to append to [`crate::metrics::Metrics::prometheus`]. Counts cover the consumer's
/// present run. For a consumer that does not run, only lag, dead letters and failure are included: a 0 would be
/// mistaken for a count. The label `reason` of `corelane_consumer_failure` holds the failure.
#[must_use]
pub fn prometheus(reports: &[ConsumerReport]) -> String {
    let mut out = String::new();
    for (name, kind, value) in FIGURES {
        out += &format!("# TYPE corelane_consumer_{name} {kind}\n");
        let is_known = |report: &&ConsumerReport| match name {
            DEAD_LETTERS => report.knows_letters,
            _ => report.is_running || KNOWN_AT_REST.contains(&name),
        };
        for report in reports.iter().filter(is_known) {
            // A consumer's name needs no escaping.
            out += &format!("corelane_consumer_{name}{{consumer=\"{}\"}} {}\n", report.name, value(report));
        }
    }
    out += "# TYPE corelane_consumer_failure gauge\n";
    for (report, failure) in reports.iter().filter_map(|report| Some((report, report.failure.as_ref()?))) {
        let reason = failure.to_string().replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
        out += &format!("corelane_consumer_failure{{consumer=\"{}\",reason=\"{reason}\"}} 1\n", report.name);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::consumer::error::ConsumerError;

    #[test]
    fn reports_are_valid_prometheus_text() {
        let mut report = ConsumerReport::at_rest("mail", std::iter::empty());
        (report.handled, report.unread, report.unfinished) = (7, 40, 2);
        report.halted = Some(HaltCause::DeadLettersFull);
        report.is_running = true;
        report.set_letters(LetterStatistics { letters: 3, ..LetterStatistics::default() });
        let mut at_rest = ConsumerReport::at_rest("sms", std::iter::empty());
        at_rest.failure = Some(ConsumerError::Panicked { text: "a \"trap\"\nin C:\\".to_owned() }.into());
        let text = prometheus(&[report, at_rest]);
        for line in [
            "# TYPE corelane_consumer_handled_total counter",
            "corelane_consumer_handled_total{consumer=\"mail\"} 7",
            "corelane_consumer_waiting_events{consumer=\"mail\"} 42",
            "corelane_consumer_is_halted{consumer=\"mail\"} 1",
            "corelane_consumer_dead_letters{consumer=\"mail\"} 3",
            "corelane_consumer_is_running{consumer=\"sms\"} 0",
            "corelane_consumer_is_failed{consumer=\"sms\"} 1",
            "corelane_consumer_failure{consumer=\"sms\",reason=\"the consumer's own code panicked: a \\\"trap\\\"\\nin C:\\\\\"} 1",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
        assert!(!text.contains("dead_letters{consumer=\"sms\"}"), "an unknown count is left out");
        assert_eq!(text.lines().count(), 2 * FIGURES.len() + KNOWN_AT_REST.len() - 1 + 2);
    }
}
