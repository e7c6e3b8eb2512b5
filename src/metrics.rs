//! Counters and latency histograms. Each has one writer on the hot path; a reader merges them on request.
//!
//! A recording thread owns its histograms. A reader leaves an empty set in an `Exchange`, and between two turns the
//! owner swaps its full set for the empty one. So recording takes no lock, and the owner copies nothing.

use std::fmt::Write as _;
use std::io;
use std::sync::Arc;

use hdrhistogram::Histogram;

use crate::clock::{Lateness, lateness_ns};
use crate::error::ShardFailure;
use crate::event::{Offset, Sequence, ShardId};
use crate::sync::{AtomicBool, AtomicU64, Mutex, Ordering, lock};

/// The quantity that a histogram measures, in nanoseconds except for [`Stage::Batch`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Stage {
    /// From publish until the shard took the event from its lane.
    Ring,
    /// From publish until the event was appended and visible to readers.
    Appended,
    /// From publish until every inline handler had returned for the event.
    Handled,
    /// From publish until the syncer published the event as durable. Events whose publish times are within 1 µs are
    /// recorded together, with the earliest time.
    Durable,
    /// As `Ring`, counted from the due time of the event ([`crate::Producer::publish_due`]).
    RingDue,
    /// As `Appended`, counted from the due time of the event.
    AppendedDue,
    /// As `Handled`, counted from the due time of the event.
    HandledDue,
    /// As `Durable`, counted from the due time of the event.
    DurableDue,
    /// Duration of a turn that found work.
    Turn,
    /// Events per batch.
    Batch,
    /// Duration of one sync.
    Sync,
}

const STAGES: usize = 11;

impl Stage {
    /// All stages, in order.
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

    /// Returns the name of the stage, as used in Prometheus metrics.
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

/// The largest value that a histogram can distinguish: 73 minutes, or the same number of events. Larger values are
/// recorded as this one and counted by [`Metrics::beyond_range`].
const NS_MAX: u64 = (1 << 42) - 1;

fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, NS_MAX, 3).expect("the bounds are valid constants")
}

/// A set of histograms, one for each stage that its owner records.
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

    fn merge_into(&mut self, totals: &mut [Arc<Histogram<u64>>]) {
        for (from, to) in self.0.iter_mut().zip(totals) {
            // Adding a set of histograms takes milliseconds in a build without optimisation, even if they are empty.
            if let Some(from) = from.as_mut().filter(|from| !from.is_empty()) {
                // Both sides have the same bounds, so adding cannot fail.
                Arc::make_mut(to).add(&*from).expect("histograms of equal bounds add");
                from.reset();
            }
        }
    }
}

/// The slot through which a set of histograms changes hands. While a set is wanted, the slot is empty.
#[derive(Debug)]
pub(crate) struct Exchange {
    wanted: AtomicBool,
    slot: Mutex<Handed>,
}

/// A set of histograms, and the end of its recorder.
#[derive(Debug)]
struct Handed {
    histograms: Box<Histograms>,
    /// `true` once the recorder is gone and its last values are in `histograms`.
    is_closed: bool,
}

impl Exchange {
    /// Requests the owner's histograms. The owner hands them over between two turns.
    pub(crate) fn ask(&self) {
        self.ask_in(&lock(&self.slot));
    }

    /// Does the same under the lock, so that a recorder that ends meanwhile leaves no request without an owner.
    fn ask_in(&self, slot: &Handed) {
        if !slot.is_closed {
            // Release: pairs with the Acquire in `is_wanted`.
            self.wanted.store(true, Ordering::Release);
        }
    }

    #[inline]
    pub(crate) fn is_wanted(&self) -> bool {
        // Acquire: pairs with the Release stores in `ask`, `Recorder::swap` and its drop. The lock of `slot` orders the
        // histograms.
        self.wanted.load(Ordering::Acquire)
    }
}

