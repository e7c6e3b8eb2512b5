//! The operator's tool: inspects and verifies a store, writes its events as JSON lines, and manages dead letters.
//!
//! The stock binary `corelane` shows typed events as hexadecimal digits, because it does not know their types. An
//! application builds its own tool in a few lines: [`main`].
//!
//! It is read-only: it takes no lock, changes no byte, and works beside a running engine and on read-only media. The
//! only exceptions are `dlq reprocess` and `dlq discard`, which leave a request file in a consumer's folder for the
//! consumer to carry out.

mod consumers;
mod dlq;
mod dump;
mod inspect;
mod show;
mod typed;
mod verify;

use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::io::{self, BufWriter, ErrorKind, Write as _};
use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};
use corelane::consumer::{ConsumerError, LettersError};
use corelane::envelope::{ArchivedEnvelope, Envelope};
use corelane::log::scan::{Records, ScannedRecord, Store};
use corelane::{Event, EventTypeId, Offset, OpenError, ReadError, ShardId};

use rkyv::api::low::LowDeserializer;
use rkyv::rancor::Error as RkyvError;
use show::Moment;
use typed::Typed;

/// Inspects a corelane store, also beside a running engine. Read-only, except that `dlq reprocess` and `dlq discard`
/// leave a request.
#[derive(Debug, Parser)]
#[command(
    version,
    about,
    after_help = "Exit status: 0 ok, 1 damage or undecodable events, 2 wrong usage or an I/O error."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Shows the contents of a store: event types with their rates, shards, segments, spares, quarantine, and its
    /// consumers with their lag and the segments that retention keeps for them.
    Inspect {
        /// The store.
        dir: PathBuf,
    },
    /// Checks every checksum, sequence and link of a store, its saved states, and the files of its consumers and gates.
    /// Reports everything that opening the store would refuse or report.
    ///
    /// A torn tail (invalid bytes at the very end, as a power cut leaves them) counts as damage here, although opening
    /// the store cuts it off and succeeds.
    Verify {
        /// The store.
        dir: PathBuf,
    },
    /// Writes events as JSON lines.
    Dump(DumpArgs),
    /// Lists, shows, reprocesses or discards dead letters: events that a consumer could not handle and set aside.
    #[command(subcommand)]
    Dlq(dlq::Dlq),
}

#[derive(Debug, Args)]
struct DumpArgs {
    /// The store.
    dir: PathBuf,
    /// `log`: shard by shard, in the order of appending. `time`: all shards merged by time, then shard, then offset.
    #[arg(long, value_enum, default_value_t = Order::Log)]
    order: Order,
    /// Only this key.
    #[arg(long, conflicts_with = "user")]
    key: Option<u64>,
    /// Only this user, whose id is a text.
    #[arg(long)]
    user: Option<String>,
    /// Only this event type: a name (of a generic event its `event_type`) or a type id of the manifest.
    #[arg(long = "type", value_name = "NAME|ID")]
    event_type: Option<String>,
    /// Only events at or after this time: ms since 1970, or an RFC 3339 time such as 2026-11-30T07:40:51.123Z.
    #[arg(long, value_name = "TIME")]
    from: Option<Moment>,
    /// Only events at or before this time. Milliseconds include the whole millisecond.
    #[arg(long, value_name = "TIME")]
    until: Option<Moment>,
    /// Only this shard.
    #[arg(long)]
    shard: Option<u16>,
    /// The most events to write.
    #[arg(long)]
    limit: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Order {
    Log,
    Time,
}

/// The reason why a command ended early.
#[derive(Debug)]
enum Failure {
    Usage(String),
    Output(io::Error),
    Open(OpenError),
    Read(ReadError),
    Letters(LettersError),
    /// An event whose archive is invalid although its checksum is valid.
    Archive(ShardId, Offset),
}

impl Failure {
    fn exit_status(&self) -> u8 {
        match self {
            Self::Archive(..) => 1,
            Self::Open(OpenError::Corruption(_) | OpenError::ForeignFile { .. } | OpenError::DamagedFile { .. }) => 1,
            Self::Letters(LettersError::Damaged { .. }) => 1,
            Self::Read(ReadError::Corruption(_) | ReadError::NotARecord { .. }) => 1,
            Self::Usage(_) | Self::Output(_) | Self::Open(_) | Self::Read(_) | Self::Letters(_) => 2,
        }
    }
}

impl Failure {
    /// Returns `true` if the error concerns one file only: it is damaged, missing, or of another format.
    fn is_damage(&self) -> bool {
        let is_gone = |source: &io::Error| source.kind() == ErrorKind::NotFound;
        self.exit_status() == 1
            || match self {
                Self::Open(OpenError::UnknownFormat { .. } | OpenError::ArchiveFormat { .. }) => true,
                Self::Open(OpenError::Io { source, .. }) | Self::Letters(LettersError::Io { source, .. }) => {
                    is_gone(source)
                }
                _ => false,
            }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Usage(why) => f.write_str(why),
            Self::Output(error) => write!(f, "writing the output: {error}"),
            Self::Open(error) => f.write_str(&with_sources(error)),
            Self::Read(error) => f.write_str(&with_sources(error)),
            Self::Letters(error) => f.write_str(&with_sources(error)),
            Self::Archive(shard, offset) => {
                write!(f, "shard {shard}, offset {offset}: the event's archive is invalid")
            }
        }
    }
}

