//! A fair, process-wide lock of byte ranges of one file, waited for asynchronously.
//!
//! It keeps a read-change-write of a host block from losing somebody else's write to other bytes of
//! that block. Who needs it is decided in `host.rs`; on the usual host (512-byte blocks, or the page
//! cache) no aligned write ever comes here.
//!
//! Invariant: of two tickets with overlapping ranges only the older is held. A ticket waits for older
//! ones alone, so there is no starvation and no deadlock as long as nobody takes a second range
//! while holding one.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use event_listener::Event;

/// The ranges of one file that are held or waited for.
#[derive(Default, Debug)]
pub(crate) struct RangeLock {
    state: Mutex<Tickets>,
    /// Notified, to all, whenever a ticket goes.
    gone: Event,
}

#[derive(Default, Debug)]
struct Tickets {
    next_id: u64,
    /// In order of arrival.
    tickets: Vec<Ticket>,
}

#[derive(Debug)]
struct Ticket {
    id: u64,
    start: u64,
    end: u64,
}

/// A held range; given back on drop. May be put into an operation's `SgList`, so that the range
/// stays held for as long as the kernel works on it.
#[derive(Debug)]
pub(crate) struct RangeGuard {
    lock: Arc<RangeLock>,
    id: u64,
}

impl RangeLock {
    /// Waits until no older ticket overlaps `start..end`, then holds it.
    pub(crate) async fn lock(self: &Arc<Self>, start: u64, end: u64) -> RangeGuard {
        let id = {
            let mut state = self.state();
            let id = state.next_id;
            state.next_id += 1;
            state.tickets.push(Ticket { id, start, end });
            id
        };
        // From here on the guard gives the ticket back, also if this future is dropped.
        let guard = RangeGuard {
            lock: Arc::clone(self),
            id,
        };
        loop {
            if self.is_first(id) {
                return guard;
            }
            let listener = self.gone.listen();
            if self.is_first(id) {
                return guard;
            }
            listener.await;
        }
    }

    fn is_first(&self, id: u64) -> bool {
        let state = self.state();
        let Some(at) = state.tickets.iter().position(|ticket| ticket.id == id) else {
            return false;
        };
        let own = &state.tickets[at];
        !state.tickets[..at]
            .iter()
            .any(|older| older.start < own.end && own.start < older.end)
    }

    /// No code that could panic runs under this mutex, so its state is good even if poisoned.
    fn state(&self) -> MutexGuard<'_, Tickets> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for RangeGuard {
    fn drop(&mut self) {
        self.lock
            .state()
            .tickets
            .retain(|ticket| ticket.id != self.id);
        self.lock.gone.notify(usize::MAX);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::Future;
    use std::pin::{Pin, pin};
    use std::task::{Context, Poll, Waker};

    fn poll<F: Future>(future: Pin<&mut F>) -> Option<F::Output> {
        match future.poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(output) => Some(output),
            Poll::Pending => None,
        }
    }

    #[test]
    fn overlapping_ranges_exclude_each_other_in_order_of_arrival() {
        let lock = Arc::new(RangeLock::default());
        let first = poll(pin!(lock.lock(0, 10))).unwrap();
        let apart = poll(pin!(lock.lock(10, 20))).unwrap();
        let mut second = pin!(lock.lock(5, 15));
        let mut third = pin!(lock.lock(14, 15));
        assert!(poll(second.as_mut()).is_none());
        assert!(poll(third.as_mut()).is_none());
        drop(apart);
        assert!(poll(third.as_mut()).is_none(), "overtook an older ticket");
        drop(first);
        let second = poll(second.as_mut()).unwrap();
        assert!(poll(third.as_mut()).is_none());
        drop(second);
        assert!(poll(third.as_mut()).is_some());
    }

    #[test]
    fn a_waiter_that_gives_up_leaves_no_ticket() {
        let lock = Arc::new(RangeLock::default());
        let held = poll(pin!(lock.lock(0, 1))).unwrap();
        {
            let mut waiter = pin!(lock.lock(0, 1));
            assert!(poll(waiter.as_mut()).is_none());
        }
        drop(held);
        assert!(poll(pin!(lock.lock(0, 1))).is_some());
        assert!(lock.state().tickets.is_empty());
    }
}
