//! Before an engine runs: the store's lock, its manifest, and what its shards hold.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::PathBuf;

use super::threads::Threads;
use crate::aggregate::Aggregate;
use crate::config::Checked;
use crate::error::OpenError;
use crate::event::{Event, EventTypeId, ShardId, upcaster};
use crate::log::keeper::fresh_id;
use crate::log::manifest::{Manifest, Root, shard_dir};
use crate::log::recovery::{Opening, Recovered};
use crate::log::storage::{Lock, Storage};
use crate::sync::{Mutex, Ordering, lock};

pub(super) fn lock_store(storage: &dyn Storage, config: &Checked) -> Result<Box<dyn Lock>, OpenError> {
    let dir = &config.dir;
    let io = |action, path: PathBuf| move |source| OpenError::Io { action, path, source };
    storage.create_dir(dir).map_err(io("creating", dir.clone()))?;
    let path = dir.join("lock");
    match storage.lock(&path).map_err(io("locking", path.clone()))? {
        Some(lock) => Ok(lock),
        None => Err(OpenError::Locked { dir: dir.clone() }),
    }
}

/// The store's manifest: as it is, extended by types that are new (`true`: still to be saved), or written for a new store.
pub(super) fn load_manifest<E: Event>(storage: &dyn Storage, config: &Checked) -> Result<(Manifest, bool), OpenError> {
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
    if is_new {
        // Folders before the manifest that promises them. A crash in between leaves empty folders, which
        // the next attempt must accept.
        for shard in 0..config.shards {
            let path = shard_dir(dir, ShardId(shard));
            storage.create_dir(&path).map_err(|source| OpenError::Io { action: "creating", path, source })?;
        }
    }
    if is_new {
        manifest.save(storage, dir)?;
    }
    Ok((manifest, changed && !is_new))
}

/// Recovers all shards, side by side.
pub(super) fn recover<A: Aggregate>(
    storage: &std::sync::Arc<dyn Storage>,
    config: &Checked,
    manifest: &Manifest,
    quarantine: &std::path::Path,
    threads: &mut Threads,
) -> Result<Vec<Recovered<A>>, OpenError> {
    let known = |id: u16, schema: u16| {
        A::Event::TYPES.iter().any(|t| t.id.0 == id && t.schema_version == schema)
            || upcaster::<A::Event>(EventTypeId(id), schema).is_some()
    };
    let helpers = crate::sync::cores().min(usize::from(config.shards)) - 1;
    let next = std::sync::atomic::AtomicUsize::new(0);
    let results = Mutex::new(VecDeque::new());
    let panicked = Mutex::new(None);
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
                quarantine,
                shard: ShardId(i as u16),
                manifest,
                keys_expected: config.keys_expected,
                outcomes_kept: config.outcomes_kept,
                known: &known,
            };
            // Upcasters, `evolve` and `upgrade` are the application's: what they panic with is told by the thread that opens.
            match catch_unwind(AssertUnwindSafe(|| opening.recover::<A>())) {
                Ok(result) => lock(&results).push_back((i, result)),
                Err(panic) => *lock(&panicked) = Some(panic),
            }
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
    if let Some(panic) = lock(&panicked).take() {
        resume_unwind(panic);
    }
    let mut results: Vec<(usize, Result<_, _>)> = std::mem::take(&mut *lock(&results)).into();
    results.sort_by_key(|(i, _)| *i);
    let mut recovered: Vec<Recovered<A>> = results.into_iter().map(|(_, result)| result).collect::<Result<_, _>>()?;
    for (i, recovered) in recovered.iter_mut().enumerate() {
        let path = shard_dir(&config.dir, ShardId(i as u16));
        let settled = recovered.saved.as_mut().map_or(Ok(()), |saved| saved.settle(&**storage, &path));
        settled.map_err(|source| OpenError::Io { action: "removing saved states in", path, source })?;
    }
    Ok(recovered)
}
