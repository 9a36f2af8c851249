//! Guest memory as iovecs: the only code of the data path that holds guest pointers.
//!
//! Owns a worker's view of guest memory ([`GuestMemory`]: a flat table of regions instead of a
//! look-up through the framework for every access) and the buffers of one request ([`GuestBuf`]).
//! Knows nothing of descriptors or of virtio-blk.
//!
//! Why unsafe is needed here, and not elsewhere: the guest's memory is shared with a running and
//! possibly hostile guest, so it can never be a Rust reference; it is reached through raw pointers,
//! with volatile accesses, and lent to the kernel as iovecs.
//!
//! The ownership argument: every pointer that leaves [`GuestMemory::translate`] is inside a region's
//! mapping, because translation checks bounds. The mapping lives as long as the `Arc` in
//! `GuestMemory::memory`. Each [`GuestBuf`] that holds pointers holds an `Rc` of that table in
//! `memory`, and so does each [`SgList`] made from it. A worker's request slot owns its buffers until
//! the last completion for it has been reaped (`worker.rs`), so the mapping outlives the kernel's use.
//! Bytes there may change at any time under us; each is read once and copied.

#![expect(unsafe_code, reason = "guest memory; see the module's text")]

use std::cell::Cell;
use std::ops::Range;
use std::ptr;
use std::rc::Rc;
use std::sync::Arc;

use libc::iovec;
use vm_memory::bitmap::Bitmap;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};

use super::bitmap::DirtyBitmap;
use crate::storage::ring::Full;
use crate::storage::{Direction, FileId, HostFile, Ring, SgList};

/// Pieces that a buffer keeps room for between requests: more than `seg_max` asks for.
const PIECES_KEPT: usize = 256;

/// The framework's guest memory with our dirty bitmap.
pub(super) type SharedMemory = GuestMemoryMmap<DirtyBitmap>;

/// One mapped region. Plain numbers, so that a look-up touches one cache line.
struct Region {
    guest_address: u64,
    len: u64,
    /// Start of the mapping in `GuestMemory::memory`, valid for `len` bytes while that lives.
    host: *mut u8,
}

/// A worker's view of one generation of guest memory.
pub(super) struct GuestMemory {
    /// Ascending and disjoint (`SharedMemory` guarantees both).
    regions: Vec<Region>,
    /// Index of the region found last: guests mostly use one.
    last_hit: Cell<usize>,
    /// Keeps the mappings that `regions` points into.
    memory: Arc<SharedMemory>,
}

impl GuestMemory {
    pub(super) fn new(memory: Arc<SharedMemory>) -> Self {
        let regions = memory
            .iter()
            .map(|region| Region {
                guest_address: region.start_addr().raw_value(),
                len: region.len(),
                host: region.as_ptr(),
            })
            .collect();
        Self {
            regions,
            last_hit: Cell::new(0),
            memory,
        }
    }

    /// Host pointer of a guest address, and how many bytes of its region start there (at least 1).
    #[inline]
    fn find(&self, guest_address: u64) -> Option<(*mut u8, u64)> {
        let hit = self.regions.get(self.last_hit.get());
        if let Some(region) = hit {
            let offset = guest_address.wrapping_sub(region.guest_address);
            if offset < region.len {
                return Some((at(region.host, offset), region.len - offset));
            }
        }
        self.find_slow(guest_address)
    }

    #[cold]
    fn find_slow(&self, guest_address: u64) -> Option<(*mut u8, u64)> {
        let index = self
            .regions
            .partition_point(|region| region.guest_address <= guest_address)
            .checked_sub(1)?;
        let region = &self.regions[index];
        let offset = guest_address - region.guest_address;
        if offset >= region.len {
            return None;
        }
        self.last_hit.set(index);
        Some((at(region.host, offset), region.len - offset))
    }

    /// Appends the pieces of a guest range to `out`; several where it crosses regions. False if any
    /// byte of it is not guest memory (then `out` may hold a part of it).
    #[inline]
    fn translate(&self, guest_address: u64, len: u64, out: &mut Vec<iovec>) -> bool {
        let mut next = guest_address;
        let mut left = len;
        while left != 0 {
            let Some((host, available)) = self.find(next) else {
                return false;
            };
            let piece = left.min(available);
            out.push(iovec {
                iov_base: host.cast(),
                iov_len: to_usize(piece),
            });
            left -= piece;
            if left != 0 {
                // Past the last guest address there is no memory.
                let Some(following) = next.checked_add(piece) else {
                    return false;
                };
                next = following;
            }
        }
        true
    }

