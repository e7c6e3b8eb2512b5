//! A consumer's position: the file that registers it and says which events are done. `FORMAT.md` §17 has the bytes.
//!
//! One writer: the consumer's driver (while the store is being opened: the opening thread). The file is replaced as a
//! whole, so a crash leaves the old or the new one. A restart repeats only the events that ended after the last save.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::dead_letter::{FileEnd, is_letters_name};
use crate::error::OpenError;
use crate::event::Offset;
use crate::log::format::is_offset;
use crate::log::manifest::is_folder_name;
use crate::log::position::Position;
use crate::storage::framed::{Frame, FrameError, Reader, Writer};
use crate::storage::{Storage, replace};

/// The frame of the file. The shortest content is a position of no shards.
const FRAME: Frame = Frame { magic: *b"coreckpt", bytes_min: 36 };
/// The file's name in the consumer's folder. The name is older than the term "position".
const NAME: &str = "checkpoint";
/// The file's name while the consumer is being removed.
const REMOVED: &str = "removed";
/// The maximum number of unfinished events that are named. Events after the last named one are offered again.
const UNFINISHED_MAX: usize = 1 << 16;

/// The position of a consumer in a whole store.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct ConsumerPosition {
    pub(crate) shards: Vec<Progress>,
    /// The durable end of its dead letters: if the files end earlier, letters are lost.
    pub(crate) letters: FileEnd,
}

/// The position of a consumer in one shard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Progress {
    /// Every event below this offset is done: handled, or recorded as parked or skipped.
    pub(crate) position: Offset,
    /// Of the events below this offset, all but `unfinished` are done. No event at or above it is done.
    pub(crate) read: Offset,
    /// Side effects of the events below this offset have already run. Set to `position` when the consumer is set back.
    pub(crate) effects_from: Offset,
    /// The offset where the consumer began when it was registered.
    pub(crate) began: Offset,
    /// The furthest position that the consumer has read. Its last event identifies the log of the other positions.
    pub(crate) seen: Position,
    /// The unfinished events of `position..read`, in rising order.
    pub(crate) unfinished: Vec<Offset>,
}

impl Progress {
    /// The progress of a consumer that begins at `seen`.
    pub(crate) fn begin(seen: Position) -> Self {
        let began = seen.offset();
        Self { position: began, read: began, effects_from: Offset(0), began, seen, unfinished: Vec::new() }
    }

    /// The progress after all events below `seen` are done.
    pub(crate) fn at(&self, seen: Position) -> Self {
        let position = seen.offset();
        Self { position, read: position, seen, unfinished: Vec::new(), ..*self }
    }

    /// The progress with these unfinished events. If there are too many to be named, the others are offered again.
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

    /// Returns the reason why no log can have these positions, if there is one.
    fn impossible(&self) -> Option<&'static str> {
        let Self { position, read, effects_from, began, unfinished, .. } = self;
        if ![position, read, effects_from, began].into_iter().chain(unfinished).all(|at| is_offset(*at)) {
            return Some("one of its offsets cannot be in a log");
        }
        let follows =
            unfinished.is_sorted_by(|a, b| a < b) && unfinished.iter().all(|at| (position..read).contains(&at));
        (position > read || !follows || unfinished.len() > UNFINISHED_MAX).then_some("its offsets are out of order")
    }

    /// Forgets offsets at or beyond `end`: the log has lost those events, and will store others there. Returns `true`
    /// if there were any.
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

    fn write(&self, out: &mut Writer) {
        assert_eq!(self.impossible(), None, "it could not be read again: {self:?}");
        for offset in [self.position, self.read, self.effects_from, self.began] {
            out.u64(offset.0);
        }
        out.u32(self.unfinished.len() as u32);
        out.zeros(4);
        out.bytes(&self.seen.to_bytes());
        self.unfinished.iter().for_each(|offset| out.u64(offset.0));
    }

    fn read(fields: &mut Reader<'_>) -> Result<Self, FrameError> {
        let mut offset = || fields.u64().map(Offset);
        let (position, read, effects_from, began) = (offset()?, offset()?, offset()?, offset()?);
        let unfinished = fields.u32()?;
        fields.bytes(4)?;
        let seen = Position::from_bytes(&fields.array::<{ Position::BYTES }>()?);
        let seen = seen.map_err(|_| "its furthest position is not valid")?;
        let unfinished = (0..unfinished).map(|_| fields.u64().map(Offset)).collect::<Result<_, _>>()?;
        let progress = Self { position, read, effects_from, began, seen, unfinished };
        progress.impossible().map_or(Ok(progress), |why| Err(why.into()))
    }
}

