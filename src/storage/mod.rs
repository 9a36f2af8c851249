//! Host file I/O in bytes: the [`Storage`] contract and its implementations.
//!
//! Owns host files ([`HostFile`]), buffers that are lent to the kernel ([`AlignedBuf`], [`SgList`]),
//! the two real implementations ([`BlockingStorage`] for opening and tools, [`RingStorage`] for
//! serving), QEMU's image locks ([`lock`]) and, in tests only, the simulated disk (`sim`).
//! Knows nothing of qcow2: offsets here are host offsets in bytes and nothing else.
//!
//! Invariants every implementation keeps:
//! - Memory given to an operation stays alive until the operation is over, also when its future is
//!   dropped before that.
//! - A completed write is visible to every later read, and durable only after a `sync_data` that was
//!   *submitted after* the write completed. A crash may keep any part of what is not yet durable,
//!   torn at 512 bytes.
//! - Two operations in flight at once have no order.
//! - An errno is never dropped; a fallback names the errnos it covers.

pub mod buffer;
pub mod file;
mod host;
pub mod lock;
mod range_lock;
pub mod ring;
#[cfg(test)]
pub mod sim;

use std::future::Future;
use std::io;
use std::time::Duration;

pub use buffer::{AlignedBuf, SgList};
pub use file::{Direction, HostFile, HostFileKind, OpenMode, block_on};
pub use host::{BlockingStorage, HostStorage};
pub use ring::{Ring, RingError, RingStorage};

/// Index of a host file in the file table of a storage handle.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct FileId(pub u16);

/// One thread's access to the host files.
///
/// Futures are not `Send`; they own everything that they lend to the kernel, so dropping one early
/// is always allowed: its operation then still takes place, unseen, or not at all.
pub trait Storage: 'static {
    /// Reads exactly `sg.len()` bytes; bytes past the end of the file read as zeroes.
    ///
    /// # Panics
    /// If `sg` holds a part of [`SgList::zeroes`], which can only be written from.
    fn read(&self, file: FileId, offset: u64, sg: SgList) -> impl Future<Output = io::Result<()>>;

    /// Fills `buf` from `offset` and gives it back; bytes past the end of the file read as zeroes.
    fn read_buf(
        &self,
        file: FileId,
        offset: u64,
        buf: AlignedBuf,
    ) -> impl Future<Output = (io::Result<()>, AlignedBuf)>;

    /// Writes all of `sg`; short writes are continued. Any offset and length, down to one byte:
    /// what the host cannot take as it is is bounced, or read, changed and written back.
    fn write(&self, file: FileId, offset: u64, sg: SgList) -> impl Future<Output = io::Result<()>>;

    /// The range reads as zeroes afterwards; with `unmap` the host may deallocate it, without it
    /// stays allocated where the host can do that. Never makes the file longer (what is past the
    /// end reads as zeroes anyway).
    fn write_zeroes(
        &self,
        file: FileId,
        offset: u64,
        len: u64,
        unmap: bool,
    ) -> impl Future<Output = io::Result<()>>;

    /// Deallocates. `Ok(true)`: the range reads as zeroes now; `Ok(false)`: the host cannot punch
    /// holes, nothing was done.
    fn punch_hole(
        &self,
        file: FileId,
        offset: u64,
        len: u64,
    ) -> impl Future<Output = io::Result<bool>>;

    /// Makes every operation that completed before this call durable (`fdatasync`).
    fn sync_data(&self, file: FileId) -> impl Future<Output = io::Result<()>>;

    /// Has the host allocate a range of a regular file within its length, so that later writes need
    /// no allocation. A hint: where it cannot be had (also for lack of space) nothing is done.
    fn reserve(&self, file: FileId, offset: u64, len: u64) -> impl Future<Output = ()> {
        let _ = (file, offset, len);
        std::future::ready(())
    }

    /// Lets some time pass. Blocks the thread: for background work on a thread of its own.
    #[expect(
        clippy::disallowed_methods,
        reason = "nothing to listen for: who calls this polls what others publish without a wake-up"
    )]
    fn pause(&self, duration: Duration) -> impl Future<Output = ()> {
        std::thread::sleep(duration);
        std::future::ready(())
    }

    /// Sets the length of a regular file; new bytes read as zeroes. Durable after `sync_data`.
    fn set_len(&self, file: FileId, len: u64) -> impl Future<Output = io::Result<()>>;

    /// Current length of the file, or size of the block device. A system call: not for every
    /// request.
    fn len(&self, file: FileId) -> io::Result<u64>;

    /// True for a regular file, false for a block device.
    fn can_grow(&self, file: FileId) -> bool;
}
