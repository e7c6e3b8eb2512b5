//! Compares a consumer that does nothing with a bare reader of the same log.

use std::time::Instant;

use anyhow::{Result, ensure};
use corelane::{Deadline, ShardId};

use crate::tools::{engine, median, publish};

pub(crate) fn run(events: u64, repeats: usize) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let engine = engine(&dir)?;
    publish(&mut engine.producer(), 0, events, 10_000)?;
    engine.flush(Deadline::NEVER)?;
    let (mut bare, mut idle, mut typed) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..repeats {
        let began = Instant::now();
        let mut reader = engine.reader(ShardId(0));
        let mut read = 0;
        while reader.next()?.is_some() {
            read += 1;
        }
        bare.push(events as f64 / began.elapsed().as_secs_f64() / 1e6);
        ensure!(read == events, "the reader saw {read} events");
        for (is_typed, figures) in [(false, &mut idle), (true, &mut typed)] {
            let mut builder = engine.consumer(&format!("idle-{round}-{is_typed}"));
            if is_typed {
                builder = builder.types(["player_attacked"]);
            }
            let began = Instant::now();
            let consumer = builder.start(|_, _| Ok(()))?;
            consumer.drain(Deadline::NEVER)?;
            figures.push(events as f64 / began.elapsed().as_secs_f64() / 1e6);
            let handled = consumer.report().handled;
            ensure!(handled == if is_typed { events / 2 } else { events }, "the consumer handled {handled} events");
            consumer.stop(Deadline::NEVER)?;
        }
    }
    let (bare, idle, typed) = (median(bare), median(idle), median(typed));
    println!("bare reader              {bare:6.1} M events/s");
    println!("consumer doing nothing   {idle:6.1} M events/s   {:.2} of the reader", idle / bare);
    println!("  of one type of two     {typed:6.1} M events/s   of the log");
    Ok(())
}
