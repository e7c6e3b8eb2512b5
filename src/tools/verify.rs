//! `verify`: checks every checksum, sequence and link of a store, its saved states, and the files of its consumers and
//! gates. It reports everything that opening the store would refuse or report.

use std::collections::HashMap;
use std::fmt;
use std::io::Write as _;

use corelane::check::{self, SavedStates};
use corelane::consumer::outside;
use corelane::log::Position;
use corelane::log::scan::{Records, ScannedRecord, SegmentState, Store};
use corelane::{Key, Meta, Offset, ReadError, Sequence, ShardId, Version};

use super::consumers;
use super::show::grouped;
use super::{Condition, Failure, Output, envelope_in, tail_message};

/// The problems of one shard, consumer or gate: all are counted, the first ones are shown.
#[derive(Debug, Default)]
struct Problems {
    found: u64,
    shown: Vec<String>,
}

impl Problems {
    const SHOWN_MAX: usize = 20;

    fn add(&mut self, problem: String) {
        self.found += 1;
        if self.shown.len() < Self::SHOWN_MAX {
            self.shown.push(problem);
        }
    }

    /// Writes the name of the checked part, the result, and the problems.
    fn write(&self, part: &str, out: &mut Output) -> Result<(), Failure> {
        let result = if self.found == 0 { "ok".to_owned() } else { format!("{} PROBLEMS", grouped(self.found)) };
        writeln!(out, "{part}: {result}")?;
        for problem in &self.shown {
            writeln!(out, "  {problem}")?;
        }
        if self.found > self.shown.len() as u64 {
            writeln!(out, "  … and {} more", self.found - self.shown.len() as u64)?;
        }
        out.flush()?;
        Ok(())
    }
}

/// Follows every key's chain of back-links through one shard.
#[derive(Debug)]
struct Chains {
    heads: HashMap<Key, (Offset, Version)>,
    /// The log before this offset is freed or damaged; links to it cannot be checked.
    seen_from: Offset,
}

impl Chains {
    fn follow(&mut self, meta: &Meta) -> Result<(), String> {
        let before =
            self.heads.insert(meta.key, (meta.offset, meta.version)).filter(|(offset, _)| *offset >= self.seen_from);
        let holds = match (before, meta.previous) {
            (Some((offset, version)), previous) => previous == Some(offset) && meta.version.get() == version.get() + 1,
            (None, None) => meta.version.get() == 1,
            (None, Some(previous)) => previous < self.seen_from && meta.version.get() > 1,
        };
        if holds {
            return Ok(());
        }
        let link = meta.previous.map_or("no link".to_owned(), |offset| format!("a link to {offset}"));
        let before = before.map_or("no record precedes it".to_owned(), |(offset, version)| {
            format!("the record before it has version {version} and is at offset {offset}")
        });
        Err(format!(
            "offset {}: the record of key {} has version {} and {link}, but {before}",
            meta.offset, meta.key, meta.version
        ))
    }
}

/// The shard of every key, for a store whose keys are placed by a function of the application. This tool cannot call the
/// function, but no function puts a key into two shards.
#[derive(Debug)]
struct Owners(Option<HashMap<Key, ShardId>>);

impl Owners {
    fn of(store: &Store) -> Self {
        Self(store.placement().map(|_| HashMap::new()))
    }

    /// Notes the keys of one shard.
    fn add(&mut self, shard: ShardId, keys: impl Iterator<Item = Key>, problems: &mut Problems) {
        let Some(owners) = &mut self.0 else { return };
        for key in keys {
            if let Some(other) = owners.insert(key, shard) {
                problems.add(format!("key {key} is in shard {other} too"));
            }
        }
    }
}

