//! The load generator: publishes millions of events, measures every stage, and checks after a restart that nothing was
//! lost.
//!
//! ```text
//! cargo run --release --example loadgen
//! cargo run --release --example loadgen -- --help
//! ```

/// Like `eprintln`, but ignores a closed or full standard error, which must not end a run.
macro_rules! say {
    ($($arg:tt)*) => {
        drop(std::io::Write::write_fmt(&mut std::io::stderr(), format_args!("{}\n", format_args!($($arg)*))))
    };
}

mod cli;
mod disk;
mod events;
mod input;
mod limit;
mod load;
mod machine;
mod output;
mod report;
mod run;
mod save;
mod search;
mod verify;
mod watch;

use std::io;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use corelane::Stateless;
use corelane::envelope::Envelope;

use crate::cli::Args;
use crate::events::{GameEvent, Games, Padded, Paddings, Player};
use crate::input::Input;
use crate::machine::Machine;
use crate::output::Summary;
use crate::run::{Load, StoreFolder, all};
use crate::save::save;
use crate::search::find_max;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let args = Args::from_command_line();
    match start(&args) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            say!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs the load. Returns `true` if the store kept every event.
fn start(args: &Args) -> Result<bool> {
    run::remove_leftovers();
    run::check_places(args)?;
    let producers = 0..args.producers;
    if let Some(path) = &args.input {
        let input = Input::load(path, args.events)?;
        say!("{} events loaded in {:.1} s", input.len(), input.loading.as_secs_f64());
        let histories = input.histories();
        // A run limited by time may leave some events unsent.
        let expected = args.duration.is_none().then_some(&histories);
        return measure::<Stateless<Envelope>, _>(
            args,
            &Load { feeds: &|| input.feeds(args.producers), expected },
            Some(input.loading),
        );
    }
    if args.payload > 48 {
        return measure::<Stateless<Padded>, _>(
            args,
            &Load { feeds: &|| producers.clone().map(|n| Paddings::new(args, n)).collect(), expected: None },
            None,
        );
    }
    let load = Load { feeds: &|| producers.clone().map(|n| Games::new(args, n)).collect(), expected: None };
    if args.no_state {
        return measure::<Stateless<GameEvent>, _>(args, &load, None);
    }
    measure::<Player, _>(args, &load, None)
}

fn measure<A: events::Carried, F: events::Feed<A::Event>>(
    args: &Args,
    load: &Load<'_, F>,
    loading: Option<std::time::Duration>,
) -> Result<bool> {
    let machine = {
        let folder = StoreFolder::new(&Args { keep: false, ..args.clone() }, None)?;
        Machine::detect(&folder.dir, load::core_ids().len())
    };
    let (args, runs, found) = if args.find_max {
        let found = find_max::<A, F>(args, load)?;
        // The results are those of the run at the rate found.
        (&Args { rate: found.shown as u64, ..args.clone() }, vec![found.run.clone()], Some(found))
    } else {
        (args, all::<A, F>(args, load)?, None)
    };
    let summary = Summary::new(args, &machine, &runs, loading).context("no run")?;
    let mut json = summary.json();
    let mut text = String::new();
    if let Some(found) = &found {
        json["find_max"] = found.json(args);
        text += &found.text(args);
    }
    text += &summary.text();
    if let Some(dir) = &args.out {
        save(dir, &summary, &json, found.as_ref().map_or(&[], |found| &found.steps))?;
        text += &format!("report: {}\n", dir.join("report.html").display());
    }
    if args.json {
        text += &format!("{json}\n");
    }
    print_to(&mut io::stdout(), &text)?;
    Ok(summary.is_whole())
}

/// Prints the results. A closed pipe, as with `| head`, is not an error.
fn print_to(out: &mut impl io::Write, text: &str) -> Result<()> {
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        printed => printed.context("writing the results"),
    }
}

#[cfg(test)]
mod tests;
