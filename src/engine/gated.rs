//! Opens sequence gates: their files, their place in the log, and the retention holds on what they have not counted.

use std::sync::Arc;

use super::Engine;
use super::handle::Handle;
use crate::clock::wall_now;
use crate::error::{GateError, GateOpenError, OpenError, ReadError};
use crate::event::Offset;
use crate::ingress::gated::{
    Counts, Entry, Gap, GateFiles, GatedProducer, GatedShard, Parts, Positions, Recorded, Recovered, Start, TakenName,
    Uncounted, hold_name,
};
use crate::ingress::sequence_gate::SequenceGate;
use crate::ingress::sequence_gate::policy::GatePolicy;
use crate::log::manifest::is_folder_name;
use crate::log::reader::{Reader, Sight};
use crate::state::aggregate::Aggregate;
use crate::storage::is_exhausted;
use crate::sync::Deadline;

/// A gate's saved positions, and readers of the events that they do not count.
struct Resume<A: Aggregate> {
    positions: Option<Positions>,
    readers: Vec<Uncounted<A::Event>>,
    /// `true` if there are no positions and retention has freed the log's beginning.
    has_lost_beginning: bool,
}

impl<A: Aggregate> Engine<A> {
    /// Opens a producer behind a sequence gate. For an event that this gate published, `source` returns the partition
    /// and the sequence that the event came from; for every other event it returns `None`. With `source` and the gaps
    /// recorded under `name`, the gate counts the log to find the next sequence of each partition. So the upstream may
    /// restart from any earlier place, and no event is published twice.
    ///
    /// Waits until everything accepted before this call is durable. A `name` must keep its `source` for the life of the
    /// store.
    ///
    /// # Errors
    /// [`GateOpenError`]; the store keeps running without the gate.
    pub fn gated(
        &self,
        name: &str,
        policy: GatePolicy,
        source: impl Fn(&<A::Event as rkyv::Archive>::Archived) -> Option<(u64, u64)>,
    ) -> Result<GatedProducer<A::Event>, GateOpenError> {
        let mut files = self.gate_files(name)?;
        let taken = TakenName::take(&self.gates, name).ok_or_else(|| GateOpenError::Taken { name: name.to_owned() })?;
        let start = policy.starts();
        let mut gate = SequenceGate::new(policy)?;
        // Events that an earlier gate of this name published may still be in flight.
        self.flush(Deadline::NEVER)?;
        let record = files.open()?;
        let is_new = record.is_none();
        let Recorded { gaps, starts } = record.unwrap_or_default();
        let Resume { positions, mut readers, has_lost_beginning } = self.resume_gate(name, &files)?;
        let mut counts = Counts::new(start, positions, &starts, has_lost_beginning);
        counts.count_log(&mut readers, source)?;
        let Recovered { standings, derived_starts } = counts.with_gaps(gaps);
        let partitions = standings.len();
        if is_new && partitions > 0 {
            tracing::warn!(name, partitions, "a gate without a folder finds its events in the log; its gaps are lost");
        }
        for (partition, expected, ahead) in standings {
            let resumed = gate.resume(partition, expected, ahead);
            resumed.map_err(|_| GateOpenError::TooManyPartitions { partitions })?;
        }
        // The starts are recorded now, because a later opening may find lower sequences in the log: those of late
        // events.
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
        save_first(&mut gated, name)?;
        Ok(gated)
    }

    /// Returns the gaps that the gate `name` has closed, in the order in which it closed them; none if there is no such
    /// gate.
    ///
    /// # Errors
    /// `Name`; an error of reading the gate's file.
    pub fn gaps(&self, name: &str) -> Result<Vec<Gap>, GateOpenError> {
        Ok(self.gate_files(name)?.gaps()?)
    }

    fn gate_files(&self, name: &str) -> Result<GateFiles, GateOpenError> {
        if !is_folder_name(name) {
            return Err(GateOpenError::Name { name: name.to_owned() });
        }
        Ok(GateFiles::new(&self.storage, (&self.config.dir, self.shards[0].door.log.store), name))
    }

    /// Finds where a gate's counting continues. Without usable positions it counts the whole log again.
    fn resume_gate(&self, name: &str, files: &GateFiles) -> Result<Resume<A>, GateOpenError> {
        let mut positions = files.positions(self.shards.len())?;
        let readers = match positions.as_ref().map(|positions| self.uncounted(Some(positions))) {
            Some(Err(error)) if self.is_of_another_log(&error) => {
                tracing::warn!(name, %error, "a gate's positions belong to another log; it counts this log again");
                positions = None;
                None
            }
            readers => readers.transpose()?,
        };
        if positions.is_none() {
            self.hold(&[(name.to_owned(), vec![0; self.shards.len()])]);
        }
        let has_lost_beginning = positions.is_none() && self.has_lost_beginning();
        let readers = readers.map_or_else(|| self.uncounted(None), Ok)?;
        if has_lost_beginning {
            tracing::warn!(
                name,
                "a gate's positions and the log's beginning are gone: the gate cannot count freed events"
            );
        }
        Ok(Resume { positions, readers, has_lost_beginning })
    }

    /// Sets the retention holds of gates at these offsets, shard by shard.
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

    /// Returns `true` if `error` says that a gate's positions belong to another log. Damage looks the same. While the
    /// log still has its beginning, damage is treated the same, because counting the log again gives the exact result.
    fn is_of_another_log(&self, error: &ReadError) -> bool {
        matches!(error, ReadError::Position(_))
            || (matches!(error, ReadError::Corruption(_)) && !self.has_lost_beginning())
    }

    /// Returns readers of the durable events that `positions` do not count, each with the offset at which it ends.
    fn uncounted(&self, positions: Option<&Positions>) -> Result<Vec<Uncounted<A::Event>>, ReadError> {
        let reader = |(i, shard): (usize, &Handle<A>)| {
            let log = &shard.door.log;
            let until = Offset(log.durable.get());
            // The position of an empty log lies before the first record: there is nothing to read at it.
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

    /// Returns the shards as a gate sees them, each counted up to its reader.
    fn gated_shards(&self, readers: Vec<Uncounted<A::Event>>) -> Result<Vec<GatedShard<A::Event>>, ReadError> {
        let of = |(shard, (trail, _)): (&Handle<A>, Uncounted<A::Event>)| {
            let counted = trail.position()?;
            let (door, syncer) = (Arc::clone(&shard.door), Arc::clone(&shard.syncer));
            Ok(GatedShard { door, syncer, trail, counted })
        };
        self.shards.iter().zip(readers).map(of).collect()
    }
}

/// Saves the positions of a gate that was just opened. A full disk is no error: the older positions stay, and so does
/// their hold on retention.
fn save_first<E: crate::event::Event>(gated: &mut GatedProducer<E>, name: &str) -> Result<(), GateOpenError> {
    match gated.save_counted() {
        Ok(()) => Ok(()),
        Err(GateError::Positions(OpenError::Io { source, .. })) if is_exhausted(&source) => {
            tracing::warn!(name, "no space for a gate's positions; the next save writes them");
            Ok(())
        }
        Err(GateError::Positions(error)) => Err(error.into()),
        Err(other) => unreachable!("only files are written: {other}"),
    }
}
