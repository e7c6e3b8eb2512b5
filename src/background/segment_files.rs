//! The segment files in one shard's folder that are outside its log, and the span, which names the segments inside it.
//!
//! One writer: the keeper's thread. A change of the folder is durable before anything relies on it. A segment's file
//! and the span that names it are durable before the shard gets the segment. The span without a freed segment is
//! durable before the segment's file is reused.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::log::manifest::{Span, spare_number};
use crate::log::segment::ShardLog;
use crate::storage::memory::Memory;
use crate::storage::{Storage, is_exhausted};

/// A failed operation of the storage: the action that needed it, and the error.
pub(super) type FailedAction = (&'static str, io::Error);

/// A file that will be written again.
#[derive(Debug)]
pub(super) struct Spare {
    pub(super) path: PathBuf,
    /// `None` for a file of an earlier process, which is not mapped yet.
    pub(super) memory: Option<Memory>,
}

/// The files that one shard's preparer takes and its reclaimer gives back.
#[derive(Debug)]
pub(super) struct SegmentFiles {
    pub(super) storage: Arc<dyn Storage>,
    pub(super) log: Arc<ShardLog>,
    span: Span,
    pub(super) spares: Vec<Spare>,
    spares_max: usize,
    /// Number of the next spare.
    spare_number: u64,
}

impl SegmentFiles {
    /// `spares` and `unused` are the files that recovery found outside the log.
    pub(super) fn new(
        storage: Arc<dyn Storage>,
        log: Arc<ShardLog>,
        span: Span,
        (spares, unused): (Vec<PathBuf>, Vec<PathBuf>),
        spares_max: usize,
    ) -> Self {
        let number = |path: &PathBuf| spare_number(path.file_name()?.to_str()?);
        let spare_number = spares.iter().filter_map(number).max().map_or(0, |highest| highest + 1);
        let spares = spares.into_iter().chain(unused).map(|path| Spare { path, memory: None }).collect();
        Self { storage, log, span, spares, spares_max, spare_number }
    }

    /// Takes the spare that becomes the segment with the name `path`. Prefers a spare that already has this name:
    /// renaming another one to it would replace the file, and then both the segment and a spare would have the name.
    pub(super) fn take_spare(&mut self, path: &Path) -> Option<Spare> {
        let at = self.spares.iter().position(|spare| spare.path == path).or(self.spares.len().checked_sub(1))?;
        Some(self.spares.remove(at))
    }

    /// Adds a file that will be written again.
    pub(super) fn add_spare(&mut self, path: PathBuf, memory: Option<Memory>) {
        self.spares.push(Spare { path, memory });
    }

    /// Syncs the folder and saves a span that ends with segment `last`.
    pub(super) fn extend_span(&mut self, last: u64) -> io::Result<()> {
        self.storage.sync_dir(&self.log.dir)?;
        self.save_span(Span { last, ..self.span })
    }

    /// Saves a span that begins with segment `first`.
    pub(super) fn shorten_span(&mut self, first: u64) -> io::Result<()> {
        self.save_span(Span { first, ..self.span })
    }

    fn save_span(&mut self, span: Span) -> io::Result<()> {
        span.save(&*self.storage, &self.log.dir)?;
        self.span = span;
        Ok(())
    }

    /// Gives the file of a freed segment the name of a spare, or removes the file if there are enough spares. Returns
    /// the spare's path.
    pub(super) fn retire(&mut self, path: &Path) -> io::Result<Option<PathBuf>> {
        if self.spares.len() >= self.spares_max {
            self.storage.remove(path)?;
            return Ok(None);
        }
        let spare = self.log.dir.join(format!("spare-{:06}.seg", self.spare_number));
        self.storage.rename(path, &spare)?;
        self.spare_number += 1;
        Ok(Some(spare))
    }

    /// Removes one spare if there are more than `spares_max`. Returns `true` if there were.
    pub(super) fn trim(&mut self) -> io::Result<bool> {
        if self.spares.len() <= self.spares_max {
            return Ok(false);
        }
        let spare = self.spares.remove(0);
        match self.storage.remove(&spare.path) {
            Err(error) if is_exhausted(&error) => {
                self.spares.insert(0, spare);
                return Err(error);
            }
            Err(error) => tracing::warn!(path = %spare.path.display(), %error, "a surplus spare cannot be removed"),
            Ok(()) => self.storage.sync_dir(&self.log.dir)?,
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spare_is_named_by_digits_alone() {
        assert_eq!(spare_number("spare-000007.seg"), Some(7));
        assert_eq!(spare_number(&format!("spare-{}.seg", u64::MAX)), None, "no number follows it");
        assert_eq!(spare_number("spare-1234567.seg"), Some(1_234_567));
        for name in ["spare-.seg", "spare-+7.seg", "spare-7.tmp", "spare-backup.seg", "spare-99999999999999999999.seg"]
        {
            assert_eq!(spare_number(name), None, "{name}");
        }
    }
}
