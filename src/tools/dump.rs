//! `dump`: writes events as JSON lines, in the order of the log or of time.

use std::cell::Cell;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::io::Write;
use std::ops::Range;

use corelane::envelope::{self, ArchivedEnvelope, ArchivedUserId};
use corelane::log::scan::{Lookup, RecordPosition, Records, ScannedRecord, Store};
use corelane::{Key, Offset, ReadError, ShardId, Time};

use super::show::Moment;
use super::typed::Typed;
use super::{Condition, DumpArgs, Failure, Order, Output, envelope_in, tail_message, warn};

/// Selects the events to write, and writes them.
struct Filter<'a> {
    typed: &'a Typed,
    key: Option<Key>,
    user: Option<String>,
    event_type: Option<String>,
    from: Time,
    until: Time,
    /// `true` once an event of the wanted type was read, even if another condition excludes it.
    is_type_seen: Cell<bool>,
}

impl Filter<'_> {
    /// Writes the record as one line if the filter selects it. Returns `true` if it did.
    fn write(&self, store: &Store, record: &ScannedRecord<'_>, out: &mut impl Write) -> Result<bool, Failure> {
        let Some(event) = self.pick(store, record)? else { return Ok(false) };
        match event {
            Some(event) => envelope::write_envelope(out, &record.meta, event)?,
            None => self.typed.write(store, &record.meta, record.body, out)?,
        }
        Ok(true)
    }

    /// Returns the event if the filter selects it; the inner `None` stands for an event that is not an envelope.
    fn pick<'a>(
        &self,
        store: &Store,
        record: &ScannedRecord<'a>,
    ) -> Result<Option<Option<&'a ArchivedEnvelope>>, Failure> {
        let meta = &record.meta;
        let in_time = self.from <= meta.time && meta.time <= self.until;
        let hidden = self.key.is_some_and(|key| key != meta.key) || !in_time;
        if hidden && (self.event_type.is_none() || self.is_type_seen.get()) {
            return Ok(None);
        }
        let event = envelope_in(store, record)?;
        let named = |wanted: &str| {
            event.is_some_and(|event| event.event_type() == wanted)
                || store.type_name(meta.event_type) == Some(wanted)
                || wanted.parse() == Ok(meta.event_type.get())
        };
        // Two texts, or a text and a number, can hash to one key.
        let of_user = |wanted: &str| {
            event.is_none_or(|event| matches!(event.user_id(), ArchivedUserId::Text(text) if text.as_str() == wanted))
        };
        if !self.event_type.as_deref().is_none_or(named) {
            return Ok(None);
        }
        self.is_type_seen.set(true);
        let wanted = !hidden && self.user.as_deref().is_none_or(of_user);
        Ok(wanted.then_some(event))
    }
}

pub(super) fn dump(store: &Store, args: DumpArgs, typed: &Typed, out: &mut Output) -> Result<Condition, Failure> {
    let from = args.from.as_ref().map_or(Time(0), Moment::first);
    let until = args.until.as_ref().map_or(Time::END, Moment::last);
    if let (Some(first), Some(last)) = (&args.from, &args.until)
        && from > until
    {
        return Err(Failure::Usage(format!("--from {first} is after --until {last}")));
    }
    let key = args.key.map(Key::new).or(args.user.as_deref().map(Key::of));
    let shards = match (args.shard, key) {
        (Some(shard), _) if shard >= store.shards() => {
            return Err(Failure::Usage(format!(
                "the store has shards 0 to {}, but no shard {shard}",
                store.shards().saturating_sub(1)
            )));
        }
        (Some(shard), _) => vec![ShardId(shard)],
        // All of a key's events are in one shard.
        (None, Some(key)) => store.shards_of(key),
        (None, None) => store.shard_ids().collect(),
    };
    let filter = Filter {
        typed,
        key,
        user: args.user,
        event_type: args.event_type,
        from,
        until,
        is_type_seen: Cell::new(false),
    };
    let left = args.limit.unwrap_or(u64::MAX);
    let condition = match args.order {
        Order::Log => dump_log(store, &shards, &filter, left, out),
        Order::Time => dump_time(store, &shards, &filter, left, out),
    }?;
    if let Some(wanted) = filter.event_type.filter(|_| left > 0 && !filter.is_type_seen.get()) {
        // The names of generic events are known only after the log was read.
        warn(&format!("no event of type {wanted:?} was found (`inspect` lists the types)"));
    }
    let Some(complaint) = typed.complaint() else { return Ok(condition) };
    warn(&complaint);
    Ok(Condition::Damaged)
}

