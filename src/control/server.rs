//! The listening socket and its sessions, driven by the main thread's `epoll` loop.
//!
//! The server adds and removes its descriptors in the loop's epoll set by itself. Its tokens start
//! at the base it was given: the base is the listener, and each client gets the next number, which
//! is never used again, so that a stale event cannot reach the wrong client.
//!
//! The socket file has mode 0600 from its first instant, replaces a stale one but never a live one,
//! and is removed on drop only if it is still the file that was made here.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime};

use epoll::{ControlOptions, Events};
use log::{debug, info, warn};
use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde_json::{Value, json};

use super::command::{self, Handler, Outcome, Ticket};
use super::error::{BindError, CommandError, PATH_BYTES_MAX};
use super::event::{Event, Throttle};
use super::session::{Gone, Session, Waiting};
use super::wire::{self, Frame};

/// The most clients served at once.
pub const CLIENT_COUNT_MAX: usize = 32;

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 32;

/// The control socket with everything connected to it.
#[derive(Debug)]
pub struct ControlServer {
    /// Dropped before the listener, whose hold on the inode makes its number unique.
    #[expect(dead_code, reason = "kept for its Drop")]
    file: SocketFile,
    listener: UnixListener,
    /// Given up for a moment when the process has run out of descriptors, so that a connection can
    /// be taken off the queue and refused; otherwise the loop would be woken for it without end.
    spare: Option<UnixListener>,
    epoll: RawFd,
    listener_token: u64,
    next_token: u64,
    pub(super) sessions: BTreeMap<u64, Session>,
    throttle: Throttle,
}

impl ControlServer {
    /// Listens at `path` and registers with the epoll set `epoll`. Tokens from `token_base` upwards
    /// belong to the server from now on.
    ///
    /// # Errors
    ///
    /// [`BindError`] if a live socket or something else is in the way, or the host refuses.
    pub fn bind(path: &Path, epoll: RawFd, token_base: u64) -> Result<Self, BindError> {
        let io_error = |action, source: io::Error| BindError::Io {
            action,
            path: path.to_owned(),
            source,
        };
        check_path(path)?;
        remove_stale(path)?;
        let listener =
            UnixListener::from(listen(path).map_err(|errno| io_error("listen on", errno.into()))?);
        let file = SocketFile::new(path).map_err(|error| io_error("examine", error))?;
        let spare = listener
            .try_clone()
            .map_err(|error| io_error("duplicate", error))?;
        register(
            epoll,
            ControlOptions::EPOLL_CTL_ADD,
            &listener,
            Events::EPOLLIN,
            token_base,
        )
        .map_err(|error| io_error("poll", error))?;
        Ok(Self {
            file,
            listener,
            spare: Some(spare),
            epoll,
            listener_token: token_base,
            next_token: token_base + 1,
            sessions: BTreeMap::new(),
            throttle: Throttle::default(),
        })
    }

    /// Whether an epoll event with this token is for [`Self::handle_ready`].
    pub fn owns(&self, token: u64) -> bool {
        token >= self.listener_token
    }

    /// Serves what became ready. Never blocks, and does a bounded amount of work. What goes wrong
    /// ends at most the one session.
    pub fn handle_ready(&mut self, token: u64, handler: &mut dyn Handler) {
        if token == self.listener_token {
            self.accept();
        } else {
            self.with_session(token, |session| serve(session, token, handler));
        }
    }

    /// Sends the reply of a command that was carried out elsewhere, then goes on with what the client
    /// has sent meanwhile. A client that is gone misses its reply, and nobody else anything.
    pub fn answer(
        &mut self,
        ticket: Ticket,
        result: &Result<Value, CommandError>,
        handler: &mut dyn Handler,
    ) {
        self.with_session(ticket.client, |session| {
            let Some(waiting) = session
                .waiting
                .take_if(|waiting| waiting.number == ticket.number)
            else {
                return Ok(());
            };
            reply(session, waiting.id.as_ref(), result)?;
            serve(session, ticket.client, handler)
        });
    }

