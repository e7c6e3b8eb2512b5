//! A store belongs to one engine: a second one is refused and changes nothing.

use std::path::Path;
use std::process::Command;

use crate::common::{Note, os_cache, small, soon, tree};
use corelane::{EventLog, Key, OpenError};

fn running(dir: &Path) -> EventLog<Note> {
    let engine = EventLog::<Note>::open(small(dir)).unwrap();
    let mut producer = engine.producer();
    producer.publish(Key(1), Note::new(1)).unwrap();
    engine.flush(soon()).unwrap();
    // Waits until the next segment is prepared, so that the files no longer change.
    let mut before = tree(dir);
    loop {
        std::thread::sleep(std::time::Duration::from_millis(50));
        let now = tree(dir);
        if now == before && now.keys().any(|path| path.ends_with("000000000001.seg")) {
            return engine;
        }
        before = now;
    }
}

#[test]
fn a_second_engine_of_the_process_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let engine = running(dir.path());
    let before = tree(dir.path());
    let error = EventLog::<Note>::open(small(dir.path())).expect_err("locked");
    assert!(matches!(&error, OpenError::Locked { dir: locked } if locked == dir.path()), "{error}");
    assert!(tree(dir.path()) == before, "no byte changed");
    engine.shutdown(soon()).unwrap();
    assert!(matches!(EventLog::<Note>::open(small(dir.path())), Err(OpenError::Locked { .. })), "held until dropped");
    drop(engine);
    EventLog::<Note>::open(small(dir.path())).unwrap();
}

#[test]
fn a_second_process_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let engine = running(dir.path());
    let before = tree(dir.path());
    let second = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "locked::child_that_opens", "--nocapture"])
        .env("CORELANE_TEST_DIR", dir.path())
        .output()
        .unwrap();
    assert!(second.status.success(), "{}", String::from_utf8_lossy(&second.stderr));
    assert!(String::from_utf8_lossy(&second.stderr).contains("the store is locked"));
    assert!(tree(dir.path()) == before, "no byte changed");
    drop(engine);
}

/// Runs in a process of its own; does nothing otherwise.
#[test]
fn child_that_opens() {
    let Some(dir) = std::env::var_os("CORELANE_TEST_DIR") else { return };
    assert!(matches!(EventLog::<Note>::open(small(dir)), Err(OpenError::Locked { .. })));
    eprintln!("the store is locked");
}

fn mount(args: &[&str], at: &Path) -> bool {
    Command::new("mount").args(args).arg(at).output().is_ok_and(|output| output.status.success())
}

/// File permissions do not bind root, so the folder is on a file system mounted read-only.
#[test]
fn a_read_only_store_is_an_error_and_not_a_panic() {
    let dir = tempfile::tempdir().unwrap();
    if !mount(&["-t", "tmpfs", "-o", "size=4m", "tmpfs"], dir.path()) {
        eprintln!("skipped: mounting needs root");
        return;
    }
    let outcome = std::panic::catch_unwind(|| {
        let store = dir.path().join("store");
        drop(EventLog::<Note>::open(os_cache(&store)).unwrap());
        assert!(mount(&["-o", "remount,ro"], dir.path()));
        let before = tree(&store);
        let error = EventLog::<Note>::open(os_cache(&store)).expect_err("read-only");
        assert!(
            matches!(&error, OpenError::Io { source, .. } if source.kind() == std::io::ErrorKind::ReadOnlyFilesystem),
            "{error}"
        );
        assert!(tree(&store) == before);
        let error = EventLog::<Note>::open(os_cache(dir.path().join("new"))).expect_err("read-only");
        assert!(matches!(error, OpenError::Io { .. }), "{error}");
    });
    Command::new("umount").arg(dir.path()).status().unwrap();
    outcome.unwrap();
}
