//! Counters and latency histograms: single-writer on the hot path, merged when somebody asks.
//!
//! A thread that records owns its histograms. Who wants them leaves an empty set in an [`Exchange`];
//! the owner swaps it for the full one between two turns. So recording takes no lock and the owner
//! copies nothing.

use std::fmt::Write as _;
use std::io;
use std::sync::Arc;

use hdrhistogram::Histogram;

use crate::clock::{Lateness, lateness_ns};
use crate::error::ShardFailure;
use crate::event::{Offset, Sequence, ShardId};
use crate::sync::{AtomicBool, AtomicU64, Mutex, Ordering, lock};

/// What a histogram measures. Nanoseconds, except [`Stage::Batch`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Stage {
    /// From publish until the shard took the event out of its lane.
    Ring,
    /// From publish until the event was appended: visible to readers.
    Appended,
    /// From publish until every inline handler had it.
    Handled,
    /// From publish until the event was durable, as the syncer saw it (runs of events are merged within 1 µs, to the earlier).
    Durable,
    /// As `Ring`, from the time the event was due ([`crate::Producer::publish_due`]).
    RingDue,
    /// As `Appended`, from the time the event was due.
    AppendedDue,
    /// As `Handled`, from the time the event was due.
    HandledDue,
    /// As `Durable`, from the time the event was due.
    DurableDue,
    /// Length of a turn that found work.
    Turn,
    /// Events per batch.
    Batch,
    /// Length of one sync.
    Sync,
}

const STAGES: usize = 11;

impl Stage {
    /// All of them, in order.
    pub const ALL: [Stage; STAGES] = [
        Stage::Ring,
        Stage::Appended,
        Stage::Handled,
        Stage::Durable,
        Stage::RingDue,
        Stage::AppendedDue,
        Stage::HandledDue,
        Stage::DurableDue,
        Stage::Turn,
        Stage::Batch,
        Stage::Sync,
    ];

    /// A name for people and metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Stage::Ring => "ring",
            Stage::Appended => "appended",
            Stage::Handled => "handled",
            Stage::Durable => "durable",
            Stage::RingDue => "ring_due",
            Stage::AppendedDue => "appended_due",
            Stage::HandledDue => "handled_due",
            Stage::DurableDue => "durable_due",
            Stage::Turn => "turn",
            Stage::Batch => "batch",
            Stage::Sync => "sync",
        }
    }
}

/// Largest value a histogram tells apart: 73 minutes, or as many events. What is longer is recorded as that, and shows as
/// [`Metrics::beyond_range`].
const NS_MAX: u64 = (1 << 42) - 1;

fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, NS_MAX, 3).expect("the bounds are valid constants")
}

/// A set of histograms, one per stage that its owner records.
#[derive(Debug)]
pub(crate) struct Histograms([Option<Histogram<u64>>; STAGES]);

impl Histograms {
    fn new(stages: &[Stage]) -> Self {
        Self(Stage::ALL.map(|stage| stages.contains(&stage).then(histogram)))
    }

    #[inline]
    fn record(&mut self, stage: Stage, value: u64, count: u64) {
        if let Some(histogram) = &mut self.0[stage as usize] {
            histogram.saturating_record_n(value, count);
        }
    }

    fn merge_into(&mut self, totals: &mut [Histogram<u64>]) {
        for (from, to) in self.0.iter_mut().zip(totals) {
            if let Some(from) = from {
                // Same bounds on both sides, so adding cannot fail.
                to.add(&*from).expect("histograms of equal bounds add");
                from.reset();
            }
        }
    }
}

/// Where a set of histograms changes hands.
#[derive(Debug)]
pub(crate) struct Exchange {
    wanted: AtomicBool,
    closed: AtomicBool,
    slot: Mutex<Box<Histograms>>,
}

impl Exchange {
    /// Asks the owner for its figures; it answers between two turns.
    pub(crate) fn ask(&self) {
        if !self.closed.load(Ordering::Acquire) {
            self.wanted.store(true, Ordering::Release);
        }
    }

    #[inline]
    pub(crate) fn is_wanted(&self) -> bool {
        self.wanted.load(Ordering::Acquire)
    }
}

/// The recording side.
#[derive(Debug)]
pub(crate) struct Recorder {
    active: Box<Histograms>,
    exchange: Arc<Exchange>,
    enabled: bool,
}

