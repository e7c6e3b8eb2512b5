//! The rules of the house, run as a test.
#![expect(clippy::unwrap_used, reason = "a test may unwrap")]

use std::path::{Path, PathBuf};

/// Every source file with its path below `src/`.
fn files() -> Vec<(String, String)> {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    let mut folders: Vec<PathBuf> = vec![src.clone()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path.strip_prefix(&src).unwrap().to_str().unwrap().to_owned();
                files.push((name, std::fs::read_to_string(&path).unwrap()));
            }
        }
    }
    assert!(files.len() > 15, "the sources were found");
    files.sort();
    files
}

/// The source files that are no unit tests.
fn sources() -> Vec<(String, String)> {
    files().into_iter().filter(|(name, _)| !name.ends_with("/tests.rs")).collect()
}

/// The code of a file: without comments, and without its unit tests at the end.
fn code(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let end = text.find("\n#[cfg(test)]\nmod ").or_else(|| text.find("\n#[cfg(all(test")).unwrap_or(text.len());
    text[..end]
        .lines()
        .enumerate()
        .map(|(i, line)| (i + 1, line.split("//").next().unwrap_or(line)))
        .filter(|(_, line)| !line.trim().is_empty())
}

/// Modules that a file names through `crate::`.
fn uses(text: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for (at, line) in code(text) {
        for part in line.split("crate::").skip(1) {
            let module: String = part.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            found.push((at, module));
        }
    }
    found
}

/// What each module may know of (DESIGN §10): itself, the leaves, and these.
fn may_use(file: &str) -> Option<&'static [&'static str]> {
    Some(match file {
        // Windows into everything, for the benches.
        "lib.rs" | "engine.rs" | "bench_support.rs" => return None,
        _ if file.starts_with("engine/") => return None,
        "bounded.rs" => &[],
        "event.rs" => &["bounded", "event", "Config", "sync"],
        "error.rs" => &["event", "Config"],
        "error/code_panic.rs" => &["event"],
        "clock.rs" => &["event"],
        "config.rs" => &["error", "sync"],
        "sync.rs" => &["config"],
        _ if file.starts_with("sync/") => &[],
        "metrics.rs" => &["event", "error", "sync", "clock"],
        "handler.rs" => &["event", "error"],
        "aggregate.rs" => &["bounded", "event", "Sequence", "EventLog"],
        "command.rs" => {
            &["aggregate", "event", "error", "config", "sync", "clock", "keys", "producer", "promise", "Engine"]
        }
        _ if file.starts_with("command/") => &["aggregate", "event", "error", "sync"],
        "promise.rs" => &["error", "sync"],
        "history.rs" => &["aggregate", "event", "error", "log", "snapshot"],
        "snapshot.rs" => &[],
        "snapshot/format.rs" => &["aggregate", "command", "event", "keys", "log"],
        "snapshot/taker.rs" => &["aggregate", "clock", "command", "event", "keys", "snapshot", "sync", "Engine"],
        "snapshot/store.rs" => &["error", "event", "log", "snapshot", "sync"],
        "snapshot/snapshotter.rs" => &["config", "error", "event", "log", "snapshot", "sync", "clock"],
        "snapshot/load.rs" => &["aggregate", "event", "keys", "log", "snapshot", "sync"],
        _ if file.starts_with("view/") => &["aggregate", "event", "error", "config", "sync", "view"],
        "keys.rs" => &["event", "sync"],
        "ring.rs" => &["event", "clock", "sync"],
        "producer.rs" => {
            &["event", "error", "config", "sync", "clock", "ring", "log", "shared", "SharedProducer", "Engine"]
        }
        "producer/receipt.rs" => &["event", "error", "promise", "sync"],
        "shared.rs" => &["event", "error", "config", "sync", "clock", "ring", "producer", "promise", "Producer"],
        "shard.rs" => &[
            "aggregate",
            "command",
            "event",
            "error",
            "config",
            "sync",
            "clock",
            "ring",
            "producer",
            "shared",
            "handler",
            "keys",
            "log",
            "metrics",
            "snapshot",
            "view",
        ],
        "shard/batch.rs" => &[
            "aggregate",
            "event",
            "error",
            "sync",
            "clock",
            "ring",
            "producer",
            "keys",
            "log",
            "shard",
            "snapshot",
            "view",
        ],
        "shard/commands.rs" => &["aggregate", "command", "event", "error", "handler", "log", "sync"],
        "shard/handling.rs" => &["aggregate", "event", "error", "handler", "log"],
        "gated.rs" => &["clock", "consumer", "error", "event", "flush", "log", "producer", "sync", "Engine"],
        // What the gate's owner is told, and what a gate leaves on the disk: no lanes.
        "gated/answer.rs" => &["consumer", "error", "event", "producer"],
        "gated/files.rs" => &["error", "event", "log"],
        "gated/record.rs" => &["error", "event", "log"],
        "gated/recovered.rs" => &["consumer", "error", "event", "log"],
        // From outside: every file, and no engine.
        "check.rs" => &["error", "event", "gated", "log", "scan", "snapshot"],
        "flush.rs" => &["error", "sync", "log", "producer", "promise"],
        "runner.rs" => {
            &["aggregate", "event", "error", "config", "handler", "sync", "clock", "producer", "promise", "shard"]
        }
        _ if file.starts_with("envelope/") => &["event", "error"],
        // Durable: the log's storage and words of bytes, none of its segments.
        _ if file.starts_with("consumer/dead_letter") => &["event", "error", "config", "log"],
        // The leaves: plain data, not even the log.
        _ if ["lanes", "retry", "health", "sequence_gate", "mod.rs", "error.rs", "effects.rs"]
            .iter()
            .any(|leaf| file.strip_prefix("consumer/").is_some_and(|file| file.starts_with(leaf))) =>
        {
            &["event", "error", "config", "consumer", "handler", "sync"]
        }
        // Reads the log, never a shard.
        _ if file.starts_with("consumer/") => {
            &["event", "error", "config", "consumer", "handler", "log", "sync", "clock", "promise"]
        }
        // Read models see states, never who keeps them.
        _ if file.starts_with("view/") => &["event", "error", "config", "sync", "aggregate", "view"],
        // The faulty twin stands beside the log's storage.
        "testing.rs" => &["log", "sync"],
        // Rules without an engine: what a fold needs of events, and a record's header for their `Meta`.
        "testing/given.rs" => &["aggregate", "event", "log"],
        // Only the syncer tells lanes how far they are durable.
        "log/syncer.rs" => &["event", "error", "config", "sync", "clock", "metrics", "log", "producer"],
        // Recovery folds the log into states, from what is saved of them.
        "log/recovery.rs" | "log/recovery/begin.rs" => &["aggregate", "event", "error", "sync", "log", "snapshot"],
        "log/unfit.rs" => &["error", "snapshot"],
        "log/fold.rs" => &["aggregate", "command", "error", "event", "keys", "log"],
        "log/reader.rs" => &["aggregate", "event", "error", "sync", "log", "OpenError"],
        "log/keeper.rs" => &["event", "error", "config", "sync", "clock", "metrics", "log", "snapshot"],
        _ if file.starts_with("log/") => &["event", "error", "config", "sync", "clock", "metrics", "log"],
        _ if file.starts_with("bin/") => &[],
        _ => panic!("{file}: a new module; say in tests/tidy.rs what it may know of"),
    })
}

