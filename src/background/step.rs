//! The time that is passed to a step of background work, and the result of the step.

use std::time::Instant;

use crate::event::Time;

/// The time at the beginning of a step, by both clocks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Now {
    pub(crate) monotonic: Instant,
    pub(crate) wall: Time,
}

/// The result of one bounded step of a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub(crate) enum Step {
    /// The worker did something and may have more to do: run the next step at once.
    Worked,
    /// There was nothing to do: run the next step at this time, or when the worker's signal is notified.
    Idle(Option<Instant>),
    /// The worker has ended: run no further step.
    Ended,
}

impl Step {
    /// Combines the results of two steps, of workers that share a thread.
    pub(crate) fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::Worked, _) | (_, Self::Worked) => Self::Worked,
            (Self::Idle(at), Self::Idle(other)) => Self::Idle([at, other].into_iter().flatten().min()),
            (Self::Ended, other) | (other, Self::Ended) => other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn workers_that_share_a_thread_run_again_at_the_earliest_of_their_times() {
        let now = Instant::now();
        let later = now + Duration::from_secs(1);
        assert_eq!(Step::Idle(None).and(Step::Idle(None)), Step::Idle(None));
        assert_eq!(Step::Idle(Some(later)).and(Step::Idle(None)), Step::Idle(Some(later)));
        assert_eq!(Step::Idle(Some(later)).and(Step::Idle(Some(now))), Step::Idle(Some(now)));
        assert_eq!(Step::Idle(Some(now)).and(Step::Worked), Step::Worked);
        assert_eq!(Step::Ended.and(Step::Idle(Some(now))), Step::Idle(Some(now)));
    }
}
