//! The front door: accepts front-ends and stands between each and the framework.
//!
//! Owns the life cycle of a connection (a new framework daemon for each, since one cannot be used
//! twice) and the relay of its messages with their descriptors. It puts right what the framework
//! refuses though it is legal (memory regions in any order), and stops what the framework would
//! crash on (a mapping longer than its file). Control path only: no guest data passes here.
//!
//! Why unsafe is needed here: receiving descriptors into memory, taking ownership of descriptors that
//! `recvmsg` returned or that the framework leaves open, and asking a socket whether it listens have
//! no safe wrapper.
//!
//! Invariants: messages are read to their exact length, one at a time, because the kernel glues a
//! plain message to the next one that carries descriptors. Neither side can make the relay buffer
//! more than one message for the other. A malformed message ends its own connection and nothing else.
//! When a connection has ended, nothing of it is in flight.

#![expect(unsafe_code, reason = "descriptor passing; see the module's text")]

use std::collections::VecDeque;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use log::{debug, error, info, warn};
use thiserror::Error;
use vhost::vhost_user::Listener;
use vhost_user_backend::VhostUserDaemon;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use rustix::net::{AddressFamily, SocketType, sockopt};

use super::backend::Backend;
use super::error::DeviceError;
use super::vring::with_controls;

/// vhost-user: request, flags, size; 32 bits each.
const HEADER_SIZE: usize = 12;
/// vhost-user: the largest message body.
const BODY_SIZE_MAX: usize = 0x1000;
/// vhost-user: the most descriptors with one message.
const FILES_MAX: usize = 32;
/// vhost-user: a memory region is guest address, size, user address, offset in the file.
const REGION_SIZE: usize = 32;

/// No time limit for `poll`.
const FOR_EVER: libc::c_int = -1;
/// After a failed accept, time for descriptors to become free.
const ACCEPT_RETRY_MS: libc::c_int = 100;

/// Requests that the front door looks into.
mod request {
    pub(super) const SET_MEM_TABLE: u32 = 5;
    pub(super) const SET_LOG_BASE: u32 = 6;
    pub(super) const ADD_MEM_REG: u32 = 37;
}

/// Where front-ends come from.
#[derive(Debug)]
pub enum FrontEnd {
    /// Each connection is served, one after the other.
    Listener(UnixListener),
    /// One front-end that is there already; when it leaves, serving ends.
    Connection(UnixStream),
}

impl FrontEnd {
    /// Takes a copy of a socket that a parent process gave us by number. The number itself stays
    /// what the parent made it.
    ///
    /// # Errors
    /// If the number is not an open descriptor, or not of a socket.
    pub fn from_number(number: RawFd) -> io::Result<Self> {
        // SAFETY: the call takes numbers only; one that is not open is answered with EBADF.
        let copy = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 0) };
        if copy < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call above has just made this descriptor; nobody else knows it.
        Self::from_fd(unsafe { OwnedFd::from_raw_fd(copy) })
    }

    /// Takes over a socket given by descriptor, listening or connected.
    ///
    /// # Errors
    /// If the descriptor is not a socket.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        let mut listens: libc::c_int = 0;
        let mut len = libc::socklen_t::try_from(size_of_val(&listens)).map_err(io::Error::other)?;
        // SAFETY: `listens` and `len` are live locals of the types that SO_ACCEPTCONN wants, and
        // `fd` is open.
        let result = unsafe {
            libc::getsockopt(
                fd.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_ACCEPTCONN,
                (&raw mut listens).cast(),
                &raw mut len,
            )
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        let bad = |text| Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        if sockopt::socket_domain(&fd)? != AddressFamily::UNIX
            || sockopt::socket_type(&fd)? != SocketType::STREAM
        {
            return bad("it is not a Unix stream socket");
        }
        if listens == 0 && rustix::net::getpeername(&fd).is_err() {
            return bad("it neither listens nor is connected");
        }
        Ok(if listens != 0 {
            Self::Listener(fd.into())
        } else {
            Self::Connection(fd.into())
        })
    }
}

