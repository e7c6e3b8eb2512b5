//! Full speed, and four services that follow.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use corelane::consumer::ConsumerReport;
use corelane::{Config, Durability, EventLog, Key, Producer};

use crate::game::{GameEvent, LEVELLED_UP, Traffic};
use crate::services::{NAMES, Seen, Services};
use crate::{Args, soon};

pub(crate) fn run(args: &Args) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let time = Duration::from_secs_f64(args.seconds);

    step("full speed, with nobody following");
    // Once to warm up: the first store of a process is the slowest.
    alone(dir.path(), args.shards, time / 4)?;
    let alone_per_s = alone(dir.path(), args.shards, time)?;
    println!("{:.2} M events/s", alone_per_s / 1e6);

    step("full speed, with four services");
    let store = dir.path().join("store");
    let engine = open(&store, args.shards)?;
    let seen = Default::default();
    let services = Services::start(&engine, args.cost_percent, &seen)?;
    let (mut producer, mut traffic) = (engine.producer(), Traffic::default());
    let per_s = publish(&mut producer, &mut traffic, time, |after, published| {
        println!("after {:.1} s, {} published", after.as_secs_f64(), grouped(published));
        services.0.iter().for_each(|service| show(&service.report()));
    })?;
    println!(
        "{:.2} M events/s, {:.2} of what it was with nobody following (all of them share {} cores)",
        per_s / 1e6,
        per_s / alone_per_s,
        std::thread::available_parallelism()?
    );

    step("publish_sync: published, and handled by those that are named");
    let [_, database, notifications, leaderboard] = &services.0;
    let (key, event) = (Key::new(42), GameEvent::LevelledUp { level: 100 });
    let began = Instant::now();
    engine.publish_sync(&mut producer, key, event, &[notifications, leaderboard], soon())?;
    traffic.count(&event);
    println!("mailed and ranked {:.0} ms after it was published", began.elapsed().as_secs_f64() * 1e3);

    step("what there is to do is done, as far as there is time");
    // Analytics takes 3 ms for every event there is: it would take very long. What the others want is rare.
    let deadline = Some(Instant::now() + Duration::from_secs(30) + 20 * time);
    for service in [database, notifications, leaderboard] {
        ensure!(service.drain(deadline).is_ok(), "{}: {:?}", service.name(), service.report());
    }
    for service in &services.0 {
        // The lag counts from the saved position.
        service.save()?;
    }
    // Nothing is published any more.
    let reports = services.0.each_ref().map(|service| service.report());
    for (at, report) in reports.iter().enumerate() {
        show(report);
        let published = traffic.of(Services::types(at));
        ensure!(report.handled + report.waiting() == published, "{published} published for {report:?}");
        ensure!((report.parked, report.skipped) == (0, 0), "{report:?}");
    }
    println!("analytics has {} left, and goes on with them after the next start", grouped(reports[0].waiting()));
    for service in services.0 {
        service.stop(soon())?;
    }
    drop(producer);
    engine.shutdown(soon())?;
    drop(engine);

    step("the next start: the services have become fast, and go on where they were");
    let engine = open(&store, args.shards)?;
    let began = Instant::now();
    let services = Services::start(&engine, 0, &seen)?;
    ensure!(engine.drain_consumers(Some(began + Duration::from_secs(60) + 20 * time)), "{:?}", engine.consumers());
    let seconds = began.elapsed().as_secs_f64();
    for service in &services.0 {
        service.save()?;
        show(&service.report());
    }
    let handled = services.0[0].report().handled;
    println!("analytics handled {} in {seconds:.2} s", grouped(handled));
    for (at, (name, seen)) in NAMES.iter().zip(&seen).enumerate() {
        let (events, wrong) = Seen::get(seen);
        let published = traffic.of(Services::types(at));
        ensure!(events == published, "{name} has handled {events} events of {published}");
        ensure!(wrong.is_none(), "{name} has seen key {wrong:?} out of order");
    }
    engine.shutdown(soon())?;
    println!(
        "\neach service has handled its events ({} in all, {} of them level-ups) once, each player's in order",
        grouped(traffic.events),
        grouped(traffic.of(&[LEVELLED_UP]))
    );
    Ok(())
}

/// Publishes to a store of its own that nobody follows.
fn alone(dir: &Path, shards: u16, time: Duration) -> Result<f64> {
    let dir = dir.join("alone");
    let engine = open(&dir, shards)?;
    let per_s = publish(&mut engine.producer(), &mut Traffic::default(), time, |_, _| {})?;
    engine.shutdown(soon())?;
    drop(engine);
    fs::remove_dir_all(&dir)?;
    Ok(per_s)
}

/// The services see what is appended; the page cache is enough here, so that no disk sets the pace.
fn open(dir: &Path, shards: u16) -> Result<EventLog<GameEvent>> {
    Ok(EventLog::open(Config::new(dir).shards(shards).durability(Durability::OsCache))?)
}

/// Publishes as fast as it is taken, and shows how it goes every half second. Returns events per second.
fn publish(
    producer: &mut Producer<GameEvent>,
    traffic: &mut Traffic,
    time: Duration,
    mut show: impl FnMut(Duration, u64),
) -> Result<f64> {
    let (began, mut show_at) = (Instant::now(), Duration::from_millis(500));
    loop {
        for _ in 0..1_000 {
            let (key, event) = traffic.next();
            producer.publish(key, event)?;
        }
        let after = began.elapsed();
        if after >= show_at {
            show(after, traffic.events);
            show_at += Duration::from_millis(500);
        }
        if after >= time {
            return Ok(traffic.events as f64 / began.elapsed().as_secs_f64());
        }
    }
}

fn show(report: &ConsumerReport) {
    println!(
        "  {:<14} handled {:>11}  failed {:>4}  waiting {:>11}  success {:>5.1} %  lag {:>8.1} MB",
        report.name,
        grouped(report.handled),
        report.failed,
        grouped(report.waiting()),
        report.success_rate() * 100.0,
        report.lag_bytes as f64 / 1e6
    );
}

/// 1234567 as 1,234,567.
fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

fn step(what: &str) {
    println!("\n== {what}");
}
