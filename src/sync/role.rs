//! What the current thread is to an engine, and so what it must not wait for.
//!
//! One writer: the thread itself, once, when it begins. It is looked at only where something is about to wait.

use std::cell::Cell;

/// What a thread is to an engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// The application's own thread.
    Application,
    /// A thread of some engine: it appends, syncs, saves or prepares. Engines wait for these, so these never wait for an engine.
    Engine,
    /// A thread of a consumer. It may wait for the engine, and not for itself.
    Consumer {
        /// Tells this engine from all others that live.
        engine: usize,
        /// Tells this consumer from all others that live.
        consumer: usize,
        /// It is the one that drives the consumer, and not one of its workers.
        drives: bool,
    },
}

thread_local! {
    static ROLE: Cell<Role> = const { Cell::new(Role::Application) };
}

/// Gives the current thread its role, until it ends.
pub(crate) fn take_role(role: Role) {
    ROLE.set(role);
}

/// The current thread's role.
pub(crate) fn role() -> Role {
    ROLE.get()
}

/// Returns `true` if the current thread may wait for an engine, because no engine waits for it.
pub(crate) fn may_wait() -> bool {
    role() != Role::Engine
}