/// Why a connection was ended from this side.
#[derive(Debug, Error)]
enum RelayError {
    #[error("socket")]
    Socket(#[from] io::Error),
    #[error("a message body of {size} bytes")]
    Oversized { size: u32 },
    #[error("the connection ended in the middle of a message")]
    Truncated,
    #[error("request {request}: its file has {file_len} bytes and {needed} are to be mapped")]
    ShortFile {
        request: u32,
        file_len: u64,
        needed: u64,
    },
}

/// The framework's listener: it accepts from nothing else. Nobody but us can connect, since its
/// name is gone as soon as it is bound.
pub(super) struct PrivateListener {
    listener: Listener,
    /// The socket's inode; opened without reading, it can still be connected to.
    inode: File,
}

impl PrivateListener {
    pub(super) fn new() -> Result<Self, DeviceError> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "qblkd-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let folder = std::env::temp_dir().join(name);
        DirBuilder::new()
            .mode(0o700)
            .create(&folder)
            .map_err(DeviceError::system("make a private folder"))?;
        let made = Self::bind(&folder.join("s"));
        if let Err(error) = fs::remove_dir_all(&folder) {
            warn!("{} is left behind: {error}", folder.display());
        }
        made.map_err(DeviceError::system("make a private socket"))
    }

    fn bind(path: &std::path::Path) -> io::Result<Self> {
        let listener = UnixListener::bind(path)?;
        let inode = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_CLOEXEC)
            .open(path)?;
        Ok(Self {
            listener: listener.into(),
            inode,
        })
    }

    fn connect(&self) -> io::Result<UnixStream> {
        UnixStream::connect(PathBuf::from(format!(
            "/proc/self/fd/{}",
            self.inode.as_raw_fd()
        )))
    }
}

/// Why serving front-ends has ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Ending {
    Stopped,
    FrontEndGone,
}

/// Serves front-ends until `stop` is signalled, or the only one has left. `new_backend` makes the
/// device's side of a connection. `door` is held while one is served; who holds it keeps the next
/// one waiting, with nothing told and nothing read.
pub(super) fn serve(
    front_end: FrontEnd,
    private: &mut PrivateListener,
    door: &Mutex<()>,
    stop: &EventFd,
    new_backend: impl Fn() -> io::Result<Arc<Backend>>,
) {
    let mut serve_one = |stream: &UnixStream| {
        // It guards no data.
        let inside = door.lock().unwrap_or_else(PoisonError::into_inner);
        let ending = match new_backend() {
            Ok(backend) => serve_connection(stream, private, stop, &backend),
            Err(error) => {
                error!("cannot serve the front-end: {error}");
                Ending::FrontEndGone
            }
        };
        // Whoever sees the end of its connection finds nobody connected.
        drop(inside);
        let _ = stream.shutdown(Shutdown::Both);
        ending
    };
    let listener = match front_end {
        FrontEnd::Connection(stream) => {
            serve_one(&stream);
            return;
        }
        FrontEnd::Listener(listener) => listener,
    };
    loop {
        match wait_readable(listener.as_fd(), stop) {
            Ok(Ending::Stopped) => return,
            Ok(Ending::FrontEndGone) => {}
            Err(error) => {
                error!("waiting for a front-end: {error}");
                return;
            }
        }
        match listener.accept() {
            Ok((stream, _)) => {
                info!("front-end connected");
                if serve_one(&stream) == Ending::Stopped {
                    return;
                }
            }
            Err(error) => {
                // A front-end that left before it was accepted; or no descriptors, for a while.
                warn!("cannot accept a front-end: {error}");
                let mut entries = [poll_entry(stop.as_raw_fd(), libc::POLLIN)];
                if poll(&mut entries, ACCEPT_RETRY_MS).is_err() || entries[0].revents != 0 {
                    return;
                }
            }
        }
    }
}

