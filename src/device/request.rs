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
const SEGMENT_SIZE: usize = 16;
/// virtq_desc.
const DESCRIPTOR_SIZE: usize = 16;
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
    let count = payload.len() / SEGMENT_SIZE as u64;
    if !payload.len().is_multiple_of(SEGMENT_SIZE as u64)
        || count == 0
        || count > u64::from(SEGMENTS_MAX)
    {
        return Err(Status::IoError);
    }
    let mut segments = Vec::new();
    let mut bytes = [0; SEGMENT_SIZE];
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
    let count = len / DESCRIPTOR_SIZE as u64;
    if !len.is_multiple_of(DESCRIPTOR_SIZE as u64) || count == 0 {
        return Framing::LOST;
    }
    let mut index = 0;
    for _ in 0..count.min(INDIRECT_MAX) {
        let mut bytes = [0; DESCRIPTOR_SIZE];
        let read = table
            .guest_address
            .checked_add(index * DESCRIPTOR_SIZE as u64)
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use virtio_queue::desc::RawDescriptor;
    use virtio_queue::desc::split::Descriptor as MockDescriptor;
    use virtio_queue::mock::MockSplitQueue;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::device::guest_buf::SharedMemory;
    use crate::device::vring::RingAddresses;

    const NEXT: u16 = 1;
    const WRITE: u16 = 2;
    const INDIRECT: u16 = 4;
    const QUEUE_SIZE: u16 = 16;
    /// Two regions that touch at `SEAM`, one that ends at `END`.
    const SEAM: u64 = 0x10_0000;
    const END: u64 = 0x20_0000;
    const HEADER: u64 = 0x1_0000;
    const DATA: u64 = 0x2_0000;
    const STATUS: u64 = 0x3_0000;
    const TABLE: u64 = 0x4_0000;
    const SECTOR_COUNT: u64 = 1000;

    struct Guest {
        shared: Arc<SharedMemory>,
    }

    impl Guest {
        fn new() -> Self {
            let ranges = [
                (GuestAddress(0), 0x10_0000),
                (GuestAddress(SEAM), 0x10_0000),
            ];
            Self {
                shared: Arc::new(SharedMemory::from_ranges(&ranges).unwrap()),
            }
        }

        fn header(&self, at: u64, kind: u32, sector: u64) {
            self.shared.write_obj(kind, GuestAddress(at)).unwrap();
            self.shared.write_obj(0_u32, GuestAddress(at + 4)).unwrap();
            self.shared.write_obj(sector, GuestAddress(at + 8)).unwrap();
        }

        fn segment(&self, at: u64, sector: u64, count: u32, flags: u32) {
            self.shared.write_obj(sector, GuestAddress(at)).unwrap();
            self.shared.write_obj(count, GuestAddress(at + 8)).unwrap();
            self.shared.write_obj(flags, GuestAddress(at + 12)).unwrap();
        }

        fn table(&self, at: u64, descriptors: &[(u64, u32, u16, u16)]) {
            for (index, descriptor) in descriptors.iter().enumerate() {
                let address = GuestAddress(at + 16 * index as u64);
                self.shared.write_obj(raw(descriptor), address).unwrap();
            }
        }

        /// Parses the chain that starts at descriptor 0 of the given table.
        fn parse(
            &self,
            descriptors: &[(u64, u32, u16, u16)],
        ) -> (Result<Command, Refusal>, Buffers) {
            self.parse_with(descriptors, false)
        }

        fn parse_with(
            &self,
            descriptors: &[(u64, u32, u16, u16)],
            read_only: bool,
        ) -> (Result<Command, Refusal>, Buffers) {
            let queue = MockSplitQueue::create(&*self.shared, GuestAddress(0), QUEUE_SIZE);
            for (index, descriptor) in (0..).zip(descriptors) {
                queue.desc_table().store(index, raw(descriptor)).unwrap();
            }
            let memory = Rc::new(GuestMemory::new(Arc::clone(&self.shared)));
            let addresses = RingAddresses {
                descriptors: queue.desc_table_addr().0,
                avail: queue.avail_addr().0,
                used: queue.used_addr().0,
            };
            let ring = RingMemory::map(&memory, addresses, QUEUE_SIZE).unwrap();
            let limits = Limits {
                sector_count: SECTOR_COUNT,
                block_sectors: 1,
                read_only,
            };
            let mut buffers = Buffers::default();
            let parsed = parse(&ring, &memory, 0, &limits, &mut buffers);
            (parsed, buffers)
        }
    }

    fn raw(&(address, len, flags, next): &(u64, u32, u16, u16)) -> RawDescriptor {
        MockDescriptor::new(address, len, flags, next).into()
    }

    fn read_chain(data_len: u32) -> [(u64, u32, u16, u16); 3] {
        [
            (HEADER, 16, NEXT, 1),
            (DATA, data_len, NEXT | WRITE, 2),
            (STATUS, 1, WRITE, 0),
        ]
    }

    fn write_chain(data_len: u32) -> [(u64, u32, u16, u16); 3] {
        [
            (HEADER, 16, NEXT, 1),
            (DATA, data_len, NEXT, 2),
            (STATUS, 1, WRITE, 0),
        ]
    }

    const IO_ERROR: Result<Command, Refusal> = Err(Refusal::Status(Status::IoError));
    const UNSUPPORTED: Result<Command, Refusal> = Err(Refusal::Status(Status::Unsupported));

    #[test]
    fn a_plain_read_is_its_data_and_its_offset() {
        let guest = Guest::new();
        guest.header(HEADER, VIRTIO_BLK_T_IN, 7);
        let (command, buffers) = guest.parse(&read_chain(4096));
        assert_eq!(command, Ok(Command::Read { offset: 7 * 512 }));
        assert_eq!((buffers.writable.len(), buffers.readable.len()), (4096, 0));
        assert!(buffers.status.is_some());
    }

    #[test]
    fn header_may_be_split_and_status_may_end_the_last_buffer() {
        let guest = Guest::new();
        guest.header(HEADER, VIRTIO_BLK_T_IN, 1);
        let (command, buffers) = guest.parse(&[
            (HEADER, 3, NEXT, 1),
            (HEADER + 3, 13, NEXT, 2),
            (DATA, 513, WRITE, 0),
        ]);
        assert_eq!(command, Ok(Command::Read { offset: 512 }));
        assert_eq!(buffers.writable.len(), 512);
        buffers.status.unwrap().write(0x5a);
        let status: u8 = guest.shared.read_obj(GuestAddress(DATA + 512)).unwrap();
        assert_eq!(status, 0x5a);
    }

    #[test]
    fn header_and_data_may_share_a_descriptor_and_empty_ones_mean_nothing() {
        let guest = Guest::new();
        guest.header(HEADER, VIRTIO_BLK_T_OUT, 0);
        let (command, buffers) = guest.parse(&[
            (u64::MAX, 0, NEXT, 1),
            (HEADER, 16 + 512, NEXT, 2),
            (STATUS, 1, NEXT | WRITE, 3),
            (u64::MAX, 0, WRITE, 0),
        ]);
        assert_eq!(command, Ok(Command::Write { offset: 0 }));
        assert_eq!(buffers.readable.len(), 512);
        assert!(buffers.status.is_some());
    }

    #[test]
    fn data_across_two_regions_is_two_pieces() {
        let guest = Guest::new();
        guest.header(HEADER, VIRTIO_BLK_T_OUT, 0);
        let (command, buffers) = guest.parse(&[
            (HEADER, 16, NEXT, 1),
            (SEAM - 512, 1024, NEXT, 2),
            (STATUS, 1, WRITE, 0),
        ]);
        assert_eq!(command, Ok(Command::Write { offset: 0 }));
        assert_eq!(
            (buffers.readable.len(), buffers.readable.pieces()),
            (1024, 2)
        );
    }

    #[test]
    fn ranges_end_at_the_disk_and_do_not_overflow() {
        let guest = Guest::new();
        let read = |sector, len| {
            guest.header(HEADER, VIRTIO_BLK_T_IN, sector);
            guest.parse(&read_chain(len)).0
        };
        let last = SECTOR_COUNT - 1;
        assert_eq!(read(last, 512), Ok(Command::Read { offset: last * 512 }));
        assert_eq!(read(last, 1024), IO_ERROR);
        assert_eq!(read(SECTOR_COUNT, 512), IO_ERROR);
        assert_eq!(read(u64::MAX, 512), IO_ERROR);
        assert_eq!(read(u64::MAX / 512, 512), IO_ERROR);
        assert_eq!(read(0, 511), IO_ERROR);
        assert_eq!(read(0, 513), IO_ERROR);
    }

    #[test]
    fn a_read_only_disk_refuses_writes() {
        let guest = Guest::new();
        guest.header(HEADER, VIRTIO_BLK_T_OUT, 0);
        assert_eq!(guest.parse_with(&write_chain(512), true).0, IO_ERROR);
    }

    #[test]
    fn unknown_types_are_unsupported() {
        let guest = Guest::new();
        for kind in [2, 3, 99, u32::MAX] {
            guest.header(HEADER, kind, 0);
            assert_eq!(guest.parse(&read_chain(512)).0, UNSUPPORTED, "type {kind}");
        }
    }

    #[test]
    fn segments_are_checked_one_by_one() {
        let guest = Guest::new();
        guest.header(HEADER, VIRTIO_BLK_T_WRITE_ZEROES, 0);
        guest.segment(DATA, 1, 2, 1);
        guest.segment(DATA + 16, 990, 10, 0);
        let segments = vec![
            Segment {
                offset: 512,
                len: 1024,
                unmap: true,
            },
            Segment {
                offset: 990 * 512,
                len: 5120,
                unmap: false,
            },
        ];
        assert_eq!(
            guest.parse(&write_chain(32)).0,
            Ok(Command::WriteZeroes(segments))
        );
        guest.segment(DATA + 16, 991, 10, 0);
        assert_eq!(guest.parse(&write_chain(32)).0, IO_ERROR);
        guest.segment(DATA + 16, 0, SEGMENT_SECTORS_MAX + 1, 0);
        assert_eq!(guest.parse(&write_chain(32)).0, IO_ERROR);
        guest.segment(DATA + 16, 0, 1, 2);
        assert_eq!(guest.parse(&write_chain(32)).0, UNSUPPORTED);
        assert_eq!(guest.parse(&write_chain(24)).0, IO_ERROR);
        assert_eq!(guest.parse(&write_chain(0)).0, IO_ERROR);
        assert_eq!(guest.parse(&write_chain(65 * 16)).0, IO_ERROR);
    }

    #[test]
    fn discard_has_no_unmap_flag() {
        let guest = Guest::new();
        guest.header(HEADER, VIRTIO_BLK_T_DISCARD, 0);
        guest.segment(DATA, 0, 1, 1);
        assert_eq!(guest.parse(&write_chain(16)).0, UNSUPPORTED);
    }

    #[test]
    fn without_a_place_for_the_status_the_chain_goes_back() {
        let guest = Guest::new();
        guest.header(HEADER, VIRTIO_BLK_T_IN, 0);
        let no_status = Err(Refusal::NoStatus);
        assert_eq!(guest.parse(&[(HEADER, 16, 0, 0)]).0, no_status);
        let outside = [(HEADER, 16, NEXT, 1), (END - 1, 2, WRITE, 0)];
        assert_eq!(guest.parse(&outside).0, no_status);
        let wrapping = [(HEADER, 16, NEXT, 1), (u64::MAX, 2, WRITE, 0)];
        assert_eq!(guest.parse(&wrapping).0, no_status);
    }

    #[test]
    fn bad_data_with_a_good_status_is_an_io_error() {
        let guest = Guest::new();
        guest.header(HEADER, VIRTIO_BLK_T_IN, 0);
        let status = (STATUS, 1, WRITE, 0);
        let unmapped_data = [(HEADER, 16, NEXT, 1), (END, 512, NEXT | WRITE, 2), status];
        assert_eq!(guest.parse(&unmapped_data).0, IO_ERROR);
        let mixed = [
            (HEADER, 16, NEXT, 1),
            (DATA, 512, NEXT | WRITE, 2),
            (DATA, 512, NEXT, 3),
            status,
        ];
        assert_eq!(guest.parse(&mixed).0, IO_ERROR);
        let short_header = [(HEADER, 15, NEXT, 1), status];
        assert_eq!(guest.parse(&short_header).0, IO_ERROR);
    }

    #[test]
    fn a_loop_ends_and_an_index_past_the_table_breaks_the_ring() {
        let guest = Guest::new();
        guest.header(HEADER, VIRTIO_BLK_T_IN, 0);
        let looping = [(HEADER, 16, NEXT, 1), (DATA, 512, NEXT | WRITE, 1)];
        assert_eq!(guest.parse(&looping).0, Err(Refusal::NoStatus));
        let beyond = [(HEADER, 16, NEXT, QUEUE_SIZE)];
        assert_eq!(
            guest.parse(&beyond).0,
            Err(Refusal::RingBroken {
                descriptor: QUEUE_SIZE
            })
        );
    }

    #[test]
    fn an_indirect_table_is_a_chain_wherever_it_lies() {
        let guest = Guest::new();
        guest.header(HEADER, VIRTIO_BLK_T_IN, 3);
        // Unaligned, and in the second case across two regions.
        for table in [TABLE + 4, SEAM - 20] {
            guest.table(table, &read_chain(512));
            let (command, buffers) = guest.parse(&[(table, 48, INDIRECT, 0)]);
            assert_eq!(command, Ok(Command::Read { offset: 3 * 512 }));
            assert_eq!(buffers.writable.len(), 512);
        }
    }

    #[test]
    fn bad_indirect_tables_go_back_without_a_status() {
        let guest = Guest::new();
        guest.header(HEADER, VIRTIO_BLK_T_IN, 0);
        let no_status = Err(Refusal::NoStatus);
        guest.table(TABLE, &read_chain(512));
        for len in [0, 15, 47] {
            assert_eq!(guest.parse(&[(TABLE, len, INDIRECT, 0)]).0, no_status);
        }
        // Too short for its own links, nested, looping, and outside of memory.
        assert_eq!(guest.parse(&[(TABLE, 32, INDIRECT, 0)]).0, no_status);
        guest.table(TABLE, &[(TABLE, 48, INDIRECT, 0)]);
        assert_eq!(guest.parse(&[(TABLE, 48, INDIRECT, 0)]).0, no_status);
        guest.table(TABLE, &[(DATA, 1, NEXT, 0)]);
        assert_eq!(guest.parse(&[(TABLE, 16, INDIRECT, 0)]).0, no_status);
        assert_eq!(guest.parse(&[(END, 48, INDIRECT, 0)]).0, no_status);
        assert_eq!(guest.parse(&[(u64::MAX - 8, 48, INDIRECT, 0)]).0, no_status);
    }

    #[test]
    fn an_indirect_descriptor_with_a_successor_is_an_io_error() {
        let guest = Guest::new();
        guest.header(HEADER, VIRTIO_BLK_T_IN, 0);
        guest.table(TABLE, &read_chain(512));
        assert_eq!(guest.parse(&[(TABLE, 48, INDIRECT | NEXT, 1)]).0, IO_ERROR);
    }
}
