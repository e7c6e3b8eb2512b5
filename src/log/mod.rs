//! The log: one directory of fixed-size segments per shard. `FORMAT.md` is the specification.
//!
//! One writer: the owning shard. Bytes below the `appended` watermark never change while anyone
//! can see them; bytes below `durable` have been synced.

pub(crate) mod age;
pub(crate) mod confirm;
pub(crate) mod finder;
pub(crate) mod fold;
pub(crate) mod format;
pub(crate) mod holds;
pub(crate) mod keeper;
pub(crate) mod manifest;
pub(crate) mod mmap;
pub(crate) mod position;
pub(crate) mod reader;
pub(crate) mod recovery;
pub(crate) mod remains;
pub(crate) mod repair;
pub(crate) mod report;
pub mod scan;
pub(crate) mod seal;
pub(crate) mod segment;
pub(crate) mod storage;
pub(crate) mod syncer;
mod unfit;
pub(crate) mod writer;
