//! The worker's side of one running ring: indices, notifications, and nothing of virtio-blk.
//!
//! Owns the positions in avail and used ring, and when to ask for kicks and when to call. Used
//! elements are written as requests end, in any order, and published once per batch.
//!
//! Invariants: `next_used - published` elements are written and not yet visible; a ring whose avail
//! index made no sense is broken and takes nothing more until it is stopped and started again.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, RawFd};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use log::{debug, error, warn};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::OFlags;

use super::error::RingError;
use super::guest_buf::GuestMemory;
use super::vring::{RingAddresses, RingMemory, RingSetup};

/// A ring in service.
pub(super) struct ServedRing {
    queue_index: usize,
    size: u16,
    addresses: RingAddresses,
    /// `None` while the addresses are not guest memory (after a change of the memory table).
    memory: Option<RingMemory>,
    next_avail: u16,
    next_used: u16,
    /// The used index that the driver sees.
    published: u16,
    /// `published` at the last decision to call or not; `None` before the first.
    signalled: Option<u16>,
    event_idx: bool,
    kicks_wanted: bool,
    broken: bool,
    kick: Option<Arc<File>>,
    call: Option<Arc<File>>,
    /// A write to `call` would wait while its counter is full. The mode belongs to the front-end as
    /// much as to us, so it is not ours to change.
    call_may_block: bool,
    /// Requests taken and not yet given back.
    in_flight: u32,
}

impl ServedRing {
    pub(super) fn start(memory: &Rc<GuestMemory>, setup: RingSetup) -> Result<Self, RingError> {
        let ring_memory = RingMemory::map(memory, setup.addresses, setup.size)?;
        let next_used = ring_memory.used_index();
        Ok(Self {
            queue_index: setup.queue_index,
            size: setup.size,
            addresses: setup.addresses,
            memory: Some(ring_memory),
            next_avail: setup.next_avail,
            next_used,
            published: next_used,
            signalled: None,
            event_idx: setup.event_idx,
            // Unknown: whoever served the ring before may have told the driver not to kick.
            kicks_wanted: false,
            broken: false,
            kick: setup.kick,
            call_may_block: setup.call.as_deref().is_some_and(may_block),
            call: setup.call,
            in_flight: 0,
        })
    }

    pub(super) fn queue_index(&self) -> usize {
        self.queue_index
    }

    pub(super) fn next_avail(&self) -> u16 {
        self.next_avail
    }

    pub(super) fn in_flight(&self) -> u32 {
        self.in_flight
    }

    pub(super) fn memory(&self) -> Option<&RingMemory> {
        self.memory.as_ref()
    }

    /// Descriptor to wait on for kicks; `None` if the driver does not kick.
    pub(super) fn kick_fd(&self) -> Option<RawFd> {
        self.kick.as_ref().map(|kick| kick.as_raw_fd())
    }

    pub(super) fn set_kick(&mut self, kick: Option<Arc<File>>) {
        self.kick = kick;
    }

    pub(super) fn set_call(&mut self, call: Option<Arc<File>>) {
        self.call_may_block = call.as_deref().is_some_and(may_block);
        self.call = call;
        // What the old descriptor was told, the new one was not.
        self.signalled = None;
        self.call_anyway();
    }

    /// Calls the driver without asking whether it wants that: something may have been published
    /// that nobody was called for (before a restart, or while the call went elsewhere). A call too
    /// many is harmless, one too few is a hang.
    pub(super) fn call_anyway(&mut self) {
        let Some(call) = &self.call else { return };
        // An eventfd: only a full counter can refuse, and then the driver has been called.
        if self.call_may_block && !is_writable(call) {
            debug!("vring {}: the driver takes no calls", self.queue_index);
        } else if let Err(error) = call.as_ref().write(&1_u64.to_ne_bytes())
            && error.kind() != std::io::ErrorKind::WouldBlock
        {
            warn!(
                "vring {}: cannot call the driver: {error}",
                self.queue_index
            );
            self.call = None;
        }
    }

    /// Goes over to another generation of guest memory. Nothing may be in flight or unpublished.
    pub(super) fn remap(&mut self, memory: Option<&Rc<GuestMemory>>) {
        let mapped = memory
            .ok_or(RingError::NoMemory)
            .and_then(|memory| RingMemory::map(memory, self.addresses, self.size));
        self.memory = match mapped {
            Ok(mapped) => Some(mapped),
            Err(error) => {
                debug!("vring {} waits for its memory: {error}", self.queue_index);
                None
            }
        };
    }

