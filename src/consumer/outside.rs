//! Reads a store's consumers from another process, beside a running engine, and leaves requests for them as files.
//! Nothing else is changed.

use std::path::PathBuf;
use std::sync::Arc;

use rkyv::util::AlignedVec;

use super::dead_letter::answer::{DeadLetter, LetterStatistics, LettersError};
use super::dead_letter::{LetterStore, open_outside};
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
    /// The consumer's name.
    pub name: String,
    /// Its saved position in every shard. Retention keeps every event at or after it.
    pub positions: Vec<Offset>,
    /// The highest offset that its position file names in every shard. Opening the store cuts it at the log's end.
    pub reaches: Vec<Offset>,
    /// The furthest position that it has read in every shard. This position identifies the log.
    pub seen: Vec<Position>,
    /// Number of requests that are waiting or not completed.
    pub requests: usize,
}

/// Returns the names of the folders of consumers in `store`. A folder without a position file belongs to no registered
/// consumer.
///
/// # Errors
/// The file system's error.
pub fn names(store: &Store) -> Result<Vec<String>, OpenError> {
    folders(&**store.files(), store.dir())
}

fn dir_of(store: &Store, consumer: &str) -> PathBuf {
    consumers_dir(store.dir()).join(consumer)
}

/// Returns a consumer of `store`; `None` if no consumer of this name is registered.
///
/// # Errors
/// The file system's error; a damaged position file.
pub fn registered(store: &Store, name: &str) -> Result<Option<Registered>, OpenError> {
    if !crate::log::manifest::is_folder_name(name) {
        return Ok(None);
    }
    let path = dir_of(store, name);
    let Some(position) = ConsumerPosition::load(&**store.files(), &path)? else { return Ok(None) };
    let requests = requests::waiting(&**store.files(), &path);
    let requests = requests.map_err(|source| OpenError::Io { action: "listing", path, source })?.len();
    let positions = position.shards.iter().map(|shard| shard.position).collect();
    let reach = |shard: &Progress| {
        [shard.position, shard.read, shard.effects_from, shard.began, shard.seen.offset()]
            .into_iter()
            .max()
            .unwrap_or_default()
    };
    let reaches = position.shards.iter().map(reach).collect();
    let seen = position.shards.iter().map(|shard| shard.seen).collect();
    Ok(Some(Registered { name: name.to_owned(), positions, reaches, seen, requests }))
}

/// Returns the invalid requests to a consumer of `store`, each with the reason. The consumer puts them aside.
///
/// # Errors
/// The file system's error.
pub fn broken_requests(store: &Store, name: &str) -> Result<Vec<(String, &'static str)>, OpenError> {
    let path = dir_of(store, name);
    let io = |source| OpenError::Io { action: "reading the requests in", path: path.clone(), source };
    requests::broken(&**store.files(), &path).map_err(io)
}

/// A consumer's dead letters, as of the time they were read.
#[derive(Debug)]
pub struct DeadLetters(LetterStore);

impl DeadLetters {
    /// Reads the dead letters of a consumer of `store` and verifies every checksum.
    ///
    /// # Errors
    /// The file system's error; files that are damaged, or that end before letters that the consumer's position file
    /// names.
    pub fn open(store: &Store, consumer: &str) -> Result<Self, OpenError> {
        let path = dir_of(store, consumer);
        let storage: Arc<dyn Storage> = Arc::clone(store.files()) as _;
        // Read the position file before the letters, so that every letter that it names is there. If the file is
        // damaged, [`registered`] reports that.
        let position = ConsumerPosition::load(&*storage, &path).ok().flatten();
        let shards = position.as_ref().map_or(usize::from(store.shards()), |position| position.shards.len());
        open_outside(&storage, &path, position.unwrap_or_default().letters, shards).map(Self)
    }

    /// Returns the counts of letters.
    #[must_use]
    pub fn statistics(&self) -> LetterStatistics {
        self.0.statistics()
    }

    /// Returns the keys that have letters, and the number of each.
    pub fn keys(&self) -> impl Iterator<Item = (Key, u32)> {
        self.0.keys().map(|(key, _, letters)| (key, letters))
    }

    /// Returns up to `max` letters that follow `after`, ordered by key and offset, with their events' archives.
    ///
    /// # Errors
    /// The file system's error; an entry that was damaged since [`DeadLetters::open`].
    pub fn list(
        &self,
        after: Option<(Key, Offset)>,
        max: usize,
    ) -> Result<Vec<(DeadLetter, AlignedVec<16>)>, LettersError> {
        self.0.list_with_archives(after, max)
    }

    /// Returns the letter of an event.
    ///
    /// # Errors
    /// The same as for [`DeadLetters::list`].
    pub fn show(&self, id: EventId) -> Result<Option<(DeadLetter, AlignedVec<16>)>, LettersError> {
        let key = self.0.keys().map(|(key, _, _)| key).find(|key| self.0.ids_of(*key).any(|other| other == id));
        key.map_or(Ok(None), |key| self.0.show(key, id))
    }
}

/// Leaves a request for a consumer of `store`; durable when this returns. A running consumer takes it up within about a
/// second, any other when it is started. A request that a crash interrupts is repeated.
///
/// # Errors
/// `NotRegistered`; the file system's error.
pub fn ask(store: &Store, consumer: &str, request: Request) -> Result<(), ConsumerError> {
    if registered(store, consumer)?.is_none() {
        return Err(ConsumerError::NotRegistered { name: consumer.to_owned() });
    }
    let path = dir_of(store, consumer);
    requests::leave(&**store.files(), &path, request, wall_now())
        .map_err(|source| OpenError::Io { action: "leaving a request in", path, source }.into())
}

/// Returns `true` if an engine has `store` open. Tries the store's lock for an instant; an engine that is opening the
/// store at that time waits.
///
/// # Errors
/// The file system's error.
pub fn is_open(store: &Store) -> Result<bool, OpenError> {
    let locked = store.files().is_locked();
    locked.map_err(|source| OpenError::Io { action: "trying the lock of", path: store.dir().to_owned(), source })
}