    /// Sends `event` to every client that has finished its negotiation.
    pub fn emit(&mut self, event: &Event) {
        if !self.throttle.admit(event, Instant::now()) {
            return;
        }
        let line = wire::encode_line(&event.to_value(SystemTime::now()));
        let listening = self
            .sessions
            .iter()
            .filter(|(_, session)| session.negotiated)
            .map(|(token, _)| *token);
        for token in listening.collect::<Vec<_>>() {
            self.with_session(token, |session| session.send(&line));
        }
    }

    fn accept(&mut self) {
        // Whoever is still waiting after that wakes the loop again.
        for _ in 0..BACKLOG {
            match self.listener.accept() {
                Ok((stream, _)) => self.greet(stream),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    warn!("control: cannot accept a client: {error}");
                    if self.spare.take().is_some() {
                        // The place that the spare had is enough to take the client and drop it.
                        let _ = self.listener.accept();
                    }
                    self.spare = self.listener.try_clone().ok();
                    return;
                }
            }
        }
    }

    fn greet(&mut self, stream: UnixStream) {
        if let Err(error) = stream.set_nonblocking(true) {
            warn!("control: cannot serve a client: {error}");
            return;
        }
        let mut session = Session::new(stream);
        if self.sessions.len() >= CLIENT_COUNT_MAX {
            warn!("control: client refused, {CLIENT_COUNT_MAX} are connected");
            let error = CommandError::generic(format!(
                "too many clients: at most {CLIENT_COUNT_MAX} can be connected at once"
            ));
            // It is told if it listens; it is gone either way.
            let _ = session.send(&wire::encode_reply(None, &Err(error)));
            return;
        }
        let token = self.next_token;
        self.next_token += 1;
        let added = register(
            self.epoll,
            ControlOptions::EPOLL_CTL_ADD,
            &session,
            session.interest,
            token,
        );
        if let Err(error) = added {
            warn!("control: cannot poll a client: {error}");
            return;
        }
        debug!("control: client {} connected", self.client_number(token));
        self.sessions.insert(token, session);
        let greeting = wire::encode_greeting(&command::version());
        self.with_session(token, |session| session.send(&greeting));
    }

    /// Runs `work` on a session, then updates what it waits for, or ends it. A token whose session
    /// is gone is ignored.
    fn with_session(&mut self, token: u64, work: impl FnOnce(&mut Session) -> Result<(), Gone>) {
        let Some(session) = self.sessions.get_mut(&token) else {
            return;
        };
        let mut result = work(session);
        if result.is_ok() && session.is_finished() {
            result = Err(Gone::Closed);
        }
        let wanted = session.wanted();
        if result.is_ok() && wanted != session.interest {
            let modify = ControlOptions::EPOLL_CTL_MOD;
            result = register(self.epoll, modify, session, wanted, token).map_err(Gone::Io);
            session.interest = wanted;
        }
        let Err(gone) = result else { return };
        match gone {
            Gone::Closed => debug!("control: client {}: {gone}", self.client_number(token)),
            Gone::NotReading | Gone::Io(_) => {
                warn!(
                    "control: client {} dropped: {gone}",
                    self.client_number(token)
                );
            }
        }
        // Closing the descriptor takes it out of the epoll set: nobody has a duplicate of it.
        self.sessions.remove(&token);
    }

    fn client_number(&self, token: u64) -> u64 {
        token - self.listener_token
    }
}

/// Serves one session until it has no input, or has to wait for its client.
fn serve(session: &mut Session, token: u64, handler: &mut dyn Handler) -> Result<(), Gone> {
    // The loop is told of a hang-up without end, and nothing is read while a command is under way.
    if session.waiting.is_some() && session.is_hung_up() {
        return Err(Gone::Closed);
    }
    session.flush()?;
    session.read()?;
    while let Some(frame) = session.next_frame() {
        match frame {
            Frame::Message(message) => serve_message(session, token, &message, handler)?,
            Frame::Bad(error) => reply(session, None, &Err(error))?,
        }
    }
    Ok(())
}

