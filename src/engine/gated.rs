//! Opens gates: their files, their place in the log, and what they keep retention from.

use std::sync::Arc;

use super::Engine;
use super::open::StoreLock;
use crate::clock::wall_now;
use crate::error::{GateError, GateOpenError, OpenError, ReadError};
use crate::event::Offset;
use crate::ingress::gated::{
    Counts, Entry, Gap, GateFiles, GatedProducer, GatedShard, Parts, Positions, Recorded, Recovered, Start, TakenName,
    Uncounted, gates_dir, hold_name,
};
use crate::ingress::sequence_gate::SequenceGate;
use crate::ingress::sequence_gate::policy::GatePolicy;
use crate::log::manifest::is_folder_name;
use crate::log::reader::{Reader, Sight};
use crate::log::segment::ShardLog;
use crate::state::aggregate::Aggregate;
use crate::storage::{Lock, Storage, is_exhausted};
use crate::sync::Deadline;

/// The parts of the log that the gates of a store have not counted.
pub(super) struct Holds {
    /// By a gate's name: from these offsets on, shard by shard.
    pub(super) from: Vec<(String, Vec<u64>)>,
    /// Gates whose positions are not of this log.
    foreign: Vec<GateFiles>,
}

impl Holds {
    /// Forgets positions that are not of this log. Not before the whole store was found sound, and before anything is appended.
    pub(super) fn settle(&self) -> Result<(), OpenError> {
        self.foreign.iter().try_for_each(GateFiles::forget_positions)
    }
}

/// Returns what the gates of a store still have to count. Positions that are not of the logs, as recovery found these, are listed
/// for removal. Changes no file.
pub(super) fn holds(
    storage: &Arc<dyn Storage>,
    store: (&std::path::Path, u64),
    logs: &[Arc<ShardLog>],
) -> Result<Holds, OpenError> {
    let dir = gates_dir(store.0);
    let names = match storage.list(&dir) {
        Ok(names) => names,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        Err(source) => return Err(OpenError::Io { action: "listing", path: dir, source }),
    };
    let mut holds = Holds { from: Vec::new(), foreign: Vec::new() };
    // The opening thread has the store's lock.
    let lock: Arc<dyn Lock> = Arc::new(StoreLock::default());
    for name in names.into_iter().filter(|name| is_folder_name(name)) {
        let files = GateFiles::new(storage, store, &name);
        if !files.exists()? {
            continue;
        }
        let positions = files.positions(logs.len())?;
        // Retention frees what they have counted, and what they say is told.
        files.make_durable()?;
        let check = |positions: &Positions| {
            positions.counted.iter().zip(logs).try_for_each(|(position, log)| position.check(log, &lock))
        };
        let from = match positions.as_ref().map(check) {
            Some(Ok(())) => positions.map(|positions| positions.counted.iter().map(|at| at.offset().0).collect()),
            Some(Err(error)) => {
                tracing::warn!(name, %error, "a gate's positions are not of this log, which is counted anew");
                // Where the log could not be read, opening the gate tells.
                holds.foreign.extend(matches!(error, ReadError::Position(_)).then_some(files));
                None
            }
            None => None,
        };
        holds.from.push((name, from.unwrap_or_else(|| vec![0; logs.len()])));
    }
    Ok(holds)
}

