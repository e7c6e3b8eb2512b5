//! Ingress: producers, and the sequence gate for input that arrives out of order.

pub(crate) mod gated;
pub(crate) mod producer;
pub(crate) mod sequence_gate;
pub(crate) mod shared;

pub use sequence_gate::SequenceGate;
pub use sequence_gate::answer::{GateStatistics, OfferRefused, Offered, Released, StartRefused};
pub use sequence_gate::policy::{GatePolicy, GateStart};
