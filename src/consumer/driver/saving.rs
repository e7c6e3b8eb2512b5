//! Saves a consumer's position, and lets retention free the log below it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::follower::{ProgressStamp, ShardFollower};
use crate::consumer::dead_letter::FileEnd;
use crate::consumer::error::ConsumerError;
use crate::consumer::position_file::ConsumerPosition;
use crate::error::OpenError;
use crate::event::Event;
use crate::storage::Storage;

/// Writes the consumer's position file.
#[derive(Debug)]
pub(super) struct PositionSaver {
    consumer: Arc<str>,
    storage: Arc<dyn Storage>,
    dir: PathBuf,
    every: Duration,
    due: Duration,
    /// The shards' progress at the last save.
    saved: Vec<ProgressStamp>,
    /// The end of the dead letters at the last save.
    saved_letters: FileEnd,
    failures: u64,
}

impl PositionSaver {
    pub(super) fn new(
        consumer: &Arc<str>,
        storage: Arc<dyn Storage>,
        dir: PathBuf,
        every: Duration,
        saved_letters: FileEnd,
    ) -> Self {
        let (consumer, due, saved) = (Arc::clone(consumer), Duration::ZERO, Vec::new());
        Self { consumer, storage, dir, every, due, saved, saved_letters, failures: 0 }
    }

    /// Returns the consumer's folder.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(super) fn storage(&self) -> &dyn Storage {
        &*self.storage
    }

    /// Returns the number of failed periodic saves.
    pub(super) fn failures(&self) -> u64 {
        self.failures
    }

    fn is_saved<E: Event>(&self, followers: &[ShardFollower<E>], letters: FileEnd) -> bool {
        // Letters can change although no shard's progress does, and a file of letters that the position file does not
        // name could vanish unnoticed.
        letters == self.saved_letters
            && followers.iter().map(ShardFollower::progress_stamp).eq(self.saved.iter().copied())
    }

    /// Returns `true` if the position file names the newest file of letters, so that opening notices if that file is
    /// missing.
    pub(super) fn names_file_of(&self, letters: FileEnd) -> bool {
        letters.number == self.saved_letters.number
    }

    /// Returns the time of the next periodic save, if there is something to save.
    pub(super) fn due<E: Event>(&self, followers: &[ShardFollower<E>], letters: FileEnd) -> Option<Duration> {
        (!self.is_saved(followers, letters)).then_some(self.due)
    }

    pub(super) fn is_due<E: Event>(&self, now: Duration, followers: &[ShardFollower<E>], letters: FileEnd) -> bool {
        now >= self.due && !self.is_saved(followers, letters)
    }

    /// Notes the result of a periodic save at `now`.
    pub(super) fn attempted(&mut self, now: Duration, saved: Result<(), ConsumerError>) {
        self.due = now + self.every;
        if let Err(error) = saved {
            // Events done since the last save are handled again after a restart, and retention waits.
            self.failures += 1;
            tracing::error!(
                consumer = &*self.consumer,
                error = crate::error::with_sources(&error),
                "a consumer's position cannot be written"
            );
        }
    }

    /// Saves the followers' progress and the end of the letters. It is durable when this returns.
    pub(super) fn save<E: Event>(
        &mut self,
        followers: &mut [ShardFollower<E>],
        letters: FileEnd,
    ) -> Result<(), ConsumerError> {
        let saved = followers.iter().map(ShardFollower::progress_stamp).collect();
        let shards = followers.iter_mut().map(ShardFollower::progress).collect();
        let position = ConsumerPosition { shards, letters };
        position.save(&*self.storage, &self.dir).map_err(|source| OpenError::Io {
            action: "writing the position file in",
            path: self.dir.clone(),
            source,
        })?;
        for (follower, progress) in followers.iter().zip(&position.shards) {
            follower.hold_from(progress.position);
        }
        (self.saved, self.saved_letters) = (saved, letters);
        Ok(())
    }
}
