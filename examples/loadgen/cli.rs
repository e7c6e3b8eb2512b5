//! The command line: flags, defaults, and checks of values that cannot be run.

use std::path::PathBuf;
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{CommandFactory as _, Parser, ValueEnum};
use corelane::{Config, Durability, Pin, Retention, Wait};

use crate::events::Mix;

const EVENTS: u64 = 20_000_000;
const WARMUP: u64 = 2_000_000;
const RECORD_HEADER_BYTES: u64 = 48;
const REPEATS_LIMIT: u32 = 5;
/// Longer times overflow the clock.
const TIME_MAX: Duration = Duration::from_secs(1000 * 24 * 3600);
/// Segments that `--limit` keeps in a synced mode, so that the run reaches recycled blocks.
const SEGMENTS_KEPT: u64 = 2;

/// Publishes events to a corelane engine, measures every stage, and checks at the end that nothing was lost.
///
/// Without flags: 20 million synthetic game events of 10,000 users, one producer, one shard, durability in the
/// operating system's cache, then replayed and checked. Numbers take k, M and G; times ms, s, m and h.
/// If nothing is appended for 30 s, as on a full disk, the run ends with the reason and exit status 1.
#[derive(Parser, Debug, Clone)]
#[command(name = "loadgen", max_term_width = 110)]
pub(crate) struct Args {
    /// Events to send [default: 20M, or unlimited with --duration, or all of --input]
    #[arg(long, value_parser = count)]
    pub(crate) events: Option<u64>,
    /// Stop after this time (30s, 500ms, 2m; a bare number is seconds)
    #[arg(long, value_parser = time)]
    pub(crate) duration: Option<Duration>,
    /// Events per second to offer by intended time, over all producers; 0 sends at full speed
    #[arg(long, default_value = "0", value_parser = count)]
    pub(crate) rate: u64,
    /// Search for the highest offered rate that the engine sustains with p99 within --p99-max
    #[arg(long, conflicts_with_all = ["rate", "events", "duration", "input", "limit", "repeat"])]
    pub(crate) find_max: bool,
    /// The p99 that --find-max accepts, from the intended time to appended (os) or durable
    #[arg(long, default_value = "10ms", value_parser = time, requires = "find_max")]
    pub(crate) p99_max: Duration,
    /// Time for which --find-max tries each rate
    #[arg(long, default_value = "3s", value_parser = time, requires = "find_max")]
    pub(crate) step: Duration,
    /// Events sent at full speed before measuring; no figure includes them [default: 2M, or with
    /// retention enough to write every segment once, at most --events; 0 with --input]
    #[arg(long, value_parser = count, conflicts_with = "input")]
    pub(crate) warmup: Option<u64>,
    /// Producer threads
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) producers: u16,
    /// Shards of the store
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) shards: u16,
    /// Cores: auto, none, or a list such as 1,0 (shards first, then producers)
    #[arg(long, default_value = "auto", value_parser = pin)]
    pub(crate) pin: Pin,
    /// Slots of one lane, a power of two
    #[arg(long, default_value_t = 8192)]
    pub(crate) ring_capacity: usize,
    /// Events per publish_batch at full speed
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    pub(crate) batch: u32,
    /// Users (keys) of synthetic events
    #[arg(long, default_value = "10k", value_parser = users, conflicts_with = "input")]
    pub(crate) users: u64,
    /// Distribution of events over users
    #[arg(long, value_enum, default_value_t = KeyDist::Uniform, conflicts_with = "input")]
    pub(crate) key_dist: KeyDist,
    /// Weights of the event types move, attack, levelup and pickup
    #[arg(long, default_value = "move:70,attack:20,levelup:5,pickup:5", conflicts_with = "input")]
    pub(crate) mix: Mix,
    /// Bytes of one archived event, a multiple of 8; above 48 it has a boxed payload
    #[arg(long, default_value_t = 48, value_parser = clap::value_parser!(u32).range(48..=60 << 10), conflicts_with = "input")]
    pub(crate) payload: u32,
    /// os (survives a kill, not a power cut), periodic:MS, or group (syncs continuously)
    #[arg(long, default_value = "os", value_parser = durability)]
    pub(crate) durability: Durability,
    /// Wait strategy of idle threads [default: the library's choice for this machine]
    #[arg(long, value_enum)]
    pub(crate) wait: Option<WaitArg>,
    /// Folder of the store [default: a new folder under ./target, removed afterwards]
    #[arg(long)]
    pub(crate) data_dir: Option<PathBuf>,
    /// Keep the store
    #[arg(long)]
    pub(crate) keep: bool,
    /// Send the events of this JSON-lines file (.gz too) instead of synthetic ones
    #[arg(long)]
    pub(crate) input: Option<PathBuf>,
    /// Seed of all random values
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    /// Folder for summary.json, .hgrm, .hlog, timeseries.csv and report.html
    #[arg(long)]
    pub(crate) out: Option<PathBuf>,
    /// Print one JSON object as the last line
    #[arg(long)]
    pub(crate) json: bool,
    /// Keep no state per user of synthetic events, only versions and chains
    #[arg(long)]
    pub(crate) no_state: bool,
    /// Events of one user between two snapshots of its state; 0 takes none
    #[arg(long, default_value_t = 100)]
    pub(crate) snapshot_every: u64,
    /// Reopen the store afterwards, replay it and check every event (the default)
    #[arg(long, overrides_with = "no_verify")]
    pub(crate) verify: bool,
    /// Skip the replay
    #[arg(long)]
    pub(crate) no_verify: bool,
    /// Also measure the machine's limits, interleaved with the engine, and print engine ÷ limit
    #[arg(long, conflicts_with = "input")]
    pub(crate) limit: bool,
    /// Number of runs; the figures are those of the median run [default: 1, with --limit 5]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) repeat: Option<u32>,
    /// Bytes of one segment (K, M, G are powers of 1024)
    #[arg(long, default_value = "256M", value_parser = bytes)]
    pub(crate) segment_bytes: u64,
    /// Keep at most this many bytes per shard; freed segments are recycled
    #[arg(long, value_parser = bytes)]
    pub(crate) retention_bytes: Option<u64>,
    /// Keys for which each shard allocates room at the start [default: --users]
    #[arg(long, value_parser = count)]
    pub(crate) expected_keys: Option<u64>,
}

