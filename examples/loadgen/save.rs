//! Writes the files of `--out`: figures for scripts, histograms for other tools, a report for people.

use std::fs::{self, File};
use std::io::{BufWriter, Write as _};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use corelane::metrics::{Stage, write_hgrm, write_hlog};
use hdrhistogram::Histogram;
use serde_json::Value;

use crate::load::histogram;
use crate::output::{STAGES, Summary, byte_size, grouped};
use crate::report::{self, LoadPoint, Report, Tick};
use crate::search::Step;
use crate::watch::Interval;

/// Length of an interval of the `.hlog`, in seconds.
const INTERVAL_SECONDS: f64 = 1.0;

/// The shortest interval that is plotted. A shorter one, such as the last of a run, would show as a spike or a dip.
const TICK_MIN: Duration = Duration::from_millis(50);

/// Writes every file of a report into `dir`.
pub(crate) fn save(dir: &Path, summary: &Summary<'_>, json: &Value, steps: &[Step]) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
    let put =
        |name: &str, content: &[u8]| fs::write(dir.join(name), content).with_context(|| format!("writing {name}"));
    put("summary.json", &serde_json::to_vec_pretty(json)?)?;
    put("timeseries.csv", csv(&summary.run.measured.intervals, summary.args.rate > 0).as_bytes())?;
    put("report.html", report::html(&report(summary, steps)).as_bytes())?;
    for (name, stage) in shown(summary) {
        let mut out = BufWriter::new(
            File::create(dir.join(format!("{name}.hgrm"))).with_context(|| format!("creating {name}.hgrm"))?,
        );
        write_hgrm(summary.run.measured.stage(stage), &mut out)
            .and_then(|()| out.flush())
            .with_context(|| format!("writing {name}.hgrm"))?;
    }
    let mut out = BufWriter::new(File::create(dir.join("latency.hlog")).context("creating latency.hlog")?);
    let intervals = seconds(&summary.run.measured.intervals, &shown(summary));
    let intervals: Vec<_> =
        intervals.iter().map(|(name, from, length, stage)| (name.as_str(), *from, *length, stage.clone())).collect();
    write_hlog(&intervals, &mut out).and_then(|()| out.flush()).context("writing latency.hlog")
}

/// Returns the measured stages with the names of their files.
fn shown(summary: &Summary<'_>) -> Vec<(String, Stage)> {
    let corrected = summary.args.rate > 0;
    let both = |(name, _, plain, due): (&str, &str, Stage, Stage)| {
        let plain = (name.to_owned(), plain);
        if corrected { vec![(format!("{name}_due"), due), plain] } else { vec![plain] }
    };
    let measured = |(_, stage): &(String, Stage)| !summary.run.measured.stage(*stage).is_empty();
    STAGES.into_iter().flat_map(both).filter(measured).collect()
}

/// Returns one histogram per stage and second, with name, start and length.
fn seconds(intervals: &[Interval], stages: &[(String, Stage)]) -> Vec<(String, f64, f64, Histogram<u64>)> {
    let mut out = Vec::new();
    let mut rest = intervals;
    while let Some(first) = rest.first() {
        let from = first.from.as_secs_f64();
        let whole = rest.iter().position(|interval| interval.to.as_secs_f64() - from >= INTERVAL_SECONDS);
        let (second, later) = rest.split_at(whole.map_or(rest.len(), |last| last + 1));
        let length = second.last().map_or(from, |last| last.to.as_secs_f64()) - from;
        for (name, stage) in stages {
            let mut sum = histogram();
            for measured in second.iter().filter_map(|interval| interval.stage(*stage)) {
                sum.add(measured).expect("histograms of equal bounds add");
            }
            out.push((name.clone(), from, length, sum));
        }
        rest = later;
    }
    out
}

fn csv(intervals: &[Interval], corrected: bool) -> String {
    let (append, durable) =
        if corrected { (Stage::AppendedDue, Stage::DurableDue) } else { (Stage::Appended, Stage::Durable) };
    let mut out = String::from(
        "seconds,events_per_second,bytes_per_second,backlog,append_p50_ns,append_p99_ns,append_max_ns,durable_p50_ns,durable_p99_ns,durable_max_ns,segments_begun,segments_freed\n",
    );
    for interval in intervals {
        let bytes_per_second = interval.bytes as f64 / (interval.to - interval.from).as_secs_f64();
        out += &format!(
            "{:.3},{:.0},{bytes_per_second:.0},{}",
            interval.to.as_secs_f64(),
            interval.per_second(),
            interval.backlog
        );
        for stage in [append, durable].map(|stage| interval.stage(stage).filter(|stage| !stage.is_empty())) {
            let value = |of: fn(&Histogram<u64>) -> u64| stage.map_or(String::new(), |stage| of(stage).to_string());
            out += &format!(
                ",{},{},{}",
                value(|h| h.value_at_quantile(0.5)),
                value(|h| h.value_at_quantile(0.99)),
                value(Histogram::max)
            );
        }
        out += &format!(",{},{}\n", interval.segments_begun, interval.segments_freed);
    }
    out
}