/// Returns the text of `error` followed by those of its sources.
fn with_sources(error: &dyn std::error::Error) -> String {
    let sources = std::iter::successors(error.source(), |error| error.source());
    sources.fold(error.to_string(), |text, source| format!("{text}: {source}"))
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

impl From<LettersError> for Failure {
    fn from(error: LettersError) -> Self {
        Self::Letters(error)
    }
}

impl From<ConsumerError> for Failure {
    fn from(error: ConsumerError) -> Self {
        match error {
            ConsumerError::Files(error) => Self::Open(error),
            ConsumerError::Letters(error) => Self::Letters(error),
            error => Self::Usage(error.to_string()),
        }
    }
}

/// The condition of the files that a command read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Condition {
    Sound,
    Damaged,
}

type Output = BufWriter<Stdout>;

/// The standard output without std's line buffer.
struct Stdout {
    file: File,
    /// The command must run to its end for its exit status, even if the output is closed.
    ignores_broken_pipe: bool,
}

impl io::Write for Stdout {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.file.write(bytes) {
            Err(error) if error.kind() == ErrorKind::BrokenPipe && self.ignores_broken_pipe => Ok(bytes.len()),
            written => written,
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// Runs the tool for events of type `E`, with the arguments of this process.
///
/// The tool shows these events as JSON: in `dump` and `dlq show`, each line's `payload` is the serde form of the event.
/// (If that form is `{"event_type": NAME, "payload": P}` with the name of the event type, as for
/// `#[serde(tag = "event_type", content = "payload")]`, the payload is `P`, and [`from_json`](corelane::envelope::from_json) reads the line
/// again.) An event of an older schema version is shown in its current form, through its upcaster. An event that cannot
/// be decoded is shown as its archive in hexadecimal digits with the reason; the exit status is then 1.
///
/// The tool opens no engine and takes no lock. A whole program is
///
/// ```no_run
/// use corelane::{Bounded, Event};
/// use rkyv::{Archive, Deserialize, Serialize};
///
/// #[derive(Archive, Serialize, Deserialize, Bounded, Event, serde::Serialize)]
/// enum GameEvent {
///     #[event(id = 1, name = "player_moved")]
///     Moved { x: f32, y: f32 },
///     #[event(id = 2, name = "player_levelled_up")]
///     LevelledUp { level: u32 },
/// }
///
/// fn main() -> std::process::ExitCode {
///     corelane::tools::main::<GameEvent>()
/// }
/// ```
///
/// and then
///
/// ```text
/// $ mytool dump store --key 42 --from 2026-11-30T07:40:00Z
/// {"event_type":"player_moved","timestamp":1796024451123,"user_id":42,"payload":{"Moved":{"x":1.5,"y":0.0}},…}
/// ```
pub fn main<E>() -> ExitCode
where
    E: Event<Archived: rkyv::Deserialize<E, LowDeserializer<RkyvError>>> + serde::Serialize,
{
    run::<E, _>(std::env::args_os())
}

/// Runs the tool for events of type `E` with these arguments, the first of which is the name of the program. For a
/// program with commands of its own.
///
/// Ends the process if the arguments are wrong, or ask for help or the version.
pub fn run<E, T>(args: impl IntoIterator<Item = T>) -> ExitCode
where
    E: Event<Archived: rkyv::Deserialize<E, LowDeserializer<RkyvError>>> + serde::Serialize,
    T: Into<OsString> + Clone,
{
    run_typed(Cli::parse_from(args).command, &Typed::of::<E>())
}

/// Runs the stock tool, `corelane`, with the arguments of this process. It knows only generic events
/// ([`Envelope`]), and shows every other event as its archive in hexadecimal digits.
pub fn main_generic() -> ExitCode {
    run_typed(Cli::parse().command, &Typed::unknown())
}

fn run_typed(command: Command, typed: &Typed) -> ExitCode {
    let ignores_broken_pipe = matches!(command, Command::Inspect { .. } | Command::Verify { .. });
    match stdout(ignores_broken_pipe).map_err(Failure::from).and_then(|out| carry_out(command, typed, out)) {
        Ok(Condition::Sound) => ExitCode::SUCCESS,
        Ok(Condition::Damaged) => ExitCode::from(1),
        // The reader of the output has closed it, as `head` does.
        Err(Failure::Output(error)) if error.kind() == ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(failure) => {
            warn(&failure);
            ExitCode::from(failure.exit_status())
        }
    }
}

fn stdout(ignores_broken_pipe: bool) -> io::Result<Output> {
    let file = io::stdout().as_fd().try_clone_to_owned()?.into();
    Ok(BufWriter::with_capacity(256 << 10, Stdout { file, ignores_broken_pipe }))
}

fn warn(message: &dyn fmt::Display) {
    // A closed standard error must not change the exit status.
    drop(writeln!(io::stderr(), "corelane: {message}"));
}

fn carry_out(command: Command, typed: &Typed, mut out: Output) -> Result<Condition, Failure> {
    let done = match command {
        Command::Inspect { dir } => {
            Store::open(dir).map_err(Failure::from).and_then(|store| inspect::inspect(&store, &mut out))
        }
        Command::Verify { dir } => {
            Store::open(dir).map_err(Failure::from).and_then(|store| verify::verify(&store, &mut out))
        }
        Command::Dump(args) => {
            Store::open(&args.dir).map_err(Failure::from).and_then(|store| dump::dump(&store, args, typed, &mut out))
        }
        Command::Dlq(dlq) => dlq::dlq(dlq, typed, &mut out),
    };
    // Output written before a failure is flushed too. The failure says more than a flush error would.
    let flushed = out.flush();
    let condition = done?;
    flushed?;
    Ok(condition)
}

/// Returns the generic event of a record, or `None` if the record holds an event of another type.
fn envelope_in<'a>(store: &Store, record: &ScannedRecord<'a>) -> Result<Option<&'a ArchivedEnvelope>, Failure> {
    let meta = &record.meta;
    envelope_of(store, meta.event_type, meta.schema_version, record.body)
        .map_err(|()| Failure::Archive(meta.shard, meta.offset))
}

/// Returns the generic event of an archive, or `None` for another type. Fails if the archive of a generic event is
/// invalid.
fn envelope_of<'a>(
    store: &Store,
    event_type: EventTypeId,
    schema_version: u16,
    archive: &'a [u8],
) -> Result<Option<&'a ArchivedEnvelope>, ()> {
    let known = Envelope::TYPES[0];
    if schema_version != known.schema_version || store.type_name(event_type) != Some(known.name) {
        return Ok(None);
    }
    ArchivedEnvelope::access(archive).map(Some).map_err(drop)
}

/// Describes what is wrong with the end of a log, or returns `None`.
fn tail_message(records: &mut Records) -> Result<Option<String>, Failure> {
    let tail = records.tail()?;
    if tail.events == 0 && !tail.was_durable {
        return Ok(None);
    }
    let kind = if tail.was_durable {
        "damage: these events were synced before"
    } else {
        "a torn tail: opening the store cuts it off"
    };
    let events = tail.events;
    Ok(Some(format!(
        "the log ends at offset {}, but {events} valid events follow up to offset {} ({kind})",
        tail.offset, tail.end
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_definition_is_consistent() {
        use clap::CommandFactory as _;
        Cli::command().debug_assert();
    }
}
