//! The importer of atomics and threads for every protocol between threads, so that one switch (`--cfg loom`) puts
//! them under a model checker. What loom cannot or need not see goes round it (an atomic view of mapped bytes, the
//! starting of threads, a sleep): `tests/tidy.rs` has the list.
//!
//! What is here: [`Watermark`] (a published position), [`Signal`] (sleep without losing a wake-up),
//! [`Gate`] (closing without losing an accepted event), [`Waiters`] (receipts being waited for), [`SeqLock`] (words read
//! whole) and [`Journal`] (what moved while it was looked for).

mod journal;
mod role;
mod seed;
mod seqlock;

#[cfg(loom)]
pub(crate) use loom::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
#[cfg(loom)]
pub(crate) use loom::sync::{Arc, Mutex};
#[cfg(loom)]
pub(crate) use loom::thread;

#[cfg(not(loom))]
pub(crate) use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
#[cfg(not(loom))]
pub(crate) use std::sync::{Arc, Mutex};
#[cfg(not(loom))]
pub(crate) use std::thread;

use std::task::Waker;
use std::time::{Duration, Instant};

#[cfg(not(loom))]
pub(crate) use crossbeam::sync::ShardedLock;
pub(crate) use crossbeam::utils::CachePadded;

pub(crate) use journal::Journal;
pub(crate) use role::{Role, may_wait, role, take_role};
pub(crate) use seed::{Keyed, keyed, plant};
pub(crate) use seqlock::SeqLock;

use crate::config::Wait;

/// Locks, going on after a panic of another holder: every value kept under a lock here is
/// valid after each single assignment.
#[cfg(not(loom))]
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(loom)]
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> loom::sync::MutexGuard<'_, T> {
    mutex.lock().expect("loom mutexes do not poison")
}

/// As [`lock`], giving up at the deadline.
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

/// Cores this process may use (cgroup- and affinity-aware), at least 1.
pub(crate) fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// Asks for the cache line in which `item` begins to be brought near; where it is longer than a line, also for that in which it ends.
#[inline]
pub(crate) fn prefetch<T>(item: &T) {
    prefetch_at(item);
}

