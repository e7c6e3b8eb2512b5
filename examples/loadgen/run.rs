//! One or several whole runs: store, warm-up, measurement, restart and replay, with the limit probes in between.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use corelane::metrics::Stage;
use corelane::{Deadline, Durability, Engine};
use hdrhistogram::Histogram;

use crate::cli::Args;
use crate::disk::{DiskLimit, disk_limit, paced_disk};
use crate::events::{Carried, Feed};
use crate::limit::{LimitConfig, engine_limit, keyed_limit};
use crate::load::{Measured, Phase, Session, WARM_UP, first_pair};
use crate::output::byte_size;
use crate::verify::{ByKey, History, Replay, replay};

const BATCHES: [usize; 4] = [64, 128, 256, 512];
const CALIBRATION_EVENTS: u64 = 4_000_000;
/// The most users of a probe: 256 MiB.
const PROBE_USERS_MAX: u64 = 1 << 22;
const DISK_BYTES_MAX: u64 = 4 << 30;
const DISK_SECONDS_MAX: f64 = 10.0;
const PACED_DISK_TIME: Duration = Duration::from_secs(10);

/// One engine from opening to replay, with the machine's limits at that time.
#[derive(Debug, Clone)]
pub(crate) struct Run {
    /// The warm-up. It writes new blocks if the store was empty.
    pub(crate) warmup: Option<Measured>,
    pub(crate) measured: Measured,
    /// Events already in the store, plus those of the warm-up.
    pub(crate) earlier: u64,
    pub(crate) replay: Option<Replay>,
    pub(crate) limits: Option<Limits>,
}

/// Results of the probes directly before and after a run.
#[derive(Debug, Clone)]
pub(crate) struct Limits {
    pub(crate) batch: usize,
    pub(crate) events_per_second: f64,
    /// Rate of the loop with the same users, and with states if the engine has them.
    pub(crate) keyed_events_per_second: f64,
    pub(crate) disk: Option<DiskLimit>,
    /// With a rate: waits (ns) for a sync of the same bytes by the disk alone, with idle and with busy cores.
    pub(crate) disk_waits: Option<[Histogram<u64>; 2]>,
    /// Rate of the engine with the same load in `OsCache`.
    pub(crate) unsynced: Option<f64>,
}

impl Run {
    /// The events of this run that the replay found, or that retention had freed.
    pub(crate) fn replayed(&self) -> Option<u64> {
        self.replay.as_ref().map(|replay| (replay.events + replay.freed).saturating_sub(self.earlier))
    }

    /// Returns `true` if no event was lost, duplicated or out of order.
    pub(crate) fn is_whole(&self) -> bool {
        let Measured { published, appended, durable, .. } = self.measured;
        published == appended
            && appended == durable
            && self.replayed().is_none_or(|replayed| replayed == durable)
            && self.replay.as_ref().is_none_or(|replay| replay.faults.is_empty())
    }
}

/// The part of a load that its flags do not define.
pub(crate) struct Load<'a, F> {
    /// Creates the feeds of one run.
    pub(crate) feeds: &'a dyn Fn() -> Vec<F>,
    /// The histories that a replay must find.
    pub(crate) expected: Option<&'a ByKey<History>>,
}

/// The default folder of stores.
const TARGET: &str = "target";
/// The prefix of default store names.
const PREFIX: &str = "loadgen-";

/// Removes the stores of killed runs.
pub(crate) fn remove_leftovers() {
    let entries = fs::read_dir(TARGET).into_iter().flatten().flatten();
    for dir in entries.map(|entry| entry.path()).filter(|dir| is_leftover(dir)) {
        if let Err(error) = fs::remove_dir_all(&dir) {
            say!("cannot remove {}: {error}", dir.display());
        }
    }
}

/// Returns `true` if the store's process no longer exists and no process in another namespace holds the store's lock.
fn is_leftover(dir: &Path) -> bool {
    let name = dir.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let process = name.strip_prefix(PREFIX).and_then(|rest| rest.split_once('-')?.0.parse::<u32>().ok());
    let is_gone = process.is_some_and(|process| !Path::new(&format!("/proc/{process}")).exists());
    is_gone && fs::File::open(dir).is_ok_and(|folder| folder.try_lock().is_ok())
}

