//! Wait strategies: what a thread does between two checks for work, and how long a caller waits for room.

use std::time::{Duration, Instant};

use super::{Signal, may_wait, nap, thread};

/// What a thread does when it finds nothing to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// Never gives the core away. Lowest latency; needs a core for itself.
    BusySpin,
    /// Spins for a while, then yields the core, and never sleeps.
    SpinYield,
    /// Spins, yields, then sleeps until woken: an idle engine costs nothing.
    Park,
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

/// How long a publish may wait for room.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Patience {
    None,
    Until(Instant),
    Forever,
}

impl Patience {
    /// Waits until `deadline`, or for ever where there is none.
    pub(crate) fn until(deadline: Option<Instant>) -> Self {
        deadline.map_or(Self::Forever, Self::Until)
    }

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