impl Recorder {
    pub(crate) fn new(stages: &[Stage], enabled: bool) -> (Self, Arc<Exchange>) {
        let exchange = Arc::new(Exchange {
            wanted: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            slot: Mutex::new(Box::new(Histograms::new(stages))),
        });
        (Self { active: Box::new(Histograms::new(stages)), exchange: Arc::clone(&exchange), enabled }, exchange)
    }

    /// Records `count` events at `value`.
    #[inline]
    pub(crate) fn record(&mut self, stage: Stage, value: u64, count: u64) {
        if self.enabled {
            self.active.record(stage, value, count);
        }
    }

    /// Records `count` latencies of `ns` since publish, for events that were published `late` after they were due.
    #[inline]
    pub(crate) fn latency(&mut self, stage: Stage, due: Stage, ns: u64, late: Option<Lateness>, count: u64) {
        self.record(stage, ns, count);
        if let Some(late) = late {
            self.record(due, ns.saturating_add(lateness_ns(late)), count);
        }
    }

    /// Hands over what was recorded, if somebody wants it.
    #[inline]
    pub(crate) fn exchange(&mut self) {
        if self.exchange.is_wanted() {
            self.swap();
        }
    }

    #[cold]
    fn swap(&mut self) {
        std::mem::swap(&mut self.active, &mut lock(&self.exchange.slot));
        // Release: pairs with the Acquire of who waits for it to fall.
        self.exchange.wanted.store(false, Ordering::Release);
    }

    pub(crate) fn exchange_handle(&self) -> &Exchange {
        &self.exchange
    }
}

impl Drop for Recorder {
    /// The owner ends: what it recorded last stays to be fetched.
    fn drop(&mut self) {
        {
            let mut slot = lock(&self.exchange.slot);
            for (from, to) in self.active.0.iter().zip(&mut slot.0) {
                if let (Some(from), Some(to)) = (from, to) {
                    to.add(from).expect("histograms of equal bounds add");
                }
            }
        }
        self.exchange.closed.store(true, Ordering::Release);
        self.exchange.wanted.store(false, Ordering::Release);
    }
}

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),+ $(,)?) => {
        /// One shard's counters. Each is written by one thread.
        #[derive(Debug, Default)]
        pub(crate) struct Counters { $(pub(crate) $name: crate::sync::CachePadded<Counter>,)+ }

        /// One shard's figures at one moment. Counts are since the engine was opened.
        #[derive(Debug, Clone)]
        #[non_exhaustive]
        pub struct ShardMetrics {
            /// The shard.
            pub shard: ShardId,
            $($(#[$doc])* pub $name: u64,)+
            /// Events accepted by producers of this shard.
            pub published: u64,
            /// Events accepted and not yet appended.
            pub backlog: u64,
            /// Sequence of the next event: what a view's position is compared with.
            pub sequence: Sequence,
            /// End of what is appended.
            pub appended_to: Offset,
            /// End of what is durable.
            pub durable_to: Offset,
            /// Segments held.
            pub segments: usize,
            /// The shard waits for its storage: for space, or because quota, descriptors or memory are exhausted.
            pub storage_full: bool,
            /// What was to be done then, and what the system said.
            pub storage_full_why: Option<Arc<str>>,
            /// Why the shard failed, if it did.
            pub failure: Option<ShardFailure>,
        }

        impl ShardMetrics {
            pub(crate) fn of(shard: ShardId, counters: &Counters) -> Self {
                Self {
                    shard,
                    $($name: counters.$name.get(),)+
                    published: 0,
                    backlog: 0,
                    sequence: Sequence(0),
                    appended_to: Offset(0),
                    durable_to: Offset(0),
                    segments: 0,
                    storage_full: false,
                    storage_full_why: None,
                    failure: None,
                }
            }

            /// Every counter with its name.
            pub fn counters(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name),)+ ("published", self.published)]
            }
        }
    };
}

counters! {
    /// Events appended.
    appended,
    /// Bytes appended, headers and padding included.
    appended_bytes,
    /// Turns that found work.
    turns,
    /// Commands answered.
    commands,
    /// Of those, how many were refused, for whatever reason.
    rejected,
    /// Of those, how many were repeats of an earlier one and did nothing.
    repeated,
    /// Events that every inline handler has had.
    handled,
    /// Events an inline handler failed on and quarantined.
    quarantined,
    /// Keys in the table.
    keys,
    /// Syncs that returned.
    syncs,
    /// Bytes made durable.
    synced_bytes,
    /// Segments begun.
    segments_begun,
    /// Segments freed by retention.
    segments_freed,
    /// Times the shard found no segment ready and had to wait for one.
    segment_waits,
}