#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum KeyDist {
    Uniform,
    Zipf,
}

#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum WaitArg {
    Busy,
    Yield,
    Park,
}

impl Args {
    /// Returns the checked command line. Ends the process with clap's message if it is invalid.
    pub(crate) fn from_command_line() -> Self {
        let args = Self::parse();
        if let Err(why) = args.check() {
            Self::command().error(ErrorKind::ValueValidation, why).exit();
        }
        args
    }

    pub(crate) fn check(&self) -> Result<(), String> {
        if !self.payload.is_multiple_of(8) {
            return Err(format!("--payload {} is not a multiple of 8", self.payload));
        }
        if self.events == Some(0) || self.duration == Some(Duration::ZERO) {
            return Err("--events and --duration must be more than 0".to_owned());
        }
        if self.step.is_zero() || self.p99_max.is_zero() {
            return Err("--step and --p99-max must be more than 0".to_owned());
        }
        // The library's default limit of a record.
        let payload_max = self.segment_bytes / 4;
        if u64::from(self.payload) > payload_max {
            return Err(format!("--payload {} is more than a quarter of --segment-bytes", self.payload));
        }
        self.config(PathBuf::from("unused")).validate().map(drop).map_err(|error| error.to_string())
    }

    /// The engine's configuration with its store in `dir`.
    pub(crate) fn config(&self, dir: PathBuf) -> Config {
        let keys = self.expected_keys.unwrap_or(if self.input.is_some() {
            10_000
        } else {
            self.users / u64::from(self.shards)
        });
        let config = Config::new(dir)
            .shards(self.shards)
            .durability(self.durability)
            .pin(self.pin.clone())
            .ring_capacity(self.ring_capacity)
            .segment_bytes(self.segment_bytes)
            .retention(self.retention().map_or_else(Retention::default, Retention::bytes))
            .keys_expected(keys as usize)
            .snapshot_every(self.snapshot_every);
        match self.wait {
            None => config,
            Some(WaitArg::Busy) => config.wait(Wait::BusySpin),
            Some(WaitArg::Yield) => config.wait(Wait::SpinYield),
            Some(WaitArg::Park) => config.wait(Wait::Park),
        }
    }

    /// Returns the same configuration without retention, to read everything in the store.
    pub(crate) fn config_keeping_all(&self, dir: PathBuf) -> Config {
        self.config(dir).retention(Retention::default())
    }

    fn retention(&self) -> Option<u64> {
        let recycle = self.find_max || self.limit && self.synced();
        self.retention_bytes.or(recycle.then_some(self.segment_bytes.saturating_mul(SEGMENTS_KEPT)))
    }

    /// Returns `true` if events become durable during the run.
    pub(crate) fn synced(&self) -> bool {
        self.durability != Durability::OsCache
    }

    pub(crate) fn verifies(&self) -> bool {
        !self.no_verify
    }

    pub(crate) fn repeats(&self) -> u32 {
        self.repeat.unwrap_or(if self.limit { REPEATS_LIMIT } else { 1 })
    }

    /// The most events of the measured phase, or `None` if time or the end of the input ends it.
    pub(crate) fn events_max(&self) -> Option<u64> {
        match (&self.input, self.events, self.duration) {
            // Input::load applies --events; the producers' shares of an input are not equal.
            (Some(_), _, _) | (None, None, Some(_)) => None,
            (None, Some(events), _) => Some(events),
            (None, None, None) => Some(EVENTS),
        }
    }

