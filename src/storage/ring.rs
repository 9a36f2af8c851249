//! One thread's io_uring: the only code that builds a submission queue entry (SQE).
//!
//! Two ways in. The *fast path* ([`Ring::push_readv`] and its like) copies the segments into a slot,
//! queues the SQE and reports the kernel's bare result with the caller's token; it allocates nothing
//! once its slots are warm. The *slow path* ([`RingStorage`]) is the [`Storage`](super::Storage)
//! contract with all its care (`host.rs`). Nothing here submits by itself: the worker's loop calls
//! [`Ring::submit`] or [`Ring::submit_and_wait`], then [`Ring::reap`].
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

use std::any::Any;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::mem;
use std::os::fd::RawFd;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use io_uring::squeue::{self, Entry};
use io_uring::types::{Fd, Fixed, FsyncFlags, SubmitArgs, Timespec};
use io_uring::{IoUring, Probe, opcode};
use smallvec::SmallVec;

use super::FileId;
use super::buffer::SgList;
use super::file::{Direction, HostFile, IOV_MAX};
use super::host::{HostStorage, RawIo, Target, no_such_file};

/// User data of cancel operations, which have no slot.
const CANCEL: u64 = u64::MAX;
/// Descriptors that a ring registers: two for each of the first files.
const REGISTERED_MAX: u32 = 128;
/// Completions taken from the kernel in one go.
const BATCH: usize = 32;
/// Largest `entries`: the kernel allows completion queues of 65536.
const ENTRIES_MAX: u32 = 8192;
const ENTRIES_MIN: u32 = 16;
/// A submission refused for want of memory is tried again so often.
const SUBMIT_TRIES: u32 = 1000;

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
    fn from_setup(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => Self::Disabled(error),
            Some(libc::ENOSYS) => Self::Missing(error),
            Some(libc::EINVAL) => Self::TooOld(error),
            _ => Self::Io(error),
        }
    }
}

/// Every slot (or the submission queue) is in use; try again after a reap.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Full;

/// An io_uring of one thread. Clones are the same ring.
#[derive(Clone)]
pub struct Ring {
    inner: Rc<Inner>,
}

struct Inner {
    core: RefCell<Core>,
}

/// Which of the limits a slot counts in.
#[derive(Clone, Copy)]
enum Sort {
    Fast = 0,
    Slow = 1,
    Event = 2,
}

struct Core {
    uring: IoUring,
    /// Each sort may have so many in flight.
    entries: usize,
    slots: Vec<Slot>,
    /// Indices of free slots.
    free: Vec<u32>,
    in_flight: [usize; 3],
    files: Vec<RingFile>,
    /// Length of the table of registered descriptors; 0 if the kernel refused to have one.
    registered: u32,
    /// The kernel has `IORING_OP_FTRUNCATE`.
    can_truncate: bool,
    /// Completions reaped while cancelling, for the next `reap`: token, result, is of an eventfd.
    backlog: VecDeque<(u64, i32, bool)>,
    /// Slow operations that wait for a slot.
    waiting: VecDeque<Waker>,
}

struct RingFile {
    /// Keeps the descriptors open while SQEs name them.
    file: Arc<HostFile>,
    /// Index of the main descriptor in the registered table; the buffered one comes next.
    fixed: Option<u32>,
}

/// A place for one operation in flight. Its vectors keep their memory from use to use.
#[derive(Default)]
struct Slot {
    /// What the SQE points to; not touched until the CQE is there.
    iovs: Vec<libc::iovec>,
    /// Eight bytes that an eventfd is read into; not touched until the CQE is there.
    count: Vec<u64>,
    state: SlotState,
}

#[derive(Default)]
enum SlotState {
    #[default]
    Free,
    Fast {
        token: u64,
    },
    Slow(Slow),
    Event {
        token: u64,
        fd: RawFd,
        /// Waits for the eventfd to be readable, since this kernel does not wait in the read.
        polling: bool,
        cancelled: bool,
    },
}

#[derive(Default)]
struct Slow {
    /// Memory lent to the kernel, dropped when the CQE is reaped.
    lent: Lent,
    waker: Option<Waker>,
    result: Option<i32>,
    /// The future is gone: nobody will take the result.
    abandoned: bool,
}

/// Owners of what the kernel works on.
#[derive(Default)]
struct Lent {
    _sg: SgList,
    _keep: Option<Rc<dyn Any>>,
}

