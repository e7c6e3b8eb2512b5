//! History: a key's events, its state at any time, and states folded again from the log.

use std::collections::HashSet;
use std::pin::pin;
use std::sync::Arc;

use super::Engine;
use super::handle::Handle;
use crate::error::{CodePanic, HistoryError, PanickedEvent, ReadError, WaitError, guard};
use crate::event::{Key, Meta, Offset, ShardId, Time, Version};
use crate::log::finder::Finder;
use crate::log::reader::Reader;
use crate::recovery::fold::Folder;
use crate::recovery::load::{candidates, load};
use crate::state::aggregate::Aggregate;
use crate::state::history::{AsOf, Counts, EventsBetween, Head, PastState, Stream, count, state_at};
use crate::state::keys::Walk;
use crate::state::snapshot::store::SnapshotStats;
use crate::sync::{Deadline, Ordering, block_on, may_wait, until};

/// The result of [`Engine::compare`]: states folded again from the log, against the states in use.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Comparison {
    /// Number of keys compared.
    pub keys: u64,
    /// Number of events folded again.
    pub events: u64,
    /// Keys whose rebuilt state differs from the one in use.
    pub differing: Vec<Key>,
}

/// Keys compared at a time: the shard's turn waits while this many states are cloned.
const COMPARED: usize = 256;
/// The maximum number of times that a read starts over because retention freed the events that it was reading.
const FREED_MEANWHILE_MAX: usize = 16;

/// Folds the next event of `stream` into `state` and returns its version; `None` at the end. A panic is an error.
fn evolve<A: Aggregate>(state: &mut A, stream: &mut Stream<A::Event>) -> Result<Option<Version>, HistoryError> {
    // The event of the panic, once it is read.
    let mut at = None;
    let evolved = guard("evolve or an upcaster", stream.shard(), || {
        let Some(record) = stream.next()? else { return Ok(None) };
        let Meta { offset, key, event_type, version, .. } = record.meta;
        at = Some(PanickedEvent { offset, key, event_type });
        state.evolve(record.event, &record.meta);
        Ok(Some(version))
    });
    evolved.map_err(|panic| CodePanic { event: at, ..panic })?
}

impl<A: Aggregate> Engine<A> {
    /// Saves the states of all keys and waits until they are saved. The next opening folds only the events after this
    /// checkpoint.
    ///
    /// # Errors
    /// `ShardFailed`; `CheckpointFailed` if this checkpoint, or one that was in progress at the call, could not be
    /// written; `TimedOut`; `Closed` once the engine closes; `OnEngineThread`.
    pub fn checkpoint(&self, deadline: impl Into<Deadline>) -> Result<(), WaitError> {
        if !may_wait() {
            return Err(WaitError::OnEngineThread);
        }
        block_on(deadline.into().instant(), &mut pin!(self.checkpoint_async()))?
    }

    /// As [`Engine::checkpoint`], for tasks. The call itself asks for the checkpoint, not the first poll.
    ///
    /// Cancel safety: dropping the future ends the wait; the checkpoint is made all the same.
    ///
    /// # Errors
    /// As [`Engine::checkpoint`].
    pub fn checkpoint_async(&self) -> impl Future<Output = Result<(), WaitError>> + Send + use<A> {
        let ask = |shard: &Handle<A>| {
            let (door, checkpoints) = (Arc::clone(&shard.door), Arc::clone(&shard.checkpoints));
            // Read before asking: the checkpoint may begin at once, and later events are not part of it.
            let (wanted, failed) = (door.log.appended.get(), checkpoints.failures());
            checkpoints.ask();
            door.signal.notify();
            (door, checkpoints, wanted, failed)
        };
        let asked: Vec<_> = self.shards.iter().map(ask).collect();
        async move {
            for (door, checkpoints, wanted, failed) in asked {
                let outcome = || {
                    if checkpoints.covered() >= wanted {
                        return Some(Ok(()));
                    }
                    if let Some(failure) = door.log.failure() {
                        return Some(Err(WaitError::from(failure.clone())));
                    }
                    if checkpoints.failures() > failed {
                        return Some(Err(WaitError::CheckpointFailed));
                    }
                    // A closing shard begins no other checkpoint.
                    door.closing.load(Ordering::SeqCst).then_some(Err(WaitError::Closed))
                };
                until(|[at], waker| checkpoints.register(at, waker), outcome).await?;
            }
            Ok(())
        }
    }

    /// Returns statistics of saved states, summed over all shards. Asks no shard.
    #[must_use]
    pub fn snapshot_stats(&self) -> SnapshotStats {
        let mut all = SnapshotStats::default();
        for shard in &self.shards {
            let stats = shard.store.stats();
            all.count += stats.count;
            all.bytes += stats.bytes;
            all.checkpoints += stats.checkpoints;
            all.unreadable += stats.unreadable;
            all.skipped += shard.checkpoints.skipped();
            all.checkpoints_failed += shard.checkpoints.failures();
        }
        all.bytes_average = all.bytes.checked_div(all.count).unwrap_or(0);
        all
    }

