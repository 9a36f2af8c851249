//! Host files: opening them safely, what they are, and what the host asks of direct I/O on them.
//!
//! Owns the descriptors and per-file facts that all threads share ([`HostFile`]), and [`block_on`].
//! The care that I/O on the contents needs is in `host.rs`.
//!
//! Unsafe is needed for `statx`, `fcntl`, `fallocate`, vectored I/O on raw memory and two block-device
//! ioctls, which have no safe wrapper in the standard library. Each call passes a live descriptor and
//! a pointer to a local of the right type, or the memory of an `SgList` that outlives the call.
//!
//! Invariants: only regular files and block devices are ever opened for I/O. `offset_align` and
//! `mem_align` are powers of two, 1 unless the file is direct. Nothing of a file's size is cached but
//! the tail it had at open.

#![expect(unsafe_code, reason = "system calls; see the module's text")]

use std::fs::{File, OpenOptions};
use std::future::Future;
use std::io;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};

use libc::c_int;
use smallvec::SmallVec;

use super::buffer::{AlignedBuf, BUFFER_ALIGN, SgList};
use super::range_lock::RangeLock;

/// A buffered write dirties whole pages of the page cache (no host has larger ones than this), and
/// their write-back may undo a direct write to the same page. So the pages are kept apart.
const PAGE_SIZE_MAX: u64 = 64 << 10;

/// The most segments that one system call takes (Linux: `UIO_MAXIOV`).
pub(crate) const IOV_MAX: usize = 1024;

/// How to open a host file.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct OpenMode {
    /// Open for writing too.
    pub write: bool,
    /// Bypass the page cache (O_DIRECT).
    pub direct: bool,
}

/// What a host file is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HostFileKind {
    /// Can grow, shrink, and have holes.
    Regular,
    /// Has a fixed size.
    BlockDevice,
}

/// Which way data goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Direction {
    /// From the host file to memory.
    Read,
    /// From memory to the host file.
    Write,
}

/// A host operation that a file system or device may lack; found out once and remembered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Feature {
    PunchHole = 1,
    ZeroRange = 2,
}

/// An open host file, shared by all threads.
#[derive(Debug)]
pub struct HostFile {
    file: File,
    /// For direct regular files that are written: a second, buffered descriptor for a last block
    /// that ends the file in its middle (`tail`). `fdatasync` through either covers the whole inode.
    buffered: Option<File>,
    path: PathBuf,
    kind: HostFileKind,
    mode: OpenMode,
    /// Memory of a direct operation must start at a multiple of this.
    mem_align: u64,
    /// Offset and length of a direct operation must be multiples of this: the host's block.
    offset_align: u64,
    /// Holes and zero ranges are multiples of this: of a block device its logical block size, of a
    /// direct regular file the file system's block; else 1.
    block_size: u64,
    /// The pages that hold the end of a direct regular file whose length at open is no multiple of
    /// the host's block; empty otherwise. Writes in here go through `buffered` and the range lock, for
    /// as long as the file is open; nothing else writes here.
    tail: Range<u64>,
    /// Bit set of [`Feature`]s that the host refused with "not supported".
    missing: AtomicU8,
    ranges: Arc<RangeLock>,
    /// On a file system that lives in memory: transfers wait for no device, and making it durable does
    /// nothing.
    in_memory: bool,
}

/// Types of file systems that live in memory (Linux: magic numbers of tmpfs and ramfs).
const MEMORY_FILE_SYSTEMS: [i64; 2] = [0x0102_1994, 0x8584_58f6];