/// A number that one thread moves and others read.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    /// Only the one writer calls this.
    #[inline]
    pub(crate) fn add(&self, n: u64) {
        self.0.store(self.0.load(Ordering::Relaxed) + n, Ordering::Relaxed);
    }

    #[inline]
    pub(crate) fn set(&self, n: u64) {
        self.0.store(n, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

type Gauge = (&'static str, fn(&ShardMetrics) -> u64);

/// All figures of an engine at one moment.
#[derive(Debug, Clone)]
pub struct Metrics {
    /// Shard by shard.
    pub shards: Vec<ShardMetrics>,
    latency: Vec<Histogram<u64>>,
}

impl Metrics {
    pub(crate) fn new(shards: Vec<ShardMetrics>, latency: Vec<Histogram<u64>>) -> Self {
        Self { shards, latency }
    }

    /// The histogram of a stage over all shards, since the engine was opened.
    #[must_use]
    pub fn histogram(&self, stage: Stage) -> &Histogram<u64> {
        &self.latency[stage as usize]
    }

    /// Values of a stage's histogram that are as long as it tells apart, 73 minutes, or longer: how much longer is not known.
    #[must_use]
    pub fn beyond_range(&self, stage: Stage) -> u64 {
        self.histogram(stage).count_at(NS_MAX)
    }

    /// Everything in the Prometheus text exposition format.
    #[must_use]
    pub fn prometheus(&self) -> String {
        let mut out = String::new();
        let names: Vec<_> = self.shards.first().map(ShardMetrics::counters).unwrap_or_default();
        for (i, (name, _)) in names.iter().enumerate() {
            let kind = if *name == "keys" { "gauge" } else { "counter" };
            let suffix = if *name == "keys" { "" } else { "_total" };
            line(&mut out, format_args!("# TYPE corelane_{name}{suffix} {kind}"));
            for shard in &self.shards {
                line(
                    &mut out,
                    format_args!("corelane_{name}{suffix}{{shard=\"{}\"}} {}", shard.shard, shard.counters()[i].1),
                );
            }
        }
        let gauges: [Gauge; 6] = [
            ("backlog", |s| s.backlog),
            ("appended_offset", |s| s.appended_to.0),
            ("durable_offset", |s| s.durable_to.0),
            ("segments", |s| s.segments as u64),
            ("storage_full", |s| u64::from(s.storage_full)),
            ("failed", |s| u64::from(s.failure.is_some())),
        ];
        for (name, value) in gauges {
            line(&mut out, format_args!("# TYPE corelane_{name} gauge"));
            for shard in &self.shards {
                line(&mut out, format_args!("corelane_{name}{{shard=\"{}\"}} {}", shard.shard, value(shard)));
            }
        }
        for stage in Stage::ALL {
            self.prometheus_stage(&mut out, stage);
        }
        out
    }

    fn prometheus_stage(&self, out: &mut String, stage: Stage) {
        let histogram = self.histogram(stage);
        let (name, scale) = match stage {
            Stage::Batch => (String::from("corelane_batch_events"), 1.0),
            _ => (format!("corelane_{}_seconds", stage.name()), 1e-9),
        };
        line(out, format_args!("# TYPE {name} summary"));
        for quantile in [0.5, 0.9, 0.99, 0.999, 0.9999] {
            let value = histogram.value_at_quantile(quantile) as f64 * scale;
            line(out, format_args!("{name}{{quantile=\"{quantile}\"}} {value}"));
        }
        line(out, format_args!("{name}_sum {}", histogram.mean() * histogram.len() as f64 * scale));
        line(out, format_args!("{name}_count {}", histogram.len()));
        line(out, format_args!("# TYPE {name}_beyond_range_total counter"));
        line(out, format_args!("{name}_beyond_range_total {}", self.beyond_range(stage)));
    }

    /// Writes a stage's percentile distribution in the `.hgrm` text format (values in µs).
    ///
    /// # Errors
    /// What the writer returns.
    pub fn write_hgrm(&self, stage: Stage, out: &mut impl io::Write) -> io::Result<()> {
        write_hgrm(self.histogram(stage), out)
    }
}

/// Writing to a `String` cannot fail.
fn line(out: &mut String, text: std::fmt::Arguments<'_>) {
    out.write_fmt(text).expect("writing to a String cannot fail");
    out.push('\n');
}

/// Writes a histogram of nanoseconds in the `.hgrm` percentile format, in microseconds.
///
/// # Errors
/// What the writer returns.
pub fn write_hgrm(histogram: &Histogram<u64>, out: &mut impl io::Write) -> io::Result<()> {
    writeln!(out, "{:>12} {:>14} {:>10} {:>14}\n", "Value", "Percentile", "TotalCount", "1/(1-Percentile)")?;
    for step in histogram.iter_quantiles(5) {
        let quantile = step.quantile();
        write!(
            out,
            "{:>12.3} {:>2.12} {:>10}",
            step.value_iterated_to() as f64 / 1e3,
            quantile,
            step.count_since_last_iteration_total(histogram)
        )?;
        if quantile < 1.0 { writeln!(out, " {:>14.2}", 1.0 / (1.0 - quantile))? } else { writeln!(out)? }
    }
    writeln!(out, "#[Mean    = {:>12.3}, StdDeviation   = {:>12.3}]", histogram.mean() / 1e3, histogram.stdev() / 1e3)?;
    writeln!(out, "#[Max     = {:>12.3}, Total count    = {:>12}]", histogram.max() as f64 / 1e3, histogram.len())?;
    writeln!(out, "#[Buckets = {:>12}, SubBuckets     = {:>12}]", histogram.buckets(), 2048)
}

/// Count of values up to an iteration step.
trait TotalCount {
    fn count_since_last_iteration_total(&self, histogram: &Histogram<u64>) -> u64;
}

impl TotalCount for hdrhistogram::iterators::IterationValue<u64> {
    fn count_since_last_iteration_total(&self, histogram: &Histogram<u64>) -> u64 {
        histogram.count_between(0, self.value_iterated_to())
    }
}

/// Writes histograms as an `.hlog` interval log: `(tag, start seconds, length seconds, histogram)` each.
///
/// # Errors
/// What the writer or the serialiser returns.
#[cfg(feature = "hlog")]
pub fn write_hlog(intervals: &[(&str, f64, f64, Histogram<u64>)], out: &mut impl io::Write) -> io::Result<()> {
    use hdrhistogram::serialization::V2DeflateSerializer;
    use hdrhistogram::serialization::interval_log::{IntervalLogWriterBuilder, Tag};

    let mut serializer = V2DeflateSerializer::new();
    let mut builder = IntervalLogWriterBuilder::new();
    let mut log = builder.add_comment("corelane, nanoseconds").begin_log_with(out, &mut serializer).map_err(to_io)?;
    for (tag, start, length, histogram) in intervals {
        let (start, length) = (std::time::Duration::from_secs_f64(*start), std::time::Duration::from_secs_f64(*length));
        log.write_histogram(histogram, start, length, Tag::new(tag)).map_err(to_io)?;
    }
    Ok(())
}

#[cfg(feature = "hlog")]
fn to_io(error: impl std::fmt::Debug) -> io::Error {
    io::Error::other(format!("{error:?}"))
}

/// Everything recorded so far, over all exchanges.
#[derive(Debug)]
pub(crate) struct Totals(Vec<Histogram<u64>>);

impl Totals {
    pub(crate) fn new() -> Self {
        Self(Stage::ALL.iter().map(|_| histogram()).collect())
    }

    /// Fetches what the owner of `exchange` recorded since last time. `wake` makes a sleeping owner look.
    pub(crate) fn fetch(&mut self, exchange: &Exchange, wake: impl Fn()) {
        if !exchange.closed.load(Ordering::Acquire) {
            exchange.wanted.store(true, Ordering::Release);
            wake();
            // An owner that is stuck (in a handler, in a sync) keeps its figures for the next time.
            let patience = std::time::Instant::now() + std::time::Duration::from_millis(200);
            while exchange.is_wanted() && crate::sync::may_wait() && std::time::Instant::now() < patience {
                crate::sync::nap(std::time::Duration::from_micros(50));
            }
        }
        lock(&exchange.slot).merge_into(&mut self.0);
    }

    pub(crate) fn snapshot(&self) -> Vec<Histogram<u64>> {
        self.0.clone()
    }
}
