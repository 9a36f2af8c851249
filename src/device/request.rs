//! Descriptor chain -> virtio-blk command: parse once, and trust nothing twice.
//!
//! Owns the walk over a chain (direct and indirect), the framing of header, data and status, and all
//! checks of what the guest asks for against the disk. Does no I/O and changes no ring.
//!
//! Invariants: every descriptor and every byte of a header or segment is read from guest memory
//! exactly once. A [`Command`] that comes out of [`parse`] is inside the disk, in whole logical
//! blocks, and its buffers are guest memory. The walk ends after a bounded number of descriptors,
//! whatever the guest writes there meanwhile.

use std::rc::Rc;

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use virtio_bindings::bindings::virtio_ring::{
    VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};

use super::guest_buf::{GuestBuf, GuestByte, GuestMemory};
use super::vring::RingMemory;

/// virtio: a sector is 512 bytes, whatever the logical block size.
pub(super) const SECTOR_SIZE: u64 = 512;
/// virtio-blk: type, reserved word, sector.
const HEADER_SIZE: usize = 16;
/// virtio-blk: sector, number of sectors, flags.
const SEGMENT_SIZE: u64 = 16;
/// virtq_desc.
const DESCRIPTOR_SIZE: u64 = 16;
/// virtio-blk: length of the GET_ID string.
pub(super) const SERIAL_SIZE: usize = 20;
/// Segments of one DISCARD or WRITE_ZEROES that the configuration space promises.
pub(super) const SEGMENTS_MAX: u32 = 64;
/// Sectors of one segment that the configuration space promises: 2 GiB less one sector.
pub(super) const SEGMENT_SECTORS_MAX: u32 = (i32::MAX as u32) >> 9;
/// Descriptors of an indirect table that are walked, at most: what drivers and QEMU use as bound.
const INDIRECT_MAX: u64 = 1024;

/// What the guest sees of a request's end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Status {
    Ok,
    IoError,
    Unsupported,
}

impl Status {
    pub(super) fn to_byte(self) -> u8 {
        let status = match self {
            Status::Ok => VIRTIO_BLK_S_OK,
            Status::IoError => VIRTIO_BLK_S_IOERR,
            Status::Unsupported => VIRTIO_BLK_S_UNSUPP,
        };
        // The three values are 0, 1 and 2.
        u8::try_from(status).unwrap_or(u8::MAX)
    }
}

/// One descriptor, copied out of guest memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Descriptor {
    guest_address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    /// From the two little-endian words that a descriptor is.
    pub(super) fn from_words(first: u64, second: u64) -> Self {
        let [l0, l1, l2, l3, f0, f1, n0, n1] = second.to_le_bytes();
        Self {
            guest_address: first,
            len: u32::from_le_bytes([l0, l1, l2, l3]),
            flags: u16::from_le_bytes([f0, f1]),
            next: u16::from_le_bytes([n0, n1]),
        }
    }

    fn has(self, flag: u32) -> bool {
        u32::from(self.flags) & flag != 0
    }
}

/// What requests are checked against.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Size of the virtual disk in sectors.
    pub(super) sector_count: u64,
    /// Sectors of a logical block: requests are whole blocks.
    pub(super) block_sectors: u64,
    pub(super) read_only: bool,
}

/// A checked byte range for DISCARD or WRITE_ZEROES.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Segment {
    pub(super) offset: u64,
    pub(super) len: u64,
    /// WRITE_ZEROES may deallocate.
    pub(super) unmap: bool,
}

/// What the guest wants, checked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Command {
    /// Fill all of `Buffers::writable` from this offset.
    Read {
        offset: u64,
    },
    /// Write all of `Buffers::readable` at this offset.
    Write {
        offset: u64,
    },
    Flush,
    /// Put the serial into `Buffers::writable`.
    GetId,
    Discard(Vec<Segment>),
    WriteZeroes(Vec<Segment>),
}

/// Why there is no command.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Refusal {
    /// Answer with this status.
    Status(Status),
    /// There is no place for a status: give the chain back with length 0.
    NoStatus,
    /// The ring itself is not to be trusted any more.
    RingBroken { descriptor: u16 },
}

/// Guest memory of one request.
#[derive(Default)]
pub(super) struct Buffers {
    /// Driver to device, after the header.
    pub(super) readable: GuestBuf,
    /// Device to driver, before the status byte.
    pub(super) writable: GuestBuf,
    pub(super) status: Option<GuestByte>,
}

