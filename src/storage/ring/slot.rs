//! The place of one operation in flight, and what is left to do once it is over.
//!
//! A slot owns what the kernel may touch until the completion is reaped; the module above says what
//! that is for each sort of operation.

use std::any::Any;
use std::os::fd::RawFd;
use std::rc::Rc;
use std::task::Waker;

use smallvec::SmallVec;

use crate::storage::SgList;

/// Completions taken from the kernel in one go.
pub(super) const BATCH: usize = 32;

/// Every slot (or the submission queue) is in use; try again after a reap.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Full;

/// Which of the limits a slot counts in.
#[derive(Clone, Copy)]
pub(super) enum Sort {
    Fast = 0,
    Slow = 1,
    Event = 2,
}

/// A place for one operation in flight. Its vectors keep their memory from use to use.
#[derive(Default)]
pub(super) struct Slot {
    /// What the SQE points to; not touched until the CQE is there.
    pub(super) iovs: Vec<libc::iovec>,
    /// Eight bytes that an eventfd is read into; not touched until the CQE is there.
    pub(super) count: Vec<u64>,
    pub(super) state: SlotState,
}

#[derive(Default)]
pub(super) enum SlotState {
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
pub(super) struct Slow {
    /// Memory lent to the kernel, dropped when the CQE is reaped.
    pub(super) lent: Lent,
    pub(super) waker: Option<Waker>,
    pub(super) result: Option<i32>,
    /// The future is gone: nobody will take the result.
    pub(super) abandoned: bool,
}

/// Owners of what the kernel works on.
#[derive(Default)]
pub(super) struct Lent {
    pub(super) _sg: SgList,
    pub(super) _keep: Option<Rc<dyn Any>>,
}

/// What must be done when `Core` is no longer borrowed.
#[derive(Default)]
pub(super) struct Later {
    pub(super) fast: SmallVec<[(u64, i32); BATCH]>,
    pub(super) wakers: SmallVec<[Waker; 4]>,
    /// Dropped last: an owner's drop may run anything.
    pub(super) lent: SmallVec<[Lent; 4]>,
}

impl Later {
    pub(super) fn run(self) {
        self.wakers.into_iter().for_each(Waker::wake);
        drop(self.lent);
    }
}
