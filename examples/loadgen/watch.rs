//! Monitors a run: prints a line per second, and records the time series for the report and the system's wake-up
//! delays.

use std::io::IsTerminal as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use corelane::Engine;
use corelane::metrics::{Metrics, ShardMetrics, Stage};
use hdrhistogram::Histogram;
use indicatif::{ProgressBar, ProgressStyle};

use crate::events::Carried;
use crate::load::{Phase, Progress, difference, histogram};
use crate::report;

/// Time between the first samples, so that short runs have a curve too. Later samples are one second apart.
const SAMPLE_EVERY: Duration = Duration::from_millis(250);
const QUICK_SAMPLES: usize = 40;
const LINE_EVERY: Duration = Duration::from_secs(1);
const SYNCED_HISTOGRAMS_EVERY: Duration = Duration::from_secs(5);
/// The time that the engine's threads have to hand over their histograms. A slow sync may take seconds.
pub(crate) const HANDED_OVER_IN: Duration = Duration::from_secs(10);

/// The figures between two samples.
#[derive(Debug, Clone)]
pub(crate) struct Interval {
    /// Time since the start.
    pub(crate) from: Duration,
    pub(crate) to: Duration,
    pub(crate) appended: u64,
    pub(crate) bytes: u64,
    pub(crate) synced_bytes: u64,
    /// Events accepted but not yet appended, at the interval's end.
    pub(crate) backlog: u64,
    /// Count since the engine was opened.
    pub(crate) segments_begun: u64,
    pub(crate) segments_freed: u64,
    /// Histograms in the order of [`Stage::ALL`], since the last interval that has them. Empty if only counters were
    /// read, or if the report does not need them.
    stages: Vec<Histogram<u64>>,
}

impl Interval {
    pub(crate) fn per_second(&self) -> f64 {
        self.appended as f64 / (self.to - self.from).as_secs_f64()
    }

    pub(crate) fn stage(&self, stage: Stage) -> Option<&Histogram<u64>> {
        self.stages.get(stage as usize)
    }
}

/// The monitor of one phase.
pub(crate) struct Watch<'a, A: Carried> {
    pub(crate) engine: &'a Engine<A>,
    pub(crate) progress: Progress,
    /// The time and the result of the last reading of histograms.
    last: (Instant, Metrics),
    counters: Vec<ShardMetrics>,
    began: Instant,
    sampled: Instant,
    printed: Instant,
    intervals: Vec<Interval>,
    p99_of: Stage,
    p99_ns: u64,
    synced: bool,
    /// Every interval's histograms are kept for the report: 2 MB each.
    keep: bool,
    name: &'static str,
    total: Option<u64>,
    done: u64,
    bar: Option<ProgressBar>,
}

impl<'a, A: Carried> Watch<'a, A> {
    pub(crate) fn new(engine: &'a Engine<A>, before: Metrics, synced: bool, keep: bool, phase: &Phase) -> Self {
        let now = Instant::now();
        let total = match (phase.events, phase.rate, phase.duration) {
            (Some(events), _, _) => Some(events),
            (None, Some(rate), Some(duration)) => Some((rate * duration.as_secs_f64()) as u64),
            _ => None,
        };
        let bar = std::io::stderr().is_terminal().then(|| bar(phase.name, total));
        let p99_of = if phase.rate.is_some() { Stage::AppendedDue } else { Stage::Appended };
        Self {
            engine,
            progress: Progress::new(),
            counters: before.shards.clone(),
            last: (now, before),
            began: now,
            sampled: now,
            printed: now,
            intervals: Vec::new(),
            p99_of,
            p99_ns: 0,
            synced,
            keep,
            name: phase.name,
            total,
            done: 0,
            bar,
        }
    }

    /// Returns the time of the next sample.
    pub(crate) fn due(&self) -> Instant {
        self.sampled + if self.intervals.len() < QUICK_SAMPLES { SAMPLE_EVERY } else { LINE_EVERY }
    }