/// The recording side of an [`Exchange`].
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
            slot: Mutex::new(Handed { histograms: Box::new(Histograms::new(stages)), is_closed: false }),
        });
        (Self { active: Box::new(Histograms::new(stages)), exchange: Arc::clone(&exchange), enabled }, exchange)
    }

    /// Records `count` events with the value `value`.
    #[inline]
    pub(crate) fn record(&mut self, stage: Stage, value: u64, count: u64) {
        if self.enabled {
            self.active.record(stage, value, count);
        }
    }

    /// Records `count` latencies of `ns` since publish, for events published `late` after their due time.
    #[inline]
    pub(crate) fn latency(&mut self, stage: Stage, due: Stage, ns: u64, late: Option<Lateness>, count: u64) {
        self.record(stage, ns, count);
        if let Some(late) = late {
            self.record(due, ns.saturating_add(lateness_ns(late)), count);
        }
    }

    /// Hands over the recorded histograms if they are wanted.
    #[inline]
    pub(crate) fn exchange(&mut self) {
        if self.exchange.is_wanted() {
            self.swap();
        }
    }

    #[cold]
    fn swap(&mut self) {
        let mut slot = lock(&self.exchange.slot);
        std::mem::swap(&mut self.active, &mut slot.histograms);
        // Release: pairs with the Acquire in `Exchange::is_wanted`: a reader that sees `false` finds the recorded set.
        self.exchange.wanted.store(false, Ordering::Release);
    }

    pub(crate) fn exchange_handle(&self) -> &Exchange {
        &self.exchange
    }
}

