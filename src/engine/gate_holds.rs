//! The parts of the log that a store's sequence gates have not counted yet, read before anything is changed.

use std::path::Path;
use std::sync::Arc;

use super::store_lock::StoreLock;
use crate::error::{OpenError, ReadError};
use crate::ingress::gated::{GateFiles, Positions, gates_dir};
use crate::log::manifest::is_folder_name;
use crate::log::segment::ShardLog;
use crate::storage::{Lock, Storage};

/// The parts of the log that the gates of a store have not counted.
pub(super) struct GateHolds {
    /// By a gate's name: the first offset not counted, shard by shard.
    pub(super) from: Vec<(String, Vec<u64>)>,
    /// Gates whose positions belong to another log.
    foreign: Vec<GateFiles>,
}

impl GateHolds {
    /// Reads the positions of all gates. Positions that do not match `logs` are listed for removal. Changes no file.
    pub(super) fn read(
        storage: &Arc<dyn Storage>,
        store: (&Path, u64),
        logs: &[Arc<ShardLog>],
    ) -> Result<Self, OpenError> {
        let dir = gates_dir(store.0);
        let names = match storage.list(&dir) {
            Ok(names) => names,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(source) => return Err(OpenError::Io { action: "listing", path: dir, source }),
        };
        let mut holds = Self { from: Vec::new(), foreign: Vec::new() };
        // The opening thread already has the store's lock.
        let lock: Arc<dyn Lock> = Arc::new(StoreLock::default());
        for name in names.into_iter().filter(|name| is_folder_name(name)) {
            let files = GateFiles::new(storage, store, &name);
            if !files.exists()? {
                continue;
            }
            let positions = files.positions(logs.len())?;
            // Retention frees what these positions have counted, so they must not be lost later.
            files.make_durable()?;
            let check = |positions: &Positions| {
                positions.counted.iter().zip(logs).try_for_each(|(position, log)| position.check(log, &lock))
            };
            let from = match positions.as_ref().map(check) {
                Some(Ok(())) => positions.map(|positions| positions.counted.iter().map(|at| at.offset().0).collect()),
                Some(Err(error)) => {
                    tracing::warn!(name, %error, "a gate's positions belong to another log; it counts this log again");
                    // An error of reading is reported when the gate is opened.
                    holds.foreign.extend(matches!(error, ReadError::Position(_)).then_some(files));
                    None
                }
                None => None,
            };
            holds.from.push((name, from.unwrap_or_else(|| vec![0; logs.len()])));
        }
        Ok(holds)
    }

    /// Removes positions that belong to another log. Call it after the whole store was found sound and before anything
    /// is appended.
    pub(super) fn remove_foreign(&self) -> Result<(), OpenError> {
        self.foreign.iter().try_for_each(GateFiles::forget_positions)
    }
}
