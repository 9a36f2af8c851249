//! A vring, twice: as raw memory on a worker ([`RingMemory`]), and as the framework's object
//! ([`Vring`]) whose setters are hooks that start, change and stop the ring on its worker.
//!
//! Owns the layout of the split virtqueue and the rule *when a ring runs*. Does not take requests
//! (`worker.rs`) and knows nothing of virtio-blk.
//!
//! Why unsafe is needed here: ring memory is shared with the guest, which reads and writes it while
//! we do. Each field is reached as an atomic through a raw pointer. The ownership argument:
//! [`RingMemory::map`] checks bounds and alignment of the three areas once, the `Rc<GuestMemory>`
//! beside the pointers keeps the mapping, and every index is reduced to the ring's size before use.
//!
//! Invariants of [`Vring`]: the framework's loop never sees the real kick descriptor but an eventfd
//! that nobody signals, so its ring thread sleeps for ever, and never reads a descriptor that another
//! thread may have drained. A hook that ends a ring's service returns only when nothing of that ring
//! is in flight. No hook fails: what is wrong with a ring keeps that ring from running, with a log
//! line, and hurts no other.

#![expect(unsafe_code, reason = "ring memory; see the module's text")]

use std::cell::RefCell;
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::rc::Rc;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLockReadGuard, RwLockWriteGuard};

use log::{debug, error, warn};
use vhost_user_backend::{VringRwLock, VringState, VringStateGuard, VringStateMutGuard, VringT};
use virtio_bindings::bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY};
use virtio_queue::Error as QueueError;
use vm_memory::GuestMemoryAtomic;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::error::RingError;
use super::guest_buf::{GuestMemory, SharedMemory};
use super::request::Descriptor;
use super::worker::WorkerHandle;

/// virtqueue layout: bytes before the entries of the avail and used rings (flags, index).
const RING_HEADER: u64 = 4;
const DESCRIPTOR_SIZE: u64 = 16;
const AVAIL_ENTRY_SIZE: u64 = 2;
const USED_ENTRY_SIZE: u64 = 8;
/// The event index behind the last entry.
const EVENT_SIZE: u64 = 2;

/// Guest addresses of a ring's three areas.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RingAddresses {
    pub(super) descriptors: u64,
    pub(super) avail: u64,
    pub(super) used: u64,
}

/// A ring's memory, translated once per memory generation.
pub(super) struct RingMemory {
    /// `size` descriptors, aligned to 16.
    descriptors: *mut u8,
    /// Header, `size` entries, event index; aligned to 2.
    avail: *mut u8,
    /// Header, `size` entries, event index; aligned to 4.
    used: *mut u8,
    /// A power of two.
    size: u16,
    /// Keeps the mapping that the pointers go into.
    memory: Rc<GuestMemory>,
}

impl RingMemory {
    pub(super) fn map(
        memory: &Rc<GuestMemory>,
        addresses: RingAddresses,
        size: u16,
    ) -> Result<Self, RingError> {
        if !size.is_power_of_two() {
            return Err(RingError::BadSize { size: size.into() });
        }
        let entries = u64::from(size);
        let area = |name, guest_address: u64, len, align: u16| {
            if !guest_address.is_multiple_of(align.into()) {
                return Err(RingError::Unaligned {
                    name,
                    guest_address,
                });
            }
            memory
                .contiguous(guest_address, len, align.into())
                .ok_or(RingError::NotGuestMemory {
                    name,
                    guest_address,
                })
        };
        Ok(Self {
            descriptors: area(
                "descriptor table",
                addresses.descriptors,
                entries * DESCRIPTOR_SIZE,
                16,
            )?,
            avail: area(
                "avail ring",
                addresses.avail,
                RING_HEADER + entries * AVAIL_ENTRY_SIZE + EVENT_SIZE,
                2,
            )?,
            used: area(
                "used ring",
                addresses.used,
                RING_HEADER + entries * USED_ENTRY_SIZE + EVENT_SIZE,
                4,
            )?,
            size,
            memory: Rc::clone(memory),
        })
    }