impl Drop for Recorder {
    /// Adds the last recorded values to the slot, where a reader can still fetch them.
    fn drop(&mut self) {
        let mut slot = lock(&self.exchange.slot);
        for (from, to) in self.active.0.iter().zip(&mut slot.histograms.0) {
            if let (Some(from), Some(to)) = (from, to) {
                to.add(from).expect("histograms of equal bounds add");
            }
        }
        slot.is_closed = true;
        // Release: pairs with the Acquire in `Exchange::is_wanted`.
        self.exchange.wanted.store(false, Ordering::Release);
    }
}

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),+ $(,)?) => {
        /// The counters of one shard. Each is written by one thread.
        #[derive(Debug, Default)]
        pub(crate) struct Counters { $(pub(crate) $name: crate::sync::CachePadded<Counter>,)+ }

        /// The metrics of one shard at one moment. Counts start when the engine opens.
        #[derive(Debug, Clone)]
        #[non_exhaustive]
        pub struct ShardMetrics {
            /// The shard.
            pub shard: ShardId,
            $($(#[$doc])* pub $name: u64,)+
            /// Events accepted by producers of this shard.
            pub published: u64,
            /// Events accepted but not yet appended.
            pub backlog: u64,
            /// Sequence of the next event. Compare it with the position of a view.
            pub sequence: Sequence,
            /// Offset of the end of the appended log.
            pub appended_to: Offset,
            /// Offset of the end of the durable log.
            pub durable_to: Offset,
            /// Segments held.
            pub segments: usize,
            /// `true` while the shard waits for its storage: for space, or because quota, descriptors or memory are
            /// exhausted.
            pub storage_full: bool,
            /// The operation that waits for storage, and the error of the operating system.
            pub storage_full_why: Option<Arc<str>>,
            /// The failure of the shard, if it failed.
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

            /// Returns every counter with its name.
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
    /// Answered commands that were rejected, for any reason.
    rejected,
    /// Answered commands that repeated an earlier one and changed nothing.
    repeated,
    /// Events for which every inline handler has returned.
    handled,
    /// Events put into quarantine because an inline handler failed on them.
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

/// A number that one thread changes and others read.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`. Only the one writer calls this.
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

/// The metrics of an engine at one moment, returned by [`crate::Engine::metrics`].
///
/// ```
/// # use corelane::metrics::{Metrics, Stage};
/// # fn example(metrics: &Metrics) {
/// let events: u64 = metrics.shards.iter().map(|shard| shard.appended).sum();
/// let p99_ns = metrics.histogram(Stage::Appended).value_at_quantile(0.99);
/// println!("{events} events appended, 99 % of them within {p99_ns} ns");
/// # }
/// ```
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Metrics {
    /// The metrics of each shard, in order.
    pub shards: Vec<ShardMetrics>,
    /// `true` if the histograms include everything that was recorded before the call. `false` if a thread did not hand
    /// over its newest values by the deadline; a later call has them.
    pub is_complete: bool,
    latency: Vec<Arc<Histogram<u64>>>,
}

impl Metrics {
    pub(crate) fn new(shards: Vec<ShardMetrics>, is_complete: bool, latency: Vec<Arc<Histogram<u64>>>) -> Self {
        Self { shards, is_complete, latency }
    }

    /// Returns the histogram of a stage over all shards, since the engine opened.
    #[must_use]
    pub fn histogram(&self, stage: Stage) -> &Histogram<u64> {
        &self.latency[stage as usize]
    }

    /// Returns the number of recorded values at or above the histogram's limit of 73 minutes, whose exact size is
    /// unknown.
    #[must_use]
    pub fn beyond_range(&self, stage: Stage) -> u64 {
        self.histogram(stage).count_at(NS_MAX)
    }

    /// Returns all metrics in the Prometheus text exposition format.
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

    /// Writes the percentile distribution of a stage in the `.hgrm` text format, in microseconds.
    ///
    /// # Errors
    /// Returns the error of `out`.
    pub fn write_hgrm(&self, stage: Stage, out: &mut impl io::Write) -> io::Result<()> {
        write_hgrm(self.histogram(stage), out)
    }
}

/// Appends a line.
fn line(out: &mut String, text: std::fmt::Arguments<'_>) {
    out.write_fmt(text).expect("writing to a String cannot fail");
    out.push('\n');
}

/// Writes a histogram of nanoseconds in the `.hgrm` percentile format, in microseconds.
///
/// # Errors
/// Returns the error of `out`.
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

/// The count of all values up to an iteration step.
trait TotalCount {
    fn count_since_last_iteration_total(&self, histogram: &Histogram<u64>) -> u64;
}

impl TotalCount for hdrhistogram::iterators::IterationValue<u64> {
    fn count_since_last_iteration_total(&self, histogram: &Histogram<u64>) -> u64 {
        histogram.count_between(0, self.value_iterated_to())
    }
}

/// Writes histograms as an `.hlog` interval log. Each interval is `(tag, start in seconds, length in seconds,
/// histogram)`.
///
/// # Errors
/// Returns the error of `out` or of the serialiser.
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

/// The values recorded since the engine opened, from all exchanges. A histogram takes 270 KB, so it is shared with the
/// [`Metrics`] that were returned, and copied only if one of them is still held when new values arrive.
#[derive(Debug)]
pub(crate) struct Totals(Vec<Arc<Histogram<u64>>>);

impl Totals {
    pub(crate) fn new() -> Self {
        Self(Stage::ALL.iter().map(|_| Arc::new(histogram())).collect())
    }

    /// Adds the values that the owner of `exchange` has handed over, if any.
    pub(crate) fn fetch(&mut self, exchange: &Exchange) {
        self.fetch_from(exchange, &mut lock(&exchange.slot));
    }

    /// Does the same as [`Totals::fetch`], and asks the owner for the values it has recorded since.
    pub(crate) fn fetch_and_ask(&mut self, exchange: &Exchange) {
        // Under one lock: if the owner handed over a set in between, it would get the same set back.
        let mut slot = lock(&exchange.slot);
        self.fetch_from(exchange, &mut slot);
        exchange.ask_in(&slot);
    }

    fn fetch_from(&mut self, exchange: &Exchange, slot: &mut Handed) {
        // While a set is wanted, the slot is empty, and the owner must not wait for its lock.
        if !exchange.is_wanted() {
            slot.histograms.merge_into(&mut self.0);
        }
    }

    pub(crate) fn histograms(&self) -> Vec<Arc<Histogram<u64>>> {
        self.0.clone()
    }
}
