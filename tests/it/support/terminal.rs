//! Commands on a terminal: Python makes a new one, and passes on what is shown there.

use super::Failure;
use super::command::LIMIT;
use std::ffi::OsStr;
use std::io::Read;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::Instant;

/// Runs a command with a new terminal as its input and outputs, and prints what it shows there.
const ON_A_TERMINAL: &str = "import pty, sys; sys.exit(pty.spawn(sys.argv[1:]) >> 8)";

/// What [`command()`] needs.
pub(crate) const TOOLS: &[&str] = &["python3"];

/// `program`, to be run on a terminal.
pub(crate) fn command<S: AsRef<OsStr>>(
    program: &str,
    arguments: impl IntoIterator<Item = S>,
) -> Command {
    let mut command = Command::new("python3");
    command.args(["-c", ON_A_TERMINAL, program]).args(arguments);
    command.env("TERM", "xterm");
    command
}

/// A command that runs on a terminal. Dropping it kills it.
pub(crate) struct Shown {
    child: Child,
    pieces: Receiver<Vec<u8>>,
    text: String,
}

impl Shown {
    pub(crate) fn start(mut command: Command) -> Result<Self, Failure> {
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.spawn()?;
        let stdout = child.stdout.take().ok_or("no stdout pipe")?;
        Ok(Self {
            child,
            pieces: pieces(stdout),
            text: String::new(),
        })
    }

    /// Waits until these words are on the terminal, as what comes after all words before.
    pub(crate) fn wait_for(&mut self, words: &str) -> Result<(), Failure> {
        let started = Instant::now();
        loop {
            if let Some(at) = self.text.find(words) {
                self.text.drain(..at + words.len());
                return Ok(());
            }
            let left = LIMIT.saturating_sub(started.elapsed());
            match self.pieces.recv_timeout(left) {
                Ok(piece) => self.text.push_str(&String::from_utf8_lossy(&piece)),
                Err(error) => {
                    let text = &self.text;
                    return Err(format!("no '{words}' ({error}) in {text:?}").into());
                }
            }
        }
    }

    /// The exit code.
    pub(crate) fn finish(mut self) -> Result<Option<i32>, Failure> {
        let started = Instant::now();
        while started.elapsed() < LIMIT {
            let left = LIMIT.saturating_sub(started.elapsed());
            // An error is the end of what is shown.
            if self.pieces.recv_timeout(left).is_err() {
                break;
            }
        }
        Ok(self.child.wait()?.code())
    }
}

/// What comes out of a pipe, as it comes.
fn pieces(mut pipe: ChildStdout) -> Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut piece = [0; 4096];
        while let Ok(count @ 1..) = pipe.read(&mut piece) {
            if sender.send(piece[..count].to_vec()).is_err() {
                return;
            }
        }
    });
    receiver
}

impl Drop for Shown {
    fn drop(&mut self) {
        // Both fail, harmlessly, when it has ended already.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}
