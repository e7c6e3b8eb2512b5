//! One error enum per family of operations. Errors carry facts, not sentences to parse.

mod code_panic;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use crate::event::{EventTypeId, Offset, Root, ShardId};

pub use code_panic::{CodePanic, PanickedEvent};
pub(crate) use code_panic::{guard, panic_text};

/// An error a handler returns: any error or text.
pub type HandlerError = Box<dyn std::error::Error + Send + Sync>;

/// A configuration that cannot be used, found by [`crate::Config::validate`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// A value lies outside what the engine supports.
    #[error("{name} is {value}, but must lie in {min}..={max}")]
    OutOfRange {
        /// The setting.
        name: &'static str,
        /// What was given.
        value: u64,
        /// Smallest allowed.
        min: u64,
        /// Largest allowed.
        max: u64,
    },
    /// A value must be a power of two.
    #[error("{name} is {value}, but must be a power of two")]
    NotPowerOfTwo {
        /// The setting.
        name: &'static str,
        /// What was given.
        value: u64,
    },
    /// An event type is declared twice, or with id 0.
    #[error("event type id {id} is declared twice")]
    DuplicateEventType {
        /// The id.
        id: EventTypeId,
    },
    /// Two event types have one name.
    #[error("event types {first} and {second} are both called \"{name}\"")]
    DuplicateEventName {
        /// The name.
        name: String,
        /// The type declared first.
        first: EventTypeId,
        /// The other.
        second: EventTypeId,
    },
    /// An event type's name is longer than a manifest can hold.
    #[error("the name of event type {id} has {bytes} bytes, more than {bytes_max}")]
    EventNameTooLong {
        /// The id.
        id: EventTypeId,
        /// Its length.
        bytes: usize,
        /// The limit.
        bytes_max: usize,
    },
    /// An upcaster that nothing would ever be read with: its type is not declared, its schema version is not older than the
    /// type's own, or there is one for it already.
    #[error("the upcaster for schema version {schema_version} of event type {event_type} reads no older layout of it")]
    UselessUpcaster {
        /// The type it names.
        event_type: EventTypeId,
        /// The version it names.
        schema_version: u16,
    },
}

