//! Compares live feeds with a bare reader of the same log.
//!
//! Every variant reads the whole log and every event, one after the other in each round, so a busy machine slows all of
//! them alike. The figure is the median of the ratios of the rounds.

use std::pin::pin;
use std::task::{Context, Poll, Waker};
use std::time::Instant;

use anyhow::{Result, ensure};
use corelane::log::{LiveBuilder, LiveFrom};
use corelane::{Deadline, EventLog, Key, ShardId};
use futures_core::Stream;

use crate::event::{ArchivedGameEvent, GameEvent};
use crate::tools::{engine, median, publish};

type Feed = LiveBuilder<GameEvent>;
/// A name, a function that returns the number of events read and the sum of their ticks, and the expected number.
type Variant<'a> = (&'a str, &'a dyn Fn() -> Result<(u64, u64)>, u64);

pub(crate) fn run(events: u64, repeats: usize) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let engine = engine(&dir)?;
    publish(&mut engine.producer(), 0, events, 10_000)?;
    engine.flush(Deadline::NEVER)?;
    let feed = || engine.live().from(LiveFrom::Beginning);
    let one_key = events.div_ceil(10_000);
    let all = events * (events - 1) / 2;
    let variants: [Variant<'_>; 8] = [
        ("bare reader", &|| read(&engine), events),
        ("live, next_until", &|| next_until(feed(), events), events),
        ("live, next_async", &|| poll_to_end(next_async(feed(), events)), events),
        ("live stream of batches", &|| batches(feed(), events), events),
        ("live stream", &|| stream(feed(), events), events),
        ("live iterator", &|| iterate(feed(), events), events),
        ("live stream, one type of two", &|| stream(feed().types(["player_attacked"]), events / 2), events / 2),
        ("live stream, one key of 10,000", &|| stream(feed().key(Key::new(0)), one_key), one_key),
    ];
    let mut figures = vec![(Vec::new(), Vec::new()); variants.len()];
    for _ in 0..repeats {
        let mut bare = 0.0;
        for ((name, variant, wanted), (rates, ratios)) in variants.iter().zip(&mut figures) {
            let began = Instant::now();
            let (seen, ticks) = variant()?;
            // Every variant passes over the whole log.
            let rate = events as f64 / began.elapsed().as_secs_f64() / 1e6;
            ensure!(seen == *wanted, "{name}: saw {seen} of {wanted} events");
            ensure!(seen < events || ticks == all, "{name}: saw other events");
            bare = if *name == "bare reader" { rate } else { bare };
            rates.push(rate);
            ratios.push(rate / bare);
        }
    }
    for ((name, ..), (rates, ratios)) in variants.iter().zip(figures) {
        let (rate, ratio) = (median(rates), median(ratios));
        println!("{name:32} {rate:6.1} M events/s of the log   {ratio:.2} of the reader");
    }
    Ok(())
}

/// A field of the event, so that every variant reads the event itself.
fn tick(event: &ArchivedGameEvent) -> u64 {
    match event {
        ArchivedGameEvent::Moved { tick, .. } | ArchivedGameEvent::Attacked { tick, .. } => tick.to_native(),
    }
}

fn read(engine: &EventLog<GameEvent>) -> Result<(u64, u64)> {
    let mut reader = engine.reader(ShardId(0));
    let (mut seen, mut ticks) = (0, 0);
    while let Some(record) = reader.next()? {
        seen += 1;
        ticks += tick(record.event);
    }
    Ok((seen, ticks))
}

/// Polls a stream until it has returned `wanted` events.
fn stream(feed: Feed, wanted: u64) -> Result<(u64, u64)> {
    let mut feed = pin!(feed.start()?);
    let mut context = Context::from_waker(Waker::noop());
    let (mut seen, mut ticks) = (0, 0);
    while seen < wanted {
        match feed.as_mut().poll_next(&mut context) {
            Poll::Ready(Some(event)) => ticks += tick(event?.event()),
            Poll::Ready(None) => break,
            // The feed lets other tasks run; its waker, which does nothing here, has been called.
            Poll::Pending => continue,
        }
        seen += 1;
    }
    Ok((seen, ticks))
}

/// Polls a stream of batches until it has returned `wanted` events.
fn batches(feed: Feed, wanted: u64) -> Result<(u64, u64)> {
    let mut feed = pin!(feed.start()?.batches());
    let mut context = Context::from_waker(Waker::noop());
    let (mut seen, mut ticks) = (0, 0);
    while seen < wanted {
        match feed.as_mut().poll_next(&mut context) {
            Poll::Ready(Some(batch)) => {
                for record in batch?.records() {
                    seen += 1;
                    ticks += tick(record.event);
                }
            }
            Poll::Ready(None) => break,
            Poll::Pending => {}
        }
    }
    Ok((seen, ticks))
}

fn next_until(feed: Feed, wanted: u64) -> Result<(u64, u64)> {
    let mut feed = feed.start()?;
    let (mut seen, mut ticks) = (0, 0);
    while seen < wanted
        && let Some(record) = feed.next_until(Deadline::NEVER)?
    {
        seen += 1;
        ticks += tick(record.event);
    }
    Ok((seen, ticks))
}

async fn next_async(feed: Feed, wanted: u64) -> Result<(u64, u64)> {
    let mut feed = feed.start()?;
    let (mut seen, mut ticks) = (0, 0);
    while seen < wanted
        && let Some(record) = feed.next_async().await?
    {
        seen += 1;
        ticks += tick(record.event);
    }
    Ok((seen, ticks))
}

/// Polls a task that is always ready, or lets other tasks run.
fn poll_to_end<T>(task: impl Future<Output = T>) -> T {
    let mut task = pin!(task);
    loop {
        if let Poll::Ready(result) = task.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            return result;
        }
    }
}

fn iterate(feed: Feed, wanted: u64) -> Result<(u64, u64)> {
    let mut feed = feed.start()?;
    let (mut seen, mut ticks) = (0, 0);
    for event in (&mut feed).into_iter().take(usize::try_from(wanted)?) {
        seen += 1;
        ticks += tick(event?.event());
    }
    Ok((seen, ticks))
}
