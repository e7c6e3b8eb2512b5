//! `corelane dump`: orders, filters and escapes, also beside a running engine; it changes no byte.

use std::path::Path;
use std::process::Command;

use crate::common::{small, soon, tree};
use corelane::EventLog;
use corelane::envelope::Envelope;

const SHARDS: u16 = 2;

/// Runs the command. Returns its lines and its standard error.
fn dump(dir: &Path, args: &[&str]) -> (Vec<serde_json::Value>, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_corelane"));
    let output = command.arg("dump").arg(dir).args(args).stdin(std::process::Stdio::null()).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(0), "{said}");
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.chars().all(|c| c == '\n' || !c.is_control()), "control characters are escaped");
    (text.lines().map(|line| serde_json::from_str(line).unwrap()).collect(), said)
}

/// The numbers in the payloads.
fn numbers(dir: &Path, args: &[&str]) -> Vec<u64> {
    let (lines, said) = dump(dir, args);
    assert_eq!(said, "", "{args:?}");
    lines.iter().map(|line| line["payload"].as_u64().unwrap()).collect()
}

/// Publishes twelve events of four users, two of them with text ids; event `n` has second `37 * n % 12`.
fn publish(engine: &EventLog<Envelope>) {
    let mut producer = engine.producer();
    for n in 0..12 {
        let name = if n % 3 == 0 { "hit" } else { "talk" };
        let event = match n % 4 {
            0 => Envelope::new(name, "ana", &n.to_string()),
            1 => Envelope::new(name, "b\u{1b}[31mo\u{9b}b", &n.to_string()),
            user => Envelope::new(name, user, &n.to_string()),
        };
        let event = event.unwrap().at_ms(1000 * (37 * n % 12)).unwrap();
        drop(producer.publish(event.key(), event).unwrap());
    }
    engine.flush(soon()).unwrap();
}

#[test]
fn every_filter_and_both_orders_select_exactly_the_right_events() {
    let dir = tempfile::tempdir().unwrap();
    let engine = EventLog::open(small(dir.path()).shards(SHARDS)).unwrap();
    publish(&engine);
    let sorted = |mut numbers: Vec<u64>| {
        numbers.sort_unstable();
        numbers
    };
    let all: Vec<u64> = (0..12).collect();
    let by_time = |wanted: &[u64]| {
        let mut wanted = wanted.to_vec();
        wanted.sort_unstable_by_key(|n| 37 * n % 12);
        wanted
    };
    // The engine is still running.
    let in_order = numbers(dir.path(), &[]);
    assert_eq!(sorted(in_order.clone()), all);
    assert_eq!(numbers(dir.path(), &["--order", "time"]), by_time(&all));
    let shards: Vec<Vec<u64>> =
        (0..SHARDS).map(|shard| numbers(dir.path(), &["--shard", &shard.to_string()])).collect();
    assert!(shards.iter().all(|numbers| !numbers.is_empty()), "both shards have events: {shards:?}");
    assert_eq!(shards.concat(), in_order, "shard by shard");
    assert_eq!(numbers(dir.path(), &["--key", "2"]), [2, 6, 10]);
    assert_eq!(numbers(dir.path(), &["--user", "ana"]), [0, 4, 8]);
    assert_eq!(sorted(numbers(dir.path(), &["--type", "hit"])), [0, 3, 6, 9]);
    assert_eq!(sorted(numbers(dir.path(), &["--type", "1"])), all, "the type id of the generic event");
    let late = numbers(dir.path(), &["--order", "time", "--from", "4000", "--until", "7000"]);
    assert_eq!(late, by_time(&all)[4..=7]);
    assert_eq!(numbers(dir.path(), &["--order", "time", "--limit", "3"]), by_time(&all)[..3]);
    assert_eq!(numbers(dir.path(), &["--limit", "5"]), in_order[..5]);
    assert_eq!(numbers(dir.path(), &["--type", "hit", "--user", "ana", "--order", "time"]), by_time(&[0]));
    assert!(numbers(dir.path(), &["--limit", "0"]).is_empty());
    engine.shutdown(soon()).unwrap();
}

#[test]
fn every_line_names_the_events_user_and_its_place_in_the_log() {
    let dir = tempfile::tempdir().unwrap();
    let engine = EventLog::open(small(dir.path()).shards(SHARDS)).unwrap();
    publish(&engine);
    engine.shutdown(soon()).unwrap();
    let before = tree(dir.path());
    let (lines, _) = dump(dir.path(), &["--order", "time"]);
    assert!(tree(dir.path()) == before, "no byte changed");
    for line in &lines {
        let n = line["payload"].as_u64().unwrap();
        let expected = match n % 4 {
            0 => serde_json::json!("ana"),
            1 => serde_json::json!("b\u{1b}[31mo\u{9b}b"),
            user => serde_json::json!(user),
        };
        assert_eq!(line["user_id"], expected);
        assert_eq!(line["timestamp"], 1000 * (37 * n % 12));
        assert_eq!(line["version"], n / 4 + 1, "the third of its user's events is its third version");
        let (shard, offset) = (line["shard"].as_u64().unwrap(), line["offset"].as_u64().unwrap());
        assert_eq!(line["event_id"], format!("{shard}-{offset}"));
    }
}

#[test]
fn a_missing_event_type_is_reported_but_not_one_that_other_filters_hide() {
    let dir = tempfile::tempdir().unwrap();
    let engine = EventLog::open(small(dir.path()).shards(SHARDS)).unwrap();
    publish(&engine);
    engine.shutdown(soon()).unwrap();
    for order in ["log", "time"] {
        let (lines, said) = dump(dir.path(), &["--type", "hti", "--order", order]);
        assert!(lines.is_empty() && said.contains("no event of type \"hti\" was found"), "{said}");
        assert!(numbers(dir.path(), &["--type", "hit", "--from", "99000", "--order", order]).is_empty());
    }
}
