//! The conditions of a measurement: processor, cores, filesystem, commit.

use std::fs;
use std::path::Path;
use std::process::Command;

/// The facts needed to compare figures.
#[derive(Debug, Clone)]
pub(crate) struct Machine {
    pub(crate) cpu: String,
    pub(crate) cores: usize,
    pub(crate) filesystem: String,
    pub(crate) commit: String,
    pub(crate) kernel: String,
}

impl Machine {
    /// Detects the machine's facts. `dir` is the existing folder of the data.
    pub(crate) fn detect(dir: &Path, cores: usize) -> Self {
        Self { cpu: cpu(), cores, filesystem: filesystem(dir), commit: commit(), kernel: kernel() }
    }
}

fn unknown() -> String {
    "unknown".to_owned()
}

fn cpu() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    model.map_or_else(unknown, |(_, model)| model.trim().to_owned())
}

fn kernel() -> String {
    fs::read_to_string("/proc/sys/kernel/osrelease")
        .map_or_else(|_| unknown(), |release| format!("Linux {}", release.trim()))
}

/// Returns the type and the device of the mount that contains `dir`.
fn filesystem(dir: &Path) -> String {
    let Ok(dir) = dir.canonicalize() else { return unknown() };
    let mounts = fs::read_to_string("/proc/mounts").unwrap_or_default();
    let mount = |line: &str| {
        let mut fields = line.split(' ').map(|field| field.replace("\\040", " "));
        let (device, point, kind) = (fields.next()?, fields.next()?, fields.next()?);
        dir.starts_with(&point).then_some((point.len(), format!("{kind} ({device})")))
    };
    // A later mount on the same point hides an earlier one; max_by_key keeps the last.
    mounts.lines().filter_map(mount).max_by_key(|(length, _)| *length).map_or_else(unknown, |(_, name)| name)
}

fn commit() -> String {
    let git = |args: &[&str]| {
        let output = Command::new("git").arg("-C").arg(env!("CARGO_MANIFEST_DIR")).args(args).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let Some(commit) = git(&["rev-parse", "--short=12", "HEAD"]) else { return unknown() };
    let clean = git(&["status", "--porcelain", "--untracked-files=no"]).is_some_and(|changes| changes.is_empty());
    if clean { commit } else { format!("{commit} with local changes") }
}

/// Returns the resident bytes of this process, anonymous and of mapped files, or `None` if the system does not report
/// them.
pub(crate) fn resident() -> Option<(u64, u64)> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let of = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? * 1024)
    };
    Some((of("RssAnon:")?, of("RssFile:")?))
}