    pub(crate) fn sample(&mut self) {
        let now = Instant::now();
        // A syncer hands over its histograms between two syncs. Waiting for that and merging them takes some
        // milliseconds of a core from the run.
        let every = if self.keep { LINE_EVERY } else { SYNCED_HISTOGRAMS_EVERY };
        let stages = if !self.synced || now - self.last.0 >= every { self.histograms(now) } else { Vec::new() };
        self.interval(now, stages);
    }

    fn histograms(&mut self, now: Instant) -> Vec<Histogram<u64>> {
        let metrics = self.engine.metrics(HANDED_OVER_IN);
        let since = |stage: &Stage| difference(metrics.histogram(*stage), self.last.1.histogram(*stage));
        let stages: Vec<_> = Stage::ALL.iter().map(since).collect();
        self.p99_ns = stages[self.p99_of as usize].value_at_quantile(0.99);
        self.last = (now, metrics);
        if self.keep { stages } else { Vec::new() }
    }

    fn interval(&mut self, now: Instant, stages: Vec<Histogram<u64>>) {
        let counters = self.engine.shard_metrics();
        let total = |of: fn(&ShardMetrics) -> u64| counters.iter().map(of).sum::<u64>();
        let since = |of: fn(&ShardMetrics) -> u64| total(of) - self.counters.iter().map(of).sum::<u64>();
        let interval = Interval {
            from: self.sampled - self.began,
            to: now - self.began,
            appended: since(|shard| shard.appended),
            bytes: since(|shard| shard.appended_bytes),
            synced_bytes: since(|shard| shard.synced_bytes),
            backlog: total(|shard| shard.backlog),
            segments_begun: total(|shard| shard.segments_begun),
            segments_freed: total(|shard| shard.segments_freed),
            stages,
        };
        self.done += interval.appended;
        let full_disk = counters.iter().find_map(|shard| shard.storage_full_why.clone());
        self.print(&interval, now, full_disk.as_deref());
        self.intervals.push(interval);
        self.counters = counters;
        self.sampled = now;
    }

    fn print(&mut self, interval: &Interval, now: Instant, full_disk: Option<&str>) {
        let mut text = format!(
            "{}, backlog {}, p99 to appended {}",
            report::rate(interval.per_second()),
            interval.backlog,
            report::ns(self.p99_ns)
        );
        if let Some(why) = full_disk {
            text += &format!("; waiting: {why}");
        }
        match &self.bar {
            Some(bar) => {
                bar.set_position(self.done);
                bar.set_message(text);
            }
            None if now - self.printed >= LINE_EVERY => {
                self.printed = now;
                let share = self
                    .total
                    .map_or(String::new(), |total| format!("{:3.0} % ", 100.0 * self.done as f64 / total as f64));
                say!("{:>5.1} s  {}  {share}{text}", interval.to.as_secs_f64(), self.name);
            }
            None => {}
        }
    }

    /// Takes the last sample, with histograms, and returns all intervals.
    pub(crate) fn finish(mut self) -> Vec<Interval> {
        let now = Instant::now();
        let stages = self.histograms(now);
        self.interval(now, stages);
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        self.intervals
    }
}

fn bar(name: &'static str, total: Option<u64>) -> ProgressBar {
    let bar = total.map_or_else(ProgressBar::no_length, ProgressBar::new);
    let shape = if total.is_some() {
        "{prefix} {wide_bar} {percent:>3} %  {msg}"
    } else {
        "{prefix} {elapsed} {spinner}  {msg}"
    };
    if let Ok(style) = ProgressStyle::with_template(shape) {
        bar.set_style(style);
    }
    bar.set_prefix(name);
    bar
}

/// Measures the delay with which the system wakes a thread that sleeps for 1 ms.
pub(crate) fn jitter(stop: &AtomicBool) -> Histogram<u64> {
    const SLEEP: Duration = Duration::from_millis(1);
    let mut late = histogram();
    while !stop.load(Ordering::Relaxed) {
        let began = Instant::now();
        std::thread::sleep(SLEEP);
        late.saturating_record(began.elapsed().saturating_sub(SLEEP).as_nanos() as u64);
    }
    late
}
