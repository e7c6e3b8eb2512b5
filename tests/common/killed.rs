//! Child processes that are killed while they work.

use std::ffi::OsStr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Runs the test `name` of this program in a child process with `env` and kills it after `delay`, counted from its
/// first bytes in the file `acked`, or from its start if `early`.
pub(crate) fn run_and_kill(name: &str, env: &[(&str, &OsStr)], acked: &Path, early: bool, delay: Duration) {
    let before = std::fs::metadata(acked).unwrap().len();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .envs(env.iter().copied())
        .env("CORELANE_TEST_ACKED", acked)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(5);
    while !early && std::fs::metadata(acked).unwrap().len() == before && Instant::now() < deadline {
        std::thread::sleep(Duration::from_micros(500));
    }
    std::thread::sleep(delay);
    child.kill().unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.code().is_none(), "the child ended by itself: {}", String::from_utf8_lossy(&output.stderr));
}
