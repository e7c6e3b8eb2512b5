//! corelane with its log on. Not listed yet: it has no commands so far.
//!
//! What goes here: an engine over a directory of its own, opened anew by `run` and outside of its time; one command per deposit;
//! `balance_cents` and `refuses` through the engine. Nothing of it may be called that a server would not call.
