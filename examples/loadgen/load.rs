//! Drives an engine with one thread per producer, at full speed or by intended time, and measures.
//!
//! All data of the producers is created before the clock starts. A [`Session`] is one open engine with its producers; a
//! [`Phase`] is one period of load on it (the warm-up, the measurement, one step of a search).

use std::path::PathBuf;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};
use corelane::metrics::{Metrics, Stage};
use corelane::{Deadline, Engine, Key, Pin, Producer};
use hdrhistogram::Histogram;

use crate::cli::Args;
use crate::events::{Carried, Feed};
use crate::machine::resident;
use crate::watch::{HANDED_OVER_IN, Interval, Watch, jitter};

/// The shortest time worth sleeping, since the system wakes threads late.
const SLEEP_MIN: Duration = Duration::from_micros(300);
/// Events sent between two checks of the stop flag.
const CHECK_STOP_EVERY: u64 = 64;

/// The name of the phase before the measurement.
pub(crate) const WARM_UP: &str = "warm-up";

/// A period of load.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Phase {
    pub(crate) events: Option<u64>,
    pub(crate) duration: Option<Duration>,
    /// Events per second over all producers, by intended time.
    pub(crate) rate: Option<f64>,
    /// The name shown while it runs.
    pub(crate) name: &'static str,
}

/// The results of a phase. Counts are of this phase only.
#[derive(Debug, Clone)]
pub(crate) struct Measured {
    pub(crate) published: u64,
    pub(crate) appended: u64,
    pub(crate) durable: u64,
    /// From the first publish until everything was appended, or durable in a synced mode.
    pub(crate) elapsed: Duration,
    /// Duration of the final sync in `OsCache`; not part of `elapsed`.
    pub(crate) flush: Duration,
    pub(crate) bytes: u64,
    pub(crate) stages: Vec<Histogram<u64>>,
    /// With a rate: from an event's due time until it was published. At full speed: the time to publish a batch.
    pub(crate) delay: Histogram<u64>,
    /// The delay with which the system woke a thread from a sleep of 1 ms.
    pub(crate) jitter: Histogram<u64>,
    pub(crate) intervals: Vec<Interval>,
    pub(crate) backlog_max: u64,
    /// Events of each shard.
    pub(crate) shards: Vec<u64>,
    pub(crate) segment_waits: u64,
    /// Resident bytes at the beginning and at the end: anonymous memory, and mapped files.
    pub(crate) memory: Option<[(u64, u64); 2]>,
}

impl Measured {
    pub(crate) fn per_second(&self) -> f64 {
        self.appended as f64 / self.elapsed.as_secs_f64()
    }

    /// Bytes of records per second.
    pub(crate) fn bytes_per_second(&self) -> f64 {
        self.bytes as f64 / self.elapsed.as_secs_f64()
    }

    pub(crate) fn stage(&self, stage: Stage) -> &Histogram<u64> {
        &self.stages[stage as usize]
    }
}

/// Returns a histogram with the bounds of the engine's.
pub(crate) fn histogram() -> Histogram<u64> {
    // The upper bound covers an hour: an open-loop load may fall behind by minutes.
    Histogram::new_with_bounds(1, (1 << 42) - 1, 3).expect("the bounds are valid constants")
}

/// One producer with its source of events.
struct Sending<A: Carried, F> {
    producer: Producer<A::Event>,
    feed: F,
    batch: Vec<(Key, A::Event)>,
    core: Option<usize>,
}

/// An open engine with its producers.
pub(crate) struct Session<A: Carried, F> {
    pub(crate) engine: Engine<A>,
    senders: Vec<Sending<A, F>>,
    batch: usize,
    /// Producers, shards and syncer are more threads than there are cores.
    crowded: bool,
    synced: bool,
    /// Every interval's histograms are kept for the report.
    keep: bool,
}

/// The state that the threads of a phase share.
struct PhaseControl {
    start: Barrier,
    stop: AtomicBool,
}

/// The result of one producer.
struct Sent {
    began: Instant,
    delay: Histogram<u64>,
}

impl<A: Carried, F: Feed<A::Event>> Session<A, F> {
    /// Opens the store in `dir` and creates a producer for every feed.
    pub(crate) fn open(args: &Args, dir: PathBuf, feeds: Vec<F>) -> Result<Self> {
        let cores = producer_cores(args, feeds.len());
        let engine = Engine::open(args.config(dir)).context("opening the store")?;
        let batch = args.batch as usize;
        let sender =
            |(feed, core)| Sending { producer: engine.producer(), feed, batch: Vec::with_capacity(batch), core };
        let senders: Vec<_> = feeds.into_iter().zip(cores).map(sender).collect();
        Ok(Self {
            engine,
            senders,
            batch,
            crowded: crowded(args) || args.synced(),
            synced: args.synced(),
            keep: args.out.is_some(),
        })
    }

