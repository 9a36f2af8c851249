//! Image locks: QEMU's protocol of byte locks, so that QEMU's programs, and a second server, keep
//! off an image in use, and we off theirs.
//!
//! Each kind of access has a number; byte `100 + n` is locked by who does it, byte `200 + n` by who
//! does not let others do it. All locks are *read* locks of the open file description (OFD), so any
//! number of openers can hold them; a conflict is found by asking whether a *write* lock would be
//! possible: at `200 + n` for each access wanted, at `100 + n` for each not shared. First lock, then
//! ask, so that of two openers at least one sees the other. Measured from `/proc/locks` with QEMU 10:
//! a writable image is read, written, resized; an image opened read-only, or a backing file, is read;
//! both let others read, but neither write nor resize.
//!
//! Unsafe is needed for `fcntl` with a lock structure, which has no safe wrapper. Every call passes a
//! live descriptor and a local structure.
//!
//! The locks go with the lock value, by an explicit unlock: the open file description itself may
//! live on for a while in an io_uring that the kernel tears down in its own time. For the same reason
//! the lock of a killed process stays for some 20-60 ms after its death, until its last writes are
//! over; taking a lock therefore tries again for a while.

#![expect(unsafe_code, reason = "fcntl; see the module's text")]

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::file::HostFile;

/// Byte of who does an access.
const USED_BASE: i64 = 100;
/// Byte of who keeps others from it.
const UNSHARED_BASE: i64 = 200;
/// Number of the access "reads a consistent state".
const READ: i64 = 0;
/// Number of the access "writes".
const WRITE: i64 = 1;
/// Number of the access "changes the length".
const RESIZE: i64 = 3;

/// How long taking a lock is tried again.
pub const LOCK_PATIENCE: Duration = Duration::from_secs(2);
const RETRY_EVERY: Duration = Duration::from_millis(20);

/// Whether to lock: QEMU's words.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Locking {
    /// Where the host can.
    #[default]
    Auto,
    /// Or fail.
    On,
    /// Not at all.
    Off,
}

/// What an image is opened for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LockKind {
    /// The image that is written.
    Writer,
    /// An image that is only read: a backing file, or the image itself with `--read-only`.
    Reader,
}

/// Why there is no lock.
#[derive(thiserror::Error, Debug)]
#[non_exhaustive]
pub enum LockError {
    /// Somebody writes to the image.
    #[error(
        "the image is in use by another process (QEMU, qemu-img or qblkd), which writes to it; stop that one first"
    )]
    Written,
    /// Somebody needs the image to stay as it is.
    #[error(
        "the image is in use by another process (QEMU, qemu-img or qblkd), which does not let others \
         write to it; stop that one first"
    )]
    KeptFromWriting,
    /// Somebody needs the image for himself.
    #[error("the image is in use by another process, which keeps others from reading it")]
    KeptFromReading,
    /// The host has no such locks on this file, and `on` asks for them.
    #[error("the host cannot lock the image (locking is \"on\"; \"auto\" would go without)")]
    Unsupported(#[source] io::Error),
    /// Something else.
    #[error("cannot lock the image")]
    Io(#[source] io::Error),
}

/// A held lock; given back on drop.
#[derive(Debug)]
pub struct ImageLock {
    /// `None` where there is nothing to give back: locking off, or not possible.
    file: Option<Arc<HostFile>>,
}

impl ImageLock {
    /// Locks an image, trying again for up to `patience` (usually [`LOCK_PATIENCE`]) while somebody
    /// else has it. Blocks the thread.
    ///
    /// # Errors
    /// See [`LockError`].
    pub fn take(
        file: &Arc<HostFile>,
        kind: LockKind,
        locking: Locking,
        patience: Duration,
    ) -> Result<ImageLock, LockError> {
        if locking == Locking::Off {
            return Ok(ImageLock { file: None });
        }
        let deadline = Instant::now() + patience;
        loop {
            match try_lock(file.fd(), kind) {
                Ok(()) => {
                    return Ok(ImageLock {
                        file: Some(Arc::clone(file)),
                    });
                }
                Err(LockError::Unsupported(_)) if locking == Locking::Auto => {
                    return Ok(ImageLock { file: None });
                }
                Err(error @ (LockError::Unsupported(_) | LockError::Io(_))) => return Err(error),
                Err(error) if Instant::now() >= deadline => return Err(error),
                Err(_) => wait_a_little(),
            }
        }
    }

    /// A writer becomes a reader: others may read the image as a backing file, still nobody may
    /// write to it. Nobody else can take the lock meanwhile.
    pub fn become_reader(&self) {
        if let Some(file) = &self.file {
            for access in [WRITE, RESIZE] {
                let byte = (USED_BASE + access, 1);
                // Giving a byte back cannot conflict; a lock that stays keeps others off, no more.
                let _ = lock_call(file.fd(), libc::F_OFD_SETLK, libc::F_UNLCK, byte);
            }
        }
    }

    /// True if the host's lock is held; false with locking off, or where the host has none.
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.file.is_some()
    }
}

