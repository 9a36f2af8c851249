//! The connection to a vhost-user-blk server and its virtqueues.
//!
//! Owns the transport, the memory that is shared with the server and the rings in it. Builds the
//! virtio-blk requests itself on `virtio_driver`'s generic virtqueue (its own block driver has no
//! GET_ID, no multi-segment discard and hides the status byte). Does not know what the data means.
//!
//! Invariants: a slot is one request's buffer and is in flight at most once; a status byte is 255
//! until the server writes it; the rings outlive every queue that points into them.
//!
//! Unsafe is needed twice: the ring memory belongs to the transport, but has to be lent to queues
//! while the transport is borrowed for setting them up; and libc's `memfd_create` has no safe
//! wrapper among our dependencies. All data accesses go through `vm_memory`'s volatile slices.
#![expect(
    unsafe_code,
    reason = "ring memory shared with the server, and memfd_create"
)]

use super::{Error, SECTOR_BYTES};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use virtio_driver::virtqueue::{Virtqueue, VirtqueueLayout};
use virtio_driver::{
    EventFd, QueueNotifier, VhostUser, VirtioBlkConfig, VirtioBlkFeatureFlags, VirtioFeatureFlags,
    VirtioTransport, iovec,
};
use vm_memory::{FileOffset, MmapRegion, VolatileMemory, VolatileSlice};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// A slot number that stands for "no request".
const NO_SLOT: u16 = u16::MAX;
/// Value of a status byte that the server has not written.
const STATUS_UNWRITTEN: u8 = 255;
/// Largest ring that every known server accepts.
const QUEUE_SIZE_MAX: usize = 1024;
/// Bytes that GET_ID returns.
const SERIAL_BYTES: usize = 20;
/// Size of one segment of a discard or write-zeroes request.
const SEGMENT_BYTES: usize = 16;

/// Status byte of a request that succeeded.
pub(crate) const STATUS_OK: u8 = 0;

/// virtio-blk request types (virtio 1.2, 5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Kind {
    Read = 0,
    Write = 1,
    Flush = 4,
    GetId = 8,
    Discard = 11,
    WriteZeroes = 13,
}

/// One range of a discard or write-zeroes request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Segment {
    pub(crate) sector: u64,
    pub(crate) sectors: u32,
    pub(crate) unmap: bool,
}

/// Request header and status byte, in memory shared with the server.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct RequestBlock {
    kind: u32,
    reserved: u32,
    sector: u64,
    status: u8,
}

type Transport = VhostUser<VirtioBlkConfig, RequestBlock>;
type DynTransport = dyn VirtioTransport<VirtioBlkConfig, RequestBlock>;

/// How to connect.
#[derive(Clone, Debug)]
pub(crate) struct ConnectOptions {
    pub(crate) socket: PathBuf,
    pub(crate) queues: usize,
    /// Requests that one queue can have in flight.
    pub(crate) slots: usize,
    /// Size of each request's buffer.
    pub(crate) slot_bytes: usize,
    /// Largest number of data descriptors of one request.
    pub(crate) data_descriptors: usize,
    /// How long to wait for a socket that is not there yet.
    pub(crate) timeout: Duration,
}

impl ConnectOptions {
    /// Options for one queue with small buffers; callers change what they need.
    pub(crate) fn new(socket: impl Into<PathBuf>) -> Self {
        Self {
            socket: socket.into(),
            queues: 1,
            slots: 32,
            slot_bytes: 256 << 10,
            data_descriptors: 1,
            timeout: Duration::from_secs(10),
        }
    }
}

/// What the server said about the disk, in host integers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Geometry {
    pub(crate) capacity_sectors: u64,
    pub(crate) block_bytes: u32,
    pub(crate) seg_max: u32,
    pub(crate) size_max: u32,
    pub(crate) queues: u16,
    pub(crate) max_discard_sectors: u32,
    pub(crate) max_discard_segments: u32,
    pub(crate) max_write_zeroes_sectors: u32,
    pub(crate) max_write_zeroes_segments: u32,
    pub(crate) writeback: bool,
    pub(crate) features: u64,
}

impl Geometry {
    fn new(config: &VirtioBlkConfig, features: u64) -> Self {
        Self {
            capacity_sectors: config.capacity.into(),
            block_bytes: config.blk_size.into(),
            seg_max: config.seg_max.into(),
            size_max: config.size_max.into(),
            queues: config.num_queues.into(),
            max_discard_sectors: config.max_discard_sectors.into(),
            max_discard_segments: config.max_discard_seg.into(),
            max_write_zeroes_sectors: config.max_write_zeroes_sectors.into(),
            max_write_zeroes_segments: config.max_write_zeroes_seg.into(),
            writeback: config.writeback != 0,
            features,
        }
    }

