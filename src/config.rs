//! The configuration of an engine, checked once: `Config` → [`Config::validate`] → [`ValidConfig`]. Nothing else takes
//! `Config`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::ConfigError;
use crate::event::{Key, PLACEMENT_NAME_BYTES_MAX, Placement, Router, ShardId};
use crate::sync::Wait;

/// Defines one builder method per field.
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

/// The durability mode: when appended events are synced to the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Durability {
    /// The engine never syncs by itself; the operating system writes the log when it chooses. Events survive a killed
    /// process, but not a power cut. Only `flush` and `shutdown` acknowledge events as durable.
    OsCache,
    /// Syncs at this interval, 1 ms to 1 hour, while there are unsynced events.
    Periodic(Duration),
    /// Syncs whenever there are unsynced events. Syncs begin at least 900 µs apart, and each covers all events appended
    /// since the last one; after a pause, an event is synced at once.
    #[default]
    GroupCommit,
}

/// The cores that the shards' threads are pinned to.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Pin {
    /// Pins shard `i` to the `i`-th allowed core, counted from the last one backwards. The first core, where the
    /// operating system does its own work, stays free for producers. If pinning would leave fewer than two cores for
    /// producers and for the threads that sync, prepare and save, nothing is pinned.
    #[default]
    Auto,
    /// Pins nothing.
    None,
    /// Pins the shards to these core ids in turn, wrapping around. If the process may not use a core, the engine logs a
    /// warning and leaves the shard unpinned.
    Cores(Vec<usize>),
}

/// The bounds of the log's size and age. The default keeps everything.
///
/// A segment is freed when it exceeds either bound. Freed segments become spares and are written again.
///
/// ```
/// # use corelane::Retention;
/// # use std::time::Duration;
/// let retention = Retention::bytes(10 << 30).age(Duration::from_secs(7 * 86_400));
/// assert_eq!(retention.bytes_max, Some(10 << 30));
/// assert_eq!(Retention::default().bytes_max, None);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Retention {
    /// The largest number of bytes in whole segments kept per shard, at least two segments. `None` means no bound.
    pub bytes_max: Option<u64>,
    /// The age up to which a segment is kept, counted from its newest append. `None` means no bound.
    ///
    /// A jump of the wall clock frees nothing early: if the time of a segment cannot be right, its age is taken from
    /// later segments, or from the time since this process first saw the segment (`GUARANTEES.md`).
    pub age_max: Option<Duration>,
}

impl Retention {
    /// Keeps at most `bytes_max` bytes of whole segments per shard.
    #[must_use]
    pub const fn bytes(bytes_max: u64) -> Self {
        Self { bytes_max: Some(bytes_max), age_max: None }
    }

    /// Also frees segments whose newest append is older than `age_max`. To set only this bound, start from
    /// [`Retention::default`].
    #[must_use]
    pub const fn age(self, age_max: Duration) -> Self {
        Self { age_max: Some(age_max), ..self }
    }
}

/// The configuration of an engine. Start from [`Config::new`]; every setting has a default.
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

/// A checked configuration: every value is in range.
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
    /// `None`: a key's own hash chooses its shard.
    pub(crate) placement: Option<Placement>,
}

impl ValidConfig {
    /// Returns the folder of the store.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Returns the number of shards.
    #[must_use]
    pub fn shards(&self) -> u16 {
        self.shards
    }

    /// Returns the shard of `key`: the one that the store's placement gives, or by default that of the key's own hash.
    #[must_use]
    pub fn shard_of(&self, key: Key) -> ShardId {
        self.router().shard(key)
    }

    pub(crate) fn router(&self) -> Router {
        Router::new(self.shards, self.placement.as_ref())
    }

    /// Returns the wait strategy: the configured one, or the one chosen by the number of cores.
    #[must_use]
    pub fn wait(&self) -> Wait {
        self.wait
    }

