//! `dlq`: shows dead letters, and asks consumers to reprocess or discard them.
//!
//! A request is a file in the consumer's folder: the handlers run in the consumer's process, and only it writes its
//! letters.

use std::io::{self, IsTerminal as _, Write as _};
use std::path::PathBuf;

use clap::{Args, Subcommand};
use corelane::consumer::outside::{self, DeadLetters};
use corelane::consumer::{DeadLetter, LetterKind, LetterSelector, Request};
use corelane::envelope::{self, ArchivedUserId};
use corelane::event::EventId;
use corelane::log::scan::Store;
use corelane::{Key, Offset};
use serde_json::json;

use super::show::{grouped, printable, table};
use super::typed::Typed;
use super::{Condition, Failure, Output, envelope_of, warn};

/// Letters read per page.
const PAGE: usize = 256;
/// Default number of rows of a table.
const ROWS: u64 = 1000;
/// Characters of an error that a row shows.
const ERROR_CHARS: usize = 60;

#[derive(Debug, Subcommand)]
pub(super) enum Dlq {
    /// Lists dead letters by consumer, then key, then age.
    List(ListArgs),
    /// Shows one dead letter with its event.
    Show(ShowArgs),
    /// Asks a consumer to handle dead letters again: oldest first per key, and each key until its first failure.
    ///
    /// A running consumer takes up the request within about a second; a stopped one when it starts.
    Reprocess(AskArgs),
    /// Asks a consumer to discard dead letters. Only their count remains, and the events that the log still holds.
    Discard {
        #[command(flatten)]
        ask: AskArgs,
        /// Do not ask for confirmation.
        #[arg(long)]
        yes: bool,
    },
}

