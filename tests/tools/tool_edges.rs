//! Edge cases of the `corelane` tool: paths without a store, contradicting flags, and output that cannot be written.

use std::fs::{File, OpenOptions};
use std::path::Path;
use std::process::{Command, Stdio};

use crate::common::{Note, segment_path, small, soon};
use corelane::{EventLog, Key};

const READING: [&[&str]; 4] = [&["inspect"], &["verify"], &["dump"], &["dlq", "list"]];

fn tool(args: &[&str], dir: &Path, rest: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_corelane"));
    command.args(args).arg(dir).args(rest).stdin(Stdio::null());
    command
}

/// Runs the tool. Returns its status and its standard error.
fn ends(command: &mut Command) -> (Option<i32>, String) {
    let output = command.output().unwrap();
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

fn store(dir: &Path) {
    let engine = EventLog::<Note>::open(small(dir)).unwrap();
    let mut producer = engine.producer();
    (0..2000).for_each(|n| drop(producer.publish(Key(n % 5), Note::sized(n, 100)).unwrap()));
    engine.shutdown(soon()).unwrap();
}

fn full() -> File {
    OpenOptions::new().write(true).open("/dev/full").unwrap()
}

/// The end of a pipe without a reader.
fn unread() -> Stdio {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    writer.into()
}

#[test]
fn a_path_without_a_store_is_named_and_exits_with_status_2() {
    let dir = tempfile::tempdir().unwrap();
    let (file, missing) = (dir.path().join("file"), dir.path().join("missing"));
    std::fs::write(&file, b"no store").unwrap();
    for args in READING {
        for (path, named) in [(dir.path(), "manifest"), (&file, "file"), (&missing, "missing")] {
            let (status, said) = ends(&mut tool(args, path, &[]));
            assert!(status == Some(2) && said.contains(named), "{args:?} {path:?}: {status:?} {said}");
            // The same if the message cannot be written.
            let mut silent = tool(args, path, &[]);
            assert_eq!(silent.stderr(full()).status().unwrap().code(), Some(2), "{args:?} {path:?}");
        }
    }
    assert!(!missing.exists(), "nothing is created");
}

#[test]
fn output_that_cannot_be_written_exits_with_status_2_and_a_closed_pipe_with_status_0() {
    let dir = tempfile::tempdir().unwrap();
    store(dir.path());
    for args in &READING[..3] {
        let (status, said) = ends(tool(args, dir.path(), &[]).stdout(full()));
        assert!(status == Some(2) && said.contains("writing the output"), "{args:?}: {status:?} {said}");
        let (status, said) = ends(tool(args, dir.path(), &[]).stdout(unread()));
        assert_eq!((status, said.as_str()), (Some(0), ""), "{args:?}");
    }
    let path = segment_path(dir.path(), 0);
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[20_000] ^= 1;
    std::fs::write(path, bytes).unwrap();
    let status = tool(&["verify"], dir.path(), &[]).stdout(unread()).stderr(full()).status().unwrap();
    assert_eq!(status.code(), Some(1), "the status reports damage although the output has no reader");
}

#[test]
fn flags_that_select_nothing_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    store(dir.path());
    let (status, said) = ends(&mut tool(&["dump"], dir.path(), &["--from", "5", "--until", "4"]));
    assert!(status == Some(2) && said.contains("--from 5 is after --until 4"), "{status:?} {said}");
    for rest in [&["--shard", "7"][..], &["--shard", "70000"], &["--limit", "-1"], &["--key", "1", "--user", "a"]] {
        assert_eq!(ends(&mut tool(&["dump"], dir.path(), rest)).0, Some(2), "{rest:?}");
    }
    let none = tool(&["dump"], dir.path(), &["--limit", "0"]).output().unwrap();
    assert!(none.status.success() && none.stdout.is_empty(), "no events were requested");
}
