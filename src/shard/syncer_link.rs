//! The shard's link to its syncer: wakes it, and hands over the publish times of events that are not yet durable.

use std::sync::Arc;

use super::batch::Run;
use crate::lane::requests::{SyncRequests, UnsyncedRun};

/// Runs whose publish times differ by less than this are handed over as one.
const MERGED_NS: u64 = 1_000;

/// The shard's end of the mailbox of its syncer.
pub(super) struct SyncerLink {
    requests: Arc<SyncRequests>,
    /// `true` if the syncer syncs without being asked, that is in every mode but `OsCache`.
    is_automatic: bool,
    /// `None` if the latency to durable is not recorded.
    runs: Option<rtrb::Producer<UnsyncedRun>>,
    /// A run that found no room in `runs`.
    unsent: Option<UnsyncedRun>,
}

impl SyncerLink {
    pub(super) fn new(
        requests: Arc<SyncRequests>,
        is_automatic: bool,
        runs: Option<rtrb::Producer<UnsyncedRun>>,
    ) -> Self {
        Self { requests, is_automatic, runs, unsent: None }
    }

    /// Wakes an automatic syncer if everything below `appended` was durable, because the syncer may then sleep. A
    /// syncer that is behind checks by itself.
    #[inline]
    pub(super) fn wake_if_caught_up(&self, durable: impl FnOnce() -> u64, appended: u64) {
        if self.is_automatic && durable() >= appended {
            self.requests.signal.notify();
        }
    }

    /// Asks for a sync of everything below `offset`.
    pub(super) fn flush(&self, offset: u64) {
        self.requests.flush(offset);
    }

    /// Tells the syncer that nothing more will be appended.
    pub(super) fn end(&self) {
        self.requests.end();
    }

    /// Hands over the runs of a batch. The syncer records their latency when they are durable.
    #[inline]
    pub(super) fn send(&mut self, batch: &[Run]) {
        let Some(runs) = &mut self.runs else { return };
        let mut pending = self.unsent.take();
        for run in batch {
            let events = u64::from(run.events);
            let unsynced = UnsyncedRun { end: run.end, published: run.published, late: run.late, events };
            pending = Some(match pending {
                // Merged runs keep the earlier time and the longer lateness, so that no latency is understated.
                Some(mut before)
                    if (run.late == before.late && run.published.abs_diff(before.published) < MERGED_NS)
                        || runs.is_full() =>
                {
                    before.end = run.end;
                    before.late = before.late.max(run.late);
                    before.events += events;
                    before
                }
                Some(before) => {
                    if runs.push(before).is_err() {
                        unreachable!("the ring was not full, and only the shard pushes");
                    }
                    unsynced
                }
                None => unsynced,
            });
        }
        if let Some(run) = pending
            && runs.push(run).is_err()
        {
            self.unsent = Some(run);
        }
    }
}
