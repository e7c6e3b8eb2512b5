//! The log: one directory of fixed-size segments per shard. `FORMAT.md` is the specification.
//!
//! One writer: the owning shard. Bytes below the `appended` watermark never change while any thread can see them; bytes
//! below `durable` have been synced.

pub(crate) mod access;
pub(crate) mod finder;
pub(crate) mod format;
pub(crate) mod holds;
mod live;
pub(crate) mod manifest;
pub(crate) mod other_keys;
pub(crate) mod position;
pub(crate) mod reader;
pub mod scan;
pub(crate) mod seal;
pub(crate) mod segment;
pub(crate) mod writer;

pub use live::{Live, LiveBatch, LiveBatches, LiveBuilder, LiveEvent, LiveFrom, LiveIter};
pub use position::Position;
pub use reader::{Reader, Record};
