//! Runs commands with captured output and a time limit.
//!
//! A process counts as finished when both of its output pipes are closed and it has been reaped; one
//! that is still there at its limit is killed, and that is an error.

use super::Failure;
use std::ffi::OsStr;
use std::io::Read;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

/// Long enough for every tool on a slow machine that is busy with other work. No test claims to be
/// fast by it: it only ends what would hang.
pub(crate) const LIMIT: Duration = Duration::from_secs(300);

/// What a process left behind.
#[derive(Debug)]
pub(crate) struct Finished {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) elapsed: Duration,
}

impl Finished {
    /// The exit code; an error if a signal ended the process.
    pub(crate) fn code(&self) -> Result<i32, Failure> {
        let code = self.status.code();
        code.ok_or_else(|| format!("ended by {}; stderr: {}", self.status, self.stderr).into())
    }

    /// The output of a success; an error otherwise.
    pub(crate) fn success(self) -> Result<Self, Failure> {
        if self.status.success() {
            return Ok(self);
        }
        let (status, stdout, stderr) = (self.status, self.stdout, self.stderr);
        Err(format!("{status}; stdout: {stdout}; stderr: {stderr}").into())
    }
}

/// Reads a pipe to its end on a thread of its own, then sends all of it.
pub(crate) fn drain(mut pipe: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut bytes = Vec::new();
        // What was read up to an error is still worth a report.
        pipe.read_to_end(&mut bytes).ok();
        sender
            .send(String::from_utf8_lossy(&bytes).into_owned())
            .ok();
    });
    receiver
}

/// Runs `program` to its end.
pub(crate) fn run<S: AsRef<OsStr>>(
    program: &str,
    arguments: impl IntoIterator<Item = S>,
) -> Result<Finished, Failure> {
    run_command(Command::new(program).args(arguments), LIMIT)
}

/// Runs a prepared command to its end, for at most `limit`.
pub(crate) fn run_command(command: &mut Command, limit: Duration) -> Result<Finished, Failure> {
    let started = Instant::now();
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command
        .spawn()
        .map_err(|error| format!("{command:?}: {error}"))?;
    let stdout = drain(child.stdout.take().ok_or("no stdout pipe")?);
    let stderr = drain(child.stderr.take().ok_or("no stderr pipe")?);
    let texts = stdout.recv_timeout(limit).and_then(|stdout| {
        let left = limit.saturating_sub(started.elapsed());
        Ok((stdout, stderr.recv_timeout(left)?))
    });
    if texts.is_err() {
        child.kill()?;
    }
    let status = child.wait()?;
    let elapsed = started.elapsed();
    let Ok((stdout, stderr)) = texts else {
        return Err(format!("{command:?} was not done after {limit:?}").into());
    };
    Ok(Finished {
        status,
        stdout,
        stderr,
        elapsed,
    })
}

/// Whether a program is there and answers to `--version`.
pub(crate) fn is_installed(program: &str) -> bool {
    run(program, ["--version"]).is_ok_and(|finished| finished.status.success())
}
