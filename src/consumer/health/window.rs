//! The sliding window: one pair of counters per part of time. Bounded memory, whatever the rate of calls.

use std::time::Duration;

/// Parts of the window. It moves by one part at a time.
pub(super) const PARTS: usize = 60;

/// Outcomes of the last 60 parts of time.
#[derive(Debug, Clone)]
pub(super) struct Window {
    part: Duration,
    /// The number of the newest part, counted from time zero.
    newest: u64,
    /// Successes and failures of each part, at the part's number modulo the length.
    parts: Box<[(u64, u64); PARTS]>,
    /// Outcomes in the window.
    pub(super) samples: u64,
    /// Failures among them.
    pub(super) failures: u64,
}

impl Window {
    pub(super) fn new(window: Duration) -> Self {
        let parts = Box::new([(0, 0); PARTS]);
        Self { part: window / PARTS as u32, newest: 0, parts, samples: 0, failures: 0 }
    }

    pub(super) fn add(&mut self, now: Duration, is_success: bool) {
        self.move_to(now);
        let (successes, failures) = &mut self.parts[self.newest as usize % PARTS];
        *if is_success { successes } else { failures } += 1;
        self.samples += 1;
        self.failures += u64::from(!is_success);
    }

    pub(super) fn add_successes(&mut self, now: Duration, count: u64) {
        self.move_to(now);
        self.parts[self.newest as usize % PARTS].0 += count;
        self.samples += count;
    }

    /// Forgets parts that are older than the window.
    pub(super) fn move_to(&mut self, now: Duration) {
        let newest = u64::try_from(now.as_nanos() / self.part.as_nanos()).unwrap_or(u64::MAX);
        for number in (self.newest + 1..=newest).take(PARTS) {
            let (successes, failures) = std::mem::take(&mut self.parts[number as usize % PARTS]);
            self.samples -= successes + failures;
            self.failures -= failures;
        }
        self.newest = self.newest.max(newest);
    }

    pub(super) fn clear(&mut self) {
        *self.parts = [(0, 0); PARTS];
        (self.samples, self.failures) = (0, 0);
    }
}