/// What must be done when `Core` is no longer borrowed.
#[derive(Default)]
struct Later {
    fast: SmallVec<[(u64, i32); BATCH]>,
    wakers: SmallVec<[Waker; 4]>,
    /// Dropped last: an owner's drop may run anything.
    lent: SmallVec<[Lent; 4]>,
}

/// From here on a copy to or from the page cache takes longer than handing it to another thread.
const LONG_COPY_BYTES: usize = 256 << 10;

impl Later {
    fn run(self) {
        self.wakers.into_iter().for_each(Waker::wake);
        drop(self.lent);
    }
}

impl Ring {
    /// A ring with room for `entries` operations of each sort (rounded up to a power of two). To be
    /// created by the thread that uses it.
    ///
    /// # Errors
    /// If there is no usable io_uring, with the likely reason.
    pub fn new(entries: u32) -> Result<Ring, RingError> {
        let entries = entries.clamp(ENTRIES_MIN, ENTRIES_MAX).next_power_of_two();
        let build = |single_issuer: bool| {
            let mut builder = IoUring::builder();
            builder.setup_cqsize(entries * 4).setup_submit_all();
            builder.setup_coop_taskrun().setup_taskrun_flag().dontfork();
            if single_issuer {
                builder.setup_single_issuer();
            }
            builder.build(entries)
        };
        let uring = match build(true) {
            // Linux 5.19 does not know SINGLE_ISSUER.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => build(false),
            result => result,
        };
        let uring = uring.map_err(RingError::from_setup)?;
        let params = uring.params();
        if !params.is_feature_ext_arg() || !params.is_feature_nodrop() {
            return Err(RingError::TooOld(io::Error::from_raw_os_error(
                libc::EINVAL,
            )));
        }
        let mut probe = Probe::new();
        uring
            .submitter()
            .register_probe(&mut probe)
            .map_err(RingError::Io)?;
        let can_truncate = probe.is_supported(opcode::Ftruncate::CODE);
        // Without a table (descriptor limit, memory) operations name plain descriptors.
        let registered = match uring.submitter().register_files_sparse(REGISTERED_MAX) {
            Ok(()) => REGISTERED_MAX,
            Err(_) => 0,
        };
        let core = Core {
            uring,
            entries: entries as usize,
            slots: Vec::new(),
            free: Vec::new(),
            in_flight: [0; 3],
            files: Vec::new(),
            registered,
            can_truncate,
            backlog: VecDeque::new(),
            waiting: VecDeque::new(),
        };
        Ok(Ring {
            inner: Rc::new(Inner {
                core: RefCell::new(core),
            }),
        })
    }

