//! Edge cases of the load generator: unusable folders, full disks, unwritable output.

use std::fs::{self, OpenOptions};
use std::path::Path;
use std::process::Command;

use clap::Parser as _;

use super::*;
use crate::load::{Phase, Session};

fn args(more: &[&str]) -> Args {
    Args::try_parse_from([&["loadgen"], more].concat()).expect("a command line")
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a plain path")
}

fn refused(more: &[&str]) -> String {
    format!("{:#}", run::check_places(&args(more)).expect_err("refused"))
}

#[test]
fn unusable_folders_are_rejected_before_the_run() {
    let dir = tempfile::tempdir().expect("a folder");
    let (file, data) = (dir.path().join("file"), dir.path().join("data"));
    fs::write(&file, b"kept").expect("written");
    for out in [file.clone(), file.join("below")] {
        let error = refused(&["--out", text(&out), "--data-dir", text(&data)]);
        assert!(error.contains("--out") && error.contains(text(&out)), "{error}");
    }
    let error = refused(&["--out", text(&data.join("report")), "--data-dir", text(&data)]);
    assert!(error.contains("must not lie in"), "{error}");
    let error = refused(&["--data-dir", text(&file)]);
    assert!(error.contains(text(&file)), "{error}");
    let error = refused(&["--data-dir", text(dir.path())]);
    assert!(error.contains("neither empty nor a store"), "{error}");
    assert_eq!(fs::read(&file).expect("read"), b"kept");
    let error = refused(&["--data-dir", text(&data), "--events", "1000G"]);
    assert!(error.contains("free, and the run takes at least"), "{error}");
    assert!(!data.exists(), "no file is left");
    let fits = ["--events", "1k", "--warmup", "0", "--segment-bytes", "64k", "--ring-capacity", "64"];
    let out = dir.path().join("report");
    let report = ["--out", text(&out), "--data-dir", text(&data)];
    run::check_places(&args(&[&fits[..], &report[..]].concat())).expect("fine");
}

#[test]
fn senseless_values_are_rejected_and_large_ones_do_not_wrap() {
    let parse = |more: &[&str]| Args::try_parse_from([&["loadgen"], more].concat());
    for bad in [
        &["--duration", "99999999h"][..],
        &["--find-max", "--repeat", "3"],
        &["--find-max", "--rate", "3"],
        &["--producers", "0"],
        &["--users", "0"],
        &["--repeat", "0"],
    ] {
        assert!(parse(bad).is_err(), "{bad:?}");
    }
    assert!(args(&["--payload", "32768", "--segment-bytes", "64k"]).check().is_err(), "no segment has room for it");
    for bad in [
        &["--find-max", "--step", "0s"][..],
        &["--find-max", "--p99-max", "0"],
        &["--events", "0"],
        &["--duration", "0"],
    ] {
        assert!(args(bad).check().is_err(), "{bad:?}");
    }
    let huge =
        args(&["--shards", "1024", "--retention-bytes", "8000000000000000000", "--events", "8000000000000000000"]);
    assert_eq!(huge.warmup(), 8_000_000_000_000_000_000, "at most the events");
    assert_eq!(huge.bytes_min(), u64::MAX);
}

#[test]
fn a_run_on_a_full_disk_ends_with_the_reason() {
    let dir = tempfile::tempdir().expect("a folder");
    let sh = |script: String| Command::new("sh").args(["-c", &script]).output().is_ok_and(|out| out.status.success());
    if !sh(format!("mount -t tmpfs -o size=3m tmpfs {}", dir.path().display())) {
        eprintln!("skipped: mounting needs root");
        return;
    }
    let ran = std::panic::catch_unwind(|| {
        let ballast = dir.path().join("ballast");
        fs::write(&ballast, vec![1; 1 << 20]).expect("written");
        let small = ["--segment-bytes", "64k", "--ring-capacity", "64", "--pin", "none", "--users", "10"];
        ["os", "group"].map(|durability| {
            let args = args(&[&small[..], &["--durability", durability]].concat());
            let (store, feeds) = (dir.path().join(durability), vec![Games::new(&args, 0)]);
            let mut session = Session::<Stateless<GameEvent>, _>::open(&args, store.clone(), feeds).expect("opens");
            let phase = Phase { events: Some(1_000_000), duration: None, rate: None, name: "filling" };
            let error = session.run(&phase).err();
            // Makes room, so that closing need not wait.
            fs::remove_file(&ballast).expect("removed");
            drop(session);
            fs::remove_dir_all(store).expect("removed");
            fs::write(&ballast, vec![1; 1 << 20]).expect("written");
            error
        })
    });
    assert!(sh(format!("umount {}", dir.path().display())));
    for error in ran.expect("no panic") {
        let error = format!("{:#}", error.expect("a full disk"));
        assert!(error.contains("nothing was appended") && error.contains("No space left"), "{error}");
    }
}

#[test]
fn unwritable_output_is_an_error_but_a_closed_pipe_is_not() {
    let mut full = OpenOptions::new().write(true).open("/dev/full").expect("opens");
    let error = print_to(&mut full, "results").expect_err("full");
    assert!(format!("{error:#}").starts_with("writing the results"), "{error:#}");
    let (reader, mut writer) = io::pipe().expect("a pipe");
    drop(reader);
    print_to(&mut writer, "results").expect("a closed pipe is not an error");
}
