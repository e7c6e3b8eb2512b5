//! `inspect`: shows what a store holds.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};
use std::io::Write as _;

use comfy_table::Table;
use corelane::log::scan::{FileInfo, ScannedRecord, SegmentState, ShardFiles, Store};
use corelane::{Offset, ReadError, ShardId, Time};

use super::consumers::Consumers;
use super::show::{grouped, printable, range, rate, table};
use super::{Condition, Failure, Output, envelope_in, tail_message, warn};

/// Figures of a group of events.
#[derive(Debug, Clone, Default)]
struct Summary {
    events: u64,
    bytes: u64,
    times: Option<(Time, Time)>,
    sequences: Option<(u64, u64)>,
    offsets: Option<(Offset, Offset)>,
    /// The second being counted, its events, and the most events of any second.
    second: (u64, u64, u64),
}

impl Summary {
    fn add(&mut self, record: &ScannedRecord<'_>) {
        let meta = &record.meta;
        let place = record.place();
        self.events += 1;
        self.bytes += u64::from(place.record_bytes).next_multiple_of(16);
        let (first, last) = self.times.unwrap_or((meta.time, meta.time));
        self.times = Some((first.min(meta.time), last.max(meta.time)));
        self.sequences = Some((self.sequences.map_or(meta.sequence.get(), |s| s.0), meta.sequence.get()));
        self.offsets = Some((self.offsets.map_or(meta.offset, |o| o.0), meta.offset));
        let second = meta.time.as_ms() / 1000;
        let count = if self.second.0 == second { self.second.1 + 1 } else { 1 };
        self.second = (second, count, self.second.2.max(count));
    }

    /// Events per second of event time, or `None` if all events have one time.
    fn rate(&self) -> Option<f64> {
        let (first, last) = self.times?;
        let seconds = (last.get() - first.get()) as f64 / 1e9;
        (seconds > 0.0).then(|| self.events as f64 / seconds)
    }
}

pub(super) fn inspect(store: &Store, out: &mut Output) -> Result<Condition, Failure> {
    let mut condition = Condition::Sound;
    // Read before the log, so that their progress during this run does not count as lag.
    let mut consumers = Consumers::read(store)?;
    let mut types: BTreeMap<(u16, String), Summary> = BTreeMap::new();
    let mut shards = table(
        &[
            "shard",
            "events",
            "sequence",
            "offset",
            "from",
            "to",
            "rate",
            "busiest second",
            "record bytes",
            "segments",
            "spares",
            "spare bytes",
        ],
        &[4, 5],
    );
    let mut segments = table(
        &["shard", "segment", "state", "events", "sequence", "offset", "from", "to", "used", "file bytes", "allocated"],
        &[2, 6, 7],
    );
    for shard in store.shard_ids() {
        let files = store.shard(shard)?;
        let scanned = summarise(store, shard, &mut types, &mut consumers)?;
        for message in &scanned.messages {
            warn(message);
            condition = Condition::Damaged;
        }
        segment_rows(store, &files, &scanned, &mut segments);
        consumers.measure_held(store, &files, scanned.end);
        shards.add_row(shard_row(&files, &scanned.all));
    }
    writeln!(out, "store           {}", store.dir().display())?;
    writeln!(out, "shards          {}", store.shards())?;
    if let Some(placement) = store.placement() {
        writeln!(out, "keys            by {placement}")?;
    }
    writeln!(out, "segment bytes   {}", grouped(store.segment_bytes()))?;
    writeln!(out, "\nEvent types")?;
    writeln!(out, "{}", type_table(store, &types))?;
    writeln!(out, "\nShards\n{shards}\n\nSegments\n{segments}")?;
    let quarantine = store.quarantine()?;
    if quarantine.is_empty() {
        writeln!(out, "\nQuarantine is empty.")?;
    } else {
        writeln!(out, "\nQuarantine: torn tails that opening cut off and kept")?;
        let mut kept = table(&["file", "bytes"], &[0]);
        for file in &quarantine {
            kept.add_row([printable(&file.name), grouped(file.bytes)]);
        }
        writeln!(out, "{kept}")?;
    }
    Ok(if consumers.write(out)? == Condition::Damaged { Condition::Damaged } else { condition })
}

/// Figures of a shard's events, in total and by segment.
#[derive(Debug, Default)]
struct Scanned {
    all: Summary,
    by_segment: HashMap<u64, Summary>,
    messages: Vec<String>,
    /// The end of the log.
    end: Offset,
}