    /// Queues a vectored read of a host file. `token` comes back from [`Ring::reap`] with the bare
    /// result: it may be short, or an errno such as EAGAIN; the care is the caller's, most simply
    /// by doing it again on the slow path. `direct_ok` must hold ([`HostFile::direct_ok`]).
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
        self.inner
            .core
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
        self.inner
            .core
            .borrow_mut()
            .push_fast(Direction::Write, file, offset, iovs, token)
    }

    /// Reads an eventfd, blocking or not, when it is written: `token` is reaped with 8 (or an
    /// errno), the count is consumed. To be armed again after each.
    ///
    /// # Errors
    /// [`Full`].
    pub fn arm_eventfd(&self, fd: RawFd, token: u64) -> Result<(), Full> {
        let mut core = self.inner.core.borrow_mut();
        let index = core.take_slot(Sort::Event)?;
        core.slots[index].count.resize(1, 0);
        core.slots[index].state = SlotState::Event {
            token,
            fd,
            polling: false,
            cancelled: false,
        };
        core.push_event_read(index).inspect_err(|Full| {
            core.give_slot(index, Sort::Event);
        })
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
            let mut core = self.inner.core.borrow_mut();
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
        self.inner.core.borrow_mut().submit()
    }

    /// Hands what is queued to the kernel and sleeps until `min_complete` completions are there, the
    /// timeout is over, or a signal comes.
    ///
    /// # Errors
    /// If the kernel refuses for good.
    pub fn submit_and_wait(&self, min_complete: u32, timeout: Option<Duration>) -> io::Result<()> {
        let mut core = self.inner.core.borrow_mut();
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
            self.inner.core.borrow_mut().take_completions(&mut later);
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
        let mut core = self.inner.core.borrow_mut();
        !core.backlog.is_empty()
            || !core.uring.completion().is_empty()
            || core.uring.submission().taskrun()
    }

    /// Operations submitted or queued and not reaped, armed eventfds included.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.inner.core.borrow().in_flight.iter().sum()
    }

    /// As [`Ring::in_flight`], without armed eventfds: what a drain waits for.
    #[must_use]
    pub fn io_in_flight(&self) -> usize {
        let core = self.inner.core.borrow();
        core.in_flight[Sort::Fast as usize] + core.in_flight[Sort::Slow as usize]
    }

    /// Forgets the files of the table. Nothing is queued or in flight.
    fn forget_files(&self) {
        let mut core = self.inner.core.borrow_mut();
        let fixed = core.files.iter().filter(|entry| entry.fixed.is_some());
        let none = vec![-1; fixed.count() * 2];
        // A place that stays in use keeps its file open until another takes it; nothing names it.
        let _ = core.uring.submitter().register_files_update(0, &none);
        core.files.clear();
    }

    /// Adds a host file to the ring's table.
    fn add_file(&self, file: Arc<HostFile>) -> io::Result<FileId> {
        let mut core = self.inner.core.borrow_mut();
        let id = u16::try_from(core.files.len()).map_err(io::Error::other)?;
        let index = u32::from(id) * 2;
        let mut fixed = None;
        if index + 1 < core.registered {
            let fds = [file.fd(), file.buffered_fd().unwrap_or(file.fd())];
            // Without an entry in the table the plain descriptors do as well.
            fixed = core
                .uring
                .submitter()
                .register_files_update(index, &fds)
                .ok()
                .map(|_| index);
        }
        core.files.push(RingFile { file, fixed });
        Ok(FileId(id))
    }

    /// Runs a future to its end with this ring alone.
    #[cfg(test)]
    pub(crate) fn run<F: Future>(&self, future: F) -> F::Output {
        let mut future = std::pin::pin!(future);
        let mut context = Context::from_waker(Waker::noop());
        loop {
            if let Poll::Ready(output) = future.as_mut().poll(&mut context) {
                return output;
            }
            self.submit_and_wait(1, Some(Duration::from_millis(1)))
                .unwrap();
            self.reap(|_, _| {});
        }
    }
}

impl Core {
    /// A free slot, counted as in flight.
    #[inline]
    fn take_slot(&mut self, sort: Sort) -> Result<usize, Full> {
        if self.in_flight[sort as usize] >= self.entries {
            return Err(Full);
        }
        self.in_flight[sort as usize] += 1;
        if let Some(index) = self.free.pop() {
            return Ok(index as usize);
        }
        self.slots.push(Slot::default());
        // Room for every slot on the free list, so that giving back never allocates.
        self.free.reserve(self.slots.len());
        Ok(self.slots.len() - 1)
    }