pub(super) fn verify(store: &Store, out: &mut Output) -> Result<Condition, Failure> {
    let (mut events, mut problems) = (0, 0);
    // The order matters in a store that an engine has open. Followers are read before the log, so that the log reaches
    // at least as far as their positions. The beginnings of the logs are read before the followers, since retention may
    // move them.
    let begins: Vec<Offset> =
        store.shard_ids().map(|shard| check::earliest(store, shard).unwrap_or_default()).collect();
    let mut followers = Vec::new();
    for name in outside::names(store)? {
        let mut found = Problems::default();
        if let Some(checked) = consumers::check(store, &name, &mut |problem| found.add(problem))? {
            let line = format!("consumer {name}: {}", checked.line);
            let consumers::CheckedConsumer { positions, reaches, seen, .. } = checked;
            followers.push(Follower { line, positions, reaches, seen, found });
        } else if found.found > 0 {
            followers.push(Follower { line: format!("consumer {name}"), found, ..Follower::default() });
        }
    }
    for gate in check::gates(store)? {
        let mut found = Problems::default();
        gate.problems.into_iter().for_each(|problem| found.add(problem));
        let line = format!("gate {}: {} gaps", gate.name, grouped(gate.gaps as u64));
        let positions: Vec<Offset> = gate.counted.iter().map(Position::offset).collect();
        followers.push(Follower { line, reaches: positions.clone(), positions, seen: gate.counted, found });
    }
    if let Some(placement) = store.placement() {
        writeln!(out, "keys are placed by {placement}: checked only that no key is in two shards")?;
    }
    let (mut ends, mut owners) = (Vec::new(), Owners::of(store));
    for shard in store.shard_ids() {
        let mut found = Problems::default();
        let line = match verify_shard(store, shard, &mut owners, &mut found) {
            Ok(checked) => {
                events += checked.events;
                ends.push(checked.range.1);
                checked.to_string()
            }
            // A damaged span of one shard says nothing about the others.
            Err(failure) if failure.is_damage() => {
                found.add(failure.to_string());
                ends.push(Offset(u64::MAX));
                "not readable".to_owned()
            }
            Err(failure) => return Err(failure),
        };
        found.write(&format!("shard {shard}: {line}"), out)?;
        problems += found.found;
    }
    for mut follower in followers {
        follower.compare(store, &begins, &ends)?;
        follower.found.write(&follower.line, out)?;
        problems += follower.found.found;
    }
    let kept = store.quarantine()?;
    if !kept.is_empty() {
        let bytes = kept.iter().map(|file| file.bytes).sum();
        writeln!(out, "quarantine: {} files, {} bytes", grouped(kept.len() as u64), grouped(bytes))?;
    }
    let result = if problems == 0 { "ok".to_owned() } else { format!("{} PROBLEMS", grouped(problems)) };
    writeln!(out, "{} events in {} shards: {result}", grouped(events), store.shards())?;
    Ok(if problems == 0 { Condition::Sound } else { Condition::Damaged })
}

/// A consumer or a gate, with its position in each shard.
#[derive(Debug, Default)]
struct Follower {
    line: String,
    positions: Vec<Offset>,
    /// The greatest offset that its files name, by shard.
    reaches: Vec<Offset>,
    /// Its saved positions in the log.
    seen: Vec<Position>,
    found: Problems,
}

impl Follower {
    /// Compares its positions with the logs: `begins` was read before its files, `ends` after them.
    fn compare(&mut self, store: &Store, begins: &[Offset], ends: &[Offset]) -> Result<(), Failure> {
        let Self { positions, reaches, seen, found, .. } = self;
        for (shard, (position, (begin, end))) in store.shard_ids().zip(positions.iter().zip(begins.iter().zip(ends))) {
            // A position of 0 means that nothing was handled yet: it then begins with the earliest event.
            if position < begin && position.get() > 0 {
                found.add(format!("shard {shard}: its position is {position}, but the log begins at {begin}"));
            } else if (begin..=end).contains(&position)
                && let Some(problem) = check::place(store, shard, *position)?
            {
                found.add(format!("shard {shard}: its position is {position}: {problem}"));
            }
        }
        for (shard, (reach, end)) in store.shard_ids().zip(reaches.iter().zip(ends)) {
            if reach > end {
                found.add(format!("shard {shard}: it names offset {reach}, but the log ends at {end}"));
            }
        }
        for (shard, (position, end)) in store.shard_ids().zip(seen.iter().zip(ends)) {
            if position.offset() <= *end
                && let Some(problem) = check::position(store, shard, position)?
            {
                found.add(format!("shard {shard}: it has read up to offset {}: {problem}", position.offset()));
            }
        }
        Ok(())
    }
}

/// The contents of a verified shard.
#[derive(Debug)]
struct Verified {
    events: u64,
    keys: usize,
    segments: usize,
    range: (Offset, Offset),
    sequences: (u64, u64),
}