/// Why a store could not be opened. The store is unchanged, with one exception: `Io` where a repair of a store that had been found
/// sound failed (`action` says which). The next opening goes on with the repairs.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The configuration is invalid.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Another process (or another engine of this one) has the store open.
    #[error("the store at {} is open already: in another process, or by an engine of this one that is not dropped", dir.display())]
    Locked {
        /// The store.
        dir: PathBuf,
    },
    /// The store has another number of shards; it is fixed when a store is created.
    #[error(
        "the store has {stored} shards, not {asked}; `corelane reshard`, to move a store to another count, does not exist yet"
    )]
    ShardCount {
        /// In the manifest.
        stored: u16,
        /// In the configuration.
        asked: u16,
    },
    /// The store has another segment size; it is fixed when a store is created.
    #[error("the store has segments of {stored} bytes, not {asked}")]
    SegmentBytes {
        /// In the manifest.
        stored: u64,
        /// In the configuration.
        asked: u64,
    },
    /// A file is of a format version this build does not know. It is left untouched.
    #[error("{} has format version {found}; this build reads up to {known}", path.display())]
    UnknownFormat {
        /// The file.
        path: PathBuf,
        /// Version found.
        found: u32,
        /// Newest version known.
        known: u32,
    },
    /// A file was written with other archive settings (byte order, alignment, pointer width).
    #[error("{} was written with another archive format ({found:#010x}, this build has {known:#010x})", path.display())]
    ArchiveFormat {
        /// The file.
        path: PathBuf,
        /// Fingerprint found.
        found: u32,
        /// Fingerprint of this build.
        known: u32,
    },
    /// Archived events of the program have another size (or alignment) than those in the store, and a type kept its schema
    /// version: its records would be read as something else. Where the size changes, every type's layout has changed.
    #[error(
        "archived events take {declared} bytes (aligned to {declared_align}), in the store {stored} (aligned to {stored_align}): event type {event_type} and all others need a new schema version and an upcaster"
    )]
    ArchiveSize {
        /// The first such type.
        event_type: EventTypeId,
        /// Bytes of the root in the store.
        stored: u32,
        /// Its alignment in the store.
        stored_align: u16,
        /// Bytes of the root in the program.
        declared: u32,
        /// Its alignment in the program.
        declared_align: u16,
    },
    /// A file in the store is not what its name says.
    #[error("{}: {why}", path.display())]
    ForeignFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The log holds an event type (or a schema version of one) that this program cannot read.
    #[error(
        "shard {shard} holds event type {event_type} ({name}) of schema version {schema_version}, which this program does not declare"
    )]
    UnknownEventType {
        /// Where.
        shard: ShardId,
        /// The id in the record.
        event_type: EventTypeId,
        /// Its name, as the manifest has it.
        name: String,
        /// The version in the record.
        schema_version: u16,
    },
    /// The program declares a type under an id that the store knows by another name.
    #[error("event type {event_type} is \"{stored}\" in the store, but \"{declared}\" in the program")]
    EventTypeRenamed {
        /// The id.
        event_type: EventTypeId,
        /// Name in the manifest.
        stored: String,
        /// Name in the program.
        declared: String,
    },
    /// The program declares a name that the store knows under another id.
    #[error("\"{name}\" is event type {stored} in the store, but {declared} in the program")]
    EventTypeRenumbered {
        /// The name.
        name: String,
        /// Id in the manifest.
        stored: EventTypeId,
        /// Id in the program.
        declared: EventTypeId,
    },
    /// Retention has freed the beginning of the log, and no checkpoint that can be used has the states it had made. (A store
    /// without states opens; so does one whose damaged checkpoint is put back.)
    #[error("shard {shard}: the log begins at offset {earliest} and no usable checkpoint has the states before it")]
    StatesLost {
        /// The shard.
        shard: ShardId,
        /// The earliest offset still held.
        earliest: Offset,
    },
    /// Retention has freed the beginning of the log, and the newest checkpoint has states of the program's own state version
    /// whose archives have another size (or alignment) than the program's: they would be read as something else.
    #[error(
        "shard {shard}: saved states take {stored} bytes (aligned to {stored_align}), the program's {declared} (aligned to {declared_align}), and the log before them is freed: count up STATE_VERSION and read them with Aggregate::upgrade"
    )]
    StateLayout {
        /// The shard.
        shard: ShardId,
        /// Bytes of an archived state's root in the checkpoint.
        stored: u32,
        /// Its alignment there.
        stored_align: u16,
        /// Bytes of the root in the program.
        declared: u32,
        /// Its alignment in the program.
        declared_align: u16,
    },
    /// A command was rejected by a program whose rejections have another size (or alignment). This program could not tell the reason
    /// if the command were repeated.
    #[error(
        "shard {shard}: rejections take {stored} bytes (aligned to {stored_align}), the program's {declared} (aligned to {declared_align}): read them with Aggregate::upgrade_rejection"
    )]
    RejectionLayout {
        /// The shard.
        shard: ShardId,
        /// Bytes of an archived rejection's root in the store.
        stored: u32,
        /// Its alignment there.
        stored_align: u16,
        /// Bytes of the root in the program.
        declared: u32,
        /// Its alignment in the program.
        declared_align: u16,
    },
    /// Bytes that had been durable are damaged. Nothing is skipped.
    #[error(transparent)]
    Corruption(#[from] Corruption),
    /// Code of the program panicked while the store was being opened.
    #[error(transparent)]
    Panicked(#[from] CodePanic),
    /// The same in a file beside the log. It is left as it is.
    #[error("{}, at {at}: {why}", path.display())]
    DamagedFile {
        /// The file.
        path: PathBuf,
        /// Where in it.
        at: u64,
        /// What does not hold.
        why: &'static str,
    },
    /// The file system refused.
    #[error("{action} {}: {source}", path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// To which file.
        path: PathBuf,
        /// What the system said.
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

/// Damage in the middle of a log: bytes that were once durable and no longer hold, or are missing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("shard {shard}, segment {segment}, offset {offset}: {why}")]
pub struct Corruption {
    /// The shard.
    pub shard: ShardId,
    /// The segment's number.
    pub segment: u64,
    /// Where the damage begins.
    pub offset: Offset,
    /// What does not hold.
    pub why: &'static str,
}

/// Why a shard stopped. It is final for this engine: open the store again.
#[derive(Debug, Clone, thiserror::Error)]
#[error("shard {shard} failed: {cause}")]
pub struct ShardFailure {
    /// The shard.
    pub shard: ShardId,
    /// Why.
    pub cause: FailureCause,
}

/// The cause of a [`ShardFailure`].
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum FailureCause {
    /// Syncing the log failed. What the device holds is unknown, so nothing later is acknowledged.
    #[error("sync of the log: {0}")]
    Sync(Arc<io::Error>),
    /// The log could not be written or extended (other than for lack of space).
    #[error("{action}: {source}")]
    Storage {
        /// What was being done.
        action: &'static str,
        /// What the system said.
        source: Arc<io::Error>,
    },
    /// An inline handler with the halt policy returned an error.
    #[error("handler {handler} at offset {offset}: {error}")]
    Handler {
        /// The handler's name.
        handler: String,
        /// The event.
        offset: Offset,
        /// What it said.
        error: String,
    },
    /// An event changed its type after it was accepted, to one that its `TYPES` do not declare. It was not appended: it
    /// could not be read again.
    #[error("an accepted event of key {key} is of type {event_type}, which its TYPES do not declare")]
    UndeclaredType {
        /// Whose event.
        key: u64,
        /// What `event_type()` returned.
        event_type: EventTypeId,
    },
    /// The log has come to the last offset that a record's link to its predecessor can name (4 PiB).
    #[error("the log ends at offset {end}: no further segment can be numbered")]
    OffsetsExhausted {
        /// Where the last segment ends.
        end: Offset,
    },
    /// Code on the shard's thread panicked.
    #[error("panic: {0}")]
    Panic(String),
    /// An event did not fit after it had been accepted: its archive is larger than it promised.
    #[error("an accepted event of key {key} does not fit into {bytes_max} bytes")]
    EventTooLarge {
        /// Whose event.
        key: u64,
        /// The limit.
        bytes_max: usize,
    },
}

/// A publish that was refused. The event comes back, with the reason.
#[derive(thiserror::Error)]
#[non_exhaustive]
pub enum Rejected<E> {
    /// The lane is full (or stayed full until the deadline). On an engine's own thread, which must not wait, it is returned at once.
    #[error("the lane is full")]
    Full(E),
    /// The lane is full because the shard waits for its storage: for space, or because quota, descriptors or memory are exhausted
    /// ([`crate::metrics::ShardMetrics::storage_full_why`]). It goes on by itself when there are some again.
    #[error("the lane is full: the shard waits for storage (space, quota, descriptors or memory)")]
    StorageFull(E),
    /// The call would wait for the very thread that makes it: an engine's own, or that of a consumer it asks for. Nothing was sent.
    #[error("the call would wait for its own thread: make it on another one")]
    OnEngineThread(E),
    /// The engine is shutting down or gone.
    #[error("the engine is closed")]
    Closed(E),
    /// The key's shard failed.
    #[error("{1}")]
    ShardFailed(E, ShardFailure),
    /// The archive would exceed `event_bytes_max`.
    #[error("the event is larger than {bytes_max} bytes")]
    TooLarge {
        /// The event.
        event: E,
        /// The configured limit.
        bytes_max: usize,
    },
    /// Its `event_type()` is none of its `TYPES`: it could not be read again.
    #[error("the event is of type {event_type}, which its TYPES do not declare")]
    UndeclaredType {
        /// The event.
        event: E,
        /// What `event_type()` returned.
        event_type: EventTypeId,
    },
}

impl<E> Rejected<E> {
    /// Takes the event back.
    pub fn into_event(self) -> E {
        match self {
            Self::Full(e)
            | Self::StorageFull(e)
            | Self::OnEngineThread(e)
            | Self::Closed(e)
            | Self::ShardFailed(e, _) => e,
            Self::TooLarge { event, .. } | Self::UndeclaredType { event, .. } => event,
        }
    }

    /// The same refusal of something else.
    pub(crate) fn map<T>(self, change: impl FnOnce(E) -> T) -> Rejected<T> {
        match self {
            Self::Full(e) => Rejected::Full(change(e)),
            Self::StorageFull(e) => Rejected::StorageFull(change(e)),
            Self::OnEngineThread(e) => Rejected::OnEngineThread(change(e)),
            Self::Closed(e) => Rejected::Closed(change(e)),
            Self::ShardFailed(e, failure) => Rejected::ShardFailed(change(e), failure),
            Self::TooLarge { event, bytes_max } => Rejected::TooLarge { event: change(event), bytes_max },
            Self::UndeclaredType { event, event_type } => Rejected::UndeclaredType { event: change(event), event_type },
        }
    }

    /// The reason alone.
    pub fn reason(&self) -> RejectedReason {
        match self {
            Self::Full(_) => RejectedReason::Full,
            Self::StorageFull(_) => RejectedReason::StorageFull,
            Self::OnEngineThread(_) => RejectedReason::OnEngineThread,
            Self::Closed(_) => RejectedReason::Closed,
            Self::ShardFailed(_, failure) => RejectedReason::ShardFailed(failure.clone()),
            Self::TooLarge { bytes_max, .. } => RejectedReason::TooLarge { bytes_max: *bytes_max },
            Self::UndeclaredType { event_type, .. } => RejectedReason::UndeclaredType { event_type: *event_type },
        }
    }
}

// Not derived: an event need not be Debug for its rejection to be.
impl<E> std::fmt::Debug for Rejected<E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Rejected({:?})", self.reason())
    }
}

