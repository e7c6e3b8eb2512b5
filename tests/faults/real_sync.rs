//! The real file system: that a sync reaches the kernel, and what happens when the kernel refuses it.
//!
//! The storage twin of the other tests stands in for the disk, so it cannot see whether the real one is
//! ever asked. Here a child process is traced: its `msync` calls are counted, or made to fail.
#![expect(clippy::print_stdout, reason = "a child answers its parent, and a skip says so")]

use std::path::Path;
use std::process::Command;

use crate::common::{Note, numbers, os_cache, small, soon};
use corelane::{EventLog, Key, Rejected, WaitError};

const DIR: &str = "CORELANE_REAL_SYNC_DIR";
const EVENTS: u64 = 20;

/// Publishes one event at a time, each waited for, and prints how many were acknowledged before a failure.
#[test]
fn child_that_waits_for_every_event() {
    let Ok(dir) = std::env::var(DIR) else { return };
    let mut acknowledged = 0;
    if let Ok(engine) = EventLog::<Note>::open(small(&dir)) {
        let mut producer = engine.producer();
        for n in 0..EVENTS {
            match producer.publish(Key(1), Note::new(n)) {
                Ok(receipt) => match receipt.durable().wait_until(soon().unwrap()) {
                    Ok(()) => acknowledged = n + 1,
                    Err(WaitError::ShardFailed(_)) => break,
                    Err(other) => panic!("{other}"),
                },
                Err(Rejected::ShardFailed(..)) => break,
                Err(other) => panic!("{other:?}"),
            }
        }
    }
    println!("acknowledged={acknowledged}");
    // The engine's own end may fail too, and must not hang; its answer is not the point here.
}

/// Runs the child under strace and returns (acknowledged, trace). `None` where there is no strace to run.
fn traced(dir: &Path, inject: Option<&str>) -> Option<(u64, String)> {
    let trace = dir.join("trace");
    let mut strace = Command::new("strace");
    strace.args(["-f", "-qq", "-e", "trace=msync", "-o"]).arg(&trace);
    if let Some(inject) = inject {
        strace.arg("-e").arg(format!("inject=msync:{inject}"));
    }
    strace.arg(std::env::current_exe().unwrap());
    strace.args(["--exact", "real_sync::child_that_waits_for_every_event", "--nocapture"]).env(DIR, dir.join("store"));
    let Ok(output) = strace.output() else {
        assert!(std::env::var_os("CI").is_none(), "CI must have strace");
        println!("skipped: no strace here");
        return None;
    };
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let trace = std::fs::read_to_string(trace).unwrap_or_default();
    if !output.status.success() && trace.is_empty() && std::env::var_os("CI").is_none() {
        println!("skipped: strace may not trace here: {}", String::from_utf8_lossy(&output.stderr));
        return None;
    }
    assert!(output.status.success(), "{said}");
    let at = said.find("acknowledged=").unwrap_or_else(|| panic!("{said}")) + "acknowledged=".len();
    let digits: String = said[at..].chars().take_while(char::is_ascii_digit).collect();
    Some((digits.parse().unwrap(), trace))
}

#[test]
fn every_acknowledged_event_was_synced_by_the_kernel() {
    let dir = tempfile::tempdir().unwrap();
    let Some((acknowledged, trace)) = traced(dir.path(), None) else { return };
    let syncs = trace.lines().filter(|line| line.contains("MS_SYNC") && line.contains("= 0")).count() as u64;
    assert_eq!(acknowledged, EVENTS);
    assert!(syncs >= EVENTS, "{EVENTS} events waited for one by one, {syncs} syncs");
}

#[test]
fn a_sync_that_the_kernel_fails_acknowledges_nothing_more_and_loses_nothing() {
    for n in 1..=8 {
        let dir = tempfile::tempdir().unwrap();
        let Some((acknowledged, trace)) = traced(dir.path(), Some(&format!("error=EIO:when={n}"))) else { return };
        assert!(trace.contains("(INJECTED)"), "sync {n} was made to fail");
        assert!(acknowledged < EVENTS && acknowledged < n, "sync {n} failed, {acknowledged} acknowledged");
        let engine = EventLog::<Note>::open(os_cache(dir.path().join("store"))).unwrap();
        let found = numbers(&engine);
        assert!(found.len() as u64 >= acknowledged, "sync {n}: {} of {acknowledged}", found.len());
        assert_eq!(found, (0..found.len() as u64).collect::<Vec<_>>(), "sync {n}: nothing invented");
    }
}