fn report(summary: &Summary<'_>, steps: &[Step]) -> Report {
    let (args, measured) = (summary.args, &summary.run.measured);
    let durability = args.durability_name();
    let p99_of = if args.rate > 0 { Stage::AppendedDue } else { Stage::Appended };
    // Histograms are read less often than counters; each covers all intervals since the one before.
    let p99_from = |rest: &[Interval]| {
        rest.iter().find_map(|interval| interval.stage(p99_of)).map_or(0, |stage| stage.value_at_quantile(0.99))
    };
    let tick = |(n, interval): (usize, &Interval)| Tick {
        seconds: interval.to.as_secs_f64(),
        events_per_second: interval.per_second(),
        p99_ns: p99_from(&measured.intervals[n..]),
        backlog: interval.backlog,
    };
    let point = |step: &Step| LoadPoint {
        offered: step.offered,
        achieved: step.achieved,
        p50_ns: step.p50_ns,
        p99_ns: step.p99_ns,
    };
    let mut facts: Vec<_> = summary.facts().into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    facts.push(("command".to_owned(), std::env::args().skip(1).collect::<Vec<_>>().join(" ")));
    Report {
        title: format!("corelane: {} events, {durability}", grouped(measured.appended)),
        facts,
        headline: headline(summary),
        warnings: summary.warnings(),
        stages: shown(summary)
            .iter()
            .map(|(name, stage)| report_stage(name, measured.stage(*stage), &durability))
            .collect(),
        timeseries: measured
            .intervals
            .iter()
            .enumerate()
            .filter(|(n, interval)| *n == 0 || interval.to - interval.from >= TICK_MIN)
            .map(tick)
            .collect(),
        shards: (0..).zip(measured.shards.iter().copied()).collect(),
        load: steps.iter().map(point).collect(),
        integrity: summary.counts().into_iter().map(|(name, count)| (name.to_owned(), count)).collect(),
    }
}

fn headline(summary: &Summary<'_>) -> Vec<(String, String)> {
    let (args, measured) = (summary.args, &summary.run.measured);
    let durability = args.durability_name();
    let (to, plain, due) = if args.synced() {
        ("durable", Stage::Durable, Stage::DurableDue)
    } else {
        ("appended", Stage::Appended, Stage::AppendedDue)
    };
    let (from, stage) = if args.rate > 0 { ("due", due) } else { ("publish", plain) };
    let stage = measured.stage(stage);
    let mut headline = vec![
        (format!("throughput, {durability}"), report::rate(measured.per_second())),
        (format!("log written, {durability}"), format!("{}/s", byte_size(measured.bytes_per_second()))),
        (format!("{from} → {to} p50, {durability}"), report::ns(stage.value_at_quantile(0.5))),
        (format!("{from} → {to} p99, {durability}"), report::ns(stage.value_at_quantile(0.99))),
    ];
    headline
        .extend(summary.limit_ratio().map(|ratio| (format!("engine ÷ limit, {durability}"), format!("{ratio:.3}"))));
    headline
}

fn report_stage(name: &str, measured: &Histogram<u64>, durability: &str) -> report::Stage {
    let at = |quantile: f64| measured.value_at_quantile(quantile);
    let label = STAGES.iter().find_map(|(stage, label, ..)| match name.strip_prefix(stage)? {
        "" => Some((*label).to_owned()),
        _ => Some(label.replace("publish", "due")),
    });
    report::Stage {
        name: label.unwrap_or_else(|| name.to_owned()),
        durability: durability.to_owned(),
        count: measured.len(),
        p50: at(0.5),
        p90: at(0.9),
        p99: at(0.99),
        p999: at(0.999),
        p9999: at(0.9999),
        max: measured.max(),
        curve: measured.iter_quantiles(5).map(|step| (100.0 * step.quantile(), step.value_iterated_to())).collect(),
    }
}
