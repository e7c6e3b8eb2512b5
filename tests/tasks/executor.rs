//! An executor in twenty lines, and a waker whose clones can be counted.

use std::future::Future;
use std::pin::Pin;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};

struct Task {
    future: Mutex<Option<Pin<Box<dyn Future<Output = ()> + Send>>>>,
    queue: Sender<Arc<Task>>,
}

impl Wake for Task {
    fn wake(self: Arc<Self>) {
        // Fails if all tasks are done.
        drop(self.queue.send(Arc::clone(&self)));
    }
}

/// Runs tasks on `threads` threads until all are done. The sleep between two tasks is that of the channel.
pub(crate) fn run(threads: usize, tasks: impl IntoIterator<Item = Pin<Box<dyn Future<Output = ()> + Send>>>) {
    let (queue, due) = channel::<Arc<Task>>();
    for future in tasks {
        queue.send(Arc::new(Task { future: Mutex::new(Some(future)), queue: queue.clone() })).unwrap();
    }
    drop(queue);
    let due = Mutex::new(due);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    // The channel closes when the last task and its last waker are gone.
                    let Ok(task) = due.lock().unwrap().recv() else { return };
                    let mut slot = task.future.lock().unwrap();
                    let Some(mut future) = slot.take() else { continue };
                    let waker = Waker::from(Arc::clone(&task));
                    if future.as_mut().poll(&mut Context::from_waker(&waker)).is_pending() {
                        *slot = Some(future);
                    }
                }
            });
        }
    });
}

/// Boxes a future for [`run`].
pub(crate) fn task(future: impl Future<Output = ()> + Send + 'static) -> Pin<Box<dyn Future<Output = ()> + Send>> {
    Box::pin(future)
}

/// Counts wake-ups. The number of its wakers in the world is [`Counted::wakers`].
#[derive(Default)]
pub(crate) struct Counted(std::sync::atomic::AtomicUsize);

impl Wake for Counted {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
    }
}

impl Counted {
    pub(crate) fn wakers(self: &Arc<Self>) -> usize {
        Arc::strong_count(self) - 1
    }

    pub(crate) fn wakes(&self) -> usize {
        self.0.load(std::sync::atomic::Ordering::SeqCst)
    }

    /// Polls once with a waker of its own.
    pub(crate) fn poll<F: Future + Unpin>(self: &Arc<Self>, future: &mut F) -> Poll<F::Output> {
        let waker = Waker::from(Arc::clone(self));
        Pin::new(future).poll(&mut Context::from_waker(&waker))
    }
}
