//! What can go wrong for the client. A miscompare is an error like any other: it ends the run.

use std::io;

/// Why a run ended early.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// A host call of the client's own, or a vhost-user message, failed.
    #[error("{what}: {source}")]
    Io {
        /// What the client was doing.
        what: String,
        /// The host's answer.
        source: io::Error,
    },
    /// The server closed the connection or died.
    #[error("the server is gone: {0}")]
    ServerGone(String),
    /// The server lives, but did not complete a request in time.
    #[error("no completion for {seconds} s with {in_flight} requests in flight")]
    Hang {
        /// How long the client waited.
        seconds: u64,
        /// Requests that were submitted and not completed.
        in_flight: usize,
    },
    /// A request that must succeed completed with another status than OK.
    #[error("{request} completed with status {status}")]
    Status {
        /// The request, in words.
        request: String,
        /// The virtio-blk status byte; 255 if the server did not write one.
        status: u8,
    },
    /// A sector holds what it must not hold.
    #[error("miscompare: {what}")]
    Miscompare {
        /// The sector.
        sector: u64,
        /// What it holds and what it should.
        what: String,
    },
    /// The server broke the rules of the virtqueue.
    #[error("protocol violation: {0}")]
    Protocol(String),
    /// The options contradict each other or the disk.
    #[error("{0}")]
    Usage(String),
}

impl Error {
    /// Wraps an I/O error with what was being done.
    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
        let what = what.into();
        move |source| Error::Io { what, source }
    }
}
