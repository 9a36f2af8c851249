//! The two queues that a thread shares with the kernel, and the slots of what is in flight.
//!
//! Unsafe is needed in two places: in [`Core::push`] an SQE goes to the kernel with what it points to, and
//! a transfer at once names raw memory. The ownership argument is the module's above.

#![expect(
    unsafe_code,
    reason = "raw memory for the kernel; see the module's text"
)]

use std::collections::VecDeque;
use std::io;
use std::mem;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::task::Waker;
use std::time::Duration;

use io_uring::squeue::{self, Entry};
use io_uring::types::{Fd, Fixed, SubmitArgs, Timespec};
use io_uring::{IoUring, Probe, opcode};

use super::error::RingError;
use super::file_table::FileTable;
use super::slot::{BATCH, Full, Later, Slot, SlotState, Sort};
use crate::storage::FileId;
use crate::storage::file::{Direction, HostFile, IOV_MAX, transfer_iovecs};
use crate::storage::host::Target;

/// User data of cancel operations, which have no slot.
const CANCEL: u64 = u64::MAX;
/// A submission refused for want of memory is tried again so often.
const SUBMIT_TRIES: u32 = 1000;
/// From here on a copy from the page cache takes longer than handing it to another thread.
const LONG_READ_BYTES: usize = 256 << 10;
/// From here on a copy to a file in memory would keep the other queues of its worker waiting for long.
/// (Not earlier: writes of one file exclude each other in the kernel, so that no thread helps them.)
const LONG_WRITE_BYTES: usize = 4 << 20;

/// See the module text.
pub(super) struct Core {
    uring: IoUring,
    /// Each sort may have so many in flight.
    entries: usize,
    pub(super) slots: Vec<Slot>,
    /// Indices of free slots.
    free: Vec<u32>,
    in_flight: [usize; 3],
    pub(super) files: FileTable,
    /// The kernel has `IORING_OP_FTRUNCATE`.
    pub(super) can_truncate: bool,
    /// For the next `reap`, what was reaped while cancelling or was done at once: token, result, is of
    /// an eventfd.
    pub(super) backlog: VecDeque<(u64, i32, bool)>,
    /// Slow operations that wait for a slot.
    pub(super) waiting: VecDeque<Waker>,
}

impl Core {
    /// The kernel's ring with room for `entries` operations of each sort, a power of two.
    pub(super) fn new(entries: u32) -> Result<Core, RingError> {
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
        let files = FileTable::new(&uring.submitter());
        Ok(Core {
            uring,
            entries: entries as usize,
            slots: Vec::new(),
            free: Vec::new(),
            in_flight: [0; 3],
            files,
            can_truncate: probe.is_supported(opcode::Ftruncate::CODE),
            backlog: VecDeque::new(),
            waiting: VecDeque::new(),
        })
    }

    /// Operations of one sort that are submitted or queued and not reaped.
    pub(super) fn in_flight(&self, sort: Sort) -> usize {
        self.in_flight[sort as usize]
    }

    /// Whether a reap would find something.
    #[inline]
    pub(super) fn has_completions(&mut self) -> bool {
        !self.backlog.is_empty()
            || !self.uring.completion().is_empty()
            || self.uring.submission().taskrun()
    }

    /// Adds a host file to the table.
    pub(super) fn add_file(&mut self, file: Arc<HostFile>) -> io::Result<FileId> {
        self.files.add(&self.uring.submitter(), file)
    }

    /// Forgets the files of the table. Nothing is queued or in flight.
    pub(super) fn forget_files(&mut self) {
        self.files.forget(&self.uring.submitter());
    }

    /// Arms an eventfd; see [`Ring::arm_eventfd`](super::Ring::arm_eventfd).
    pub(super) fn arm_eventfd(&mut self, fd: RawFd, token: u64) -> Result<(), Full> {
        let index = self.take_slot(Sort::Event)?;
        self.slots[index].count.resize(1, 0);
        self.slots[index].state = SlotState::Event {
            token,
            fd,
            polling: false,
            cancelled: false,
        };
        self.push_event_read(index).inspect_err(|Full| {
            self.give_slot(index, Sort::Event);
        })
    }

