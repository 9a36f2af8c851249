//! Refcount table entries, and refcount blocks of every width.
//!
//! A refcount block is one cluster of refcounts of 2^order bits. From 8 bits up they are big-endian
//! numbers; narrower ones fill a byte from its least significant bits up.
//!
//! An index past the end of a block, or a value wider than a refcount, is a broken invariant of the
//! caller and panics: both come from [`Geometry`], never from an image.

#![forbid(unsafe_code)]

use super::{FormatError, Geometry};
use crate::units::HostOffset;

/// Bits 9 to 63: the host offset.
const OFFSET_MASK: u64 = !0x1ff;

/// A refcount table entry in host byte order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct RefcountTableEntry(pub u64);

impl RefcountTableEntry {
    /// No refcount block: all refcounts of its range are 0.
    pub const UNALLOCATED: Self = Self(0);

    /// Names the refcount block at `block`, which is aligned to a cluster.
    #[must_use]
    #[inline]
    pub const fn new(block: HostOffset) -> Self {
        debug_assert!(block.get() & !OFFSET_MASK == 0);
        Self(block.get())
    }

    /// Where the refcount block is, or `None` if there is none.
    #[must_use]
    #[inline]
    pub const fn block_offset(self) -> Option<HostOffset> {
        match self.0 & OFFSET_MASK {
            0 => None,
            offset => Some(HostOffset::new(offset)),
        }
    }

    /// Checks what an image may hold.
    ///
    /// # Errors
    ///
    /// [`FormatError::ReservedBits`], [`FormatError::EntryUnaligned`] or
    /// [`FormatError::EntryOutOfRange`].
    #[inline]
    pub const fn validate(self, geometry: Geometry) -> Result<(), FormatError> {
        const WHAT: &str = "refcount table entry";
        let entry = self.0;
        let bits = entry & !OFFSET_MASK;
        if bits != 0 {
            return Err(FormatError::ReservedBits {
                what: WHAT,
                entry,
                bits,
            });
        }
        if !geometry.is_cluster_aligned(entry) {
            let cluster_size = geometry.cluster_size();
            return Err(FormatError::EntryUnaligned {
                what: WHAT,
                entry,
                cluster_size,
            });
        }
        if entry >= super::geometry::HOST_OFFSET_END {
            return Err(FormatError::EntryOutOfRange { what: WHAT, entry });
        }
        Ok(())
    }
}

/// The refcount at `index` of a block whose refcounts have 2^`order` bits.
///
/// # Panics
///
/// If the block has no such refcount, or `order` is above 6.
#[must_use]
#[inline]
#[expect(
    clippy::indexing_slicing,
    reason = "the panic is the documented answer to a wrong index"
)]
pub fn get(block: &[u8], order: u32, index: usize) -> u64 {
    match order {
        4 => u64::from(u16::from_be_bytes(block.as_chunks().0[index])),
        0..=2 => {
            let place = SubByte::new(order, index);
            u64::from(block[place.byte]) >> place.shift & place.mask
        }
        3 => u64::from(block[index]),
        5 => u64::from(u32::from_be_bytes(block.as_chunks().0[index])),
        6 => u64::from_be_bytes(block.as_chunks().0[index]),
        _ => wrong_order(order),
    }
}

/// Replaces the refcount at `index` of a block whose refcounts have 2^`order` bits.
///
/// # Panics
///
/// If the block has no such refcount, `value` needs more bits, or `order` is above 6.
#[inline]
#[expect(
    clippy::indexing_slicing,
    reason = "the panic is the documented answer to a wrong index"
)]
pub fn set(block: &mut [u8], order: u32, index: usize, value: u64) {
    match order {
        4 => block.as_chunks_mut().0[index] = narrow::<u16>(value, order).to_be_bytes(),
        0..=2 => {
            let place = SubByte::new(order, index);
            assert!(
                value <= place.mask,
                "refcount {value} needs more than 2^{order} bits"
            );
            let kept = u64::from(block[place.byte]) & !(place.mask << place.shift);
            block[place.byte] = narrow::<u8>(kept | value << place.shift, order);
        }
        3 => block[index] = narrow::<u8>(value, order),
        5 => block.as_chunks_mut().0[index] = narrow::<u32>(value, order).to_be_bytes(),
        6 => block.as_chunks_mut().0[index] = value.to_be_bytes(),
        _ => wrong_order(order),
    }
}

/// Refcounts in `block`.
#[must_use]
#[inline]
pub fn count(block: &[u8], order: u32) -> usize {
    let bits = block.len().saturating_mul(8);
    bits.checked_shr(order).unwrap_or(0)
}

/// The first index in `from..` whose refcount is 0.
#[must_use]
pub fn first_free(block: &[u8], order: u32, from: usize) -> Option<usize> {
    (from..count(block, order)).find(|&index| get(block, order, index) == 0)
}

/// How many refcounts from `from` on are 0, counted up to `limit`.
#[must_use]
pub fn free_run(block: &[u8], order: u32, from: usize, limit: usize) -> usize {
    (from..count(block, order))
        .take(limit)
        .take_while(|&index| get(block, order, index) == 0)
        .count()
}

/// Where a refcount narrower than a byte lies.
struct SubByte {
    /// Index of its byte.
    byte: usize,
    /// Its lowest bit in there.
    shift: u32,
    /// Its bits, shifted down.
    mask: u64,
}

impl SubByte {
    /// For `order` 0 to 2.
    #[inline]
    #[expect(
        clippy::arithmetic_side_effects,
        clippy::cast_possible_truncation,
        reason = "order is 0 to 2: 8 to 2 refcounts share a byte, and the remainder is below 8"
    )]
    fn new(order: u32, index: usize) -> Self {
        let per_byte = 8_usize >> order;
        Self {
            byte: index / per_byte,
            shift: ((index % per_byte) << order) as u32,
            mask: (1 << (1 << order)) - 1,
        }
    }
}

/// `value` in the type that holds a refcount of 2^`order` bits.
#[inline]
#[track_caller]
fn narrow<T: TryFrom<u64>>(value: u64, order: u32) -> T {
    match T::try_from(value) {
        Ok(narrowed) => narrowed,
        Err(_) => panic!("refcount {value} needs more than 2^{order} bits"),
    }
}

/// `Geometry` holds no such order.
#[cold]
fn wrong_order(order: u32) -> ! {
    panic!("refcount_order {order} is above 6")
}
