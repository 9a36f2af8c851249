//! The life cycle of the process that serves: open, lock, serve, drain, close.
//!
//! The main thread runs one `epoll` loop over signals, the control socket, events of the image, news
//! of the settler and the end of serving. It never does guest I/O. Everything is given back in the
//! opposite order of its making: front-end, workers, settler, image, locks, sockets.

#![forbid(unsafe_code)]

mod advice;
mod chain;
mod external;
mod jobs;
mod pace;
mod report;
mod revert;
mod settler;
mod socket;

use std::io::{self, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use epoll::{ControlOptions, Events};
use log::{error, info, warn};
use signal_hook::consts::{SIGINT, SIGTERM};
use thiserror::Error;

pub use self::advice::advice;
use self::chain::Chain;
use self::jobs::Background;
use self::report::Report;
use self::settler::Service;
use self::socket::ListeningSocket;
use crate::config::{Endpoint, ServeConfig};
use crate::control::{BindError, ControlServer, Event, ShutdownReason};
use crate::device::{DeviceConfig, DeviceError, FrontEnd, Server};
use crate::engine::{self, Image, ImageEvent};
use crate::storage::{Ring, RingError};

/// Tokens of the loop's descriptors; the control server uses everything from `CONTROL` on.
mod token {
    pub(super) const SIGNAL: u64 = 0;
    pub(super) const FINISHED: u64 = 1;
    pub(super) const IMAGE_EVENT: u64 = 2;
    pub(super) const SETTLER: u64 = 3;
    pub(super) const CONTROL: u64 = 16;
}

/// Why serving ended, or never began.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DaemonError {
    /// The image, or its backing chain.
    #[error("cannot serve '{path}'")]
    Image {
        /// The image as it was named.
        path: String,
        /// What is wrong with it.
        source: engine::Error,
    },
    /// The vhost-user socket.
    #[error("cannot make the socket '{path}'")]
    Socket {
        /// Where.
        path: String,
        /// Why not.
        source: socket::SocketError,
    },
    /// The descriptor given with `--fd`.
    #[error("--fd {fd} is not a socket that a front-end can come from")]
    Descriptor {
        /// Its number.
        fd: RawFd,
        /// Why not.
        source: io::Error,
    },
    /// The control socket.
    #[error("cannot make the control socket")]
    Control(#[source] BindError),
    /// The device.
    #[error("cannot serve the device")]
    Device(#[source] DeviceError),
    /// The host does not let us use io_uring.
    #[error("cannot serve without io_uring")]
    IoUring(#[source] RingError),
    /// Signals, epoll, eventfds.
    #[error("cannot {what}")]
    System {
        /// What was tried.
        what: &'static str,
        /// The errno.
        source: io::Error,
    },
    /// A second signal.
    #[error("stopped at once by a second signal; the next start repairs what is left to repair")]
    Interrupted,
}

fn system(what: &'static str) -> impl FnOnce(io::Error) -> DaemonError {
    move |source| DaemonError::System { what, source }
}

/// Serves an image until a signal, the command `quit`, or the end of the only connection.
///
/// # Errors
/// See [`DaemonError`]. `Interrupted` leaves requests unfinished: the process must end.
pub fn run(config: &ServeConfig) -> Result<(), DaemonError> {
    // Before anything is opened here: a number that nobody has given us could become one of ours.
    let endpoint = ReadyEndpoint::new(&config.endpoint)?;
    // Before anything is touched: a repair must not come before the news that nothing can be served.
    drop(Ring::new(1).map_err(DaemonError::IoUring)?);
    let image_error = |source| DaemonError::Image {
        path: config.image.path.display().to_string(),
        source,
    };
    let chain = Chain::open(&config.image, &config.disk.id).map_err(image_error)?;
    // Until here a signal ends the process at once, which even a repair survives.
    let signals = signals()?;
    let (image_events, events, event_reader) = ImageEvents::new()?;
    image_events.watch(&chain.image);

    let mut server = Server::start(
        Arc::clone(&chain.image),
        chain.files(),
        DeviceConfig {
            queue_count: config.disk.queue_count,
            queue_size_max: config.disk.queue_size_max,
            threads: threads(config),
            poll_max: Duration::from_micros(config.poll_us.into()),
            block_size: config.disk.block_bytes,
            serial: config.disk.serial.clone(),
            writeback: config.image.cache.is_writeback(),
        },
    )
    .map_err(DaemonError::Device)?;

    let mut background = Background::start(
        &config.disk.id,
        Service {
            chain: Arc::new(chain),
            config: config.image.clone(),
            pauser: server.pauser(),
            watch: Box::new(move |image| image_events.watch(image)),
            looks_ahead: config.control.is_some(),
        },
        &server,
    )?;

    let epoll = epoll::create(true).map_err(system("make an epoll set"))?;
    let mut control = match &config.control {
        Some(path) => {
            Some(ControlServer::bind(path, epoll, token::CONTROL).map_err(DaemonError::Control)?)
        }
        None => None,
    };
    // The socket appears last: whoever sees it finds everything ready.
    let (front_end, listening) = endpoint.front_end()?;
    server.serve(front_end).map_err(DaemonError::Device)?;
    info!("serving '{}'", config.image.path.display());
    if let Err(error) = sd_notify::notify(&[sd_notify::NotifyState::Ready]) {
        warn!("cannot tell the service manager that we are ready: {error}");
    }

    let mut main_loop = MainLoop {
        epoll,
        signals,
        events,
        event_reader,
        stopping: false,
    };
    let served = Served {
        config,
        server: &server,
    };
    let ended = main_loop.run(&served, &mut background, control.as_mut());
    if let Err(error) = sd_notify::notify(&[sd_notify::NotifyState::Stopping]) {
        warn!("cannot tell the service manager that we stop: {error}");
    }
    drop(listening);
    if let Err(error) = ended {
        // In-flight requests are abandoned with the process: nothing waits for them.
        std::mem::forget(server);
        std::mem::forget(background);
        return Err(error);
    }
    let joined = server.join().map_err(DaemonError::Device);
    let chain = Arc::clone(background.chain());
    let image_error = |source| DaemonError::Image {
        path: chain.nodes[0].layer.path.display().to_string(),
        source,
    };
    let settled = background.join().map_err(image_error);
    let closed = chain.close().map_err(image_error);
    drop(control);
    joined.and(settled).and(closed)
}

fn threads(config: &ServeConfig) -> usize {
    let cores = || std::thread::available_parallelism().map_or(1, usize::from);
    config
        .thread_count
        .map_or_else(cores, |count| usize::try_from(count).unwrap_or(1))
}

/// SIGTERM and SIGINT as bytes of a socket.
fn signals() -> Result<UnixStream, DaemonError> {
    let (reader, writer) = UnixStream::pair().map_err(system("make a socket pair"))?;
    reader
        .set_nonblocking(true)
        .map_err(system("set up the signal socket"))?;
    for signal in [SIGTERM, SIGINT] {
        let writer = writer
            .try_clone()
            .map_err(system("set up the signal socket"))?;
        signal_hook::low_level::pipe::register(signal, writer).map_err(system("handle signals"))?;
    }
    Ok(reader)
}

/// Where images put their events.
struct ImageEvents {
    sender: mpsc::Sender<ImageEvent>,
    /// Written with each event.
    bell: Arc<UnixStream>,
}

impl ImageEvents {
    /// With the other ends: the queue, and a socket that becomes readable with each event.
    fn new() -> Result<(Self, mpsc::Receiver<ImageEvent>, UnixStream), DaemonError> {
        let (reader, writer) = UnixStream::pair().map_err(system("make a socket pair"))?;
        for end in [&reader, &writer] {
            end.set_nonblocking(true)
                .map_err(system("set up the event socket"))?;
        }
        let (sender, receiver) = mpsc::channel();
        let events = Self {
            sender,
            bell: Arc::new(writer),
        };
        Ok((events, receiver, reader))
    }

    /// Has an image put its events here.
    fn watch(&self, image: &Image) {
        let sender = self.sender.clone();
        let bell = Arc::clone(&self.bell);
        image.set_event_sink(move |event| {
            // Whoever does not listen any more is on the way out.
            let _ = sender.send(event);
            let _ = io::Write::write(&mut &*bell, &[0]);
        });
    }
}

/// Where the front-end comes from, as far as that can be settled before the image is open.
enum ReadyEndpoint<'a> {
    Path {
        path: &'a Path,
        group: Option<&'a str>,
        mode: Option<u32>,
    },
    /// A copy of the descriptor that whoever started us has given us.
    Given(FrontEnd),
}

impl<'a> ReadyEndpoint<'a> {
    fn new(endpoint: &'a Endpoint) -> Result<Self, DaemonError> {
        match endpoint {
            Endpoint::Path { path, group, mode } => Ok(Self::Path {
                path,
                group: group.as_deref(),
                mode: *mode,
            }),
            Endpoint::Fd(fd) => {
                let source = |source| DaemonError::Descriptor { fd: *fd, source };
                FrontEnd::from_number(*fd).map(Self::Given).map_err(source)
            }
        }
    }

    /// Makes the socket, unless one was given.
    fn front_end(self) -> Result<(FrontEnd, Option<ListeningSocket>), DaemonError> {
        match self {
            Self::Path { path, group, mode } => {
                let (listener, socket) =
                    ListeningSocket::bind(path, group, mode).map_err(|source| {
                        DaemonError::Socket {
                            path: path.display().to_string(),
                            source,
                        }
                    })?;
                Ok((FrontEnd::Listener(listener), Some(socket)))
            }
            Self::Given(front_end) => Ok((front_end, None)),
        }
    }
}

/// What is served.
struct Served<'a> {
    config: &'a ServeConfig,
    server: &'a Server,
}

struct MainLoop {
    epoll: RawFd,
    signals: UnixStream,
    events: mpsc::Receiver<ImageEvent>,
    event_reader: UnixStream,
    stopping: bool,
}

impl MainLoop {
    /// Returns when serving has ended and no background work is left.
    fn run(
        &mut self,
        served: &Served<'_>,
        background: &mut Background,
        mut control: Option<&mut ControlServer>,
    ) -> Result<(), DaemonError> {
        let finished = served.server.finished().as_raw_fd();
        let watched = [
            (self.signals.as_raw_fd(), token::SIGNAL),
            (finished, token::FINISHED),
            (self.event_reader.as_raw_fd(), token::IMAGE_EVENT),
        ];
        let news = background.descriptor().map(|fd| (fd, token::SETTLER));
        for (fd, token) in watched.into_iter().chain(news) {
            let event = epoll::Event::new(Events::EPOLLIN, token);
            epoll::ctl(self.epoll, ControlOptions::EPOLL_CTL_ADD, fd, event)
                .map_err(system("watch a descriptor"))?;
        }
        let mut serving = true;
        let mut ready = [epoll::Event::new(Events::empty(), 0); 16];
        while serving || !background.has_ended() {
            let count = match epoll::wait(self.epoll, -1, &mut ready) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(source) => {
                    return Err(DaemonError::System {
                        what: "wait",
                        source,
                    });
                }
            };
            for event in &ready[..count] {
                let control = control.as_deref_mut();
                match event.data {
                    token::FINISHED if serving => {
                        serving = false;
                        // It stays readable.
                        let event = epoll::Event::new(Events::empty(), 0);
                        epoll::ctl(self.epoll, ControlOptions::EPOLL_CTL_DEL, finished, event)
                            .map_err(system("leave a descriptor"))?;
                        background.finish();
                    }
                    token::SIGNAL => self.on_signal(served, background, control)?,
                    token::IMAGE_EVENT => {
                        self.on_image_event(&served.config.disk.id, background, control);
                    }
                    token::SETTLER => self.on_news(served, background, control),
                    token => {
                        if let Some(control) = control.filter(|control| control.owns(token)) {
                            self.converse(served, background, control, |control, handler| {
                                control.handle_ready(token, handler);
                            });
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// Lets clients ask what they want, and does what they have asked for.
    fn converse(
        &mut self,
        served: &Served<'_>,
        background: &mut Background,
        control: &mut ControlServer,
        talk: impl FnOnce(&mut ControlServer, &mut Report<'_>),
    ) {
        let mut report = Report::new(served.config, served.server, background);
        talk(control, &mut report);
        let quit = report.quit;
        for event in background.take_events() {
            control.emit(&event);
        }
        if quit {
            let reason = ShutdownReason::HostQmpQuit;
            self.stop(served, background, Some(control), reason);
        }
    }

    /// Passes on what the settler has told.
    fn on_news(
        &mut self,
        served: &Served<'_>,
        background: &mut Background,
        control: Option<&mut ControlServer>,
    ) {
        let (replies, events) = background.take_news();
        if background.has_ended() && !background.is_finishing() {
            error!("the settler has ended by itself: stopping");
            self.stopping = true;
            background.finish();
            served.server.stop();
        }
        let Some(control) = control else { return };
        // The replies first: who has waited for a snapshot knows of it before its job is told.
        self.converse(served, background, control, |control, handler| {
            for (ticket, result) in replies {
                control.answer(ticket, &result, handler);
            }
        });
        for event in &events {
            control.emit(event);
        }
    }

    fn on_signal(
        &mut self,
        served: &Served<'_>,
        background: &mut Background,
        control: Option<&mut ControlServer>,
    ) -> Result<(), DaemonError> {
        let mut bytes = [0; 16];
        let count = match self.signals.read(&mut bytes) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(source) => {
                return Err(DaemonError::System {
                    what: "read signals",
                    source,
                });
            }
        };
        if self.stopping || count > 1 {
            return Err(DaemonError::Interrupted);
        }
        info!("stopping: requests in flight and background work finish, then the image is closed");
        self.stop(served, background, control, ShutdownReason::HostSignal);
        Ok(())
    }

    fn stop(
        &mut self,
        served: &Served<'_>,
        background: &mut Background,
        control: Option<&mut ControlServer>,
        reason: ShutdownReason,
    ) {
        if self.stopping {
            return;
        }
        self.stopping = true;
        if let Some(control) = control {
            control.emit(&Event::Shutdown {
                guest: false,
                reason,
            });
        }
        // What is left of the background work is done while requests finish.
        background.finish();
        served.server.stop();
    }

    fn on_image_event(
        &mut self,
        device: &str,
        background: &Background,
        control: Option<&mut ControlServer>,
    ) {
        let mut bytes = [0; 64];
        // Only a wake-up; the events are in the queue.
        let _ = self.event_reader.read(&mut bytes);
        let Some(control) = control else { return };
        let node = &background.chain().nodes[0].name;
        for event in self.events.try_iter() {
            control.emit(&report::event(device, node, event));
        }
    }
}