impl Buffers {
    pub(super) fn with_capacity(pieces: usize) -> Self {
        Self {
            readable: GuestBuf::with_capacity(pieces),
            writable: GuestBuf::with_capacity(pieces),
            status: None,
        }
    }

    pub(super) fn clear(&mut self) {
        self.readable.clear();
        self.writable.clear();
        self.status = None;
    }
}

/// Reads the chain at `head` into `buffers`, which must be empty, and decides what it asks for.
pub(super) fn parse(
    ring: &RingMemory,
    memory: &Rc<GuestMemory>,
    head: u16,
    limits: &Limits,
    buffers: &mut Buffers,
) -> Result<Command, Refusal> {
    let framing = walk(ring, memory, head, buffers)?;
    if framing.last_writable_lost {
        return Err(Refusal::NoStatus);
    }
    buffers.status = buffers.writable.take_last();
    if buffers.status.is_none() {
        return Err(Refusal::NoStatus);
    }
    if framing.bad {
        return Err(Refusal::Status(Status::IoError));
    }
    let mut header = [0; HEADER_SIZE];
    if !buffers.readable.take_front(&mut header) {
        return Err(Refusal::Status(Status::IoError));
    }
    let [k0, k1, k2, k3, _, _, _, _, s0, s1, s2, s3, s4, s5, s6, s7] = header;
    let kind = u32::from_le_bytes([k0, k1, k2, k3]);
    let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
    command(kind, sector, limits, buffers).map_err(Refusal::Status)
}

fn command(
    kind: u32,
    sector: u64,
    limits: &Limits,
    buffers: &mut Buffers,
) -> Result<Command, Status> {
    match kind {
        VIRTIO_BLK_T_IN => {
            let offset = checked_range(limits, sector, buffers.writable.len())?;
            Ok(Command::Read { offset })
        }
        VIRTIO_BLK_T_OUT => {
            writable_disk(limits)?;
            let offset = checked_range(limits, sector, buffers.readable.len())?;
            Ok(Command::Write { offset })
        }
        VIRTIO_BLK_T_FLUSH => Ok(Command::Flush),
        VIRTIO_BLK_T_GET_ID => Ok(Command::GetId),
        VIRTIO_BLK_T_DISCARD => {
            writable_disk(limits)?;
            segments(limits, &mut buffers.readable, 0).map(Command::Discard)
        }
        VIRTIO_BLK_T_WRITE_ZEROES => {
            writable_disk(limits)?;
            segments(
                limits,
                &mut buffers.readable,
                VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
            )
            .map(Command::WriteZeroes)
        }
        _ => Err(Status::Unsupported),
    }
}

fn writable_disk(limits: &Limits) -> Result<(), Status> {
    if limits.read_only {
        return Err(Status::IoError);
    }
    Ok(())
}

/// Byte offset of `sector`, if `len` bytes from there are whole blocks inside the disk.
fn checked_range(limits: &Limits, sector: u64, len: u64) -> Result<u64, Status> {
    let sectors = len / SECTOR_SIZE;
    let fits = len.is_multiple_of(SECTOR_SIZE)
        && sector.is_multiple_of(limits.block_sectors)
        && sectors.is_multiple_of(limits.block_sectors)
        && sector
            .checked_add(sectors)
            .is_some_and(|end| end <= limits.sector_count);
    if !fits {
        return Err(Status::IoError);
    }
    sector.checked_mul(SECTOR_SIZE).ok_or(Status::IoError)
}

/// The payload of DISCARD and WRITE_ZEROES. All segments are checked before any is carried out.
fn segments(
    limits: &Limits,
    payload: &mut GuestBuf,
    flags_allowed: u32,
) -> Result<Vec<Segment>, Status> {
    let count = payload.len() / SEGMENT_SIZE;
    if !payload.len().is_multiple_of(SEGMENT_SIZE) || count == 0 || count > u64::from(SEGMENTS_MAX)
    {
        return Err(Status::IoError);
    }
    let mut segments = Vec::new();
    let mut bytes = [0; SEGMENT_SIZE as usize];
    while payload.take_front(&mut bytes) {
        let [
            s0,
            s1,
            s2,
            s3,
            s4,
            s5,
            s6,
            s7,
            c0,
            c1,
            c2,
            c3,
            f0,
            f1,
            f2,
            f3,
        ] = bytes;
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let sector_count = u32::from_le_bytes([c0, c1, c2, c3]);
        let flags = u32::from_le_bytes([f0, f1, f2, f3]);
        if flags & !flags_allowed != 0 {
            return Err(Status::Unsupported);
        }
        if sector_count > SEGMENT_SECTORS_MAX {
            return Err(Status::IoError);
        }
        let len = u64::from(sector_count) * SECTOR_SIZE;
        segments.push(Segment {
            offset: checked_range(limits, sector, len)?,
            len,
            unmap: flags != 0,
        });
    }
    Ok(segments)
}