    /// Host pointer of a range that must lie in one region and be aligned on the host.
    pub(super) fn contiguous(&self, guest_address: u64, len: u64, align: usize) -> Option<*mut u8> {
        let (host, available) = self.find(guest_address)?;
        (available >= len && host.addr().is_multiple_of(align)).then_some(host)
    }

    /// Copies out of guest memory. False, and `bytes` in part, if the range is not guest memory.
    #[inline]
    pub(super) fn read(&self, guest_address: u64, bytes: &mut [u8]) -> bool {
        let mut done = 0;
        while done < bytes.len() {
            let Some((host, available)) = guest_address
                .checked_add(done as u64)
                .and_then(|address| self.find(address))
            else {
                return false;
            };
            let piece = to_usize(available.min((bytes.len() - done) as u64));
            // SAFETY: `find` returned a pointer into a mapping that `self.memory` keeps, with
            // `available >= piece` bytes from it.
            unsafe { read_volatile_bytes(host, &mut bytes[done..done + piece]) };
            done += piece;
        }
        true
    }

    /// Marks a written host range in the dirty log of its region.
    pub(super) fn mark_written(&self, host: *const u8, len: usize) {
        let found = self.regions.iter().enumerate().find_map(|(index, region)| {
            let offset = (host.addr() as u64).wrapping_sub(region.host.addr() as u64);
            (offset < region.len).then_some((index, offset))
        });
        if let Some((index, offset)) = found
            && let Some(region) = self.region(index)
        {
            bitmap_of(region).mark_dirty(to_usize(offset), len);
        }
    }

    /// Marks all guest memory as written: the safe answer when a log appeared in the middle of work.
    pub(super) fn mark_everything_written(&self) {
        for region in self.memory.iter() {
            bitmap_of(region).mark_dirty(0, to_usize(region.len()));
        }
    }

    /// True if a dirty log is installed.
    pub(super) fn has_log(&self) -> bool {
        self.memory
            .iter()
            .any(|region| bitmap_of(region).log().is_some())
    }

    fn region(&self, index: usize) -> Option<&GuestRegionMmap<DirtyBitmap>> {
        self.memory.iter().nth(index)
    }
}

/// The bitmap stored in a region. (The trait method of the same name hands out a slice of it.)
pub(super) fn bitmap_of(region: &GuestRegionMmap<DirtyBitmap>) -> &DirtyBitmap {
    (**region).bitmap()
}

/// Pointer arithmetic inside a mapping, without claiming anything about validity.
fn at(base: *mut u8, offset: u64) -> *mut u8 {
    base.wrapping_add(to_usize(offset))
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "lossless: callers pass lengths inside a mapping of this process"
)]
fn to_usize(value: u64) -> usize {
    value as usize
}

/// Reads memory that the guest may be writing, each byte exactly once.
///
/// # Safety
/// `from` must be valid for reads of `bytes.len()` bytes.
#[inline]
unsafe fn read_volatile_bytes(from: *const u8, bytes: &mut [u8]) {
    if from.addr().is_multiple_of(8) && bytes.len().is_multiple_of(8) {
        for (index, chunk) in bytes.chunks_exact_mut(8).enumerate() {
            // SAFETY: inside the range that the caller vouches for, and aligned: `from` is, and the
            // step is 8.
            let word = unsafe { from.cast::<u64>().wrapping_add(index).read_volatile() };
            chunk.copy_from_slice(&word.to_ne_bytes());
        }
        return;
    }
    for (index, byte) in bytes.iter_mut().enumerate() {
        // SAFETY: inside the range that the caller vouches for.
        *byte = unsafe { from.wrapping_add(index).read_volatile() };
    }
}