impl HostFile {
    /// Opens `path`.
    ///
    /// # Errors
    /// What the host says, in a sentence; and a refusal for anything but a regular file or a block
    /// device, found out before the file is really opened, so that nothing happens to it.
    pub fn open(path: impl AsRef<Path>, mode: OpenMode) -> io::Result<HostFile> {
        let path = path.as_ref();
        // O_PATH only looks the name up: no driver's open function runs, no FIFO partner wakes up.
        let probe = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_CLOEXEC)
            .open(path)?;
        let probed = probe.metadata()?;
        kind_of(&probed)?;
        let file = open_flags(path, mode, if mode.direct { libc::O_DIRECT } else { 0 })
            .map_err(|error| explain_open(error, mode))?;
        let opened = file.metadata()?;
        if (opened.dev(), opened.ino()) != (probed.dev(), probed.ino()) {
            return Err(io::Error::other(
                "the file was replaced while it was being opened",
            ));
        }
        HostFile::new(file, path, mode)
    }

    /// Takes a file that is open already, in the mode given; `path` is for messages and for the
    /// second descriptor of direct files.
    ///
    /// # Errors
    /// As [`HostFile::open`].
    pub fn from_file(file: File, path: impl AsRef<Path>, mode: OpenMode) -> io::Result<HostFile> {
        HostFile::new(file, path.as_ref(), mode)
    }

    fn new(file: File, path: &Path, mode: OpenMode) -> io::Result<HostFile> {
        let metadata = file.metadata()?;
        let kind = kind_of(&metadata)?;
        clear_nonblock(&file)?;
        let (mem_align, offset_align) = if mode.direct {
            direct_alignment(&file, kind)?
        } else {
            (1, 1)
        };
        let regular_direct = mode.direct && kind == HostFileKind::Regular;
        let buffered = if regular_direct && mode.write {
            let second = open_flags(path, mode, 0)?;
            let opened = second.metadata()?;
            if (opened.dev(), opened.ino()) != (metadata.dev(), metadata.ino()) {
                return Err(io::Error::other(
                    "the file was replaced while it was being opened",
                ));
            }
            clear_nonblock(&second)?;
            Some(second)
        } else {
            None
        };
        let block_size = match kind {
            // The file system zeroes the edges of a hole through the page cache, and write-back of
            // such a page collides with direct writes beside them (the kernel then reports EIO).
            HostFileKind::Regular if mode.direct => metadata
                .blksize()
                .next_power_of_two()
                .clamp(4096, PAGE_SIZE_MAX),
            HostFileKind::Regular => 1,
            HostFileKind::BlockDevice => logical_block_size(&file)?,
        };
        let in_memory = rustix::fs::fstatfs(&file)
            .is_ok_and(|found| MEMORY_FILE_SYSTEMS.contains(&found.f_type));
        let mut host_file = HostFile {
            file,
            buffered,
            path: path.to_path_buf(),
            kind,
            mode,
            mem_align,
            offset_align,
            block_size,
            tail: 0..0,
            missing: AtomicU8::new(0),
            ranges: Arc::default(),
            in_memory,
        };
        host_file.find_tail(metadata.len());
        Ok(host_file)
    }

    /// Whether the file lives in memory, so that neither transfers nor syncs have anything to wait for.
    #[inline]
    pub(crate) fn is_in_memory(&self) -> bool {
        self.in_memory
    }

    /// The name it was opened by.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Regular file or block device.
    #[must_use]
    pub fn kind(&self) -> HostFileKind {
        self.kind
    }

    /// The mode it was opened in.
    #[must_use]
    pub fn mode(&self) -> OpenMode {
        self.mode
    }

    /// The descriptor that data goes through.
    #[must_use]
    pub fn as_file(&self) -> &File {
        &self.file
    }

    /// Alignment of memory that the host asks for; 1 unless direct.
    #[must_use]
    pub fn mem_align(&self) -> u64 {
        self.mem_align
    }

    /// Alignment of offsets and lengths that the host asks for; 1 unless direct.
    #[must_use]
    pub fn offset_align(&self) -> u64 {
        self.offset_align
    }

    /// Device and inode number: the same file under any name.
    ///
    /// # Errors
    /// What `fstat` says.
    pub fn identity(&self) -> io::Result<(u64, u64)> {
        let metadata = self.file.metadata()?;
        Ok(match self.kind {
            HostFileKind::Regular => (metadata.dev(), metadata.ino()),
            HostFileKind::BlockDevice => (u64::MAX, metadata.rdev()),
        })
    }

    /// Current length, or size of the device. A system call.
    ///
    /// # Errors
    /// What the host says.
    #[expect(
        clippy::len_without_is_empty,
        reason = "nobody asks whether an image is empty"
    )]
    pub fn len(&self) -> io::Result<u64> {
        match self.kind {
            HostFileKind::Regular => Ok(self.file.metadata()?.len()),
            HostFileKind::BlockDevice => block_device_size(&self.file),
        }
    }

    /// Whether an operation may go to the kernel as it is, without the care of
    /// [`Storage`](super::Storage): memory, offset and length suit the host, and no
    /// read-change-write of another request can touch the same host block or page.
    ///
    /// True for all of a buffered file. On a direct file with blocks larger than 512 bytes, writes
    /// always take the slow path, where they wait for read-change-writes of the same block.
    #[inline]
    #[must_use]
    pub fn direct_ok(&self, direction: Direction, offset: u64, iovs: &[libc::iovec]) -> bool {
        if !self.mode.direct {
            return true;
        }
        let mut end = offset;
        let (mut lens, mut bases) = (offset, 0);
        for iov in iovs {
            lens |= iov.iov_len as u64;
            bases |= iov.iov_base.addr() as u64;
            end = end.saturating_add(iov.iov_len as u64);
        }
        let aligned = lens & (self.offset_align - 1) == 0 && bases & (self.mem_align - 1) == 0;
        match direction {
            Direction::Read => aligned,
            Direction::Write => {
                aligned && self.offset_align <= 512 && !self.touches_tail(offset, end)
            }
        }
    }

    pub(crate) fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// The descriptor through the page cache: another one only for direct regular files that are
    /// written.
    pub(crate) fn buffered_fd(&self) -> Option<RawFd> {
        self.buffered.as_ref().map(AsRawFd::as_raw_fd)
    }

    pub(crate) fn ranges(&self) -> &Arc<RangeLock> {
        &self.ranges
    }

    pub(crate) fn block_size(&self) -> u64 {
        self.block_size
    }

    pub(crate) fn tail(&self) -> &Range<u64> {
        &self.tail
    }

    #[inline]
    pub(crate) fn touches_tail(&self, start: u64, end: u64) -> bool {
        start < self.tail.end && self.tail.start < end
    }

    fn find_tail(&mut self, len: u64) {
        // A change of length zeroes the rest of the file system's block through the page cache.
        let block = self.offset_align.max(self.block_size);
        if self.buffered.is_some() && !len.is_multiple_of(block) {
            let start = len - len % PAGE_SIZE_MAX;
            self.tail = start..start.saturating_add(PAGE_SIZE_MAX);
        }
    }

    pub(crate) fn lacks(&self, feature: Feature) -> bool {
        self.missing.load(Ordering::Relaxed) & feature as u8 != 0
    }

    pub(crate) fn note_missing(&self, feature: Feature) {
        self.missing.fetch_or(feature as u8, Ordering::Relaxed);
    }

    /// Pretends that the host asks for this alignment, so that a machine with small blocks can test
    /// what a machine with large ones needs. The larger alignment suits the real host too.
    #[cfg(test)]
    pub(crate) fn with_alignment(mut self, mem_align: u64, offset_align: u64) -> HostFile {
        assert!(self.mode.direct && offset_align >= self.offset_align);
        (self.mem_align, self.offset_align) = (mem_align, offset_align);
        let len = self.len().unwrap();
        self.find_tail(len);
        self
    }
}

