//! Background work: everything between the log and the disk that no shard waits for.

pub(crate) mod age;
pub(crate) mod keeper;
pub(crate) mod snapshotter;
pub(crate) mod syncer;