    /// Sends the phase's events, waits until they are appended and durable, and returns the measurements.
    pub(crate) fn run(&mut self, phase: &Phase) -> Result<Measured> {
        let before = self.engine.metrics(HANDED_OVER_IN);
        let memory_before = resident();
        let control = PhaseControl { start: Barrier::new(self.senders.len() + 1), stop: AtomicBool::new(false) };
        let producers = self.senders.len() as u64;
        let (batch, crowded, synced, keep) = (self.batch, self.crowded, self.synced, self.keep);
        let engine = &self.engine;
        let published = || engine.shard_metrics().iter().map(|shard| shard.published).sum::<u64>();
        let published_before = published();
        let (done_tx, done) = channel();
        std::thread::scope(|scope| {
            let jitter = scope.spawn(|| jitter(&control.stop));
            let mut threads = Vec::new();
            for (i, sender) in (0..).zip(&mut self.senders) {
                let share = Share::new(phase, i, producers);
                let (control, done) = (&control, done_tx.clone());
                threads.push(scope.spawn(move || sender.send(&share, control, batch, crowded, done)));
            }
            drop(done_tx);
            control.start.wait();
            let mut watch = Watch::new(engine, before.clone(), synced, keep, phase);
            let watched = watch_over(&mut watch, phase, &control, &done);
            if watched.is_err() {
                // Releases producers that wait for room. Dropping the session ends the rest.
                control.stop.store(true, Ordering::Relaxed);
                drop(engine.shutdown(Some(Instant::now())));
            }
            let sent: Result<Vec<Sent>> =
                threads.into_iter().map(|thread| thread.join().map_err(|_| anyhow!("a producer panicked"))?).collect();
            control.stop.store(true, Ordering::Relaxed);
            watched?;
            let sent = sent?;
            let published = published() - published_before;
            let began = sent.iter().map(|sent| sent.began).min().context("there is at least one producer")?;
            wait_appended(engine, &before, published)?;
            let mut elapsed = began.elapsed();
            if synced {
                flush(engine)?;
                elapsed = began.elapsed();
            }
            let intervals = watch.finish();
            // Not after the warm-up: from the first sync on retention waits for the disk, which would distort
            // `OsCache`.
            let flush = if synced || phase.name == WARM_UP { Duration::ZERO } else { flush(engine)? };
            let mut delay = histogram();
            sent.iter().try_for_each(|sent| delay.add(&sent.delay))?;
            let jitter = jitter.join().map_err(|_| anyhow!("the jitter thread panicked"))?;
            let memory = memory_before.zip(resident()).map(|(before, after)| [before, after]);
            let timing = Timing { published, elapsed, flush, delay, jitter, intervals, memory };
            Ok(measured(&before, &engine.metrics(HANDED_OVER_IN), timing))
        })
    }
}

/// Samples the engine until every producer is done. Stops the producers at the end of the phase's time.
fn watch_over<A: Carried>(
    watch: &mut Watch<'_, A>,
    phase: &Phase,
    control: &PhaseControl,
    done: &Receiver<()>,
) -> Result<()> {
    let ends = phase.duration.map(|duration| Instant::now() + duration);
    loop {
        let next = ends.map_or(watch.due(), |ends| ends.min(watch.due()));
        match done.recv_timeout(next.saturating_duration_since(Instant::now())) {
            Ok(()) => {}
            Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => return Ok(()),
            Err(std::sync::mpsc::RecvTimeoutError::Timeout) => {
                if ends.is_some_and(|ends| Instant::now() >= ends) {
                    control.stop.store(true, Ordering::Relaxed);
                }
                watch.sample();
                watch.progress.check(watch.engine)?;
            }
        }
    }
}

/// The longest time without progress while events wait to be appended.
const STALL_MAX: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 30 });

/// Detects an engine that makes no progress.
#[derive(Debug)]
pub(crate) struct Progress {
    appended: u64,
    since: Instant,
}

impl Progress {
    pub(crate) fn new() -> Self {
        Self { appended: 0, since: Instant::now() }
    }

