//! The vhost-user listening socket: its file, who may connect, and its end.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{Gid, Mode, OFlags};
use rustix::io::Errno;
use thiserror::Error;

/// Why there is no socket.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SocketError {
    /// Somebody listens there.
    #[error("another process listens on it; stop that one, or choose another path")]
    InUse,
    /// Something else has that name.
    #[error("there is something that is not a socket; remove it, or choose another path")]
    NotASocket,
    /// A folder has that name.
    #[error("that is a directory; give the path of a socket to be made in it")]
    IsFolder,
    /// Its folder is not there.
    #[error("there is no directory '{}'; make it, or choose another path", .folder.display())]
    NoFolder {
        /// The folder.
        folder: PathBuf,
    },
    /// No socket may have a path of that length.
    #[error(
        "its path has {bytes} bytes, and a socket's may have {PATH_BYTES_MAX}; choose a shorter one"
    )]
    PathTooLong {
        /// Length of the path.
        bytes: usize,
    },
    /// The group of `--socket-group` does not exist.
    #[error("there is no group '{group}' on this host")]
    NoGroup {
        /// As it was given.
        group: String,
    },
    /// The host said no.
    #[error("cannot {action} it")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The errno.
        source: io::Error,
    },
}

/// Longest path of a socket on Linux: 108 bytes with the zero byte at its end.
const PATH_BYTES_MAX: usize = 107;

fn fault(action: &'static str) -> impl FnOnce(io::Error) -> SocketError {
    move |source| SocketError::Io { action, source }
}

/// The file of a socket that this process listens on. Removed on drop, if it is still ours.
#[derive(Debug)]
pub(super) struct ListeningSocket {
    path: PathBuf,
    identity: (u64, u64),
}

impl ListeningSocket {
    /// Makes the socket; a stale file in its place goes away, a live one is refused.
    ///
    /// The socket gets its name only when its group and mode are right: it is made under another
    /// name beside it and renamed. Where that name makes a longer path than a socket's can be, it is
    /// a short one, reached through a descriptor of the folder.
    pub(super) fn bind(
        path: &Path,
        group: Option<&str>,
        mode: Option<u32>,
    ) -> Result<(UnixListener, Self), SocketError> {
        let group = group.map(group_id).transpose()?;
        let bytes = path.as_os_str().len();
        if bytes > PATH_BYTES_MAX {
            return Err(SocketError::PathTooLong { bytes });
        }
        refuse_live(path)?;
        let folder = match path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        let folder = open_folder(folder)?;
        let mut name = path.file_name().unwrap_or_default().to_os_string();
        name.push(format!(".{}", std::process::id()));
        let mut temporary = path.with_file_name(&name);
        if temporary.as_os_str().len() > PATH_BYTES_MAX {
            let (folder, id) = (folder.as_raw_fd(), std::process::id());
            temporary = format!("/proc/self/fd/{folder}/.qblkd.{id}").into();
        }
        // Left over from a process with our number.
        let _ = fs::remove_file(&temporary);
        let listener = UnixListener::bind(&temporary).map_err(fault("bind"))?;
        let placed = dress(&temporary, group, mode)
            .and_then(|()| fs::rename(&temporary, path).map_err(fault("rename")));
        if let Err(error) = placed {
            let _ = fs::remove_file(&temporary);
            return Err(error);
        }
        let metadata = fs::symlink_metadata(path).map_err(fault("examine"))?;
        let identity = (metadata.dev(), metadata.ino());
        Ok((
            listener,
            Self {
                path: path.to_owned(),
                identity,
            },
        ))
    }
}

impl Drop for ListeningSocket {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|found| (found.dev(), found.ino()) == self.identity);
        if ours && let Err(error) = fs::remove_file(&self.path) {
            log::warn!(
                "cannot remove the socket '{}': {error}",
                self.path.display()
            );
        }
    }
}

fn dress(path: &Path, group: Option<Gid>, mode: Option<u32>) -> Result<(), SocketError> {
    if let Some(group) = group {
        rustix::fs::chown(path, None, Some(group))
            .map_err(|errno| fault("change the group of")(errno.into()))?;
    }
    if let Some(mode) = mode {
        rustix::fs::chmod(path, Mode::from_bits_truncate(mode))
            .map_err(|errno| fault("change the mode of")(errno.into()))?;
    }
    Ok(())
}

/// A descriptor that only stands for the folder: reading what is in it may not be allowed.
fn open_folder(folder: &Path) -> Result<OwnedFd, SocketError> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    match rustix::fs::open(folder, flags, Mode::empty()) {
        Ok(opened) => Ok(opened),
        Err(Errno::NOENT | Errno::NOTDIR) => Err(SocketError::NoFolder {
            folder: folder.to_owned(),
        }),
        Err(errno) => Err(fault("reach the directory of")(errno.into())),
    }
}

fn refuse_live(path: &Path) -> Result<(), SocketError> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(fault("examine")(error)),
        Ok(found) if found.is_dir() => return Err(SocketError::IsFolder),
        Ok(found) if !found.file_type().is_socket() => return Err(SocketError::NotASocket),
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(SocketError::InUse),
        // Of another type than ours: its owner is alive.
        Err(error) if error.raw_os_error() == Some(libc::EPROTOTYPE) => Err(SocketError::InUse),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound
            ) =>
        {
            Ok(())
        }
        Err(error) => Err(fault("probe")(error)),
    }
}

/// A group's number, from its number or its name in the host's group file.
fn group_id(group: &str) -> Result<Gid, SocketError> {
    // The highest number means "leave it as it is" to the host, and is no group's.
    let is_group = |number: &u32| *number != u32::MAX;
    let number = group.parse().ok().or_else(|| {
        let groups = fs::read_to_string("/etc/group").ok()?;
        groups.lines().find_map(|line| {
            let mut fields = line.split(':');
            (fields.next() == Some(group))
                .then(|| fields.nth(1)?.parse().ok())
                .flatten()
        })
    });
    number
        .filter(is_group)
        .map(Gid::from_raw)
        .ok_or_else(|| SocketError::NoGroup {
            group: group.to_owned(),
        })
}