    /// Returns a key's events in order, from version `from` to the newest at the time of the call. The stream of a key
    /// without events is empty.
    ///
    /// Asks the shard for the key's newest event, then reads the log: mapped memory and files. Both block, so a task
    /// calls this, and reads the stream, on a thread for blocking work (`spawn_blocking`).
    ///
    /// # Errors
    /// `BeyondRetention` with the earliest version held; the error of reading the log or asking the shard.
    pub fn stream(&self, key: Key, from: Version) -> Result<Stream<A::Event>, HistoryError> {
        self.stream_until(key, from, Deadline::NEVER)
    }

    /// Does the same as [`Engine::stream`], but waits for the shard's answer only until `deadline`.
    ///
    /// # Errors
    /// The same as for [`Engine::stream`]; `Wait(TimedOut)`.
    pub fn stream_until(
        &self,
        key: Key,
        from: Version,
        deadline: impl Into<Deadline>,
    ) -> Result<Stream<A::Event>, HistoryError> {
        let (shard, head) = (self.of(key), self.head(key, deadline.into())?);
        Stream::new(self.finder(shard), key, from, head)
    }

    /// Returns all keys' events with a time in `[from, until)`: each shard's events in the order of its log, the shards
    /// merged by time. [`Time::END`] as `until` means no end. Reading blocks, as for [`Engine::stream`]; asks no shard.
    #[must_use]
    pub fn events_between(&self, from: Time, until: Time) -> EventsBetween<A::Event> {
        EventsBetween::new(self.readers(), from, until)
    }

    /// Counts the events that the log holds, by type. Reads every record's header, and asks no shard.
    ///
    /// # Errors
    /// An error of reading the log.
    pub fn counts(&self) -> Result<Counts, ReadError> {
        count(self.readers())
    }

    /// Returns a key's state after a version, or at a time. Starts from the nearest saved state and applies at most
    /// `snapshot_every` events to it (more if snapshots were skipped or are unreadable). A time in the future gives the
    /// current state. A time includes the events of that nanosecond; for a time in milliseconds, use
    /// [`Time::end_of_ms`].
    ///
    /// Asks the shard for the key's newest event, then reads the log and saved states: mapped memory and files. Both
    /// block, so a task calls this on a thread for blocking work (`spawn_blocking`).
    ///
    /// # Errors
    /// `BeyondRetention` with the earliest version whose state can be restored; `NotYet` for a version that does not
    /// exist; an error of reading the log or asking the shard.
    pub fn state_at(&self, key: Key, at: impl Into<AsOf>) -> Result<PastState<A>, HistoryError> {
        self.state_at_until(key, at, Deadline::NEVER)
    }

    /// Does the same as [`Engine::state_at`], but waits for the shard's answers only until `deadline`. Reading is not
    /// limited by time but by `snapshot_every` events.
    ///
    /// # Errors
    /// The same as for [`Engine::state_at`]; `Wait(TimedOut)`.
    pub fn state_at_until(
        &self,
        key: Key,
        at: impl Into<AsOf>,
        deadline: impl Into<Deadline>,
    ) -> Result<PastState<A>, HistoryError> {
        let (shard, at, deadline) = (self.of(key), at.into(), deadline.into());
        let mut checkpoints = false;
        loop {
            let head = || Ok(self.head(key, deadline)?);
            match state_at::<A>(&shard.store, &mut self.finder(shard), key, at, checkpoints, head) {
                Err(HistoryError::BeyondRetention { .. }) if !checkpoints => checkpoints = true,
                // Restoring the state after the first event held needs a state saved before that event.
                Err(HistoryError::BeyondRetention { key, .. }) => {
                    let (state, version, time_max) = self.now(key, deadline)?;
                    let is_now = match at {
                        AsOf::Version(asked) => asked == version,
                        AsOf::Time(asked) => asked >= time_max,
                    };
                    if is_now {
                        return Ok(PastState { state, version, applied: 0 });
                    }
                    let earliest = self.earliest(shard, key, deadline)?;
                    return Err(HistoryError::BeyondRetention { key, earliest });
                }
                // Freed during the read: try again with the events that are left.
                Err(HistoryError::Read(ReadError::BeyondRetention { .. })) => {}
                past => return past,
            }
        }
    }

    /// Returns a key's current state, its version and the latest time of its events.
    fn now(&self, key: Key, deadline: Deadline) -> Result<(A, Version, Time), WaitError> {
        let now = self.of(key).query(move |keys| {
            let slot = keys.get(key).cloned().unwrap_or_default();
            (slot.state, slot.version, slot.time_max)
        });
        now.wait_until(deadline)
    }