#[test]
fn dependencies_point_one_way() {
    let mut wrong = Vec::new();
    for (file, text) in sources() {
        let Some(allowed) = may_use(&file) else { continue };
        for (line, module) in uses(&text) {
            if !allowed.contains(&module.as_str()) {
                wrong.push(format!("src/{file}:{line} knows of {module}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn unsafe_stays_where_it_is_argued() {
    let places = ["log/mmap.rs", "ring.rs", "sync.rs"];
    for (file, text) in sources() {
        if places.contains(&file.as_str()) {
            continue;
        }
        for (line, code) in code(&text) {
            let words = code.split(|c: char| !c.is_alphanumeric() && c != '_');
            assert!(
                words.into_iter().all(|word| word != "unsafe"),
                "src/{file}:{line}: unsafe belongs into {places:?}"
            );
        }
    }
}

#[test]
fn atomics_and_threads_come_through_sync() {
    // Exceptions, and why:
    let excepted = [
        ("sync.rs", "", "the importer"),
        ("sync/seed.rs", "std::sync::atomic", "two words of a process, set once; loom has no statics"),
        ("log/mmap.rs", "std::sync::atomic", "an atomic view of mapped bytes, which loom cannot model"),
        ("engine/open.rs", "std::sync::atomic", "counts shards to recover, inside one scope"),
        ("check.rs", "std::thread", "a sleep of a tool that reads files"),
        ("log/scan/mod.rs", "std::thread", "a sleep of a tool that reads files; no thread of the engine runs it"),
        ("log/scan/records.rs", "std::thread", "likewise"),
        ("engine/open.rs", "std::thread", "helpers inside one scope"),
        ("engine/threads.rs", "std::thread", "named threads and a sleep; loom models the protocols, not the engine"),
    ];
    for (file, text) in sources() {
        for (line, code) in code(&text) {
            for what in ["std::sync::atomic", "std::sync::Mutex", "std::sync::RwLock", "std::thread", "core::sync"] {
                if code.contains(what) && !file.starts_with("bin/") {
                    let is_excepted =
                        excepted.iter().any(|(at, which, _)| *at == file && (which.is_empty() || *which == what));
                    assert!(is_excepted, "src/{file}:{line}: {what} comes through crate::sync");
                }
            }
        }
    }
}

#[test]
fn time_is_read_in_one_place() {
    for (file, text) in sources() {
        for (line, code) in code(&text) {
            assert!(
                file == "clock.rs" || !code.contains("SystemTime::now"),
                "src/{file}:{line}: wall time is read by clock.rs"
            );
        }
    }
}

#[test]
fn files_stay_readable() {
    for (file, text) in files() {
        let lines = text.lines().count();
        assert!(lines <= 700, "src/{file} has {lines} lines, more than 700");
        for (line, code) in code(&text) {
            assert!(!code.contains("todo!(") && !code.contains("unimplemented!("), "src/{file}:{line}: unfinished");
            assert!(line > 1 || text.starts_with("//!"), "src/{file}: opens with its job");
        }
    }
}

#[test]
fn errors_are_not_dropped_unseen() {
    for (file, text) in sources() {
        for (line, code) in code(&text) {
            let code = code.trim_start();
            let dropped = code.strip_prefix("let _ = ").is_some_and(|what| what.find('(').is_some_and(|at| at > 0));
            assert!(!dropped, "src/{file}:{line}: a result dropped unseen");
        }
    }
}
