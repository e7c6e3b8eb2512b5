//! Prints the results: tables for people, one line of JSON for scripts.

use corelane::Pin;
use corelane::metrics::Stage;
use hdrhistogram::Histogram;
use serde_json::{Value, json};

use crate::cli::Args;
use crate::load::{Measured, core_ids, crowded};
use crate::machine::Machine;
use crate::report;
use crate::run::{Run, median, median_run};
use crate::watch::Interval;

/// Name and label of each stage, measured from publishing and from the due time.
pub(crate) const STAGES: [(&str, &str, Stage, Stage); 4] = [
    ("ring", "publish → taken", Stage::Ring, Stage::RingDue),
    ("append", "publish → appended", Stage::Appended, Stage::AppendedDue),
    ("durable", "publish → durable", Stage::Durable, Stage::DurableDue),
    ("end_to_end", "publish → handled", Stage::Handled, Stage::HandledDue),
];

const QUANTILES: [(&str, f64); 5] = [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p999", 0.999), ("p9999", 0.9999)];

/// The data for text, JSON and report.
pub(crate) struct Summary<'a> {
    pub(crate) args: &'a Args,
    pub(crate) machine: &'a Machine,
    pub(crate) runs: &'a [Run],
    /// The median run.
    pub(crate) run: &'a Run,
    /// The time to load the input, if there was one.
    pub(crate) loading: Option<std::time::Duration>,
}

impl<'a> Summary<'a> {
    pub(crate) fn new(
        args: &'a Args,
        machine: &'a Machine,
        runs: &'a [Run],
        loading: Option<std::time::Duration>,
    ) -> Option<Self> {
        Some(Self { args, machine, runs, run: median_run(args, runs)?, loading })
    }

    /// Returns `true` if every run kept every event.
    pub(crate) fn is_whole(&self) -> bool {
        self.runs.iter().all(Run::is_whole)
    }

