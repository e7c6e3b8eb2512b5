//! The operator's tool: looks at a store, checks it, and writes its events as JSON lines.
//!
//! It only reads: it takes no lock, changes no byte, and works beside a running engine and on read-only media.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap};
use std::fmt;
use std::fs::File;
use std::io::{self, BufWriter, ErrorKind, Write};
use std::ops::Range;
use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};
use comfy_table::{CellAlignment, Table, TableComponent, presets};
use corelane::envelope::{self, ArchivedEnvelope, ArchivedUserId, Envelope};
use corelane::scan::{FileInfo, Lookup, Place, Record, Records, SegmentState, ShardFiles, Store};
use corelane::{Event, Key, Meta, Offset, OpenError, ReadError, ShardId, Time, Version};

/// Looks at a corelane store. Reads only: no lock, no change, also beside a running engine.
#[derive(Debug, Parser)]
#[command(version, about, after_help = "Exit status: 0 ok, 1 damage, 2 wrong usage or an I/O error.")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Shows what a store holds: event types and their rates, shards, segments, spares, quarantine.
    Inspect {
        /// The store.
        dir: PathBuf,
    },
    /// Checks every check sum, sequence and link of a store.
    ///
    /// A torn tail (bytes that do not hold at the very end, as a power cut leaves them) is reported as such and
    /// counts as damage here, although opening the store cuts it and goes on.
    Verify {
        /// The store.
        dir: PathBuf,
    },
    /// Writes events as JSON lines.
    Dump(DumpArgs),
}

#[derive(Debug, Args)]
struct DumpArgs {
    /// The store.
    dir: PathBuf,
    /// `log`: shard by shard, as they were appended. `time`: over all shards by time, then shard, then offset.
    #[arg(long, value_enum, default_value_t = Order::Log)]
    order: Order,
    /// Only this key.
    #[arg(long, conflicts_with = "user")]
    key: Option<u64>,
    /// Only this user, whose id is a text.
    #[arg(long)]
    user: Option<String>,
    /// Only this event type: a name (for generic events their own `event_type`) or a number of the manifest.
    #[arg(long = "type", value_name = "NAME|ID")]
    event_type: Option<String>,
    /// Only events at or after this time, in ms since 1970.
    #[arg(long, value_name = "MS")]
    from: Option<u64>,
    /// Only events at or before this time, in ms since 1970.
    #[arg(long, value_name = "MS")]
    until: Option<u64>,
    /// Only this shard.
    #[arg(long)]
    shard: Option<u16>,
    /// At most so many events.
    #[arg(long)]
    limit: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Order {
    Log,
    Time,
}

/// Why a command ended early.
#[derive(Debug)]
enum Failure {
    Usage(String),
    Output(io::Error),
    Open(OpenError),
    Read(ReadError),
    /// An event whose archive does not hold, although its check sum does.
    Archive(ShardId, Offset),
}

impl Failure {
    fn exit_status(&self) -> u8 {
        match self {
            Self::Archive(..) => 1,
            Self::Open(OpenError::Corruption(_) | OpenError::ForeignFile { .. }) => 1,
            Self::Read(ReadError::Corruption(_) | ReadError::NotARecord { .. }) => 1,
            Self::Usage(_) | Self::Output(_) | Self::Open(_) | Self::Read(_) => 2,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Usage(why) => f.write_str(why),
            Self::Output(error) => write!(f, "writing the output: {error}"),
            Self::Open(error) => error.fmt(f),
            Self::Read(error) => error.fmt(f),
            Self::Archive(shard, offset) => {
                write!(f, "shard {shard}, offset {offset}: the event's archive does not hold")
            }
        }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Output(error)
    }
}

impl From<OpenError> for Failure {
    fn from(error: OpenError) -> Self {
        Self::Open(error)
    }
}

impl From<ReadError> for Failure {
    fn from(error: ReadError) -> Self {
        Self::Read(error)
    }
}

/// Whether everything that was looked at holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Sound,
    Damaged,
}

