//! Errors of the device, and what each means to the guest and to the log.
//!
//! Owns the map from engine errors to virtio status bytes (one match) and to log levels (one match).

use std::io;

use log::Level;
use thiserror::Error;

use super::request::Status;
use crate::engine;
use crate::storage::RingError as HostRingError;

/// Why the device could not start or go on serving.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// A worker has no io_uring.
    #[error("cannot start worker {worker}")]
    Ring {
        /// Number of the worker.
        worker: usize,
        /// What io_uring said.
        source: HostRingError,
    },
    /// A thread, an eventfd or a socket could not be made.
    #[error("cannot {what}")]
    System {
        /// What was tried.
        what: &'static str,
        /// The errno.
        source: io::Error,
    },
    /// A worker thread ended before it was told to.
    #[error("worker {worker} has ended")]
    WorkerGone {
        /// Number of the worker.
        worker: usize,
    },
    /// An option is out of its range.
    #[error("{option} {value} is out of range: {allowed}")]
    BadOption {
        /// Name of the option.
        option: &'static str,
        /// The value given.
        value: u64,
        /// The allowed values in words.
        allowed: &'static str,
    },
    /// Another image cannot take the place of the one that is served.
    #[error("the new image differs from the old one in size or in whether it can be written")]
    ImageMismatch,
    /// The framework refused to start for a connection.
    #[error("vhost-user: {0}")]
    Framework(String),
}

impl DeviceError {
    pub(super) fn system(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::System { what, source }
    }
}

/// Why a ring does not run.
#[derive(Debug, Error)]
pub(super) enum RingError {
    #[error("its size {size} is not a power of two")]
    BadSize { size: u32 },
    #[error("its {name} at guest address {guest_address:#x} is not aligned")]
    Unaligned {
        name: &'static str,
        guest_address: u64,
    },
    #[error("its {name} at guest address {guest_address:#x} is not guest memory")]
    NotGuestMemory {
        name: &'static str,
        guest_address: u64,
    },
    #[error("there is no guest memory")]
    NoMemory,
    #[error("its worker has ended")]
    WorkerGone,
}

/// What the guest sees of an engine error.
pub(super) fn status_of(error: &engine::Error) -> Status {
    match error.kind() {
        engine::ErrorKind::Unsupported => Status::Unsupported,
        // virtio-blk has one status for all else, also for a full host (QEMU reports that the same).
        _ => Status::IoError,
    }
}

/// How loud an engine error is: what only a guest can cause is not worth an administrator's time.
pub(super) fn level_of(error: &engine::Error) -> Level {
    match error.kind() {
        engine::ErrorKind::OutOfRange
        | engine::ErrorKind::Invalid
        | engine::ErrorKind::ReadOnly
        | engine::ErrorKind::Unsupported => Level::Debug,
        // The change to `Failed` was logged when it happened; this is each request after it.
        engine::ErrorKind::Failed => Level::Debug,
        engine::ErrorKind::NoSpace => Level::Warn,
        _ => Level::Error,
    }
}