/// `FrontEndGone` stands for "readable" here: something came from the front-end's side.
fn wait_readable(socket: impl AsFd, stop: &EventFd) -> io::Result<Ending> {
    let mut entries = [
        poll_entry(stop.as_raw_fd(), libc::POLLIN),
        poll_entry(socket.as_fd().as_raw_fd(), libc::POLLIN),
    ];
    poll(&mut entries, FOR_EVER)?;
    Ok(if entries[0].revents != 0 {
        Ending::Stopped
    } else {
        Ending::FrontEndGone
    })
}

fn serve_connection(
    stream: &UnixStream,
    private: &mut PrivateListener,
    stop: &EventFd,
    backend: &Arc<Backend>,
) -> Ending {
    let ending = match connect_framework(private, backend) {
        Ok((mut daemon, inner)) => {
            let ending = match relay(stream, &inner, stop) {
                Ok(ending) => ending,
                Err(error) => {
                    warn!(
                        "the connection to the front-end is closed: {}",
                        chain(&error)
                    );
                    Ending::FrontEndGone
                }
            };
            // Requests in flight finish before the front-end sees its connection go.
            backend.close_rings();
            let _ = inner.shutdown(Shutdown::Both);
            if let Err(error) = daemon.wait() {
                debug!("the framework's loop: {error}");
            }
            ending
        }
        Err(error) => {
            error!("cannot serve the front-end: {error}");
            Ending::FrontEndGone
        }
    };
    backend.release_memory();
    for fd in backend.take_leaked() {
        // SAFETY: the framework took this descriptor out of its owner to register it, and keeps no
        // trace of it (`exit_event`); its daemon is dropped, so nobody else uses or closes it.
        drop(unsafe { OwnedFd::from_raw_fd(fd) });
    }
    info!("front-end disconnected");
    ending
}

type Daemon = VhostUserDaemon<Arc<Backend>>;

fn connect_framework(
    private: &mut PrivateListener,
    backend: &Arc<Backend>,
) -> Result<(Daemon, UnixStream), DeviceError> {
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let create = || VhostUserDaemon::new("vhost-user".to_owned(), Arc::clone(backend), memory);
    let mut daemon = with_controls(backend.controls(), create)
        .map_err(|error| DeviceError::Framework(error.to_string()))?;
    // The connection waits in the listener's queue, so `start` finds it at once.
    let inner = private
        .connect()
        .map_err(DeviceError::system("connect to the framework"))?;
    if let Err(error) = daemon.start(&mut private.listener) {
        // Our connection may still wait in that listener's queue, where the next daemon would
        // take it for its own.
        *private = PrivateListener::new()?;
        return Err(DeviceError::Framework(error.to_string()));
    }
    Ok((daemon, inner))
}

fn chain(error: &RelayError) -> String {
    match error {
        RelayError::Socket(source) => format!("{error}: {source}"),
        _ => error.to_string(),
    }
}

/// Carries messages both ways until one side ends.
fn relay(front: &UnixStream, back: &UnixStream, stop: &EventFd) -> Result<Ending, RelayError> {
    front.set_nonblocking(true)?;
    back.set_nonblocking(true)?;
    let mut requests = Pipe::new(front, back, prepare_request);
    let mut replies = Pipe::new(back, front, |_| Ok(()));
    loop {
        let mut entries = [
            poll_entry(stop.as_raw_fd(), libc::POLLIN),
            requests.wants(),
            replies.wants(),
        ];
        poll(&mut entries, FOR_EVER)?;
        if entries[0].revents != 0 {
            return Ok(Ending::Stopped);
        }
        // Replies first: a front-end may leave as soon as it has its last one.
        for (pipe, entry) in [(&mut replies, entries[2]), (&mut requests, entries[1])] {
            if entry.revents != 0 && pipe.advance()?.is_end() {
                return Ok(Ending::FrontEndGone);
            }
        }
    }
}

fn poll_entry(fd: RawFd, events: libc::c_short) -> libc::pollfd {
    libc::pollfd {
        fd,
        events,
        revents: 0,
    }
}