/// What a walk has found besides the buffers.
#[derive(Default)]
struct Framing {
    /// The chain breaks a rule, but its end is known: it gets an error status.
    bad: bool,
    /// The last device-writable descriptor is not guest memory (or its end is unknown): the status
    /// byte has no place.
    last_writable_lost: bool,
}

impl Framing {
    const LOST: Framing = Framing {
        bad: true,
        last_writable_lost: true,
    };

    fn add(&mut self, descriptor: Descriptor, memory: &Rc<GuestMemory>, buffers: &mut Buffers) {
        if descriptor.len == 0 {
            // Legal and without effect: its address means nothing.
            return;
        }
        if descriptor.has(VRING_DESC_F_WRITE) {
            let (address, len) = (descriptor.guest_address, descriptor.len);
            let mapped = buffers.writable.push(memory, address, len);
            self.last_writable_lost = !mapped;
            self.bad |= !mapped;
        } else {
            // virtio: driver-writable descriptors come after all others. Their order among
            // themselves carries meaning, so a mixed chain cannot be put right.
            self.bad |= buffers.writable.len() != 0;
            self.bad |= !buffers
                .readable
                .push(memory, descriptor.guest_address, descriptor.len);
        }
    }
}

fn walk(
    ring: &RingMemory,
    memory: &Rc<GuestMemory>,
    head: u16,
    buffers: &mut Buffers,
) -> Result<Framing, Refusal> {
    let mut framing = Framing::default();
    let mut index = head;
    // A chain longer than the ring has a loop.
    for _ in 0..ring.size() {
        let descriptor = ring
            .descriptor(index)
            .ok_or(Refusal::RingBroken { descriptor: index })?;
        if descriptor.has(VRING_DESC_F_INDIRECT) {
            // virtio: an indirect descriptor ends its chain; the rest of it is in the table.
            framing.bad |= descriptor.has(VRING_DESC_F_NEXT);
            return Ok(walk_indirect(descriptor, memory, framing, buffers));
        }
        framing.add(descriptor, memory, buffers);
        if !descriptor.has(VRING_DESC_F_NEXT) {
            return Ok(framing);
        }
        index = descriptor.next;
    }
    Ok(Framing::LOST)
}

fn walk_indirect(
    table: Descriptor,
    memory: &Rc<GuestMemory>,
    mut framing: Framing,
    buffers: &mut Buffers,
) -> Framing {
    let len = u64::from(table.len);
    let count = len / DESCRIPTOR_SIZE;
    if !len.is_multiple_of(DESCRIPTOR_SIZE) || count == 0 {
        return Framing::LOST;
    }
    let mut index = 0;
    for _ in 0..count.min(INDIRECT_MAX) {
        let mut bytes = [0; DESCRIPTOR_SIZE as usize];
        let read = table
            .guest_address
            .checked_add(index * DESCRIPTOR_SIZE)
            .is_some_and(|address| memory.read(address, &mut bytes));
        if !read {
            return Framing::LOST;
        }
        let [
            a0,
            a1,
            a2,
            a3,
            a4,
            a5,
            a6,
            a7,
            b0,
            b1,
            b2,
            b3,
            b4,
            b5,
            b6,
            b7,
        ] = bytes;
        let descriptor = Descriptor::from_words(
            u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
            u64::from_le_bytes([b0, b1, b2, b3, b4, b5, b6, b7]),
        );
        if descriptor.has(VRING_DESC_F_INDIRECT) {
            // virtio: tables do not nest. What is behind it, the status too, is unknown.
            return Framing::LOST;
        }
        framing.add(descriptor, memory, buffers);
        if !descriptor.has(VRING_DESC_F_NEXT) {
            return framing;
        }
        index = u64::from(descriptor.next);
        if index >= count {
            return Framing::LOST;
        }
    }
    Framing::LOST
}
