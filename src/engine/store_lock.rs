//! The folders of a store: opened once, and locked against every other engine.

use std::io;
use std::path::Path;
use std::time::Duration;

use crate::config::ValidConfig;
use crate::error::OpenError;
use crate::storage::{Files, Lock, Storage};

/// The locks of a store's folder and of its shards' folders. (Links can make one shard's folder part of two stores.)
#[derive(Debug, Default)]
pub(super) struct StoreLock(Vec<Box<dyn Lock>>);

impl Lock for StoreLock {}

impl StoreLock {
    pub(super) fn take(&mut self, storage: &dyn Storage, dir: &Path) -> Result<(), OpenError> {
        let locked = retry(|| storage.lock(dir));
        match locked.map_err(|source| OpenError::Io { action: "locking", path: dir.to_owned(), source })? {
            Some(lock) => self.0.push(lock),
            None => return Err(OpenError::Locked { dir: dir.to_owned() }),
        }
        Ok(())
    }
}

/// Retries of a lock, and the pause before each.
const LOCK_RETRIES: u32 = 10;
const LOCK_PAUSE: Duration = Duration::from_millis(5);

/// Returns the lock that `try_lock` takes. A tool that checks for a running engine holds the lock only for a moment,
/// and the retries outlast that.
fn retry<L>(mut try_lock: impl FnMut() -> io::Result<Option<L>>) -> io::Result<Option<L>> {
    for _ in 0..LOCK_RETRIES {
        match try_lock()? {
            None => crate::sync::nap(LOCK_PAUSE),
            taken => return Ok(taken),
        }
    }
    try_lock()
}

/// Opens a store's folder. From here on its path is used for messages only.
pub(super) fn open_files(config: &mut ValidConfig) -> Result<Files, OpenError> {
    let files = Files::create(&config.dir);
    let files = files.map_err(|source| OpenError::Io { action: "creating", path: config.dir.clone(), source })?;
    files.root().clone_into(&mut config.dir);
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_that_is_held_for_a_moment_is_taken_and_one_that_is_kept_is_not() {
        let mut tries = 0;
        let taken = retry(|| {
            tries += 1;
            Ok((tries == 4).then_some(()))
        });
        assert_eq!((taken.expect("no error"), tries), (Some(()), 4));
        tries = 0;
        let taken = retry(|| {
            tries += 1;
            Ok(None::<()>)
        });
        assert_eq!((taken.expect("no error"), tries), (None, LOCK_RETRIES + 1));
        let failed = retry(|| Err::<Option<()>, _>(io::ErrorKind::PermissionDenied.into()));
        assert_eq!(failed.expect_err("an error is not retried").kind(), io::ErrorKind::PermissionDenied);
    }
}