    /// Returns the earliest version of `key` whose state can be restored, if the log has lost some of the key's events.
    fn earliest(&self, shard: &Handle<A>, key: Key, deadline: Deadline) -> Result<Version, HistoryError> {
        // If the record itself is held, so are all later ones.
        let earliest = shard.door.log.earliest();
        let (_, saved) = shard.store.around_with_checkpoints(key, |saved| saved.head < earliest)?;
        match saved {
            Some(saved) => Ok(saved.version),
            None => Ok(self.head(key, deadline)?.version),
        }
    }

    /// Folds a key's state again from all of its events in the log, and returns it with its version. Uses a saved state
    /// only if the log has lost its beginning. Takes no time limit, because it reads all of the key's events; blocks as
    /// [`Engine::stream`] does.
    ///
    /// # Errors
    /// The same as for [`Engine::state_at`].
    pub fn rebuild(&self, key: Key) -> Result<(A, Version), HistoryError> {
        for _ in 0..FREED_MEANWHILE_MAX {
            match self.rebuild_once(key) {
                Err(HistoryError::BeyondRetention { .. } | HistoryError::Read(ReadError::BeyondRetention { .. })) => {}
                rebuilt => return rebuilt,
            }
        }
        self.rebuild_once(key)
    }

    fn rebuild_once(&self, key: Key) -> Result<(A, Version), HistoryError> {
        let shard = self.of(key);
        let head = self.head(key, Deadline::NEVER)?;
        let (mut state, mut version) = (A::default(), Version(0));
        let mut stream = match Stream::<A::Event>::new(self.finder(shard), key, Version(1), head) {
            Err(HistoryError::BeyondRetention { .. }) => {
                let base = self.earliest(shard, key, Deadline::NEVER)?;
                let past = self.state_at(key, base)?;
                (state, version) = (past.state, past.version);
                Stream::new(self.finder(shard), key, Version(version.0 + 1), head)?
            }
            stream => stream?,
        };
        while let Some(evolved) = evolve(&mut state, &mut stream)? {
            version = evolved;
        }
        Ok((state, version))
    }