    /// Whether the feature was offered and accepted.
    pub(crate) fn has(&self, feature: VirtioBlkFeatureFlags) -> bool {
        self.features & feature.bits() != 0
    }

    /// Sectors that offsets and lengths of requests are multiples of.
    pub(crate) fn granule_sectors(&self) -> u64 {
        if self.has(VirtioBlkFeatureFlags::BLK_SIZE) {
            (u64::from(self.block_bytes) / SECTOR_BYTES as u64).max(1)
        } else {
            1
        }
    }
}

/// What must live as long as any queue: the transport owns the mapping of the rings.
struct Shared {
    transport: Mutex<Transport>,
    /// The buffers of all slots of all queues.
    memory: MmapRegion<()>,
}

impl Shared {
    fn transport(&self) -> MutexGuard<'_, Transport> {
        self.transport
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connected disk. Its queues are handed out once, by [`Disk::connect`].
pub(crate) struct Disk {
    shared: Arc<Shared>,
    pub(crate) geometry: Geometry,
}

impl Disk {
    /// Connects, negotiates everything both sides know, shares memory and starts the queues.
    pub(crate) fn connect(options: &ConnectOptions) -> Result<(Self, Vec<Queue>), Error> {
        let mut transport = connect_transport(options)?;
        let features = DynTransport::get_features(&transport);
        let config = DynTransport::get_config(&transport).map_err(Error::io("GET_CONFIG"))?;
        let geometry = Geometry::new(&config, features);
        let offered = DynTransport::max_queues(&transport).unwrap_or(1);
        if options.queues > offered || options.queues > usize::from(geometry.queues.max(1)) {
            return Err(Error::Usage(format!(
                "{} queues wanted, GET_QUEUE_NUM says {offered}, the config space {}",
                options.queues, geometry.queues
            )));
        }

        let memory_bytes = options.queues * options.slots * options.slot_bytes;
        let file = memfd("blkclient-data", memory_bytes).map_err(Error::io("memfd"))?;
        let descriptor = file.as_raw_fd();
        let memory = MmapRegion::<()>::from_file(FileOffset::new(file, 0), memory_bytes)
            .map_err(|error| Error::Usage(format!("mapping {memory_bytes} bytes: {error}")))?;
        transport
            .map_mem_region(memory.as_ptr().addr(), memory_bytes, descriptor, 0)
            .map_err(Error::io("ADD_MEM_REG"))?;

        let rings = start_rings(&mut transport, options, features)?;
        let ends: Vec<_> = (0..options.queues)
            .map(|queue_index| {
                let notifier = DynTransport::get_submission_notifier(&transport, queue_index);
                (
                    notifier,
                    DynTransport::get_completion_fd(&transport, queue_index),
                )
            })
            .collect();
        let shared = Arc::new(Shared {
            transport: Mutex::new(transport),
            memory,
        });
        let queues = rings
            .into_iter()
            .zip(ends)
            .enumerate()
            .map(|(queue_index, (ring, (notifier, call)))| Queue {
                slot_of_chain: vec![NO_SLOT; usize::from(ring.queue_size())],
                ring,
                notifier,
                call,
                slots: options.slots,
                slot_bytes: options.slot_bytes,
                base: queue_index * options.slots * options.slot_bytes,
                in_flight: 0,
                unpublished: false,
                shared: Arc::clone(&shared),
            })
            .collect();
        Ok((Self { shared, geometry }, queues))
    }

    /// Asks the server for its config space: an error means that it is no longer there.
    pub(crate) fn probe(&self) -> Result<(), Error> {
        let transport = self.shared.transport();
        match DynTransport::get_config(&*transport) {
            Ok(_) => Ok(()),
            Err(error) => Err(Error::ServerGone(error.to_string())),
        }
    }

