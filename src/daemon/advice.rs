//! What to do about a failed start, where that is known: one half sentence behind the error.
//!
//! The layers below say what went wrong and know no options of the command line; this module knows
//! the options. It looks at the error's causes and, without changing anything, at the image file.

use std::fs::OpenOptions;
use std::io;
use std::path::Path;

use super::DaemonError;
use crate::config::ServeConfig;
use crate::engine;
use crate::format::FormatError;

/// Advice for who called the program with `config` and got `error`.
pub fn advice(error: &DaemonError, config: &ServeConfig) -> Option<&'static str> {
    if engine::Error::is_caused_by(error, |cause: &io::Error| {
        matches!(cause.raw_os_error(), Some(libc::EMFILE | libc::ENFILE))
    }) {
        return Some("raise the limit of open files (ulimit -n, or LimitNOFILE= of systemd)");
    }
    if !matches!(error, DaemonError::Image { .. }) {
        return None;
    }
    let is_empty = std::fs::metadata(&config.image.path)
        .is_ok_and(|metadata| metadata.is_file() && metadata.len() == 0);
    if is_empty
        && engine::Error::is_caused_by(error, |cause: &FormatError| {
            matches!(cause, FormatError::Truncated { found: 0, .. })
        })
    {
        return Some("the file is empty; 'qblkd create' makes an image");
    }
    (!config.image.read_only && can_only_be_read(&config.image.path))
        .then_some("it can be read: --read-only serves it without writing")
}

/// Whether the host lets us open a regular file for reading, and not for writing.
fn can_only_be_read(path: &Path) -> bool {
    let denied = |error: io::Error| {
        let errno = error.raw_os_error();
        matches!(errno, Some(libc::EACCES | libc::EPERM | libc::EROFS))
    };
    path.is_file()
        && OpenOptions::new().read(true).open(path).is_ok()
        && OpenOptions::new().write(true).open(path).is_err_and(denied)
}