fn dump_log(
    store: &Store,
    shards: &[ShardId],
    filter: &Filter<'_>,
    mut left: u64,
    out: &mut Output,
) -> Result<Condition, Failure> {
    let mut condition = Condition::Sound;
    for &shard in shards {
        let mut records = store.records(shard).until(store.horizon(shard)?);
        while left > 0 {
            let Some(record) = records.next()? else {
                if let Some(message) = tail_message(&mut records)? {
                    warn(&format!("shard {shard}: {message}"));
                    condition = Condition::Damaged;
                }
                break;
            };
            left -= u64::from(filter.write(store, &record, out)?);
        }
        warn_of_gaps(&records);
    }
    Ok(condition)
}

fn warn_of_gaps(records: &Records) {
    for gap in records.gaps() {
        let (shard, from, until, events) = (gap.shard, gap.from, gap.until, gap.events);
        warn(&format!(
            "shard {shard}: retention freed {events} events from offset {from} to {until} before they were read"
        ));
    }
}

/// The result of the first pass over a shard.
struct Surveyed {
    in_order: bool,
    end: Offset,
}

/// Reads a shard once to find out whether it is in time order, and where it ends for this dump.
fn survey(store: &Store, shard: ShardId, condition: &mut Condition) -> Result<Surveyed, Failure> {
    let mut records = store.records(shard).until(store.horizon(shard)?);
    let (mut in_order, mut last) = (true, Time(0));
    while let Some(record) = records.next()? {
        in_order &= last <= record.meta.time;
        last = record.meta.time;
    }
    if let Some(message) = tail_message(&mut records)? {
        warn(&format!("shard {shard}: {message}"));
        *condition = Condition::Damaged;
    }
    Ok(Surveyed { in_order, end: records.offset() })
}

fn dump_time(
    store: &Store,
    shards: &[ShardId],
    filter: &Filter<'_>,
    left: u64,
    out: &mut Output,
) -> Result<Condition, Failure> {
    let mut condition = Condition::Sound;
    // 64 MiB for all shards together.
    let buffer_bytes = ((64 << 20) / shards.len().max(1)).clamp(64 << 10, 1 << 20);
    let mut sources = Vec::new();
    for &shard in shards {
        let Surveyed { in_order, end } = survey(store, shard, &mut condition)?;
        let records = store.records(shard).until(end).buffered(buffer_bytes);
        sources.push(match in_order {
            true => Source::Log { records, line: Vec::new() },
            false => Source::Index(TimeIndex::new(store, filter, records)?),
        });
    }
    let mut heads = BinaryHeap::new();
    for (i, source) in sources.iter_mut().enumerate() {
        heads.extend(source.advance(store, filter)?.map(|at| Reverse((at, i))));
    }
    for _ in 0..left {
        let Some(Reverse((_, i))) = heads.pop() else { break };
        out.write_all(sources[i].line())?;
        heads.extend(sources[i].advance(store, filter)?.map(|at| Reverse((at, i))));
    }
    for source in &sources {
        match source {
            Source::Log { records, .. } => warn_of_gaps(records),
            Source::Index(index) if index.lost > 0 => {
                warn(&format!("retention freed {} events before they were read", index.lost))
            }
            Source::Index(_) => {}
        }
    }
    Ok(condition)
}

