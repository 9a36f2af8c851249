//! One thread's io_uring: the only code that builds a submission queue entry (SQE).
//!
//! Two ways in. The *fast path* ([`Ring::push_readv`] and its like) copies the segments into a slot,
//! queues the SQE and reports the kernel's bare result with the caller's token; it allocates nothing
//! once its slots are warm. The *slow path* ([`RingStorage`]) is the [`Storage`](super::Storage)
//! contract with all its care (`host.rs`). Nothing here submits by itself: the worker's loop calls
//! [`Ring::submit`] or [`Ring::submit_and_wait`], then [`Ring::reap`].
//!
//! Transfers to and from a file that lives in memory (tmpfs) are no SQEs. The kernel would hand each to
//! a thread of its own, writes one after the other, which costs more than the copy; and there is no device
//! to wait for. So they are made at once, and are reaped as all others. Long reads are handed over: several
//! processors copy faster than one. So are very long writes, which would keep other queues waiting.
//!
//! Unsafe is needed to hand SQEs with raw pointers to the kernel; everybody else goes through the
//! methods here. Ownership: what the kernel may touch belongs to the operation's slot until the
//! completion (CQE) is reaped: the iovec array and the eventfd's 8 bytes are heap memory of the slot,
//! the data of slow operations is an `SgList` in the slot, also when the future is gone; only the data
//! of a fast operation is the caller's, by the contract of the push functions. Dropping the last
//! handle of a ring cancels what could wait for ever and drains the rest before memory goes.
//!
//! Invariants: the index of a slot is its SQE's user data, each SQE has exactly one CQE, so a slot is
//! free again when that is reaped. At most `entries` operations of each sort (fast, slow, eventfd)
//! and one cancel are in flight, and the completion queue has room for four times `entries`: it
//! cannot overflow. No callback or waker runs while `Core` is borrowed.
//!
//! Set-up: `COOP_TASKRUN` with the task-run flag. No interrupt between CPUs for a completion, and a
//! polling loop sees by two loads whether one is there or waits for the kernel to be entered. Deferred
//! task work and a kernel polling thread measured slower or dearer.

#![expect(
    unsafe_code,
    reason = "raw memory for the kernel; see the module's text"
)]

mod core;
mod error;
mod file_table;
mod operation;
mod slot;
mod storage;

use std::cell::RefCell;
use std::io;
use std::mem;
use std::os::fd::RawFd;
use std::rc::Rc;
use std::time::Duration;

use self::core::Core;
use self::slot::{BATCH, Later, Sort};
use super::FileId;
use super::file::Direction;

pub use self::error::RingError;
pub use self::slot::Full;
pub use self::storage::RingStorage;

/// Largest `entries`: the kernel allows completion queues of 65536.
const ENTRIES_MAX: u32 = 8192;
const ENTRIES_MIN: u32 = 16;

/// An io_uring of one thread. Clones are the same ring.
#[derive(Clone)]
pub struct Ring {
    core: Rc<RefCell<Core>>,
}

impl Ring {
    /// A ring with room for `entries` operations of each sort (rounded up to a power of two). To be
    /// created by the thread that uses it.
    ///
    /// # Errors
    /// If there is no usable io_uring, with the likely reason.
    pub fn new(entries: u32) -> Result<Ring, RingError> {
        let entries = entries.clamp(ENTRIES_MIN, ENTRIES_MAX).next_power_of_two();
        let core = Core::new(entries)?;
        Ok(Ring {
            core: Rc::new(RefCell::new(core)),
        })
    }

    /// Queues a vectored read of a host file. `token` comes back from [`Ring::reap`] with the bare
    /// result: it may be short, or an errno such as EAGAIN; the care is the caller's, most simply
    /// by doing it again on the slow path.
    /// [`HostFile::direct_ok`](super::HostFile::direct_ok) must hold.
    ///
    /// # Errors
    /// [`Full`]; nothing happened then.
    ///
    /// # Safety
    /// The memory of `iovs` (not the array) stays valid for writes until the token is reaped or the
    /// ring is dropped.
    ///
    /// # Panics
    /// If there is no such file or more than 1024 segments.
    #[inline]
    pub unsafe fn push_readv(
        &self,
        file: FileId,
        offset: u64,
        iovs: &[libc::iovec],
        token: u64,
    ) -> Result<(), Full> {
        self.core
            .borrow_mut()
            .push_fast(Direction::Read, file, offset, iovs, token)
    }