/// True for the errnos by which a host says that it cannot do an operation at all; a fallback may
/// cover these and no other.
pub(crate) fn is_unsupported(error: &io::Error) -> bool {
    // ENOTSUP is the same number as EOPNOTSUPP on Linux.
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOTTY))
}

fn kind_of(metadata: &std::fs::Metadata) -> io::Result<HostFileKind> {
    let file_type = metadata.file_type();
    let found = if file_type.is_file() {
        return Ok(HostFileKind::Regular);
    } else if file_type.is_block_device() {
        return Ok(HostFileKind::BlockDevice);
    } else if file_type.is_dir() {
        "a directory"
    } else if file_type.is_fifo() {
        "a FIFO"
    } else if file_type.is_socket() {
        "a socket"
    } else if file_type.is_char_device() {
        "a character device"
    } else {
        "something else"
    };
    let text = format!("it is {found}; an image must be a regular file or a block device");
    Err(io::Error::new(io::ErrorKind::InvalidInput, text))
}

/// Opens for I/O. O_NONBLOCK, so that not even a file swapped in after the probe can hang us.
fn open_flags(path: &Path, mode: OpenMode, flags: c_int) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(mode.write)
        .custom_flags(flags | libc::O_NONBLOCK | libc::O_CLOEXEC | libc::O_NOCTTY)
        .open(path)
}

fn explain_open(error: io::Error, mode: OpenMode) -> io::Error {
    if mode.direct && error.raw_os_error() == Some(libc::EINVAL) {
        return no_direct();
    }
    error
}

fn no_direct() -> io::Error {
    io::Error::new(
        io::ErrorKind::Unsupported,
        "its file system does not support O_DIRECT; use a --cache mode that goes through the page \
         cache (writeback or writethrough)",
    )
}

/// io_uring gives up on an O_NONBLOCK file with EAGAIN where it would else wait for the disk.
fn clear_nonblock(file: &File) -> io::Result<()> {
    // SAFETY: F_GETFL takes no pointer; the descriptor is alive, `file` is borrowed.
    let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
    if flags < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: F_SETFL takes no pointer; the descriptor is alive, `file` is borrowed.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags & !libc::O_NONBLOCK) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Memory and offset alignment that the host wants from direct I/O on this file.
