//! `inspect`: shows what a store holds.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::io::Write as _;

use comfy_table::{CellAlignment, Table, TableComponent, presets};
use corelane::scan::{FileInfo, Record, SegmentState, ShardFiles, Store};
use corelane::{Offset, ReadError, ShardId, Time};

use super::{Failure, Output, Verdict, envelope_in, grouped, tail_message, warn};

/// What a group of events looks like from outside.
#[derive(Debug, Clone, Default)]
struct Summary {
    events: u64,
    bytes: u64,
    times: Option<(Time, Time)>,
    sequences: Option<(u64, u64)>,
    offsets: Option<(Offset, Offset)>,
    /// The second being counted, how many it has, and the most that one had.
    second: (u64, u64, u64),
}

impl Summary {
    fn add(&mut self, record: &Record<'_>) {
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

    /// Events per second of the events' own time; `None` where they have no extent.
    fn rate(&self) -> Option<f64> {
        let (first, last) = self.times?;
        let seconds = (last.get() - first.get()) as f64 / 1e9;
        (seconds > 0.0).then(|| self.events as f64 / seconds)
    }
}

pub(super) fn inspect(store: &Store, out: &mut Output) -> Result<Verdict, Failure> {
    let mut verdict = Verdict::Sound;
    let mut types: BTreeMap<(u16, String), Summary> = BTreeMap::new();
    let mut shards = table(
        &[
            "shard",
            "events",
            "sequence",
            "offset",
            "from (UTC)",
            "to (UTC)",
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
        &[
            "shard",
            "segment",
            "state",
            "events",
            "sequence",
            "offset",
            "from (UTC)",
            "to (UTC)",
            "used",
            "file bytes",
            "allocated",
        ],
        &[2, 6, 7],
    );
    for shard in store.shard_ids() {
        let files = store.shard(shard)?;
        let scanned = summarise(store, shard, &mut types)?;
        for message in &scanned.messages {
            warn(message);
            verdict = Verdict::Damaged;
        }
        segment_rows(store, &files, &scanned, &mut segments);
        shards.add_row(shard_row(&files, &scanned.all));
    }
    writeln!(out, "store           {}", store.dir().display())?;
    writeln!(out, "shards          {}", store.shards())?;
    writeln!(out, "segment bytes   {}", grouped(store.segment_bytes()))?;
    writeln!(out, "\nEvent types")?;
    writeln!(out, "{}", type_table(store, &types))?;
    writeln!(out, "\nShards\n{shards}\n\nSegments\n{segments}")?;
    let quarantine = store.quarantine()?;
    if quarantine.is_empty() {
        writeln!(out, "\nQuarantine is empty.")?;
    } else {
        writeln!(out, "\nQuarantine: tails that were torn, cut and kept")?;
        let mut kept = table(&["file", "bytes"], &[0]);
        for file in &quarantine {
            kept.add_row([printable(&file.name), grouped(file.bytes)]);
        }
        writeln!(out, "{kept}")?;
    }
    Ok(verdict)
}

/// A shard's events, all together and by segment.
#[derive(Debug, Default)]
struct Scanned {
    all: Summary,
    by_segment: HashMap<u64, Summary>,
    messages: Vec<String>,
}

fn summarise(store: &Store, shard: ShardId, types: &mut BTreeMap<(u16, String), Summary>) -> Result<Scanned, Failure> {
    let mut scanned = Scanned::default();
    let mut records = store.records(shard).until(store.horizon(shard)?);
    loop {
        match records.next() {
            Ok(Some(record)) => {
                scanned.all.add(&record);
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
                // Looked up first: a name is only copied when it is new.
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
        all.times.map_or(String::new(), |times| utc(times.0)),
        all.times.map_or(String::new(), |times| utc(times.1)),
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
        let held = scanned.by_segment.get(&segment.index).unwrap_or(&nothing);
        let state = match segment.state {
            SegmentState::Used { .. } => "in use".to_owned(),
            SegmentState::Blank => "prepared".to_owned(),
            SegmentState::Damaged(why) => format!("DAMAGED: {why}"),
            SegmentState::Missing => "MISSING".to_owned(),
            _ => "?".to_owned(),
        };
        rows.add_row(vec![
            files.shard.to_string(),
            segment.index.to_string(),
            state,
            grouped(held.events),
            range(held.sequences),
            range(held.offsets),
            held.times.map_or(String::new(), |times| utc(times.0)),
            held.times.map_or(String::new(), |times| utc(times.1)),
            format!("{:.1} %", 100.0 * held.bytes as f64 / store.segment_bytes() as f64),
            grouped(segment.file.bytes),
            grouped(segment.file.allocated_bytes),
        ]);
    }
}

/// A table whose columns are numbers, but for those in `texts`.
fn table(columns: &[&str], texts: &[usize]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_style(TableComponent::HeaderLines, '─').set_header(columns);
    for (i, column) in table.column_iter_mut().enumerate() {
        column.set_cell_alignment(if texts.contains(&i) { CellAlignment::Left } else { CellAlignment::Right });
    }
    table
}

/// A text from the store, without what a terminal would act on.
fn printable(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() {
            shown.extend(c.escape_default());
        } else {
            shown.push(c);
        }
    }
    shown
}

fn range<T: fmt::Display>(ends: Option<(T, T)>) -> String {
    ends.map_or(String::new(), |(first, last)| format!("{first}..={last}"))
}

/// A rate in the unit that suits it.
fn rate(per_second: Option<f64>) -> String {
    match per_second {
        None => String::new(),
        Some(rate) if rate >= 100.0 => format!("{}/s", grouped(rate as u64)),
        Some(rate) if rate >= 1.0 => format!("{rate:.1}/s"),
        Some(rate) if rate * 3600.0 >= 1.0 => format!("{:.1}/h", rate * 3600.0),
        Some(rate) => format!("{:.2}/day", rate * 86_400.0),
    }
}

/// A time as 2010-07-30 21:55:01.009.
fn utc(time: Time) -> String {
    let ms = time.as_ms();
    let (days, in_day) = (ms / 86_400_000, ms % 86_400_000);
    // Years that begin in March put the leap day last (Hinnant, "days from civil").
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (in_day / 3_600_000, in_day / 60_000 % 60, in_day / 1000 % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}.{:03}", ms % 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_shown_as_utc() {
        for (ms, shown) in [
            (0, "1970-01-01 00:00:00.000"),
            (951_782_400_000, "2000-02-29 00:00:00.000"),
            (1_280_526_901_009, "2010-07-30 21:55:01.009"),
            (4_107_542_399_999, "2100-02-28 23:59:59.999"),
            (4_107_542_400_000, "2100-03-01 00:00:00.000"),
        ] {
            assert_eq!(utc(Time::unix_ms(ms)), shown);
        }
    }

    #[test]
    fn what_is_shown_cannot_move_the_cursor() {
        assert_eq!(printable("a\u{1b}[2J\u{9b}é"), "a\\u{1b}[2J\\u{9b}é");
        assert_eq!((grouped(0), grouped(999), grouped(1_234_567)), ("0".into(), "999".into(), "1,234,567".into()));
    }
}