fn poll(entries: &mut [libc::pollfd], timeout_ms: libc::c_int) -> io::Result<()> {
    let count = libc::nfds_t::try_from(entries.len()).map_err(io::Error::other)?;
    loop {
        // SAFETY: `entries` is a live array of `count` entries.
        let result = unsafe { libc::poll(entries.as_mut_ptr(), count, timeout_ms) };
        if result >= 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// A message on its way, with the descriptors that came with it.
#[derive(Default)]
struct Message {
    bytes: Vec<u8>,
    files: VecDeque<File>,
}

impl Message {
    fn word(&self, offset: usize) -> u32 {
        self.bytes
            .get(offset..offset + 4)
            .and_then(|bytes| bytes.try_into().ok())
            .map_or(0, u32::from_ne_bytes)
    }

    fn request(&self) -> u32 {
        self.word(0)
    }

    fn body(&self) -> &[u8] {
        self.bytes.get(HEADER_SIZE..).unwrap_or_default()
    }

    /// Length of the whole message as far as it is known; an error if it is too long.
    fn needed(&self) -> Result<usize, RelayError> {
        if self.bytes.len() < HEADER_SIZE {
            return Ok(HEADER_SIZE);
        }
        let size = self.word(8);
        match usize::try_from(size) {
            Ok(body) if body <= BODY_SIZE_MAX => Ok(HEADER_SIZE + body),
            _ => Err(RelayError::Oversized { size }),
        }
    }
}

/// Whether a pipe goes on.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Progress {
    Going,
    /// The sender has closed its side between two messages.
    End,
}

impl Progress {
    fn is_end(self) -> bool {
        self == Progress::End
    }
}

/// One direction of a connection. Holds one message: reads it in full, then sends it in full.
struct Pipe<'a> {
    from: &'a UnixStream,
    to: &'a UnixStream,
    /// Looks into a complete message before it is passed on.
    prepare: fn(&mut Message) -> Result<(), RelayError>,
    message: Message,
    /// `Some(bytes sent)` once the message is complete.
    sent: Option<usize>,
}

impl<'a> Pipe<'a> {
    fn new(
        from: &'a UnixStream,
        to: &'a UnixStream,
        prepare: fn(&mut Message) -> Result<(), RelayError>,
    ) -> Self {
        Self {
            from,
            to,
            prepare,
            message: Message::default(),
            sent: None,
        }
    }

    fn wants(&self) -> libc::pollfd {
        match self.sent {
            None => poll_entry(self.from.as_raw_fd(), libc::POLLIN),
            Some(_) => poll_entry(self.to.as_raw_fd(), libc::POLLOUT),
        }
    }