    /// Queues a vectored write; otherwise as [`Ring::push_readv`].
    ///
    /// # Errors
    /// [`Full`]; nothing happened then.
    ///
    /// # Safety
    /// The memory of `iovs` (not the array) stays valid for reads until the token is reaped or the
    /// ring is dropped.
    ///
    /// # Panics
    /// As [`Ring::push_readv`].
    #[inline]
    pub unsafe fn push_writev(
        &self,
        file: FileId,
        offset: u64,
        iovs: &[libc::iovec],
        token: u64,
    ) -> Result<(), Full> {
        self.core
            .borrow_mut()
            .push_fast(Direction::Write, file, offset, iovs, token)
    }

    /// Reads an eventfd, blocking or not, when it is written: `token` is reaped with 8 (or an
    /// errno), the count is consumed. To be armed again after each.
    ///
    /// # Errors
    /// [`Full`].
    pub fn arm_eventfd(&self, fd: RawFd, token: u64) -> Result<(), Full> {
        self.core.borrow_mut().arm_eventfd(fd, token)
    }

    /// Takes the arming of a token back; the kernel has let go of the descriptor when this returns.
    /// True if an event had been consumed that [`Ring::reap`] did not report yet, and now never
    /// will.
    ///
    /// # Errors
    /// If the kernel fails to be entered; the arming stays then.
    pub fn cancel_eventfd(&self, token: u64) -> io::Result<bool> {
        let mut consumed = false;
        let mut later = Later::default();
        let result = {
            let mut core = self.core.borrow_mut();
            core.cancel_eventfd(token, &mut later, &mut consumed)
        };
        later.run();
        result.map(|()| consumed)
    }

    /// Hands what is queued to the kernel; no system call if there is nothing to do.
    ///
    /// # Errors
    /// If the kernel refuses for good.
    pub fn submit(&self) -> io::Result<()> {
        self.core.borrow_mut().submit()
    }

    /// Hands what is queued to the kernel and sleeps until `min_complete` completions are there, the
    /// timeout is over, or a signal comes.
    ///
    /// # Errors
    /// If the kernel refuses for good.
    pub fn submit_and_wait(&self, min_complete: u32, timeout: Option<Duration>) -> io::Result<()> {
        let mut core = self.core.borrow_mut();
        if min_complete == 0 || !core.backlog.is_empty() {
            return core.submit();
        }
        core.wait(min_complete, timeout)
    }

    /// Takes the completions that are there: tokens go to `on_complete` with the kernel's result,
    /// futures of slow operations are woken. `on_complete` may push and arm.
    pub fn reap(&self, mut on_complete: impl FnMut(u64, i32)) {
        loop {
            let mut later = Later::default();
            self.core.borrow_mut().take_completions(&mut later);
            let done = later.fast.len() < BATCH && later.wakers.is_empty();
            let fast = mem::take(&mut later.fast);
            later.run();
            for (token, result) in fast {
                on_complete(token, result);
            }
            if done {
                return;
            }
        }
    }

    /// Whether a reap would find something. Looks at shared memory only, so it may be polled.
    #[inline]
    #[must_use]
    pub fn has_completions(&self) -> bool {
        self.core.borrow_mut().has_completions()
    }

