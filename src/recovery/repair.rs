//! The changes that opening makes to a shard's log: a torn tail is set aside and cut, and segments after it are
//! blanked. They run once the whole store was found sound; a refused store stays unchanged.

use std::path::{Path, PathBuf};

use crate::error::OpenError;
use crate::event::{Offset, ShardId};
use crate::log::format::{HEADER_BYTES, encode_prepared};
use crate::log::manifest::fresh_salt;
use crate::recovery::report::TornTail;
use crate::storage::memory::{Memory, WriteHalf};
use crate::storage::{Storage, replace};

/// The repair of one shard's log.
pub(super) struct Repair {
    pub(super) shard: ShardId,
    /// The offset at which the torn tail begins.
    pub(super) offset: Offset,
    /// The bytes of the tail that are set aside.
    pub(super) bytes: Vec<u8>,
    /// Number of torn bytes in the last segment, from its write position on.
    pub(super) torn: usize,
    pub(super) why: &'static str,
    /// The segments after the tail, by index.
    pub(super) beyond: Vec<(u64, PathBuf, Memory)>,
}

impl Repair {
    /// Carries out the repair. `last` is the segment that is written next, if there is one. After a crash during the
    /// repair, the log is torn in the same place.
    pub(super) fn apply(
        self,
        storage: &dyn Storage,
        quarantine: &Path,
        last: Option<(&Path, &mut WriteHalf)>,
    ) -> Result<TornTail, OpenError> {
        let kept = self.set_aside(storage, quarantine)?;
        let cut = |path: &Path, half: &WriteHalf, range| {
            let io = |source| OpenError::Io { action: "cutting", path: path.to_owned(), source };
            storage.sync(half.memory(), range).map_err(io)
        };
        // From the back: after a crash in between the log is torn in the same place.
        for (index, path, memory) in self.beyond.into_iter().rev() {
            let mut half = WriteHalf::new(memory, 0);
            encode_prepared(fresh_salt(index), half.tail());
            cut(&path, &half, 0..HEADER_BYTES)?;
        }
        if let Some((path, half)) = last {
            // Blanked, so that it can never be taken for a part of a later log.
            let at = half.at();
            half.tail()[..self.torn].fill(0);
            cut(path, half, at..at + self.torn)?;
        }
        Ok(kept)
    }

    fn set_aside(&self, storage: &dyn Storage, quarantine: &Path) -> Result<TornTail, OpenError> {
        let Self { shard, offset, ref bytes, why, .. } = *self;
        let plain = format!("shard-{:04}-offset-{offset}", shard.0);
        let io = |path: &Path, source| OpenError::Io { action: "quarantining", path: path.to_owned(), source };
        let names = storage
            .create_dir(quarantine)
            .and_then(|()| storage.list(quarantine))
            .map_err(|source| io(quarantine, source))?;
        // The same place can be torn again, so files of earlier openings are kept.
        let (mut name, mut n) = (format!("{plain}.torn"), 1_u64);
        while names.contains(&name) {
            n += 1;
            name = format!("{plain}-{n}.torn");
        }
        let path = quarantine.join(&name);
        replace(storage, quarantine, &name, bytes).map_err(|source| io(&path, source))?;
        tracing::warn!(shard = shard.0, %offset, why, "a torn tail was cut");
        Ok(TornTail { offset, bytes: bytes.len() as u64, quarantined: path, why })
    }
}