impl fmt::Display for Verified {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { events, keys, segments, range, sequences } = self;
        write!(f, "{} events of {} keys in {segments} segments", grouped(*events), grouped(*keys as u64))?;
        write!(f, ", offsets {}..{}, sequences {}..{}", range.0, range.1, sequences.0, sequences.1)
    }
}

fn verify_shard(
    store: &Store,
    shard: ShardId,
    owners: &mut Owners,
    problems: &mut Problems,
) -> Result<Verified, Failure> {
    for problem in check::segments(store, shard)? {
        problems.add(problem);
    }
    let saved = SavedStates::read(store, shard)?;
    let files = store.shard(shard)?;
    let before = problems.found;
    let mut records = store.records(shard).until(store.horizon(shard)?);
    let mut chains = Chains { heads: HashMap::new(), seen_from: Offset(0) };
    let (mut events, mut first, mut gaps) = (0, None, 0);
    loop {
        match records.next() {
            Ok(Some(record)) => {
                let meta = record.meta;
                check_record(store, &record, problems);
                if first.is_none() {
                    // The segments before this one were freed.
                    first = Some((meta.offset, meta.sequence.get()));
                    chains.seen_from = chains.seen_from.max(segment_start(store, meta.offset));
                }
                while let Some(gap) = records.gaps().get(gaps) {
                    chains.seen_from = gap.until;
                    gaps += 1;
                }
                events += 1;
                if let Err(problem) = chains.follow(&meta) {
                    problems.add(problem);
                }
            }
            Ok(None) => break,
            Err(ReadError::Corruption(corruption)) => {
                problems.add(format!("{corruption}{}", tail_note(&mut records)?));
                if !records.skip_segment()? {
                    break;
                }
                chains.seen_from = segment_start(store, records.offset());
            }
            Err(error) => return Err(error.into()),
        }
    }
    owners.add(shard, chains.heads.keys().copied(), problems);
    if let Some(message) = tail_message(&mut records)? {
        problems.add(message);
    }
    // If the log is damaged, it was not read to its end.
    let is_whole = problems.found == before;
    let end = if is_whole { records.offset() } else { Offset(u64::MAX) };
    let sequence = if is_whole { records.sequence() } else { Sequence(u64::MAX) };
    for problem in saved.problems(store, end, sequence)? {
        problems.add(problem);
    }
    let (offset, sequence) = first.unwrap_or((records.offset(), records.sequence().get()));
    Ok(Verified {
        events,
        keys: chains.heads.len(),
        segments: files.segments.iter().filter(|segment| matches!(segment.state, SegmentState::Used { .. })).count(),
        range: (offset, records.offset()),
        sequences: (sequence, records.sequence().get()),
    })
}

fn segment_start(store: &Store, offset: Offset) -> Offset {
    Offset(offset.get() / store.segment_bytes() * store.segment_bytes())
}

/// Checks what the record's checksum does not cover.
fn check_record(store: &Store, record: &ScannedRecord<'_>, problems: &mut Problems) {
    let meta = &record.meta;
    if !store.may_hold(meta.shard, meta.key) {
        let owner = meta.key.shard(store.shards());
        problems.add(format!("offset {}: key {} belongs to shard {owner}", meta.offset, meta.key));
    }
    match store.event_types().find(|t| t.id == meta.event_type) {
        None => problems.add(format!("offset {}: event type {} is not in the manifest", meta.offset, meta.event_type)),
        Some(known) if meta.schema_version > known.schema_version => {
            problems.add(format!(
                "offset {}: schema version {} is newer than the one in the manifest",
                meta.offset, meta.schema_version
            ));
        }
        Some(_) => {}
    }
    if let Err(failure) = envelope_in(store, record) {
        problems.add(failure.to_string());
    }
}

/// Describes what follows damage, which shows whether it is a tail that opening the store would cut.
fn tail_note(records: &mut Records) -> Result<String, Failure> {
    let tail = records.tail()?;
    Ok(match (tail.events, tail.was_durable) {
        (events, true) => format!(" (it was synced before; {events} valid events follow in this segment)"),
        (0, false) => " (no valid event follows in this segment)".to_owned(),
        (events, false) => format!(" ({events} valid events follow in this segment)"),
    })
}
