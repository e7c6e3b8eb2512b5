//! The real file system: a sync reaches the kernel, and a sync that the kernel fails acknowledges nothing.
//!
//! The storage twin of the other tests replaces the disk, so it cannot show that the real one is synced. Here strace
//! counts the `msync` calls of a child process, or makes them fail.
#![expect(clippy::print_stdout, reason = "the child reports to its parent, and a skip is reported")]

use std::path::Path;
use std::process::Command;

use crate::common::{Note, numbers, os_cache, small, soon};
use corelane::{EventLog, Key, Rejected, WaitError};

const DIR: &str = "CORELANE_REAL_SYNC_DIR";
const EVENTS: u64 = 20;

/// Publishes one event at a time, waits for each, and prints the number acknowledged before a failure.
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
    // The drop of the engine may fail too, but must not hang.
}

/// Runs the child under strace. Returns (acknowledged, trace), or `None` without a usable strace.
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
        println!("skipped: strace is not installed");
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
    assert!(syncs >= EVENTS, "{EVENTS} events, each waited for, with {syncs} syncs");
}

#[test]
fn a_sync_that_the_kernel_fails_acknowledges_no_later_event_and_loses_none() {
    for n in 1..=8 {
        let dir = tempfile::tempdir().unwrap();
        let Some((acknowledged, trace)) = traced(dir.path(), Some(&format!("error=EIO:when={n}"))) else { return };
        assert!(trace.contains("(INJECTED)"), "sync {n} was made to fail");
        assert!(acknowledged < EVENTS && acknowledged < n, "sync {n} failed, {acknowledged} acknowledged");
        let engine = EventLog::<Note>::open(os_cache(dir.path().join("store"))).unwrap();
        let found = numbers(&engine);
        assert!(found.len() as u64 >= acknowledged, "sync {n}: {} of {acknowledged}", found.len());
        assert_eq!(found, (0..found.len() as u64).collect::<Vec<_>>(), "sync {n}: no event is invented");
    }
}
