//! Opens gates: their files, their place in the log, and what they keep retention from.

use super::Engine;
use crate::aggregate::Aggregate;
use crate::clock::wall_now;
use crate::consumer::{GatePolicy, SequenceGate};
use crate::error::{GateError, GateOpenError, OpenError, ReadError};
use crate::event::Offset;
use crate::gated::{
    Counts, Entry, Gap, GateFiles, GatedProducer, GatedShard, Parts, Positions, Recorded, Recovered, Start, TakenName,
    Uncounted, gates_dir, hold_name,
};
use crate::log::manifest::is_folder_name;
use crate::log::reader::Reader;
use crate::log::storage::{Storage, is_exhausted};
use crate::sync::Arc;

/// What the gates of a store have not counted.
pub(super) struct Holds {
    /// By a gate's name: from these offsets on, shard by shard.
    pub(super) from: Vec<(String, Vec<u64>)>,
    /// Gates whose positions are not of this log.
    ahead: Vec<GateFiles>,
}

impl Holds {
    /// Forgets positions that are not of this log. Not before the whole store was found sound, and before anything is appended.
    pub(super) fn settle(&self) -> Result<(), OpenError> {
        self.ahead.iter().try_for_each(GateFiles::forget_positions)
    }
}

/// What the gates of a store still have to count. Positions that name what no shard holds are not of this log, which ends at `ends`,
/// and are to be removed. Changes no file.
pub(super) fn holds(
    storage: &std::sync::Arc<dyn Storage>,
    store: &std::path::Path,
    ends: &[Offset],
) -> Result<Holds, OpenError> {
    let dir = gates_dir(store);
    let names = match storage.list(&dir) {
        Ok(names) => names,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        Err(source) => return Err(OpenError::Io { action: "listing", path: dir, source }),
    };
    let mut holds = Holds { from: Vec::new(), ahead: Vec::new() };
    for name in names.into_iter().filter(|name| is_folder_name(name)) {
        let files = GateFiles::new(storage, store, &name);
        let mut positions = files.positions(ends.len())?;
        // Retention frees what they have counted, and what they say is told.
        files.make_durable()?;
        let is_ahead =
            |positions: &Positions| positions.counted.iter().zip(ends).any(|(counted, end)| *counted > end.0);
        if positions.as_ref().is_some_and(is_ahead) {
            tracing::warn!(name, "a gate has counted more than the log holds; the log is counted anew");
            holds.ahead.push(files);
            positions = None;
        }
        holds.from.push((name, positions.map_or_else(|| vec![0; ends.len()], |positions| positions.counted)));
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
        self.flush(None)?;
        let mut files = GateFiles::new(&self.storage, &self.config.dir, name);
        let record = files.open()?;
        let is_new = record.is_none();
        let Recorded { gaps, starts } = record.unwrap_or_default();
        let positions = files.positions(self.shards.len())?;
        if positions.is_none() {
            self.hold(&[(name.to_owned(), vec![0; self.shards.len()])]);
        }
        let has_lost_beginning = positions.is_none() && self.has_lost_beginning();
        let counted: Vec<u64> = self.shards.iter().map(|shard| shard.door.log.durable.get()).collect();
        let readers = self.uncounted(positions.as_ref(), &counted)?;
        if has_lost_beginning {
            tracing::warn!(
                name,
                "a gate's positions are gone and so is the log's beginning: what was freed is not known to it"
            );
        }
        let mut counts = Counts::new(start, positions, &starts, has_lost_beginning);
        counts.count_log(readers, source)?;
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
            shards: self.gated_shards(),
            clock: self.clock.clone(),
            keeper: std::sync::Arc::clone(&self.keeper),
            _lock: std::sync::Arc::clone(&self.lock),
        });
        match gated.save_counted(counted) {
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
        Ok(GateFiles::new(&self.storage, &self.config.dir, name).gaps()?)
    }

    pub(super) fn hold(&self, holds: &[(String, Vec<u64>)]) {
        for (name, offsets) in holds {
            for (shard, offset) in self.shards.iter().zip(offsets) {
                shard.door.log.holds.hold(&hold_name(name), Offset(*offset), &self.keeper);
            }
        }
    }

    fn has_lost_beginning(&self) -> bool {
        self.shards.iter().any(|shard| shard.door.log.segment_of(shard.door.log.earliest()) > 0)
    }

    /// Readers of what is not counted, and where they end.
    fn uncounted(&self, positions: Option<&Positions>, until: &[u64]) -> Result<Vec<Uncounted<A::Event>>, ReadError> {
        let reader = |(i, (shard, until)): (usize, (&super::Handle<A>, &u64))| {
            let (log, lock) = (Arc::clone(&shard.door.log), std::sync::Arc::clone(&self.lock));
            // No record begins before the first one of a segment; an empty log has been counted up to there.
            let from = positions.map_or(0, |positions| positions.counted[i]);
            let reader = if from < log.first_offset(0).0 {
                Reader::earliest(log, lock)
            } else {
                Reader::at(log, Offset(from), lock)?
            };
            Ok((reader, Offset(*until)))
        };
        self.shards.iter().zip(until).enumerate().map(reader).collect()
    }

    fn gated_shards(&self) -> Vec<GatedShard> {
        let of = |shard: &super::Handle<A>| GatedShard {
            door: std::sync::Arc::clone(&shard.door),
            syncer: std::sync::Arc::clone(&shard.syncer),
        };
        self.shards.iter().map(of).collect()
    }
}
