//! Searches for the highest offered rate that the engine sustains: doubles the rate until it fails, then bisects.

use std::time::Duration;

use anyhow::{Context as _, Result};
use corelane::Deadline;
use corelane::metrics::Stage;
use serde_json::{Value, json};

use crate::cli::Args;
use crate::events::{Carried, Feed};
use crate::load::{Measured, Phase, Session, WARM_UP};
use crate::report;
use crate::run::{Load, Run, StoreFolder, events_before};
use crate::verify::replay;

const FIRST_RATE: f64 = 125_000.0;
const RATE_MAX: f64 = 256e6;
/// Rates tried between the highest sustained rate and the lowest one that failed.
const REFINEMENTS: usize = 5;
/// The share of an offered rate that the engine must achieve.
const KEPT: f64 = 0.98;

/// The result of one offered rate.
#[derive(Debug, Clone)]
pub(crate) struct Step {
    pub(crate) offered: f64,
    pub(crate) achieved: f64,
    /// Latency from the intended time.
    pub(crate) p50_ns: u64,
    pub(crate) p99_ns: u64,
    /// The delay with which the system woke sleeping threads meanwhile: a bound that no engine can beat.
    pub(crate) jitter_p99_ns: u64,
    pub(crate) held: bool,
}

impl Step {
    fn new(args: &Args, offered: f64, measured: &Measured) -> Self {
        let stage = measured.stage(if args.synced() { Stage::DurableDue } else { Stage::AppendedDue });
        let (p50_ns, p99_ns) = (stage.value_at_quantile(0.5), stage.value_at_quantile(0.99));
        let achieved = measured.per_second();
        let held = achieved >= KEPT * offered && Duration::from_nanos(p99_ns) <= args.p99_max;
        Self { offered, achieved, p50_ns, p99_ns, jitter_p99_ns: measured.jitter.value_at_quantile(0.99), held }
    }
}

/// The offered rates and the run at the highest sustained one (or at the first, if none was sustained).
pub(crate) struct SearchResult {
    pub(crate) steps: Vec<Step>,
    pub(crate) best: Option<f64>,
    /// The rate of `run`.
    pub(crate) shown: f64,
    pub(crate) run: Run,
}

struct Search<'a, A: Carried, F> {
    args: &'a Args,
    session: Session<A, F>,
    steps: Vec<Step>,
    /// The results at the highest sustained rate, or at the first one.
    shown: Option<(f64, Measured)>,
    appended: u64,
}

impl<A: Carried, F: Feed<A::Event>> Search<'_, A, F> {
    /// Returns `true` if the engine sustains a rate. Tries a failed rate a second time, since another program may have
    /// interfered.
    fn held(&mut self, rate: f64) -> Result<bool> {
        let mut step = self.step(rate)?;
        if !step.held {
            step = self.step(rate)?;
        }
        let held = step.held;
        self.steps.push(step);
        Ok(held)
    }

    fn step(&mut self, rate: f64) -> Result<Step> {
        let phase = Phase { events: None, duration: Some(self.args.step), rate: Some(rate), name: "searching" };
        let measured = self.session.run(&phase)?;
        self.appended += measured.appended;
        let step = Step::new(self.args, rate, &measured);
        say!("{}", line(&step));
        // Sustained rates are tried in ascending order.
        if step.held || self.shown.is_none() {
            self.shown = Some((rate, measured));
        }
        Ok(step)
    }

    /// Returns the highest sustained rate.
    fn climb(&mut self) -> Result<Option<f64>> {
        let (mut low, mut high) = (0.0, FIRST_RATE);
        while high <= RATE_MAX && self.held(high)? {
            (low, high) = (high, 2.0 * high);
        }
        for _ in 0..REFINEMENTS {
            let middle = (low + high) / 2.0;
            if self.held(middle)? {
                low = middle;
            } else {
                high = middle;
            }
        }
        Ok((low > 0.0).then_some(low))
    }
}

/// Opens a store, searches, and checks at the end that the store kept every event.
pub(crate) fn find_max<A: Carried, F: Feed<A::Event>>(args: &Args, load: &Load<'_, F>) -> Result<SearchResult> {
    let folder = StoreFolder::new(args, None)?;
    let mut earlier = events_before::<A>(args, &folder.dir)?;
    let fresh = earlier == 0;
    let session = Session::<A, F>::open(args, folder.dir.clone(), (load.feeds)())?;
    let mut search = Search { args, session, steps: Vec::new(), shown: None, appended: 0 };
    if args.warmup() > 0 {
        earlier += search
            .session
            .run(&Phase { events: Some(args.warmup()), duration: None, rate: None, name: WARM_UP })?
            .appended;
    }
    let best = search.climb()?;
    let Search { session, mut steps, shown, appended, .. } = search;
    session.engine.shutdown(Deadline::NEVER).context("shutting down")?;
    drop(session);
    let (shown, measured) = shown.context("no rate was tried")?;
    let replay = if args.verifies() {
        Some(replay::<A>(args.config_keeping_all(folder.dir.clone()), fresh, load.expected)?)
    } else {
        None
    };
    steps.sort_by(|a, b| a.offered.total_cmp(&b.offered));
    let run = Run { warmup: None, earlier: earlier + appended - measured.appended, measured, replay, limits: None };
    Ok(SearchResult { steps, best, shown, run })
}

fn line(step: &Step) -> String {
    let verdict = if step.held { "sustained" } else { "not sustained" };
    let (offered, achieved) = (report::rate(step.offered), report::rate(step.achieved));
    format!(
        "{offered:>11} {achieved:>11} {:>11} {:>11} {:>11}  {verdict}",
        report::ns(step.p50_ns),
        report::ns(step.p99_ns),
        report::ns(step.jitter_p99_ns)
    )
}

impl SearchResult {
    /// Returns the table for people.
    pub(crate) fn text(&self, args: &Args) -> String {
        let to = if args.synced() { "durable" } else { "appended" };
        let mut out = format!(
            "due → {to} [{}]\n{:>11} {:>11} {:>11} {:>11} {:>11}\n",
            args.durability_name(),
            "offered",
            "achieved",
            "p50",
            "p99",
            "system p99"
        );
        for step in &self.steps {
            out += &line(step);
            out.push('\n');
        }
        let limit = report::ns(args.p99_max.as_nanos() as u64);
        match self.best {
            Some(best) => {
                out + &format!(
                    "\nhighest rate sustained with p99 ≤ {limit}: {} [{}]\n\n",
                    report::rate(best),
                    args.durability_name()
                )
            }
            None => {
                out + &format!(
                    "\nno rate sustained with p99 ≤ {limit}; the results below are those of the first rate\n\n"
                )
            }
        }
    }

    /// Returns the JSON object for scripts.
    pub(crate) fn json(&self, args: &Args) -> Value {
        let step = |step: &Step| json!({ "offered": step.offered, "achieved": step.achieved, "p50_ns": step.p50_ns, "p99_ns": step.p99_ns, "jitter_p99_ns": step.jitter_p99_ns, "held": step.held });
        json!({ "rate": self.best, "p99_max_ns": args.p99_max.as_nanos() as u64, "steps": self.steps.iter().map(step).collect::<Vec<_>>() })
    }
}