    /// Operations submitted or queued and not reaped, armed eventfds included.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.io_in_flight() + self.core.borrow().in_flight(Sort::Event)
    }

    /// As [`Ring::in_flight`], without armed eventfds: what a drain waits for.
    #[must_use]
    pub fn io_in_flight(&self) -> usize {
        let core = self.core.borrow();
        core.in_flight(Sort::Fast) + core.in_flight(Sort::Slow)
    }

    /// Runs a future to its end with this ring alone.
    #[cfg(test)]
    pub(crate) fn run<F: Future>(&self, future: F) -> F::Output {
        let mut future = std::pin::pin!(future);
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        loop {
            if let std::task::Poll::Ready(output) = future.as_mut().poll(&mut context) {
                return output;
            }
            self.submit_and_wait(1, Some(Duration::from_millis(1)))
                .unwrap();
            self.reap(|_, _| {});
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::host::tests::{file_of, open_way, pattern, places};
    use crate::storage::{AlignedBuf, HostFile, OpenMode, SgList, Storage};
    use std::cell::Cell;
    use std::future::Future;
    use std::os::fd::AsRawFd;
    use std::sync::Arc;
    use std::task::{Context, Waker};
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    fn ring() -> Ring {
        Ring::new(64).unwrap()
    }

    fn reap_all(ring: &Ring) -> Vec<(u64, i32)> {
        let mut found = Vec::new();
        while ring.io_in_flight() != 0 {
            ring.submit_and_wait(1, Some(Duration::from_secs(10)))
                .unwrap();
            ring.reap(|token, result| found.push((token, result)));
        }
        found.sort_unstable();
        found
    }

    fn iov(buf: &mut [u8]) -> libc::iovec {
        libc::iovec {
            iov_base: buf.as_mut_ptr().cast(),
            iov_len: buf.len(),
        }
    }

    #[test]
    fn the_fast_path_reports_bare_results() {
        for direct in [false, true] {
            let dir = &places()[0];
            let path = file_of(dir, &pattern(8192, 1));
            let file = open_way(&path, (direct, None)).unwrap();
            let ring = ring();
            let _storage = RingStorage::new(ring.clone(), vec![Arc::new(file)]).unwrap();
            let mut one = AlignedBuf::zeroed(4096);
            let mut two = AlignedBuf::zeroed(8192);
            let new = pattern(4096, 2);
            let mut from = AlignedBuf::from_slice(&new);
            let (head, tail) = two.split_at_mut(4096);
            let pair = [iov(head), iov(tail)];
            // SAFETY: the buffers live until `reap_all` has reaped every operation.
            unsafe { ring.push_readv(FileId(0), 0, &[iov(&mut one)], 7) }.unwrap();
            // SAFETY: as above.
            unsafe { ring.push_readv(FileId(0), 4096, &pair, 8) }.unwrap();
            // SAFETY: as above.
            unsafe { ring.push_writev(FileId(0), 16_384, &[iov(&mut from)], 9) }.unwrap();
            assert_eq!(ring.in_flight(), 3);
            assert_eq!(reap_all(&ring), [(7, 4096), (8, 4096), (9, 4096)]);
            assert!(one[..] == pattern(8192, 1)[..4096]);
            assert!(two[..4096] == pattern(8192, 1)[4096..]);
            assert!(std::fs::read(&path).unwrap()[16_384..] == new);
            assert!(!ring.has_completions());
        }
    }

    /// A folder in memory, if the host has one.
    fn memory() -> Option<tempfile::TempDir> {
        let dir = places().pop().unwrap();
        let file = open_way(&file_of(&dir, &[]), (false, None)).unwrap();
        file.is_in_memory().then_some(dir)
    }

    #[test]
    fn a_fast_transfer_in_memory_is_over_before_anything_is_submitted() {
        let Some(dir) = memory() else { return };
        let path = file_of(&dir, &[]);
        let read_only = HostFile::open(&path, OpenMode::default()).unwrap();
        let file = open_way(&path, (false, None)).unwrap();
        let ring = ring();
        let files = vec![Arc::new(file), Arc::new(read_only)];
        let _storage = RingStorage::new(ring.clone(), files).unwrap();
        let bytes = pattern(5000, 3);
        let mut from = AlignedBuf::from_slice(&bytes);
        let (head, tail) = from.split_at_mut(4096);
        let pair = [iov(head), iov(tail)];
        // SAFETY: `from` lives until `reap_all` has reaped both operations.
        unsafe { ring.push_writev(FileId(0), 100, &pair, 1) }.unwrap();
        assert!(std::fs::read(&path).unwrap()[100..] == bytes);
        // SAFETY: as above.
        unsafe { ring.push_writev(FileId(1), 0, &pair, 2) }.unwrap();
        let mut into = AlignedBuf::zeroed(5100);
        // SAFETY: `into` lives until the operation is reaped below.
        unsafe { ring.push_readv(FileId(1), 0, &[iov(&mut into)], 3) }.unwrap();
        assert!(into[100..] == bytes);
        assert_eq!(ring.in_flight(), 0);
        assert!(ring.has_completions());
        // Nothing that it could wait for would ever come.
        ring.submit_and_wait(1, None).unwrap();
        let mut found = Vec::new();
        ring.reap(|token, result| found.push((token, result)));
        assert_eq!(found, [(1, 5000), (2, -libc::EBADF), (3, 5100)]);
        assert!(!ring.has_completions());
    }

    /// The worker has other queues.
    #[test]
    fn a_very_long_write_in_memory_is_not_made_by_the_worker() {
        let Some(dir) = memory() else { return };
        let path = file_of(&dir, &[]);
        let ring = ring();
        let file = open_way(&path, (false, None)).unwrap();
        let _storage = RingStorage::new(ring.clone(), vec![Arc::new(file)]).unwrap();
        let mut from = AlignedBuf::from_slice(&pattern(4 << 20, 5));
        // SAFETY: `from` lives until `reap_all` has reaped the operation.
        unsafe { ring.push_writev(FileId(0), 0, &[iov(&mut from)], 1) }.unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 0);
        assert_eq!(reap_all(&ring), [(1, 4 << 20)]);
        assert!(std::fs::read(&path).unwrap() == from[..]);
    }

    /// Else a task that moves much would keep all others waiting.
    #[test]
    fn a_slow_transfer_in_memory_gives_others_their_turn_first() {
        let Some(dir) = memory() else { return };
        let path = file_of(&dir, &[]);
        let ring = ring();
        let file = Arc::new(open_way(&path, (false, None)).unwrap());
        let storage = RingStorage::new(ring.clone(), vec![file]).unwrap();
        let bytes = pattern(4096, 6);
        let sg = SgList::from_buf(AlignedBuf::from_slice(&bytes));
        let mut write = Box::pin(storage.write(FileId(0), 0, sg));
        let mut context = Context::from_waker(Waker::noop());
        assert!(write.as_mut().poll(&mut context).is_pending());
        assert!(std::fs::read(&path).unwrap().is_empty());
        ring.run(write).unwrap();
        assert!(std::fs::read(&path).unwrap() == bytes);
    }

    #[test]
    fn a_full_ring_says_so_and_recovers() {
        let dir = &places()[0];
        let file = open_way(&file_of(dir, &pattern(4096, 1)), (false, None)).unwrap();
        let ring = Ring::new(16).unwrap();
        let storage = RingStorage::new(ring.clone(), vec![Arc::new(file)]).unwrap();
        let mut buf = AlignedBuf::zeroed(512);
        let segments = [iov(&mut buf)];
        for round in 0..3 {
            for token in 0..16 {
                // SAFETY: `buf` lives until `reap_all` has reaped every operation.
                unsafe { ring.push_readv(FileId(0), 0, &segments, token) }.unwrap();
            }
            // SAFETY: as above.
            let more = unsafe { ring.push_readv(FileId(0), 0, &segments, 99) };
            assert_eq!(more, Err(Full), "round {round}");
            // The slow path has its own slots.
            let slow = SgList::from_buf(AlignedBuf::zeroed(512));
            ring.run(storage.read(FileId(0), 0, slow)).unwrap();
            reap_all(&ring);
            assert_eq!(ring.in_flight(), 0);
        }
    }

    #[test]
    fn an_eventfd_reports_kicks_and_can_be_taken_back() {
        for flags in [0, EFD_NONBLOCK] {
            let ring = ring();
            let kick = EventFd::new(flags).unwrap();
            let got = Cell::new(0);
            let reap = || {
                ring.reap(|token, result| {
                    assert_eq!((token, result), (5, 8));
                    got.set(got.get() + 1);
                });
            };
            ring.arm_eventfd(kick.as_raw_fd(), 5).unwrap();
            ring.submit().unwrap();
            assert!(!ring.has_completions());
            kick.write(3).unwrap();
            ring.submit_and_wait(1, Some(Duration::from_secs(10)))
                .unwrap();
            assert!(ring.has_completions());
            reap();
            assert_eq!((got.get(), ring.in_flight()), (1, 0));
            // Quiet again: nothing is left of the count.
            ring.arm_eventfd(kick.as_raw_fd(), 5).unwrap();
            ring.submit_and_wait(1, Some(Duration::from_millis(20)))
                .unwrap();
            reap();
            assert_eq!((got.get(), ring.in_flight()), (1, 1));
            assert!(!ring.cancel_eventfd(5).unwrap());
            assert_eq!(ring.in_flight(), 0);
            // A kick that came, but was not reaped, is reported by the cancel.
            ring.arm_eventfd(kick.as_raw_fd(), 5).unwrap();
            ring.submit().unwrap();
            kick.write(1).unwrap();
            ring.submit_and_wait(1, Some(Duration::from_secs(10)))
                .unwrap();
            assert!(ring.cancel_eventfd(5).unwrap());
            reap();
            assert_eq!((got.get(), ring.in_flight()), (1, 0));
            assert!(!ring.cancel_eventfd(6).unwrap());
        }
    }

    #[test]
    fn a_cancel_keeps_the_completions_of_others() {
        let dir = &places()[0];
        let file = open_way(&file_of(dir, &pattern(512, 1)), (false, None)).unwrap();
        let ring = ring();
        let _storage = RingStorage::new(ring.clone(), vec![Arc::new(file)]).unwrap();
        let kick = EventFd::new(0).unwrap();
        ring.arm_eventfd(kick.as_raw_fd(), 1).unwrap();
        let mut buf = AlignedBuf::zeroed(512);
        // SAFETY: `buf` lives until the operation is reaped below.
        unsafe { ring.push_readv(FileId(0), 0, &[iov(&mut buf)], 2) }.unwrap();
        ring.submit().unwrap();
        ring.cancel_eventfd(1).unwrap();
        assert_eq!(reap_all(&ring), []);
        ring.submit_and_wait(1, Some(Duration::from_secs(10)))
            .unwrap();
        assert!(ring.has_completions());
        let mut found = Vec::new();
        ring.reap(|token, result| found.push((token, result)));
        assert_eq!(found, [(2, 512)]);
    }

    #[test]
    fn a_callback_may_push() {
        let dir = &places()[0];
        let file = open_way(&file_of(dir, &pattern(512, 1)), (false, None)).unwrap();
        let ring = ring();
        let _storage = RingStorage::new(ring.clone(), vec![Arc::new(file)]).unwrap();
        let mut buf = AlignedBuf::zeroed(512);
        let segments = [iov(&mut buf)];
        let count = Cell::new(0_u64);
        let push = |token| {
            // SAFETY: `buf` lives until the loop below has reaped every operation.
            unsafe { ring.push_readv(FileId(0), 0, &segments, token) }.unwrap();
        };
        push(0);
        while ring.io_in_flight() != 0 {
            ring.submit_and_wait(1, None).unwrap();
            ring.reap(|token, _| {
                count.set(count.get() + 1);
                if token < 100 {
                    push(token + 1);
                }
            });
        }
        assert_eq!(count.get(), 101);
    }

    #[test]
    fn dropping_the_ring_drains_it() {
        let dir = &places()[0];
        let path = file_of(dir, &[]);
        let file = Arc::new(open_way(&path, (false, None)).unwrap());
        let owner = Rc::new(());
        let kick = EventFd::new(0).unwrap();
        {
            let ring = ring();
            let storage = RingStorage::new(ring.clone(), vec![Arc::clone(&file)]).unwrap();
            ring.arm_eventfd(kick.as_raw_fd(), 1).unwrap();
            let mut sg = SgList::from_buf(AlignedBuf::from_slice(&pattern(4096, 5)));
            sg.keep(Rc::<()>::clone(&owner));
            let mut write = Box::pin(storage.write(FileId(0), 0, sg));
            assert!(
                write
                    .as_mut()
                    .poll(&mut Context::from_waker(Waker::noop()))
                    .is_pending()
            );
            drop(write);
            assert_eq!(
                Rc::strong_count(&owner),
                2,
                "the kernel may still read the memory"
            );
        }
        assert_eq!(Rc::strong_count(&owner), 1);
        assert_eq!(Arc::strong_count(&file), 1);
        assert!(std::fs::read(&path).unwrap() == pattern(4096, 5));
        kick.write(1).unwrap();
        assert_eq!(
            kick.read().unwrap(),
            1,
            "the ring read an eventfd after its end"
        );
    }
}
