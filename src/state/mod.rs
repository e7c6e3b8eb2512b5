//! Aggregates: the state of each key, and its rules. The engine folds a key's events into the state, saves the state,
//! restores it as of any time, and feeds views from it.

pub(crate) mod aggregate;
pub(crate) mod history;
pub(crate) mod keys;
pub(crate) mod outcomes;
pub(crate) mod snapshot;
pub(crate) mod states;
pub(crate) mod view;

pub use aggregate::{Aggregate, Emit, Stateless, Stored};
pub use history::{AsOf, Counts, EventsBetween, PastState, Stream};
pub use snapshot::store::SnapshotStats;
pub use states::States;