    pub(crate) fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        if let Pin::Cores(asked) = &self.args.pin {
            let allowed = core_ids();
            let refused: Vec<_> = asked.iter().filter(|core| !allowed.contains(core)).collect();
            if !refused.is_empty() {
                warnings.push(format!("cores {refused:?} are not among {allowed:?}; their threads ran unpinned"));
            }
        }
        if crowded(self.args) {
            let threads = usize::from(self.args.producers) + usize::from(self.args.shards);
            warnings.push(format!(
                "{threads} threads of producers and shards share {} cores; latencies include waiting for a core",
                self.machine.cores
            ));
        }
        if cfg!(debug_assertions) {
            warnings.push("built without optimisation (use cargo run --release --example loadgen)".to_owned());
        }
        let waits = self.run.measured.segment_waits;
        if waits > 0 {
            warnings
                .push(format!("{waits} waits for the next segment to be prepared; the disk was slower than the load"));
        }
        warnings
    }

    /// Name and value of each condition that the figures depend on.
    pub(crate) fn facts(&self) -> Vec<(&'static str, String)> {
        let Args { producers, shards, batch, ring_capacity, seed, .. } = self.args;
        let events = match &self.args.input {
            Some(path) => {
                format!("{} (loaded in {:.1} s)", path.display(), self.loading.unwrap_or_default().as_secs_f64())
            }
            None => format!(
                "{} users, {:?} spread, {} bytes, seed {seed}",
                grouped(self.args.users),
                self.args.key_dist,
                self.args.payload
            )
            .to_lowercase(),
        };
        let sending = if self.args.rate > 0 {
            format!("{} offered by intended time", report::rate(self.args.rate as f64))
        } else {
            format!("full speed in batches of {batch}")
        };
        let mut facts = vec![
            ("durability", durability_text(self.args)),
            ("load", format!("{producers} producers, {shards} shards, lanes of {ring_capacity}, {sending}")),
            ("events", events),
            ("warm-up", format!("{} events, not in any figure", grouped(self.args.warmup()))),
            ("processor", format!("{}, {} cores", self.machine.cpu, self.machine.cores)),
            ("system", format!("{}, data on {}", self.machine.kernel, self.machine.filesystem)),
            ("commit", self.machine.commit.clone()),
        ];
        if self.runs.len() > 1 {
            facts.push((
                "runs",
                format!(
                    "{}; the figures are those of the run with the median {}, ratios are medians",
                    self.runs.len(),
                    if self.args.rate > 0 { "p99" } else { "throughput" }
                ),
            ));
        }
        facts
    }

    /// Returns the text for people.
    pub(crate) fn text(&self) -> String {
        let measured = &self.run.measured;
        let mut out = String::new();
        for (name, value) in self.facts() {
            out += &format!("{name:>11}  {value}\n");
        }
        for warning in self.warnings() {
            out += &format!("{:>11}  {warning}\n", "warning");
        }
        out += &format!(
            "\n{:>11}  {}: {} events in {:.3} s, {}/s [{}]\n",
            "throughput",
            report::rate(measured.per_second()),
            grouped(measured.appended),
            measured.elapsed.as_secs_f64(),
            byte_size(measured.bytes as f64 / measured.elapsed.as_secs_f64()),
            self.args.durability_name(),
        );
        if !measured.flush.is_zero() {
            out += &format!(
                "{:>11}  {:.2} s for the final sync, not in the throughput\n",
                "",
                measured.flush.as_secs_f64()
            );
        }
        out += &self.limits_text();
        out += &stage_table(self.args, measured);
        out += &self.around(measured);
        out += &self.integrity();
        out
    }

    fn around(&self, measured: &Measured) -> String {
        let what = if self.args.rate > 0 { "due → published" } else { "batch accepted" };
        let mut out = row(what, &measured.delay);
        out += &row("1 ms sleep late", &measured.jitter);
        out += &format!(
            "\n{:>11}  at most {} events between publish and append\n",
            "backlog",
            grouped(measured.backlog_max)
        );
        if let Some([(own_before, mapped_before), (own, mapped)]) = measured.memory {
            let grown = |before: u64, after: u64| format!("{} → {}", byte_size(before as f64), byte_size(after as f64));
            out += &format!(
                "{:>11}  {} anonymous, {} mapped log, from beginning to end\n",
                "memory",
                grown(own_before, own),
                grown(mapped_before, mapped)
            );
        }
        let total = measured.appended.max(1) as f64;
        let shares: Vec<_> = measured
            .shards
            .iter()
            .enumerate()
            .map(|(i, events)| format!("{i}: {:.1} %", 100.0 * *events as f64 / total))
            .collect();
        out += &format!("{:>11}  {}\n", "shards", shares.join("  "));
        out
    }

    /// The number of events at every stage.
    pub(crate) fn counts(&self) -> Vec<(&'static str, u64)> {
        let Measured { published, appended, durable, .. } = self.run.measured;
        let mut counts = vec![("published", published), ("appended", appended), ("durable", durable)];
        counts.extend(self.run.replayed().map(|replayed| ("replayed", replayed)));
        counts
    }

    fn integrity(&self) -> String {
        let mut out = String::new();
        if let Some(replay) = &self.run.replay {
            let rate = report::rate(replay.events as f64 / replay.replaying.as_secs_f64());
            let (keys, opening) = (grouped(replay.keys), replay.opening.as_secs_f64());
            out += &format!(
                "{:>11}  reopened in {opening:.2} s; {} events of {keys} keys replayed and checked at {rate}\n",
                "restart",
                grouped(replay.events)
            );
            if replay.freed > 0 {
                out += &format!(
                    "{:>11}  retention had freed {} events; \"replayed\" includes them\n",
                    "",
                    grouped(replay.freed)
                );
            }
        }
        for (n, run) in (1..).zip(self.runs).filter(|(_, run)| !run.is_whole()) {
            let Measured { published, appended, durable, .. } = run.measured;
            out += &format!(
                "{:>11}  run {n}: published {published}, appended {appended}, durable {durable}, replayed {:?}\n",
                "✗",
                run.replayed()
            );
            for fault in run.replay.iter().flat_map(|replay| &replay.faults) {
                out += &format!("{:>11}  {fault}\n", "✗");
            }
        }
        let names: Vec<_> = self.counts().into_iter().map(|(name, _)| name).collect();
        let verdict =
            if self.is_whole() { format!("= {} ✓", grouped(self.run.measured.published)) } else { "✗".to_owned() };
        out + &format!("\n{} {verdict}\n", names.join(" = "))
    }

    fn limits_text(&self) -> String {
        let Some(limit) = self.limit_ratio() else { return String::new() };
        let rate =
            median(self.runs.iter().filter_map(|run| Some(run.limits.as_ref()?.events_per_second))).unwrap_or(f64::NAN);
        let batch = self.run.limits.as_ref().map_or(0, |limits| limits.batch);
        let mut out = format!(
            "{:>11}  {} for the bare loop (batches of {batch}); engine ÷ limit = {limit:.3}\n",
            "limit",
            report::rate(rate)
        );
        if let (Some(keyed), Some(ratio)) = (self.keyed_limit(), self.keyed_ratio()) {
            let states = if self.args.no_state { "chains" } else { "chains and states" };
            let rate = report::rate(keyed);
            out += &format!(
                "{:>11}  {rate} for the loop with the users' {states} in an array; engine ÷ that = {ratio:.3}\n",
                ""
            );
        }
        let Some((disk_recycled, disk_new)) = self.disk() else { return out };
        let bytes = |name: &str, engine: Option<f64>, disk: f64| {
            let engine = engine.map_or_else(
                || "not reached".to_owned(),
                |engine| format!("{}/s, ÷ disk = {:.3}", byte_size(engine), engine / disk),
            );
            format!("{:>11}  {name} blocks: disk {}/s; engine {engine}\n", "disk", byte_size(disk))
        };
        let passes = self.passes();
        out += &bytes("new", median(passes.iter().filter_map(|pass| pass.0)), disk_new);
        out += &bytes("recycled", median(passes.iter().filter_map(|pass| pass.1)), disk_recycled);
        for (waits, cores) in self.disk_waits().into_iter().flatten().zip(["idle", "busy"]) {
            let [p50, p99] = [0.5, 0.99].map(|quantile| report::ns(waits.value_at_quantile(quantile)));
            out += &format!(
                "{:>11}  the disk alone with the same bytes, a sync per millisecond, {cores} cores: p50 {p50}, p99 {p99}\n",
                ""
            );
        }
        if let Some(unsynced) = self.unsynced() {
            out += &format!("{:>11}  {} for the same engine with durability os\n", "unsynced", report::rate(unsynced));
        }
        if let Some(ratio) = self.bound_ratio() {
            out += &format!("{:>11}  engine ÷ smaller of disk (recycled) and unsynced engine = {ratio:.3}\n", "");
        }
        out
    }

    pub(crate) fn limit_ratio(&self) -> Option<f64> {
        median(
            self.runs.iter().filter_map(|run| Some(run.measured.per_second() / run.limits.as_ref()?.events_per_second)),
        )
    }

    fn keyed_limit(&self) -> Option<f64> {
        median(self.runs.iter().filter_map(|run| Some(run.limits.as_ref()?.keyed_events_per_second)))
    }

    fn keyed_ratio(&self) -> Option<f64> {
        median(
            self.runs
                .iter()
                .filter_map(|run| Some(run.measured.per_second() / run.limits.as_ref()?.keyed_events_per_second)),
        )
    }

    /// Bytes per second on recycled and on new blocks.
    fn disk(&self) -> Option<(f64, f64)> {
        let disks = || self.runs.iter().filter_map(|run| run.limits.as_ref()?.disk);
        Some((
            median(disks().map(|disk| disk.recycled_bytes_per_second))?,
            median(disks().map(|disk| disk.new_bytes_per_second))?,
        ))
    }

    /// The waits of all runs together.
    fn disk_waits(&self) -> Option<[Histogram<u64>; 2]> {
        let mut all = self.runs.iter().filter_map(|run| run.limits.as_ref()?.disk_waits.clone());
        let first = all.next()?;
        Some(all.fold(first, |[mut rest, mut busy], [more_rest, more_busy]| {
            rest += more_rest;
            busy += more_busy;
            [rest, busy]
        }))
    }

    fn unsynced(&self) -> Option<f64> {
        median(self.runs.iter().filter_map(|run| run.limits.as_ref()?.unsynced))
    }

    fn passes(&self) -> Vec<(Option<f64>, Option<f64>)> {
        let of = |measured: &Measured| passes(&measured.intervals, self.args.shards);
        let both = |run: &Run| {
            let (new, recycled) = of(&run.measured);
            (new.or_else(|| of(run.warmup.as_ref()?).0), recycled)
        };
        self.runs.iter().map(both).collect()
    }

    /// The median ratio of the engine's synced bytes per second to the disk's; on recycled blocks if the run reached
    /// them.
    fn disk_ratio(&self) -> Option<f64> {
        median(self.runs.iter().zip(self.passes()).filter_map(|(run, (_, recycled))| {
            Some(
                recycled.unwrap_or(run.measured.bytes_per_second())
                    / run.limits.as_ref()?.disk?.recycled_bytes_per_second,
            )
        }))
    }

    fn bound_ratio(&self) -> Option<f64> {
        median(self.runs.iter().zip(self.passes()).filter_map(|(run, (_, recycled))| {
            let limits = run.limits.as_ref()?;
            let event_bytes = run.measured.bytes as f64 / run.measured.appended as f64;
            let bound = limits.disk?.recycled_bytes_per_second.min(limits.unsynced? * event_bytes);
            Some(recycled.unwrap_or(run.measured.bytes_per_second()) / bound)
        }))
    }

    /// Returns the JSON object for scripts.
    pub(crate) fn json(&self) -> Value {
        let (args, measured) = (self.args, &self.run.measured);
        let corrected = args.rate > 0;
        let mut object = json!({
            "events": measured.appended,
            "events_per_second": measured.per_second(),
            "seconds": measured.elapsed.as_secs_f64(),
            "bytes": measured.bytes,
            "memory_bytes": measured.memory.map(|[before, after]| json!({
                "own": [before.0, after.0],
                "mapped": [before.1, after.1],
            })),
            "bytes_per_second": measured.bytes_per_second(),
            "durability": args.durability_name(),
            "shards": args.shards,
            "producers": args.producers,
            "users": if args.input.is_some() { self.run.replay.as_ref().map(|replay| replay.keys) } else { Some(args.users) },
            "published": measured.published,
            "appended": measured.appended,
            "durable": measured.durable,
            "replayed": self.run.replayed(),
            "verified": args.verifies().then_some(self.is_whole()),
            "warmup": args.warmup(),
            "rate": args.rate,
            "runs": self.runs.len(),
            "latency_from": if corrected { "due" } else { "publish" },
            "latency_ns": latencies(measured, corrected),
            "publish_delay_ns": quantiles(&measured.delay),
            "jitter_ns": quantiles(&measured.jitter),
            "backlog_max": measured.backlog_max,
            "shard_events": measured.shards,
            "segment_waits": measured.segment_waits,
            "sync_at_end_seconds": measured.flush.as_secs_f64(),
            "freed_by_retention": self.run.replay.as_ref().map(|replay| replay.freed),
            "reopen_seconds": self.run.replay.as_ref().map(|replay| replay.opening.as_secs_f64()),
            "replay_seconds": self.run.replay.as_ref().map(|replay| replay.replaying.as_secs_f64()),
            "load_seconds": self.loading.map(|loading| loading.as_secs_f64()),
            "cpu": self.machine.cpu,
            "cores": self.machine.cores,
            "kernel": self.machine.kernel,
            "filesystem": self.machine.filesystem,
            "commit": self.machine.commit,
            "warnings": self.warnings(),
        });
        if corrected {
            object["latency_uncorrected_ns"] = latencies(measured, false);
        }
        self.add_limits(&mut object);
        object
    }

    fn add_limits(&self, object: &mut Value) {
        let Some(ratio) = self.limit_ratio() else { return };
        object["limit_ratio"] = json!(ratio);
        object["limit_events_per_second"] =
            json!(median(self.runs.iter().filter_map(|run| Some(run.limits.as_ref()?.events_per_second))));
        object["keyed_limit_events_per_second"] = json!(self.keyed_limit());
        object["keyed_limit_ratio"] = json!(self.keyed_ratio());
        object["events_per_second_by_run"] =
            json!(self.runs.iter().map(|run| run.measured.per_second()).collect::<Vec<_>>());
        object["limit_events_per_second_by_run"] = json!(
            self.runs.iter().map(|run| run.limits.as_ref().map(|limits| limits.events_per_second)).collect::<Vec<_>>()
        );
        let Some((recycled, new)) = self.disk() else { return };
        let passes = self.passes();
        object["disk_bytes_per_second"] = json!(recycled);
        object["disk_new_bytes_per_second"] = json!(new);
        object["disk_ratio"] = json!(self.disk_ratio());
        for (waits, cores) in self.disk_waits().into_iter().flatten().zip(["idle", "busy"]) {
            let at = |quantile: f64| waits.value_at_quantile(quantile);
            object[format!("disk_wait_{cores}_cores_ns")] =
                json!({"p50": at(0.5), "p99": at(0.99), "max": waits.max()});
        }
        object["bound_ratio"] = json!(self.bound_ratio());
        object["new_bytes_per_second"] = json!(median(passes.iter().filter_map(|pass| pass.0)));
        object["recycled_bytes_per_second"] = json!(median(passes.iter().filter_map(|pass| pass.1)));
        object["unsynced_events_per_second"] = json!(self.unsynced());
    }
}