impl Drop for ImageLock {
    fn drop(&mut self) {
        if let Some(file) = &self.file {
            unlock(file.fd());
        }
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "nothing reports that a file lock is gone"
)]
fn wait_a_little() {
    std::thread::sleep(RETRY_EVERY);
}

fn try_lock(fd: RawFd, kind: LockKind) -> Result<(), LockError> {
    let used: &[i64] = match kind {
        LockKind::Writer => &[READ, WRITE, RESIZE],
        LockKind::Reader => &[READ],
    };
    let result = lock_and_ask(fd, used, &[WRITE, RESIZE]);
    if result.is_err() {
        unlock(fd);
    }
    result
}

fn lock_and_ask(fd: RawFd, used: &[i64], unshared: &[i64]) -> Result<(), LockError> {
    let ours = used
        .iter()
        .map(|access| (USED_BASE + access, *access, true));
    let ours = ours.chain(
        unshared
            .iter()
            .map(|access| (UNSHARED_BASE + access, *access, false)),
    );
    for (byte, access, is_use) in ours {
        match lock_call(fd, libc::F_OFD_SETLK, libc::F_RDLCK, (byte, 1)) {
            Ok(_) => {}
            // A write lock of the byte, most likely of the whole file: not QEMU's way, but clear.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
                return Err(conflict(access, is_use));
            }
            Err(error) => return Err(refused(error)),
        }
    }
    let asked = used
        .iter()
        .map(|access| (UNSHARED_BASE + access, *access, true));
    let asked = asked.chain(
        unshared
            .iter()
            .map(|access| (USED_BASE + access, *access, false)),
    );
    for (byte, access, is_use) in asked {
        let found = lock_call(fd, libc::F_OFD_GETLK, libc::F_WRLCK, (byte, 1)).map_err(refused)?;
        if found != libc::F_UNLCK {
            return Err(conflict(access, is_use));
        }
    }
    Ok(())
}

/// `is_use`: we want the access and somebody keeps us from it; else somebody does what we would
/// keep him from.
fn conflict(access: i64, is_use: bool) -> LockError {
    match (is_use, access) {
        (true, READ) => LockError::KeptFromReading,
        (true, _) => LockError::KeptFromWriting,
        (false, _) => LockError::Written,
    }
}

/// EINVAL: a kernel before 3.15; ENOLCK, EOPNOTSUPP, ENOSYS: a network or FUSE file system.
fn refused(error: io::Error) -> LockError {
    match error.raw_os_error() {
        Some(libc::EINVAL | libc::ENOLCK | libc::EOPNOTSUPP | libc::ENOSYS) => {
            LockError::Unsupported(error)
        }
        _ => LockError::Io(error),
    }
}

