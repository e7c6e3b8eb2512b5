//! How far a consumer has come, as a small file with a CRC: `FORMAT.md` has the bytes.
//!
//! One writer: the consumer's driver (while the store is opened: who opens it). It is replaced as a whole, so a crash leaves
//! the old or the new one. It says which events are done, so that a restart repeats only what was done after it.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::dead_letter::{FileEnd, is_letters_name};
use crate::error::OpenError;
use crate::event::Offset;
use crate::log::format::{FORMAT_VERSION, OFFSETS_END};
use crate::log::manifest::is_folder_name;
use crate::log::position::Position;
use crate::storage::framed::{u16_at, u32_at, u64_at};
use crate::storage::memory::ALIGN;
use crate::storage::{Storage, replace};

const MAGIC: [u8; 8] = *b"coreckpt";
/// Its file name in the consumer's folder.
const NAME: &str = "checkpoint";
/// Its name in the folder of a consumer that is being removed.
const REMOVED: &str = "removed";
const HEADER_BYTES: usize = 16;
const SHARD_BYTES: usize = 40 + Position::BYTES;
const LETTERS_BYTES: usize = 16;
/// Unfinished events that are named; events after the last of them are offered again.
const UNFINISHED_MAX: usize = 1 << 16;

/// How far a consumer has come, shard by shard.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Checkpoint {
    pub(crate) shards: Vec<Progress>,
    /// Its dead letters were durable up to here: where they end earlier, some are lost.
    pub(crate) letters: FileEnd,
}

/// How far it has come in one shard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Progress {
    /// Everything below is done: handled, or recorded.
    pub(crate) position: Offset,
    /// Below it only `unfinished` is not done; nothing from here on is.
    pub(crate) read: Offset,
    /// Below it side effects have been had once: it was `position` when the consumer was set back.
    pub(crate) effects_from: Offset,
    /// Where it began when it was registered.
    pub(crate) began: Offset,
    /// The furthest position that it has read. The event before it identifies the log of the other positions.
    pub(crate) seen: Position,
    /// What of `position..read` is not done, rising.
    pub(crate) unfinished: Vec<Offset>,
}

impl Progress {
    /// Where a consumer begins.
    pub(crate) fn begin(seen: Position) -> Self {
        let began = seen.offset();
        Self { position: began, read: began, effects_from: Offset(0), began, seen, unfinished: Vec::new() }
    }

    /// At rest further on.
    pub(crate) fn at(&self, seen: Position) -> Self {
        let position = seen.offset();
        Self { position, read: position, seen, unfinished: Vec::new(), ..*self }
    }

    /// Progress of which `unfinished` is not done, all of which is named or offered again.
    pub(crate) fn new(
        position: Offset,
        read: Offset,
        effects_from: Offset,
        (began, seen): (Offset, Position),
        unfinished: impl Iterator<Item = Offset>,
    ) -> Self {
        let mut named: Vec<Offset> = unfinished.take(UNFINISHED_MAX + 1).collect();
        let read = if named.len() > UNFINISHED_MAX { named.pop().unwrap_or(read) } else { read };
        Self { position, read, effects_from, began, seen, unfinished: named }
    }

    /// Why no log can have these positions, if so.
    fn is_impossible(&self) -> Option<&'static str> {
        let Self { position, read, effects_from, began, unfinished, .. } = self;
        let is_place = |at: &Offset| at.0.is_multiple_of(ALIGN as u64) && at.0 < OFFSETS_END;
        if ![position, read, effects_from, began].into_iter().chain(unfinished).all(is_place) {
            return Some("a position is no place of a log");
        }
        let follows =
            unfinished.is_sorted_by(|a, b| a < b) && unfinished.iter().all(|at| (position..read).contains(&at));
        (position > read || !follows || unfinished.len() > UNFINISHED_MAX)
            .then_some("its positions do not follow each other")
    }

    /// Forgets what lies at or beyond the log's end: the log has lost it, and other events will stand there. Whether there was any.
    pub(crate) fn cut(&mut self, end: Offset) -> bool {
        let before = self.clone();
        self.unfinished.retain(|offset| *offset < end);
        self.read = self.read.min(end);
        self.position = self.position.min(end);
        self.effects_from = self.effects_from.min(end);
        self.began = self.began.min(end);
        self.seen = self.seen.cut(end);
        *self != before
    }
}