/// As [`prefetch`], for a place that need not be one.
#[inline]
pub(crate) fn prefetch_at<T>(item: *const T) {
    #[cfg(target_arch = "x86_64")]
    {
        let first = item.cast::<i8>();
        let last = first.wrapping_add(size_of::<T>().saturating_sub(1));
        // SAFETY: a prefetch reads nothing and faults on nothing, whatever the address.
        unsafe { std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(first) }
        if size_of::<T>() > 64 {
            // SAFETY: as above.
            unsafe { std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(last) }
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = item;
}

/// As [`prefetch_at`], and that no other core keeps the line.
#[inline]
pub(crate) fn prefetch_to_write<T>(item: *const T) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    {
        let first = item.cast::<u8>();
        let last = first.wrapping_add(size_of::<T>().saturating_sub(1));
        // SAFETY: a prefetch changes nothing and faults on nothing, whatever the address. (The compiler's own stands for one
        // to read, unless it compiles for newer processors; older ones take this instruction for none.)
        unsafe {
            std::arch::asm!("prefetchw [{0}]", "prefetchw [{1}]", in(reg) first, in(reg) last, options(nostack, preserves_flags, readonly))
        }
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    let _ = item;
}

/// A position that one thread moves forward and others read. What was written before
/// [`Watermark::publish`] is visible to who sees the position.
#[derive(Debug)]
pub(crate) struct Watermark(CachePadded<AtomicU64>);

impl Watermark {
    pub(crate) fn new(at: u64) -> Self {
        Self(CachePadded::new(AtomicU64::new(at)))
    }

    /// Only the one writer calls this, with positions that never fall.
    #[inline]
    pub(crate) fn publish(&self, at: u64) {
        // Release: pairs with the Acquire in `get`.
        self.0.store(at, Ordering::Release);
    }

    #[inline]
    pub(crate) fn get(&self) -> u64 {
        // Acquire: pairs with the Release in `publish`.
        self.0.load(Ordering::Acquire)
    }
}

const AWAKE: u32 = 0;
const ASLEEP: u32 = 1;

/// Lets one thread sleep until another has work for it.
///
/// The sleeper announces itself, looks for work once more, and only then sleeps; who brings work
/// makes it visible, and then looks whether somebody sleeps. A sequentially consistent fence on
/// both sides makes it impossible that both look too early.
#[derive(Debug)]
pub(crate) struct Signal {
    state: CachePadded<AtomicU32>,
    sleeper: Mutex<Option<thread::Thread>>,
}

impl Signal {
    pub(crate) fn new() -> Self {
        Self { state: CachePadded::new(AtomicU32::new(AWAKE)), sleeper: Mutex::new(None) }
    }

    /// Sleeps until notified or `timeout`, unless `has_work`. May wake for no reason.
    pub(crate) fn sleep(&self, timeout: Option<Duration>, has_work: impl FnOnce() -> bool) {
        *lock(&self.sleeper) = Some(thread::current());
        self.state.store(ASLEEP, Ordering::Relaxed);
        // SeqCst: pairs with the fence in `notify`: either we see the work or the notifier sees us.
        fence(Ordering::SeqCst);
        if !has_work() {
            park(timeout);
        }
        self.state.store(AWAKE, Ordering::Relaxed);
    }

    /// Wakes the sleeper, if there is one. To be called after the work was made visible.
    #[inline]
    pub(crate) fn notify(&self) {
        // SeqCst: pairs with the fence in `sleep`.
        fence(Ordering::SeqCst);
        if self.state.load(Ordering::Relaxed) == ASLEEP {
            self.wake();
        }
    }

    #[cold]
    fn wake(&self) {
        // Once per sleep: a busy notifier does not call into the kernel again and again.
        if self.state.swap(AWAKE, Ordering::Relaxed) == ASLEEP
            && let Some(sleeper) = &*lock(&self.sleeper)
        {
            sleeper.unpark();
        }
    }
}

#[cfg(not(loom))]
fn park(timeout: Option<Duration>) {
    match timeout {
        Some(timeout) => thread::park_timeout(timeout),
        None => thread::park(),
    }
}

// Loom knows no time: a sleep that needs its timeout to end shows as a deadlock, as it should.
#[cfg(loom)]
fn park(_timeout: Option<Duration>) {
    thread::park();
}

/// What a thread does between two looks for work: spins, yields, sleeps, as its strategy allows.
#[derive(Debug)]
pub(crate) struct Idle {
    wait: Wait,
    rounds: u32,
    /// Spins since the last yield, however much work came in between.
    spins: u32,
}

/// Spinning rounds before the first yield, and yields before the first sleep. Where sleeping is
/// allowed threads may outnumber cores, and a long spin only takes the core from who has work.
const SPINS: u32 = 64;
const YIELDS: u32 = 32;
/// How long who cannot be woken sleeps between two looks.
const NAP: Duration = Duration::from_micros(100);

/// Sleeps; for cold paths that poll.
pub(crate) fn nap(time: Duration) {
    std::thread::sleep(time);
}

/// How long a publish may wait for room.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Patience {
    None,
    Until(Instant),
    Forever,
}

impl Patience {
    pub(crate) fn deadline(self) -> Option<Instant> {
        match self {
            Self::Until(at) => Some(at),
            Self::None | Self::Forever => None,
        }
    }

    /// Returns `true` if the wait is over. A thread that an engine waits for never waits.
    pub(crate) fn is_over(self) -> bool {
        match self {
            Self::None => true,
            Self::Until(at) => Instant::now() >= at || !may_wait(),
            Self::Forever => !may_wait(),
        }
    }
}

impl Idle {
    pub(crate) fn new(wait: Wait) -> Self {
        Self { wait, rounds: 0, spins: 0 }
    }

    /// One that sleeps whenever there is nothing to do.
    pub(crate) fn sleepy() -> Self {
        Self { wait: Wait::Park, rounds: SPINS + YIELDS, spins: 0 }
    }

    #[inline]
    pub(crate) fn reset(&mut self) {
        self.rounds = 0;
    }

    /// One spin or yield; `false` where the strategy says to sleep instead.
    pub(crate) fn awake(&mut self) -> bool {
        self.rounds = self.rounds.saturating_add(1);
        match self.wait {
            Wait::BusySpin => std::hint::spin_loop(),
            _ if self.rounds <= SPINS => std::hint::spin_loop(),
            Wait::Park if self.rounds > SPINS + YIELDS => return false,
            Wait::SpinYield | Wait::Park => thread::yield_now(),
        }
        true
    }

    /// One step of idling where nobody will wake us: spins, yields, then naps.
    pub(crate) fn poll(&mut self, deadline: Option<Instant>) {
        self.rounds = self.rounds.saturating_add(1);
        match self.wait {
            Wait::BusySpin => std::hint::spin_loop(),
            _ if self.rounds <= SPINS => std::hint::spin_loop(),
            Wait::Park if self.rounds > SPINS + YIELDS => {
                let left = deadline.map_or(NAP, |at| at.saturating_duration_since(Instant::now()).min(NAP));
                nap(left);
            }
            Wait::SpinYield | Wait::Park => thread::yield_now(),
        }
    }

    /// One step of idling on `signal`, at most until `deadline`.
    pub(crate) fn step(&mut self, signal: &Signal, deadline: Option<Instant>, has_work: impl FnOnce() -> bool) {
        self.rounds = self.rounds.saturating_add(1);
        self.spins = self.spins.saturating_add(1);
        match self.wait {
            Wait::BusySpin => std::hint::spin_loop(),
            _ if self.rounds <= SPINS && self.spins <= SPINS => std::hint::spin_loop(),
            // An event each microsecond would never let the spinning end, nor the syncer have this core.
            _ if self.rounds <= SPINS => {
                self.spins = 0;
                thread::yield_now();
            }
            Wait::SpinYield => thread::yield_now(),
            Wait::Park if self.rounds <= SPINS + YIELDS => thread::yield_now(),
            Wait::Park => {
                signal.sleep(deadline.map(|at| at.saturating_duration_since(Instant::now())), has_work);
            }
        }
    }
}

/// Counts who is publishing right now, so that a shard can close and still append whatever was
/// accepted: close first, wait until nobody is inside, then drain for the last time.
///
/// Closedness and count are one word, so that entering and closing have one order.
#[derive(Debug)]
pub(crate) struct Gate(CachePadded<AtomicU32>);

const CLOSED: u32 = 1 << 31;

/// Somebody is inside the gate.
#[derive(Debug)]
pub(crate) struct Inside<'a>(&'a Gate);