    /// Reads the serial number, using `queue`, which must be idle.
    pub(crate) fn serial(&self, queue: &mut Queue) -> Result<String, Error> {
        queue.write_slot(0, 0, &[0; SERIAL_BYTES]);
        queue.submit(0, Kind::GetId, 0, &[SERIAL_BYTES])?;
        let waiter = Waiter::new(std::slice::from_ref(queue))?;
        let completion = wait_for_one(self, queue, &waiter)?;
        if completion.status != STATUS_OK {
            return Err(Error::Status {
                request: "GET_ID".into(),
                status: completion.status,
            });
        }
        let mut bytes = [0; SERIAL_BYTES];
        queue.read_slot(0, 0, &mut bytes);
        let end = bytes
            .iter()
            .position(|byte| *byte == 0)
            .unwrap_or(SERIAL_BYTES);
        Ok(String::from_utf8_lossy(&bytes[..end]).into_owned())
    }
}

/// Connects; retries while the socket does not exist or nobody listens on it.
fn connect_transport(options: &ConnectOptions) -> Result<Transport, Error> {
    let wanted = VirtioFeatureFlags::VERSION_1.bits()
        | VirtioFeatureFlags::RING_EVENT_IDX.bits()
        | VirtioBlkFeatureFlags::all().bits();
    let path = options
        .socket
        .to_str()
        .ok_or_else(|| Error::Usage("the socket path is not UTF-8".to_owned()))?;
    let deadline = Instant::now() + options.timeout;
    loop {
        match Transport::new(path, wanted) {
            Ok(transport) => return Ok(transport),
            Err(error)
                if Instant::now() < deadline
                    && matches!(
                        error.kind(),
                        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
                    ) =>
            {
                #[expect(
                    clippy::disallowed_methods,
                    reason = "a server that starts listening gives its clients no event"
                )]
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(error) => return Err(Error::io(format!("connecting to {path}"))(error)),
        }
    }
}

/// Lays the rings out in the transport's memory and tells the server about them.
fn start_rings(
    transport: &mut Transport,
    options: &ConnectOptions,
    features: u64,
) -> Result<Vec<Virtqueue<'static, RequestBlock>>, Error> {
    // Header and status take a descriptor each.
    let descriptors = options.slots * (2 + options.data_descriptors.max(1));
    let queue_size = descriptors.next_power_of_two().max(64);
    if queue_size > QUEUE_SIZE_MAX {
        return Err(Error::Usage(format!(
            "{} requests of {} descriptors do not fit a ring of {QUEUE_SIZE_MAX}",
            options.slots,
            2 + options.data_descriptors
        )));
    }
    let flags = VirtioFeatureFlags::from_bits_truncate(features);
    let layout = VirtqueueLayout::new::<RequestBlock>(options.queues, queue_size, flags)
        .map_err(Error::io("ring layout"))?;
    let translators: Vec<_> = (0..options.queues)
        .map(|_| DynTransport::iova_translator(transport))
        .collect();
    let memory = transport
        .alloc_queue_mem(&layout)
        .map_err(Error::io("ring memory"))?;
    let size = u16::try_from(queue_size).unwrap_or(u16::MAX);
    let mut rings = Vec::new();
    for (chunk, translator) in memory.chunks_exact_mut(layout.end_offset).zip(translators) {
        // SAFETY: the chunk lies in the mapping that the transport made in `alloc_queue_mem` and
        // drops only with itself; `Queue::shared` keeps the transport until after the ring is
        // dropped. Each ring gets its own chunk, and nobody else asks for this memory again (a
        // second `alloc_queue_mem` fails).
        let ring_memory: &'static mut [u8] =
            unsafe { std::slice::from_raw_parts_mut(chunk.as_mut_ptr(), chunk.len()) };
        rings.push(
            Virtqueue::new(translator, ring_memory, size, flags).map_err(Error::io("virtqueue"))?,
        );
    }
    VirtioTransport::setup_queues(transport, &rings).map_err(Error::io("starting the queues"))?;
    Ok(rings)
}

/// An anonymous file that the server can map.
fn memfd(name: &str, bytes: usize) -> io::Result<File> {
    let name = std::ffi::CString::new(name)?;
    // SAFETY: the name is a C string that outlives the call (local above).
    let descriptor = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) };
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made by this call and has no other owner.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(descriptor) });
    file.set_len(bytes as u64)?;
    Ok(file)
}

/// A request that the server has finished.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Completion {
    pub(crate) slot: usize,
    pub(crate) status: u8,
}

