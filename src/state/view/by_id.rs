//! A view by id: one value per key, read from any thread.
//!
//! One writer per part: its shard. Values are in slots that never move, each with its own sequence lock.

use std::fmt;
use std::sync::Arc;

use rkyv::util::AlignedVec;

use crate::event::{Key, Meta, Router, Scratch, ShardId};
use crate::state::aggregate::{Aggregate, Stored};
use crate::state::view::grow::Grow;
use crate::state::view::key_numbers::KeyNumbers;
use crate::state::view::parts::{Part, Parts, Progress};
use crate::state::view::{Place, Position, View, ViewWriter};
use crate::sync::{AtomicU64, Ordering, SeqLock};

/// A view with one value per key, made from the key's state and read from any thread without asking the shard.
///
/// `V` is the part of a state that readers need; a small value is fast. The view keeps it archived in at most
/// `bytes_max` bytes per key, so a `get` is one look-up, one copy and one validation. Handles are cheap to clone.
///
/// ```
/// use corelane::view::ById;
/// use corelane::{Config, Deadline, Engine, Key};
/// # use corelane::{Aggregate, Bounded, Emit, Event, EventType, EventTypeId, Meta};
/// # use rkyv::{Archive, Deserialize, Serialize};
/// # #[derive(Archive, Serialize, Deserialize, Bounded)]
/// # struct Scored { points: u32 }
/// # impl Event for Scored {
/// #     const TYPES: &'static [EventType] = &[EventType::new(1, "scored", 1)];
/// #     fn event_type(&self) -> EventTypeId { EventTypeId(1) }
/// # }
/// # #[derive(Archive, Serialize, Deserialize, Bounded, Clone, Default)]
/// # struct Player { points: u64 }
/// # impl Aggregate for Player {
/// #     type Event = Scored;
/// #     type Command = ();
/// #     type Rejection = ();
/// #     fn evolve(&mut self, event: &ArchivedScored, _meta: &Meta) {
/// #         self.points += u64::from(event.points.to_native());
/// #     }
/// #     fn decide(&self, (): (), _emit: &mut Emit<Scored>) -> Result<(), ()> { Ok(()) }
/// # }
///
/// let points = ById::new(16, |player: &Player| player.points);
/// # let dir = tempfile::tempdir()?;
/// let engine = Engine::<Player>::builder(Config::new(dir.path())).view(&points).open()?;
/// engine.producer().publish(Key(7), Scored { points: 3 })?;
/// engine.flush(Deadline::NEVER)?;
/// // The shard answers between two batches, when it has published the views.
/// engine.state(Key(7)).wait()?;
/// assert_eq!(points.get(Key(7))?, Some(3));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct ById<A, V>(Arc<Inner<A, V>>);

struct Inner<A, V> {
    value_of: Box<dyn Fn(&A) -> V + Send + Sync>,
    bytes_max: usize,
    parts: Parts<Values>,
}

/// The reason why [`ById::get`] cannot return a key's value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Unreadable {
    /// The archive of the key's current value is larger than the view keeps. No older value is shown in its place.
    #[error("the value of key {key} is larger than {bytes_max} bytes")]
    TooLarge {
        /// The key.
        key: Key,
        /// The view's limit.
        bytes_max: usize,
    },
    /// The archive is not a valid value of its type.
    #[error("the value of key {key}: {why}")]
    Invalid {
        /// The key.
        key: Key,
        /// The validator's error.
        why: String,
    },
}

impl<A: Aggregate, V: Stored> ById<A, V> {
    /// Creates a view of the values that `value_of` makes of states, each at most `bytes_max` bytes when archived
    /// (rounded up to a multiple of 8).
    ///
    /// `value_of` runs on the shard's thread for every event, so it must be fast.
    #[must_use]
    pub fn new(bytes_max: usize, value_of: impl Fn(&A) -> V + Send + Sync + 'static) -> Self {
        let bytes_max = bytes_max.next_multiple_of(8);
        Self(Arc::new(Inner { value_of: Box::new(value_of), bytes_max, parts: Parts::new() }))
    }

    /// Returns the value of `key`; `None` for a key without events.
    ///
    /// # Errors
    /// [`Unreadable::TooLarge`] if the current value does not fit.
    pub fn get(&self, key: Key) -> Result<Option<V>, Unreadable> {
        let bytes_max = self.0.bytes_max;
        let mut archive = AlignedVec::<16>::with_capacity(bytes_max);
        let found = self.0.parts.read(|parts| {
            let router = parts.iter().flatten().next()?.router;
            let part = parts.get(router.index(key))?.as_ref()?;
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

    /// Returns the position of each shard's part. Values read afterwards include everything up to it.
    #[must_use]
    pub fn positions(&self) -> Vec<(ShardId, Position)> {
        self.0.parts.positions()
    }
}

impl<A: Aggregate, V: Stored> View<A> for ById<A, V> {
    fn writer(&self, place: &Place) -> Box<dyn ViewWriter<A>> {
        let bytes_max = self.0.bytes_max;
        let part = self.0.parts.begin(place, Values::new(bytes_max, place));
        let mut archive = AlignedVec::<16>::with_capacity(bytes_max);
        archive.resize(bytes_max, 0);
        // rkyv's scratch space holds pointers to a value's parts; its size does not depend on the archive's.
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

/// Slots per allocation.
const CHUNK: usize = 256;
/// The length that marks a value which does not fit.
const TOO_LARGE: u64 = u64::MAX;

/// One shard's values.
#[derive(Debug)]
struct Values {
    index: KeyNumbers,
    chunks: Grow<Chunk>,
    words_max: usize,
    router: Router,
    progress: Progress,
}

#[derive(Debug)]
struct Chunk {
    heads: Box<[(SeqLock, AtomicU64)]>,
    /// `words_max` words per slot.
    words: Box<[AtomicU64]>,
}

impl Values {
    fn new(bytes_max: usize, place: &Place) -> Self {
        Self {
            index: KeyNumbers::with_room(place.keys_expected),
            chunks: Grow::new(),
            words_max: bytes_max / 8,
            router: place.router,
            progress: Progress::new(),
        }
    }

    /// Copies a slot's archive into `archive`. Returns `false` if the value does not fit into a slot.
    fn copy(&self, slot: usize, archive: &mut AlignedVec<16>) -> bool {
        let Some(chunk) = self.chunks.get(slot / CHUNK) else { return false };
        let ((lock, length), words) = chunk.slot(slot % CHUNK, self.words_max);
        lock.read(|| {
            archive.clear();
            let bytes = length.load(Ordering::Relaxed);
            if bytes == TOO_LARGE {
                return false;
            }
            // During a write, length and words may be of different values, but no length exceeds the words.
            let bytes = bytes as usize;
            for word in &words[..bytes.div_ceil(8)] {
                archive.extend_from_slice(&word.load(Ordering::Relaxed).to_le_bytes());
            }
            archive.resize(bytes, 0);
            true
        })
    }

    /// Writes a slot; `None` marks a value that does not fit. Only the writer calls this.
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