/// Why a publish was refused, without the event.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum RejectedReason {
    /// The lane is full.
    #[error("the lane is full")]
    Full,
    /// The lane is full because the storage is.
    #[error("the lane is full: the shard waits for storage (space, quota, descriptors or memory)")]
    StorageFull,
    /// The call would wait for the very thread that makes it. Nothing was sent.
    #[error("the call would wait for its own thread: make it on another one")]
    OnEngineThread,
    /// The engine is shutting down or gone.
    #[error("the engine is closed")]
    Closed,
    /// The key's shard failed.
    #[error(transparent)]
    ShardFailed(ShardFailure),
    /// The archive would exceed `event_bytes_max`.
    #[error("the event is larger than {bytes_max} bytes")]
    TooLarge {
        /// The configured limit.
        bytes_max: usize,
    },
    /// Its `event_type()` is none of its `TYPES`.
    #[error("the event is of type {event_type}, which its TYPES do not declare")]
    UndeclaredType {
        /// What `event_type()` returned.
        event_type: EventTypeId,
    },
}

impl RejectedReason {
    /// The refusal of `event` for this reason.
    pub(crate) fn of<E>(self, event: E) -> Rejected<E> {
        match self {
            Self::Full => Rejected::Full(event),
            Self::StorageFull => Rejected::StorageFull(event),
            Self::OnEngineThread => Rejected::OnEngineThread(event),
            Self::Closed => Rejected::Closed(event),
            Self::ShardFailed(failure) => Rejected::ShardFailed(event, failure),
            Self::TooLarge { bytes_max } => Rejected::TooLarge { event, bytes_max },
            Self::UndeclaredType { event_type } => Rejected::UndeclaredType { event, event_type },
        }
    }
}

