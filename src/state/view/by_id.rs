//! By id: one value per key, read from any thread.
//!
//! One writer per part: its shard. Values lie in slots that never move, each under a version of its own.

use std::fmt;
use std::sync::Arc;

use rkyv::util::AlignedVec;

use crate::event::{Key, Meta, Scratch, ShardId};
use crate::state::aggregate::{Aggregate, Stored};
use crate::state::view::grow::Grow;
use crate::state::view::index::Index;
use crate::state::view::parts::{Part, Parts, Progress};
use crate::state::view::{Place, Position, View, ViewWriter};
use crate::sync::{AtomicU64, Ordering, SeqLock};

/// One value per key, made from its state and read from any thread without asking the shard.
///
/// `V` is what readers need of a state: small is fast. It is kept archived in at most `bytes_max` bytes per key, so a
/// `get` is one look-up, one copy and one check. Handles are cheap to clone.
pub struct ById<A, V>(Arc<Inner<A, V>>);

struct Inner<A, V> {
    value_of: Box<dyn Fn(&A) -> V + Send + Sync>,
    bytes_max: usize,
    parts: Parts<Values>,
}

/// Why [`ById::get`] has no value to give for a key that has one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Unreadable {
    /// The key's value, as it is now, has an archive larger than the view keeps. An older one is not shown in its place.
    #[error("the value of key {key} is larger than {bytes_max} bytes")]
    TooLarge {
        /// Whose.
        key: Key,
        /// The view's limit.
        bytes_max: usize,
    },
    /// The archive was refused by its own type's check.
    #[error("the value of key {key}: {why}")]
    Invalid {
        /// Whose.
        key: Key,
        /// What the check said.
        why: String,
    },
}

impl<A: Aggregate, V: Stored> ById<A, V> {
    /// A view of what `value_of` makes of a state, at most `bytes_max` bytes archived (rounded up to a multiple of 8).
    ///
    /// `value_of` runs on the shard's thread for every event: it must be quick.
    #[must_use]
    pub fn new(bytes_max: usize, value_of: impl Fn(&A) -> V + Send + Sync + 'static) -> Self {
        let bytes_max = bytes_max.next_multiple_of(8);
        Self(Arc::new(Inner { value_of: Box::new(value_of), bytes_max, parts: Parts::new() }))
    }

    /// The value of `key`; `None` for a key without events.
    ///
    /// # Errors
    /// [`Unreadable::TooLarge`] when the value does not fit at the moment.
    pub fn get(&self, key: Key) -> Result<Option<V>, Unreadable> {
        let bytes_max = self.0.bytes_max;
        let mut archive = AlignedVec::<16>::with_capacity(bytes_max);
        let found = self.0.parts.read(|parts| {
            let part = parts.get(usize::from(key.shard(parts.len().max(1) as u16).0))?.as_ref()?;
            let slot = part.index.find(key)?;
            Some(part.copy(slot, &mut archive))
        });
        match found {
            None => Ok(None),
            Some(false) => Err(Unreadable::TooLarge { key, bytes_max }),
            Some(true) => match V::decode(&archive) {
                Ok(value) => Ok(Some(value)),
                Err(error) => Err(Unreadable::Invalid { key, why: error.to_string() }),
            },
        }
    }

    /// How far each shard's part has come. Read before the values, it never says more than they show.
    #[must_use]
    pub fn positions(&self) -> Vec<(ShardId, Position)> {
        self.0.parts.positions()
    }
}

impl<A: Aggregate, V: Stored> View<A> for ById<A, V> {
    fn writer(&self, place: &Place) -> Box<dyn ViewWriter<A>> {
        let bytes_max = self.0.bytes_max;
        let part = self.0.parts.begin(place, Values::new(bytes_max, place.keys_expected));
        let mut archive = AlignedVec::<16>::with_capacity(bytes_max);
        archive.resize(bytes_max, 0);
        // What rkyv sets aside for the parts of a value is of the size of their pointers, whatever their archives are.
        let scratch = Scratch::new(bytes_max * 4 + 1024);
        Box::new(Writer { view: Arc::clone(&self.0), part, archive, scratch })
    }
}