    pub(super) fn size(&self) -> u16 {
        self.size
    }

    fn slot(&self, position: u16) -> usize {
        usize::from(position & (self.size - 1))
    }

    /// The 16-bit field at an even byte offset of an area.
    ///
    /// # Safety
    /// `area` is one of the three, and the field lies inside the length that `map` checked for it.
    unsafe fn field(&self, area: *mut u8, offset: usize) -> &AtomicU16 {
        // SAFETY: in bounds by the caller; aligned, since each area is aligned to at least 2 and
        // `offset` is even; mapped while `self.memory` lives. The guest may write it at any time,
        // which is what an atomic is for.
        unsafe { AtomicU16::from_ptr(area.wrapping_add(offset).cast()) }
    }

    fn avail_entry_offset(&self, position: u16) -> usize {
        4 + self.slot(position) * 2
    }

    /// The driver's index: entries before it may be taken. Acquire: what it made visible, too.
    pub(super) fn avail_index(&self) -> u16 {
        // SAFETY: the header of the avail ring.
        u16::from_le(unsafe { self.field(self.avail, 2) }.load(Ordering::Acquire))
    }

    /// Head of the chain at a position of the avail ring.
    pub(super) fn avail_entry(&self, position: u16) -> u16 {
        // SAFETY: an entry below `size` (`slot`).
        let entry = unsafe { self.field(self.avail, self.avail_entry_offset(position)) };
        u16::from_le(entry.load(Ordering::Relaxed))
    }

    /// Whether a driver without EVENT_IDX wants to be notified.
    pub(super) fn driver_wants_interrupt(&self) -> bool {
        // SAFETY: the header of the avail ring.
        let flags = u16::from_le(unsafe { self.field(self.avail, 0) }.load(Ordering::Relaxed));
        u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0
    }

    /// EVENT_IDX: the used index at which the driver wants to be notified.
    pub(super) fn used_event(&self) -> u16 {
        // SAFETY: the event index behind the last entry.
        let event = unsafe { self.field(self.avail, 4 + usize::from(self.size) * 2) };
        u16::from_le(event.load(Ordering::Relaxed))
    }

    /// EVENT_IDX: asks for a kick when the driver's index passes `index`.
    pub(super) fn set_avail_event(&self, index: u16) {
        // SAFETY: the event index behind the last entry.
        let event = unsafe { self.field(self.used, 4 + usize::from(self.size) * 8) };
        event.store(index.to_le(), Ordering::Relaxed);
    }

    /// Without EVENT_IDX: whether the driver should kick.
    pub(super) fn set_kicks_wanted(&self, wanted: bool) {
        let flags: u16 = if wanted {
            0
        } else {
            // The flag is bit 0.
            u16::try_from(VRING_USED_F_NO_NOTIFY).unwrap_or(1)
        };
        // SAFETY: the header of the used ring.
        unsafe { self.field(self.used, 0) }.store(flags.to_le(), Ordering::Relaxed);
    }

    pub(super) fn used_index(&self) -> u16 {
        // SAFETY: the header of the used ring.
        u16::from_le(unsafe { self.field(self.used, 2) }.load(Ordering::Relaxed))
    }

    /// Fills a used element; the driver sees it only after `set_used_index`.
    pub(super) fn write_used(&self, position: u16, head: u16, len: u32) {
        let element = self.used.wrapping_add(4 + self.slot(position) * 8);
        // SAFETY: an element below `size` (`slot`); aligned to 4, as the area is; mapped as in `field`.
        let id = unsafe { AtomicU32::from_ptr(element.cast()) };
        // SAFETY: the second half of the same element.
        let length = unsafe { AtomicU32::from_ptr(element.wrapping_add(4).cast()) };
        id.store(u32::from(head).to_le(), Ordering::Relaxed);
        length.store(len.to_le(), Ordering::Relaxed);
    }

    /// Publishes all elements before `index`.
    pub(super) fn set_used_index(&self, index: u16) {
        // SAFETY: the header of the used ring.
        unsafe { self.field(self.used, 2) }.store(index.to_le(), Ordering::Release);
    }