impl<A: Aggregate> Engine<A> {
    /// A producer behind a sequence gate. `source` tells of an event that this gate published from where it came, as partition
    /// and sequence; of all others it says `None`. Where each partition stands is counted from the log with it, and from the gaps
    /// recorded under `name`: a source that begins anew from any earlier place has no event published twice.
    ///
    /// Waits until everything accepted so far is durable. The same `name` and `source` belong together for the life of the store.
    ///
    /// # Errors
    /// [`GateOpenError`]; the store goes on without the gate.
    pub fn gated(
        &self,
        name: &str,
        policy: GatePolicy,
        source: impl Fn(&<A::Event as rkyv::Archive>::Archived) -> Option<(u64, u64)>,
    ) -> Result<GatedProducer<A::Event>, GateOpenError> {
        if !is_folder_name(name) {
            return Err(GateOpenError::Name { name: name.to_owned() });
        }
        let taken = TakenName::take(&self.gates, name).ok_or_else(|| GateOpenError::Taken { name: name.to_owned() })?;
        let start = policy.starts();
        let mut gate = SequenceGate::new(policy)?;
        // What an earlier gate of this name published may still be on its way to the log.
        self.flush(Deadline::NEVER)?;
        let mut files = GateFiles::new(&self.storage, (&self.config.dir, self.shards[0].door.log.store), name);
        let record = files.open()?;
        let is_new = record.is_none();
        let Recorded { gaps, starts } = record.unwrap_or_default();
        let mut positions = files.positions(self.shards.len())?;
        let readers = match positions.as_ref().map(|positions| self.uncounted(Some(positions))) {
            Some(Err(error)) if self.are_not_of_the_log(&error) => {
                tracing::warn!(name, %error, "a gate's positions are not of this log, which is counted anew");
                positions = None;
                None
            }
            readers => readers.transpose()?,
        };
        if positions.is_none() {
            self.hold(&[(name.to_owned(), vec![0; self.shards.len()])]);
        }
        let has_lost_beginning = positions.is_none() && self.has_lost_beginning();
        let mut readers = readers.map_or_else(|| self.uncounted(None), Ok)?;
        if has_lost_beginning {
            tracing::warn!(
                name,
                "a gate's positions are gone and so is the log's beginning: what was freed is not known to it"
            );
        }
        let mut counts = Counts::new(start, positions, &starts, has_lost_beginning);
        counts.count_log(&mut readers, source)?;
        let Recovered { standings, derived_starts } = counts.with_gaps(gaps);
        let partitions = standings.len();
        if is_new && partitions > 0 {
            tracing::warn!(
                name,
                partitions,
                "a gate without a folder finds events in the log; gaps it may have closed are not known"
            );
        }
        for (partition, expected, ahead) in standings {
            let resumed = gate.resume(partition, expected, ahead);
            resumed.map_err(|_| GateOpenError::TooManyPartitions { partitions })?;
        }
        // From now on they are told: a later opening may find lower sequences, which came late.
        for (partition, sequence) in derived_starts {
            let recorded = files.add(&Entry::Start(Start { partition, sequence, time: wall_now() }));
            recorded.map_err(GateOpenError::Record)?;
        }
        let mut gated = GatedProducer::new(Parts {
            producer: self.producer(),
            gate,
            files,
            name: taken,
            shards: self.gated_shards(readers)?,
            clock: self.clock.clone(),
            keeper: Arc::clone(&self.keeper),
            _lock: Arc::clone(&self.lock),
        });
        match gated.save_counted() {
            Ok(()) => Ok(gated),
            // A cache: the older ones stay, and so does what they keep retention from.
            Err(GateError::Positions(OpenError::Io { source, .. })) if is_exhausted(&source) => {
                tracing::warn!(name, "no space for a gate's positions; they are saved by the next call that does");
                Ok(gated)
            }
            Err(GateError::Positions(error)) => Err(error.into()),
            Err(other) => unreachable!("only files are written: {other}"),
        }
    }

    /// The gaps that the gate of this name has closed, in the order in which it did. None where there is no such gate.
    ///
    /// # Errors
    /// `Name`; what reading their file found.
    pub fn gaps(&self, name: &str) -> Result<Vec<Gap>, GateOpenError> {
        if !is_folder_name(name) {
            return Err(GateOpenError::Name { name: name.to_owned() });
        }
        Ok(GateFiles::new(&self.storage, (&self.config.dir, self.shards[0].door.log.store), name).gaps()?)
    }

    pub(super) fn hold(&self, holds: &[(String, Vec<u64>)]) {
        for (name, offsets) in holds {
            for (shard, offset) in self.shards.iter().zip(offsets) {
                shard.door.log.holds.hold(&hold_name(name), Offset(*offset), &self.keeper.signal);
            }
        }
    }

    fn has_lost_beginning(&self) -> bool {
        self.shards.iter().any(|shard| shard.door.log.segment_of(shard.door.log.earliest()) > 0)
    }

    /// Whether an error that a gate's positions met says that they are of another log. Where nothing of the log was freed, counting it
    /// anew is exact, so that which cannot be told from damage is left to it too.
    fn are_not_of_the_log(&self, error: &ReadError) -> bool {
        matches!(error, ReadError::Position(_))
            || (matches!(error, ReadError::Corruption(_)) && !self.has_lost_beginning())
    }

    /// Readers of what is durable and not counted, and where they end.
    fn uncounted(&self, positions: Option<&Positions>) -> Result<Vec<Uncounted<A::Event>>, ReadError> {
        let reader = |(i, shard): (usize, &super::Handle<A>)| {
            let log = &shard.door.log;
            let until = Offset(log.durable.get());
            // No record begins before the first one of a segment; an empty log has been counted up to there.
            let position = positions.map(|positions| &positions.counted[i]);
            let reader = match position.filter(|position| position.offset() >= log.first_offset(0)) {
                Some(position) => position.reader(log, &self.lock)?,
                None => {
                    position.map_or(Ok(()), |position| position.check(log, &self.lock))?;
                    Reader::earliest(Arc::clone(log), Arc::clone(&self.lock))
                }
            };
            Ok((reader.with_sight(Sight::Durable), until))
        };
        self.shards.iter().enumerate().map(reader).collect()
    }

    /// The shards, and where their logs are counted up to: where these readers stand.
    fn gated_shards(&self, readers: Vec<Uncounted<A::Event>>) -> Result<Vec<GatedShard<A::Event>>, ReadError> {
        let of = |(shard, (trail, _)): (&super::Handle<A>, Uncounted<A::Event>)| {
            let counted = trail.position()?;
            let (door, syncer) = (Arc::clone(&shard.door), Arc::clone(&shard.syncer));
            Ok(GatedShard { door, syncer, trail, counted })
        };
        self.shards.iter().zip(readers).map(of).collect()
    }
}
