//! Configuration: parsed once. `Config` → [`Config::validate`] → [`ValidConfig`]; nothing else takes `Config`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::ConfigError;
use crate::sync::Wait;

/// Methods of a builder, one per field.
macro_rules! setters {
    ($($(#[$doc:meta])* $name:ident: $kind:ty),+ $(,)?) => {
        $($(#[$doc])*
        #[must_use]
        pub fn $name(mut self, $name: $kind) -> Self {
            self.$name = $name;
            self
        })+
    };
}

pub(crate) use setters;

/// When an event counts as durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Durability {
    /// Left to the operating system: survives a kill of the process, not a power cut.
    /// Nothing is acknowledged as durable except by `flush` and `shutdown`.
    OsCache,
    /// Synced at this interval while there is something to sync.
    Periodic(Duration),
    /// A syncer runs continuously: it syncs whatever has been appended as soon as the last sync returned.
    #[default]
    GroupCommit,
}

/// Which cores the shards' threads are pinned to.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Pin {
    /// Shard `i` to the `i`-th allowed core from the last one back, so that the first core, where the system does its own work, stays
    /// for producers. Not pinned when that leaves fewer than two cores, for producers and for the threads that sync, prepare and save.
    #[default]
    Auto,
    /// Leave it to the scheduler.
    None,
    /// These core ids, shard by shard, wrapping around. An id that is not allowed is a warning, and that shard runs unpinned.
    Cores(Vec<usize>),
}

/// What the log keeps. A segment is freed when either bound is passed; freed segments become spares and are written again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Retention {
    /// Keep at most this many bytes of whole segments per shard.
    pub bytes_max: Option<u64>,
    /// Keep nothing older than this (by the segment's newest append). A wall clock that jumps frees nothing early: where a segment's
    /// time cannot be right, later segments tell it, or the time for which this process has seen it (`GUARANTEES.md`).
    pub age_max: Option<Duration>,
}

/// How an engine is set up. Start from [`Config::new`]; everything has a default.
///
/// ```
/// # use corelane::{Config, Durability};
/// let config = Config::new("data").shards(2).durability(Durability::OsCache);
/// assert!(config.validate().is_ok());
/// assert!(Config::new("data").shards(0).validate().is_err());
/// ```
#[derive(Debug, Clone)]
pub struct Config {
    checked: ValidConfig,
    wait: Option<Wait>,
    event_bytes_max: Option<usize>,
}

/// A configuration that holds: every value in range.
#[derive(Debug, Clone)]
pub struct ValidConfig {
    pub(crate) dir: PathBuf,
    pub(crate) shards: u16,
    pub(crate) durability: Durability,
    pub(crate) wait: Wait,
    pub(crate) pin: Pin,
    pub(crate) ring_capacity: usize,
    pub(crate) batch_max: usize,
    pub(crate) segment_bytes: u64,
    pub(crate) spares_max: usize,
    pub(crate) retention: Retention,
    pub(crate) event_bytes_max: usize,
    pub(crate) keys_expected: usize,
    pub(crate) outcomes_kept: usize,
    pub(crate) snapshot_every: u64,
    pub(crate) checkpoint_bytes: u64,
    pub(crate) latency: bool,
}

impl ValidConfig {
    /// Where the store lives.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The number of shards.
    #[must_use]
    pub fn shards(&self) -> u16 {
        self.shards
    }

    /// The wait strategy in force: what was asked for, or what the number of cores suggests.
    #[must_use]
    pub fn wait(&self) -> Wait {
        self.wait
    }

    /// The durability mode.
    #[must_use]
    pub fn durability(&self) -> Durability {
        self.durability
    }
}