#[derive(Debug, Args)]
pub(super) struct ListArgs {
    /// The store.
    dir: PathBuf,
    /// Only the letters of this consumer.
    #[arg(long, value_name = "NAME")]
    consumer: Option<String>,
    /// Only the letters of this key.
    #[arg(long, conflicts_with = "user")]
    key: Option<u64>,
    /// Only the letters of this user, whose id is a text.
    #[arg(long, value_name = "TEXT")]
    user: Option<String>,
    /// The most letters to show per consumer [default: 1000 in a table, all with --json].
    #[arg(long, value_name = "N")]
    limit: Option<u64>,
    /// Write one JSON object per line.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(super) struct ShowArgs {
    /// The store.
    dir: PathBuf,
    /// The consumer.
    #[arg(long, value_name = "NAME")]
    consumer: String,
    /// The id of the event: SHARD-OFFSET.
    #[arg(value_name = "ID")]
    id: EventId,
    /// Write one JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(super) struct AskArgs {
    /// The store.
    dir: PathBuf,
    /// The consumer.
    #[arg(long, value_name = "NAME")]
    consumer: String,
    #[command(flatten)]
    selection: Selection,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct Selection {
    /// The letters of this key.
    #[arg(long)]
    key: Option<u64>,
    /// The letters of this user, whose id is a text.
    #[arg(long, value_name = "TEXT")]
    user: Option<String>,
    /// All letters of the consumer.
    #[arg(long)]
    all: bool,
}

impl Selection {
    fn letters(&self) -> LetterSelector {
        let key = self.key.map(Key::new).or(self.user.as_deref().map(Key::of));
        key.map_or(LetterSelector::All, LetterSelector::Of)
    }
}

pub(super) fn dlq(command: Dlq, typed: &Typed, out: &mut Output) -> Result<Condition, Failure> {
    match command {
        Dlq::List(args) => list(&args, out),
        Dlq::Show(args) => show(&args, typed, out),
        Dlq::Reprocess(args) => ask(&args, Request::Reprocess(args.selection.letters()), true, out),
        Dlq::Discard { ask: args, yes } => ask(&args, Request::Discard(args.selection.letters()), yes, out),
    }
}

/// Returns the wanted consumer, or all consumers.
fn consumers(store: &Store, wanted: Option<&str>) -> Result<Vec<String>, Failure> {
    let mut names = outside::names(store)?;
    match wanted {
        Some(wanted) if names.iter().any(|name| name == wanted) => Ok(vec![wanted.to_owned()]),
        Some(wanted) => Err(Failure::Usage(format!("there is no consumer \"{wanted}\""))),
        None => {
            // A folder without a position file belongs to a removed consumer. A damaged one must not hide the letters.
            names.retain(|name| !matches!(outside::registered(store, name), Ok(None)));
            Ok(names)
        }
    }
}

fn list(args: &ListArgs, out: &mut Output) -> Result<Condition, Failure> {
    let store = Store::open(&args.dir)?;
    let mut condition = Condition::Sound;
    let names = consumers(&store, args.consumer.as_deref())?;
    if names.is_empty() && !args.json {
        writeln!(out, "No consumers.")?;
    }
    for name in &names {
        match list_one(&store, name, args, out) {
            Ok(()) => {}
            // Damage to one consumer says nothing about the others.
            Err(failure) if failure.exit_status() == 1 => {
                out.flush()?;
                warn(&format!("consumer {name}: {failure}"));
                condition = Condition::Damaged;
            }
            Err(failure) => return Err(failure),
        }
    }
    Ok(condition)
}

fn list_one(store: &Store, name: &str, args: &ListArgs, out: &mut Output) -> Result<(), Failure> {
    let letters = DeadLetters::open(store, name)?;
    let mut rows = table(
        &["key", "event id", "type", "why", "attempts", "first failed", "last failed", "error"],
        &[1, 2, 3, 5, 6, 7],
    );
    let (mut wanted, mut bytes) = (0_u64, 0);
    let shown_max = args.limit.unwrap_or(if args.json { u64::MAX } else { ROWS });
    let key = args.key.map(Key::new).or(args.user.as_deref().map(Key::of));
    let mut after = key.and_then(before);
    loop {
        let page = letters.list(after, PAGE)?;
        let Some((last, _)) = page.last() else { break };
        after = Some((last.key, last.id.offset));
        let is_past = key.is_some_and(|key| last.key > key);
        for (letter, archive) in page.iter().filter(|(letter, archive)| is_of(store, args, key, letter, archive)) {
            wanted += 1;
            bytes += archive.len() as u64;
            if wanted > shown_max {
                continue;
            }
            if args.json {
                write_json(out, json_of(store, name, letter, archive))?;
            } else {
                rows.add_row(row(store, letter, archive));
            }
        }
        if is_past || (args.json && wanted >= shown_max) {
            break;
        }
    }
    if args.json {
        return Ok(());
    }
    let totals = letters.statistics();
    writeln!(out, "Consumer {name}")?;
    if wanted > 0 {
        writeln!(out, "{rows}")?;
    }
    if wanted > shown_max {
        writeln!(out, "… and {} more", grouped(wanted - shown_max))?;
    }
    let (all, keys) = (totals.letters as u64, letters.keys().count() as u64);
    if key.is_some() {
        write!(out, "{} of ", grouped(wanted))?;
    }
    writeln!(
        out,
        "{} letters of {} keys; the events shown take {} bytes.",
        grouped(all),
        grouped(keys),
        grouped(bytes)
    )?;
    writeln!(
        out,
        "Since the consumer was created {} became letters: {} were handled, {} discarded ({} of them to make room). It skipped {} events.\n",
        grouped(totals.parked),
        grouped(totals.handled),
        grouped(totals.discarded),
        grouped(totals.overflowed),
        grouped(totals.skipped)
    )?;
    Ok(())
}

/// Returns the last place in the order of letters that is before this key's letters; `None` for the first key.
fn before(key: Key) -> Option<(Key, Offset)> {
    key.get().checked_sub(1).map(|before| (Key::new(before), Offset(u64::MAX)))
}

fn is_of(store: &Store, args: &ListArgs, key: Option<Key>, letter: &DeadLetter, archive: &[u8]) -> bool {
    if key.is_some_and(|key| key != letter.key) {
        return false;
    }
    // Two texts, or a text and a number, can hash to one key.
    let event = envelope_of(store, letter.event_type, letter.schema_version, archive);
    args.user.as_deref().is_none_or(|wanted| match event {
        Ok(Some(event)) => matches!(event.user_id(), ArchivedUserId::Text(text) if text.as_str() == wanted),
        _ => true,
    })
}

fn type_name<'a>(store: &'a Store, letter: &DeadLetter, archive: &'a [u8]) -> &'a str {
    match envelope_of(store, letter.event_type, letter.schema_version, archive) {
        Ok(Some(event)) => event.event_type(),
        _ => store.type_name(letter.event_type).unwrap_or("?"),
    }
}

fn why(letter: &DeadLetter) -> &'static str {
    match letter.why {
        LetterKind::Failed => "failed",
        LetterKind::Behind => "behind",
        LetterKind::Undecodable => "undecodable",
    }
}

