//! Starting and joining the engine's threads.

use std::time::{Duration, Instant};

use crate::sync::thread;

/// How many threads the system will still start; as many as it can, outside of tests.
pub(super) struct Threads {
    pub(super) left: usize,
}

impl Threads {
    pub(super) fn named(&mut self, name: String) -> std::io::Result<std::thread::Builder> {
        self.left = self.left.checked_sub(1).ok_or(std::io::ErrorKind::WouldBlock)?;
        Ok(std::thread::Builder::new().name(name))
    }
}

/// Joins the last thread of the list, or gives up at the deadline.
pub(super) fn join_until(threads: &mut Vec<thread::JoinHandle<()>>, deadline: Option<Instant>) -> bool {
    let Some(last) = threads.last() else { return true };
    while let Some(deadline) = deadline
        && !last.is_finished()
    {
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    if let Some(last) = threads.pop()
        && last.join().is_err()
    {
        tracing::error!("a thread of the engine panicked outside a turn");
    }
    true
}