    /// Moves on as far as it goes without waiting.
    fn advance(&mut self) -> Result<Progress, RelayError> {
        match self.step() {
            Err(RelayError::Socket(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                Ok(Progress::Going)
            }
            Err(RelayError::Socket(error))
                if matches!(
                    error.kind(),
                    io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
                ) =>
            {
                Ok(Progress::End)
            }
            other => other,
        }
    }

    fn step(&mut self) -> Result<Progress, RelayError> {
        if self.sent.is_none() {
            while self.message.bytes.len() < self.message.needed()? {
                if receive(self.from, &mut self.message)? == 0 {
                    return if self.message.bytes.is_empty() {
                        Ok(Progress::End)
                    } else {
                        Err(RelayError::Truncated)
                    };
                }
            }
            (self.prepare)(&mut self.message)?;
            self.sent = Some(0);
        }
        while let Some(sent) = self.sent
            && sent < self.message.bytes.len()
        {
            let fds: Vec<RawFd> = if sent == 0 {
                self.message.files.iter().map(File::as_raw_fd).collect()
            } else {
                Vec::new()
            };
            let count = self
                .to
                .send_with_fds(&[&self.message.bytes[sent..]], &fds)
                .map_err(io::Error::from)?;
            self.sent = Some(sent + count);
        }
        self.message = Message::default();
        self.sent = None;
        Ok(Progress::Going)
    }
}

/// Reads on with the message, but not past its end. Returns the bytes read; 0 at the end of stream.
fn receive(from: &UnixStream, message: &mut Message) -> Result<usize, RelayError> {
    let done = message.bytes.len();
    message.bytes.resize(message.needed()?, 0);
    let mut iovecs = [libc::iovec {
        iov_base: message.bytes[done..].as_mut_ptr().cast(),
        iov_len: message.bytes.len() - done,
    }];
    let mut fds: [RawFd; FILES_MAX] = [-1; FILES_MAX];
    // SAFETY: the only iovec is the tail of `message.bytes`, which is ours and takes any bytes.
    let received = unsafe { from.recv_with_fds(&mut iovecs, &mut fds) };
    let (count, fd_count) = match received {
        Ok(received) => received,
        Err(error) => {
            message.bytes.truncate(done);
            return Err(io::Error::from(error).into());
        }
    };
    message.bytes.truncate(done + count);
    for &fd in &fds[..fd_count] {
        // SAFETY: the kernel has just made this descriptor for us; nobody else owns it.
        message.files.push_back(unsafe { File::from_raw_fd(fd) });
    }
    Ok(count)
}

/// What the framework would refuse or crash on is put right or refused here.
fn prepare_request(message: &mut Message) -> Result<(), RelayError> {
    match message.request() {
        request::SET_MEM_TABLE => {
            sort_regions(message);
            let ends: Vec<_> = message.body().get(8..).map_or_else(Vec::new, |regions| {
                regions
                    .chunks_exact(REGION_SIZE)
                    .map(region_file_end)
                    .collect()
            });
            check_files(message, &ends)
        }
        request::ADD_MEM_REG => {
            let ends: Vec<_> = message
                .body()
                .get(8..8 + REGION_SIZE)
                .map(region_file_end)
                .into_iter()
                .collect();
            check_files(message, &ends)
        }
        request::SET_LOG_BASE => {
            let body = message.body();
            // Size, then offset.
            let end = double_word(body, 0).saturating_add(double_word(body, 8));
            check_files(message, &[end])
        }
        _ => Ok(()),
    }
}

fn double_word(bytes: &[u8], offset: usize) -> u64 {
    bytes
        .get(offset..offset + 8)
        .and_then(|bytes| bytes.try_into().ok())
        .map_or(0, u64::from_ne_bytes)
}

/// Where a region's mapping ends in its file.
fn region_file_end(region: &[u8]) -> u64 {
    double_word(region, 8).saturating_add(double_word(region, 24))
}

/// Touching a mapping past the end of its file kills the process, so such a file is refused.
fn check_files(message: &Message, ends: &[u64]) -> Result<(), RelayError> {
    for (file, &needed) in message.files.iter().zip(ends) {
        let metadata = file.metadata()?;
        if metadata.is_file() && metadata.len() < needed {
            return Err(RelayError::ShortFile {
                request: message.request(),
                file_len: metadata.len(),
                needed,
            });
        }
    }
    Ok(())
}

/// The framework wants the regions of SET_MEM_TABLE in ascending order of guest addresses; the
/// protocol does not. A message that is not well-formed stays as it is, for the framework to refuse.
fn sort_regions(message: &mut Message) {
    let count = message.word(HEADER_SIZE) as usize;
    let Some(regions) = message.bytes.get(HEADER_SIZE + 8..) else {
        return;
    };
    if regions.len() != count * REGION_SIZE || message.files.len() != count {
        return;
    }
    let mut sorted: Vec<(Vec<u8>, File)> = regions
        .chunks_exact(REGION_SIZE)
        .map(<[u8]>::to_vec)
        .zip(message.files.drain(..))
        .collect();
    sorted.sort_by_key(|(region, _)| double_word(region, 0));
    message.bytes.truncate(HEADER_SIZE + 8);
    for (region, file) in sorted {
        message.bytes.extend_from_slice(&region);
        message.files.push_back(file);
    }
}
