//! The rules of the detector one by one, and all of them against a model that keeps every outcome and counts from
//! scratch.

use super::*;
use proptest::prelude::*;

const S: Duration = Duration::from_secs(1);
const MS: Duration = Duration::from_millis(1);

fn health(policy: HealthPolicy) -> Health {
    Health::new("mail", policy).expect("valid")
}

fn go(health: &mut Health, now: Duration) -> CallPermit {
    match health.admit(now) {
        Admission::Go(pass) => pass,
        Admission::Wait { until } => panic!("not admitted until {until:?} at {now:?}"),
    }
}

fn wait(health: &mut Health, now: Duration) -> Duration {
    match health.admit(now) {
        Admission::Wait { until } => until,
        Admission::Go(pass) => panic!("admitted at {now:?}: {pass:?}"),
    }
}

#[test]
fn five_failures_in_a_row_open_the_circuit_and_a_success_resets_the_count() {
    let mut health = health(HealthPolicy::default());
    for is_success in [false, false, false, false, true, false, false, false, false] {
        let pass = go(&mut health, S);
        let change = if is_success { health.succeeded(pass, S) } else { health.failed(pass, S) };
        assert_eq!(change, None);
    }
    let pass = go(&mut health, S);
    let change = health.failed(pass, S);
    assert_eq!(change, Some(HealthChange::BecameUnhealthy { cause: UnhealthyCause::Consecutive(5), probe_at: 2 * S }));
    assert_eq!(wait(&mut health, S), 2 * S);
}

#[test]
fn an_inconclusive_failure_neither_counts_nor_lengthens_a_pause() {
    let mut health = health(HealthPolicy::default());
    for _ in 0..4 {
        let pass = go(&mut health, S);
        assert_eq!(health.failed(pass, S), None);
    }
    for _ in 0..100 {
        let pass = go(&mut health, S);
        health.inconclusive(pass, S);
    }
    let pass = go(&mut health, S);
    assert!(
        matches!(health.failed(pass, S), Some(HealthChange::BecameUnhealthy { probe_at, .. }) if probe_at == 2 * S)
    );
    for n in 2..5 {
        let probe = go(&mut health, n * S);
        assert!(probe.is_probe());
        health.inconclusive(probe, n * S);
        assert_eq!(wait(&mut health, n * S), (n + 1) * S, "the same pause again");
    }
    assert_eq!(health.report(5 * S).failed, 108);
}

#[test]
fn more_than_a_tenth_of_at_least_100_outcomes_failing_opens_the_circuit() {
    let mut health = health(HealthPolicy::default());
    // 11 failures of 99 outcomes: too few outcomes to decide.
    for n in 0..99 {
        let pass = go(&mut health, S);
        let change = if n % 9 == 0 { health.failed(pass, S) } else { health.succeeded(pass, S) };
        assert_eq!(change, None, "after {n}");
    }
    let pass = go(&mut health, S);
    let cause = UnhealthyCause::Share { failures: 11, samples: 100 };
    assert_eq!(health.succeeded(pass, S), Some(HealthChange::BecameUnhealthy { cause, probe_at: 2 * S }));
}

#[test]
fn a_tenth_of_failures_is_still_healthy_and_old_outcomes_are_forgotten() {
    let mut health = health(HealthPolicy::default());
    for n in 0..1000 {
        let pass = go(&mut health, S);
        let change = if n % 10 == 9 { health.failed(pass, S) } else { health.succeeded(pass, S) };
        assert_eq!(change, None, "after {n}");
    }
    let report = health.report(S);
    assert_eq!((report.window_failures, report.window_samples), (100, 1000));
    let report = health.report(61 * S);
    assert_eq!((report.window_failures, report.window_samples), (0, 0));
    assert_eq!((report.failed, report.succeeded), (100, 900));
}

fn unhealthy(policy: HealthPolicy) -> Health {
    let mut health = health(policy.consecutive_max(1));
    let pass = go(&mut health, Duration::ZERO);
    assert!(health.failed(pass, Duration::ZERO).is_some());
    health
}