impl Checkpoint {
    /// Of a consumer that begins at a position of every shard, without dead letters.
    pub(crate) fn begin(positions: impl IntoIterator<Item = Position>) -> Self {
        Self { shards: positions.into_iter().map(Progress::begin).collect(), letters: FileEnd::default() }
    }

    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER_BYTES + self.shards.len() * SHARD_BYTES + LETTERS_BYTES + 4);
        out.extend(MAGIC);
        out.extend(FORMAT_VERSION.to_le_bytes());
        out.extend((self.shards.len() as u16).to_le_bytes());
        out.extend([0; 2]);
        for shard in &self.shards {
            assert_eq!(shard.is_impossible(), None, "it could not be read again: {shard:?}");
            out.extend(shard.position.0.to_le_bytes());
            out.extend(shard.read.0.to_le_bytes());
            out.extend(shard.effects_from.0.to_le_bytes());
            out.extend(shard.began.0.to_le_bytes());
            out.extend((shard.unfinished.len() as u32).to_le_bytes());
            out.extend([0; 4]);
            out.extend(shard.seen.to_bytes());
            shard.unfinished.iter().for_each(|offset| out.extend(offset.0.to_le_bytes()));
        }
        out.extend(self.letters.number.to_le_bytes());
        out.extend([0; 4]);
        out.extend(self.letters.bytes.to_le_bytes());
        let crc = crc32c::crc32c(&out);
        out.extend(crc.to_le_bytes());
        out
    }

    fn decode(path: &Path, bytes: &[u8]) -> Result<Self, OpenError> {
        let foreign = |why| OpenError::ForeignFile { path: path.to_owned(), why };
        let Some((body, crc)) = bytes.split_last_chunk::<4>().filter(|(body, _)| body.len() >= HEADER_BYTES) else {
            return Err(foreign("the file is cut short"));
        };
        if body[..8] != MAGIC {
            return Err(foreign("wrong magic"));
        }
        if crc32c::crc32c(body) != u32::from_le_bytes(*crc) {
            return Err(foreign("its CRC does not hold"));
        }
        let version = u32_at(body, 8);
        if version != FORMAT_VERSION {
            let (path, found, known) = (path.to_owned(), version, FORMAT_VERSION);
            return Err(OpenError::UnknownFormat { path, found, known });
        }
        let mut rest = &body[HEADER_BYTES..];
        let mut shards = Vec::new();
        for _ in 0..u16_at(body, 12) {
            let short = || foreign("the file ends before its last shard");
            let (fixed, after) = rest.split_at_checked(SHARD_BYTES).ok_or_else(short)?;
            let unfinished = u32_at(fixed, 32) as usize;
            let (offsets, after) = after.split_at_checked(unfinished * 8).ok_or_else(short)?;
            let seen = Position::from_bytes(&fixed[40..])
                .map_err(|_| foreign("what it has seen of a shard is no position"))?;
            shards.push(Progress {
                position: Offset(u64_at(fixed, 0)),
                read: Offset(u64_at(fixed, 8)),
                effects_from: Offset(u64_at(fixed, 16)),
                began: Offset(u64_at(fixed, 24)),
                seen,
                unfinished: offsets.chunks_exact(8).map(|at| Offset(u64_at(at, 0))).collect(),
            });
            if let Some(why) = shards.last().and_then(Progress::is_impossible) {
                return Err(foreign(why));
            }
            rest = after;
        }
        if rest.len() != LETTERS_BYTES {
            return Err(foreign("the file does not end behind its last shard"));
        }
        let letters = FileEnd { number: u32_at(rest, 0), bytes: u64_at(rest, 8) };
        Ok(Self { shards, letters })
    }

    /// What is saved in a consumer's folder; `None` where nothing is, and dead letters are not either.
    pub(crate) fn load(storage: &dyn Storage, dir: &Path) -> Result<Option<Self>, OpenError> {
        let path = dir.join(NAME);
        match storage.read(&path) {
            Ok(bytes) => Self::decode(&path, &bytes).map(Some),
            Err(error) if error.kind() == ErrorKind::NotADirectory => Ok(None),
            Err(error) if error.kind() == ErrorKind::NotFound => match has_lost_its_checkpoint(storage, dir) {
                Ok(false) => Ok(None),
                Ok(true) => {
                    Err(OpenError::DamagedFile { path, at: 0, why: "it is missing, and dead letters are there" })
                }
                Err(source) => Err(OpenError::Io { action: "listing", path: dir.to_owned(), source }),
            },
            Err(source) => Err(OpenError::Io { action: "reading", path, source }),
        }
    }

    /// Replaces what is saved; durable when it returns.
    pub(crate) fn save(&self, storage: &dyn Storage, dir: &Path) -> std::io::Result<()> {
        replace(storage, dir, NAME, &self.encode())
    }

    /// Makes a folder be no consumer's any more; durable when it returns.
    pub(crate) fn remove(storage: &dyn Storage, dir: &Path) -> std::io::Result<()> {
        storage.rename(&dir.join(NAME), &dir.join(REMOVED))?;
        storage.sync_dir(dir)
    }
}

