//! Wait strategies: how a thread idles between two checks for work, and how long a caller waits for space.

use std::time::{Duration, Instant};

use super::{Signal, may_wait, nap, thread};

/// The wait strategy of an idle thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Wait {
    /// Spins and never gives up the core. Lowest latency; needs a core of its own.
    BusySpin,
    /// Spins for a while, then yields the core. Never sleeps.
    SpinYield,
    /// Spins, yields, then sleeps until woken. An idle engine uses no processor time.
    Park,
}

/// The state of one thread's wait strategy between two checks for work.
#[derive(Debug)]
pub(crate) struct Idle {
    wait: Wait,
    rounds: u32,
    /// Spins since the last yield. Finding work does not reset it.
    spins: u32,
}

/// Spins before the first yield, and yields before the first sleep. If sleeping is allowed, threads may outnumber
/// cores, and a long spin would only take the core from a thread that has work.
const SPINS: u32 = 64;
const YIELDS: u32 = 32;
/// The sleep between two checks of a thread that no other thread wakes.
const NAP: Duration = Duration::from_micros(100);

impl Idle {
    pub(crate) fn new(wait: Wait) -> Self {
        Self { wait, rounds: 0, spins: 0 }
    }

    /// Returns an `Idle` that sleeps at the first step without work.
    pub(crate) fn sleepy() -> Self {
        Self { wait: Wait::Park, rounds: SPINS + YIELDS, spins: 0 }
    }

    #[inline]
    pub(crate) fn reset(&mut self) {
        self.rounds = 0;
    }

    /// Spins or yields once. Returns `false` if the strategy says to sleep instead.
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

    /// Idles for one step, on a thread that no other thread wakes: spins, yields, then naps.
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

    /// Idles for one step: spins, yields, then sleeps on `signal` until `deadline` at the latest.
    pub(crate) fn step(&mut self, signal: &Signal, deadline: Option<Instant>, has_work: impl FnOnce() -> bool) {
        self.rounds = self.rounds.saturating_add(1);
        self.spins = self.spins.saturating_add(1);
        match self.wait {
            Wait::BusySpin => std::hint::spin_loop(),
            _ if self.rounds <= SPINS && self.spins <= SPINS => std::hint::spin_loop(),
            // Without this limit, one event per microsecond would keep this thread spinning for ever and the syncer off
            // this core.
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

/// The time that a publish may wait for space in its lane.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Patience {
    None,
    Until(Instant),
    Forever,
}

impl Patience {
    /// Waits until `deadline`, or for ever if it is `None`.
    pub(crate) fn until(deadline: Option<Instant>) -> Self {
        deadline.map_or(Self::Forever, Self::Until)
    }

    pub(crate) fn deadline(self) -> Option<Instant> {
        match self {
            Self::Until(at) => Some(at),
            Self::None | Self::Forever => None,
        }
    }

    /// Returns `true` if the wait is over, as it always is on a thread that an engine waits for.
    pub(crate) fn is_over(self) -> bool {
        match self {
            Self::None => true,
            Self::Until(at) => Instant::now() >= at || !may_wait(),
            Self::Forever => !may_wait(),
        }
    }
}