impl<A, V> Clone for ById<A, V> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<A, V> fmt::Debug for ById<A, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ById").field("bytes_max", &self.0.bytes_max).finish_non_exhaustive()
    }
}

/// Slots of one allocation.
const CHUNK: usize = 256;
/// Length of a value that does not fit.
const TOO_LARGE: u64 = u64::MAX;

/// One shard's values.
#[derive(Debug)]
struct Values {
    index: Index,
    chunks: Grow<Chunk>,
    words_max: usize,
    progress: Progress,
}

#[derive(Debug)]
struct Chunk {
    heads: Box<[(SeqLock, AtomicU64)]>,
    /// `words_max` words per slot.
    words: Box<[AtomicU64]>,
}

impl Values {
    fn new(bytes_max: usize, keys_expected: usize) -> Self {
        Self {
            index: Index::with_room(keys_expected),
            chunks: Grow::new(),
            words_max: bytes_max / 8,
            progress: Progress::new(),
        }
    }

    /// Copies a slot's archive into `archive`. `false`: it holds none, for it would not fit.
    fn copy(&self, slot: usize, archive: &mut AlignedVec<16>) -> bool {
        let Some(chunk) = self.chunks.get(slot / CHUNK) else { return false };
        let ((lock, length), words) = chunk.slot(slot % CHUNK, self.words_max);
        lock.read(|| {
            archive.clear();
            let bytes = length.load(Ordering::Relaxed);
            if bytes == TOO_LARGE {
                return false;
            }
            // While it is being written a length can be of another value than the words, but never beyond them.
            let bytes = bytes as usize;
            for word in &words[..bytes.div_ceil(8)] {
                archive.extend_from_slice(&word.load(Ordering::Relaxed).to_le_bytes());
            }
            archive.resize(bytes, 0);
            true
        })
    }

    /// Only the one writer calls this. `None`: the value does not fit.
    fn set(&self, slot: usize, archive: Option<&[u8]>) {
        let chunk = self.chunks.get_or_make(slot / CHUNK, || Chunk::new(self.words_max));
        let ((lock, length), words) = chunk.slot(slot % CHUNK, self.words_max);
        lock.write(|| {
            length.store(archive.map_or(TOO_LARGE, |archive| archive.len() as u64), Ordering::Relaxed);
            for (word, bytes) in words.iter().zip(archive.unwrap_or_default().chunks(8)) {
                let mut whole = [0; 8];
                whole[..bytes.len()].copy_from_slice(bytes);
                word.store(u64::from_le_bytes(whole), Ordering::Relaxed);
            }
        });
    }
}

impl Part for Values {
    fn progress(&self) -> &Progress {
        &self.progress
    }
}

impl Chunk {
    fn new(words_max: usize) -> Self {
        Self {
            heads: (0..CHUNK).map(|_| (SeqLock::new(), AtomicU64::new(0))).collect(),
            words: (0..CHUNK * words_max).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    fn slot(&self, at: usize, words_max: usize) -> (&(SeqLock, AtomicU64), &[AtomicU64]) {
        (&self.heads[at], &self.words[at * words_max..(at + 1) * words_max])
    }
}

struct Writer<A, V> {
    view: Arc<Inner<A, V>>,
    part: Arc<Values>,
    archive: AlignedVec<16>,
    scratch: Scratch,
}

impl<A: Aggregate, V: Stored> Writer<A, V> {
    fn put(&mut self, key: Key, state: &A) {
        let value = (self.view.value_of)(state);
        let archive = value.encode(&mut self.archive, &mut self.scratch).map(|bytes| &self.archive[..bytes]);
        if let Some(slot) = self.part.index.find(key) {
            self.part.set(slot, archive);
        } else {
            let slot = self.part.index.len();
            self.part.set(slot, archive);
            self.part.index.add(key);
        }
    }
}

impl<A: Aggregate, V: Stored> ViewWriter<A> for Writer<A, V> {
    fn load(&mut self, key: Key, state: &A) {
        self.put(key, state);
    }

    fn changed(&mut self, key: Key, state: &A, _meta: &Meta) {
        self.put(key, state);
    }

    fn publish(&mut self, at: Position) {
        self.part.progress.publish(at);
    }
}
