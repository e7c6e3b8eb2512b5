//! What opening changes of a shard's log, once the whole store was found sound: a torn tail is set aside and cut, and segments behind it
//! are blanked. What has to change is for `recovery` to find out; for a store that is refused nothing here runs.

use std::path::{Path, PathBuf};

use crate::error::OpenError;
use crate::event::{Offset, ShardId};
use crate::log::format::{HEADER_BYTES, encode_prepared};
use crate::log::manifest::fresh_salt;
use crate::recovery::report::TornTail;
use crate::storage::memory::{Memory, WriteHalf};
use crate::storage::{Storage, replace};

/// The repairs of one shard's log.
pub(crate) struct Repair {
    pub(crate) shard: ShardId,
    /// Where the torn tail begins.
    pub(crate) offset: Offset,
    /// The bytes of it that are kept.
    pub(crate) bytes: Vec<u8>,
    /// Bytes of it in the last segment, from where that is written on.
    pub(crate) torn: usize,
    pub(crate) why: &'static str,
    /// Segments behind it, by index.
    pub(crate) beyond: Vec<(u64, PathBuf, Memory)>,
}

impl Repair {
    /// Carries it out. `last` is the segment that is written on, if one is. A crash on the way leaves a log that is torn in the same place.
    pub(crate) fn apply(
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
        // From the back, so that a crash in between leaves a log that is torn in the same place.
        for (index, path, memory) in self.beyond.into_iter().rev() {
            let mut half = WriteHalf::new(memory, 0);
            encode_prepared(fresh_salt(index), half.tail());
            cut(&path, &half, 0..HEADER_BYTES)?;
        }
        if let Some((path, half)) = last {
            // Blanked, so that it can never be taken for part of a later log.
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
        let taken = storage
            .create_dir(quarantine)
            .and_then(|()| storage.list(quarantine))
            .map_err(|source| io(quarantine, source))?;
        // What an earlier opening kept stays: the same place can be torn again.
        let (mut name, mut n) = (format!("{plain}.torn"), 1_u64);
        while taken.contains(&name) {
            n += 1;
            name = format!("{plain}-{n}.torn");
        }
        let path = quarantine.join(&name);
        replace(storage, quarantine, &name, bytes).map_err(|source| io(&path, source))?;
        tracing::warn!(shard = shard.0, %offset, why, "a torn tail was cut");
        Ok(TornTail { offset, bytes: bytes.len() as u64, quarantined: path, why })
    }
}