    #[inline]
    fn give_slot(&mut self, index: usize, sort: Sort) -> SlotState {
        self.in_flight[sort as usize] -= 1;
        #[expect(
            clippy::cast_possible_truncation,
            reason = "at most three times ENTRIES_MAX slots"
        )]
        self.free.push(index as u32);
        mem::take(&mut self.slots[index].state)
    }

    /// Queues an SQE for the kernel; `index` is its slot.
    ///
    /// The callers see to it that all that the entry points to is owned by slot `index`, or is
    /// memory under the contract of the push functions.
    #[inline]
    fn push(&mut self, entry: Entry, user_data: u64) -> Result<(), Full> {
        let entry = entry.user_data(user_data);
        if self.uring.submission().is_full() && self.submit().is_err() {
            return Err(Full);
        }
        // SAFETY: what the entry points to lives until its CQE is reaped: it belongs to the slot (see
        // the module's text), which is not given back earlier.
        match unsafe { self.uring.submission().push(&entry) } {
            Ok(()) => Ok(()),
            Err(_) => Err(Full),
        }
    }

    #[inline]
    fn push_fast(
        &mut self,
        direction: Direction,
        file: FileId,
        offset: u64,
        iovs: &[libc::iovec],
        token: u64,
    ) -> Result<(), Full> {
        assert!(
            iovs.len() <= IOV_MAX,
            "{} segments in one operation",
            iovs.len()
        );
        let index = self.take_slot(Sort::Fast)?;
        let slot = &mut self.slots[index];
        slot.iovs.clear();
        slot.iovs.extend_from_slice(iovs);
        slot.state = SlotState::Fast { token };
        let mut entry = self.transfer_entry(direction, file, false, offset, index);
        // Not for writes: those of one file exclude each other in the kernel anyway.
        let crowd = direction == Direction::Read && self.in_flight[Sort::Fast as usize] > 1;
        if crowd && self.is_long_copy(file, index) {
            entry = entry.flags(squeue::Flags::ASYNC);
        }
        self.push(entry, index as u64).inspect_err(|Full| {
            self.give_slot(index, Sort::Fast);
        })
    }

    /// Whether a transfer is a copy by the processor that takes long enough to be worth a thread of
    /// the kernel's: submitting it would do the copy at once, one after the other.
    #[inline]
    fn is_long_copy(&self, id: FileId, index: usize) -> bool {
        let buffered = self
            .files
            .get(usize::from(id.0))
            .is_some_and(|entry| !entry.file.mode().direct);
        let segments = &self.slots[index].iovs;
        buffered && segments.iter().map(|iov| iov.iov_len).sum::<usize>() >= LONG_COPY_BYTES
    }

    /// The SQE of a transfer of the segments in the slot.
    #[inline]
    fn transfer_entry(
        &self,
        direction: Direction,
        id: FileId,
        buffered: bool,
        offset: u64,
        index: usize,
    ) -> Entry {
        let Some(file) = self.files.get(usize::from(id.0)) else {
            panic!("no file {} in the ring's table", id.0)
        };
        let iovs = &self.slots[index].iovs;
        macro_rules! entry {
            ($fd:expr) => {
                // One segment goes without an array for the kernel to copy.
                match (direction, iovs.as_slice()) {
                    (Direction::Read, &[iov]) if let Ok(len) = u32::try_from(iov.iov_len) => {
                        opcode::Read::new($fd, iov.iov_base.cast(), len)
                            .offset(offset)
                            .build()
                    }
                    (Direction::Write, &[iov]) if let Ok(len) = u32::try_from(iov.iov_len) => {
                        opcode::Write::new($fd, iov.iov_base.cast(), len)
                            .offset(offset)
                            .build()
                    }
                    (Direction::Read, iovs) => {
                        opcode::Readv::new($fd, iovs.as_ptr(), segments(iovs))
                            .offset(offset)
                            .build()
                    }
                    (Direction::Write, iovs) => {
                        opcode::Writev::new($fd, iovs.as_ptr(), segments(iovs))
                            .offset(offset)
                            .build()
                    }
                }
            };
        }
        match file.fixed {
            Some(fixed) => entry!(Fixed(fixed + u32::from(buffered))),
            None => entry!(Fd(Target {
                id,
                file: &file.file,
                buffered
            }
            .fd())),
        }
    }

    fn push_event_read(&mut self, index: usize) -> Result<(), Full> {
        let slot = &mut self.slots[index];
        let SlotState::Event { fd, polling, .. } = slot.state else {
            return Ok(());
        };
        let entry = if polling {
            opcode::PollAdd::new(Fd(fd), libc::POLLIN as u32).build()
        } else {
            opcode::Read::new(Fd(fd), slot.count.as_mut_ptr().cast(), 8).build()
        };
        self.push(entry, index as u64)
    }

    fn submit(&mut self) -> io::Result<()> {
        let queue = self.uring.submission();
        if queue.is_empty() && !queue.taskrun() && !queue.cq_overflow() {
            return Ok(());
        }
        drop(queue);
        let mut tries = 0;
        loop {
            match self.uring.submit() {
                Ok(_) => return Ok(()),
                Err(error) if is_passing(&error) && tries < SUBMIT_TRIES => tries += 1,
                Err(error) => return Err(error),
            }
        }
    }

    fn wait(&mut self, min_complete: u32, timeout: Option<Duration>) -> io::Result<()> {
        let result = match timeout {
            None => self.uring.submit_and_wait(min_complete as usize),
            Some(timeout) => {
                let timeout = Timespec::from(timeout);
                let args = SubmitArgs::new().timespec(&timeout);
                self.uring
                    .submitter()
                    .submit_with_args(min_complete as usize, &args)
            }
        };
        match result {
            Ok(_) => Ok(()),
            Err(error) if error.raw_os_error() == Some(libc::ETIME) => Ok(()),
            // The caller's loop reaps and comes back.
            Err(error) if is_passing(&error) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Takes a batch of completions; what concerns others goes to `later`.
    fn take_completions(&mut self, later: &mut Later) {
        while later.fast.len() < BATCH {
            let Some((token, result, _)) = self.backlog.pop_front() else {
                break;
            };
            later.fast.push((token, result));
        }
        // A completion may wait for this thread to enter the kernel.
        if self.uring.submission().taskrun() {
            // An error shows again at the next submit, which the caller checks.
            let _ = self.submit();
        }
        while later.fast.len() < BATCH {
            let Some(entry) = self.uring.completion().next() else {
                break;
            };
            if let Some((token, result, _)) = self.finish(entry.user_data(), entry.result(), later)
            {
                later.fast.push((token, result));
            }
        }
    }

    #[inline]
    fn next_completion(&mut self) -> Option<io_uring::cqueue::Entry> {
        self.uring.completion().next()
    }

    /// Books one completion; a token is for the caller.
    #[inline]
    fn finish(
        &mut self,
        user_data: u64,
        result: i32,
        later: &mut Later,
    ) -> Option<(u64, i32, bool)> {
        if user_data == CANCEL {
            return None;
        }
        let Some(index) = usize::try_from(user_data)
            .ok()
            .filter(|&at| at < self.slots.len())
        else {
            panic!("completion of operation {user_data}, which does not exist");
        };
        match &mut self.slots[index].state {
            SlotState::Free => panic!("second completion in slot {index}"),
            SlotState::Fast { token } => {
                let token = *token;
                self.give_slot(index, Sort::Fast);
                Some((token, result, false))
            }
            SlotState::Slow(slow) => {
                later.lent.push(mem::take(&mut slow.lent));
                later.wakers.extend(slow.waker.take());
                slow.result = Some(result);
                if slow.abandoned {
                    self.free_slow(index, later);
                }
                None
            }
            SlotState::Event {
                token,
                polling,
                cancelled,
                ..
            } => {
                let token = *token;
                // Some kernels answer EAGAIN for a non-blocking eventfd: poll it, then read again.
                let wait = !*polling && result == -libc::EAGAIN;
                let read = *polling && result >= 0;
                if !*cancelled && (wait || read) {
                    *polling = wait;
                    if self.push_event_read(index).is_ok() {
                        return None;
                    }
                }
                self.give_slot(index, Sort::Event);
                Some((token, result, true))
            }
        }
    }

    /// Gives back the slot of a finished slow operation and lets the next one in.
    fn free_slow(&mut self, index: usize, later: &mut Later) {
        self.give_slot(index, Sort::Slow);
        later.wakers.extend(self.waiting.pop_front());
    }

    fn cancel_eventfd(
        &mut self,
        token: u64,
        later: &mut Later,
        consumed: &mut bool,
    ) -> io::Result<()> {
        let mut cancels = Vec::new();
        for (index, slot) in self.slots.iter_mut().enumerate() {
            if let SlotState::Event {
                token: armed,
                cancelled,
                ..
            } = &mut slot.state
                && *armed == token
            {
                *cancelled = true;
                cancels.push(index);
            }
        }
        for &index in &cancels {
            self.push_cancel(index)?;
        }
        let is_armed = |core: &Core| {
            let armed = |&index: &usize| {
                matches!(core.slots[index].state,
                    SlotState::Event { token: armed, cancelled: true, .. } if armed == token)
            };
            cancels.iter().any(armed)
        };
        while is_armed(self) {
            self.wait(1, None)?;
            while let Some(entry) = self.next_completion() {
                let token = self.finish(entry.user_data(), entry.result(), later);
                self.backlog.extend(token);
            }
        }
        self.backlog.retain(|&(done, result, of_event)| {
            let own = of_event && done == token;
            *consumed |= own && result > 0;
            !own
        });
        Ok(())
    }

    fn push_cancel(&mut self, index: usize) -> io::Result<()> {
        let entry = opcode::AsyncCancel::new(index as u64).build();
        self.push(entry, CANCEL)
            .map_err(|Full| io::Error::from_raw_os_error(libc::EBUSY))
    }

    /// Waits for all that is in flight; what could wait for ever is cancelled.
    fn drain(&mut self) -> io::Result<()> {
        for index in 0..self.slots.len() {
            if let SlotState::Event { cancelled, .. } = &mut self.slots[index].state {
                *cancelled = true;
                self.push_cancel(index)?;
            }
        }
        let mut later = Later::default();
        loop {
            while let Some(entry) = self.next_completion() {
                self.finish(entry.user_data(), entry.result(), &mut later);
            }
            let unfinished = |slot: &Slot| match &slot.state {
                SlotState::Free => false,
                SlotState::Slow(slow) => slow.result.is_none(),
                SlotState::Fast { .. } | SlotState::Event { .. } => true,
            };
            if !self.slots.iter().any(unfinished) {
                return Ok(());
            }
            self.wait(1, None)?;
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let core = self.core.get_mut();
        if core.drain().is_err() {
            // The kernel may still work on it: better lost than freed.
            mem::forget(mem::take(&mut core.slots));
        }
        // The kernel tears a ring down after the close returned; a lock on a file that was left in
        // the table would stay until then. Failing that, it is only later.
        if core.registered != 0 {
            let _ = core.uring.submitter().unregister_files();
        }
    }
}

fn is_passing(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)
    )
}

