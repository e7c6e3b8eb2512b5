//! Before an engine runs: the store's manifest, the recovery of all shards, and the repairs.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::gate_holds::GateHolds;
use super::store_lock::StoreLock;
use super::threads::Threads;
use crate::config::ValidConfig;
use crate::consumer::position_file::RegisteredConsumer;
use crate::error::{OpenError, guard};
use crate::event::{Event, EventTypeId, Placement, Root, ShardId, upcaster};
use crate::log::manifest::fresh_id;
use crate::log::manifest::{Manifest, shard_dir};
use crate::log::segment::ShardLog;
use crate::recovery::{Opening, Recovered};
use crate::state::aggregate::Aggregate;
use crate::storage::Storage;
use crate::sync::{Mutex, Ordering, lock};

/// The change of the manifest that must be saved before anything is appended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ManifestChange {
    /// The stored manifest is complete.
    None,
    /// The program declares new event types.
    NewTypes,
    /// The store does not exist yet.
    NewStore,
}

/// Returns the store's manifest with the program's new event types added, or the manifest of a new store. Writes
/// nothing.
pub(super) fn load_manifest<E: Event>(
    storage: &dyn Storage,
    config: &ValidConfig,
) -> Result<(Manifest, ManifestChange), OpenError> {
    let dir = &config.dir;
    let stored = Manifest::load(storage, dir)?;
    let is_new = stored.is_none();
    if is_new {
        let list = |path: &PathBuf| {
            storage.list(path).map_err(|source| OpenError::Io { action: "listing", path: path.clone(), source })
        };
        for name in list(dir)?.iter().filter(|name| name.starts_with("shard-")) {
            // A crash while a store is created leaves empty folders.
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
        placement: config.placement.as_ref().map(|placement| placement.id().clone()),
        types: Vec::new(),
    });
    if manifest.shards != config.shards {
        return Err(OpenError::ShardCount { stored: manifest.shards, asked: config.shards });
    }
    let asked = config.placement.as_ref().map(Placement::id);
    if manifest.placement.as_ref() != asked {
        return Err(OpenError::Placement { stored: manifest.placement, asked: asked.cloned() });
    }
    if manifest.segment_bytes != config.segment_bytes {
        return Err(OpenError::SegmentBytes { stored: manifest.segment_bytes, asked: config.segment_bytes });
    }
    let changed = manifest.declare::<E>()?;
    let change = match (is_new, changed) {
        (true, _) => ManifestChange::NewStore,
        (false, true) => ManifestChange::NewTypes,
        (false, false) => ManifestChange::None,
    };
    Ok((manifest, change))
}

/// Checks that the application's placement, if there is one, puts every key into the shard that holds it.
pub(super) fn check_placement<A: Aggregate>(config: &ValidConfig, recovered: &[Recovered<A>]) -> Result<(), OpenError> {
    let Some(placement) = &config.placement else { return Ok(()) };
    let router = config.router();
    for shard in recovered {
        let stored = shard.report.shard;
        let mut keys = shard.folder.keys.iter().map(|slot| slot.key);
        let moved = guard("the placement", stored, || keys.find(|key| router.shard(*key) != stored))?;
        if let Some(key) = moved {
            let (asked, placement) = (router.shard(key), placement.id().clone());
            return Err(OpenError::KeyMoved { key, stored, asked, placement });
        }
    }
    Ok(())
}

/// The repairs of a store that was found sound.
pub(super) struct Repairs<'a> {
    pub(super) storage: &'a dyn Storage,
    pub(super) dir: &'a Path,
    pub(super) manifest: &'a Manifest,
    pub(super) change: ManifestChange,
}

impl Repairs<'_> {
    /// Creates a new store, cuts torn tails, and removes saved states of events that are gone, all before anything is
    /// appended. Every step can be repeated: the next opening completes what a crash or an error leaves undone.
    pub(super) fn carry_out<A: Aggregate>(
        &self,
        recovered: &mut [Recovered<A>],
        consumers: &[RegisteredConsumer],
        gates: &GateHolds,
        lock: &mut StoreLock,
    ) -> Result<(), OpenError> {
        let Self { storage, dir, .. } = *self;
        if self.change == ManifestChange::NewStore {
            // Create and lock the folders before saving the manifest that promises them. A crash in between leaves
            // empty folders, which the next attempt must accept.
            for shard in 0..self.manifest.shards {
                let path = shard_dir(dir, ShardId(shard));
                let created = storage.create_dir(&path);
                created.map_err(|source| OpenError::Io { action: "creating", path: path.clone(), source })?;
                lock.take(storage, &path)?;
            }
        }
        if self.change == ManifestChange::None {
            // The manifest may come from a process that was killed before it could sync the folder.
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
        gates.remove_foreign()
    }
}

/// Reads all shards' logs, in parallel. Changes nothing.
pub(super) fn recover<A: Aggregate>(
    storage: &Arc<dyn Storage>,
    config: &ValidConfig,
    manifest: &Manifest,
    is_new: bool,
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
                is_new,
                shard: ShardId(i as u16),
                manifest,
                keys_expected: config.keys_expected,
                outcomes_kept: config.outcomes_kept,
                known: &known,
            };
            // A panic of the program's code becomes this shard's result.
            let result = guard("code of the program", opening.shard, || opening.recover::<A>());
            let result = result.map_err(OpenError::from).flatten();
            lock(&results).push_back((i, result));
        }
    };
    std::thread::scope(|scope| {
        for i in 0..helpers {
            let helper = threads.named(format!("corelane-open-{i}"));
            if let Err(error) = helper.and_then(|helper| helper.spawn_scoped(scope, work)) {
                tracing::warn!(%error, "cannot start another thread to open shards; opening takes longer");
            }
        }
        work();
    });
    let mut results: Vec<(usize, Result<_, _>)> = std::mem::take(&mut *lock(&results)).into();
    results.sort_by_key(|(i, _)| *i);
    results.into_iter().map(|(_, result)| result).collect()
}

/// Returns the logs as recovery found them, to be read before anything is changed.
pub(super) fn logs_of<A: Aggregate>(
    config: &ValidConfig,
    manifest: &Manifest,
    recovered: &[Recovered<A>],
) -> Vec<Arc<ShardLog>> {
    let dir = |shard: &Recovered<A>| shard_dir(&config.dir, shard.report.shard);
    recovered.iter().map(|shard| Arc::new(shard.log(manifest, &dir(shard)))).collect()
}