    /// Whether there is something to take. Cheap enough for a polling loop.
    #[inline]
    pub(super) fn has_work(&self) -> bool {
        match &self.memory {
            Some(memory) if !self.broken => memory.avail_index() != self.next_avail,
            _ => false,
        }
    }

    /// How many chains may be taken now: reads the avail index once.
    #[inline]
    pub(super) fn available(&mut self) -> u16 {
        let Some(memory) = &self.memory else { return 0 };
        if self.broken {
            return 0;
        }
        let count = memory.avail_index().wrapping_sub(self.next_avail);
        if count > self.size {
            self.break_down("its avail index jumps by more than its size");
            return 0;
        }
        if count != 0 && self.kicks_wanted {
            self.kicks_wanted = false;
            if !self.event_idx {
                memory.set_kicks_wanted(false);
            }
        }
        count
    }

    /// Takes the next chain. Only as often as `available` has said.
    #[inline]
    pub(super) fn take(&mut self) -> Option<u16> {
        let head = self.memory.as_ref()?.avail_entry(self.next_avail);
        self.next_avail = self.next_avail.wrapping_add(1);
        self.in_flight += 1;
        Some(head)
    }

    /// The chain that was taken will never be given back: the ring is broken.
    pub(super) fn abandon(&mut self, why: &str) {
        self.in_flight -= 1;
        self.break_down(why);
    }

    fn break_down(&mut self, why: &str) {
        if !self.broken {
            self.broken = true;
            error!(
                "vring {} is broken and stands still until the driver resets it: {why}",
                self.queue_index
            );
        }
    }

    /// Gives a chain back, unseen until `publish`.
    #[inline]
    pub(super) fn give_back(&mut self, head: u16, written: u32) {
        self.in_flight -= 1;
        if let Some(memory) = &self.memory {
            memory.write_used(self.next_used, head, written);
            self.next_used = self.next_used.wrapping_add(1);
        }
    }

    /// Makes all that was given back visible. False if there was nothing.
    #[inline]
    pub(super) fn publish(&mut self) -> bool {
        if self.published == self.next_used {
            return false;
        }
        if let Some(memory) = &self.memory {
            memory.set_used_index(self.next_used);
        }
        self.published = self.next_used;
        true
    }

    /// Whether something was published since the last decision to call or not.
    pub(super) fn needs_call_decision(&self) -> bool {
        self.signalled != Some(self.published)
    }

    /// Calls the driver if it wants that. After `publish` and a sequentially consistent fence: the
    /// driver writes its wish, fences, and reads the index. Returns whether it was called.
    pub(super) fn call_if_wanted(&mut self) -> bool {
        let Some(memory) = &self.memory else {
            return false;
        };
        let before = self.signalled.replace(self.published);
        let wanted = if self.event_idx {
            // virtio 2.7.7.2: call if the index passed the driver's event since the last decision.
            before.is_none_or(|before| {
                let since_event = self
                    .published
                    .wrapping_sub(memory.used_event())
                    .wrapping_sub(1);
                since_event < self.published.wrapping_sub(before)
            })
        } else {
            memory.driver_wants_interrupt()
        };
        if wanted && self.call.is_some() {
            self.call_anyway();
            return true;
        }
        false
    }

    /// Asks the driver to kick. The caller fences and then looks for work once more.
    pub(super) fn want_kicks(&mut self) {
        let Some(memory) = &self.memory else { return };
        if self.event_idx {
            memory.set_avail_event(self.next_avail);
        } else if !self.kicks_wanted {
            memory.set_kicks_wanted(true);
        }
        self.kicks_wanted = true;
    }
}

fn may_block(call: &File) -> bool {
    // A descriptor that cannot tell is looked at before each write.
    rustix::fs::fcntl_getfl(call).map_or(true, |flags| !flags.contains(OFlags::NONBLOCK))
}

/// Whether a write would not wait. A worker must not: it has other rings, and other connections.
fn is_writable(call: &File) -> bool {
    let mut entry = [PollFd::new(call, PollFlags::OUT)];
    let ready = rustix::event::poll(&mut entry, Some(&Timespec::default()));
    ready.is_ok_and(|count| count > 0)
}

/// Orders stores to ring memory before loads from it (and the other way round on the driver's side).
pub(super) fn ring_fence() {
    fence(Ordering::SeqCst);
}