/// One direction's memory of one request, as the guest's descriptors gave it.
///
/// Keeps its allocation from request to request. Empty after [`GuestBuf::clear`].
#[derive(Default)]
pub(super) struct GuestBuf {
    /// Pieces of guest memory, each inside a mapping kept by `memory`.
    iovs: Vec<iovec>,
    /// Pieces before this one are used up by `take_front`.
    first: usize,
    /// Bytes in `iovs[first..]`.
    len: u64,
    /// `Some` whenever `iovs` is not empty.
    memory: Option<Rc<GuestMemory>>,
}

impl GuestBuf {
    pub(super) fn with_capacity(pieces: usize) -> Self {
        Self {
            iovs: Vec::with_capacity(pieces),
            ..Self::default()
        }
    }

    pub(super) fn clear(&mut self) {
        self.iovs.clear();
        // One huge request must not cost memory for ever.
        if self.iovs.capacity() > PIECES_KEPT {
            self.iovs.shrink_to(PIECES_KEPT);
        }
        self.first = 0;
        self.len = 0;
        self.memory = None;
    }

    /// Appends a guest range. False if it is not all guest memory; nothing is appended then.
    #[inline]
    pub(super) fn push(&mut self, memory: &Rc<GuestMemory>, guest_address: u64, len: u32) -> bool {
        let pieces = self.iovs.len();
        if !memory.translate(guest_address, u64::from(len), &mut self.iovs) {
            self.iovs.truncate(pieces);
            return false;
        }
        match &self.memory {
            None => self.memory = Some(Rc::clone(memory)),
            // One request is parsed within one generation of guest memory.
            Some(held) => assert!(
                Rc::ptr_eq(held, memory),
                "two memory generations in a buffer"
            ),
        }
        self.len += u64::from(len);
        true
    }

    pub(super) fn len(&self) -> u64 {
        self.len
    }

    pub(super) fn pieces(&self) -> usize {
        self.iovs.len() - self.first
    }

    /// Copies the first bytes out and removes them. False, and nothing removed, if there are fewer.
    #[inline]
    pub(super) fn take_front(&mut self, bytes: &mut [u8]) -> bool {
        if self.len < bytes.len() as u64 {
            return false;
        }
        let mut done = 0;
        while done < bytes.len() {
            let Some(piece) = self.iovs.get_mut(self.first) else {
                return false;
            };
            let count = piece.iov_len.min(bytes.len() - done);
            let from = piece.iov_base.cast::<u8>();
            // SAFETY: `piece` is inside a mapping that `self.memory` keeps (`push`), and
            // `count <= iov_len`.
            unsafe { read_volatile_bytes(from, &mut bytes[done..done + count]) };
            piece.iov_base = from.wrapping_add(count).cast();
            piece.iov_len -= count;
            done += count;
            if piece.iov_len == 0 {
                self.first += 1;
            }
        }
        self.len -= bytes.len() as u64;
        true
    }

    /// Removes the last byte and returns a place for it; `None` if the buffer is empty.
    pub(super) fn take_last(&mut self) -> Option<GuestByte> {
        let memory = self.memory.as_ref()?;
        let piece = self.iovs.get_mut(self.first..)?.last_mut()?;
        piece.iov_len -= 1;
        let byte = GuestByte {
            host: piece.iov_base.cast::<u8>().wrapping_add(piece.iov_len),
            memory: Rc::clone(memory),
        };
        if piece.iov_len == 0 {
            self.iovs.pop();
        }
        self.len -= 1;
        Some(byte)
    }

    /// Copies `bytes` to the buffer's start, as many as fit. Returns how many.
    pub(super) fn write_front(&self, bytes: &[u8]) -> usize {
        let mut done = 0;
        for piece in &self.iovs[self.first..] {
            let count = piece.iov_len.min(bytes.len() - done);
            // SAFETY: `piece` is inside a mapping that `self.memory` keeps, `count <= iov_len`, and
            // guest memory never overlaps memory of ours.
            unsafe {
                ptr::copy_nonoverlapping(
                    bytes[done..done + count].as_ptr(),
                    piece.iov_base.cast::<u8>(),
                    count,
                );
            }
            done += count;
        }
        done
    }

    /// Writes zeroes to a part of the buffer.
    pub(super) fn fill_zero(&self, offset: u64, len: u64) {
        self.for_each_piece(offset, len, |piece| {
            // SAFETY: `piece` is part of a piece of `iovs`, inside a mapping kept by `self.memory`.
            unsafe { ptr::write_bytes(piece.iov_base.cast::<u8>(), 0, piece.iov_len) };
        });
    }