type Output = BufWriter<File>;

fn main() -> ExitCode {
    let cli = Cli::parse();
    match stdout().map_err(Failure::from).and_then(|out| run(cli.command, out)) {
        Ok(Verdict::Sound) => ExitCode::SUCCESS,
        Ok(Verdict::Damaged) => ExitCode::from(1),
        // Whoever reads has enough, as `head` does.
        Err(Failure::Output(error)) if error.kind() == ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(failure) => {
            warn(&failure);
            ExitCode::from(failure.exit_status())
        }
    }
}

/// The standard output without the line buffer that std puts before it.
fn stdout() -> io::Result<Output> {
    Ok(BufWriter::with_capacity(256 << 10, io::stdout().as_fd().try_clone_to_owned()?.into()))
}

fn warn(message: &dyn fmt::Display) {
    eprintln!("corelane: {message}");
}

fn run(command: Command, mut out: Output) -> Result<Verdict, Failure> {
    let done = match command {
        Command::Inspect { dir } => Store::open(dir).map_err(Failure::from).and_then(|store| inspect(&store, &mut out)),
        Command::Verify { dir } => Store::open(dir).map_err(Failure::from).and_then(|store| verify(&store, &mut out)),
        Command::Dump(args) => {
            Store::open(&args.dir).map_err(Failure::from).and_then(|store| dump(&store, args, &mut out))
        }
    };
    // What was found before a failure is written all the same.
    out.flush()?;
    done
}

/// The generic event, where that is what a record holds.
fn envelope_in<'a>(store: &Store, record: &Record<'a>) -> Result<Option<&'a ArchivedEnvelope>, Failure> {
    let known = Envelope::TYPES[0];
    let meta = &record.meta;
    if meta.schema_version != known.schema_version || store.type_name(meta.event_type) != Some(known.name) {
        return Ok(None);
    }
    ArchivedEnvelope::access(record.body).map(Some).map_err(|_| Failure::Archive(meta.shard, meta.offset))
}

// ---------------------------------------------------------------- inspect

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