/// Checks the folders before a run: the report's folder is writable and outside the store, and the disk has the least
/// space that the run needs.
pub(crate) fn check_places(args: &Args) -> Result<()> {
    if let Some(out) = &args.out {
        if let Some(data) = &args.data_dir {
            let (out, data) = (std::path::absolute(out)?, std::path::absolute(data)?);
            ensure!(!out.starts_with(&data), "--out must not lie in --data-dir");
        }
        fs::create_dir_all(out).with_context(|| format!("--out: creating {}", out.display()))?;
        tempfile::tempfile_in(out).with_context(|| format!("--out: writing to {}", out.display()))?;
    }
    if let Some(dir) = args.data_dir.as_ref().filter(|dir| !is_empty(dir)) {
        let is_store = args.repeats() > 1 || dir.join("manifest").exists();
        ensure!(is_store, "--data-dir: {} is neither empty nor a store", dir.display());
        // The existing store may have segments to recycle, so the space needed is unknown.
        return Ok(());
    }
    let folder = StoreFolder::new(&Args { keep: false, ..args.clone() }, None)?;
    let free = rustix::fs::statvfs(&folder.dir).context("asking for the free space")?;
    let (free, least) = (free.f_bavail.saturating_mul(free.f_frsize), args.bytes_min());
    ensure!(
        free >= least,
        "{} has {} free, and the run takes at least {}",
        folder.dir.display(),
        byte_size(free as f64),
        byte_size(least as f64)
    );
    Ok(())
}

/// The folder of a store.
#[derive(Debug)]
pub(crate) struct StoreFolder {
    pub(crate) dir: PathBuf,
    remove: bool,
    /// The folder created to contain several runs.
    parent: Option<PathBuf>,
}

impl StoreFolder {
    /// Returns the folder of `--data-dir`, or a new one under ./target. `run` distinguishes several runs.
    pub(crate) fn new(args: &Args, run: Option<u32>) -> Result<Self> {
        let (dir, is_own) = match &args.data_dir {
            Some(dir) => (run.map_or_else(|| dir.clone(), |run| dir.join(format!("run-{run}"))), false),
            None => {
                fs::create_dir_all(TARGET).context("creating ./target")?;
                let prefix =
                    if args.keep { format!("{PREFIX}kept-") } else { format!("{PREFIX}{}-", std::process::id()) };
                (tempfile::Builder::new().prefix(&prefix).tempdir_in(TARGET)?.keep(), true)
            }
        };
        // An existing store is never removed.
        let remove = !args.keep && (is_own || is_empty(&dir));
        let parent = args.data_dir.clone().filter(|parent| remove && run.is_some() && is_empty(parent));
        fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
        Ok(Self { dir, remove, parent })
    }
}

impl Drop for StoreFolder {
    fn drop(&mut self) {
        if !self.remove {
            say!("the store is kept in {}", self.dir.display());
        } else if let Err(error) = fs::remove_dir_all(&self.dir) {
            say!("cannot remove {}: {error}", self.dir.display());
        }
        if let Some(parent) = &self.parent
            && let Err(error) = fs::remove_dir(parent)
        {
            say!("cannot remove {}: {error}", parent.display());
        }
    }
}

/// Carries out all runs, each with its limit probes directly beside it.
pub(crate) fn all<A: Carried, F: Feed<A::Event>>(args: &Args, load: &Load<'_, F>) -> Result<Vec<Run>> {
    let repeats = args.repeats();
    let mut runs = Vec::new();
    let mut batch = None;
    for n in 1..=repeats {
        if repeats > 1 {
            say!("run {n} of {repeats}");
        }
        let folder = StoreFolder::new(args, (repeats > 1).then_some(n))?;
        let limits = if args.limit { Some(limits(args, &folder.dir, &mut batch)?) } else { None };
        let mut run = once::<A, F>(args, &folder.dir, load)?;
        drop(folder);
        run.limits = limits;
        if args.limit && args.synced() {
            beside_a_synced_run::<A, F>(args, load, &mut run)?;
        }
        runs.push(run);
    }
    Ok(runs)
}

/// Carries out one run in `dir`.
fn once<A: Carried, F: Feed<A::Event>>(args: &Args, dir: &Path, load: &Load<'_, F>) -> Result<Run> {
    let mut earlier = events_before::<A>(args, dir)?;
    let fresh = earlier == 0;
    let mut session = Session::<A, F>::open(args, dir.to_owned(), (load.feeds)())?;
    let mut warmup = None;
    if args.warmup() > 0 {
        let phase = Phase { events: Some(args.warmup()), duration: None, rate: None, name: WARM_UP };
        let measured = session.run(&phase)?;
        earlier += measured.appended;
        warmup = Some(measured);
    }
    let rate = (args.rate > 0).then_some(args.rate as f64);
    let phase = Phase { events: args.events_max(), duration: args.duration, rate, name: "measuring" };
    let measured = session.run(&phase)?;
    session.engine.shutdown(Deadline::NEVER).context("shutting down")?;
    drop(session);
    let replay = if args.verifies() {
        Some(replay::<A>(args.config_keeping_all(dir.to_owned()), fresh, load.expected)?)
    } else {
        None
    };
    Ok(Run { warmup, measured, earlier, replay, limits: None })
}

