//! The commands of people: `create`, `info` and `check` for an image which nobody serves, `snapshot`
//! for either.
//!
//! Top layer beside the daemon: takes a validated configuration, prints for people or as JSON in the
//! form of `qemu-img`, and says how the process should exit. What the commands do to an image is the
//! engine's; this layer opens files, takes image locks and shows progress.

mod check;
mod create;
mod info;
mod snapshot;

use std::error::Error as StdError;
use std::fmt::Display;
use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;

use indicatif::{ProgressBar, ProgressStyle};

pub use check::check;
pub use create::create;
pub use info::info;
pub use snapshot::snapshot;

use crate::config::Format;
use crate::engine::{Error, ErrorKind, LayerFormat};
use crate::storage::HostFile;
use crate::storage::lock::{ImageLock, LOCK_PATIENCE, LockKind, Locking};

/// How the process exits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Exit {
    /// All is well.
    Success = 0,
    /// The command could not be carried out.
    Failure = 1,
    /// `check`: the image is corrupt.
    Corrupt = 2,
    /// `check`: clusters are leaked, nothing worse.
    Leaks = 3,
    /// `check`: not a format that can be checked.
    NoChecks = 63,
}

impl From<Exit> for std::process::ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

impl From<Format> for LayerFormat {
    fn from(format: Format) -> Self {
        match format {
            Format::Qcow2 => Self::Qcow2,
            Format::Raw => Self::Raw,
        }
    }
}

/// Prints to stdout. Returns how to exit, see [`printed`].
pub fn print(text: &str, exit: Exit) -> Exit {
    let mut out = io::stdout().lock();
    let result = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    printed(result, exit)
}

/// How to exit after something was printed: as `exit` says, unless that is success and the text could
/// not be written. A reader that has gone away has read what it wanted.
pub fn printed(result: io::Result<()>, exit: Exit) -> Exit {
    match result {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            complain(&format!(
                "qblkd: cannot write to the standard output: {error}"
            ));
            match exit {
                Exit::Success => Exit::Failure,
                found => found,
            }
        }
        _ => exit,
    }
}

/// Prints a line to stderr.
fn complain(text: &impl Display) {
    drop(writeln!(io::stderr().lock(), "{text}"));
}

/// Text that an image holds, for people: what could mean something to a terminal is escaped.
fn printable(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for character in text.chars() {
        if character.is_control() {
            shown.extend(character.escape_debug());
        } else {
            shown.push(character);
        }
    }
    shown
}

/// Prints an error with all its causes, once.
fn fail(path: &Path, error: &Error) -> Exit {
    complain(&format!("qblkd: {}: {}", path.display(), error.chain()));
    Exit::Failure
}

/// Takes the image lock. The lock is given back when the value is dropped.
fn lock(file: &Arc<HostFile>, kind: LockKind) -> Result<ImageLock, Error> {
    ImageLock::take(file, kind, Locking::Auto, LOCK_PATIENCE).map_err(|error| {
        let mut text = error.to_string();
        if let Some(source) = error.source() {
            text = format!("{text}: {source}");
        }
        Error::new(ErrorKind::Locked, text)
    })
}

/// A bar on stderr; invisible unless that is a terminal.
fn progress_bar() -> ProgressBar {
    let bar = ProgressBar::new(0);
    let style = ProgressStyle::with_template("{msg:28} [{wide_bar:.cyan}] {percent:>3}% {eta:>4}");
    if let Ok(style) = style {
        bar.set_style(style.progress_chars("=> "));
    }
    bar
}

/// A number of bytes for people: three digits and a binary unit.
fn human_size(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let unit = (bytes.checked_ilog2().unwrap_or(0) / 10) as usize;
    // Hundredths of the unit, rounded.
    let hundredths = (u128::from(bytes) * 100 + ((1 << (10 * unit)) >> 1)) >> (10 * unit);
    let (whole, hundredths) = (hundredths / 100, hundredths % 100);
    let digits = match whole {
        0..10 => format!("{whole}.{hundredths:02}"),
        10..100 => format!("{whole}.{}", hundredths / 10),
        _ => whole.to_string(),
    };
    let digits = match digits.contains('.') {
        true => digits.trim_end_matches('0').trim_end_matches('.'),
        false => &digits,
    };
    format!("{digits} {}", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_three_digits_and_no_needless_zeroes() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (1_321_205, "1.26 MiB"),
            (10 << 20, "10 MiB"),
            (100 << 30, "100 GiB"),
            (2 << 40, "2 TiB"),
            (u64::MAX, "16 EiB"),
        ] {
            assert_eq!(human_size(bytes), text);
        }
    }

    #[test]
    fn exit_codes_are_those_of_qemu_img() {
        let codes = [
            Exit::Success,
            Exit::Failure,
            Exit::Corrupt,
            Exit::Leaks,
            Exit::NoChecks,
        ]
        .map(|exit| exit as u8);
        assert_eq!(codes, [0, 1, 2, 3, 63]);
    }
}