/// Removes everything in a folder that is no consumer's any more; durable when it returns.
pub(crate) fn clear(storage: &dyn Storage, dir: &Path) -> std::io::Result<()> {
    let remove = |name: &str| match storage.remove(&dir.join(name)) {
        // Who leaves a request renames it.
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        removed => removed,
    };
    let names = storage.list(dir)?;
    if names.is_empty() {
        return Ok(());
    }
    names.iter().filter(|name| *name != REMOVED).try_for_each(|name| remove(name))?;
    storage.sync_dir(dir)?;
    // Last: dead letters without it and without a checkpoint would pass for such as lost theirs.
    remove(REMOVED)?;
    storage.sync_dir(dir)
}

/// Of a folder without a checkpoint: whether it has dead letters of a consumer that nobody removed.
fn has_lost_its_checkpoint(storage: &dyn Storage, dir: &Path) -> std::io::Result<bool> {
    let names = match storage.list(dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
        names => names?,
    };
    Ok(names.iter().any(|name| is_letters_name(name)) && !names.iter().any(|name| name == REMOVED))
}

/// The folder of a store's consumers.
pub(crate) fn consumers_dir(store: &Path) -> PathBuf {
    store.join("consumers")
}

/// The names that have a folder of their own among a store's consumers, whether or not they are consumers.
pub(crate) fn names(storage: &dyn Storage, store: &Path) -> Result<Vec<String>, OpenError> {
    let path = consumers_dir(store);
    match storage.list(&path) {
        Ok(names) => Ok(names.into_iter().filter(|name| is_folder_name(name)).collect()),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
        Err(source) => Err(OpenError::Io { action: "listing", path, source }),
    }
}

/// What is saved of a consumer, cut where the logs end.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) name: String,
    pub(crate) checkpoint: Checkpoint,
    /// It was cut, so what is saved says more than there is.
    is_cut: bool,
}

impl Found {
    /// Saves what was cut. Not before the whole store was found sound, and before anything is appended.
    pub(crate) fn settle(&self, storage: &dyn Storage, store: &Path) -> Result<(), OpenError> {
        if !self.is_cut {
            return Ok(());
        }
        let dir = consumers_dir(store).join(&self.name);
        let saved = self.checkpoint.save(storage, &dir);
        saved.map_err(|source| OpenError::Io { action: "writing", path: dir.join(NAME), source })
    }
}

/// Makes durable that a folder's checkpoint has its name, or has it no more: retention frees what it does not hold, and a process that
/// was killed may have renamed it without a sync.
fn sync_names(storage: &dyn Storage, dir: &Path) -> std::io::Result<()> {
    match storage.sync_dir(dir) {
        // A link to nowhere; a file that is no folder, and so no consumer's.
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(()),
        synced => synced,
    }
}