fn segments(iovs: &[libc::iovec]) -> u32 {
    #[expect(
        clippy::cast_possible_truncation,
        reason = "at most IOV_MAX, checked when stored"
    )]
    let count = iovs.len() as u32;
    count
}

/// Storage on a [`Ring`]. Clones share ring and file table.
pub type RingStorage = HostStorage<RingIo>;

/// What [`RingStorage`] is made of.
pub struct RingIo {
    ring: Ring,
}

impl RingStorage {
    /// Storage over `files`; their ids are their indices. One to a ring.
    ///
    /// # Errors
    /// If there are more files than ids.
    pub fn new(ring: Ring, files: Vec<Arc<HostFile>>) -> io::Result<RingStorage> {
        for file in files {
            ring.add_file(file)?;
        }
        Ok(HostStorage::over(RingIo { ring }))
    }

    /// Storage over other files on a ring that has served: the files of the storage before are
    /// forgotten, and it must not be used any more.
    ///
    /// # Panics
    /// If an operation is queued or in flight, since it may name a file by its place in the table;
    /// or if there are more files than ids.
    #[must_use]
    pub fn replace(ring: Ring, files: Vec<Arc<HostFile>>) -> RingStorage {
        assert_eq!(ring.io_in_flight(), 0, "files are replaced under I/O");
        ring.forget_files();
        for file in files {
            assert!(ring.add_file(file).is_ok(), "more files than ids");
        }
        HostStorage::over(RingIo { ring })
    }