/// An event's position in time order.
type TimePosition = (Time, ShardId, Offset);

/// The selected events of one shard in time order.
enum Source {
    /// A log that is in time order.
    Log { records: Records, line: Vec<u8> },
    /// A log that is not in time order: sorted in memory, 32 bytes per event.
    Index(TimeIndex),
}

impl Source {
    /// Advances to the next event. [`Source::line`] then returns its line.
    fn advance(&mut self, store: &Store, filter: &Filter<'_>) -> Result<Option<TimePosition>, Failure> {
        match self {
            Self::Log { records, line } => {
                line.clear();
                while let Some(record) = records.next()? {
                    if filter.write(store, &record, line)? {
                        return Ok(Some((record.meta.time, record.meta.shard, record.meta.offset)));
                    }
                }
                Ok(None)
            }
            Self::Index(index) => index.advance(store, filter),
        }
    }

    fn line(&self) -> &[u8] {
        match self {
            Self::Log { line, .. } => line,
            Self::Index(index) => &index.lines[index.line.clone()],
        }
    }
}

/// The selected events of a shard, sorted by time. Reads them in batches, each in log order.
struct TimeIndex {
    places: Vec<RecordPosition>,
    /// The next event to return.
    next: usize,
    /// The last batch read: its range of `places`, and the range of each event's line in `lines`.
    batch: Range<usize>,
    ranges: Vec<Range<usize>>,
    lines: Vec<u8>,
    line: Range<usize>,
    lookup: Lookup,
    lost: u64,
}

impl TimeIndex {
    const BATCH_EVENTS: usize = 16 << 10;
    const BATCH_BYTES: u64 = 8 << 20;

    fn new(store: &Store, filter: &Filter<'_>, mut records: Records) -> Result<Self, Failure> {
        let mut places = Vec::new();
        while let Some(record) = records.next()? {
            if filter.pick(store, &record)?.is_some() {
                places.push(record.place());
            }
        }
        warn_of_gaps(&records);
        places.sort_unstable();
        let lookup = store.lookup();
        Ok(Self { places, next: 0, batch: 0..0, ranges: Vec::new(), lines: Vec::new(), line: 0..0, lookup, lost: 0 })
    }

    fn advance(&mut self, store: &Store, filter: &Filter<'_>) -> Result<Option<TimePosition>, Failure> {
        while let Some(place) = self.places.get(self.next).copied() {
            if !self.batch.contains(&self.next) {
                self.fetch(store, filter)?;
            }
            self.line = self.ranges[self.next - self.batch.start].clone();
            self.next += 1;
            if !self.line.is_empty() {
                return Ok(Some((place.time, place.shard, place.offset)));
            }
        }
        Ok(None)
    }

    /// Reads the next batch in log order.
    fn fetch(&mut self, store: &Store, filter: &Filter<'_>) -> Result<(), Failure> {
        let (mut end, mut bytes) = (self.next, 0);
        while end < self.places.len() && end - self.next < Self::BATCH_EVENTS && bytes < Self::BATCH_BYTES {
            bytes += u64::from(self.places[end].record_bytes);
            end += 1;
        }
        self.batch = self.next..end;
        let places = &self.places[self.batch.clone()];
        let mut by_offset: Vec<usize> = (0..places.len()).collect();
        by_offset.sort_unstable_by_key(|&i| (places[i].shard, places[i].offset));
        self.lines.clear();
        self.ranges.clear();
        self.ranges.resize(places.len(), 0..0);
        for i in by_offset {
            let start = self.lines.len();
            match self.lookup.get(&places[i]) {
                Ok(record) => {
                    filter.write(store, &record, &mut self.lines)?;
                }
                Err(ReadError::BeyondRetention { .. }) => self.lost += 1,
                Err(error) => return Err(error.into()),
            }
            self.ranges[i] = start..self.lines.len();
        }
        Ok(())
    }
}
