//! QEMU's tools as judges of image files.
//!
//! Every function runs one tool and passes on what it said; which verdict a test wants is the
//! test's business. The images must not be in use by a server.

use super::Failure;
use super::command::{LIMIT, run_command};
use super::corpus::{self, Image};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;
use tempfile::TempDir;

/// Exit codes of `qemu-img check`, and so of `qblkd check`.
pub(crate) const CHECK_CLEAN: i32 = 0;
pub(crate) const CHECK_LEAKS: i32 = 3;

/// The exit code of `qemu-img check`.
pub(crate) fn check(file: &Path) -> Result<i32, Failure> {
    let mut command = Command::new("qemu-img");
    let words = ["check", "-q", "-f", "qcow2"];
    run_command(command.args(words).arg(file), LIMIT)?.code()
}

/// An error unless `qemu-img check` exits with one of `accepted`; the error has all that it said.
pub(crate) fn expect_check(file: &Path, accepted: &[i32]) -> Result<(), Failure> {
    let mut command = Command::new("qemu-img");
    let finished = run_command(command.args(["check", "-f", "qcow2"]).arg(file), LIMIT)?;
    if accepted.contains(&finished.code()?) {
        return Ok(());
    }
    Err(format!("qemu-img check: {finished:?}").into())
}

/// Waits until nobody holds a lock on `file`: the kernel gives back that of a killed server only when
/// its last host operations are done.
pub(crate) fn wait_for_lock(file: &Path) -> Result<(), Failure> {
    let started = Instant::now();
    loop {
        let mut command = Command::new("qemu-img");
        let finished = run_command(command.args(["info", "-f", "qcow2"]).arg(file), LIMIT)?;
        if finished.status.success() {
            return Ok(());
        }
        if !finished.stderr.contains("lock") || started.elapsed() > LIMIT {
            return Err(format!("qemu-img info: {finished:?}").into());
        }
    }
}

/// `qemu-img compare` finds `file` equal to a raw file.
pub(crate) fn compare(format: &str, file: &Path, raw: &Path) -> Result<(), Failure> {
    let mut command = Command::new("qemu-img");
    command
        .args(["compare", "-U", "-f", format, "-F", "raw"])
        .arg(file)
        .arg(raw);
    run_command(&mut command, LIMIT)?.success()?;
    Ok(())
}

/// Every internal snapshot in `file` still has the content that it had in the corpus.
pub(crate) fn compare_snapshots(image: &Image, file: &Path) -> Result<(), Failure> {
    let found = file.with_extension("snapshot.raw");
    for snapshot in &image.snapshots {
        let mut convert = Command::new("qemu-img");
        convert.args(["convert", "-f", "qcow2", "-O", "raw"]);
        convert
            .args(["-l", &format!("snapshot.id={}", snapshot.id)])
            .arg(file)
            .arg(&found);
        run_command(&mut convert, LIMIT)?.success()?;
        let same = compare("raw", &found, &corpus::folder().join(&snapshot.raw));
        same.map_err(|failure| format!("snapshot {}: {failure}", snapshot.id))?;
    }
    Ok(())
}

/// Makes a qcow2 image of `size` bytes, with `options` in the form of `qemu-img create -o`.
pub(crate) fn create(file: &Path, size: u64, options: &str) -> Result<(), Failure> {
    let mut command = Command::new("qemu-img");
    command.args(["create", "-q", "-f", "qcow2", "-o", options]);
    run_command(command.arg(file).arg(size.to_string()), LIMIT)?.success()?;
    Ok(())
}

/// An empty image of 64 KiB clusters in a folder of its own.
pub(crate) fn new_image(size: u64) -> Result<(TempDir, PathBuf), Failure> {
    let dir = TempDir::with_prefix("qblkd-")?;
    let file = dir.path().join("disk.qcow2");
    create(&file, size, "cluster_size=64k")?;
    Ok((dir, file))
}

/// What a tool prints as JSON.
pub(crate) fn json_of(command: &mut Command) -> Result<Value, Failure> {
    let finished = run_command(command, LIMIT)?.success()?;
    Ok(serde_json::from_str(&finished.stdout)?)
}