    /// The iovecs of a part of the buffer. `scratch` is used only if that is not all of it.
    pub(super) fn window<'a>(
        &'a self,
        offset: u64,
        len: u64,
        scratch: &'a mut Vec<iovec>,
    ) -> GuestIovecs<'a> {
        if offset == 0 && len == self.len {
            return GuestIovecs(&self.iovs[self.first..]);
        }
        scratch.clear();
        self.for_each_piece(offset, len, |piece| scratch.push(piece));
        GuestIovecs(scratch)
    }

    /// The whole buffer for the engine's asynchronous path; keeps guest memory mapped.
    pub(super) fn sg_list(&self) -> SgList {
        let Some(memory) = &self.memory else {
            return SgList::empty();
        };
        let parts: Vec<(*mut u8, usize)> = self.iovs[self.first..]
            .iter()
            .map(|piece| (piece.iov_base.cast::<u8>(), piece.iov_len))
            .collect();
        // SAFETY: every part is inside a mapping of `memory`, which the list holds from now on. No
        // reference to guest memory exists anywhere.
        unsafe { SgList::from_raw(&parts, Some(Rc::<GuestMemory>::clone(memory))) }
    }

    /// Marks the whole buffer in the dirty log.
    pub(super) fn mark_written(&self) {
        if let Some(memory) = &self.memory {
            for piece in &self.iovs[self.first..] {
                memory.mark_written(piece.iov_base.cast::<u8>(), piece.iov_len);
            }
        }
    }

    fn for_each_piece(&self, offset: u64, len: u64, mut visit: impl FnMut(iovec)) {
        let Range { start, end } = offset..offset + len;
        assert!(
            end <= self.len,
            "range {start}..{end} of {} bytes",
            self.len
        );
        let mut position = 0;
        for piece in &self.iovs[self.first..] {
            let piece_end = position + piece.iov_len as u64;
            let from = start.max(position);
            let to = end.min(piece_end);
            if from < to {
                visit(iovec {
                    iov_base: at(piece.iov_base.cast::<u8>(), from - position).cast(),
                    iov_len: to_usize(to - from),
                });
            }
            if piece_end >= end {
                return;
            }
            position = piece_end;
        }
    }
}

/// Iovecs into guest memory, borrowed from the [`GuestBuf`] that keeps it mapped.
#[derive(Clone, Copy)]
pub(super) struct GuestIovecs<'a>(&'a [iovec]);

impl GuestIovecs<'_> {
    /// Whether the host takes these iovecs as they are (O_DIRECT has rules).
    pub(super) fn suits(self, file: &HostFile, direction: Direction, offset: u64) -> bool {
        file.direct_ok(direction, offset, self.0)
    }

    /// Starts a host read or write on this memory. The completion carries `token`.
    ///
    /// The caller is a request slot: it must keep the `GuestBuf` until that completion is reaped
    /// (the ring law of `worker.rs`; this is why the method is not public to the crate).
    pub(super) fn start(
        self,
        ring: &Ring,
        direction: Direction,
        file: FileId,
        offset: u64,
        token: u64,
    ) -> Result<(), Full> {
        match direction {
            // SAFETY: the memory is mapped while the slot's `GuestBuf` holds its `Rc<GuestMemory>`;
            // `worker.rs` releases a slot only when its `outstanding` count is zero, and the ring
            // drains before a worker drops its slots.
            Direction::Read => unsafe { ring.push_readv(file, offset, self.0, token) },
            // SAFETY: as above.
            Direction::Write => unsafe { ring.push_writev(file, offset, self.0, token) },
        }
    }
}

/// Place of one byte in guest memory: the request's status.
pub(super) struct GuestByte {
    /// Inside a mapping kept by `memory`.
    host: *mut u8,
    memory: Rc<GuestMemory>,
}

impl GuestByte {
    pub(super) fn write(&self, value: u8) {
        // SAFETY: `host` is inside a mapping that `self.memory` keeps (`GuestBuf::take_last`).
        unsafe { self.host.write_volatile(value) };
    }

    pub(super) fn mark_written(&self) {
        self.memory.mark_written(self.host, 1);
    }
}