impl Gate {
    pub(crate) fn new() -> Self {
        Self(CachePadded::new(AtomicU32::new(0)))
    }

    /// `None` once the gate is closed.
    #[inline]
    pub(crate) fn enter(&self) -> Option<Inside<'_>> {
        let before = self.0.fetch_add(1, Ordering::AcqRel);
        let inside = Inside(self);
        if before & CLOSED == 0 { Some(inside) } else { None }
    }

    /// Lets nobody in from now on.
    pub(crate) fn close(&self) {
        self.0.fetch_or(CLOSED, Ordering::AcqRel);
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.0.load(Ordering::Acquire) & CLOSED != 0
    }

    /// After `close`: whether everything that was accepted is visible.
    pub(crate) fn is_empty(&self) -> bool {
        // Acquire: pairs with the Release in `Inside::drop`.
        self.0.load(Ordering::Acquire) & !CLOSED == 0
    }
}

impl Drop for Inside<'_> {
    #[inline]
    fn drop(&mut self) {
        // Release: what was pushed inside is visible to who sees the count at 0.
        self.0.0.fetch_sub(1, Ordering::Release);
    }
}

/// Where things are left for one thread to take in, until it closes.
#[derive(Debug)]
pub(crate) struct Arrivals<T> {
    any: AtomicBool,
    /// `None` once closed.
    list: Mutex<Option<Vec<T>>>,
}

impl<T> Arrivals<T> {
    pub(crate) fn new() -> Self {
        Self { any: AtomicBool::new(false), list: Mutex::new(Some(Vec::new())) }
    }

    /// Leaves `item`, or returns it when closed. The caller wakes the taker afterwards.
    pub(crate) fn push(&self, item: T) -> Result<(), T> {
        match &mut *lock(&self.list) {
            Some(list) => {
                list.push(item);
                // Release: pairs with the Acquire in `is_empty`.
                self.any.store(true, Ordering::Release);
                Ok(())
            }
            None => Err(item),
        }
    }

    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        !self.any.load(Ordering::Acquire)
    }

    /// Takes what has arrived.
    pub(crate) fn take(&self) -> Vec<T> {
        let mut list = lock(&self.list);
        self.any.store(false, Ordering::Release);
        list.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Takes what has arrived, and lets nothing more arrive.
    pub(crate) fn close(&self) -> Vec<T> {
        let mut list = lock(&self.list);
        self.any.store(false, Ordering::Release);
        list.take().unwrap_or_default()
    }
}

/// Who waits for a position to be reached: threads and tasks alike are wakers.
#[derive(Debug)]
pub(crate) struct Waiters {
    any: AtomicBool,
    list: Mutex<Vec<(u64, Waker)>>,
}

impl Waiters {
    pub(crate) fn new() -> Self {
        Self { any: AtomicBool::new(false), list: Mutex::new(Vec::new()) }
    }

    /// Registers `waker` for `target`. The caller must look at the position again afterwards.
    pub(crate) fn register(&self, target: u64, waker: &Waker) {
        {
            let mut list = lock(&self.list);
            list.retain(|(at, known)| !(*at == target && known.will_wake(waker)));
            list.push((target, waker.clone()));
            self.any.store(true, Ordering::Relaxed);
        }
        // SeqCst: pairs with the fence in `reached`: either we see the position or the mover sees us.
        fence(Ordering::SeqCst);
    }

    /// Wakes everyone whose target is at most `position`. To be called after the position was published.
    #[inline]
    pub(crate) fn reached(&self, position: u64) {
        // SeqCst: pairs with the fence in `register`.
        fence(Ordering::SeqCst);
        if self.any.load(Ordering::Relaxed) {
            self.wake(position);
        }
    }

