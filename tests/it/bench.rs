//! The benchmarks run: a short run of each script, whose figures mean nothing.

use crate::support::command::{Finished, run, run_command};
use crate::support::{QBLKD, have_tools};
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use tempfile::TempDir;

/// What a short run may take on a machine that does much else.
const LIMIT: Duration = Duration::from_secs(300);

fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("contrib/bench")
        .join(name)
}

/// The load generator, beside the program under test. `cargo test` has built it, unless it was asked
/// for this test binary alone.
fn client() -> PathBuf {
    let folder = Path::new(QBLKD).parent().unwrap();
    let client = folder.join("examples/blkclient");
    if !client.exists() {
        let mut build = Command::new(env!("CARGO"));
        build
            .args(["build", "--locked", "--example", "blkclient"])
            .arg("--target-dir")
            .arg(folder.parent().unwrap())
            .current_dir(env!("CARGO_MANIFEST_DIR"));
        run_command(&mut build, LIMIT).unwrap().success().unwrap();
    }
    client
}

fn snapshot_stall(server: &str, scratch: &Path) -> Finished {
    let images = scratch.join("images");
    fs::create_dir(&images).unwrap();
    let mut command = Command::new(script("snapshot-stall"));
    command
        .args(["--quick", "--medium", "tmpfs", "--server", server])
        .arg("--qblkd")
        .arg(QBLKD)
        .arg("--client")
        .arg(client())
        .arg("--dir")
        .arg(&images)
        .arg("--out")
        .arg(scratch.join("pictures"));
    let finished = run_command(&mut command, LIMIT).unwrap().success().unwrap();
    assert_eq!(fs::read_dir(&images).unwrap().count(), 0, "images are left");
    finished
}

/// The cell of a row of the table that begins with these words.
fn cell<'a>(finished: &'a Finished, what: &str, server: &str) -> &'a str {
    let start = format!("| {what} | {server} | ");
    let row = finished
        .stdout
        .lines()
        .find_map(|line| line.strip_prefix(&start));
    row.and_then(|rest| rest.strip_suffix(" |"))
        .unwrap_or_else(|| panic!("no row {start:?}: {finished:?}"))
}

#[test]
fn snapshot_stall_measures_and_draws_both_servers() {
    let tools = ["qemu-storage-daemon", "qemu-img", "python3"];
    if !have_tools("snapshot_stall_measures_and_draws_both_servers", &tools) {
        return;
    }
    let scratch = TempDir::with_prefix("qblkd-").unwrap();
    let finished = snapshot_stall("both", scratch.path());
    for server in ["qblkd", "qemu-storage-daemon"] {
        for what in [
            "longest gap while creating, until settled",
            "longest gap while deleting, until done",
            "create, request to answer, under load",
        ] {
            let cell = cell(&finished, what, server);
            assert!(
                cell.ends_with("ms") || cell.ends_with(" s"),
                "{what}: {cell}"
            );
        }
        let many = format!("20 snapshots created and deleted under load on 1 GiB, {server}: ");
        assert!(finished.stdout.contains(&many), "{finished:?}");
    }
    let first = cell(&finished, "first read after SIGKILL in a settle", "qblkd");
    assert!(first.ends_with("ms") || first.ends_with(" s"), "{first}");
    // `remarks` of the script names what `qemu-img check` has found.
    assert!(!finished.stdout.contains("corruptions"), "{finished:?}");

    let picture = scratch.path().join("pictures/snapshot-stall-1G.svg");
    let picture = fs::read_to_string(picture).unwrap();
    assert!(picture.starts_with("<svg ") && picture.trim_end().ends_with("</svg>"));
    for word in ["qblkd", "qemu-storage-daemon", "create", "answer", "delete"] {
        assert!(picture.contains(&format!(">{word}</text>")), "no {word}");
    }
}

#[test]
fn figures_and_pictures_of_timelines_are_right() {
    if !have_tools("figures_and_pictures_of_timelines_are_right", &["python3"]) {
        return;
    }
    let test = script("stall_timeline_test.py");
    let finished = run("python3", [OsStr::new("-B"), test.as_os_str()]).unwrap();
    finished.success().unwrap();
}