    /// Adds a file to the table.
    ///
    /// # Errors
    /// If the table is full.
    pub fn add_file(&self, file: Arc<HostFile>) -> io::Result<FileId> {
        self.raw().ring.add_file(file)
    }

    /// The ring it works on.
    #[must_use]
    pub fn ring(&self) -> &Ring {
        &self.raw().ring
    }
}

/// What a slow operation asks of the kernel.
enum Request {
    Transfer {
        direction: Direction,
        id: FileId,
        buffered: bool,
        offset: u64,
        sg: SgList,
    },
    Other {
        entry: Entry,
        keep: Option<Rc<dyn Any>>,
    },
}

/// A slow operation: not started, in its slot, or over.
struct RingOp {
    ring: Ring,
    request: Option<Request>,
    slot: Option<usize>,
}

impl RingOp {
    fn new(ring: &Ring, request: Request) -> RingOp {
        RingOp {
            ring: ring.clone(),
            request: Some(request),
            slot: None,
        }
    }
}

impl Core {
    /// Starts a slow operation; gives the request back if there is no room.
    #[expect(
        clippy::result_large_err,
        reason = "who cannot pass a request on gives it back"
    )]
    fn start(&mut self, request: Request) -> Result<usize, Request> {
        let Ok(index) = self.take_slot(Sort::Slow) else {
            return Err(request);
        };
        let (entry, lent) = match request {
            Request::Transfer {
                direction,
                id,
                buffered,
                offset,
                sg,
            } => {
                let slot = &mut self.slots[index];
                slot.iovs.clear();
                slot.iovs.extend(sg.iovecs().take(IOV_MAX));
                let entry = self.transfer_entry(direction, id, buffered, offset, index);
                (
                    entry,
                    Lent {
                        _sg: sg,
                        _keep: None,
                    },
                )
            }
            Request::Other { entry, keep } => (
                entry,
                Lent {
                    _sg: SgList::empty(),
                    _keep: keep,
                },
            ),
        };
        let mut slow = Slow {
            lent,
            ..Slow::default()
        };
        if self.push(entry, index as u64).is_err() {
            // The kernel cannot be entered: an error that every submit shows.
            slow.result = Some(-libc::EIO);
        }
        self.slots[index].state = SlotState::Slow(slow);
        Ok(index)
    }
}