    /// Returns the durability mode.
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
    /// Describes a store in the folder `dir`, with one shard and `GroupCommit`. A relative path is resolved against the
    /// working directory once, when the store is opened. Later changes of the working directory or of the folder's name
    /// have no effect.
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
                placement: None,
            },
            wait: None,
            event_bytes_max: None,
        }
    }

    checked_setters! {
        /// The number of shards, 1..=1024. Default: 1. Fixed when the store is created. Several shards may share a
        /// core.
        shards: u16,
        /// The durability mode. Default: [`Durability::GroupCommit`].
        durability: Durability,
        /// The cores that the shards are pinned to. Default: [`Pin::Auto`].
        pin: Pin,
        /// The number of slots of one lane, a power of two in 2..=2²⁴. Default: 8192.
        ring_capacity: usize,
        /// The largest number of events that a shard takes from one lane at a time, 1..=65,536. Default: 512.
        batch_max: usize,
        /// The size of a segment in bytes, a power of two in 64 KiB..=16 GiB. Fixed when the store is created. Default:
        /// 256 MiB.
        segment_bytes: u64,
        /// The number of freed segments that each shard keeps as spares, 0..=1024. Default: 2.
        spares_max: usize,
        /// The bounds of the log's size and age. Default: no bounds; everything is kept.
        retention: Retention,
        /// The number of keys that each shard allocates space for at the start, 0..=2³⁰. The table grows when needed.
        /// Default: 10,000.
        keys_expected: usize,
        /// The number of events of one key between two snapshots of its state, 1..=2⁴⁰, or 0 for no snapshots. Time
        /// travel applies at most this many events, unless snapshots were skipped
        /// ([`crate::state::SnapshotStats::skipped`]). Default: 100.
        snapshot_every: u64,
        /// The number of log bytes between two checkpoints of all states of a shard, at least 1 MiB. Default: 1 GiB. 0
        /// means that a checkpoint is written only when retention needs one or [`crate::Engine::checkpoint`] is called.
        /// Opening a store replays about this many bytes of each shard's log.
        checkpoint_bytes: u64,
        /// The number of commands with idempotency keys remembered per key, 0..=1024. A repeat of one of these commands
        /// returns the outcome of the first. Default: 16.
        outcomes_kept: usize,
        /// Set to `false` to record no latency histograms. Default: `true`.
        latency: bool,
    }

    /// Sets the wait strategy of idle threads. Default: [`Wait::Park`] if the shards and one producer fill all cores,
    /// otherwise [`Wait::SpinYield`].
    #[must_use]
    pub fn wait(mut self, wait: Wait) -> Self {
        self.wait = Some(wait);
        self
    }

    /// Places keys by a function of the application. Default: each key's own hash chooses its shard. Fixed when the
    /// store is created: opening it with another placement is [`crate::OpenError::Placement`].
    #[must_use]
    pub fn placement(mut self, placement: Placement) -> Self {
        self.checked.placement = Some(placement);
        self
    }

    /// Sets the largest archive of one event in bytes, 16 bytes to 16 MiB and at most a quarter of a segment. Default:
    /// 64 KiB, or a quarter of a segment if that is less.
    #[must_use]
    pub fn event_bytes_max(mut self, event_bytes_max: usize) -> Self {
        self.event_bytes_max = Some(event_bytes_max);
        self
    }

    /// Checks every value against its range.
    ///
    /// # Errors
    /// Returns [`ConfigError`] for the first invalid value.
    pub fn validate(mut self) -> Result<ValidConfig, ConfigError> {
        let c = &mut self.checked;
        // The default shrinks to fit small segments; a configured value that does not fit is rejected.
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
        if let Some(id) = c.placement.as_ref().map(Placement::id)
            && !(1..=PLACEMENT_NAME_BYTES_MAX).contains(&id.name.len())
        {
            return Err(ConfigError::PlacementName { name: id.name.clone(), bytes_max: PLACEMENT_NAME_BYTES_MAX });
        }
        let cores = crate::sync::cores();
        c.wait = self.wait.unwrap_or(if usize::from(c.shards) + 1 >= cores { Wait::Park } else { Wait::SpinYield });
        Ok(self.checked)
    }
}

const EVENT_BYTES_MAX_DEFAULT: usize = 64 << 10;
/// The largest number of shards of a store.
pub(crate) const SHARDS_MAX: u16 = 1024;
/// The range of segment sizes in bytes; a size is a power of two.
pub(crate) const SEGMENT_BYTES: std::ops::RangeInclusive<u64> = 64 << 10..=16 << 30;

pub(crate) fn in_range(name: &'static str, value: u64, min: u64, max: u64) -> Result<(), ConfigError> {
    if (min..=max).contains(&value) { Ok(()) } else { Err(ConfigError::OutOfRange { name, value, min, max }) }
}

/// Returns the duration in whole milliseconds, for range checks.
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
    fn a_value_outside_its_range_is_refused() {
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
            // The default's value, but set explicitly.
            Config::new("d").segment_bytes(64 << 10).event_bytes_max(64 << 10),
            Config::new("d").event_bytes_max(64 << 10).segment_bytes(128 << 10),
            Config::new("d").durability(Durability::Periodic(Duration::ZERO)),
            Config::new("d").retention(Retention::bytes(1)),
            Config::new("d").placement(Placement::new("", 1, Key::get)),
            Config::new("d").placement(Placement::new("x".repeat(65), 1, Key::get)),
        ];
        for config in bad {
            assert!(config.clone().validate().is_err(), "{config:?}");
        }
        assert!(Config::new("d").segment_bytes(64 << 10).validate().is_ok());
    }
}
