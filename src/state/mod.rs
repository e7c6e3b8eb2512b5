//! An aggregate is the state of one key and its rules. The engine folds the key's events into it, saves it, shows it as
//! it was at any time, and feeds views with it.

pub(crate) mod aggregate;
pub(crate) mod history;
pub(crate) mod keys;
pub(crate) mod outcomes;
pub(crate) mod snapshot;
pub(crate) mod view;

pub use aggregate::{Aggregate, Emit, Stateless, Stored};
pub use history::{AsOf, Counts, EventsBetween, PastState, Stream};
pub use snapshot::store::SnapshotStats;
