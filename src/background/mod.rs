//! Background work: everything between the log and the disk that no shard waits for.
//!
//! Every worker has a bounded `step` that never waits. The caller passes the time; the step returns what it did and
//! when the worker must run again. The threads that drive the workers and wait between their steps are in
//! `engine::background`.

pub(crate) mod age;
pub(crate) mod keeper;
mod preparer;
mod retention;
mod segment_files;
pub(crate) mod snapshotter;
pub(crate) mod step;
pub(crate) mod syncer;