    /// Fails with the engine's reason if events have waited for `STALL_MAX` and none was appended.
    pub(crate) fn check<A: Carried>(&mut self, engine: &Engine<A>) -> Result<()> {
        let shards = engine.shard_metrics();
        let appended = shards.iter().map(|shard| shard.appended).sum();
        let is_waiting = shards.iter().any(|shard| shard.backlog > 0);
        if !is_waiting || appended != self.appended {
            *self = Self { appended, since: Instant::now() };
        }
        if self.since.elapsed() < STALL_MAX {
            return Ok(());
        }
        let why =
            shards.iter().find_map(|shard| shard.storage_full_why.as_deref()).unwrap_or("the engine reports no reason");
        bail!("nothing was appended for {} s: {why}", STALL_MAX.as_secs())
    }
}

/// Waits until everything published since `before` is appended.
fn wait_appended<A: Carried>(engine: &Engine<A>, before: &Metrics, published: u64) -> Result<()> {
    let appended = |shards: &[corelane::metrics::ShardMetrics]| shards.iter().map(|shard| shard.appended).sum::<u64>();
    let target = appended(&before.shards) + published;
    let mut progress = Progress::new();
    while appended(&engine.shard_metrics()) < target {
        if let Some(failure) = engine.failures().into_iter().next() {
            bail!("a shard failed: {failure}");
        }
        progress.check(engine)?;
        std::thread::sleep(Duration::from_micros(20));
    }
    Ok(())
}

/// Makes everything durable and returns the time it took.
fn flush<A: Carried>(engine: &Engine<A>) -> Result<Duration> {
    let began = Instant::now();
    engine.flush(Deadline::NEVER).context("syncing the appended events")?;
    Ok(began.elapsed())
}

/// Measurements of the load generator itself.
struct Timing {
    published: u64,
    elapsed: Duration,
    flush: Duration,
    delay: Histogram<u64>,
    jitter: Histogram<u64>,
    intervals: Vec<Interval>,
    memory: Option<[(u64, u64); 2]>,
}

fn measured(before: &Metrics, after: &Metrics, timing: Timing) -> Measured {
    let shards: Vec<u64> =
        after.shards.iter().zip(&before.shards).map(|(after, before)| after.appended - before.appended).collect();
    let appended = shards.iter().sum();
    // The engine reports durability by position; the positions are equal once everything is synced.
    let all_durable = after.shards.iter().all(|shard| shard.durable_to >= shard.appended_to);
    let of = |count: fn(&corelane::metrics::ShardMetrics) -> u64| {
        after.shards.iter().map(count).sum::<u64>() - before.shards.iter().map(count).sum::<u64>()
    };
    Measured {
        published: timing.published,
        appended,
        durable: if all_durable { appended } else { 0 },
        elapsed: timing.elapsed,
        flush: timing.flush,
        bytes: of(|shard| shard.appended_bytes),
        stages: Stage::ALL.iter().map(|stage| difference(after.histogram(*stage), before.histogram(*stage))).collect(),
        delay: timing.delay,
        jitter: timing.jitter,
        backlog_max: timing.intervals.iter().map(|interval| interval.backlog).max().unwrap_or(0),
        intervals: timing.intervals,
        shards,
        segment_waits: of(|shard| shard.segment_waits),
        memory: timing.memory,
    }
}

/// Returns the values recorded between two snapshots.
pub(crate) fn difference(after: &Histogram<u64>, before: &Histogram<u64>) -> Histogram<u64> {
    let mut difference = after.clone();
    difference.subtract(before).expect("a later snapshot contains an earlier one");
    difference
}

/// One producer's part of a phase.
struct Share {
    events: u64,
    /// The time between two events of this producer, and before its first.
    pace: Option<(Duration, Duration)>,
}

impl Share {
    fn new(phase: &Phase, producer: u64, producers: u64) -> Self {
        let events =
            phase.events.map_or(u64::MAX, |events| events / producers + u64::from(producer < events % producers));
        let pace = phase.rate.map(|rate| {
            let between = |events: f64| Duration::from_secs_f64(events / rate);
            (between(producers as f64), between(producer as f64))
        });
        Self { events, pace }
    }
}