    /// A descriptor of the table, read once; `None` if there is none of that index.
    pub(super) fn descriptor(&self, index: u16) -> Option<Descriptor> {
        if index >= self.size {
            return None;
        }
        let words = self.descriptors.wrapping_add(usize::from(index) * 16);
        // SAFETY: `index < size`; aligned to 8, as the table is to 16; mapped as in `field`.
        let first = unsafe { AtomicU64::from_ptr(words.cast()) };
        // SAFETY: the second half of the same descriptor.
        let second = unsafe { AtomicU64::from_ptr(words.wrapping_add(8).cast()) };
        Some(Descriptor::from_words(
            u64::from_le(first.load(Ordering::Relaxed)),
            u64::from_le(second.load(Ordering::Relaxed)),
        ))
    }

    /// Marks the used ring in the dirty log, after it was written. All of it: it is a page or two.
    pub(super) fn mark_used_written(&self) {
        let len = 4 + usize::from(self.size) * 8 + 2;
        self.memory.mark_written(self.used, len);
    }
}

/// Everything a worker needs to serve a ring.
pub(super) struct RingSetup {
    pub(super) queue_index: usize,
    pub(super) size: u16,
    pub(super) addresses: RingAddresses,
    /// Position in the avail ring to go on from.
    pub(super) next_avail: u16,
    pub(super) event_idx: bool,
    /// `None`: the driver does not kick, we poll.
    pub(super) kick: Option<Arc<File>>,
    /// `None`: the driver does not want to be called.
    pub(super) call: Option<Arc<File>>,
}

/// The front-end's wishes for one ring.
#[derive(Default)]
struct Wishes {
    /// What SET_VRING_NUM said; `None` until then.
    size: Option<u16>,
    addresses: Option<RingAddresses>,
    next_avail: u16,
    event_idx: bool,
    kick: Option<Arc<File>>,
    call: Option<Arc<File>>,
    ready: bool,
    enabled: bool,
    /// The worker has the ring.
    running: bool,
    /// The connection is over: nothing starts any more.
    closed: bool,
    /// The framework has asked for the position that ends a ring's service: the `set_kick(None)`
    /// that follows is its cleaning up, not a front-end that chooses polling.
    base_taken: bool,
}

/// The lasting part of a [`Vring`]: which ring, on which worker, and what is wished for it.
pub(super) struct VringControl {
    queue_index: usize,
    worker: WorkerHandle,
    wishes: Mutex<Wishes>,
}