fn row(store: &Store, letter: &DeadLetter, archive: &[u8]) -> Vec<String> {
    let mut error: String = letter.error.chars().take(ERROR_CHARS).collect();
    if error.len() < letter.error.len() {
        error.push('…');
    }
    vec![
        letter.key.to_string(),
        letter.id.to_string(),
        printable(type_name(store, letter, archive)),
        why(letter).to_owned(),
        letter.attempts.to_string(),
        letter.first_failed.to_rfc3339(),
        letter.last_failed.to_rfc3339(),
        printable(&error),
    ]
}

fn json_of(store: &Store, consumer: &str, letter: &DeadLetter, archive: &[u8]) -> serde_json::Value {
    json!({
        "consumer": consumer,
        "event_id": letter.id.to_string(),
        "shard": letter.id.shard.get(),
        "offset": letter.id.offset.get(),
        "key": letter.key.get(),
        "event_type": type_name(store, letter, archive),
        "schema_version": letter.schema_version,
        "version": letter.version.get(),
        "timestamp": letter.time.as_ms(),
        "correlation": letter.correlation.get(),
        "why": why(letter),
        "attempts": letter.attempts,
        "first_failed": letter.first_failed.as_ms(),
        "last_failed": letter.last_failed.as_ms(),
        "error": letter.error,
        "archive_bytes": archive.len(),
    })
}

/// Writes one line without characters that control a terminal.
fn write_json(out: &mut Output, value: serde_json::Value) -> Result<(), Failure> {
    for c in value.to_string().chars() {
        // serde_json has escaped the ASCII control characters; the others occur only within strings.
        if c.is_control() {
            write!(out, "\\u{:04x}", u32::from(c))?;
        } else {
            write!(out, "{c}")?;
        }
    }
    writeln!(out)?;
    Ok(())
}

fn show(args: &ShowArgs, typed: &Typed, out: &mut Output) -> Result<Condition, Failure> {
    let store = Store::open(&args.dir)?;
    let name = consumers(&store, Some(&args.consumer))?.remove(0);
    let Some((letter, archive)) = DeadLetters::open(&store, &name)?.show(args.id)? else {
        return Err(Failure::Usage(format!("consumer {name} has no dead letter {}", args.id)));
    };
    let (event, condition) = event_line(&store, &letter, &archive, typed)?;
    if args.json {
        let mut value = json_of(&store, &name, &letter, &archive);
        value["event"] = serde_json::from_str(&event).map_err(io::Error::from)?;
        write_json(out, value)?;
        return Ok(condition);
    }
    let id = letter.event_type;
    writeln!(out, "consumer        {name}")?;
    writeln!(out, "event id        {}", letter.id)?;
    writeln!(out, "key             {}", letter.key)?;
    let type_name = printable(type_name(&store, &letter, &archive));
    writeln!(out, "type            {type_name} (id {id}, schema version {})", letter.schema_version)?;
    writeln!(out, "version         {}", letter.version)?;
    writeln!(out, "time            {}", letter.time.to_rfc3339())?;
    writeln!(out, "correlation     {}", letter.correlation.get())?;
    writeln!(out, "why             {}", why(&letter))?;
    writeln!(out, "attempts        {}", letter.attempts)?;
    writeln!(out, "first failed    {}", letter.first_failed.to_rfc3339())?;
    writeln!(out, "last failed     {}", letter.last_failed.to_rfc3339())?;
    writeln!(out, "error           {}", printable(&letter.error))?;
    writeln!(out, "archive bytes   {}", archive.len())?;
    writeln!(out, "event           {event}")?;
    Ok(condition)
}