    /// A free slot, counted as in flight.
    #[inline]
    pub(super) fn take_slot(&mut self, sort: Sort) -> Result<usize, Full> {
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
    pub(super) fn push(&mut self, entry: Entry, user_data: u64) -> Result<(), Full> {
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
    pub(super) fn push_fast(
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
        let hand_over = self.is_long_copy(direction, file, iovs);
        if !hand_over && let Some(result) = self.transfer_at_once(direction, file, offset, iovs) {
            self.backlog.push_back((token, result, false));
            return Ok(());
        }
        let index = self.take_slot(Sort::Fast)?;
        let slot = &mut self.slots[index];
        slot.iovs.clear();
        slot.iovs.extend_from_slice(iovs);
        slot.state = SlotState::Fast { token };
        let mut entry = self.transfer_entry(direction, file, false, offset, index);
        if hand_over && self.in_flight[Sort::Fast as usize] > 1 {
            entry = entry.flags(squeue::Flags::ASYNC);
        }
        self.push(entry, index as u64).inspect_err(|Full| {
            self.give_slot(index, Sort::Fast);
        })
    }

    /// Transfers to or from a file in memory, and returns what the kernel's completion would say.
    #[inline]
    fn transfer_at_once(
        &self,
        direction: Direction,
        id: FileId,
        offset: u64,
        iovs: &[libc::iovec],
    ) -> Option<i32> {
        let entry = self.files.get(id)?;
        if !entry.file.is_in_memory() {
            return None;
        }
        // SAFETY: the memory is valid until the token is reaped, by the contract of the push functions.
        let result = unsafe { transfer_iovecs(direction, entry.file.fd(), offset, iovs) };
        Some(match result {
            // No system call moves as much as an `i32` has no room for.
            Ok(moved) => i32::try_from(moved).unwrap_or(i32::MAX),
            Err(error) => -error.raw_os_error().unwrap_or(libc::EIO),
        })
    }

    /// Whether a transfer is a copy by the processor that takes long enough to be worth a thread of
    /// the kernel's: submitting it would do the copy at once, one after the other.
    #[inline]
    fn is_long_copy(&self, direction: Direction, id: FileId, iovs: &[libc::iovec]) -> bool {
        let long = match direction {
            Direction::Read => LONG_READ_BYTES,
            Direction::Write => LONG_WRITE_BYTES,
        };
        let buffered = self
            .files
            .get(id)
            .is_some_and(|entry| !entry.file.mode().direct);
        buffered && iovs.iter().map(|iov| iov.iov_len).sum::<usize>() >= long
    }

    /// The SQE of a transfer of the segments in the slot.
    #[inline]
    pub(super) fn transfer_entry(
        &self,
        direction: Direction,
        id: FileId,
        buffered: bool,
        offset: u64,
        index: usize,
    ) -> Entry {
        let Some(file) = self.files.get(id) else {
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

    pub(super) fn submit(&mut self) -> io::Result<()> {
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

    pub(super) fn wait(&mut self, min_complete: u32, timeout: Option<Duration>) -> io::Result<()> {
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
    pub(super) fn take_completions(&mut self, later: &mut Later) {
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
    pub(super) fn free_slow(&mut self, index: usize, later: &mut Later) {
        self.give_slot(index, Sort::Slow);
        later.wakers.extend(self.waiting.pop_front());
    }

    pub(super) fn cancel_eventfd(
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

impl Drop for Core {
    fn drop(&mut self) {
        if self.drain().is_err() {
            // The kernel may still work on it: better lost than freed.
            mem::forget(mem::take(&mut self.slots));
        }
        self.files.unregister(&self.uring.submitter());
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
