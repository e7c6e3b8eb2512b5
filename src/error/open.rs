//! Errors of opening a store.

use std::io;
use std::path::PathBuf;

use super::{CodePanic, ConfigError, Corruption};
use crate::event::{EventTypeId, Key, Offset, PlacementId, Root, ShardId};

/// The reason why a store could not be opened. The store is unchanged, with one exception: an `Io` error of a repair
/// (`action` names it). Repairs begin after the whole store has been found valid, and the next open continues them.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The configuration is invalid.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Another process, or another engine of this process, has the store open.
    #[error(
        "the store at {} is already open, in another process or by an engine of this process that was not dropped",
        dir.display()
    )]
    Locked {
        /// The folder of the store.
        dir: PathBuf,
    },
    /// The store has a different number of shards. The number is fixed when a store is created.
    #[error(
        "the store has {stored} shards, not {asked}; `corelane reshard`, which will move a store, does not exist yet"
    )]
    ShardCount {
        /// The number in the manifest.
        stored: u16,
        /// The number in the configuration.
        asked: u16,
    },
    /// The store places keys in another way. The placement is fixed when a store is created.
    #[error(
        "the store places keys by {}, not by {}: its keys would be searched in the wrong shards",
        PlacementId::describe(stored.as_ref()),
        PlacementId::describe(asked.as_ref())
    )]
    Placement {
        /// The placement in the manifest; `None`: the key's own hash.
        stored: Option<PlacementId>,
        /// The placement in the configuration.
        asked: Option<PlacementId>,
    },
    /// The placement gives a key of the store another shard than the one that holds the key: the function has changed
    /// under its name and version, or is not pure.
    #[error("key {key} is in shard {stored}, but {placement} puts it into shard {asked}")]
    KeyMoved {
        /// The key.
        key: Key,
        /// The shard that holds its events.
        stored: ShardId,
        /// The shard that the function gives.
        asked: ShardId,
        /// The placement.
        placement: PlacementId,
    },
    /// The store has a different segment size. The size is fixed when a store is created.
    #[error("the store has segments of {stored} bytes, not {asked}")]
    SegmentBytes {
        /// The size in the manifest.
        stored: u64,
        /// The size in the configuration.
        asked: u64,
    },
    /// A file has a format version that this build does not know. The file is left untouched.
    #[error("{} has format version {found}; this build reads versions up to {known}", path.display())]
    UnknownFormat {
        /// The file.
        path: PathBuf,
        /// The version in the file.
        found: u32,
        /// The newest version that this build reads.
        known: u32,
    },
    /// A file was written with different archive settings (byte order, alignment, pointer width).
    #[error("{} was written with another archive format ({found:#010x}; this build has {known:#010x})", path.display())]
    ArchiveFormat {
        /// The file.
        path: PathBuf,
        /// The fingerprint in the file.
        found: u32,
        /// The fingerprint of this build.
        known: u32,
    },
    /// The program's archived events differ in size or alignment from those in the store, but an event type kept its
    /// schema version, so its records would be misread. A changed size means that the layout of every event type has
    /// changed.
    #[error(
        "archived events take {declared} bytes (aligned to {declared_align}), but {stored} (aligned to {stored_align}) in the store: event type {event_type} and all others need a new schema version and an upcaster"
    )]
    ArchiveSize {
        /// The first such event type.
        event_type: EventTypeId,
        /// Bytes of the archive's root in the store.
        stored: u32,
        /// Its alignment in the store.
        stored_align: u16,
        /// Bytes of the archive's root in the program.
        declared: u32,
        /// Its alignment in the program.
        declared_align: u16,
    },
    /// A file in the store does not match its name.
    #[error("{}: {why}", path.display())]
    ForeignFile {
        /// The file.
        path: PathBuf,
        /// The mismatch.
        why: &'static str,
    },
    /// The log holds an event type, or a schema version of one, that this program cannot read.
    #[error(
        "shard {shard} holds event type {event_type} ({name}) of schema version {schema_version}, which this program does not declare"
    )]
    UnknownEventType {
        /// The shard.
        shard: ShardId,
        /// The id in the record.
        event_type: EventTypeId,
        /// The name in the manifest.
        name: String,
        /// The schema version in the record.
        schema_version: u16,
    },
    /// The program declares an event type id that has a different name in the store.
    #[error("event type {event_type} is \"{stored}\" in the store, but \"{declared}\" in the program")]
    EventTypeRenamed {
        /// The id.
        event_type: EventTypeId,
        /// The name in the manifest.
        stored: String,
        /// The name in the program.
        declared: String,
    },
    /// The program declares a name that has a different event type id in the store.
    #[error("\"{name}\" is event type {stored} in the store, but {declared} in the program")]
    EventTypeRenumbered {
        /// The name.
        name: String,
        /// The id in the manifest.
        stored: EventTypeId,
        /// The id in the program.
        declared: EventTypeId,
    },
    /// Retention has freed the beginning of the log, and no usable checkpoint holds the states at that point. The store
    /// still opens without states, or after its damaged checkpoint is restored.
    #[error("shard {shard}: the log begins at offset {earliest}, and no usable checkpoint holds the states before it")]
    StatesLost {
        /// The shard.
        shard: ShardId,
        /// The earliest offset still held.
        earliest: Offset,
    },
    /// Retention has freed the beginning of the log, and the states in the newest checkpoint would be misread: they
    /// have the program's state version, but their archives differ in size or alignment from the program's.
    #[error(
        "shard {shard}: saved states take {stored} bytes (aligned to {stored_align}), the program's {declared} (aligned to {declared_align}), and the log before them is freed: increase STATE_VERSION and read them with Aggregate::upgrade"
    )]
    StateLayout {
        /// The shard.
        shard: ShardId,
        /// Bytes of the root of an archived state in the checkpoint.
        stored: u32,
        /// Its alignment in the checkpoint.
        stored_align: u16,
        /// Bytes of the root in the program.
        declared: u32,
        /// Its alignment in the program.
        declared_align: u16,
    },
    /// The store holds the rejection of a command by a program whose rejections differ in size or alignment. If the
    /// command were repeated, this program could not return the reason.
    #[error(
        "shard {shard}: rejections take {stored} bytes (aligned to {stored_align}), the program's {declared} (aligned to {declared_align}): read them with Aggregate::upgrade_rejection"
    )]
    RejectionLayout {
        /// The shard.
        shard: ShardId,
        /// Bytes of the root of an archived rejection in the store.
        stored: u32,
        /// Its alignment in the store.
        stored_align: u16,
        /// Bytes of the root in the program.
        declared: u32,
        /// Its alignment in the program.
        declared_align: u16,
    },
    /// Durable bytes of the log are damaged. Opening skips no damage.
    #[error(transparent)]
    Corruption(#[from] Corruption),
    /// Application code panicked while the store was being opened.
    #[error(transparent)]
    Panicked(#[from] CodePanic),
    /// A file beside the log is damaged. It is left untouched.
    #[error("{} is damaged at byte {at}: {why}", path.display())]
    DamagedFile {
        /// The file.
        path: PathBuf,
        /// The position of the damage in bytes.
        at: u64,
        /// The check that failed.
        why: &'static str,
    },
    /// An operation of the file system failed.
    #[error("{action} {} failed", path.display())]
    Io {
        /// The operation.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
}

impl OpenError {
    pub(crate) fn state_layout(shard: ShardId, stored: Root, declared: Root) -> Self {
        let (stored_align, declared_align) = (stored.align, declared.align);
        Self::StateLayout { shard, stored: stored.bytes, stored_align, declared: declared.bytes, declared_align }
    }

    pub(crate) fn rejection_layout(shard: ShardId, stored: Root, declared: Root) -> Self {
        let (stored_align, declared_align) = (stored.align, declared.align);
        Self::RejectionLayout { shard, stored: stored.bytes, stored_align, declared: declared.bytes, declared_align }
    }
}
