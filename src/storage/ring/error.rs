//! Why a ring cannot be had, in words that say what to do about it.

use std::io;

/// Why there is no ring.
#[derive(thiserror::Error, Debug)]
#[non_exhaustive]
pub enum RingError {
    /// The administrator or the container does not allow io_uring.
    #[error(
        "io_uring is not allowed here: check the sysctl kernel.io_uring_disabled (0 allows it, 1 \
         only for the group in kernel.io_uring_group and with CAP_SYS_ADMIN) and the seccomp policy \
         of the container; qblkd needs Linux 5.19 or later"
    )]
    Disabled(#[source] io::Error),
    /// The kernel has none.
    #[error(
        "this kernel has no io_uring, or a seccomp policy hides it; qblkd needs Linux 5.19 or later, \
         with the sysctl kernel.io_uring_disabled at 0"
    )]
    Missing(#[source] io::Error),
    /// The kernel's is too old.
    #[error("the io_uring of this kernel is too old; qblkd needs Linux 5.19 or later")]
    TooOld(#[source] io::Error),
    /// Something else.
    #[error("cannot create an io_uring")]
    Io(#[source] io::Error),
}

impl RingError {
    /// What it means that the kernel does not set up a ring.
    pub(super) fn from_setup(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => Self::Disabled(error),
            Some(libc::ENOSYS) => Self::Missing(error),
            Some(libc::EINVAL) => Self::TooOld(error),
            _ => Self::Io(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_ring_is_explained_by_its_errno() {
        let said = |errno| {
            let error = io::Error::from_raw_os_error(errno);
            RingError::from_setup(error).to_string()
        };
        for errno in [libc::EPERM, libc::EACCES, libc::ENOSYS] {
            assert!(said(errno).contains("sysctl kernel.io_uring_disabled"));
        }
        for errno in [libc::EPERM, libc::EACCES, libc::ENOSYS, libc::EINVAL] {
            assert!(said(errno).contains("needs Linux 5.19 or later"));
        }
        assert_eq!(said(libc::ENOMEM), "cannot create an io_uring");
    }
}