#[test]
fn three_successful_probes_one_at_a_time_end_an_outage() {
    let mut health = unhealthy(HealthPolicy::default());
    for _ in 0..2 {
        let probe = go(&mut health, S);
        assert!(probe.is_probe());
        assert_eq!(wait(&mut health, S), 31 * S, "no other call meanwhile");
        assert_eq!(health.succeeded(probe, S), None);
    }
    let probe = go(&mut health, S);
    assert_eq!(health.succeeded(probe, 2 * S), Some(HealthChange::Recovered { after: 2 * S }));
    assert!(!go(&mut health, 2 * S).is_probe());
    assert_eq!(health.report(3 * S).outages, 1);
}

#[test]
fn a_failed_probe_doubles_the_pause_and_resets_the_probes() {
    let mut health = unhealthy(HealthPolicy::default().pause_max(3 * S).probes(2));
    let mut now = S;
    for pause in [2 * S, 3 * S, 3 * S] {
        let probe = go(&mut health, now);
        assert_eq!(health.succeeded(probe, now), None);
        let probe = go(&mut health, now);
        now += pause;
        assert_eq!(health.failed(probe, now - pause), Some(HealthChange::ProbeFailed { probe_at: now }));
        assert_eq!(wait(&mut health, now - MS), now);
    }
}

#[test]
fn an_unreported_probe_is_given_up() {
    let mut health = unhealthy(HealthPolicy::default());
    let lost = go(&mut health, S);
    assert_eq!(wait(&mut health, 30 * S), 31 * S);
    assert_eq!(wait(&mut health, 31 * S), 33 * S, "the pause has doubled");
    let probe = go(&mut health, 33 * S);
    assert_eq!(health.succeeded(lost, 33 * S), None);
    assert_eq!(health.status(), HealthStatus::Probing { give_up_at: 63 * S }, "the lost probe has no effect");
    assert_eq!(health.succeeded(probe, 33 * S), None);
}

#[test]
fn calls_admitted_before_an_outage_do_not_change_it() {
    let mut health = health(HealthPolicy::default().consecutive_max(1));
    let (first, second, third) = (go(&mut health, S), go(&mut health, S), go(&mut health, S));
    assert!(health.failed(first, S).is_some());
    assert_eq!(health.succeeded(second, S), None);
    assert_eq!(health.failed(third, S), None);
    assert_eq!(health.status(), HealthStatus::Unhealthy { probe_at: 2 * S });
}

#[test]
fn a_policy_out_of_range_is_refused_by_name() {
    let d = HealthPolicy::default;
    let bad = [
        (d().consecutive_max(0), "health_consecutive_max"),
        (d().failure_percent_max(101), "health_failure_percent_max"),
        (d().window(59 * MS), "health_window_ms"),
        (d().samples_min(0), "health_samples_min"),
        (d().pause(Duration::ZERO), "health_pause_ms"),
        (d().pause(2 * S).pause_max(S), "health_pause_max_ms"),
        (d().probe_wait_max(Duration::MAX), "health_probe_wait_max_ms"),
        (d().probes(0), "health_probes"),
    ];
    for (policy, expected) in bad {
        match Health::new("mail", policy) {
            Err(ConfigError::OutOfRange { name, .. }) => assert_eq!(name, expected),
            other => panic!("{expected}: {other:?}"),
        }
    }
}

#[test]
fn a_report_prints_status_window_and_totals() {
    let mut health = unhealthy(HealthPolicy::default());
    wait(&mut health, 400 * MS);
    assert_eq!(
        health.report(500 * MS).to_string(),
        "mail: unhealthy for 0.5 s (1 failures in a row), next probe in 0.5 s; last 60.0 s: 1 of 1 failed; \
         in all 0 succeeded, 1 failed, 1 held back, 1 outages"
    );
}

