//! State: what an application folds its events into, where it is kept, saved, read back and shown.

pub(crate) mod aggregate;
pub(crate) mod history;
pub(crate) mod keys;
pub(crate) mod outcomes;
pub(crate) mod snapshot;
pub mod view;
