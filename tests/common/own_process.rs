//! Tests that need a process of their own.

use std::process::Command;

const ALONE: &str = "CORELANE_TEST_ALONE";

/// Runs the test `name` of this program alone in a child process, and fails if it fails there. Returns `true` in the child, where
/// the test must do its work.
pub(crate) fn is_own_process(name: &str) -> bool {
    if std::env::var_os(ALONE).is_some_and(|alone| alone == name) {
        return true;
    }
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env(ALONE, name)
        .output()
        .unwrap();
    let (out, errors) = (String::from_utf8_lossy(&child.stdout), String::from_utf8_lossy(&child.stderr));
    eprint!("{errors}");
    assert!(child.status.success(), "{name} fails in a process of its own: {out}");
    assert!(out.contains("1 passed"), "{name} is not a test of this program: {out}");
    false
}
