//! Looks at a store's consumers from outside, beside a running engine; and asks something of one, as a file in its folder. Nothing
//! else is changed.

use std::path::PathBuf;
use std::sync::Arc;

use rkyv::util::AlignedVec;

use super::dead_letter::answer::{DeadLetter, LetterStatistics, LettersError};
use super::dead_letter::{Letters as LetterStore, open_outside};
use super::error::ConsumerError;
use super::position_file::{ConsumerPosition, Progress, consumers_dir, names as folders};
use super::requests::{self, Request};
use crate::clock::wall_now;
use crate::error::OpenError;
use crate::event::{EventId, Key, Offset};
use crate::log::position::Position;
use crate::log::scan::Store;
use crate::storage::Storage;

/// A consumer that is registered in a store.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Registered {
    /// Its name.
    pub name: String,
    /// Its durable gap-free position in every shard: retention keeps what comes after.
    pub positions: Vec<Offset>,
    /// The furthest offset that its checkpoint names in every shard: opening cuts what lies behind the log's end.
    pub reaches: Vec<Offset>,
    /// The furthest position that it has read in every shard, which knows of which log it is.
    pub seen: Vec<Position>,
    /// Requests that wait to be taken up, or are not carried out to their end.
    pub requests: usize,
}

/// The names that have a folder among the consumers of `store`. Those without a checkpoint are no consumers (any more).
///
/// # Errors
/// What the file system says.
pub fn names(store: &Store) -> Result<Vec<String>, OpenError> {
    folders(&**store.files(), store.dir())
}

fn dir_of(store: &Store, consumer: &str) -> PathBuf {
    consumers_dir(store.dir()).join(consumer)
}

/// A consumer of `store`; `None` where none of this name is registered.
///
/// # Errors
/// What the file system says; a checkpoint that does not hold.
pub fn registered(store: &Store, name: &str) -> Result<Option<Registered>, OpenError> {
    if !crate::log::manifest::is_folder_name(name) {
        return Ok(None);
    }
    let path = dir_of(store, name);
    let Some(checkpoint) = ConsumerPosition::load(&**store.files(), &path)? else { return Ok(None) };
    let requests = requests::waiting(&**store.files(), &path);
    let requests = requests.map_err(|source| OpenError::Io { action: "listing", path, source })?.len();
    let positions = checkpoint.shards.iter().map(|shard| shard.position).collect();
    let reach = |shard: &Progress| {
        [shard.position, shard.read, shard.effects_from, shard.began, shard.seen.offset()]
            .into_iter()
            .max()
            .unwrap_or_default()
    };
    let reaches = checkpoint.shards.iter().map(reach).collect();
    let seen = checkpoint.shards.iter().map(|shard| shard.seen).collect();
    Ok(Some(Registered { name: name.to_owned(), positions, reaches, seen, requests }))
}

/// The requests to a consumer of `store` that do not hold, each with why: the consumer puts them aside.
///
/// # Errors
/// What the file system says.
pub fn broken_requests(store: &Store, name: &str) -> Result<Vec<(String, &'static str)>, OpenError> {
    let path = dir_of(store, name);
    let io = |source| OpenError::Io { action: "reading the requests in", path: path.clone(), source };
    requests::broken(&**store.files(), &path).map_err(io)
}

/// A consumer's dead letters as they were when they were looked at.
#[derive(Debug)]
pub struct DeadLetters(LetterStore);

impl DeadLetters {
    /// Looks at the dead letters of a consumer of `store`, and at every checksum of them.
    ///
    /// # Errors
    /// What the file system says; files that do not hold, or end before letters that the consumer's checkpoint knows of.
    pub fn open(store: &Store, consumer: &str) -> Result<Self, OpenError> {
        let path = dir_of(store, consumer);
        let storage: Arc<dyn Storage> = Arc::clone(store.files()) as _;
        // Before the letters: of those that it knows of, all are there. One that does not hold says nothing of them, and is told by
        // [`registered`].
        let checkpoint = ConsumerPosition::load(&*storage, &path).ok().flatten();
        let shards = checkpoint.as_ref().map_or(usize::from(store.shards()), |checkpoint| checkpoint.shards.len());
        open_outside(&storage, &path, checkpoint.unwrap_or_default().letters, shards).map(Self)
    }

    /// How many there are, and what became of others.
    #[must_use]
    pub fn statistics(&self) -> LetterStatistics {
        self.0.statistics()
    }

    /// The keys that have letters, and how many each.
    pub fn keys(&self) -> impl Iterator<Item = (Key, u32)> {
        self.0.keys().map(|(key, _, letters)| (key, letters))
    }

    /// Up to `max` letters by key, and of a key by age, from behind `after` on, with their events' archives.
    ///
    /// # Errors
    /// What the file system says; an entry that was damaged since.
    pub fn list(
        &self,
        after: Option<(Key, Offset)>,
        max: usize,
    ) -> Result<Vec<(DeadLetter, AlignedVec<16>)>, LettersError> {
        self.0.list_with_archives(after, max)
    }

    /// The letter of an event.
    ///
    /// # Errors
    /// As [`DeadLetters::list`].
    pub fn show(&self, id: EventId) -> Result<Option<(DeadLetter, AlignedVec<16>)>, LettersError> {
        let key = self.0.keys().map(|(key, _, _)| key).find(|key| self.0.ids_of(*key).any(|other| other == id));
        key.map_or(Ok(None), |key| self.0.show(key, id))
    }
}

/// Asks something of a consumer of `store`: the running one takes it up within about a second, else the next one that
/// is started. Durable when it returns. What a crash interrupts is done again.
///
/// # Errors
/// `NotRegistered`; what the file system says.
pub fn ask(store: &Store, consumer: &str, request: Request) -> Result<(), ConsumerError> {
    if registered(store, consumer)?.is_none() {
        return Err(ConsumerError::NotRegistered { name: consumer.to_owned() });
    }
    let path = dir_of(store, consumer);
    requests::leave(&**store.files(), &path, request, wall_now())
        .map_err(|source| OpenError::Io { action: "leaving a request in", path, source }.into())
}

/// Whether an engine has `store` open. It is tried with the store's lock, for an instant, which an engine that is opened
/// just then waits out.
///
/// # Errors
/// What the file system says.
pub fn is_open(store: &Store) -> Result<bool, OpenError> {
    let locked = store.files().is_locked();
    locked.map_err(|source| OpenError::Io { action: "looking at", path: store.dir().to_owned(), source })
}
