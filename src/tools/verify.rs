//! `verify`: checks every checksum, sequence and link of a store, its saved states, and the files of its consumers and gates: what
//! opening it would refuse or report.

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
use super::{Failure, Output, Verdict, envelope_in, tail_message};

/// What is wrong with one shard or consumer: all are counted, the first are shown.
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

    /// Writes what was looked at, the verdict, and the problems.
    fn write(&self, what: &str, out: &mut Output) -> Result<(), Failure> {
        let verdict = if self.found == 0 { "ok".to_owned() } else { format!("{} PROBLEMS", grouped(self.found)) };
        writeln!(out, "{what}: {verdict}")?;
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
    /// What lies before was freed or is damaged: links to there cannot be followed.
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
        let before = before.map_or("there is none before it".to_owned(), |(offset, version)| {
            format!("the one before it has version {version} and lies at {offset}")
        });
        Err(format!(
            "offset {}: the record of key {} has version {} and {link}, but {before}",
            meta.offset, meta.key, meta.version
        ))
    }
}

pub(super) fn verify(store: &Store, out: &mut Output) -> Result<Verdict, Failure> {
    let (mut events, mut problems) = (0, 0);
    // What stands on the log is read before it, so that in a store that is open the log has come at least as far; and where the log
    // begins before that, since it may be freed up to there.
    let begins: Vec<Offset> =
        store.shard_ids().map(|shard| check::earliest(store, shard).unwrap_or_default()).collect();
    let mut followers = Vec::new();
    for name in outside::names(store)? {
        let mut found = Problems::default();
        if let Some(checked) = consumers::check(store, &name, &mut |problem| found.add(problem))? {
            let line = format!("consumer {name}: {}", checked.line);
            let consumers::Checked { positions, reaches, seen, .. } = checked;
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
    let mut ends = Vec::new();
    for shard in store.shard_ids() {
        let mut found = Problems::default();
        let line = match verify_shard(store, shard, &mut found) {
            Ok(checked) => {
                events += checked.events;
                ends.push(checked.range.1);
                checked.to_string()
            }
            // One shard's damaged span says nothing of the others.
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
    let verdict = if problems == 0 { "ok".to_owned() } else { format!("{} PROBLEMS", grouped(problems)) };
    writeln!(out, "{} events in {} shards: {verdict}", grouped(events), store.shards())?;
    Ok(if problems == 0 { Verdict::Sound } else { Verdict::Damaged })
}

/// A consumer or a gate, and where it stands by shard.
#[derive(Debug, Default)]
struct Follower {
    line: String,
    positions: Vec<Offset>,
    /// The furthest offset that it names.
    reaches: Vec<Offset>,
    /// Its saved positions in the log.
    seen: Vec<Position>,
    found: Problems,
}

impl Follower {
    /// Compares where it stands with logs that began at `begins` before it was read, and ended at `ends` afterwards.
    fn compare(&mut self, store: &Store, begins: &[Offset], ends: &[Offset]) -> Result<(), Failure> {
        let Self { positions, reaches, seen, found, .. } = self;
        for (shard, (position, (begin, end))) in store.shard_ids().zip(positions.iter().zip(begins.iter().zip(ends))) {
            // Where nothing was done or counted yet, it begins with what is held.
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
                found.add(format!("shard {shard}: it has come to {reach}, but the log ends at {end}"));
            }
        }
        for (shard, (position, end)) in store.shard_ids().zip(seen.iter().zip(ends)) {
            if position.offset() <= *end
                && let Some(problem) = check::position(store, shard, position)?
            {
                found.add(format!("shard {shard}: it has read up to {}: {problem}", position.offset()));
            }
        }
        Ok(())
    }
}

/// What a shard turned out to hold.
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

fn verify_shard(store: &Store, shard: ShardId, problems: &mut Problems) -> Result<Verified, Failure> {
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
                    // Segments before this one were freed.
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
    if let Some(message) = tail_message(&mut records)? {
        problems.add(message);
    }
    // Where the log is damaged, what lies behind the damage was not read to its end.
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

/// What a record's own checksum cannot show.
fn check_record(store: &Store, record: &ScannedRecord<'_>, problems: &mut Problems) {
    let meta = &record.meta;
    let owner = meta.key.shard(store.shards());
    if owner != meta.shard {
        problems.add(format!("offset {}: key {} belongs to shard {owner}", meta.offset, meta.key));
    }
    match store.event_types().find(|t| t.id == meta.event_type) {
        None => problems.add(format!("offset {}: event type {} is not in the manifest", meta.offset, meta.event_type)),
        Some(known) if meta.schema_version > known.schema_version => {
            problems.add(format!(
                "offset {}: schema version {} is newer than the manifest's",
                meta.offset, meta.schema_version
            ));
        }
        Some(_) => {}
    }
    if let Err(failure) = envelope_in(store, record) {
        problems.add(failure.to_string());
    }
}

/// What follows behind damage: it tells whether this is a tail that opening the store would cut.
fn tail_note(records: &mut Records) -> Result<String, Failure> {
    let tail = records.tail()?;
    Ok(match (tail.events, tail.was_durable) {
        (events, true) => format!(" (had been synced; {events} events that hold follow in this segment)"),
        (0, false) => " (nothing that holds follows in this segment)".to_owned(),
        (events, false) => format!(" ({events} events that hold follow in this segment)"),
    })
}
