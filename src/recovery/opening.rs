//! The description of one shard's log that is to be opened, with the names and errors that every part of recovery
//! needs.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::Corruption;
use crate::event::{Offset, ShardId};
use crate::log::manifest::{Manifest, segment_name};
use crate::recovery::fold::Folder;
use crate::state::aggregate::Aggregate;
use crate::state::snapshot::format::Owner;
use crate::storage::Storage;

/// One shard's log that is to be opened.
pub(crate) struct Opening<'a> {
    pub(crate) storage: &'a Arc<dyn Storage>,
    pub(crate) dir: &'a Path,
    /// `true` if the store is being created: the shard has no folder yet.
    pub(crate) is_new: bool,
    pub(crate) shard: ShardId,
    pub(crate) manifest: &'a Manifest,
    pub(crate) keys_expected: usize,
    pub(crate) outcomes_kept: usize,
    /// Returns `true` if this program can read the (type id, schema version).
    pub(crate) known: &'a (dyn Fn(u16, u16) -> bool + Sync),
}

impl Opening<'_> {
    pub(super) fn owner(&self) -> Owner {
        (self.manifest.store_id, self.shard)
    }

    /// An empty table of states.
    pub(super) fn folder<A: Aggregate>(&self) -> Folder<A> {
        Folder::new(self.shard, self.keys_expected, self.outcomes_kept)
    }

    pub(super) fn path(&self, index: u64) -> PathBuf {
        self.dir.join(segment_name(index))
    }

    /// The offset of byte `at` of a segment.
    pub(super) fn offset(&self, index: u64, at: usize) -> Offset {
        Offset(index * self.manifest.segment_bytes + at as u64)
    }

    pub(super) fn corruption(&self, segment: u64, at: usize, why: &'static str) -> Corruption {
        // Saturating: the span of a damaged store may name any index.
        let base = segment.saturating_mul(self.manifest.segment_bytes);
        Corruption { shard: self.shard, segment, offset: Offset(base.saturating_add(at as u64)), why }
    }
}
