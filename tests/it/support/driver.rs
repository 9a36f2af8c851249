//! A front-end and driver of one virtqueue, by hand, so that both can misbehave.
//!
//! The front-end is the `vhost` crate's; the ring is written field by field. Nothing is checked
//! before it is sent. Virtqueue 0, split ring, no EVENT_IDX: every batch calls.

use super::Failure;
use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{
    ByteValued, Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap,
    GuestMemoryRegion,
};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Flags of a descriptor.
pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;
/// virtio-blk request types.
pub(crate) const IN: u32 = 0;
pub(crate) const OUT: u32 = 1;
pub(crate) const FLUSH_REQUEST: u32 = 4;
/// virtio-blk status bytes.
pub(crate) const OK: u8 = 0;
pub(crate) const IOERR: u8 = 1;
/// Before the device writes one.
const UNWRITTEN: u8 = 0xff;

/// Feature bits of the driver.
pub(crate) const FLUSH: u64 = 1 << 9;
const EVENT_IDX: u64 = 1 << 29;

pub(crate) const QUEUE_SIZE: u16 = 16;
/// Where things are in guest memory.
pub(crate) const MEMORY_BYTES: u64 = 1 << 20;
pub(crate) const DESCRIPTORS: u64 = 0x1000;
pub(crate) const AVAIL: u64 = 0x2000;
pub(crate) const USED: u64 = 0x3000;
pub(crate) const HEADER: u64 = 0x4000;
pub(crate) const STATUS: u64 = 0x5000;
pub(crate) const DATA: u64 = 0x1_0000;
/// Far longer than any request takes, also on a busy machine.
const PATIENCE_MS: i32 = 300_000;

/// One connection with one running ring.
pub(crate) struct Driver {
    pub(crate) frontend: Frontend,
    pub(crate) memory: GuestMemoryMmap<()>,
    backing: File,
    pub(crate) kick: EventFd,
    pub(crate) call: EventFd,
    submitted: u16,
}

impl Driver {
    /// Connects, accepts every feature on offer, and starts the ring.
    pub(crate) fn connect(socket: &Path) -> Result<Self, Failure> {
        let mut driver = Self::negotiate(UnixStream::connect(socket)?, 0)?;
        driver.start()?;
        Ok(driver)
    }

    /// Negotiates every feature on offer but `declined`, and starts nothing.
    pub(crate) fn negotiate(stream: UnixStream, declined: u64) -> Result<Self, Failure> {
        let backing = tempfile::tempfile()?;
        backing.set_len(MEMORY_BYTES)?;
        let file = FileOffset::new(backing.try_clone()?, 0);
        let range = (GuestAddress(0), usize::try_from(MEMORY_BYTES)?, Some(file));
        let memory = GuestMemoryMmap::from_ranges_with_files([range])?;
        let mut frontend = Frontend::from_stream(stream, 64);
        frontend.set_owner()?;
        let features = frontend.get_features()?;
        let protocol = frontend.get_protocol_features()?;
        let wanted = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK;
        frontend.set_protocol_features(protocol & wanted)?;
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        frontend.set_features(features & !EVENT_IDX & !declined)?;
        Ok(Self {
            frontend,
            memory,
            backing,
            kick: EventFd::new(EFD_NONBLOCK)?,
            call: EventFd::new(EFD_NONBLOCK)?,
            submitted: 0,
        })
    }

    /// Sectors of the disk, as the configuration space has them.
    pub(crate) fn capacity(&mut self) -> Result<u64, Failure> {
        let flags = VhostUserConfigFlags::WRITABLE;
        let (_, bytes) = self.frontend.get_config(0, 8, flags, &[0; 8])?;
        Ok(u64::from_le_bytes(bytes.as_slice().try_into()?))
    }

    /// Shares the memory and starts the ring from its beginning.
    pub(crate) fn start(&mut self) -> Result<(), Failure> {
        self.share_memory()?;
        self.start_ring(DESCRIPTORS, AVAIL, USED)
    }

    pub(crate) fn share_memory(&self) -> Result<(), Failure> {
        let regions: Vec<_> = self
            .memory
            .iter()
            .map(|region| VhostUserMemoryRegionInfo {
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: region.as_ptr().addr() as u64,
                mmap_offset: region.start_addr().0,
                mmap_handle: self.backing.as_raw_fd(),
            })
            .collect();
        self.frontend.set_mem_table(&regions)?;
        Ok(())
    }

    /// Makes guest memory end here, for the device as well: whoever looks past it gets a bus error.
    pub(crate) fn shorten_memory(&self, length: u64) -> Result<(), Failure> {
        Ok(self.backing.set_len(length)?)
    }

    /// Where a guest address is in the front-end; also for addresses that are not in its memory.
    fn user_address(&self, guest_address: u64) -> Result<u64, Failure> {
        let start = self.memory.get_host_address(GuestAddress(0))?;
        Ok((start.addr() as u64).wrapping_add(guest_address))
    }

    pub(crate) fn start_ring(
        &mut self,
        descriptors: u64,
        avail: u64,
        used: u64,
    ) -> Result<(), Failure> {
        self.frontend.set_vring_num(0, QUEUE_SIZE)?;
        self.frontend.set_vring_base(0, self.submitted)?;
        let addresses = VringConfigData {
            queue_max_size: QUEUE_SIZE,
            queue_size: QUEUE_SIZE,
            flags: 0,
            desc_table_addr: self.user_address(descriptors)?,
            used_ring_addr: self.user_address(used)?,
            avail_ring_addr: self.user_address(avail)?,
            log_addr: None,
        };
        self.frontend.set_vring_addr(0, &addresses)?;
        self.frontend.set_vring_call(0, &self.call)?;
        self.frontend.set_vring_kick(0, &self.kick)?;
        self.frontend.set_vring_enable(0, true)?;
        Ok(())
    }