/// Keeps every outcome and counts from scratch.
#[derive(Default)]
struct Model {
    outcomes: Vec<(Duration, bool)>,
    unhealthy: Option<ModelOutage>,
}

struct ModelOutage {
    began: Duration,
    failed_probes: u32,
    good_probes: u32,
    probe_at: Duration,
    probe_out: Option<Duration>,
}

const PART: Duration = Duration::from_millis(100);

impl Model {
    fn admits(&mut self, now: Duration) -> bool {
        let Some(outage) = &mut self.unhealthy else { return true };
        if let Some(sent) = outage.probe_out
            && now >= sent + 2 * S
        {
            outage.failed(sent + 2 * S);
        }
        if outage.probe_out.is_some() || now < outage.probe_at {
            return false;
        }
        outage.probe_out = Some(now);
        true
    }

    fn healthy_outcome(&mut self, now: Duration, is_success: bool) {
        self.outcomes.push((now, is_success));
        let part = |at: Duration| at.as_millis() / PART.as_millis();
        let recent = self.outcomes.iter().filter(|(at, _)| part(now) - part(*at) < 60);
        let (samples, failures) = (recent.clone().count(), recent.filter(|(_, success)| !success).count());
        let row = self.outcomes.iter().rev().take_while(|(_, success)| !success).count();
        if row >= 3 || (samples >= 10 && failures * 100 > samples * 30) {
            let probe_at = now + S;
            self.unhealthy =
                Some(ModelOutage { began: now, failed_probes: 0, good_probes: 0, probe_at, probe_out: None });
        }
    }

    fn probe_outcome(&mut self, now: Duration, is_success: bool) -> Option<Duration> {
        let outage = self.unhealthy.as_mut()?;
        outage.probe_out = None;
        if !is_success {
            outage.failed(now);
            return None;
        }
        outage.good_probes += 1;
        outage.probe_at = now;
        if outage.good_probes < 2 {
            return None;
        }
        let after = now - outage.began;
        *self = Self::default();
        Some(after)
    }
}

impl ModelOutage {
    fn failed(&mut self, now: Duration) {
        self.failed_probes += 1;
        self.good_probes = 0;
        self.probe_out = None;
        self.probe_at = now + (S * 2_u32.pow(self.failed_probes)).min(4 * S);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]
    #[test]
    fn the_health_agrees_with_a_model(steps in prop::collection::vec((0..2000_u64, 0..100_u32, 0..4_u8), 1..300)) {
        let policy = HealthPolicy::default()
            .consecutive_max(3).failure_percent_max(30).window(6 * S).samples_min(10)
            .pause(S).pause_max(4 * S).probe_wait_max(2 * S).probes(2);
        let mut health = health(policy);
        let mut model = Model::default();
        let mut now = Duration::ZERO;
        for (after_ms, luck, fate) in steps {
            // Mostly small steps of time.
            now += if after_ms < 1800 { MS * (after_ms as u32 / 10) } else { MS * after_ms as u32 };
            let was_healthy = model.unhealthy.is_none();
            let admission = health.admit(now);
            prop_assert_eq!(matches!(admission, Admission::Go(_)), model.admits(now), "at {:?}", now);
            let Admission::Go(pass) = admission else { continue };
            prop_assert_eq!(pass.is_probe(), !was_healthy);
            if pass.is_probe() && fate == 0 {
                continue; // this probe is never reported
            }
            let is_success = luck < 70;
            let change = if is_success { health.succeeded(pass, now) } else { health.failed(pass, now) };
            let recovered = if was_healthy { model.healthy_outcome(now, is_success); None } else { model.probe_outcome(now, is_success) };
            prop_assert_eq!(recovered.map(|after| HealthChange::Recovered { after }), match change {
                Some(HealthChange::Recovered { .. }) => change,
                _ => None,
            });
            prop_assert_eq!(matches!(health.status(), HealthStatus::Healthy), model.unhealthy.is_none(), "at {:?}", now);
        }
    }
}