impl Future for RingOp {
    type Output = io::Result<i32>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        let mut core = this.ring.inner.core.borrow_mut();
        if let Some(request) = this.request.take() {
            match core.start(request) {
                Ok(index) => this.slot = Some(index),
                Err(request) => {
                    this.request = Some(request);
                    core.waiting.push_back(context.waker().clone());
                    return Poll::Pending;
                }
            }
        }
        let Some(index) = this.slot else {
            panic!("polled after completion")
        };
        let SlotState::Slow(slow) = &mut core.slots[index].state else {
            panic!("slot {index} was given away")
        };
        let Some(result) = slow.result else {
            slow.waker = Some(context.waker().clone());
            return Poll::Pending;
        };
        let mut later = Later::default();
        later.lent.push(mem::take(&mut slow.lent));
        core.free_slow(index, &mut later);
        this.slot = None;
        drop(core);
        later.run();
        Poll::Ready(if result < 0 {
            Err(io::Error::from_raw_os_error(-result))
        } else {
            Ok(result)
        })
    }
}

impl Drop for RingOp {
    fn drop(&mut self) {
        let mut later = Later::default();
        let mut core = self.ring.inner.core.borrow_mut();
        if let Some(index) = self.slot {
            if let SlotState::Slow(slow) = &mut core.slots[index].state {
                slow.abandoned = true;
                slow.waker = None;
                if slow.result.is_some() {
                    later.lent.push(mem::take(&mut slow.lent));
                    core.free_slow(index, &mut later);
                }
            }
        } else if self.request.is_some() {
            // It may have been woken to take a free slot: the next in line takes it.
            later.wakers.extend(core.waiting.pop_front());
        }
        drop(core);
        later.run();
    }
}

impl RingIo {
    async fn other(&self, entry: Entry, keep: Option<Rc<dyn Any>>) -> io::Result<()> {
        RingOp::new(&self.ring, Request::Other { entry, keep })
            .await
            .map(drop)
    }
}

impl RawIo for RingIo {
    fn file(&self, id: FileId) -> io::Result<Arc<HostFile>> {
        let core = self.ring.inner.core.borrow();
        let file = core
            .files
            .get(usize::from(id.0))
            .map(|entry| Arc::clone(&entry.file));
        file.ok_or_else(|| no_such_file(id))
    }

    async fn transfer(
        &self,
        direction: Direction,
        target: Target<'_>,
        offset: u64,
        sg: SgList,
    ) -> io::Result<usize> {
        // io_uring takes an offset of all ones as "the file's own position".
        if i64::try_from(offset).is_err() {
            return Err(io::Error::from_raw_os_error(libc::EFBIG));
        }
        let Target { id, buffered, .. } = target;
        let request = Request::Transfer {
            direction,
            id,
            buffered,
            offset,
            sg,
        };
        let count = RingOp::new(&self.ring, request).await?;
        usize::try_from(count).map_err(io::Error::other)
    }

    async fn fallocate(
        &self,
        target: Target<'_>,
        mode: i32,
        offset: u64,
        len: u64,
        keep: Option<Rc<dyn Any>>,
    ) -> io::Result<()> {
        let entry = opcode::Fallocate::new(Fd(target.fd()), len)
            .offset(offset)
            .mode(mode)
            .build();
        self.other(entry, keep).await
    }

    async fn fdatasync(&self, target: Target<'_>) -> io::Result<()> {
        if target.file.is_in_memory() {
            // The kernel never waits there; its worker threads would.
            return target.file.as_file().sync_data();
        }
        let entry = opcode::Fsync::new(Fd(target.fd()))
            .flags(FsyncFlags::DATASYNC)
            .build();
        self.other(entry, None).await
    }

