//! Compaction: copies the waiting letters to a new file, oldest first, and removes the old files.
//!
//! The new file is written under another name and read back before it counts. The old files are removed when the new
//! one is durable.

use std::path::Path;

use super::answer::{Entry, LettersError};
use super::files::{LetterFile, numbers, path, read_all};
use super::format::{EntryBatch, FileEnd, FileHeader, StoredEntry};
use super::index::{LetterIndex, LetterName};
use super::{LetterStore, Tail};

/// The name of the new file until it is complete.
const UNFINISHED: &str = "letters.new";
/// Files with fewer bytes in total are not compacted.
const WORTH_BYTES: u64 = 1 << 20;
/// A larger number of files is always compacted. Every run of the consumer begins a file.
const FILES_MAX: usize = 64;
/// Bytes per write.
const CHUNK_BYTES: usize = 1 << 20;

fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> LettersError {
    move |source| LettersError::Io { action, path: path.to_owned(), source }
}

impl LetterStore {
    /// Compacts the files if most of their bytes are obsolete. Copies all letters, which takes time.
    ///
    /// # Errors
    /// Every record is still there, and compaction stays due.
    pub(crate) fn compact_if_due(&mut self) -> Result<bool, LettersError> {
        let bytes: u64 = self.files.values().map(|file| file.bytes).sum();
        let is_mostly_dead = bytes >= WORTH_BYTES && bytes > 2 * self.index.needed_bytes();
        let is_due = is_mostly_dead || self.files.len() > FILES_MAX;
        if is_due {
            self.compact()?;
        }
        Ok(is_due)
    }

    pub(super) fn compact(&mut self) -> Result<(), LettersError> {
        let number = self.next_number;
        let unfinished = self.dir.join(UNFINISHED);
        let handle = self.storage.create_side(&unfinished).map_err(io("creating", &unfinished))?;
        let mut file = LetterFile { handle, bytes: 0 };
        let tail = self.copy_to(number, &mut file)?;
        file.handle.sync().map_err(io("syncing", &unfinished))?;
        let mut moved = LetterIndex::default();
        read_all(&self.dir, number, &mut file, true, true, &mut |entry| moved.apply(entry))?;

        // From here on the new file may count after a crash; writes to an older file would then be lost.
        self.next_number += 1;
        self.tail = None;
        let finished = path(&self.dir, number);
        self.storage.rename(&unfinished, &finished).map_err(io("renaming", &unfinished))?;
        self.index.move_to(moved);
        self.files.clear();
        self.files.insert(number, file);
        self.storage.sync_dir(&self.dir).map_err(io("syncing", &self.dir))?;
        self.tail = Some(tail);
        self.durable = FileEnd { number, bytes: self.files[&number].bytes };
        self.remove_below(number)
    }

    /// Copies everything that is still needed.
    fn copy_to(&self, number: u32, file: &mut LetterFile) -> Result<Tail, LettersError> {
        let header = FileHeader { number, before: None, is_complete: true };
        let mut batch = EntryBatch::new(number, 0, 0, &header.encode());
        let mut letters: Vec<_> = self.index.by_place().collect();
        letters.sort_unstable();
        let mut entry = Vec::new();
        for (_, name) in letters {
            self.copy(name, &mut batch, &mut entry)?;
            self.write_if(batch.len() >= CHUNK_BYTES, &mut batch, file)?;
        }
        for id in self.index.known_only() {
            batch.add_known(id);
            self.write_if(batch.len() >= CHUNK_BYTES, &mut batch, file)?;
        }
        batch.add_totals(&self.index.totals());
        self.write_if(true, &mut batch, file)?;
        Ok(Tail { number, batch: batch.number() })
    }

    fn copy(&self, name: LetterName, batch: &mut EntryBatch, entry: &mut Vec<u8>) -> Result<(), LettersError> {
        let letter = self.letter(name, entry)?;
        let archive = StoredEntry::decode(entry).expect("the entry was decoded before").archive();
        batch.add(&Entry::Parked { letter: &letter, archive });
        Ok(())
    }

    /// Writes the batch and begins the next one, if `is_time`.
    fn write_if(&self, is_time: bool, batch: &mut EntryBatch, file: &mut LetterFile) -> Result<(), LettersError> {
        if is_time {
            file.handle.append(batch.seal()).map_err(io("writing", &self.dir.join(UNFINISHED)))?;
            file.bytes += batch.len() as u64;
            batch.begin_next();
        }
        Ok(())
    }

    fn remove_below(&self, number: u32) -> Result<(), LettersError> {
        for old in numbers(&*self.storage, &self.dir)?.into_iter().filter(|&old| old < number) {
            let path = path(&self.dir, old);
            self.storage.remove(&path).map_err(io("removing", &path))?;
        }
        self.storage.sync_dir(&self.dir).map_err(io("syncing", &self.dir))
    }
}