    /// Folds the whole log again and compares the result with the states in use: a dry run of a rebuild. Starts from
    /// the oldest checkpoint if the log has lost its beginning. Needs memory for a second key table, one shard at a
    /// time. Takes no time limit, because it reads the whole log.
    ///
    /// # Errors
    /// An error of reading the log; `Wait` if a shard has ended.
    pub fn compare(&self) -> Result<Comparison, HistoryError>
    where
        A: PartialEq,
    {
        let mut found = Comparison::default();
        for (i, shard) in self.shards.iter().enumerate() {
            let mut tries = 0;
            loop {
                match self.compare_shard(ShardId(i as u16), shard) {
                    Ok(compared) => {
                        found.keys += compared.keys;
                        found.events += compared.events;
                        found.differing.extend(compared.differing);
                        break;
                    }
                    // Freed during the read.
                    Err(
                        HistoryError::BeyondRetention { .. } | HistoryError::Read(ReadError::BeyondRetention { .. }),
                    ) if tries < FREED_MEANWHILE_MAX => {
                        tries += 1;
                    }
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(found)
    }

    fn compare_shard(&self, id: ShardId, shard: &Handle<A>) -> Result<Comparison, HistoryError>
    where
        A: PartialEq,
    {
        let folder = self.refold(id, shard)?;
        // If a part of the table grows during the walk, its keys are seen twice.
        let (mut met, mut differing) = (HashSet::new(), HashSet::new());
        let mut next = Some(Walk::default());
        while let Some(walk) = next {
            let (states, then) = self.states(shard, walk)?;
            next = then;
            for (key, version, live) in states {
                let rebuilt = folder.keys.get(key);
                let (mut state, mut from) =
                    rebuilt.map_or((A::default(), Version(0)), |slot| (slot.state.clone(), slot.version));
                if from < version {
                    // The shard has appended more events meanwhile.
                    let mut stream = self.stream(key, Version(from.0 + 1))?;
                    while stream.version() <= version
                        && let Some(evolved) = evolve(&mut state, &mut stream)?
                    {
                        from = evolved;
                    }
                }
                met.insert(key);
                if state != live || from != version {
                    differing.insert(key);
                }
            }
        }
        // Keys that the log has and the shard does not.
        differing.extend(folder.keys.iter().map(|slot| slot.key).filter(|key| !met.contains(key)));
        let mut differing: Vec<_> = differing.into_iter().collect();
        differing.sort_unstable();
        Ok(Comparison { keys: met.len() as u64, events: folder.sequence, differing })
    }

    /// Folds the whole log again and passes every key's state to `show`, in no particular order. The states in use do
    /// not change. (To put rebuilt states in use, increment [`Aggregate::STATE_VERSION`]: the next opening folds the
    /// log again.) Starts from the oldest checkpoint if the log has lost its beginning. Takes no time limit, because it
    /// reads the whole log; asks no shard.
    ///
    /// # Errors
    /// An error of reading the log.
    pub fn rebuild_all(&self, mut show: impl FnMut(Key, &A, Version)) -> Result<(), HistoryError> {
        for (i, shard) in self.shards.iter().enumerate() {
            let folder = self.refold(ShardId(i as u16), shard)?;
            folder.keys.iter().for_each(|slot| show(slot.key, &slot.state, slot.version));
        }
        Ok(())
    }

    /// Folds a shard's log again, up to its current end.
    fn refold(&self, id: ShardId, shard: &Handle<A>) -> Result<Folder<A>, HistoryError> {
        for _ in 0..FREED_MEANWHILE_MAX {
            match self.refold_once(id, shard) {
                Err(HistoryError::Read(ReadError::BeyondRetention { .. })) => {}
                folded => return folded,
            }
        }
        self.refold_once(id, shard)
    }

    fn refold_once(&self, id: ShardId, shard: &Handle<A>) -> Result<Folder<A>, HistoryError> {
        let log = &shard.door.log;
        let until = Offset(log.appended.get());
        let mut reader = self.reader(id);
        let earliest = reader.offset();
        let mut folder = Folder::<A>::new(id, self.config.keys_expected, 0);
        if log.segment_of(earliest) > 0 && size_of::<A>() > 0 {
            let base = self.oldest_base(id, earliest, until, &mut folder)?;
            // `None`: the checkpoints were freed or replaced during the read.
            let lost = ReadError::BeyondRetention { shard: id, asked: log.first_offset(0), earliest };
            reader = base.ok_or(lost)?;
        }
        let folded = guard("evolve or an upcaster", id, || folder.read(&mut reader, until));
        folded.map_err(|panic| folder.at_fault(panic))??;
        Ok(folder)
    }

    /// Loads the oldest checkpoint whose start the log still holds into `folder`, and returns a reader that starts
    /// there.
    fn oldest_base(
        &self,
        id: ShardId,
        earliest: Offset,
        until: Offset,
        folder: &mut Folder<A>,
    ) -> Result<Option<Reader<A::Event>>, HistoryError> {
        let dir = crate::log::manifest::shard_dir(&self.config.dir, id);
        let log = &self.shards[usize::from(id.0)].door.log;
        let owner = (log.store, id);
        let io = |source| ReadError::Io { action: "reading the checkpoints of", path: dir.clone(), source };
        let (bases, _) = match candidates(&*self.storage, &dir, owner) {
            // A later checkpoint has replaced it since the folder was listed.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            bases => bases.map_err(io)?,
        };
        for base in bases.iter().rev().filter(|base| base.start >= earliest && base.start <= until) {
            let reader = match self.reader_at(id, base.start) {
                Ok(reader) if reader.sequence() == base.sequence.0 && base.is_of(log) => reader,
                // A checkpoint of another log.
                Ok(_) | Err(ReadError::NotARecord { .. }) => continue,
                Err(error) => return Err(error.into()),
            };
            *folder = Folder::new(id, self.config.keys_expected, 0);
            if guard("upgrade", id, || load(&*self.storage, &dir, owner, base, folder))?.is_ok() {
                return Ok(Some(reader));
            }
        }
        Ok(None)
    }

    /// Clones the current states of some keys, and returns them with the rest of the walk.
    #[expect(clippy::type_complexity, reason = "a list and a position, used once")]
    fn states(&self, shard: &Handle<A>, walk: Walk) -> Result<(Vec<(Key, Version, A)>, Option<Walk>), WaitError> {
        let states = shard.query(move |keys| {
            let (slots, then) = keys.walk(walk, COMPARED);
            (slots.map(|slot| (slot.key, slot.version, slot.state.clone())).collect(), then)
        });
        states.wait()
    }

    fn finder(&self, shard: &Handle<A>) -> Finder {
        Finder::new(Arc::clone(&shard.door.log), Arc::clone(&self.lock))
    }

    fn readers(&self) -> Vec<Reader<A::Event>> {
        (0..self.config.shards).map(|shard| self.reader(ShardId(shard))).collect()
    }

    /// Asks a key's shard for the key's version and newest record.
    pub(super) fn head(&self, key: Key, deadline: Deadline) -> Result<Head, WaitError> {
        let head = self.of(key).query(move |keys| {
            let head = keys.get(key).map(|slot| Head { version: slot.version, offset: slot.head });
            head.unwrap_or(Head { version: Version(0), offset: Offset(0) })
        });
        head.wait_until(deadline)
    }
}