impl ConsumerPosition {
    /// The position of a consumer that begins at a position of every shard, without dead letters.
    pub(crate) fn begin(positions: impl IntoIterator<Item = Position>) -> Self {
        Self { shards: positions.into_iter().map(Progress::begin).collect(), letters: FileEnd::default() }
    }

    fn encode(&self) -> Vec<u8> {
        let mut out = FRAME.begin();
        out.u16(self.shards.len() as u16);
        out.zeros(2);
        self.shards.iter().for_each(|shard| shard.write(&mut out));
        out.u32(self.letters.number);
        out.zeros(4);
        out.u64(self.letters.bytes);
        out.seal()
    }

    fn decode(path: &Path, bytes: &[u8]) -> Result<Self, OpenError> {
        FRAME.open(bytes).and_then(Self::read).map_err(|error| error.of_file(path))
    }

    fn read(mut fields: Reader<'_>) -> Result<Self, FrameError> {
        let shards = fields.u16()?;
        fields.bytes(2)?;
        let shards = (0..shards).map(|_| Progress::read(&mut fields)).collect::<Result<_, _>>()?;
        let number = fields.u32()?;
        fields.bytes(4)?;
        let letters = FileEnd { number, bytes: fields.u64()? };
        fields.end()?;
        Ok(Self { shards, letters })
    }

    /// Loads the position from a consumer's folder. Returns `None` if no consumer is registered there.
    pub(crate) fn load(storage: &dyn Storage, dir: &Path) -> Result<Option<Self>, OpenError> {
        let path = dir.join(NAME);
        match storage.read(&path) {
            Ok(bytes) => Self::decode(&path, &bytes).map(Some),
            Err(error) if error.kind() == ErrorKind::NotADirectory => Ok(None),
            Err(error) if error.kind() == ErrorKind::NotFound => match has_lost_its_position(storage, dir) {
                Ok(false) => Ok(None),
                Ok(true) => {
                    let why = "it is missing, but the consumer has dead letters";
                    Err(OpenError::DamagedFile { path, at: 0, why })
                }
                Err(source) => Err(OpenError::Io { action: "listing", path: dir.to_owned(), source }),
            },
            Err(source) => Err(OpenError::Io { action: "reading", path, source }),
        }
    }

    /// Replaces the saved position; durable when it returns.
    pub(crate) fn save(&self, storage: &dyn Storage, dir: &Path) -> std::io::Result<()> {
        replace(storage, dir, NAME, &self.encode())
    }

    /// Ends the registration of the consumer with this folder; durable when it returns.
    pub(crate) fn remove(storage: &dyn Storage, dir: &Path) -> std::io::Result<()> {
        storage.rename(&dir.join(NAME), &dir.join(REMOVED))?;
        storage.sync_dir(dir)
    }
}

/// Removes all files from the folder of a removed consumer; durable when it returns.
pub(crate) fn clear(storage: &dyn Storage, dir: &Path) -> std::io::Result<()> {
    let remove = |name: &str| match storage.remove(&dir.join(name)) {
        // The file of a new request may get its final name meanwhile.
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        removed => removed,
    };
    let names = storage.list(dir)?;
    if names.is_empty() {
        return Ok(());
    }
    names.iter().filter(|name| *name != REMOVED).try_for_each(|name| remove(name))?;
    storage.sync_dir(dir)?;
    // Remove this file last: dead letters without this file and without a position look like those of a consumer that
    // has lost its position.
    remove(REMOVED)?;
    storage.sync_dir(dir)
}

/// Returns `true` if a folder without a position has dead letters of a consumer that was not removed.
fn has_lost_its_position(storage: &dyn Storage, dir: &Path) -> std::io::Result<bool> {
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

/// The names in the consumers' folder that a consumer may have, registered or not.
pub(crate) fn names(storage: &dyn Storage, store: &Path) -> Result<Vec<String>, OpenError> {
    let path = consumers_dir(store);
    match storage.list(&path) {
        Ok(names) => Ok(names.into_iter().filter(|name| is_folder_name(name)).collect()),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
        Err(source) => Err(OpenError::Io { action: "listing", path, source }),
    }
}

/// A registered consumer and its position, cut at the ends of the logs.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct RegisteredConsumer {
    pub(crate) name: String,
    pub(crate) position: ConsumerPosition,
    /// `true` if the position differs from the saved one, which names events that the logs have lost.
    is_cut: bool,
}

