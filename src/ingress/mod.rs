//! Ingress: producers, and the sequence gate for input that arrives out of order.

pub(crate) mod gated;
pub(crate) mod producer;
mod publishing;
pub(crate) mod sequence_gate;
pub(crate) mod shared;

pub use crate::lane::receipt::{Pending, Receipt};
pub use crate::lane::shared_receipt::{SharedPending, SharedReceipt};
pub use gated::{Accepted, Gap, GateRefused, GatedProducer, LateEvent};
pub use producer::{BatchRejected, Producer};
pub use publishing::{Publishing, PublishingWithReceipt};
pub use sequence_gate::SequenceGate;
pub use sequence_gate::answer::{GateStatistics, OfferRefused, Offered, Released, StartRefused};
pub use sequence_gate::policy::{GatePolicy, GateStart};
pub use shared::SharedProducer;