impl VringControl {
    pub(super) fn new(queue_index: usize, worker: WorkerHandle) -> Arc<Self> {
        Arc::new(Self {
            queue_index,
            worker,
            wishes: Mutex::default(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Wishes> {
        // Each hook leaves the wishes consistent before it can panic.
        self.wishes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes what the ring must not see change under it: drains, changes, starts again.
    fn change(&self, change: impl FnOnce(&mut Wishes)) {
        let mut wishes = self.lock();
        self.stop(&mut wishes);
        change(&mut wishes);
        self.start(&mut wishes);
    }

    /// Ends the ring's service for good; returns when nothing of it is in flight.
    pub(super) fn close(&self) {
        self.change(|wishes| wishes.closed = true);
    }

    /// Tries again to start a ring whose memory was missing.
    pub(super) fn retry(&self) {
        self.start(&mut self.lock());
    }

    fn stop(&self, wishes: &mut Wishes) {
        if wishes.running {
            wishes.running = false;
            if let Some(next_avail) = self.worker.stop_ring(self.queue_index) {
                wishes.next_avail = next_avail;
            }
            debug!(
                "vring {}: stopped at {}",
                self.queue_index, wishes.next_avail
            );
        }
    }

    fn start(&self, wishes: &mut Wishes) {
        if wishes.running || wishes.closed || !wishes.ready || !wishes.enabled {
            return;
        }
        let (Some(size), Some(addresses)) = (wishes.size, wishes.addresses) else {
            debug!(
                "vring {}: enabled before it has size and addresses",
                self.queue_index
            );
            return;
        };
        let setup = RingSetup {
            queue_index: self.queue_index,
            size,
            addresses,
            next_avail: wishes.next_avail,
            event_idx: wishes.event_idx,
            kick: wishes.kick.clone(),
            call: wishes.call.clone(),
        };
        match self.worker.start_ring(setup) {
            Ok(()) => {
                debug!(
                    "vring {}: started at {}",
                    self.queue_index, wishes.next_avail
                );
                wishes.running = true;
            }
            Err(error) => error!("vring {} not started: {error}", self.queue_index),
        }
    }
}

/// The framework's vrings of one connection.
pub(super) type FrameworkMemory = GuestMemoryAtomic<SharedMemory>;

thread_local! {
    /// What the framework's constructor for vrings cannot be given as an argument.
    static NEXT_CONTROLS: RefCell<VecDeque<Arc<VringControl>>> = const { RefCell::new(VecDeque::new()) };
}

/// Runs `create`, in which the framework makes its vrings on this thread, in queue order; they take
/// `controls` in that order.
pub(super) fn with_controls<T>(
    controls: impl IntoIterator<Item = Arc<VringControl>>,
    create: impl FnOnce() -> T,
) -> T {
    NEXT_CONTROLS.with_borrow_mut(|next| next.extend(controls));
    let created = create();
    NEXT_CONTROLS.with_borrow_mut(VecDeque::clear);
    created
}

/// Our `VringT`: the framework's own vring for what its loop looks at, and hooks.
#[derive(Clone)]
pub(super) struct Vring {
    framework: VringRwLock<FrameworkMemory>,
    control: Arc<VringControl>,
}

impl<'a> VringStateGuard<'a, FrameworkMemory> for Vring {
    type G = RwLockReadGuard<'a, VringState<FrameworkMemory>>;
}

impl<'a> VringStateMutGuard<'a, FrameworkMemory> for Vring {
    type G = RwLockWriteGuard<'a, VringState<FrameworkMemory>>;
}

impl VringT<FrameworkMemory> for Vring {
    fn new(memory: FrameworkMemory, max_queue_size: u16) -> Result<Self, QueueError> {
        let control = NEXT_CONTROLS
            .with_borrow_mut(VecDeque::pop_front)
            .ok_or(QueueError::QueueNotReady)?;
        Ok(Self {
            framework: VringRwLock::new(memory, max_queue_size)?,
            control,
        })
    }

    fn get_ref(&self) -> <Self as VringStateGuard<'_, FrameworkMemory>>::G {
        self.framework.get_ref()
    }

    fn get_mut(&self) -> <Self as VringStateMutGuard<'_, FrameworkMemory>>::G {
        self.framework.get_mut()
    }

    // The ring is used by its worker only; what the framework offers to others does nothing here.
    fn add_used(&self, _descriptor: u16, _len: u32) -> Result<(), QueueError> {
        Err(QueueError::QueueNotReady)
    }

    fn signal_used_queue(&self) -> io::Result<()> {
        Ok(())
    }

    fn enable_notification(&self) -> Result<bool, QueueError> {
        Ok(false)
    }

    fn disable_notification(&self) -> Result<(), QueueError> {
        Ok(())
    }

    fn needs_notification(&self) -> Result<bool, QueueError> {
        Ok(false)
    }

    fn set_enabled(&self, enabled: bool) {
        let mut wishes = self.control.lock();
        wishes.enabled = enabled;
        if enabled {
            self.control.start(&mut wishes);
        } else {
            self.control.stop(&mut wishes);
        }
        self.framework.set_enabled(enabled);
    }

    fn set_queue_info(&self, descriptors: u64, avail: u64, used: u64) -> Result<(), QueueError> {
        self.control.change(|wishes| {
            wishes.addresses = Some(RingAddresses {
                descriptors,
                avail,
                used,
            });
        });
        Ok(())
    }

    /// Asked by the framework only at the end of GET_VRING_BASE.
    fn queue_next_avail(&self) -> u16 {
        let mut wishes = self.control.lock();
        wishes.base_taken = true;
        wishes.next_avail
    }

    fn set_queue_next_avail(&self, base: u16) {
        self.control.change(|wishes| wishes.next_avail = base);
    }

    // The worker reads the used index from the ring when it starts it, and owns it from then on.
    fn set_queue_next_used(&self, _index: u16) {}

    fn queue_used_idx(&self) -> Result<u16, QueueError> {
        Ok(0)
    }

    fn set_queue_size(&self, size: u16) {
        if !size.is_power_of_two() {
            warn!(
                "vring {}: its size {size} is not a power of two; it will not run",
                self.control.queue_index
            );
        }
        self.control.change(|wishes| wishes.size = Some(size));
    }

    fn set_queue_event_idx(&self, enabled: bool) {
        let changes = self.control.lock().event_idx != enabled;
        if changes {
            self.control.change(|wishes| wishes.event_idx = enabled);
        }
    }

    fn set_queue_ready(&self, ready: bool) {
        let mut wishes = self.control.lock();
        wishes.ready = ready;
        if ready {
            self.control.start(&mut wishes);
        } else {
            self.control.stop(&mut wishes);
        }
        // `ready()` of the framework's queue is what its handler asks for.
        virtio_queue::QueueT::set_ready(self.framework.get_mut().get_queue_mut(), ready);
    }

    fn set_kick(&self, file: Option<File>) {
        let mut wishes = self.control.lock();
        let cleaning_up = std::mem::take(&mut wishes.base_taken) && file.is_none();
        wishes.kick = file.filter(can_be_waited_for).map(Arc::new);
        if wishes.running {
            self.control
                .worker
                .set_kick(self.control.queue_index, wishes.kick.clone());
        }
        drop(wishes);
        // A stand-in, also for a front-end that does not kick: the framework never starts a ring
        // that has no kick descriptor.
        let stand_in = if cleaning_up { None } else { silent_event() };
        self.framework.set_kick(stand_in);
    }

    fn read_kick(&self) -> io::Result<bool> {
        Ok(self.get_ref().is_enabled())
    }

    fn set_call(&self, file: Option<File>) {
        let mut wishes = self.control.lock();
        wishes.call = file.map(Arc::new);
        if wishes.running {
            self.control
                .worker
                .set_call(self.control.queue_index, wishes.call.clone());
        }
    }

    // A broken ring is told in the log.
    fn set_err(&self, _file: Option<File>) {}
}

/// False for a file or device, such as /dev/zero, that is always readable: a worker would spin on it.
/// An eventfd is of no type, a pipe or a socket of its own.
fn can_be_waited_for(kick: &File) -> bool {
    let is_event = kick.metadata().is_ok_and(|metadata| {
        let kind = metadata.file_type();
        let always_readable =
            kind.is_file() || kind.is_dir() || kind.is_char_device() || kind.is_block_device();
        !always_readable
    });
    if !is_event {
        warn!("a kick descriptor is a file or a device; its ring is polled");
    }
    is_event
}

/// An eventfd that nobody signals.
fn silent_event() -> Option<File> {
    use std::os::fd::{FromRawFd, IntoRawFd};
    match EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC) {
        // SAFETY: `into_raw_fd` gives up the descriptor, so the file is its only owner.
        Ok(event) => Some(unsafe { File::from_raw_fd(event.into_raw_fd()) }),
        Err(error) => {
            error!("no eventfd for a vring: {error}");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_not_always_readable_is_waited_for() {
        let event = silent_event().unwrap();
        let (pipe, _writer) = io::pipe().unwrap();
        let waited_for = [event, File::from(std::os::fd::OwnedFd::from(pipe))];
        let polled = ["/dev/zero", "/dev/null", "/", "/proc/self/exe"];
        assert!(waited_for.iter().all(can_be_waited_for));
        let polled = polled.map(|path| File::open(path).unwrap());
        assert!(!polled.iter().any(can_be_waited_for));
    }
}