macro_rules! checked_setters {
    ($($(#[$doc:meta])* $name:ident: $kind:ty),+ $(,)?) => {
        $($(#[$doc])*
        #[must_use]
        pub fn $name(mut self, $name: $kind) -> Self {
            self.checked.$name = $name;
            self
        })+
    };
}

impl Config {
    /// A store in `dir` with one shard and `GroupCommit`. A path that is not absolute begins at the working directory
    /// of the moment when the store is opened; later changes of either name make no difference.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self {
            checked: ValidConfig {
                dir: dir.into(),
                shards: 1,
                durability: Durability::default(),
                wait: Wait::Park,
                pin: Pin::Auto,
                ring_capacity: 8192,
                batch_max: 512,
                segment_bytes: 256 << 20,
                spares_max: 2,
                retention: Retention::default(),
                event_bytes_max: EVENT_BYTES_MAX_DEFAULT,
                keys_expected: 10_000,
                outcomes_kept: 16,
                snapshot_every: 100,
                checkpoint_bytes: 1 << 30,
                latency: true,
            },
            wait: None,
            event_bytes_max: None,
        }
    }

    checked_setters! {
        /// Number of shards, 1..=1024. Fixed when the store is created. Several may share a core.
        shards: u16,
        /// When an event counts as durable. Default: `GroupCommit`.
        durability: Durability,
        /// Which cores the shards are pinned to. Default: `Auto`.
        pin: Pin,
        /// Slots of one lane, a power of two in 2..=2²⁴. Default: 8192.
        ring_capacity: usize,
        /// Events a shard takes from one lane in one go, 1..=65,536. Default: 512.
        batch_max: usize,
        /// Bytes of one segment, a power of two in 64 KiB..=16 GiB. Fixed when the store is created. Default: 256 MiB.
        segment_bytes: u64,
        /// Freed segments kept per shard to be written again, 0..=1024. Default: 2.
        spares_max: usize,
        /// What the log keeps. Default: everything.
        retention: Retention,
        /// Keys one shard makes room for at the start, up to 2³⁰. It grows when needed. Default: 10,000.
        keys_expected: usize,
        /// Events of one key between two snapshots of its state, 1..=2⁴⁰; 0: no snapshots. Default: 100. Time travel applies
        /// at most so many events, unless snapshots were skipped ([`crate::state::SnapshotStats::skipped`]).
        snapshot_every: u64,
        /// Bytes of a shard's log between two checkpoints of all its states, 1 MiB or more; 0: only when retention needs one or
        /// [`crate::Engine::checkpoint`] asks. Default: 1 GiB. Opening folds about so much of the log.
        checkpoint_bytes: u64,
        /// How many commands with idempotency keys are remembered per key, 0..=1024: a repeat of one of the newest so many is
        /// answered as the first was. Default: 16.
        outcomes_kept: usize,
        /// Whether latency histograms are kept. Default: true.
        latency: bool,
    }

    /// What idle threads do. Default: `Park` when shards plus one producer fill the cores, else `SpinYield`.
    #[must_use]
    pub fn wait(mut self, wait: Wait) -> Self {
        self.wait = Some(wait);
        self
    }

    /// Largest archive of one event in bytes, 16..=16 MiB and at most a quarter of a segment. Default: 64 KiB
    /// (or that quarter).
    #[must_use]
    pub fn event_bytes_max(mut self, event_bytes_max: usize) -> Self {
        self.event_bytes_max = Some(event_bytes_max);
        self
    }

    /// Checks every value against its range.
    ///
    /// # Errors
    /// The first value that cannot be used.
    pub fn validate(mut self) -> Result<ValidConfig, ConfigError> {
        let c = &mut self.checked;
        // The default shrinks with small segments; what was asked for is refused instead.
        c.event_bytes_max = self.event_bytes_max.unwrap_or(EVENT_BYTES_MAX_DEFAULT.min((c.segment_bytes / 4) as usize));
        in_range("shards", u64::from(c.shards), 1, u64::from(SHARDS_MAX))?;
        power_of_two("ring_capacity", c.ring_capacity as u64, 2, 1 << 24)?;
        in_range("batch_max", c.batch_max as u64, 1, 65_536)?;
        power_of_two("segment_bytes", c.segment_bytes, *SEGMENT_BYTES.start(), *SEGMENT_BYTES.end())?;
        in_range("spares_max", c.spares_max as u64, 0, 1024)?;
        in_range("event_bytes_max", c.event_bytes_max as u64, 16, (16 << 20).min(c.segment_bytes / 4))?;
        in_range("snapshot_every", c.snapshot_every, 0, 1 << 40)?;
        if c.checkpoint_bytes > 0 {
            in_range("checkpoint_bytes", c.checkpoint_bytes, 1 << 20, u64::MAX)?;
        }
        in_range("outcomes_kept", c.outcomes_kept as u64, 0, 1024)?;
        in_range("keys_expected", c.keys_expected as u64, 0, 1 << 30)?;
        if let Durability::Periodic(every) = c.durability {
            let ms = u64::try_from(every.as_millis()).unwrap_or(u64::MAX);
            in_range("periodic_sync_ms", ms, 1, 3_600_000)?;
        }
        if let Some(bytes) = c.retention.bytes_max {
            in_range("retention_bytes_max", bytes, c.segment_bytes.saturating_mul(2), u64::MAX)?;
        }
        let cores = crate::sync::cores();
        c.wait = self.wait.unwrap_or(if usize::from(c.shards) + 1 >= cores { Wait::Park } else { Wait::SpinYield });
        Ok(self.checked)
    }
}

const EVENT_BYTES_MAX_DEFAULT: usize = 64 << 10;
/// A store has no more shards.
pub(crate) const SHARDS_MAX: u16 = 1024;
/// Bytes of a segment, a power of two.
pub(crate) const SEGMENT_BYTES: std::ops::RangeInclusive<u64> = 64 << 10..=16 << 30;

pub(crate) fn in_range(name: &'static str, value: u64, min: u64, max: u64) -> Result<(), ConfigError> {
    if (min..=max).contains(&value) { Ok(()) } else { Err(ConfigError::OutOfRange { name, value, min, max }) }
}

/// Whole milliseconds, for checks of ranges.
pub(crate) fn whole_ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn power_of_two(name: &'static str, value: u64, min: u64, max: u64) -> Result<(), ConfigError> {
    in_range(name, value, min, max)?;
    if value.is_power_of_two() { Ok(()) } else { Err(ConfigError::NotPowerOfTwo { name, value }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_limit_is_checked() {
        let bad = [
            Config::new("d").shards(0),
            Config::new("d").shards(1025),
            Config::new("d").ring_capacity(1000),
            Config::new("d").ring_capacity(1),
            Config::new("d").batch_max(0),
            Config::new("d").segment_bytes(1000),
            Config::new("d").segment_bytes(65 << 10),
            Config::new("d").event_bytes_max(8),
            Config::new("d").segment_bytes(64 << 10).event_bytes_max(32 << 10),
            // The default's value, but asked for.
            Config::new("d").segment_bytes(64 << 10).event_bytes_max(64 << 10),
            Config::new("d").event_bytes_max(64 << 10).segment_bytes(128 << 10),
            Config::new("d").durability(Durability::Periodic(Duration::ZERO)),
            Config::new("d").retention(Retention { bytes_max: Some(1), age_max: None }),
        ];
        for config in bad {
            assert!(config.clone().validate().is_err(), "{config:?}");
        }
        assert!(Config::new("d").segment_bytes(64 << 10).validate().is_ok());
    }
}