fn direct_alignment(file: &File, kind: HostFileKind) -> io::Result<(u64, u64)> {
    let mut statx = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the path is an empty C string, allowed by AT_EMPTY_PATH, and `statx` is a local of
    // the type that the call fills.
    let result = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            statx.as_mut_ptr(),
        )
    };
    if result == 0 {
        // SAFETY: the call succeeded; besides, all zeroes is a value of this type.
        let statx = unsafe { statx.assume_init() };
        if statx.stx_mask & libc::STATX_DIOALIGN != 0 {
            let (mem, offset) = (
                u64::from(statx.stx_dio_mem_align),
                statx.stx_dio_offset_align,
            );
            if mem == 0 || offset == 0 {
                return Err(no_direct());
            }
            return checked_alignment(mem.max(1), u64::from(offset));
        }
    } else {
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::ENOSYS) {
            return Err(error);
        }
    }
    if kind == HostFileKind::BlockDevice {
        let block = logical_block_size(file)?;
        return checked_alignment(block, block);
    }
    // A file system that does not say (tmpfs, NFS, FUSE): try a sector, else be careful.
    let mut buf = AlignedBuf::zeroed(BUFFER_ALIGN);
    match file.read_at(&mut buf[512..1024], 0) {
        Ok(count) if count != 0 => Ok((512, 512)),
        Ok(_) => checked_alignment(BUFFER_ALIGN as u64, BUFFER_ALIGN as u64),
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            match file.read_at(&mut buf, 0) {
                Ok(_) => checked_alignment(BUFFER_ALIGN as u64, BUFFER_ALIGN as u64),
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Err(no_direct()),
                Err(error) => Err(error),
            }
        }
        Err(error) => Err(error),
    }
}

fn checked_alignment(mem: u64, offset: u64) -> io::Result<(u64, u64)> {
    if !mem.is_power_of_two() || !offset.is_power_of_two() || mem > BUFFER_ALIGN as u64 {
        let text = format!("O_DIRECT on it needs an alignment of {mem}/{offset} bytes");
        return Err(io::Error::new(io::ErrorKind::Unsupported, text));
    }
    Ok((mem, offset))
}

/// Linux: `_IOR(0x12, 114, size_t)`, size of a block device in bytes.
#[cfg(target_pointer_width = "64")]
const BLKGETSIZE64: libc::Ioctl = 0x8008_1272_u32 as libc::Ioctl;

fn block_device_size(file: &File) -> io::Result<u64> {
    let mut size = 0_u64;
    // SAFETY: BLKGETSIZE64 writes one u64, and `size` is one.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), BLKGETSIZE64, &raw mut size) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(size)
    }
}

fn logical_block_size(file: &File) -> io::Result<u64> {
    let mut size: c_int = 0;
    // SAFETY: BLKSSZGET writes one int, and `size` is one.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::BLKSSZGET, &raw mut size) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    u64::try_from(size).map_err(io::Error::other)
}

/// One blocking `preadv` or `pwritev` with as much of `sg` as the kernel takes at once.
pub(crate) fn transfer(
    direction: Direction,
    fd: RawFd,
    offset: u64,
    sg: &SgList,
) -> io::Result<usize> {
    let iovs: SmallVec<[libc::iovec; 16]> = sg.iovecs().take(IOV_MAX).collect();
    // SAFETY: `iovs` holds segments of `sg`, whose memory is valid while it is borrowed.
    unsafe { transfer_iovecs(direction, fd, offset, &iovs) }
}

/// One blocking `preadv` or `pwritev`.
///
/// # Safety
/// The memory of `iovs` is valid for the call: for writes of a read, for reads of a write.
pub(crate) unsafe fn transfer_iovecs(
    direction: Direction,
    fd: RawFd,
    offset: u64,
    iovs: &[libc::iovec],
) -> io::Result<usize> {
    let offset = file_offset(offset)?;
    let count = c_int::try_from(iovs.len()).map_err(io::Error::other)?;
    let result = match direction {
        // SAFETY: by the caller's promise; the array is as long as it says.
        Direction::Read => unsafe { libc::preadv(fd, iovs.as_ptr(), count, offset) },
        // SAFETY: as above.
        Direction::Write => unsafe { libc::pwritev(fd, iovs.as_ptr(), count, offset) },
    };
    match usize::try_from(result) {
        Ok(moved) => Ok(moved),
        // -1: the cause is in errno.
        Err(_) => Err(io::Error::last_os_error()),
    }
}

/// One blocking `fallocate`.
pub(crate) fn fallocate(fd: RawFd, mode: i32, offset: u64, len: u64) -> io::Result<()> {
    // SAFETY: the call takes no pointer.
    let result = unsafe { libc::fallocate(fd, mode, file_offset(offset)?, file_offset(len)?) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

fn file_offset(offset: u64) -> io::Result<libc::off_t> {
    match libc::off_t::try_from(offset) {
        Ok(offset) => Ok(offset),
        Err(_) => Err(io::Error::from_raw_os_error(libc::EFBIG)),
    }
}

/// Runs a future on this thread, which sleeps while the future waits. For tools and start-up.
pub fn block_on<F: Future>(future: F) -> F::Output {
    struct Unpark(Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut context = Context::from_waker(&waker);
    let mut future = pin!(future);
    loop {
        match future.as_mut().poll(&mut context) {
            Poll::Ready(output) => return output,
            Poll::Pending => thread::park(),
        }
    }
}