impl<A: Carried, F: Feed<A::Event>> Sending<A, F> {
    fn send(
        &mut self,
        share: &Share,
        control: &PhaseControl,
        batch: usize,
        crowded: bool,
        _done: Sender<()>,
    ) -> Result<Sent> {
        if let Some(id) = self.core {
            core_affinity::set_for_current(core_affinity::CoreId { id });
        }
        let mut delay = histogram();
        control.start.wait();
        let began = Instant::now();
        match share.pace {
            None => self.full_speed(share.events, batch, &control.stop, &mut delay)?,
            Some((every, first)) => {
                self.paced(share.events, every, began + first, crowded, &control.stop, &mut delay)?
            }
        }
        Ok(Sent { began, delay })
    }

    fn full_speed(&mut self, events: u64, batch: usize, stop: &AtomicBool, delay: &mut Histogram<u64>) -> Result<()> {
        let mut left = events;
        while left > 0 && !stop.load(Ordering::Relaxed) {
            let want = left.min(batch as u64) as usize;
            let feed = &mut self.feed;
            self.batch.extend(std::iter::from_fn(|| feed.next()).take(want));
            let got = self.batch.len();
            if got == 0 {
                break;
            }
            left -= got as u64;
            let began = Instant::now();
            self.producer.publish_batch(&mut self.batch).context("publishing")?;
            delay.saturating_record_n(began.elapsed().as_nanos() as u64, got as u64);
        }
        Ok(())
    }

    /// Open loop: the clock alone determines the due time of an event, never the progress of earlier events.
    fn paced(
        &mut self,
        events: u64,
        every: Duration,
        first: Instant,
        crowded: bool,
        stop: &AtomicBool,
        delay: &mut Histogram<u64>,
    ) -> Result<()> {
        let every_ns = every.as_secs_f64() * 1e9;
        for n in 0..events {
            if n % CHECK_STOP_EVERY == 0 && stop.load(Ordering::Relaxed) {
                break;
            }
            let due = first + Duration::from_nanos((n as f64 * every_ns) as u64);
            let Some(now) = wait_until(due, crowded, stop) else { break };
            let Some((key, event)) = self.feed.next() else { break };
            let late = now - due;
            if let Err(rejected) = self.producer.publish_due(key, event, late) {
                bail!("publishing: {}", rejected.reason());
            }
            delay.saturating_record(late.as_nanos() as u64);
        }
        Ok(())
    }
}

/// Waits until `due` and returns the current time, or `None` if the phase was stopped.
#[inline]
fn wait_until(due: Instant, crowded: bool, stop: &AtomicBool) -> Option<Instant> {
    let mut now = Instant::now();
    while now < due {
        let left = due - now;
        if left > SLEEP_MIN {
            if stop.load(Ordering::Relaxed) {
                return None;
            }
            std::thread::sleep((left - SLEEP_MIN / 2).min(Duration::from_millis(100)));
        } else if crowded {
            std::thread::yield_now();
        } else {
            std::hint::spin_loop();
        }
        now = Instant::now();
    }
    Some(now)
}

/// Returns `true` if producers and shards are more threads than there are cores.
pub(crate) fn crowded(args: &Args) -> bool {
    usize::from(args.producers) + usize::from(args.shards) > core_ids().len()
}

/// Returns the cores that this process may use. The calling thread must not be pinned.
pub(crate) fn core_ids() -> Vec<usize> {
    core_affinity::get_core_ids().unwrap_or_default().into_iter().map(|core| core.id).collect()
}

/// Returns the core of each producer, among the cores that the shards leave free.
fn producer_cores(args: &Args, producers: usize) -> Vec<Option<usize>> {
    let allowed = core_ids();
    match &args.pin {
        // Like the engine, leaves one core for the threads that sync, prepare and save.
        Pin::Auto if producers + usize::from(args.shards) < allowed.len() => {
            allowed.iter().copied().map(Some).take(producers).collect()
        }
        Pin::Cores(list) => {
            let usable = |core: &usize| allowed.contains(core).then_some(*core);
            let of_producers = list.iter().skip(usize::from(args.shards)).map(usable);
            of_producers.chain(std::iter::repeat(None)).take(producers).collect()
        }
        _ => vec![None; producers],
    }
}

/// Returns the cores of the bare loop's two threads: those of the first producer and the first shard if `--pin` lists
/// cores, or else the first and the last core.
pub(crate) fn first_pair(args: &Args) -> Option<(usize, usize)> {
    let allowed = core_ids();
    match (&args.pin, allowed.as_slice()) {
        (Pin::Cores(list), _) => Some((producer_cores(args, 1).first().copied().flatten()?, *list.first()?)),
        (Pin::Auto, [first, .., last]) => Some((*first, *last)),
        _ => None,
    }
}