/// Returns the number of events ever appended to the store in `dir`, including those that retention has freed.
pub(crate) fn events_before<A: Carried>(args: &Args, dir: &Path) -> Result<u64> {
    if is_empty(dir) {
        return Ok(0);
    }
    let engine = Engine::<A>::open(args.config_keeping_all(dir.to_owned())).context("opening the store")?;
    let mut events = 0;
    for recovered in &engine.recovery().shards {
        let mut reader = engine.reader(recovered.shard);
        let freed = reader.next().context("reading the first event")?.map_or(0, |record| record.meta.sequence.get());
        events += freed + recovered.events;
    }
    engine.shutdown(Deadline::NEVER).context("closing the store")?;
    Ok(events)
}

fn is_empty(dir: &Path) -> bool {
    fs::read_dir(dir).map_or(true, |mut entries| entries.next().is_none())
}

/// Measures the limits of the loop, with the batch size that is fastest on this machine.
fn limits(args: &Args, dir: &Path, batch: &mut Option<usize>) -> Result<Limits> {
    let config = |batch: usize, events: u64| LimitConfig {
        events,
        ring_capacity: args.ring_capacity.max(batch),
        batch,
        dir: dir.to_owned(),
        pin: first_pair(args),
    };
    let batch = match *batch {
        Some(batch) => batch,
        None => {
            let rates: Result<Vec<_>> =
                BATCHES.iter().map(|&batch| Ok((batch, engine_limit(&config(batch, CALIBRATION_EVENTS))?))).collect();
            let best = rates?.into_iter().max_by(|a, b| a.1.total_cmp(&b.1)).map_or(BATCHES[0], |best| best.0);
            *batch.insert(best)
        }
    };
    let events = args.events_max().unwrap_or(20_000_000);
    let events_per_second = engine_limit(&config(batch, events))?;
    let users = args.users.min(PROBE_USERS_MAX);
    let keyed_events_per_second = keyed_limit(&config(batch, events), users, !args.no_state)?;
    Ok(Limits { batch, events_per_second, keyed_events_per_second, disk: None, disk_waits: None, unsynced: None })
}

/// Measures the disk with the same bytes, and the engine without syncs.
fn beside_a_synced_run<A: Carried, F: Feed<A::Event>>(args: &Args, load: &Load<'_, F>, run: &mut Run) -> Result<()> {
    let Some(limits) = &mut run.limits else { return Ok(()) };
    let folder = StoreFolder::new(&Args { data_dir: None, keep: false, ..args.clone() }, None)?;
    limits.disk = Some(disk_limit(&folder.dir, run.measured.bytes.clamp(64 << 20, DISK_BYTES_MAX), DISK_SECONDS_MAX)?);
    if args.rate > 0 {
        let rate = run.measured.bytes_per_second() as u64;
        let waits = |busy| paced_disk(&folder.dir, rate, PACED_DISK_TIME, busy);
        limits.disk_waits = Some([waits(None)?, waits(Some(first_pair(args).unwrap_or((0, 0))))?]);
    }
    let retention_bytes = args.retention_bytes.or(Some(args.segment_bytes * 2));
    let unsynced = Args { durability: Durability::OsCache, no_verify: true, retention_bytes, ..args.clone() };
    limits.unsynced = Some(once::<A, F>(&unsynced, &folder.dir, load)?.measured.per_second());
    Ok(())
}

/// Returns the median; of an even number of values the lower middle one.
pub(crate) fn median(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len().saturating_sub(1) / 2).copied()
}

/// Returns the median run: by throughput or, with a rate, by the p99 of the last stage.
pub(crate) fn median_run<'a>(args: &Args, runs: &'a [Run]) -> Option<&'a Run> {
    let last = if args.synced() { Stage::DurableDue } else { Stage::AppendedDue };
    let measure = |run: &Run| match args.rate {
        0 => run.measured.per_second(),
        _ => run.measured.stage(last).value_at_quantile(0.99) as f64,
    };
    let middle = median(runs.iter().map(measure))?;
    runs.iter().find(|run| measure(run) == middle)
}