fn serve_message(
    session: &mut Session,
    token: u64,
    message: &[u8],
    handler: &mut dyn Handler,
) -> Result<(), Gone> {
    let request = match wire::parse_request(message) {
        Ok(request) => request,
        Err(bad) => return reply(session, bad.id.as_ref(), &Err(bad.error)),
    };
    let id = request.id.clone();
    if !session.negotiated {
        let result = command::negotiate(request);
        session.negotiated = result.is_ok();
        return reply(session, id.as_ref(), &result.map(|()| json!({})));
    }
    let ticket = session.next_ticket(token);
    match command::execute(request, ticket, handler) {
        Ok(Outcome::Later) => {
            session.waiting = Some(Waiting {
                number: ticket.number,
                id,
            });
            Ok(())
        }
        Ok(Outcome::Return(value)) => reply(session, id.as_ref(), &Ok(value)),
        Ok(Outcome::Quit) => {
            info!("control: a client asks to quit");
            // The shutdown goes ahead even if the client has left meanwhile.
            let replied = reply(session, id.as_ref(), &Ok(json!({})));
            handler.quit();
            replied
        }
        Err(error) => reply(session, id.as_ref(), &Err(error)),
    }
}

fn reply(
    session: &mut Session,
    id: Option<&Value>,
    result: &Result<Value, CommandError>,
) -> Result<(), Gone> {
    session.send(&wire::encode_reply(id, result))
}

fn register(
    epoll: RawFd,
    option: ControlOptions,
    target: &impl AsRawFd,
    events: Events,
    token: u64,
) -> io::Result<()> {
    epoll::ctl(
        epoll,
        option,
        target.as_raw_fd(),
        epoll::Event::new(events, token),
    )
}

/// Refuses what cannot be the path of a socket, in better words than the host has.
fn check_path(path: &Path) -> Result<(), BindError> {
    let bytes = path.as_os_str().len();
    if bytes > PATH_BYTES_MAX {
        return Err(BindError::PathTooLong { bytes });
    }
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() && !folder.is_dir() => {
            Err(BindError::NoFolder {
                folder: folder.to_owned(),
            })
        }
        _ => Ok(()),
    }
}

/// Removes a socket file that nobody listens on any more.
fn remove_stale(path: &Path) -> Result<(), BindError> {
    let io_error = |action, source: io::Error| BindError::Io {
        action,
        path: path.to_owned(),
        source,
    };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(io_error("examine", error)),
        Ok(found) if !found.file_type().is_socket() => {
            return Err(BindError::NotASocket {
                path: path.to_owned(),
            });
        }
        Ok(_) => {}
    }
    match probe(path) {
        // Nobody has it open.
        Err(Errno::CONNREFUSED) => {
            fs::remove_file(path).map_err(|error| io_error("replace the stale", error))
        }
        // Its owner went away in this moment.
        Err(Errno::NOENT) => Ok(()),
        // Somebody listens: with a full queue (EAGAIN), or with another socket type (EPROTOTYPE).
        Ok(()) | Err(Errno::AGAIN | Errno::PROTOTYPE) => Err(BindError::InUse {
            path: path.to_owned(),
        }),
        Err(errno) => Err(io_error("probe", errno.into())),
    }
}

fn stream_socket() -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

/// Connects and hangs up. Does not block, even if whoever listens has stopped accepting.
fn probe(path: &Path) -> Result<(), Errno> {
    rustix::net::connect(&stream_socket()?, &SocketAddrUnix::new(path)?)
}

fn listen(path: &Path) -> Result<OwnedFd, Errno> {
    let socket = stream_socket()?;
    // On Linux the file takes the socket's own mode: no moment in which others could connect.
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket)
}

/// The socket's file, known by its identity and not only by its name.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
}

impl SocketFile {
    fn new(path: &Path) -> io::Result<Self> {
        Ok(Self {
            path: path.to_owned(),
            identity: identify(path)?,
        })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let ours = identify(&self.path).is_ok_and(|found| found == self.identity);
        if ours && let Err(error) = fs::remove_file(&self.path) {
            warn!(
                "cannot remove control socket {}: {error}",
                self.path.display()
            );
        }
    }
}

/// Device and inode number of a file.
fn identify(path: &Path) -> io::Result<(u64, u64)> {
    let found = fs::symlink_metadata(path)?;
    Ok((found.dev(), found.ino()))
}