    /// Stops the ring: nothing is in flight afterwards.
    pub(crate) fn stop_ring(&mut self) -> Result<u32, Failure> {
        Ok(self.frontend.get_vring_base(0)?)
    }

    pub(crate) fn put<T: ByteValued>(&self, at: u64, value: T) -> Result<(), Failure> {
        Ok(self.memory.write_obj(value, GuestAddress(at))?)
    }

    pub(crate) fn get<T: ByteValued>(&self, at: u64) -> Result<T, Failure> {
        Ok(self.memory.read_obj(GuestAddress(at))?)
    }

    /// All of guest memory, as it is now.
    pub(crate) fn snapshot(&self) -> Result<Vec<u8>, Failure> {
        let mut bytes = vec![0; usize::try_from(MEMORY_BYTES)?];
        self.memory.read_slice(&mut bytes, GuestAddress(0))?;
        Ok(bytes)
    }

    /// Writes a descriptor of the ring's table.
    pub(crate) fn descriptor(
        &self,
        index: u16,
        address: u64,
        length: u32,
        flags: u16,
        next: u16,
    ) -> Result<(), Failure> {
        let at = DESCRIPTORS + u64::from(index) * 16;
        self.descriptor_at(at, address, length, flags, next)
    }

    pub(crate) fn descriptor_at(
        &self,
        at: u64,
        address: u64,
        length: u32,
        flags: u16,
        next: u16,
    ) -> Result<(), Failure> {
        self.put(at, address)?;
        self.put(at + 8, length)?;
        self.put(at + 12, flags)?;
        self.put(at + 14, next)
    }

    /// Makes chains available by their heads, and kicks.
    pub(crate) fn submit(&mut self, heads: &[u16]) -> Result<(), Failure> {
        for head in heads {
            let slot = u64::from(self.submitted % QUEUE_SIZE);
            self.put(AVAIL + 4 + slot * 2, *head)?;
            self.submitted = self.submitted.wrapping_add(1);
        }
        self.set_avail_index(self.submitted)
    }

    pub(crate) fn set_avail_index(&self, index: u16) -> Result<(), Failure> {
        self.put(AVAIL + 2, index)?;
        Ok(self.kick.write(1)?)
    }

    /// Lays out a well-formed request at descriptor 0.
    pub(crate) fn lay_out(
        &self,
        kind: u32,
        sector: u64,
        length: u32,
        flags: u16,
    ) -> Result<(), Failure> {
        self.put(HEADER, kind)?;
        self.put(HEADER + 4, 0_u32)?;
        self.put(HEADER + 8, sector)?;
        self.put(STATUS, UNWRITTEN)?;
        self.descriptor(0, HEADER, 16, NEXT, 1)?;
        self.descriptor(1, DATA, length, NEXT | flags, 2)?;
        self.descriptor(2, STATUS, 1, WRITE, 0)
    }

    /// A well-formed request, from submission to its status.
    pub(crate) fn request(
        &mut self,
        kind: u32,
        sector: u64,
        length: u32,
        flags: u16,
    ) -> Result<u8, Failure> {
        self.lay_out(kind, sector, length, flags)?;
        self.submit(&[0])?;
        self.wait()?;
        self.get(STATUS)
    }

    /// The first bytes of the disk, so many that they are whole data areas.
    pub(crate) fn read_disk(&mut self, bytes: u64) -> Result<Vec<u8>, Failure> {
        const PIECE: u32 = 1 << 19;
        let mut disk = Vec::new();
        let mut piece = vec![0; usize::try_from(PIECE)?];
        for start in (0..bytes).step_by(piece.len()) {
            let status = self.request(IN, start / 512, PIECE, WRITE)?;
            if status != OK {
                return Err(format!("a read at {start} ends with status {status}").into());
            }
            self.memory.read_slice(&mut piece, GuestAddress(DATA))?;
            disk.extend_from_slice(&piece);
        }
        Ok(disk)
    }

    /// Fills the data area with one byte.
    pub(crate) fn memory_fill(&self, byte: u8) -> Result<(), Failure> {
        let length = usize::try_from(MEMORY_BYTES - DATA)?;
        Ok(self
            .memory
            .write_slice(&vec![byte; length], GuestAddress(DATA))?)
    }

    pub(crate) fn used_index(&self) -> Result<u16, Failure> {
        self.get(USED + 2)
    }

    /// Waits until everything submitted has been given back.
    pub(crate) fn wait(&self) -> Result<(), Failure> {
        while self.used_index()? != self.submitted {
            let epoll = Epoll::new()?;
            let entry = EpollEvent::new(EventSet::IN, 0);
            epoll.ctl(ControlOperation::Add, self.call.as_raw_fd(), entry)?;
            match epoll.wait(PATIENCE_MS, &mut [EpollEvent::default()]) {
                Ok(0) => return Err("no call in time".into()),
                // A machine that is put to sleep and woken up, say.
                Err(error) if error.kind() != ErrorKind::Interrupted => return Err(error.into()),
                _ => {}
            }
            // It may have been read before: then this is no news.
            self.call.read().ok();
        }
        Ok(())
    }
}
