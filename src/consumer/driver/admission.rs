//! Admission control: whether the handler may be called now, and the verdict on each failed attempt.
//!
//! Owns the service's health, the random numbers for jitter, and the events that failed and are not done.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use super::job::Failed;
use crate::consumer::health::report::HealthStatus;
use crate::consumer::health::{Admission, CallPermit, Health, HealthChange};
use crate::consumer::key_queues::answer::Verdict;
use crate::consumer::retry::{AfterFailure, JitterRng};
use crate::consumer::settings::{Exhausted, Judgement, Settings};
use crate::error::{ConfigError, panic_text};
use crate::event::{EventId, Time};

/// An event that failed and is not done.
struct Failing {
    /// The time of its first failure.
    since: Time,
    /// The number of calls that had succeeded until then.
    successes: u64,
}

/// Decides whether the handler may be called, and what follows a failure.
pub(super) struct AdmissionControl {
    settings: Arc<Settings>,
    health: Health,
    /// No call is admitted before this time: the service is unhealthy.
    admitted_at: Duration,
    rng: JitterRng,
    failing: HashMap<EventId, Failing>,
    /// Calls that succeeded, including those with dead letters.
    successes: u64,
    /// The value of `successes` at the last failure of a dead letter.
    successes_at_letter: u64,
}

impl AdmissionControl {
    pub(super) fn new(settings: Arc<Settings>) -> Result<Self, ConfigError> {
        Ok(Self {
            health: Health::new(&settings.name, settings.health.clone())?,
            rng: JitterRng::seeded(settings.jitter_seed),
            settings,
            admitted_at: Duration::ZERO,
            failing: HashMap::new(),
            successes: 0,
            successes_at_letter: 0,
        })
    }

    pub(super) fn health(&self) -> &Health {
        &self.health
    }

    pub(super) fn is_healthy(&self) -> bool {
        self.health.is_healthy()
    }

    /// Returns `false` if [`AdmissionControl::admit`] is known to refuse.
    pub(super) fn may_admit(&self, now: Duration) -> bool {
        now >= self.admitted_at
    }

    /// Returns the time from which on a call may be admitted, if the service is unhealthy.
    pub(super) fn due(&self) -> Option<Duration> {
        (!self.health.is_healthy()).then_some(self.admitted_at)
    }

    /// Asks for a permit to call the handler once.
    pub(super) fn admit(&mut self, now: Duration) -> Option<CallPermit> {
        match self.health.admit(now) {
            Admission::Go(permit) => Some(permit),
            Admission::Wait { until } => {
                // A probe in flight may return earlier; its outcome sets `admitted_at` again.
                self.admitted_at = until;
                None
            }
        }
    }

    /// Draws a number below `count`.
    pub(super) fn draw(&mut self, count: usize) -> usize {
        (self.rng.next_fraction() * count as f64) as usize
    }

    /// Notes calls that succeeded for events handled in place.
    pub(super) fn succeeded_in_place(&mut self, calls: u64, now: Duration) {
        self.successes += calls;
        self.health.succeeded_while_healthy(calls, now);
    }

    /// Reports the outcome of a call to the service's health, and returns the verdict if it failed. `event` is `None`
    /// for a dead letter.
    pub(super) fn judge(
        &mut self,
        permit: CallPermit,
        event: Option<EventId>,
        failed: Option<&Failed>,
        attempt: u32,
        now: Duration,
    ) -> Option<Verdict> {
        let judgement = failed.map(|failed| self.judgement(failed, attempt));
        self.successes += u64::from(judgement.is_none());
        if !judgement.is_some_and(Judgement::blames_service) {
            self.report(now, |health| health.succeeded(permit, now));
        } else if self.concerns_service(event) {
            self.report(now, |health| health.failed(permit, now));
        } else {
            self.report(now, |health| {
                health.inconclusive(permit, now);
                None
            });
        }
        judgement.map(|judgement| self.verdict(judgement, attempt))
    }

    /// Returns `true` if a failure is evidence against the service. If other calls succeeded since the same event first
    /// failed, the event is at fault: a few events that always fail must not hold up all others.
    fn concerns_service(&mut self, event: Option<EventId>) -> bool {
        match event {
            Some(id) => self.failing.get(&id).is_none_or(|failing| failing.successes == self.successes),
            None => std::mem::replace(&mut self.successes_at_letter, self.successes) == self.successes,
        }
    }

    fn report(&mut self, now: Duration, report: impl FnOnce(&mut Health) -> Option<HealthChange>) {
        let change = report(&mut self.health);
        self.admitted_at = match self.health.status() {
            HealthStatus::Healthy => now,
            HealthStatus::Unhealthy { probe_at } => probe_at,
            HealthStatus::Probing { give_up_at } => give_up_at,
        };
        HealthChange::log(change, &self.settings.name);
    }

    fn judgement(&self, failed: &Failed, attempt: u32) -> Judgement {
        match (failed, &self.settings.judge) {
            (Failed::Undecodable | Failed::Unreadable(_), _) => Judgement::Park,
            (Failed::Handler(error), Some(judge)) => {
                let judged = catch_unwind(AssertUnwindSafe(|| judge(error, attempt)));
                judged.unwrap_or_else(|panic| {
                    let (consumer, panic) = (&*self.settings.name, panic_text(&*panic));
                    tracing::error!(consumer, %error, panic, "the judge panicked; the policy decides");
                    Judgement::ByPolicy
                })
            }
            (Failed::Handler(_) | Failed::Panic(_), _) => Judgement::ByPolicy,
        }
    }

    fn verdict(&mut self, judgement: Judgement, attempt: u32) -> Verdict {
        match judgement {
            Judgement::RetryIn(after) => Verdict::Retry { after },
            Judgement::AwaitGap => Verdict::AwaitGap,
            Judgement::Park => Verdict::Park,
            Judgement::Skip => Verdict::Skip,
            Judgement::Halt => Verdict::Halt,
            Judgement::ByPolicy => match self.settings.retry.after(attempt, &mut self.rng) {
                AfterFailure::RetryIn(after) => Verdict::Retry { after },
                AfterFailure::GiveUp => match self.settings.exhausted {
                    Exhausted::Park => Verdict::Park,
                    Exhausted::Skip => Verdict::Skip,
                    Exhausted::Halt => Verdict::Halt,
                },
            },
        }
    }

    /// Notes that an event succeeded.
    pub(super) fn succeeded(&mut self, id: EventId) {
        self.failing.remove(&id);
    }

    /// Notes that an event failed. Returns the time of its first failure.
    pub(super) fn failed(&mut self, id: EventId, attempt: u32, verdict: Verdict, wall: Time) -> Time {
        let failing = Failing { since: wall, successes: self.successes };
        let first_failed = self.failing.entry(id).or_insert(failing).since;
        let is_over = match verdict {
            Verdict::Park | Verdict::Skip => true,
            Verdict::AwaitGap => attempt == 1,
            Verdict::Retry { .. } | Verdict::Halt => false,
        };
        if is_over {
            self.failing.remove(&id);
        }
        first_failed
    }

    /// Forgets all failures: the consumer is set to another position.
    pub(super) fn forget_failures(&mut self) {
        self.failing.clear();
    }
}
