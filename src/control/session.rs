//! One client: its stream, what it has sent and not been served yet, what it has not read yet.
//!
//! Invariants: at most [`READ_BYTES_MAX`] of input and one unfinished message are held; a client
//! with more than [`OUTPUT_BUSY_BYTES`] unread is not served further commands until it reads (it
//! waits, and nobody else); one with more than [`OUTPUT_BYTES_MAX`] unread, which only events can
//! cause, is dropped. While a command is being carried out elsewhere no further one of the client is
//! begun, so that its replies come in the order of its requests.

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use epoll::Events;
use rustix::event::{PollFd, PollFlags, Timespec};
use serde_json::Value;

use super::command::Ticket;
use super::wire::{Frame, Framer};

/// The most that is read from one client before the others have their turn.
const READ_BYTES_MAX: usize = 16 * 1024;

/// With this much unread output, no further command of the client is carried out.
const OUTPUT_BUSY_BYTES: usize = 64 * 1024;

/// With this much unread output, the client is beyond hope.
const OUTPUT_BYTES_MAX: usize = 1024 * 1024;
const _: () = assert!(OUTPUT_BUSY_BYTES < OUTPUT_BYTES_MAX);

/// Why a session ends. None of these is an error of ours.
#[derive(Debug, thiserror::Error)]
pub(super) enum Gone {
    #[error("client closed the connection")]
    Closed,
    #[error("client does not read: more than {OUTPUT_BYTES_MAX} bytes are waiting for it")]
    NotReading,
    #[error("connection failed: {0}")]
    Io(#[source] io::Error),
}

/// A command whose reply is not known yet.
#[derive(Debug)]
pub(super) struct Waiting {
    /// Tells it from earlier ones of the same client.
    pub(super) number: u64,
    /// The `id` of its request.
    pub(super) id: Option<Value>,
}

/// A connected client.
#[derive(Debug)]
pub(super) struct Session {
    stream: UnixStream,
    framer: Framer,
    /// Bytes read and not yet framed, from `input_start`.
    input: Vec<u8>,
    input_start: usize,
    /// Bytes not yet written, from `output_start`.
    output: Vec<u8>,
    output_start: usize,
    /// The client will send no more.
    input_ended: bool,
    /// `qmp_capabilities` has been carried out.
    pub(super) negotiated: bool,
    /// The command that is being carried out elsewhere.
    pub(super) waiting: Option<Waiting>,
    command_count: u64,
    /// What the epoll set has been told to wait for.
    pub(super) interest: Events,
}

impl Session {
    /// Takes over a connected stream, which must not block.
    pub(super) fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            framer: Framer::default(),
            input: Vec::new(),
            input_start: 0,
            output: Vec::new(),
            output_start: 0,
            input_ended: false,
            negotiated: false,
            waiting: None,
            command_count: 0,
            interest: Events::empty(),
        }
    }

    fn output_pending_bytes(&self) -> usize {
        self.output.len() - self.output_start
    }

    /// No further command is begun now.
    fn is_busy(&self) -> bool {
        self.waiting.is_some() || self.output_pending_bytes() >= OUTPUT_BUSY_BYTES
    }

    /// Whether the client has closed its end altogether. A client that only sends no more still
    /// reads its replies.
    pub(super) fn is_hung_up(&self) -> bool {
        let mut polled = [PollFd::new(&self.stream, PollFlags::empty())];
        let now = Timespec::default();
        rustix::event::poll(&mut polled, Some(&now)).is_ok_and(|count| count > 0)
    }

    /// The next message of the input at hand; `None` if there is none, or the client has to read
    /// first.
    pub(super) fn next_frame(&mut self) -> Option<Frame> {
        if self.is_busy() {
            return None;
        }
        let (taken, frame) = self.framer.next(&self.input[self.input_start..]);
        self.input_start += taken;
        if self.input_start == self.input.len() {
            // An idle client keeps no buffer.
            self.input = Vec::new();
            self.input_start = 0;
        }
        frame
    }

    /// What the next command is known by until it has its reply; `client` is the session's token.
    pub(super) fn next_ticket(&mut self, client: u64) -> Ticket {
        self.command_count += 1;
        Ticket {
            client,
            number: self.command_count,
        }
    }

    /// Whether there is input at hand that has not been served.
    pub(super) fn has_input(&self) -> bool {
        self.input_start < self.input.len()
    }

    /// Reads once, if everything read before has been served and the client reads its replies.
    pub(super) fn read(&mut self) -> Result<(), Gone> {
        if self.has_input() || self.input_ended || self.is_busy() {
            return Ok(());
        }
        let mut bytes = vec![0; READ_BYTES_MAX];
        match retry(|| self.stream.read(&mut bytes))? {
            Some(0) => self.input_ended = true,
            Some(count) => {
                bytes.truncate(count);
                self.input = bytes;
                self.input_start = 0;
            }
            None => {}
        }
        Ok(())
    }

    /// Queues `message` and writes what the client takes now.
    pub(super) fn send(&mut self, message: &[u8]) -> Result<(), Gone> {
        // Before appending, so that a long reply to a client that reads is never the reason.
        if self.output_pending_bytes() > OUTPUT_BYTES_MAX {
            return Err(Gone::NotReading);
        }
        self.output.extend_from_slice(message);
        self.flush()
    }

    /// Writes what the client takes now.
    pub(super) fn flush(&mut self) -> Result<(), Gone> {
        while self.output_start < self.output.len() {
            let pending = &self.output[self.output_start..];
            match retry(|| self.stream.write(pending))? {
                Some(count) => self.output_start += count,
                None => {
                    // Keeps the written part from growing while the client reads slowly.
                    self.output.drain(..self.output_start);
                    self.output_start = 0;
                    return Ok(());
                }
            }
        }
        self.output = Vec::new();
        self.output_start = 0;
        Ok(())
    }

    /// Whether the session is over: the client sends no more and has all its replies.
    pub(super) fn is_finished(&self) -> bool {
        let served = !self.has_input() && self.waiting.is_none();
        self.input_ended && served && self.output_pending_bytes() == 0
    }

    /// What the session now waits for.
    pub(super) fn wanted(&self) -> Events {
        let mut events = Events::empty();
        events.set(Events::EPOLLIN, !self.input_ended && !self.is_busy());
        // Input at hand was held back while the client was busy; nothing else would wake it up.
        let held_back = self.has_input() && self.waiting.is_none();
        events.set(
            Events::EPOLLOUT,
            self.output_pending_bytes() > 0 || held_back,
        );
        events
    }
}

impl AsRawFd for Session {
    fn as_raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }
}

/// Runs a non-blocking call; `None` if it would block.
fn retry(mut call: impl FnMut() -> io::Result<usize>) -> Result<Option<usize>, Gone> {
    loop {
        match call() {
            Ok(count) => return Ok(Some(count)),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
                ) =>
            {
                return Err(Gone::Closed);
            }
            Err(error) => return Err(Gone::Io(error)),
        }
    }
}