    #[cold]
    fn wake(&self, position: u64) {
        let mut due = Vec::new();
        {
            let mut list = lock(&self.list);
            list.retain(|(target, waker)| {
                let keep = *target > position;
                if !keep {
                    due.push(waker.clone());
                }
                keep
            });
            self.any.store(!list.is_empty(), Ordering::Relaxed);
        }
        due.into_iter().for_each(wake);
    }
}

/// Wakes, whatever the waker does: it is the application's, and the thread that calls it has others to wake.
pub(crate) fn wake(waker: Waker) {
    if std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| waker.wake())).is_err() {
        tracing::error!("a waker panicked");
    }
}

/// A waker that unparks the thread it was made on.
#[cfg(not(loom))]
pub(crate) fn thread_waker() -> Waker {
    struct Unpark(thread::Thread);
    impl std::task::Wake for Unpark {
        fn wake(self: std::sync::Arc<Self>) {
            self.0.unpark();
        }
    }
    Waker::from(std::sync::Arc::new(Unpark(thread::current())))
}

#[cfg(all(test, loom))]
mod models {
    use super::*;
    use loom::sync::atomic::AtomicUsize;

    /// A wake-up is never lost: if it were, the sleeper would stay parked and loom would report a deadlock.
    #[test]
    fn loom_parking_never_loses_a_wake_up() {
        loom::model(|| {
            let shared = Arc::new((Signal::new(), AtomicUsize::new(0)));
            let other = Arc::clone(&shared);
            let producer = thread::spawn(move || {
                other.1.store(1, Ordering::Release);
                other.0.notify();
            });
            while shared.1.load(Ordering::Acquire) == 0 {
                shared.0.sleep(None, || shared.1.load(Ordering::Acquire) != 0);
            }
            producer.join().unwrap();
        });
    }

    /// Who sees the watermark sees everything below it.
    #[test]
    fn loom_watermark_publishes_what_lies_below() {
        loom::model(|| {
            let shared = Arc::new((Watermark::new(0), AtomicUsize::new(0)));
            let other = Arc::clone(&shared);
            let writer = thread::spawn(move || {
                other.1.store(7, Ordering::Relaxed);
                other.0.publish(1);
            });
            if shared.0.get() == 1 {
                assert_eq!(shared.1.load(Ordering::Relaxed), 7);
            }
            writer.join().unwrap();
        });
    }

    /// An event that was accepted is drained, whenever the shard closes.
    #[test]
    fn loom_gate_loses_nothing_accepted() {
        loom::model(|| {
            let shared = Arc::new((Gate::new(), AtomicUsize::new(0)));
            let other = Arc::clone(&shared);
            let producer = thread::spawn(move || match other.0.enter() {
                Some(_inside) => {
                    other.1.fetch_add(1, Ordering::Relaxed);
                    1
                }
                None => 0,
            });
            shared.0.close();
            while !shared.0.is_empty() {
                thread::yield_now();
            }
            let drained = shared.1.load(Ordering::Relaxed);
            assert_eq!(drained, producer.join().unwrap(), "accepted == drained");
        });
    }

    /// A lane that is registered while the shard closes is closed by one of the two, and never both adopted and forgotten.
    #[test]
    fn loom_a_lane_registered_while_closing_is_closed_by_somebody() {
        loom::model(|| {
            let arrivals = Arc::new(Arrivals::<Arc<Gate>>::new());
            let lane = Arc::new(Gate::new());
            let (other, registered) = (Arc::clone(&arrivals), Arc::clone(&lane));
            let registrar = thread::spawn(move || {
                if let Err(lane) = other.push(registered) {
                    lane.close();
                }
            });
            let mut adopted = if arrivals.is_empty() { Vec::new() } else { arrivals.take() };
            adopted.extend(arrivals.close());
            adopted.iter().for_each(|lane| lane.close());
            registrar.join().unwrap();
            assert!(lane.is_closed(), "nobody closed the lane");
        });
    }

    /// A receipt that is waited for is woken, whenever the position moves.
    #[test]
    fn loom_waiters_are_woken() {
        loom::model(|| {
            let shared = Arc::new((Waiters::new(), Watermark::new(0)));
            let woken = std::sync::Arc::new(Woken(AtomicUsize::new(0)));
            let other = Arc::clone(&shared);
            let mover = thread::spawn(move || {
                other.1.publish(5);
                other.0.reached(5);
            });
            let waker = Waker::from(std::sync::Arc::clone(&woken));
            shared.0.register(5, &waker);
            let seen = shared.1.get() >= 5;
            mover.join().unwrap();
            assert!(seen || woken.0.load(Ordering::Relaxed) > 0, "neither seen nor woken");
        });
    }

    struct Woken(AtomicUsize);
    impl std::task::Wake for Woken {
        fn wake(self: std::sync::Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }
}