/// Why a gated producer stopped. What is ready stays in front, in order.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GateError {
    /// The event in front cannot be published now, or the storage has no room for its record (`StorageFull`).
    #[error(transparent)]
    Publish(RejectedReason),
    /// The record of a gap, or of where a partition started, could not be made durable, so nothing behind it may be published. It is
    /// final: open the gate again.
    #[error("the gate's record {} could not be written: {source} (open the gate again)", path.display())]
    GapRecord {
        /// The gate's file.
        path: PathBuf,
        /// What the system said.
        source: Arc<io::Error>,
    },
    /// The positions could not be saved. The older ones stay.
    #[error(transparent)]
    Positions(OpenError),
    /// The log could not be read up to where positions are to be saved. The older ones stay.
    #[error(transparent)]
    Read(ReadError),
    /// What was published did not become durable.
    #[error(transparent)]
    Wait(WaitError),
}

/// Why a gate could not be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GateOpenError {
    /// A name has 1..=64 of `[a-z0-9._-]` and does not begin with a dot.
    #[error("no gate can be called {name:?}")]
    Name {
        /// What was asked for.
        name: String,
    },
    /// This engine has a gate of this name open.
    #[error("the gate {name} is open already")]
    Taken {
        /// The name.
        name: String,
    },
    /// The policy cannot be used.
    #[error(transparent)]
    Policy(#[from] ConfigError),
    /// The store knows more partitions of it than the policy allows.
    #[error("the gate has {partitions} partitions, more than its policy allows")]
    TooManyPartitions {
        /// How many.
        partitions: usize,
    },
    /// One of its files could not be used.
    #[error(transparent)]
    File(#[from] OpenError),
    /// The log could not be counted.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The starts of partitions that the log holds could not be recorded.
    #[error(transparent)]
    Record(GateError),
    /// What had been accepted before did not become durable.
    #[error(transparent)]
    Wait(#[from] WaitError),
}

/// Why waiting for a receipt, a flush or a shutdown ended without success.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum WaitError {
    /// The shard failed before the event got there. Whether it is on disk is unknown.
    #[error(transparent)]
    ShardFailed(#[from] ShardFailure),
    /// The deadline passed; the event may still get there.
    #[error("the deadline passed")]
    TimedOut,
    /// A checkpoint could not be written; the log says why. What it would have saved is still in the log.
    #[error("the checkpoint could not be written")]
    CheckpointFailed,
    /// The engine is closed.
    #[error("the engine is closed")]
    Closed,
    /// The question itself panicked, with this text. The shard goes on.
    #[error("the question panicked: {0}")]
    QuestionPanicked(String),
    /// The call would wait for the very thread that makes it: an engine's own (inline handlers, `evolve`, `decide`, views, questions),
    /// or that of the consumer that is waited for.
    #[error("the call would wait for its own thread: make it on another one")]
    OnEngineThread,
    /// The durability mode never syncs by itself; call `flush`.
    #[error("durability mode OsCache acknowledges nothing as durable without flush()")]
    NeverDurable,
}

impl From<crate::sync::GaveUp> for WaitError {
    fn from(gave_up: crate::sync::GaveUp) -> Self {
        match gave_up {
            crate::sync::GaveUp::TimedOut => Self::TimedOut,
            crate::sync::GaveUp::OnEngineThread => Self::OnEngineThread,
        }
    }
}

/// Why the past of a key cannot be told.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HistoryError {
    /// Retention has freed it.
    #[error("key {key}: what came before version {earliest} is gone")]
    BeyondRetention {
        /// The key.
        key: crate::event::Key,
        /// The earliest version that can be told.
        earliest: crate::event::Version,
    },
    /// It has not happened.
    #[error("key {key} has come to version {newest} only")]
    NotYet {
        /// The key.
        key: crate::event::Key,
        /// Its newest version.
        newest: crate::event::Version,
    },
    /// The log could not be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// `evolve`, an upcaster or `upgrade` panicked.
    #[error(transparent)]
    Panicked(#[from] CodePanic),
    /// The shard did not say where the key stands.
    #[error(transparent)]
    Wait(#[from] WaitError),
}

impl From<Corruption> for HistoryError {
    fn from(corruption: Corruption) -> Self {
        Self::Read(corruption.into())
    }
}

/// Why reading cannot go on from a saved position. The data saved with it was made of other events than the log holds: a copy of
/// the store or of the data was put back, or one of them belongs to another store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PositionError {
    /// It is no position at all.
    #[error("not a position: {why}")]
    Malformed {
        /// What does not hold.
        why: &'static str,
    },
    /// It was taken in another store.
    #[error("shard {shard}: the position is of store {position:016x}, and this is store {store:016x}")]
    OtherStore {
        /// The shard.
        shard: ShardId,
        /// The id of the store it was taken in.
        position: u64,
        /// The id of this store.
        store: u64,
    },
    /// It is of another shard.
    #[error("shard {shard}: the position is of shard {position}")]
    OtherShard {
        /// The shard it was used for.
        shard: ShardId,
        /// The shard it is of.
        position: ShardId,
    },
    /// The log ends before it: the log has lost events, or is an older copy.
    #[error("shard {shard}: the position is at {position}, and the log ends at {end}")]
    AheadOfLog {
        /// The shard.
        shard: ShardId,
        /// Where reading was to go on.
        position: Offset,
        /// What there is.
        end: Offset,
    },
    /// The log reaches as far, but with other events before the position: a copy was put back, or the newest events were lost, and
    /// the log went on differently since.
    #[error("shard {shard}: the position at {position} is of another history of this store: {why}")]
    OtherHistory {
        /// The shard.
        shard: ShardId,
        /// Where reading was to go on.
        position: Offset,
        /// What does not fit.
        why: &'static str,
    },
}

/// Why a read of the log ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// The place asked for was freed by retention.
    #[error("shard {shard}: offset {asked} is gone; the earliest is {earliest}")]
    BeyondRetention {
        /// The shard.
        shard: ShardId,
        /// What was asked for.
        asked: Offset,
        /// The earliest offset still held.
        earliest: Offset,
    },
    /// The offset is not the beginning of a record.
    #[error("shard {shard}: no record begins at offset {offset}")]
    NotARecord {
        /// The shard.
        shard: ShardId,
        /// What was asked for.
        offset: Offset,
    },
    /// A saved position is none of this log's.
    #[error(transparent)]
    Position(#[from] PositionError),
    /// The bytes do not hold.
    #[error(transparent)]
    Corruption(#[from] Corruption),
    /// The file system refused.
    #[error("{action} {}: {source}", path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// To which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}