/// One virtqueue with its request slots.
pub(crate) struct Queue {
    ring: Virtqueue<'static, RequestBlock>,
    notifier: Box<dyn QueueNotifier>,
    call: Arc<EventFd>,
    /// The slot of the request whose chain starts at a descriptor.
    slot_of_chain: Vec<u16>,
    slots: usize,
    slot_bytes: usize,
    /// Offset of slot 0 in the shared memory.
    base: usize,
    in_flight: usize,
    /// Chains were made available that the server may not have been told about.
    unpublished: bool,
    /// Last, so that the ring is dropped before the mapping it lives in.
    shared: Arc<Shared>,
}

impl Queue {
    /// Requests that can be in flight.
    pub(crate) fn slots(&self) -> usize {
        self.slots
    }

    /// Size of one slot's buffer.
    pub(crate) fn slot_bytes(&self) -> usize {
        self.slot_bytes
    }

    /// Requests that are in flight.
    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Makes a request available; `data` are the lengths of its data descriptors, which lie one
    /// after the other in the slot's buffer. The server is told by [`Queue::kick`].
    pub(crate) fn submit(
        &mut self,
        slot: usize,
        kind: Kind,
        sector: u64,
        data: &[usize],
    ) -> Result<(), Error> {
        assert!(slot < self.slots, "slot {slot} of {}", self.slots);
        assert!(
            data.iter().sum::<usize>() <= self.slot_bytes,
            "data beyond the slot"
        );
        let buffer = self
            .shared
            .memory
            .as_ptr()
            .wrapping_add(self.base + slot * self.slot_bytes);
        let from_device = matches!(kind, Kind::Read | Kind::GetId);
        let chain = self
            .ring
            .add_request(|block, add| {
                *block = RequestBlock {
                    kind: (kind as u32).to_le(),
                    reserved: 0,
                    sector: sector.to_le(),
                    status: STATUS_UNWRITTEN,
                };
                let header = std::ptr::from_mut(block);
                add(
                    iovec {
                        iov_base: header.cast(),
                        iov_len: 16,
                    },
                    false,
                )?;
                let mut offset = 0;
                for length in data {
                    let start = buffer.wrapping_add(offset);
                    add(
                        iovec {
                            iov_base: start.cast(),
                            iov_len: *length,
                        },
                        from_device,
                    )?;
                    offset += length;
                }
                let status = std::ptr::from_mut(&mut block.status);
                add(
                    iovec {
                        iov_base: status.cast(),
                        iov_len: 1,
                    },
                    true,
                )
            })
            .map_err(Error::io("adding a request"))?;
        let entry = &mut self.slot_of_chain[usize::from(chain)];
        assert_eq!(*entry, NO_SLOT, "descriptor {chain} heads two requests");
        *entry = u16::try_from(slot).unwrap_or(NO_SLOT);
        self.in_flight += 1;
        self.unpublished = true;
        Ok(())
    }

    /// Makes a discard or write-zeroes request available.
    pub(crate) fn submit_segments(
        &mut self,
        slot: usize,
        kind: Kind,
        segments: &[Segment],
    ) -> Result<(), Error> {
        let mut bytes = Vec::with_capacity(segments.len() * SEGMENT_BYTES);
        for segment in segments {
            bytes.extend_from_slice(&segment.sector.to_le_bytes());
            bytes.extend_from_slice(&segment.sectors.to_le_bytes());
            bytes.extend_from_slice(&u32::from(segment.unmap).to_le_bytes());
        }
        self.write_slot(slot, 0, &bytes);
        self.submit(slot, kind, 0, &[bytes.len()])
    }

    /// Tells the server about new requests, if there are any and it wants to know.
    pub(crate) fn kick(&mut self) -> Result<(), Error> {
        if std::mem::take(&mut self.unpublished) && self.ring.avail_notif_needed() {
            self.notifier.notify().map_err(Error::io("kick"))?;
        }
        Ok(())
    }

    /// Collects what is complete and appends it to `completed`.
    pub(crate) fn reap(&mut self, completed: &mut Vec<Completion>) -> Result<(), Error> {
        for done in self.ring.completions() {
            let entry = &mut self.slot_of_chain[usize::from(done.id)];
            let slot = std::mem::replace(entry, NO_SLOT);
            if slot == NO_SLOT {
                return Err(Error::Protocol(format!(
                    "descriptor {} in the used ring heads no request in flight",
                    done.id
                )));
            }
            self.in_flight -= 1;
            completed.push(Completion {
                slot: usize::from(slot),
                status: done.req.status,
            });
        }
        Ok(())
    }

    /// Asks for an event on the next completion. `false`: there is one already, do not sleep.
    fn arm(&mut self) -> bool {
        self.ring.set_used_notif_enabled(true);
        !self.ring.completions().has_next()
    }

