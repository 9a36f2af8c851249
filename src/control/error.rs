//! Errors of the control socket: what a client is told, and why a socket could not be bound.
//!
//! A [`CommandError`] goes onto the wire as class and description; the classes and the wording are
//! those of QEMU, since clients match on the class and people search for the words.

use std::io;
use std::path::PathBuf;

use serde::Serialize;

/// The `class` member of an error reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum ErrorClass {
    /// Everything that has no class of its own.
    GenericError,
    /// The command does not exist, or not in the session's present mode.
    CommandNotFound,
    /// There is no such job, or it is over.
    DeviceNotActive,
}

/// Why a command was refused: the `error` member of a reply.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, thiserror::Error)]
#[error("{desc}")]
pub struct CommandError {
    /// For programs.
    pub class: ErrorClass,
    /// For people.
    pub desc: String,
}

impl CommandError {
    /// An error of class `GenericError`.
    pub fn generic(desc: impl Into<String>) -> Self {
        Self {
            class: ErrorClass::GenericError,
            desc: desc.into(),
        }
    }

    /// An error of class `CommandNotFound`.
    pub fn not_found(desc: impl Into<String>) -> Self {
        Self {
            class: ErrorClass::CommandNotFound,
            desc: desc.into(),
        }
    }

    /// An error of class `DeviceNotActive`.
    pub fn not_active(desc: impl Into<String>) -> Self {
        Self {
            class: ErrorClass::DeviceNotActive,
            desc: desc.into(),
        }
    }
}

/// Longest path of a socket on Linux: 108 bytes with the zero byte at its end.
pub(super) const PATH_BYTES_MAX: usize = 107;

/// Why the control socket could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Somebody answers at the path.
    #[error(
        "control socket {} is in use by a running process; stop that one or give another path",
        path.display()
    )]
    InUse {
        /// The path asked for.
        path: PathBuf,
    },
    /// The path names something that must not be replaced.
    #[error(
        "{} exists and is not a socket; remove it or give another path for the control socket",
        path.display()
    )]
    NotASocket {
        /// The path asked for.
        path: PathBuf,
    },
    /// Its folder is not there.
    #[error(
        "there is no directory '{}' for the control socket; make it or give another path",
        folder.display()
    )]
    NoFolder {
        /// The folder.
        folder: PathBuf,
    },
    /// No socket may have a path of that length.
    #[error(
        "the path of the control socket has {bytes} bytes, and a socket's may have \
         {PATH_BYTES_MAX}; give a shorter one"
    )]
    PathTooLong {
        /// Length of the path.
        bytes: usize,
    },
    /// The host refused.
    #[error("cannot {action} control socket {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The path asked for.
        path: PathBuf,
        /// The host's answer.
        source: io::Error,
    },
}
