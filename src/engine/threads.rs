//! Starting and joining the engine's threads.

use std::collections::VecDeque;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use crate::sync::thread;

/// Starts named threads. A test can limit their number to simulate a system that refuses more.
pub(super) struct Threads {
    /// Number of threads that may still be started.
    pub(super) left: usize,
}

impl Threads {
    pub(super) fn named(&mut self, name: String) -> std::io::Result<std::thread::Builder> {
        self.left = self.left.checked_sub(1).ok_or(std::io::ErrorKind::WouldBlock)?;
        Ok(std::thread::Builder::new().name(name))
    }
}

/// The body of a thread.
type Body = Box<dyn FnOnce() + Send>;

/// Threads that are started and wait for their bodies. Threads without a body end when the crew is dropped.
pub(super) struct Crew(VecDeque<(mpsc::Sender<Body>, thread::JoinHandle<()>)>);

impl Crew {
    /// Starts one thread per name. If one cannot be started, the others end.
    pub(super) fn start(threads: &mut Threads, names: impl Iterator<Item = String>) -> std::io::Result<Self> {
        let mut crew = Self(VecDeque::new());
        for name in names {
            let (give, take) = mpsc::channel::<Body>();
            let wait_and_run = move || {
                if let Ok(body) = take.recv() {
                    body();
                }
            };
            crew.0.push_back((give, threads.named(name)?.spawn(wait_and_run)?));
        }
        Ok(crew)
    }

    /// Runs `body` on the next thread.
    pub(super) fn run(&mut self, body: impl FnOnce() + Send + 'static) -> thread::JoinHandle<()> {
        let (give, handle) = self.0.pop_front().expect("a thread was started for every body");
        give.send(Box::new(body)).expect("a thread waits until it gets its body");
        handle
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        for (give, handle) in self.0.drain(..) {
            drop(give);
            if handle.join().is_err() {
                tracing::error!("a thread panicked before it got anything to run");
            }
        }
    }
}

/// Joins the last thread of the list. Returns `false` if the deadline passed first.
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