impl RegisteredConsumer {
    /// Saves a position that was cut. Call after the whole store is checked, and before anything is appended.
    pub(crate) fn settle(&self, storage: &dyn Storage, store: &Path) -> Result<(), OpenError> {
        if !self.is_cut {
            return Ok(());
        }
        let dir = consumers_dir(store).join(&self.name);
        let saved = self.position.save(storage, &dir);
        saved.map_err(|source| OpenError::Io { action: "writing", path: dir.join(NAME), source })
    }
}

/// Makes the names in a consumer's folder durable. A killed process may have renamed the position without a sync, and
/// retention frees events by the positions that it finds.
fn sync_names(storage: &dyn Storage, dir: &Path) -> std::io::Result<()> {
    match storage.sync_dir(dir) {
        // A dangling link, or a file that is not a folder and so not a consumer's.
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(()),
        synced => synced,
    }
}

/// Loads the positions of all consumers and cuts them at `ends`, the ends of the logs that recovery has found. Changes
/// no file.
pub(crate) fn cut_all(
    storage: &dyn Storage,
    store: &Path,
    store_id: u64,
    ends: &[Offset],
) -> Result<Vec<RegisteredConsumer>, OpenError> {
    let mut registered = Vec::new();
    for name in names(storage, store)? {
        let dir = consumers_dir(store).join(&name);
        let loaded = ConsumerPosition::load(storage, &dir)?;
        sync_names(storage, &dir).map_err(|source| OpenError::Io { action: "syncing", path: dir.clone(), source })?;
        let Some(mut position) = loaded else { continue };
        let foreign = |why| Err(OpenError::ForeignFile { path: dir.join(NAME), why });
        if position.shards.len() != ends.len() {
            return foreign("the consumer's position has another number of shards");
        }
        if position.shards.iter().any(|progress| progress.seen.store() != store_id) {
            return foreign("the consumer's position belongs to another store");
        }
        let mut is_cut = false;
        for (shard, (progress, end)) in position.shards.iter_mut().zip(ends).enumerate() {
            if progress.cut(*end) {
                tracing::warn!(consumer = name, shard, %end, "the log has lost events that the consumer had handled");
                is_cut = true;
            }
        }
        registered.push(RegisteredConsumer { name, position, is_cut });
    }
    Ok(registered)
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

    fn example() -> ConsumerPosition {
        let unfinished = vec![Offset(4096), Offset(4256)];
        let first = Progress { read: Offset(5008), effects_from: Offset(4096), unfinished, ..begun(4096) };
        let letters = FileEnd { number: 3, bytes: 4096 };
        ConsumerPosition { shards: vec![first, begun(0x0102_0304_0500)], letters }
    }

    #[test]
    fn the_bytes_are_frozen() {
        let bytes = example().encode();
        assert_golden("consumer-checkpoint.bin", &bytes);
        assert_eq!(ConsumerPosition::decode(Path::new("c"), &bytes).expect("decodes"), example());
    }

    #[test]
    fn a_position_is_refused_unless_it_ends_after_its_letters() {
        let letters_bytes = 16;
        for (cut, more) in [(letters_bytes + 4, 0), (4, 4)] {
            let mut bytes = example().encode();
            bytes.truncate(bytes.len() - cut);
            bytes.extend(vec![0; more]);
            bytes.extend(crc32c::crc32c(&bytes).to_le_bytes());
            assert!(matches!(ConsumerPosition::decode(Path::new("c"), &bytes), Err(OpenError::ForeignFile { .. })));
        }
    }

    #[test]
    fn a_lost_position_differs_from_a_removed_consumer() {
        let dir = Path::new("/s/consumers/a");
        for n in 1.. {
            let storage = FaultyStorage::new();
            assert_eq!(ConsumerPosition::load(&storage, dir).expect("readable"), None, "no folder, no consumer");
            storage.create_dir(dir).expect("made");
            example().save(&storage, dir).expect("saved");
            storage.write(&dir.join("letters-000001.log"), b"letters").expect("written");
            storage.sync_dir(dir).expect("synced");
            storage.fail_operation(n);
            let removed = ConsumerPosition::remove(&storage, dir).and_then(|()| clear(&storage, dir));
            storage.fail_operation(1_000_000);
            storage.crash(crate::testing::Unsynced::Random(n));
            let found = ConsumerPosition::load(&storage, dir).expect("removing a consumer damages no file");
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
        storage.remove(&dir.join(NAME)).expect("removed by another program");
        assert!(matches!(ConsumerPosition::load(&storage, dir), Err(OpenError::DamagedFile { .. })));
    }

    #[test]
    fn damaged_cut_and_newer_positions_are_refused() {
        let bytes = example().encode();
        for len in 0..bytes.len() {
            assert!(ConsumerPosition::decode(Path::new("c"), &bytes[..len]).is_err(), "cut at {len}");
        }
        for at in 0..bytes.len() {
            let mut bytes = bytes.clone();
            bytes[at] ^= 1;
            assert!(ConsumerPosition::decode(Path::new("c"), &bytes).is_err(), "flipped at {at}");
        }
        let mut newer = bytes[..bytes.len() - 4].to_vec();
        newer[8] += 1;
        newer.extend(crc32c::crc32c(&newer).to_le_bytes());
        assert!(matches!(ConsumerPosition::decode(Path::new("c"), &newer), Err(OpenError::UnknownFormat { .. })));
    }

    #[test]
    fn a_crash_while_saving_leaves_the_old_or_the_new_position() {
        let dir = Path::new("/s/consumers/a");
        let (old, new) = (example(), ConsumerPosition { shards: vec![begun(9008); 2], ..example() });
        for n in 1.. {
            let storage = FaultyStorage::new();
            old.save(&storage, dir).expect("saved");
            storage.fail_operation(n);
            let saved = new.save(&storage, dir).is_ok();
            storage.fail_operation(1_000_000);
            storage.crash(crate::testing::Unsynced::Random(n));
            let found = ConsumerPosition::load(&storage, dir).expect("readable").expect("a position");
            assert!(found == new || (found == old && !saved), "operation {n}: {found:?}");
            if saved {
                break;
            }
        }
    }

    #[test]
    fn events_that_the_log_has_lost_are_cut_from_the_position() {
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
            "the event that identified the log is lost"
        );
        let expected = ConsumerPosition { shards: vec![first, second], ..example() };
        assert_eq!(known, [RegisteredConsumer { name: "a".to_owned(), position: expected.clone(), is_cut: true }]);
        storage.crash(crate::testing::Unsynced::Lost);
        let dir = consumers_dir(store).join("a");
        assert_eq!(ConsumerPosition::load(&storage, &dir).expect("readable"), Some(expected), "durably");
        assert!(cut_all(&storage, store, STORE, &[Offset(1)]).is_err(), "another number of shards");
        let foreign = cut_all(&storage, store, STORE + 1, &[Offset(4208), Offset(112)]);
        assert!(matches!(foreign, Err(OpenError::ForeignFile { .. })), "another store: {foreign:?}");
    }

    #[test]
    fn events_after_the_last_named_one_are_offered_again() {
        let many = (0..UNFINISHED_MAX as u64 + 5).map(|i| Offset(i * 16));
        let progress = Progress::new(Offset(0), Offset(u64::MAX), Offset(0), (Offset(0), seen(4096)), many);
        assert_eq!(progress.unfinished.len(), UNFINISHED_MAX);
        assert_eq!(progress.read, Offset(UNFINISHED_MAX as u64 * 16), "the first event that is not named");
    }

    #[test]
    fn an_event_at_the_logs_end_is_cut_and_its_side_effects_run_again() {
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
    fn a_removed_consumer_stays_removed() {
        let (storage, dir) = (FaultyStorage::new(), Path::new("/s/consumers/a"));
        example().save(&storage, dir).expect("saved");
        ConsumerPosition::remove(&storage, dir).expect("removed");
        storage.crash(crate::testing::Unsynced::Lost);
        assert_eq!(ConsumerPosition::load(&storage, dir).expect("readable"), None);
    }
}