/// Returns the bytes synced per second before retention freed the first segment, and after every shard had begun two
/// more segments: the one already prepared, and the first recycled one.
fn passes(intervals: &[Interval], shards: u16) -> (Option<f64>, Option<f64>) {
    let rate = |intervals: &[Interval]| {
        let (first, last) = (intervals.first()?, intervals.last()?);
        let bytes: u64 = intervals.iter().map(|interval| interval.synced_bytes).sum();
        Some(bytes as f64 / (last.to - first.from).as_secs_f64())
    };
    let freed = intervals.iter().position(|interval| interval.segments_freed > 0).unwrap_or(intervals.len());
    let (new, rest) = intervals.split_at(freed);
    let begun = rest.first().map_or(0, |interval| interval.segments_begun) + 2 * u64::from(shards);
    let recycled = rest.iter().position(|interval| interval.segments_begun >= begun).map_or(&[][..], |at| &rest[at..]);
    (rate(new), rate(recycled))
}

fn latencies(measured: &Measured, corrected: bool) -> Value {
    let stage = |(name, _, plain, due): (&str, &str, Stage, Stage)| {
        (name.to_owned(), quantiles(measured.stage(if corrected { due } else { plain })))
    };
    Value::Object(STAGES.into_iter().map(stage).collect())
}

