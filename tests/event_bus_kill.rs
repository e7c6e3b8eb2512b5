//! kill -9 of the example `event_bus` while it reads recorded matches: after a restart, its analytics has counted every
//! event once. The input is `../shared/data/games-a.jsonl.gz` if it exists, or else generated events in the same
//! format.
#![expect(clippy::unwrap_used, reason = "a test may unwrap")]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use flate2::read::MultiGzDecoder;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use rusqlite::{Connection, OpenFlags};

/// The number of input lines to use.
const LINES: u64 = 50_000;
/// Kills per store.
const KILLS: u64 = 3;

/// Builds the example with the profile of this test. Returns its path.
fn example() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let profile_dir = test.parent().unwrap().parent().unwrap();
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["build", "--quiet", "--example", "event_bus", "--target-dir"]).arg(profile_dir.parent().unwrap());
    if profile_dir.ends_with("release") {
        cargo.arg("--release");
    }
    assert!(cargo.current_dir(env!("CARGO_MANIFEST_DIR")).status().unwrap().success());
    profile_dir.join("examples/event_bus")
}

fn input(dir: &Path) -> PathBuf {
    let recorded = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/data/games-a.jsonl.gz");
    if recorded.exists() {
        return recorded;
    }
    let mut random = StdRng::seed_from_u64(1);
    let path = dir.join("generated.jsonl");
    let mut file = std::io::BufWriter::new(File::create(&path).unwrap());
    for n in 0..LINES {
        let kind = ["player.move", "player.kill", "item.pickup", "player.levelup"][random.random_range(0..20) / 7];
        let user = random.random_range(0..500);
        let (timestamp, correlation) = (1_700_000_000_000 + n, n / 5_000);
        writeln!(
            file,
            r#"{{"event_type":"{kind}","timestamp":{timestamp},"user_id":{user},"correlation_id":"match-{correlation}","payload":{{"n":{n}}}}}"#
        )
        .unwrap();
    }
    file.into_inner().unwrap();
    path
}

/// The types of the input's events, in input order.
fn types(input: &Path) -> Vec<String> {
    let mut file = BufReader::new(File::open(input).unwrap());
    let is_gzip = file.fill_buf().unwrap().starts_with(&[0x1f, 0x8b]);
    let text: Box<dyn BufRead> =
        if is_gzip { Box::new(BufReader::new(MultiGzDecoder::new(file))) } else { Box::new(file) };
    let kind = |line: String| {
        let event: serde_json::Value = serde_json::from_str(&line).unwrap();
        event["event_type"].as_str().unwrap().to_owned()
    };
    text.lines().take(LINES as usize).map(|line| kind(line.unwrap())).collect()
}

fn count<'t>(types: impl IntoIterator<Item = &'t String>) -> BTreeMap<String, u64> {
    let mut counts = BTreeMap::new();
    types.into_iter().for_each(|kind| *counts.entry(kind.clone()).or_insert(0) += 1);
    counts
}

/// The counts in the database, which may be in use; empty if the database does not exist yet.
fn counted(data_dir: &Path) -> BTreeMap<String, u64> {
    let look = || {
        let path = data_dir.join("analytics.sqlite");
        let database = Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
        let mut select = database.prepare("select event_type, events from counts")?;
        let rows = select.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
        rows.collect::<rusqlite::Result<_>>()
    };
    look().unwrap_or_default()
}

fn start(example: &Path, input: &Path, data_dir: &Path, shards: u16) -> Child {
    let mut command = Command::new(example);
    command.arg("--input").arg(input).args(["--lines", &LINES.to_string(), "--shards", &shards.to_string()]);
    command.arg("--data-dir").arg(data_dir).arg("--facts").arg(data_dir.with_extension("json"));
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

#[test]
fn a_killed_analytics_counts_every_event_once() {
    let dir = tempfile::tempdir().unwrap();
    let (example, input) = (example(), input(dir.path()));
    let types = types(&input);
    assert_eq!(types.len() as u64, LINES);
    let expected = count(&types);
    let seed = std::process::id().into();
    let (mut random, mut in_the_middle) = (StdRng::seed_from_u64(seed), 0);
    for shards in [1, 2] {
        let data_dir = dir.path().join(format!("shards-{shards}"));
        for kill in 0..KILLS {
            // The first kill comes early, while files are created; each later one after more events are counted.
            let enough = LINES * kill / KILLS + random.random_range(0..LINES / KILLS / 2);
            let mut child = start(&example, &input, &data_dir, shards);
            if kill > 0 {
                let end = Instant::now() + Duration::from_secs(30);
                while counted(&data_dir).values().sum::<u64>() < enough && Instant::now() < end {
                    std::thread::sleep(Duration::from_millis(2));
                }
            }
            std::thread::sleep(Duration::from_micros(random.random_range(0..20_000)));
            child.kill().unwrap();
            let output = child.wait_with_output().unwrap();
            let why = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(
                output.status.success() || output.status.code().is_none(),
                "seed {seed}: the example failed by itself: {why}"
            );
            let found = counted(&data_dir);
            let events: u64 = found.values().sum();
            in_the_middle += u64::from(events > 0 && events < LINES);
            // With one shard, the log has the order of the input.
            if shards == 1 {
                assert_eq!(
                    found,
                    count(&types[..events as usize]),
                    "seed {seed}, kill {kill}: not a prefix of the input"
                );
            }
        }
        let output = start(&example, &input, &data_dir, shards).wait_with_output().unwrap();
        assert!(output.status.success(), "seed {seed}: {}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(counted(&data_dir), expected, "seed {seed}, {shards} shards");
        let facts: serde_json::Value =
            serde_json::from_slice(&fs::read(data_dir.with_extension("json")).unwrap()).unwrap();
        assert_eq!(facts, serde_json::json!({ "events_by_type": expected }));
    }
    assert!(in_the_middle > 0, "no kill came in the middle of the input");
}
