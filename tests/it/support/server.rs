//! A running qblkd: started, waited for, stopped, and never left behind.

use super::command::{self, Finished, LIMIT};
use super::{Failure, QBLKD};
use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// How often the end of the process is looked for while readiness is awaited.
const TICK: Duration = Duration::from_millis(10);

/// What the refusal of a locked image says.
const IN_USE: &str = "in use";

/// A qblkd process. Dropping it kills it.
pub(crate) struct Server {
    pub(crate) socket: PathBuf,
    child: Child,
    started: Instant,
    stdout: Receiver<String>,
    stderr: Receiver<String>,
    /// Holds the sockets; removed when the server is gone.
    _dir: TempDir,
}

impl Server {
    /// Starts a server with `--socket-path` and these arguments, and waits until it has told that it
    /// is ready (`NOTIFY_SOCKET`). If it ends instead, the error is what it said.
    pub(crate) fn start<S: AsRef<OsStr>>(
        arguments: impl IntoIterator<Item = S>,
    ) -> Result<Self, Failure> {
        let dir = TempDir::with_prefix("qblkd-")?;
        let socket = dir.path().join("vhost.sock");
        Self::launch(listen_at(&socket, arguments), socket, dir)
    }

    /// Starts a server on the image of one that was killed. qblkd itself waits for 2 s until the
    /// kernel has given back the lock of a killed process, which it does when the last host
    /// operations of that process are done: on a busy disk this may take longer, so that a refusal
    /// for the lock is no failure yet.
    pub(crate) fn start_after_kill<S: AsRef<OsStr>>(arguments: &[S]) -> Result<Self, Failure> {
        let started = Instant::now();
        loop {
            match Self::start(arguments) {
                Err(failure)
                    if failure.to_string().contains(IN_USE) && started.elapsed() < LIMIT => {}
                outcome => return outcome,
            }
        }
    }

    /// Starts a server that listens at a path of the caller's choice.
    pub(crate) fn start_at<S: AsRef<OsStr>>(
        socket: PathBuf,
        arguments: impl IntoIterator<Item = S>,
    ) -> Result<Self, Failure> {
        let dir = TempDir::with_prefix("qblkd-")?;
        Self::launch(listen_at(&socket, arguments), socket, dir)
    }

    /// Starts a server by a command of the caller's, which ends in qblkd, in the same process, with
    /// `--socket-path` and this socket.
    pub(crate) fn start_command(command: Command, socket: PathBuf) -> Result<Self, Failure> {
        Self::launch(command, socket, TempDir::with_prefix("qblkd-")?)
    }

    /// Starts a server that gets its socket, listening or connected, as standard input; `socket` is
    /// the path that a listening one has.
    pub(crate) fn start_on<S: AsRef<OsStr>>(
        socket_fd: OwnedFd,
        socket: PathBuf,
        arguments: impl IntoIterator<Item = S>,
    ) -> Result<Self, Failure> {
        let mut command = Command::new(QBLKD);
        command.args(["--fd", "0"]).args(arguments).stdin(socket_fd);
        Self::launch(command, socket, TempDir::with_prefix("qblkd-")?)
    }

    fn launch(mut command: Command, socket: PathBuf, dir: TempDir) -> Result<Self, Failure> {
        let notify_path = dir.path().join("notify");
        let notify = UnixDatagram::bind(&notify_path)?;
        notify.set_read_timeout(Some(TICK))?;
        let started = Instant::now();
        let mut child = command
            .env("NOTIFY_SOCKET", &notify_path)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let stdout = command::drain(child.stdout.take().ok_or("no stdout pipe")?);
        let stderr = command::drain(child.stderr.take().ok_or("no stderr pipe")?);
        let mut server = Self {
            socket,
            child,
            started,
            stdout,
            stderr,
            _dir: dir,
        };
        server.wait_until_ready(&notify)?;
        Ok(server)
    }

    fn wait_until_ready(&mut self, notify: &UnixDatagram) -> Result<(), Failure> {
        while self.started.elapsed() < LIMIT {
            let mut message = [0; 4096];
            // An error is the time-out of the socket.
            if let Ok(length) = notify.recv(&mut message)
                && message[..length]
                    .split(|byte| *byte == b'\n')
                    .any(|line| line == b"READY=1")
            {
                return Ok(());
            }
            if let Some(status) = self.child.try_wait()? {
                let stderr = self.stderr.recv_timeout(LIMIT)?;
                return Err(format!("ended at once with {status}: {stderr}").into());
            }
        }
        Err("was not ready in time".into())
    }

    /// Whether the process is still there.
    pub(crate) fn is_alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// The process id, for what measures or signals it.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends SIGTERM and waits for the end.
    pub(crate) fn terminate(self) -> Result<Finished, Failure> {
        self.signal("TERM")?;
        self.finish()
    }

    /// Sends a signal by its name, without SIG. There is no safe call for it in the standard
    /// library, so the shell's own `kill` does it.
    pub(crate) fn signal(&self, name: &str) -> Result<(), Failure> {
        let script = format!("kill -{name} {}", self.id());
        command::run("sh", ["-c", script.as_str()])?.success()?;
        Ok(())
    }

    /// Waits for the process to close its output, and then for its end.
    pub(crate) fn finish(mut self) -> Result<Finished, Failure> {
        let stderr = match self.stderr.recv_timeout(LIMIT) {
            Ok(stderr) => stderr,
            Err(RecvTimeoutError::Timeout) => return Err("did not end in time".into()),
            Err(error) => return Err(error.into()),
        };
        let stdout = self.stdout.recv_timeout(LIMIT)?;
        let status = self.child.wait()?;
        Ok(Finished {
            status,
            stdout,
            stderr,
            elapsed: self.started.elapsed(),
        })
    }
}

fn listen_at<S: AsRef<OsStr>>(socket: &Path, arguments: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(QBLKD);
    command.arg("--socket-path").arg(socket).args(arguments);
    command
}

impl Drop for Server {
    fn drop(&mut self) {
        // Both fail, harmlessly, when it has ended already.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}
