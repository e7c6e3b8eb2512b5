//! The role of the current thread towards engines, which decides whether the thread may wait for an engine.
//!
//! One writer: the thread itself, once, when it starts. Read only before a wait.

use std::cell::Cell;

/// The role of a thread towards engines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// The application's own thread.
    Application,
    /// An engine's own thread: it appends, syncs, saves or prepares. Engines wait for it, so it never waits for an
    /// engine.
    Engine,
    /// A thread of a consumer. It may wait for the engine, but not for its own consumer.
    Consumer {
        /// Identifies the engine among all live engines.
        engine: usize,
        /// Identifies the consumer among all live consumers.
        consumer: usize,
        /// `true` for the thread that drives the consumer, `false` for a worker.
        drives: bool,
    },
}

thread_local! {
    static ROLE: Cell<Role> = const { Cell::new(Role::Application) };
}

/// Sets the role of the current thread for the rest of its life.
pub(crate) fn take_role(role: Role) {
    ROLE.set(role);
}

/// Returns the role of the current thread.
pub(crate) fn role() -> Role {
    ROLE.get()
}

/// Returns `true` if the current thread may wait for an engine, because no engine waits for it.
pub(crate) fn may_wait() -> bool {
    role() != Role::Engine
}
