//! Before an engine runs: the store's lock, its manifest, and what its shards hold.

use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::gated::Holds;
use super::threads::Threads;
use crate::config::ValidConfig;
use crate::consumer::position_file::RegisteredConsumer;
use crate::error::{OpenError, guard};
use crate::event::{Event, EventTypeId, Root, ShardId, upcaster};
use crate::log::manifest::fresh_id;
use crate::log::manifest::{Manifest, shard_dir};
use crate::log::segment::ShardLog;
use crate::recovery::{Opening, Recovered};
use crate::state::aggregate::Aggregate;
use crate::storage::{Files, Lock, Storage};
use crate::sync::{Mutex, Ordering, lock};

/// The locks of a store's folder and of its shards'. (Links can make one shard's folder that of two stores.)
#[derive(Debug, Default)]
pub(super) struct StoreLock(Vec<Box<dyn Lock>>);

impl Lock for StoreLock {}

impl StoreLock {
    pub(super) fn take(&mut self, storage: &dyn Storage, dir: &Path) -> Result<(), OpenError> {
        let locked = patiently(|| storage.lock(dir));
        match locked.map_err(|source| OpenError::Io { action: "locking", path: dir.to_owned(), source })? {
            Some(lock) => self.0.push(lock),
            None => return Err(OpenError::Locked { dir: dir.to_owned() }),
        }
        Ok(())
    }
}

/// How often a lock is tried once more, and after how long each time.
const LOCK_AGAIN: (u32, Duration) = (10, Duration::from_millis(5));

/// What `try_lock` gets. Whoever only looks whether an engine has the store holds the lock for an instant, which is waited out.
fn patiently<L>(mut try_lock: impl FnMut() -> io::Result<Option<L>>) -> io::Result<Option<L>> {
    let (times, pause) = LOCK_AGAIN;
    for _ in 0..times {
        match try_lock()? {
            None => std::thread::sleep(pause),
            taken => return Ok(taken),
        }
    }
    try_lock()
}

/// Opens the folder of a store, once and for all: from here on its name is only shown.
pub(super) fn open_files(config: &mut ValidConfig) -> Result<Files, OpenError> {
    let files = Files::create(&config.dir);
    let files = files.map_err(|source| OpenError::Io { action: "creating", path: config.dir.clone(), source })?;
    files.root().clone_into(&mut config.dir);
    Ok(files)
}

/// The change of the manifest that is due before anything is appended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Standing {
    /// None: it is complete.
    Saved,
    /// Types that are new are to be saved.
    Extended,
    /// The store is still to be made.
    New,
}

/// The store's manifest as it is, extended by types that are new; or that of a new store. Nothing is written yet.
pub(super) fn load_manifest<E: Event>(
    storage: &dyn Storage,
    config: &ValidConfig,
) -> Result<(Manifest, Standing), OpenError> {
    let dir = &config.dir;
    let stored = Manifest::load(storage, dir)?;
    let is_new = stored.is_none();
    if is_new {
        let list = |path: &PathBuf| {
            storage.list(path).map_err(|source| OpenError::Io { action: "listing", path: path.clone(), source })
        };
        for name in list(dir)?.iter().filter(|name| name.starts_with("shard-")) {
            // Empty folders are what a crash leaves of a store that was being created.
            if !list(&dir.join(name))?.is_empty() {
                return Err(OpenError::ForeignFile {
                    path: dir.join(crate::log::manifest::MANIFEST),
                    why: "there are shards, but the manifest is missing",
                });
            }
        }
    }
    let mut manifest = stored.unwrap_or_else(|| Manifest {
        store_id: fresh_id(),
        shards: config.shards,
        segment_bytes: config.segment_bytes,
        root: Root::default(),
        types: Vec::new(),
    });
    if manifest.shards != config.shards {
        return Err(OpenError::ShardCount { stored: manifest.shards, asked: config.shards });
    }
    if manifest.segment_bytes != config.segment_bytes {
        return Err(OpenError::SegmentBytes { stored: manifest.segment_bytes, asked: config.segment_bytes });
    }
    let changed = manifest.declare::<E>()?;
    let standing = match (is_new, changed) {
        (true, _) => Standing::New,
        (false, true) => Standing::Extended,
        (false, false) => Standing::Saved,
    };
    Ok((manifest, standing))
}

/// The repairs of a store that was found sound.
pub(super) struct Changes<'a> {
    pub(super) storage: &'a dyn Storage,
    pub(super) dir: &'a Path,
    pub(super) manifest: &'a Manifest,
    pub(super) standing: Standing,
}

