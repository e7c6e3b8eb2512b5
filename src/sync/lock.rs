//! Locks that survive the panic of a holder.

#[cfg(not(loom))]
use std::time::{Duration, Instant};

use super::Mutex;
#[cfg(not(loom))]
use super::nap;

/// Locks `mutex`, even if a holder has panicked: every value behind a mutex of this crate is valid after each single
/// assignment.
#[cfg(not(loom))]
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(loom)]
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> loom::sync::MutexGuard<'_, T> {
    mutex.lock().expect("loom mutexes do not poison")
}

/// As [`lock`]; returns `None` if the deadline passes first.
#[cfg(not(loom))]
pub(crate) fn lock_until<T>(mutex: &Mutex<T>, deadline: Option<Instant>) -> Option<std::sync::MutexGuard<'_, T>> {
    let Some(deadline) = deadline else { return Some(lock(mutex)) };
    loop {
        match mutex.try_lock() {
            Ok(held) => return Some(held),
            Err(std::sync::TryLockError::Poisoned(held)) => return Some(held.into_inner()),
            Err(std::sync::TryLockError::WouldBlock) if Instant::now() >= deadline => return None,
            Err(std::sync::TryLockError::WouldBlock) => nap(Duration::from_millis(1)),
        }
    }
}