/// Returns the event as `dump` writes it, without its sequence, which a letter does not store.
fn event_line(
    store: &Store,
    letter: &DeadLetter,
    archive: &[u8],
    typed: &Typed,
) -> Result<(String, Condition), Failure> {
    let meta = letter.meta();
    let mut line = Vec::new();
    let event = envelope_of(store, letter.event_type, letter.schema_version, archive);
    let complaint = match event {
        Ok(Some(event)) => {
            envelope::write_envelope(&mut line, &meta, event)?;
            None
        }
        Ok(None) => {
            typed.write(store, &meta, archive, &mut line)?;
            typed.complaint()
        }
        Err(()) => {
            let name = store.type_name(letter.event_type).unwrap_or("?");
            envelope::write_opaque(&mut line, &meta, name, archive)?;
            Some(Failure::Archive(letter.id.shard, letter.id.offset).to_string())
        }
    };
    if let Some(complaint) = &complaint {
        warn(complaint);
    }
    let condition = complaint.map_or(Condition::Sound, |_| Condition::Damaged);
    Ok((String::from_utf8_lossy(&line).trim_end().to_owned(), condition))
}

fn ask(args: &AskArgs, request: Request, is_confirmed: bool, out: &mut Output) -> Result<Condition, Failure> {
    let store = Store::open(&args.dir)?;
    let name = &args.consumer;
    let Some(registered) = outside::registered(&store, name)? else {
        return Err(Failure::Usage(format!("there is no consumer \"{name}\"")));
    };
    let letters = DeadLetters::open(&store, name)?;
    let (Request::Reprocess(which) | Request::Discard(which)) = request;
    let is_selected = |key: Key| which == LetterSelector::All || which == LetterSelector::Of(key);
    let selected: Vec<u64> =
        letters.keys().filter(|(key, _)| is_selected(*key)).map(|(_, count)| count.into()).collect();
    let count = format!("{} letters of {} keys", grouped(selected.iter().sum()), grouped(selected.len() as u64));
    if selected.is_empty() {
        writeln!(out, "Consumer {name} has no such dead letters; no request was made.")?;
        return Ok(Condition::Sound);
    }
    if !is_confirmed && !confirm(&format!("Discard {count} of consumer {name}?"))? {
        writeln!(out, "No request was made.")?;
        return Ok(Condition::Sound);
    }
    outside::ask(&store, name, request)?;
    let action = if matches!(request, Request::Discard(_)) { "discard" } else { "reprocess" };
    writeln!(out, "Asked consumer {name} to {action} {count}.")?;
    if registered.requests > 0 {
        writeln!(out, "It has {} earlier requests to carry out first.", registered.requests)?;
    }
    if outside::is_open(&store)? {
        writeln!(
            out,
            "An engine has the store open: a running consumer takes up the request within about a second, \
             a stopped one when it starts."
        )?;
    } else {
        writeln!(out, "No engine has the store open: the consumer takes up the request when it starts.")?;
    }
    Ok(Condition::Sound)
}

/// Asks the user at the terminal.
fn confirm(question: &str) -> Result<bool, Failure> {
    if !io::stdin().is_terminal() || !io::stderr().is_terminal() {
        return Err(Failure::Usage("cannot ask for confirmation without a terminal (pass --yes)".to_owned()));
    }
    write!(io::stderr(), "{question} [y/N] ")?;
    let mut answer = String::new();
    io::stdin().read_line(&mut answer)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}