    /// Takes the wish of [`Queue::arm`] back.
    fn disarm(&mut self) {
        self.ring.set_used_notif_enabled(false);
    }

    fn slice(&self, slot: usize, offset: usize, bytes: usize) -> VolatileSlice<'_> {
        assert!(
            slot < self.slots && offset + bytes <= self.slot_bytes,
            "beyond the slot"
        );
        match self
            .shared
            .memory
            .get_slice(self.base + slot * self.slot_bytes + offset, bytes)
        {
            Ok(slice) => slice,
            Err(error) => unreachable!("the mapping covers all slots: {error}"),
        }
    }

    /// Copies `bytes` into the slot's buffer.
    pub(crate) fn write_slot(&self, slot: usize, offset: usize, bytes: &[u8]) {
        self.slice(slot, offset, bytes.len()).copy_from(bytes);
    }

    /// Copies out of the slot's buffer.
    pub(crate) fn read_slot(&self, slot: usize, offset: usize, bytes: &mut [u8]) {
        let copied = self.slice(slot, offset, bytes.len()).copy_to(bytes);
        assert_eq!(copied, bytes.len(), "short copy from shared memory");
    }
}

/// Sleeps until one of a thread's queues has a completion.
pub(crate) struct Waiter {
    epoll: Epoll,
}

impl Waiter {
    /// A waiter for all of `queues`.
    pub(crate) fn new(queues: &[Queue]) -> Result<Self, Error> {
        let epoll = Epoll::new().map_err(Error::io("epoll"))?;
        for queue in queues {
            // Edge-triggered: each signal wakes once, and nobody has to read the eventfd.
            let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
            epoll
                .ctl(
                    ControlOperation::Add,
                    queue.call.as_raw_fd(),
                    EpollEvent::new(events, 0),
                )
                .map_err(Error::io("epoll_ctl"))?;
        }
        Ok(Self { epoll })
    }

    /// Sleeps until a completion is there or `timeout_ms` are over.
    pub(crate) fn wait(&self, queues: &mut [Queue], timeout_ms: i32) -> Result<(), Error> {
        // All are armed, also behind one that has work: `disarm` below is for all.
        let mut quiet = true;
        for queue in queues.iter_mut() {
            quiet &= queue.arm();
        }
        if quiet {
            let mut events = [EpollEvent::default(); 8];
            match self.epoll.wait(timeout_ms, &mut events) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => {
                    return Err(Error::io("epoll_wait")(error));
                }
                _ => {}
            }
        }
        for queue in queues {
            queue.disarm();
        }
        Ok(())
    }
}

/// Notices a server that has died or that sits on a request.
pub(crate) struct Watchdog {
    last_progress: Instant,
    last_probe: Instant,
}

impl Watchdog {
    /// Without a completion for this long, the server is asked whether it lives.
    const PROBE_AFTER: Duration = Duration::from_millis(200);
    /// Without a completion for this long, the run fails.
    const HANG_AFTER: Duration = Duration::from_secs(120);

    pub(crate) fn new() -> Self {
        let now = Instant::now();
        Self {
            last_progress: now,
            last_probe: now,
        }
    }

    /// A completion arrived.
    pub(crate) fn progress(&mut self, now: Instant) {
        self.last_progress = now;
    }

    /// To be called whenever a wait brought nothing.
    pub(crate) fn check(&mut self, disk: &Disk, in_flight: usize) -> Result<(), Error> {
        let now = Instant::now();
        if now - self.last_progress > Self::HANG_AFTER {
            let seconds = Self::HANG_AFTER.as_secs();
            return Err(Error::Hang { seconds, in_flight });
        }
        if now - self.last_progress > Self::PROBE_AFTER && now - self.last_probe > Self::PROBE_AFTER
        {
            self.last_probe = now;
            disk.probe()?;
        }
        Ok(())
    }
}

/// Kicks and waits for the only request in flight.
pub(crate) fn wait_for_one(
    disk: &Disk,
    queue: &mut Queue,
    waiter: &Waiter,
) -> Result<Completion, Error> {
    let mut watchdog = Watchdog::new();
    let mut completed = Vec::new();
    queue.kick()?;
    loop {
        queue.reap(&mut completed)?;
        if let Some(completion) = completed.pop() {
            return Ok(completion);
        }
        waiter.wait(std::slice::from_mut(queue), 100)?;
        watchdog.check(disk, 1)?;
    }
}
