//! Wakes a task at a given time. The alarm has a thread of its own, so that it works with any async runtime.

use std::sync::Arc;
use std::task::Waker;
use std::time::Instant;

use crate::sync::{Mutex, lock, thread, wake};

#[derive(Debug, Default)]
struct Next {
    at: Option<(Instant, Waker)>,
    is_over: bool,
}

/// The time, and the task to wake at that time.
#[derive(Debug)]
pub(super) struct Alarm {
    next: Arc<Mutex<Next>>,
    /// `None` if no thread could be started. Then every task is woken at once and polls again.
    thread: Option<thread::Thread>,
}

impl Alarm {
    pub(super) fn new() -> Self {
        let next = Arc::new(Mutex::new(Next::default()));
        let shared = Arc::clone(&next);
        let spawned = thread::Builder::new().name("corelane-alarm".to_owned()).spawn(move || run(&shared));
        let thread = spawned.map(|handle| handle.thread().clone());
        let thread = thread
            .inspect_err(|error| tracing::warn!(%error, "a poller's alarm has no thread; its tasks poll instead"))
            .ok();
        Self { next, thread }
    }

    /// Wakes `waker` at `at`. Replaces an earlier alarm.
    pub(super) fn set(&self, at: Instant, waker: &Waker) {
        let next = (at, waker.clone());
        let replaced = lock(&self.next).at.replace(next);
        // Outside the lock, because dropping a waker may run application code.
        drop(replaced);
        match &self.thread {
            Some(thread) => thread.unpark(),
            None => waker.wake_by_ref(),
        }
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        lock(&self.next).is_over = true;
        if let Some(thread) = &self.thread {
            thread.unpark();
        }
    }
}

fn run(next: &Mutex<Next>) {
    loop {
        let (due, at) = {
            let mut next = lock(next);
            if next.is_over {
                return;
            }
            let due = next.at.take_if(|(at, _)| *at <= Instant::now());
            (due, next.at.as_ref().map(|(at, _)| *at))
        };
        match (due, at) {
            (Some((_, waker)), _) => wake(waker),
            (None, Some(at)) => thread::park_timeout(at.saturating_duration_since(Instant::now())),
            (None, None) => thread::park(),
        }
    }
}
