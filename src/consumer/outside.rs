//! Looks at a store's consumers from outside, beside a running engine: no lock, no change.

use std::path::Path;

use rkyv::util::AlignedVec;

use super::checkpoint::{Checkpoint, consumers_dir, names};
use super::dead_letter::answer::DeadLetter;
use super::dead_letter::read_outside;
use crate::error::OpenError;
use crate::event::Offset;
use crate::log::storage::Files;

/// A consumer that is registered in a store.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Registered {
    /// Its name.
    pub name: String,
    /// Its durable gap-free position in every shard: retention keeps what comes after.
    pub positions: Vec<Offset>,
}

/// The consumers that are registered in the store at `dir`, by name.
///
/// # Errors
/// What the file system says; a checkpoint that does not hold.
pub fn registered(dir: &Path) -> Result<Vec<Registered>, OpenError> {
    let mut found = Vec::new();
    for name in names(&Files, dir)? {
        if let Some(checkpoint) = Checkpoint::load(&Files, &consumers_dir(dir).join(&name))? {
            let positions = checkpoint.shards.iter().map(|shard| shard.position).collect();
            found.push(Registered { name, positions });
        }
    }
    Ok(found)
}

/// A consumer's dead letters with their events' archives, by key and then by age.
///
/// # Errors
/// What the file system says; files that do not hold.
pub fn dead_letters(dir: &Path, consumer: &str) -> Result<Vec<(DeadLetter, AlignedVec<16>)>, OpenError> {
    read_outside(&consumers_dir(dir).join(consumer))
}
