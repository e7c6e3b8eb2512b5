//! Publishes at full speed while four services follow.

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

    step("full speed, without services");
    // Warm-up: the first store of a process is the slowest.
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
        "{:.2} M events/s, {:.2} of the rate without services (all share {} cores)",
        per_s / 1e6,
        per_s / alone_per_s,
        std::thread::available_parallelism()?
    );

    step("publish_sync: publishes, then waits until the named services have handled the event");
    let [_, database, notifications, leaderboard] = &services.0;
    let (key, event) = (Key::new(42), GameEvent::LevelledUp { level: 100 });
    let began = Instant::now();
    engine.publish_sync(&mut producer, key, event, &[notifications, leaderboard], soon())?;
    traffic.count(&event);
    println!("mailed and ranked {:.0} ms after publishing", began.elapsed().as_secs_f64() * 1e3);

    step("drain: the services finish the events they can finish in time");
    // Analytics takes 3 ms for every event, which would take very long. The events of the other services are rare.
    let deadline = Some(Instant::now() + Duration::from_secs(30) + 20 * time);
    for service in [database, notifications, leaderboard] {
        ensure!(service.drain(deadline).is_ok(), "{}: {:?}", service.name(), service.report());
    }
    for service in &services.0 {
        // The report computes the lag from the saved position.
        service.save()?;
    }
    // Publishing has ended, so the counts are final.
    let reports = services.0.each_ref().map(|service| service.report());
    for (at, report) in reports.iter().enumerate() {
        show(report);
        let published = traffic.of(Services::types(at));
        ensure!(report.handled + report.waiting() == published, "{published} published for {report:?}");
        ensure!((report.parked, report.skipped) == (0, 0), "{report:?}");
    }
    println!("analytics has {} events left and continues with them after the restart", grouped(reports[0].waiting()));
    for service in services.0 {
        service.stop(soon())?;
    }
    drop(producer);
    engine.shutdown(soon())?;
    drop(engine);

    step("restart: the services, now fast, continue at their positions");
    let engine = open(&store, args.shards)?;
    let began = Instant::now();
    let services = Services::start(&engine, 0, &seen)?;
    engine.drain_consumers(began + Duration::from_secs(60) + 20 * time)?;
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
        ensure!(events == published, "{name} handled {events} of {published} events");
        ensure!(wrong.is_none(), "{name} saw the events of key {wrong:?} out of order");
    }
    engine.shutdown(soon())?;
    println!(
        "\neach service handled its events ({} in all, {} of them level-ups) once, each player's in order",
        grouped(traffic.events),
        grouped(traffic.of(&[LEVELLED_UP]))
    );
    Ok(())
}

/// Publishes to a separate store without services.
fn alone(dir: &Path, shards: u16, time: Duration) -> Result<f64> {
    let dir = dir.join("alone");
    let engine = open(&dir, shards)?;
    let per_s = publish(&mut engine.producer(), &mut Traffic::default(), time, |_, _| {})?;
    engine.shutdown(soon())?;
    drop(engine);
    fs::remove_dir_all(&dir)?;
    Ok(per_s)
}

/// Opens a store. `OsCache` is enough here: services see appended events, and no disk limits the rate.
fn open(dir: &Path, shards: u16) -> Result<EventLog<GameEvent>> {
    Ok(EventLog::open(Config::new(dir).shards(shards).durability(Durability::OsCache))?)
}

/// Publishes as fast as the engine accepts, and reports progress every half second. Returns the events per second.
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

/// Formats 1234567 as `1,234,567`.
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

fn step(name: &str) {
    println!("\n== {name}");
}