fn summarise(
    store: &Store,
    shard: ShardId,
    types: &mut BTreeMap<(u16, String), Summary>,
    consumers: &mut Consumers,
) -> Result<Scanned, Failure> {
    let end = Offset::default();
    let mut scanned = Scanned { all: Summary::default(), by_segment: HashMap::new(), messages: Vec::new(), end };
    let mut records = store.records(shard).until(store.horizon(shard)?);
    loop {
        match records.next() {
            Ok(Some(record)) => {
                scanned.all.add(&record);
                consumers.pass(&record.meta);
                scanned.by_segment.entry(record.meta.offset.get() / store.segment_bytes()).or_default().add(&record);
                let id = record.meta.event_type;
                let name = match envelope_in(store, &record) {
                    Ok(Some(event)) => event.event_type(),
                    Ok(None) => store.type_name(id).unwrap_or("?"),
                    Err(failure) => {
                        scanned.messages.push(failure.to_string());
                        "?"
                    }
                };
                match types.get_mut(&(id.get(), name.to_owned())) {
                    Some(summary) => summary.add(&record),
                    None => types.entry((id.get(), name.to_owned())).or_default().add(&record),
                }
            }
            Ok(None) => break,
            Err(ReadError::Corruption(corruption)) => {
                scanned.messages.push(corruption.to_string());
                if !records.skip_segment()? {
                    break;
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
    scanned.messages.extend(tail_message(&mut records)?);
    scanned.end = records.offset();
    Ok(scanned)
}

fn type_table(store: &Store, types: &BTreeMap<(u16, String), Summary>) -> Table {
    const ROWS_MAX: usize = 200;
    let mut rows = table(&["type", "id", "schema", "events", "share", "rate", "bytes/event"], &[0]);
    let all: u64 = types.values().map(|summary| summary.events).sum();
    let mut found: Vec<_> = types.iter().collect();
    found.sort_by_key(|((id, name), summary)| (Reverse(summary.events), *id, name.as_str()));
    for ((id, name), summary) in found.iter().take(ROWS_MAX) {
        let declared = store.event_types().find(|t| t.id.get() == *id);
        let id = match declared {
            Some(declared) if declared.name != name => format!("{id} ({})", printable(declared.name)),
            _ => id.to_string(),
        };
        rows.add_row([
            printable(name),
            id,
            declared.map_or("?".to_owned(), |t| t.schema_version.to_string()),
            grouped(summary.events),
            format!("{:.1} %", 100.0 * summary.events as f64 / all.max(1) as f64),
            rate(summary.rate()),
            format!("{:.1}", summary.bytes as f64 / summary.events.max(1) as f64),
        ]);
    }
    if found.len() > ROWS_MAX {
        rows.add_row([format!("… and {} more", found.len() - ROWS_MAX)]);
    }
    for declared in store.event_types().filter(|t| !types.keys().any(|(id, _)| *id == t.id.get())) {
        rows.add_row([
            printable(declared.name),
            declared.id.to_string(),
            declared.schema_version.to_string(),
            "0".to_owned(),
        ]);
    }
    rows
}

fn shard_row(files: &ShardFiles, all: &Summary) -> Vec<String> {
    let spares: Vec<&FileInfo> = files.others.iter().filter(|file| file.name.starts_with("spare-")).collect();
    vec![
        files.shard.to_string(),
        grouped(all.events),
        range(all.sequences),
        range(all.offsets),
        all.times.map_or(String::new(), |times| times.0.to_rfc3339()),
        all.times.map_or(String::new(), |times| times.1.to_rfc3339()),
        rate(all.rate()),
        grouped(all.second.2),
        grouped(all.bytes),
        files.segments.len().to_string(),
        spares.len().to_string(),
        grouped(spares.iter().map(|file| file.allocated_bytes).sum()),
    ]
}

fn segment_rows(store: &Store, files: &ShardFiles, scanned: &Scanned, rows: &mut Table) {
    let nothing = Summary::default();
    for segment in &files.segments {
        let summary = scanned.by_segment.get(&segment.index).unwrap_or(&nothing);
        let state = match segment.state {
            SegmentState::Used { .. } => "in use".to_owned(),
            SegmentState::Blank => "prepared".to_owned(),
            SegmentState::Damaged(why) => format!("DAMAGED: {why}"),
            SegmentState::Missing => "MISSING".to_owned(),
        };
        rows.add_row(vec![
            files.shard.to_string(),
            segment.index.to_string(),
            state,
            grouped(summary.events),
            range(summary.sequences),
            range(summary.offsets),
            summary.times.map_or(String::new(), |times| times.0.to_rfc3339()),
            summary.times.map_or(String::new(), |times| times.1.to_rfc3339()),
            format!("{:.1} %", 100.0 * summary.bytes as f64 / store.segment_bytes() as f64),
            grouped(segment.file.bytes),
            grouped(segment.file.allocated_bytes),
        ]);
    }
}