fn unlock(fd: RawFd) {
    // All bytes of the protocol. It can only fail where locking did; closing unlocks too.
    let _ = lock_call(fd, libc::F_OFD_SETLK, libc::F_UNLCK, (USED_BASE, 200));
}

/// One lock call; gives the type of lock that the kernel filled in.
fn lock_call(
    fd: RawFd,
    command: libc::c_int,
    kind: libc::c_int,
    (start, len): (i64, i64),
) -> io::Result<libc::c_int> {
    #[expect(
        clippy::cast_possible_truncation,
        reason = "F_RDLCK, F_WRLCK and SEEK_SET are small"
    )]
    let mut lock = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: start,
        l_len: len,
        // OFD locks belong to no process.
        l_pid: 0,
    };
    // SAFETY: the OFD lock commands read and write one `struct flock`, and `lock` is one.
    let result = unsafe { libc::fcntl(fd, command, &raw mut lock) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(libc::c_int::from(lock.l_type))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::OpenMode;
    use std::io::{BufRead, BufReader, Write};
    use std::path::{Path, PathBuf};
    use std::process::{Child, Command, Output, Stdio};
    use tempfile::TempDir;

    const AT_ONCE: Duration = Duration::ZERO;

    fn open(path: &Path, write: bool) -> Arc<HostFile> {
        Arc::new(
            HostFile::open(
                path,
                OpenMode {
                    write,
                    direct: false,
                },
            )
            .unwrap(),
        )
    }

    fn take(path: &Path, kind: LockKind) -> Result<ImageLock, LockError> {
        let file = open(path, kind == LockKind::Writer);
        ImageLock::take(&file, kind, Locking::On, AT_ONCE)
    }

    fn image() -> (TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image.raw");
        std::fs::write(&path, vec![0; 1 << 20]).unwrap();
        (dir, path)
    }

    /// A qcow2 image made by QEMU (it locks raw images less strictly), or `None`, said loudly, if
    /// its tools are missing.
    fn qemu_image() -> Option<(TempDir, PathBuf)> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image.qcow2");
        let mut qemu_img = Command::new("qemu-img");
        let Ok(output) = qemu_img
            .args(["create", "-f", "qcow2"])
            .arg(&path)
            .arg("1M")
            .output()
        else {
            let text = "SKIPPED: qemu-img is not installed, so the lock protocol is not compared";
            writeln!(io::stderr(), "{text}").unwrap();
            return None;
        };
        assert!(output.status.success());
        Some((dir, path))
    }

    fn qemu_io(path: &Path, read_only: bool, command: &str) -> Output {
        let mut qemu_io = Command::new("qemu-io");
        qemu_io
            .args(read_only.then_some("-r"))
            .args(["-f", "qcow2", "-c", command])
            .arg(path);
        qemu_io.output().unwrap()
    }

    /// `qemu-io` that has the image open until it is dropped.
    struct Holder(Child);

    impl Holder {
        fn new(path: &Path, read_only: bool) -> Holder {
            let mut command = Command::new("qemu-io");
            command
                .args(read_only.then_some("-r"))
                .args(["-f", "qcow2"])
                .arg(path);
            let child = command
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let mut holder = Holder(child);
            // Once it answers, the image is open.
            holder
                .0
                .stdin
                .as_mut()
                .unwrap()
                .write_all(b"length\n")
                .unwrap();
            let mut answer = String::new();
            BufReader::new(holder.0.stdout.take().unwrap())
                .read_line(&mut answer)
                .unwrap();
            assert!(answer.contains("1 MiB"), "{answer}");
            holder
        }
    }

    impl Drop for Holder {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn one_writer_or_many_readers() {
        let (_dir, path) = image();
        let writer = take(&path, LockKind::Writer).unwrap();
        assert!(writer.is_held());
        let in_the_way = |kind| take(&path, kind).unwrap_err();
        assert!(matches!(
            in_the_way(LockKind::Writer),
            LockError::KeptFromWriting
        ));
        assert!(matches!(in_the_way(LockKind::Reader), LockError::Written));
        drop(writer);
        let readers = [take(&path, LockKind::Reader), take(&path, LockKind::Reader)];
        assert!(readers.iter().all(Result::is_ok));
        assert!(matches!(
            in_the_way(LockKind::Writer),
            LockError::KeptFromWriting
        ));
        drop(readers);
        take(&path, LockKind::Writer).unwrap();
    }

    #[test]
    fn a_writer_that_becomes_a_reader_lets_readers_in_and_no_writer() {
        let (_dir, path) = image();
        let lock = take(&path, LockKind::Writer).unwrap();
        lock.become_reader();
        let reader = take(&path, LockKind::Reader).unwrap();
        drop(reader);
        assert!(matches!(
            take(&path, LockKind::Writer).unwrap_err(),
            LockError::KeptFromWriting
        ));
        drop(lock);
        take(&path, LockKind::Writer).unwrap();
    }

    #[test]
    fn a_refused_opener_leaves_no_lock_behind() {
        let (_dir, path) = image();
        let reader = take(&path, LockKind::Reader).unwrap();
        let refused = open(&path, true);
        let result = ImageLock::take(&refused, LockKind::Writer, Locking::Auto, AT_ONCE);
        assert!(result.is_err());
        drop(reader);
        take(&path, LockKind::Writer).unwrap();
    }

    #[test]
    fn locking_off_asks_nobody() {
        let (_dir, path) = image();
        let _writer = take(&path, LockKind::Writer).unwrap();
        let second = open(&path, true);
        let lock = ImageLock::take(&second, LockKind::Writer, Locking::Off, AT_ONCE).unwrap();
        assert!(!lock.is_held());
    }

    #[test]
    fn a_lock_that_goes_in_time_is_waited_for() {
        let (_dir, path) = image();
        let first = take(&path, LockKind::Writer).unwrap();
        let file = open(&path, true);
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| {
                let patience = Duration::from_secs(30);
                ImageLock::take(&file, LockKind::Writer, Locking::Auto, patience)
            });
            drop(first);
            assert!(waiter.join().unwrap().unwrap().is_held());
        });
    }

    #[test]
    fn a_lock_on_the_whole_file_keeps_us_out() {
        let (_dir, path) = image();
        let other = open(&path, true);
        lock_call(other.fd(), libc::F_OFD_SETLK, libc::F_WRLCK, (0, 0)).unwrap();
        assert!(take(&path, LockKind::Writer).is_err());
        assert!(take(&path, LockKind::Reader).is_err());
    }

    #[test]
    fn qemu_is_kept_off_our_images() {
        let Some((_dir, path)) = qemu_image() else {
            return;
        };
        let refusal = |read_only| {
            let output = qemu_io(&path, read_only, "read 0 512");
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            assert_eq!(!output.status.success(), text.contains("lock"), "{text}");
            !output.status.success()
        };
        let writer = take(&path, LockKind::Writer).unwrap();
        assert!(refusal(false) && refusal(true));
        drop(writer);
        let reader = take(&path, LockKind::Reader).unwrap();
        assert!(refusal(false) && !refusal(true));
        drop(reader);
        assert!(!refusal(false));
    }

    #[test]
    fn we_are_kept_off_images_of_qemu() {
        let Some((_dir, path)) = qemu_image() else {
            return;
        };
        let writer = Holder::new(&path, false);
        assert!(matches!(
            take(&path, LockKind::Writer),
            Err(LockError::KeptFromWriting)
        ));
        assert!(matches!(
            take(&path, LockKind::Reader),
            Err(LockError::Written)
        ));
        drop(writer);
        let _reader = Holder::new(&path, true);
        assert!(matches!(
            take(&path, LockKind::Writer),
            Err(LockError::KeptFromWriting)
        ));
        take(&path, LockKind::Reader).unwrap();
    }
}