fn inspect(store: &Store, out: &mut Output) -> Result<Verdict, Failure> {
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

/// What is wrong with the end of a log, if anything is.
fn tail_message(records: &mut Records) -> Result<Option<String>, Failure> {
    let tail = records.tail()?;
    if tail.events == 0 && !tail.was_durable {
        return Ok(None);
    }
    let kind = if tail.was_durable {
        "damage: what follows had been synced"
    } else {
        "a torn tail: opening the store cuts it"
    };
    let events = tail.events;
    Ok(Some(format!(
        "the log ends at offset {}, but {events} events that hold follow up to {} ({kind})",
        tail.offset, tail.end
    )))
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

// ---------------------------------------------------------------- verify

/// What is wrong with one shard: all are counted, the first are shown.
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

fn verify(store: &Store, out: &mut Output) -> Result<Verdict, Failure> {
    let (mut events, mut problems) = (0, 0);
    for shard in store.shard_ids() {
        let mut found = Problems::default();
        let line = match verify_shard(store, shard, &mut found) {
            Ok(checked) => {
                events += checked.events;
                checked.to_string()
            }
            // One shard's damaged span says nothing of the others.
            Err(failure) if failure.exit_status() == 1 => {
                found.add(failure.to_string());
                "not readable".to_owned()
            }
            Err(failure) => return Err(failure),
        };
        let verdict = if found.found == 0 { "ok".to_owned() } else { format!("{} PROBLEMS", grouped(found.found)) };
        writeln!(out, "shard {shard}: {line}: {verdict}")?;
        for problem in &found.shown {
            writeln!(out, "  {problem}")?;
        }
        if found.found > found.shown.len() as u64 {
            writeln!(out, "  … and {} more", found.found - found.shown.len() as u64)?;
        }
        out.flush()?;
        problems += found.found;
    }
    let verdict = if problems == 0 { "ok".to_owned() } else { format!("{} PROBLEMS", grouped(problems)) };
    writeln!(out, "{} events in {} shards: {verdict}", grouped(events), store.shards())?;
    Ok(if problems == 0 { Verdict::Sound } else { Verdict::Damaged })
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
    let files = store.shard(shard)?;
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
                if let Some(gap) = records.gaps().get(gaps) {
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

/// What a record's own check sum cannot show.
fn check_record(store: &Store, record: &Record<'_>, problems: &mut Problems) {
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

// ---------------------------------------------------------------- dump

/// Which events are wanted.
#[derive(Debug)]
struct Filter {
    key: Option<Key>,
    user: Option<String>,
    event_type: Option<String>,
    from_ms: u64,
    until_ms: u64,
}

impl Filter {
    /// Writes the record's line if it is wanted.
    fn write(&self, store: &Store, record: &Record<'_>, out: &mut impl Write) -> Result<bool, Failure> {
        let Some(event) = self.pick(store, record)? else { return Ok(false) };
        match event {
            Some(event) => envelope::write_envelope(out, &record.meta, event)?,
            None => {
                let name = store.type_name(record.meta.event_type).unwrap_or("?");
                envelope::write_opaque(out, &record.meta, name, record.body)?;
            }
        }
        Ok(true)
    }

    /// The event as far as it can be read, if it is wanted.
    fn pick<'a>(&self, store: &Store, record: &Record<'a>) -> Result<Option<Option<&'a ArchivedEnvelope>>, Failure> {
        let meta = &record.meta;
        let ms = meta.time.as_ms();
        if self.key.is_some_and(|key| key != meta.key) || ms < self.from_ms || ms > self.until_ms {
            return Ok(None);
        }
        let event = envelope_in(store, record)?;
        let named = |wanted: &str| {
            event.is_some_and(|event| event.event_type() == wanted)
                || store.type_name(meta.event_type) == Some(wanted)
                || wanted.parse() == Ok(meta.event_type.get())
        };
        // Two texts, or a text and a number, can have one key.
        let of_user = |wanted: &str| {
            event.is_none_or(|event| matches!(event.user_id(), ArchivedUserId::Text(text) if text.as_str() == wanted))
        };
        let wanted = self.event_type.as_deref().is_none_or(named) && self.user.as_deref().is_none_or(of_user);
        Ok(wanted.then_some(event))
    }
}

fn dump(store: &Store, args: DumpArgs, out: &mut Output) -> Result<Verdict, Failure> {
    let key = args.key.map(Key::new).or(args.user.as_deref().map(Key::of));
    let shards = match (args.shard, key) {
        (Some(shard), _) if shard >= store.shards() => {
            return Err(Failure::Usage(format!(
                "the store has shards 0 to {}, not {shard}",
                store.shards().saturating_sub(1)
            )));
        }
        (Some(shard), _) => vec![ShardId(shard)],
        // All of a key's events are in one shard.
        (None, Some(key)) => vec![key.shard(store.shards())],
        (None, None) => store.shard_ids().collect(),
    };
    let filter = Filter {
        key,
        user: args.user,
        event_type: args.event_type,
        from_ms: args.from.unwrap_or(0),
        until_ms: args.until.unwrap_or(u64::MAX),
    };
    let left = args.limit.unwrap_or(u64::MAX);
    match args.order {
        Order::Log => dump_log(store, &shards, &filter, left, out),
        Order::Time => dump_time(store, &shards, &filter, left, out),
    }
}

fn dump_log(
    store: &Store,
    shards: &[ShardId],
    filter: &Filter,
    mut left: u64,
    out: &mut Output,
) -> Result<Verdict, Failure> {
    let mut verdict = Verdict::Sound;
    for &shard in shards {
        let mut records = store.records(shard).until(store.horizon(shard)?);
        while left > 0 {
            let Some(record) = records.next()? else {
                if let Some(message) = tail_message(&mut records)? {
                    warn(&format!("shard {shard}: {message}"));
                    verdict = Verdict::Damaged;
                }
                break;
            };
            left -= u64::from(filter.write(store, &record, out)?);
        }
        warn_of_gaps(&records);
    }
    Ok(verdict)
}

fn warn_of_gaps(records: &Records) {
    for gap in records.gaps() {
        let (shard, from, until, events) = (gap.shard, gap.from, gap.until, gap.events);
        warn(&format!(
            "shard {shard}: retention freed {events} events from offset {from} to {until} before they were read"
        ));
    }
}

/// What a first look at a shard tells.
struct Surveyed {
    in_order: bool,
    end: Offset,
}

/// Reads a shard once: whether it is in time order, and where it ends for this dump.
fn survey(store: &Store, shard: ShardId, verdict: &mut Verdict) -> Result<Surveyed, Failure> {
    let mut records = store.records(shard).until(store.horizon(shard)?);
    let (mut in_order, mut last) = (true, Time(0));
    while let Some(record) = records.next()? {
        in_order &= last <= record.meta.time;
        last = record.meta.time;
    }
    if let Some(message) = tail_message(&mut records)? {
        warn(&format!("shard {shard}: {message}"));
        *verdict = Verdict::Damaged;
    }
    Ok(Surveyed { in_order, end: records.offset() })
}

fn dump_time(
    store: &Store,
    shards: &[ShardId],
    filter: &Filter,
    left: u64,
    out: &mut Output,
) -> Result<Verdict, Failure> {
    let mut verdict = Verdict::Sound;
    // 64 MiB for all, however many there are.
    let buffer_bytes = ((64 << 20) / shards.len().max(1)).clamp(64 << 10, 1 << 20);
    let mut sources = Vec::new();
    for &shard in shards {
        let Surveyed { in_order, end } = survey(store, shard, &mut verdict)?;
        let records = store.records(shard).until(end).buffered(buffer_bytes);
        sources.push(match in_order {
            true => Source::Log { records, line: Vec::new() },
            false => Source::Index(Index::new(store, filter, records)?),
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
    Ok(verdict)
}

/// Where an event stands in the order of time.
type At = (Time, ShardId, Offset);

/// One shard's wanted events in the order of time.
enum Source {
    /// The log is in that order already.
    Log { records: Records, line: Vec<u8> },
    /// Sorted here: 32 bytes per event.
    Index(Index),
}

impl Source {
    /// Goes to the next event, whose line is then in [`Source::line`].
    fn advance(&mut self, store: &Store, filter: &Filter) -> Result<Option<At>, Failure> {
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

/// A shard's wanted events sorted by time, fetched batch by batch in the order of the log.
struct Index {
    places: Vec<Place>,
    /// The next place to be given out.
    next: usize,
    /// The batch that was fetched last: its places, and where the line of each is in `lines`.
    batch: Range<usize>,
    ranges: Vec<Range<usize>>,
    lines: Vec<u8>,
    line: Range<usize>,
    lookup: Lookup,
    lost: u64,
}

impl Index {
    const BATCH_EVENTS: usize = 16 << 10;
    const BATCH_BYTES: u64 = 8 << 20;

    fn new(store: &Store, filter: &Filter, mut records: Records) -> Result<Self, Failure> {
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

    fn advance(&mut self, store: &Store, filter: &Filter) -> Result<Option<At>, Failure> {
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

    /// Fetches the next places, reading forward through the log.
    fn fetch(&mut self, store: &Store, filter: &Filter) -> Result<(), Failure> {
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

// ---------------------------------------------------------------- how things are shown

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

/// 1234567 as 1,234,567.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut shown = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            shown.push(',');
        }
        shown.push(digit);
    }
    shown
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

    #[test]
    fn the_command_line_is_sound() {
        use clap::CommandFactory as _;
        Cli::command().debug_assert();
    }
}
