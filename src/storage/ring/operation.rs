//! A slow operation: a future that owns its request until a slot takes it.
//!
//! Who finds no slot waits in line; who gives up passes the turn on.

use std::any::Any;
use std::future::Future;
use std::io;
use std::mem;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use io_uring::squeue::Entry;

use super::Ring;
use super::core::Core;
use super::slot::{Later, Lent, SlotState, Slow, Sort};
use crate::storage::file::{Direction, IOV_MAX};
use crate::storage::{FileId, SgList};

/// What a slow operation asks of the kernel.
pub(super) enum Request {
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
pub(super) struct RingOp {
    ring: Ring,
    request: Option<Request>,
    slot: Option<usize>,
}

impl RingOp {
    pub(super) fn new(ring: &Ring, request: Request) -> RingOp {
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
        let mut core = this.ring.core.borrow_mut();
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
        let mut core = self.ring.core.borrow_mut();
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