/// Cuts what consumers know of a shard's log at its end as recovery found it. Changes no file.
pub(crate) fn cut_all(
    storage: &dyn Storage,
    store: &Path,
    store_id: u64,
    ends: &[Offset],
) -> Result<Vec<Found>, OpenError> {
    let mut known = Vec::new();
    for name in names(storage, store)? {
        let dir = consumers_dir(store).join(&name);
        let found = Checkpoint::load(storage, &dir)?;
        sync_names(storage, &dir).map_err(|source| OpenError::Io { action: "syncing", path: dir.clone(), source })?;
        let Some(mut checkpoint) = found else { continue };
        if checkpoint.shards.len() != ends.len() {
            let why = "the consumer's checkpoint is of another number of shards";
            return Err(OpenError::ForeignFile { path: dir.join(NAME), why });
        }
        if checkpoint.shards.iter().any(|progress| progress.seen.store() != store_id) {
            let why = "the consumer's checkpoint is of another store";
            return Err(OpenError::ForeignFile { path: dir.join(NAME), why });
        }
        let mut is_cut = false;
        for (i, (progress, end)) in checkpoint.shards.iter_mut().zip(ends).enumerate() {
            if progress.cut(*end) {
                tracing::warn!(consumer = name, shard = i, %end, "a consumer had handled events that the log has lost");
                is_cut = true;
            }
        }
        known.push(Found { name, checkpoint, is_cut });
    }
    Ok(known)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{Sequence, ShardId};
    use crate::log::format::tests::assert_golden;
    use crate::testing::FaultyStorage;

    const STORE: u64 = 0x1112_1314_1516_1718;

    fn seen(offset: u64) -> Position {
        let last = (Offset(offset - 64), 0x2122_2324);
        Position::behind(STORE, ShardId(1), Offset(offset), last, Sequence(3))
    }

    fn begun(offset: u64) -> Progress {
        Progress::begin(seen(offset))
    }

    fn example() -> Checkpoint {
        let unfinished = vec![Offset(4096), Offset(4256)];
        let first = Progress { read: Offset(5008), effects_from: Offset(4096), unfinished, ..begun(4096) };
        let letters = FileEnd { number: 3, bytes: 4096 };
        Checkpoint { shards: vec![first, begun(0x0102_0304_0500)], letters }
    }

    #[test]
    fn the_bytes_are_frozen() {
        let bytes = example().encode();
        assert_golden("consumer-checkpoint.bin", &bytes);
        assert_eq!(Checkpoint::decode(Path::new("c"), &bytes).expect("decodes"), example());
    }

    #[test]
    fn one_that_ends_elsewhere_than_behind_its_letters_is_refused() {
        for (cut, more) in [(LETTERS_BYTES + 4, 0), (4, 4)] {
            let mut bytes = example().encode();
            bytes.truncate(bytes.len() - cut);
            bytes.extend(vec![0; more]);
            bytes.extend(crc32c::crc32c(&bytes).to_le_bytes());
            assert!(matches!(Checkpoint::decode(Path::new("c"), &bytes), Err(OpenError::ForeignFile { .. })));
        }
    }

    #[test]
    fn a_missing_one_is_told_from_a_consumer_that_was_removed() {
        let dir = Path::new("/s/consumers/a");
        for n in 1.. {
            let storage = FaultyStorage::new();
            assert_eq!(Checkpoint::load(&storage, dir).expect("readable"), None, "no folder, no consumer");
            storage.create_dir(dir).expect("made");
            example().save(&storage, dir).expect("saved");
            storage.write(&dir.join("letters-000001.log"), b"letters").expect("written");
            storage.sync_dir(dir).expect("synced");
            storage.fail_operation(n);
            let removed = Checkpoint::remove(&storage, dir).and_then(|()| clear(&storage, dir));
            storage.fail_operation(1_000_000);
            storage.crash(crate::testing::Unsynced::Random(n));
            let found = Checkpoint::load(&storage, dir).expect("nothing is damaged by removing it");
            assert!(found.is_none() || removed.is_err(), "operation {n}");
            if removed.is_ok() {
                assert_eq!(storage.list(dir).expect("listed"), [""; 0]);
                break;
            }
        }
        let storage = FaultyStorage::new();
        storage.create_dir(dir).expect("made");
        example().save(&storage, dir).expect("saved");
        storage.write(&dir.join("letters-000001.log"), b"letters").expect("written");
        storage.remove(&dir.join(NAME)).expect("removed by somebody else");
        assert!(matches!(Checkpoint::load(&storage, dir), Err(OpenError::DamagedFile { .. })));
    }

    #[test]
    fn what_does_not_hold_is_refused_and_named() {
        let bytes = example().encode();
        for len in 0..bytes.len() {
            assert!(Checkpoint::decode(Path::new("c"), &bytes[..len]).is_err(), "cut at {len}");
        }
        for at in 0..bytes.len() {
            let mut bytes = bytes.clone();
            bytes[at] ^= 1;
            assert!(Checkpoint::decode(Path::new("c"), &bytes).is_err(), "flipped at {at}");
        }
        let mut newer = bytes[..bytes.len() - 4].to_vec();
        newer[8] += 1;
        newer.extend(crc32c::crc32c(&newer).to_le_bytes());
        assert!(matches!(Checkpoint::decode(Path::new("c"), &newer), Err(OpenError::UnknownFormat { .. })));
    }

    #[test]
    fn a_crash_while_saving_leaves_the_old_or_the_new_one() {
        let dir = Path::new("/s/consumers/a");
        let (old, new) = (example(), Checkpoint { shards: vec![begun(9008); 2], ..example() });
        for n in 1.. {
            let storage = FaultyStorage::new();
            old.save(&storage, dir).expect("saved");
            storage.fail_operation(n);
            let saved = new.save(&storage, dir).is_ok();
            storage.fail_operation(1_000_000);
            storage.crash(crate::testing::Unsynced::Random(n));
            let found = Checkpoint::load(&storage, dir).expect("readable").expect("there is one");
            assert!(found == new || (found == old && !saved), "operation {n}: {found:?}");
            if saved {
                break;
            }
        }
    }

    #[test]
    fn what_the_log_has_lost_is_forgotten() {
        let storage = FaultyStorage::new();
        let store = Path::new("/s");
        example().save(&storage, &consumers_dir(store).join("a")).expect("saved");
        let known = cut_all(&storage, store, STORE, &[Offset(4208), Offset(112)]).expect("readable");
        known.iter().for_each(|found| found.settle(&storage, store).expect("saved"));
        let unfinished = vec![Offset(4096)];
        let first = Progress { read: Offset(4208), effects_from: Offset(4096), unfinished, ..begun(4096) };
        let second = begun(0x0102_0304_0500);
        let end = Offset(112);
        let second = Progress { position: end, read: end, began: end, seen: second.seen.cut(end), ..second };
        assert_eq!(
            (second.seen.offset(), second.seen.last()),
            (end, (Offset(0), 0)),
            "the event it knew the log by is lost"
        );
        let expected = Checkpoint { shards: vec![first, second], ..example() };
        assert_eq!(known, [Found { name: "a".to_owned(), checkpoint: expected.clone(), is_cut: true }]);
        storage.crash(crate::testing::Unsynced::Lost);
        let dir = consumers_dir(store).join("a");
        assert_eq!(Checkpoint::load(&storage, &dir).expect("readable"), Some(expected), "durably");
        assert!(cut_all(&storage, store, STORE, &[Offset(1)]).is_err(), "another number of shards");
        let foreign = cut_all(&storage, store, STORE + 1, &[Offset(4208), Offset(112)]);
        assert!(matches!(foreign, Err(OpenError::ForeignFile { .. })), "another store: {foreign:?}");
    }

    #[test]
    fn what_is_not_named_is_offered_again() {
        let many = (0..UNFINISHED_MAX as u64 + 5).map(|i| Offset(i * 16));
        let progress = Progress::new(Offset(0), Offset(u64::MAX), Offset(0), (Offset(0), seen(4096)), many);
        assert_eq!(progress.unfinished.len(), UNFINISHED_MAX);
        assert_eq!(progress.read, Offset(UNFINISHED_MAX as u64 * 16), "from the first that is not named");
    }

    #[test]
    fn what_stands_at_the_logs_end_is_forgotten_and_its_effects_are_had_again() {
        let unfinished = vec![Offset(16), Offset(32)];
        let whole = begun(4096).seen;
        let mut progress =
            Progress { position: Offset(16), read: Offset(64), effects_from: Offset(48), unfinished, ..begun(4096) };
        progress.began = Offset(0);
        assert!(progress.cut(Offset(32)));
        let left = vec![Offset(16)];
        let (read, seen) = (Offset(32), whole.cut(Offset(32)));
        let cut = Progress { position: Offset(16), read, effects_from: read, began: Offset(0), seen, unfinished: left };
        assert_eq!(progress, cut);
        assert!(!progress.cut(Offset(32)));
    }

    #[test]
    fn a_consumer_that_was_removed_does_not_come_back() {
        let (storage, dir) = (FaultyStorage::new(), Path::new("/s/consumers/a"));
        example().save(&storage, dir).expect("saved");
        Checkpoint::remove(&storage, dir).expect("removed");
        storage.crash(crate::testing::Unsynced::Lost);
        assert_eq!(Checkpoint::load(&storage, dir).expect("readable"), None);
    }
}