impl Changes<'_> {
    /// Makes a new store, cuts what is torn, and forgets what was saved of events that are gone: all of it before anything is appended.
    /// Every step can be done again, so what a crash or an error leaves of them is for the next opening.
    pub(super) fn carry_out<A: Aggregate>(
        &self,
        recovered: &mut [Recovered<A>],
        consumers: &[RegisteredConsumer],
        gates: &Holds,
        lock: &mut StoreLock,
    ) -> Result<(), OpenError> {
        let Self { storage, dir, .. } = *self;
        if self.standing == Standing::New {
            // Folders, and their locks, before the manifest that promises them. A crash in between leaves empty folders, which
            // the next attempt must accept.
            for shard in 0..self.manifest.shards {
                let path = shard_dir(dir, ShardId(shard));
                let made = storage.create_dir(&path);
                made.map_err(|source| OpenError::Io { action: "creating", path: path.clone(), source })?;
                lock.take(storage, &path)?;
            }
        }
        if self.standing == Standing::Saved {
            // Its name may have come from a process that was killed before it could sync the folder.
            let synced = storage.sync_dir(dir);
            synced.map_err(|source| OpenError::Io { action: "syncing", path: dir.to_owned(), source })?;
        } else {
            self.manifest.save(storage, dir)?;
        }
        let quarantine = dir.join("quarantine");
        for (i, recovered) in recovered.iter_mut().enumerate() {
            let path = shard_dir(dir, ShardId(i as u16));
            recovered.repair(storage, &path, &quarantine)?;
            let synced = recovered.saved.as_ref().map_or(Ok(()), |saved| saved.make_durable(storage, &path));
            synced.map_err(|source| OpenError::Io { action: "syncing", path, source })?;
        }
        consumers.iter().try_for_each(|consumer| consumer.settle(storage, dir))?;
        gates.settle()
    }
}

/// Looks at all shards, side by side. Changes nothing.
pub(super) fn recover<A: Aggregate>(
    storage: &Arc<dyn Storage>,
    config: &ValidConfig,
    manifest: &Manifest,
    standing: Standing,
    threads: &mut Threads,
) -> Result<Vec<Recovered<A>>, OpenError> {
    let known = |id: u16, schema: u16| {
        A::Event::TYPES.iter().any(|t| t.id.0 == id && t.schema_version == schema)
            || upcaster::<A::Event>(EventTypeId(id), schema).is_some()
    };
    let helpers = crate::sync::cores().min(usize::from(config.shards)) - 1;
    let next = std::sync::atomic::AtomicUsize::new(0);
    let results = Mutex::new(VecDeque::new());
    let work = || {
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            if i >= usize::from(config.shards) {
                break;
            }
            let dir = shard_dir(&config.dir, ShardId(i as u16));
            let opening = Opening {
                storage,
                dir: &dir,
                is_new: standing == Standing::New,
                shard: ShardId(i as u16),
                manifest,
                keys_expected: config.keys_expected,
                outcomes_kept: config.outcomes_kept,
                known: &known,
            };
            // A panic of any of the program's code there is the answer of this shard.
            let result = guard("code of the program", opening.shard, || opening.recover::<A>());
            let result = result.map_err(OpenError::from).flatten();
            lock(&results).push_back((i, result));
        }
    };
    std::thread::scope(|scope| {
        for i in 0..helpers {
            let helper = threads.named(format!("corelane-open-{i}"));
            if let Err(error) = helper.and_then(|helper| helper.spawn_scoped(scope, work)) {
                tracing::warn!(%error, "no thread to help opening the shards; it takes longer");
            }
        }
        work();
    });
    let mut results: Vec<(usize, Result<_, _>)> = std::mem::take(&mut *lock(&results)).into();
    results.sort_by_key(|(i, _)| *i);
    results.into_iter().map(|(_, result)| result).collect()
}

/// The logs as they were found, to be read before anything is changed.
pub(super) fn logs_of<A: Aggregate>(
    config: &ValidConfig,
    manifest: &Manifest,
    recovered: &[Recovered<A>],
) -> Vec<Arc<ShardLog>> {
    let dir = |shard: &Recovered<A>| shard_dir(&config.dir, shard.report.shard);
    recovered.iter().map(|shard| Arc::new(shard.log(manifest, &dir(shard)))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_held_for_an_instant_is_waited_out_and_one_that_is_kept_is_not() {
        let mut tries = 0;
        let taken = patiently(|| {
            tries += 1;
            Ok((tries == 4).then_some(()))
        });
        assert_eq!((taken.expect("no error"), tries), (Some(()), 4));
        tries = 0;
        let taken = patiently(|| {
            tries += 1;
            Ok(None::<()>)
        });
        assert_eq!((taken.expect("no error"), tries), (None, LOCK_AGAIN.0 + 1));
        let failed = patiently(|| Err::<Option<()>, _>(io::ErrorKind::PermissionDenied.into()));
        assert_eq!(failed.expect_err("at once").kind(), io::ErrorKind::PermissionDenied);
    }
}
