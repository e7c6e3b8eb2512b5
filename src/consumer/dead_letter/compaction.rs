//! Making the files smaller: the letters that wait are written to a new file, oldest first, and the others go.
//!
//! The new file is made under another name and read back before it counts; the old ones are removed when it is durable.

use std::path::Path;

use super::answer::{Entry, LettersError};
use super::files::{Held, numbers, path, read_all};
use super::format::{EntryBatch, FileEnd, FileHeader, StoredEntry};
use super::index::{Index, Name};
use super::{Letters, Tail};

/// The name of a file that is being made.
const UNFINISHED: &str = "letters.new";
/// Fewer bytes are not worth it.
const WORTH_BYTES: u64 = 1 << 20;
/// Every life of the consumer begins a file.
const FILES_MAX: usize = 64;
/// Written at once.
const CHUNK_BYTES: usize = 1 << 20;

fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> LettersError {
    move |source| LettersError::Io { action, path: path.to_owned(), source }
}

impl Letters {
    /// Makes the files smaller if most of them is of no use any more. Takes its time: all letters are copied.
    ///
    /// # Errors
    /// Everything recorded is still there, and it is due again.
    pub(crate) fn compact_if_due(&mut self) -> Result<bool, LettersError> {
        let bytes: u64 = self.files.values().map(|held| held.bytes).sum();
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
        let mut held = Held { handle, bytes: 0 };
        let tail = self.copy_to(number, &mut held)?;
        held.handle.sync().map_err(io("syncing", &unfinished))?;
        let mut moved = Index::default();
        read_all(&self.dir, number, &mut held, true, true, &mut |noted| moved.apply(noted))?;

        // From here on it may count after a crash, and what is written to a file before it would not.
        self.next_number += 1;
        self.tail = None;
        let finished = path(&self.dir, number);
        self.storage.rename(&unfinished, &finished).map_err(io("renaming", &unfinished))?;
        self.index.move_to(moved);
        self.files.clear();
        self.files.insert(number, held);
        self.storage.sync_dir(&self.dir).map_err(io("syncing", &self.dir))?;
        self.tail = Some(tail);
        self.durable = FileEnd { number, bytes: self.files[&number].bytes };
        self.remove_below(number)
    }

    /// Writes everything that is still of use.
    fn copy_to(&self, number: u32, held: &mut Held) -> Result<Tail, LettersError> {
        let header = FileHeader { number, before: None, is_complete: true };
        let mut batch = EntryBatch::new(number, 0, 0, &header.encode());
        let mut letters: Vec<_> = self.index.by_place().collect();
        letters.sort_unstable();
        let mut entry = Vec::new();
        for (_, name) in letters {
            self.copy(name, &mut batch, &mut entry)?;
            self.write_if(batch.len() >= CHUNK_BYTES, &mut batch, held)?;
        }
        for id in self.index.known_only() {
            batch.add_known(id);
            self.write_if(batch.len() >= CHUNK_BYTES, &mut batch, held)?;
        }
        batch.add_totals(&self.index.totals());
        self.write_if(true, &mut batch, held)?;
        Ok(Tail { number, batch: batch.number() })
    }

    fn copy(&self, name: Name, batch: &mut EntryBatch, entry: &mut Vec<u8>) -> Result<(), LettersError> {
        let letter = self.letter(name, entry)?;
        let archive = StoredEntry::decode(entry).expect("it was read").archive();
        batch.add(&Entry::Parked { letter: &letter, archive });
        Ok(())
    }

    /// Writes the batch and begins the next, if it is time.
    fn write_if(&self, is_time: bool, batch: &mut EntryBatch, held: &mut Held) -> Result<(), LettersError> {
        if is_time {
            held.handle.append(batch.seal()).map_err(io("writing", &self.dir.join(UNFINISHED)))?;
            held.bytes += batch.len() as u64;
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
