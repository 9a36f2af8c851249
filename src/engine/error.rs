//! The engine's error: a kind that callers act on, a sentence for people, and the cause.
//!
//! The device turns the kind into a virtio status, the tools into an exit code. Nothing else is
//! decided by matching on text. `Display` is one short sentence with the operation's own values;
//! the cause is reached through `source`, so that a printer of the chain says everything once.

use std::error::Error as StdError;
use std::fmt;
use std::io;

use super::sync::{Mutex, MutexGuard};
use crate::format::FormatError;

/// What a caller may act on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A host I/O operation failed.
    Io,
    /// The host has no space, or the image may not grow.
    NoSpace,
    /// The image contradicts the format or itself.
    Corrupt,
    /// A feature of the format that is refused by name.
    Unsupported,
    /// A range outside the virtual disk, or not in whole sectors.
    OutOfRange,
    /// A write to something opened for reading.
    ReadOnly,
    /// The image takes no more writes since an earlier metadata failure.
    Failed,
    /// A request or an option that makes no sense.
    Invalid,
    /// Another process holds the image.
    Locked,
    /// Something of that name is there already.
    Exists,
    /// Nothing of that name is there.
    NotFound,
}

/// An engine error.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    text: String,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl Error {
    /// An error with a sentence and no deeper cause.
    pub fn new(kind: ErrorKind, text: impl Into<String>) -> Self {
        Self {
            kind,
            text: text.into(),
            source: None,
        }
    }

    /// A host I/O error; "no space" kinds of errno become [`ErrorKind::NoSpace`].
    pub fn io(text: impl Into<String>, source: io::Error) -> Self {
        let kind = match source.kind() {
            io::ErrorKind::StorageFull
            | io::ErrorKind::QuotaExceeded
            | io::ErrorKind::FileTooLarge => ErrorKind::NoSpace,
            _ => ErrorKind::Io,
        };
        Self {
            kind,
            text: text.into(),
            source: Some(Box::new(source)),
        }
    }

    /// A metadata write or an `fdatasync` that failed: what the file holds is not known any more,
    /// and the image must take no more writes.
    pub(crate) fn failed(text: impl Into<String>, source: io::Error) -> Self {
        Self {
            kind: ErrorKind::Failed,
            text: text.into(),
            source: Some(Box::new(source)),
        }
    }

    /// A violation of the format, with where it was met.
    pub fn format(text: impl Into<String>, source: FormatError) -> Self {
        let kind = if source.is_unsupported() {
            ErrorKind::Unsupported
        } else {
            ErrorKind::Corrupt
        };
        Self {
            kind,
            text: text.into(),
            source: Some(Box::new(source)),
        }
    }

    /// The same error seen from one level up.
    #[must_use]
    pub fn context(self, text: impl Into<String>) -> Self {
        Self {
            kind: self.kind,
            text: text.into(),
            source: Some(Box::new(self)),
        }
    }

    /// The same error seen from one level up, where it means that what the file holds is not known
    /// any more.
    pub(crate) fn into_failed(self, text: impl Into<String>) -> Self {
        Self {
            kind: ErrorKind::Failed,
            text: text.into(),
            source: Some(Box::new(self)),
        }
    }

    /// What the caller may act on.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// Whether some cause of `error` is a `T` for which `test` holds.
    #[must_use]
    pub fn is_caused_by<T: StdError + 'static>(
        error: &dyn StdError,
        test: impl Fn(&T) -> bool,
    ) -> bool {
        let mut cause = error.source();
        while let Some(error) = cause {
            if error.downcast_ref::<T>().is_some_and(&test) {
                return true;
            }
            cause = error.source();
        }
        false
    }

    /// The whole chain on one line, outermost first.
    #[must_use]
    pub fn chain(&self) -> String {
        let mut line = self.text.clone();
        let mut cause = StdError::source(self);
        while let Some(error) = cause {
            line.push_str(": ");
            line.push_str(&error.to_string());
            cause = error.source();
        }
        line
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source
            .as_deref()
            .map(|source| source as &(dyn StdError + 'static))
    }
}

/// Locks a mutex; a panic of another holder does not take this thread down with it.
///
/// Every critical section of the engine leaves its data consistent at each step.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock()
}