/// Returns the quantiles, or null if nothing was measured.
fn quantiles(histogram: &Histogram<u64>) -> Value {
    let known = |value: u64| if histogram.is_empty() { Value::Null } else { json!(value) };
    let mut object: serde_json::Map<_, _> =
        QUANTILES.iter().map(|(name, q)| ((*name).to_owned(), known(histogram.value_at_quantile(*q)))).collect();
    object.insert("max".to_owned(), known(histogram.max()));
    object.insert("count".to_owned(), json!(histogram.len()));
    Value::Object(object)
}

fn stage_table(args: &Args, measured: &Measured) -> String {
    let mut out = format!("\n{:>24}", format!("[{}]", args.durability_name()));
    for head in ["p50", "p90", "p99", "p99.9", "p99.99", "max"] {
        out += &format!(" {head:>9}");
    }
    out.push('\n');
    for (_, name, plain, due) in STAGES {
        if args.rate > 0 {
            out += &row(&name.replace("publish", "due"), measured.stage(due));
        }
        out += &row(name, measured.stage(plain));
    }
    if args.rate > 0 {
        out += &format!(
            "{:>24}  from due: corrected, a stall counts for every event it delays; from publish: uncorrected\n",
            ""
        );
    }
    out
}

fn row(name: &str, histogram: &Histogram<u64>) -> String {
    let mut out = format!("{name:>24}");
    for value in QUANTILES.iter().map(|(_, q)| histogram.value_at_quantile(*q)).chain([histogram.max()]) {
        let text = if histogram.is_empty() { "–".to_owned() } else { report::ns(value) };
        out += &format!(" {text:>9}");
    }
    out + "\n"
}

fn durability_text(args: &Args) -> String {
    let meaning = match args.durability {
        corelane::Durability::OsCache => "left to the system's cache; survives a kill of the process, not a power cut",
        corelane::Durability::Periodic(_) => "synced at this interval (ms); the throughput includes the last sync",
        _ => "synced all the time; the throughput includes the last sync",
    };
    format!("{}: {meaning}", args.durability_name())
}

pub(crate) fn byte_size(bytes: f64) -> String {
    let units = [(1e9, "GB"), (1e6, "MB"), (1e3, "kB")];
    let unit = units.into_iter().find(|(size, _)| bytes >= *size);
    unit.map_or_else(|| format!("{bytes:.0} B"), |(size, name)| format!("{:.2} {name}", bytes / size))
}

pub(crate) fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let groups: Vec<_> = digits.as_bytes().rchunks(3).rev().map(String::from_utf8_lossy).collect();
    groups.join(",")
}