    /// The number of warm-up events. With retention they write every segment once: the kept ones, the one being freed,
    /// and the one being prepared.
    pub(crate) fn warmup(&self) -> u64 {
        let round = |kept: u64| {
            let bytes = kept.saturating_add(2 * self.segment_bytes);
            let records = bytes / (RECORD_HEADER_BYTES + u64::from(self.payload));
            (records.div_ceil(1_000_000) * 1_000_000).saturating_mul(u64::from(self.shards))
        };
        let default = || self.retention().map_or(WARMUP, round).min(self.events_max().unwrap_or(u64::MAX));
        if self.input.is_some() { 0 } else { self.warmup.unwrap_or_else(default) }
    }

    /// The least disk space of a new store: the events kept, and one more segment per shard.
    pub(crate) fn bytes_min(&self) -> u64 {
        let record = RECORD_HEADER_BYTES + u64::from(self.payload);
        let known = self.events_max().unwrap_or(0).saturating_add(self.warmup());
        let shards = u64::from(self.shards);
        let kept = self.retention().map_or(u64::MAX, |kept| kept.saturating_mul(shards));
        known.saturating_mul(record).min(kept).saturating_add(self.segment_bytes.saturating_mul(shards))
    }

    /// The name of the durability mode, printed with every figure.
    pub(crate) fn durability_name(&self) -> String {
        match self.durability {
            Durability::OsCache => "os".to_owned(),
            Durability::Periodic(every) => format!("periodic:{}", every.as_millis()),
            _ => "group".to_owned(),
        }
    }
}

/// Parses a number such as `20M` or `1_000_000`. Rejects `12,5`.
fn scaled(text: &str, factor: u64, suffixes: &str) -> Result<u64, String> {
    let text = text.replace('_', "");
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let suffix = text[digits.len()..].to_ascii_lowercase();
    let power = match suffix.as_str() {
        "" => 0,
        suffix => {
            1 + suffixes
                .find(suffix)
                .filter(|_| suffix.len() == 1)
                .ok_or_else(|| format!("unknown suffix {suffix:?}"))?
        }
    };
    let number: f64 = digits.parse().map_err(|_| format!("{digits:?} is not a number"))?;
    let value = number * (factor as f64).powi(power as i32);
    if (0.0..9e18).contains(&value) && value.fract() == 0.0 {
        Ok(value as u64)
    } else {
        Err("not a whole number in range".to_owned())
    }
}

fn count(text: &str) -> Result<u64, String> {
    scaled(text, 1000, "kmg")
}

fn bytes(text: &str) -> Result<u64, String> {
    scaled(text, 1024, "kmg")
}

fn users(text: &str) -> Result<u64, String> {
    let users = count(text)?;
    if (1..=1 << 30).contains(&users) { Ok(users) } else { Err("1 to 1,073,741,824 users".to_owned()) }
}

fn time(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match &text[digits.len()..] {
        "ms" => 1e-3,
        "" | "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        other => return Err(format!("unknown unit {other:?} (ms, s, m or h)")),
    };
    let number: f64 = digits.parse().map_err(|_| format!("{digits:?} is not a number"))?;
    let time = Duration::try_from_secs_f64(number * unit).map_err(|error| error.to_string())?;
    if time <= TIME_MAX { Ok(time) } else { Err("more than 1000 days".to_owned()) }
}

fn durability(text: &str) -> Result<Durability, String> {
    match text.split_once(':') {
        None if text == "os" => Ok(Durability::OsCache),
        None if text == "group" => Ok(Durability::GroupCommit),
        Some(("periodic", ms)) => {
            let ms = ms.parse().map_err(|_| format!("{ms:?} is not a number of milliseconds"))?;
            Ok(Durability::Periodic(Duration::from_millis(ms)))
        }
        _ => Err("one of os, periodic:MS, group".to_owned()),
    }
}

fn pin(text: &str) -> Result<Pin, String> {
    match text {
        "auto" => Ok(Pin::Auto),
        "none" => Ok(Pin::None),
        list => {
            let cores: Result<Vec<usize>, _> = list.split(',').map(|core| core.trim().parse()).collect();
            cores.map(Pin::Cores).map_err(|_| "auto, none, or core numbers such as 1,0".to_owned())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flags_are_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn numbers_take_suffixes_and_reject_nonsense() {
        assert_eq!(count("20M"), Ok(20_000_000));
        assert_eq!(count("1_000"), Ok(1000));
        assert_eq!(count("1.5k"), Ok(1500));
        assert_eq!(bytes("256M"), Ok(256 << 20));
        for bad in ["", "k", "-1", "1.5", "1T", "1kk", "1km", "nan", "inf"] {
            assert!(count(bad).is_err(), "{bad:?}");
        }
        assert_eq!(time("250ms"), Ok(Duration::from_millis(250)));
        assert!(time("-1s").is_err() && time("1 day").is_err() && time("1e300h").is_err() && time("99999h").is_err());
    }
}