    async fn ftruncate(&self, target: Target<'_>, len: u64) -> io::Result<()> {
        if !self.ring.inner.core.borrow().can_truncate {
            return target.file.as_file().set_len(len);
        }
        self.other(opcode::Ftruncate::new(Fd(target.fd()), len).build(), None)
            .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::host::tests::{
        WAYS, agrees_with_a_vec, crooked, file_of, open_way, pattern, places,
    };
    use crate::storage::{AlignedBuf, OpenMode, Storage};
    use std::cell::Cell;
    use std::os::fd::AsRawFd;
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

    #[test]
    fn any_alignment_agrees_with_a_vec() {
        for dir in places() {
            for way in WAYS {
                for (seed, len) in [(1, 65_536), (2, 100_001), (3, 70_144)] {
                    let path = file_of(&dir, &pattern(len, seed));
                    let Some(file) = open_way(&path, way) else {
                        continue;
                    };
                    let ring = ring();
                    let storage = RingStorage::new(ring.clone(), vec![Arc::new(file)]).unwrap();
                    ring.run(agrees_with_a_vec(&storage, pattern(len, seed), seed));
                    assert_eq!(ring.in_flight(), 0);
                    let on_disk = std::fs::metadata(&path).unwrap().len();
                    assert_eq!(
                        on_disk, len as u64,
                        "{way:?}: the length of the file changed"
                    );
                }
            }
        }
    }

    #[test]
    fn a_list_of_many_segments_is_transferred_whole() {
        let dir = &places()[0];
        let file = open_way(&file_of(dir, &[]), (false, None)).unwrap();
        let ring = ring();
        let storage = RingStorage::new(ring.clone(), vec![Arc::new(file)]).unwrap();
        let bytes = pattern(701 * (2 * IOV_MAX + 5), 9);
        ring.run(storage.write(FileId(0), 77, crooked(&bytes)))
            .unwrap();
        let back = crooked(&vec![0; bytes.len()]);
        ring.run(storage.read(FileId(0), 77, back.clone())).unwrap();
        assert!(back.to_vec() == bytes);
        ring.run(storage.set_len(FileId(0), 1000)).unwrap();
        assert_eq!(storage.len(FileId(0)).unwrap(), 1000);
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
    fn more_slow_operations_than_slots_all_complete() {
        let dir = &places()[0];
        let file = open_way(&file_of(dir, &[]), (false, None)).unwrap();
        let ring = Ring::new(16).unwrap();
        let storage = RingStorage::new(ring.clone(), vec![Arc::new(file)]).unwrap();
        let mut writes: Vec<Pin<Box<dyn Future<Output = io::Result<()>>>>> = Vec::new();
        for nr in 0..100_u64 {
            let storage = storage.clone();
            let sg = SgList::from_buf(AlignedBuf::from_slice(&pattern(512, nr)));
            writes.push(Box::pin(async move {
                storage.write(FileId(0), nr * 512, sg).await
            }));
        }
        // Some give up while they wait: their turn goes to others.
        let given_up = ring.run(std::future::poll_fn(|context| {
            for write in &mut writes {
                assert!(write.as_mut().poll(context).is_pending());
            }
            Poll::Ready(writes.split_off(90))
        }));
        drop(given_up);
        for write in writes {
            ring.run(write).unwrap();
        }
        let bytes = storage.file(FileId(0)).unwrap();
        let mut found = vec![0; 90 * 512];
        std::os::unix::fs::FileExt::read_exact_at(bytes.as_file(), &mut found, 0).unwrap();
        let expected: Vec<u8> = (0..90).flat_map(|nr| pattern(512, nr)).collect();
        assert!(found == expected);
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

    /// Two rings on two threads do read-change-writes of one host block; none is lost.
    #[test]
    fn read_change_writes_of_two_rings_lose_nothing() {
        let dir = &places()[0];
        let Some(file) = open_way(&file_of(dir, &[0; 4096]), (true, Some(4096))) else {
            return;
        };
        let file = Arc::new(file);
        std::thread::scope(|scope| {
            for sector in 0..2_u64 {
                let file = Arc::clone(&file);
                scope.spawn(move || {
                    let ring = ring();
                    let storage = RingStorage::new(ring.clone(), vec![file]).unwrap();
                    for round in 1..=50_u8 {
                        let sg = SgList::from_buf(AlignedBuf::from_slice(&[round; 512]));
                        ring.run(storage.write(FileId(0), sector * 512, sg))
                            .unwrap();
                        let back = SgList::from_buf(AlignedBuf::zeroed(512));
                        ring.run(storage.read(FileId(0), sector * 512, back.clone()))
                            .unwrap();
                        assert_eq!(back.to_vec(), [round; 512]);
                    }
                });
            }
        });
    }

    #[test]
    fn files_beyond_the_registered_table_work_too() {
        let dir = &places()[0];
        let path = file_of(dir, &pattern(512, 3));
        let ring = ring();
        let mode = OpenMode::default();
        let file = Arc::new(HostFile::open(&path, mode).unwrap());
        let storage = RingStorage::new(ring.clone(), vec![file; 70]).unwrap();
        let (result, buf) = ring.run(storage.read_buf(FileId(69), 0, AlignedBuf::zeroed(1024)));
        result.unwrap();
        assert!(buf[..512] == pattern(512, 3) && buf[512..] == [0; 512]);
        // Opened for reading only.
        assert!(
            ring.run(storage.write(FileId(69), 0, SgList::zeroes(1)))
                .is_err()
        );
    }
}
