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

/// Adds one to each of `count` refcounts from `index` on.
///
/// # Errors
///
/// The index of a refcount that is 0 (nobody refers to that cluster, so there is nothing to share)
/// or at its maximum. Nothing is changed then.
///
/// # Panics
///
/// If the block has no such refcounts, or `order` is above 6.
#[expect(
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    reason = "the panic is the documented answer to a wrong index; no refcount is at its maximum"
)]
pub fn raise(block: &mut [u8], order: u32, index: usize, count: usize) -> Result<(), usize> {
    if order == 4 {
        let refcounts = &mut block.as_chunks_mut().0[index..index + count];
        let is_stuck = |refcount: &[u8; 2]| *refcount == [0; 2] || *refcount == [0xff; 2];
        // Without an early exit: this compiles to vector instructions.
        let stuck = refcounts
            .iter()
            .fold(false, |stuck, refcount| stuck | is_stuck(refcount));
        if stuck {
            let at = refcounts.iter().position(is_stuck).unwrap_or(0);
            return Err(index + at);
        }
        for refcount in refcounts {
            *refcount = (u16::from_be_bytes(*refcount) + 1).to_be_bytes();
        }
        return Ok(());
    }
    let most = most(order);
    let range = index..index + count;
    if let Some(stuck) = range
        .clone()
        .find(|&at| matches!(get(block, order, at), value if value == 0 || value == most))
    {
        return Err(stuck);
    }
    for at in range {
        set(block, order, at, get(block, order, at) + 1);
    }
    Ok(())
}

/// Takes one from each of `count` refcounts from `index` on, and tells which become 0.
///
/// # Errors
///
/// The index of a refcount that is 0 already. Nothing is changed then.
///
/// # Panics
///
/// If the block has no such refcounts, or `order` is above 6.
#[expect(
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    reason = "the panic is the documented answer to a wrong index; no refcount is 0"
)]
pub fn lower(
    block: &mut [u8],
    order: u32,
    index: usize,
    count: usize,
    mut zeroed: impl FnMut(usize),
) -> Result<(), usize> {
    if order == 4 {
        let refcounts = &mut block.as_chunks_mut::<2>().0[index..index + count];
        if let Some(at) = refcounts.iter().position(|refcount| *refcount == [0; 2]) {
            return Err(index + at);
        }
        for (at, refcount) in refcounts.iter_mut().enumerate() {
            let less = u16::from_be_bytes(*refcount) - 1;
            *refcount = less.to_be_bytes();
            if less == 0 {
                zeroed(index + at);
            }
        }
        return Ok(());
    }
    let range = index..index + count;
    if let Some(zero) = range.clone().find(|&at| get(block, order, at) == 0) {
        return Err(zero);
    }
    for at in range {
        let less = get(block, order, at) - 1;
        set(block, order, at, less);
        if less == 0 {
            zeroed(at);
        }
    }
    Ok(())
}

/// The highest refcount in `block`.
///
/// # Panics
///
/// If `order` is above 6.
#[must_use]
pub fn highest(block: &[u8], order: u32) -> u64 {
    if order == 4 {
        // This compiles to vector instructions.
        let refcounts = block.as_chunks().0.iter().copied().map(u16::from_be_bytes);
        return u64::from(refcounts.fold(0, u16::max));
    }
    let refcounts = (0..count(block, order)).map(|index| get(block, order, index));
    refcounts.max().unwrap_or(0)
}

/// Sets the bit of each refcount in `block` that is 1, from the least significant one of the first word
/// on; clears the others.
///
/// # Panics
///
/// If the block has fewer refcounts than `bits`, or `order` is above 6.
pub fn ones(block: &[u8], order: u32, bits: &mut [u64]) {
    if order == 4 {
        let refcounts = block.as_chunks().0;
        for (word, refcounts) in bits.iter_mut().zip(refcounts.chunks(64)) {
            let ones = refcounts.iter().map(|refcount| *refcount == [0, 1]);
            *word = ones.rev().fold(0, |word, one| word << 1 | u64::from(one));
        }
        return;
    }
    for (number, word) in bits.iter_mut().enumerate() {
        let indices = number.saturating_mul(64)..number.saturating_add(1).saturating_mul(64);
        let ones = indices.map(|index| get(block, order, index) == 1);
        *word = ones.rev().fold(0, |word, one| word << 1 | u64::from(one));
    }
}

/// The largest refcount of 2^`order` bits.
#[must_use]
#[expect(
    clippy::arithmetic_side_effects,
    reason = "an order above 6 panics before the shift"
)]
pub fn most(order: u32) -> u64 {
    if order > 6 {
        wrong_order(order);
    }
    u64::MAX >> (64 - (1_u32 << order))
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

/// The indices below `end` whose refcount is 0. Fast where there are few: eight bytes without one are
/// passed over in one step.
pub fn free_indices(block: &[u8], order: u32, end: usize) -> impl Iterator<Item = usize> {
    // A field of the word is 0 exactly if subtracting 1 from it borrows into its upper bit.
    let ones = u64::MAX.checked_div(most(order)).unwrap_or(0);
    let uppers = ones << ((1_u32 << order).saturating_sub(1));
    let per_word = 64_usize >> order;
    block
        .chunks(8)
        .enumerate()
        .filter(move |(_, chunk)| match <[u8; 8]>::try_from(*chunk) {
            Ok(bytes) => {
                let word = u64::from_be_bytes(bytes);
                word.wrapping_sub(ones) & !word & uppers != 0
            }
            Err(_) => true,
        })
        .flat_map(move |(index, _)| {
            let first = index.saturating_mul(per_word);
            first..first.saturating_add(per_word).min(end)
        })
        .filter(move |&index| get(block, order, index) == 0)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ones_are_told_from_all_others_at_every_width() {
        for order in 0..=6 {
            let mut block = vec![0; 512];
            let last = count(&block, order) - 1;
            for (index, value) in [(0, 1), (5, most(order)), (63, 1), (last, 1)] {
                set(&mut block, order, index, value);
            }
            let mut bits = vec![u64::MAX; count(&block, order) / 64];
            ones(&block, order, &mut bits);
            let found: Vec<_> = (0..=last)
                .filter(|at| bits[at / 64] >> (at % 64) & 1 == 1)
                .collect();
            let mut expected = vec![0, 5, 63, last];
            expected.retain(|at| get(&block, order, *at) == 1);
            expected.dedup();
            assert_eq!(found, expected, "{order}");
        }
    }

    #[test]
    fn the_highest_is_found_at_every_width_and_place() {
        for order in 0..=6 {
            let mut block = vec![0; 512];
            assert_eq!(highest(&block, order), 0);
            let last = count(&block, order) - 1;
            set(&mut block, order, last / 2, 1);
            assert_eq!(highest(&block, order), 1, "{order}");
            for index in [0, last] {
                set(&mut block, order, index, most(order));
                assert_eq!(highest(&block, order), most(order), "{order}");
                set(&mut block, order, index, 0);
            }
        }
    }

    #[test]
    fn free_indices_are_those_with_a_count_of_zero() {
        for order in 0..=6 {
            let mut random = fastrand::Rng::with_seed(u64::from(order));
            for full in [0, 1, 3, 200] {
                let mut block = vec![0; 512];
                let entries = count(&block, order);
                for index in 0..entries {
                    let value = if random.u32(..=full) == 0 {
                        0
                    } else {
                        random.u64(1..=most(order))
                    };
                    set(&mut block, order, index, value);
                }
                let end = random.usize(..=entries);
                let expected = (0..end).filter(|&index| get(&block, order, index) == 0);
                assert!(
                    free_indices(&block, order, end).eq(expected),
                    "order {order}"
                );
            }
        }
    }

    const BLOCK_BYTES: usize = 512;

    /// The largest refcount of each order.
    fn max(order: u32) -> u64 {
        Geometry::new(9, order).unwrap().refcount_max()
    }

    #[test]
    fn known_bytes_of_every_order() {
        let block = [0x12, 0x34, 0x56, 0x78, 0x9a, 0xbc, 0xde, 0xf1];
        for (order, values) in [
            // 0x12 is 0001_0010: the least significant bit comes first.
            (0, vec![0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 1]),
            (1, vec![2, 0, 1, 0, 0, 1, 3, 0]),
            (2, vec![2, 1, 4, 3]),
            (3, vec![0x12, 0x34]),
            (4, vec![0x1234, 0x5678, 0x9abc, 0xdef1]),
            (5, vec![0x1234_5678, 0x9abc_def1]),
            (6, vec![0x1234_5678_9abc_def1]),
        ] {
            let found: Vec<u64> = (0..values.len()).map(|i| get(&block, order, i)).collect();
            assert_eq!(found, values, "order {order}");
        }
    }

    #[test]
    fn set_changes_its_refcount_and_no_other() {
        for order in 0..=6 {
            let entries = count(&[0; BLOCK_BYTES], order);
            for index in [0, 1, 2, 3, 7, 8, entries / 2, entries - 1] {
                let mut ones = [0xff; BLOCK_BYTES];
                let mut zeroes = [0; BLOCK_BYTES];
                set(&mut ones, order, index, 0);
                set(&mut zeroes, order, index, max(order));
                let cleared: Vec<usize> = (0..entries)
                    .filter(|&i| get(&ones, order, i) != max(order))
                    .collect();
                let raised: Vec<usize> = (0..entries)
                    .filter(|&i| get(&zeroes, order, i) != 0)
                    .collect();
                assert_eq!(cleared, [index], "order {order}");
                assert_eq!(raised, [index], "order {order}");
                assert_eq!(get(&ones, order, index), 0);
                assert_eq!(get(&zeroes, order, index), max(order));
            }
        }
    }

    #[test]
    fn raise_and_lower_change_a_range_or_nothing() {
        for order in 0..=6 {
            assert_eq!(most(order), max(order));
            let mut block = [0; BLOCK_BYTES];
            let entries = count(&block, order);
            let last = entries - 1;
            assert_eq!(raise(&mut block, order, 2, 3), Err(2), "0 cannot be shared");
            set(&mut block, order, 1, max(order));
            for index in 2..=last {
                set(&mut block, order, index, 1);
            }
            let before = block;
            assert_eq!(raise(&mut block, order, 1, 4), Err(1), "order {order}");
            assert_eq!(lower(&mut block, order, 0, 4, |_| ()), Err(0));
            assert_eq!(block, before);
            if order > 0 {
                assert_eq!(raise(&mut block, order, 3, last - 2), Ok(()));
                let found = [2, 3, last].map(|index| get(&block, order, index));
                assert_eq!(found, [1, 2, 2]);
                assert_eq!(lower(&mut block, order, 3, last - 2, |_| panic!()), Ok(()));
                assert_eq!(block, before);
            }
            let mut zeroed = Vec::new();
            assert_eq!(
                lower(&mut block, order, last - 1, 2, |at| zeroed.push(at)),
                Ok(())
            );
            assert_eq!(zeroed, [last - 1, last]);
            assert_eq!(get(&block, order, last - 2), 1);
        }
    }

    #[test]
    fn block_of_a_geometry_has_as_many_refcounts_as_it_says() {
        for order in 0..=6 {
            let geometry = Geometry::new(9, order).unwrap();
            let entries = u64::try_from(count(&[0; BLOCK_BYTES], order)).unwrap();
            assert_eq!(entries, geometry.refcount_block_entries());
        }
    }

    #[test]
    fn value_that_is_too_wide_panics_and_leaves_the_neighbours() {
        for order in 0..=5 {
            let mut block = [0; BLOCK_BYTES];
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                set(&mut block, order, 1, max(order) + 1);
            }));
            assert!(result.is_err(), "order {order}");
            assert_eq!(block, [0; BLOCK_BYTES], "order {order}");
        }
    }

    #[test]
    fn index_past_the_end_panics() {
        for order in 0..=6 {
            let block = [0; BLOCK_BYTES];
            let entries = count(&block, order);
            assert!(std::panic::catch_unwind(|| get(&block, order, entries)).is_err());
            assert_eq!(get(&block, order, entries - 1), 0);
        }
    }

    #[test]
    fn free_refcounts_are_found_up_to_the_end_of_the_block() {
        for order in 0..=6 {
            let mut block = [0xff; BLOCK_BYTES];
            let last = count(&block, order) - 1;
            assert_eq!(first_free(&block, order, 0), None);
            assert_eq!(free_run(&block, order, 0, 10), 0);
            for index in [3, 4, last] {
                set(&mut block, order, index, 0);
            }
            assert_eq!(first_free(&block, order, 0), Some(3));
            assert_eq!(first_free(&block, order, 4), Some(4));
            assert_eq!(first_free(&block, order, 5), Some(last));
            assert_eq!(free_run(&block, order, 3, 10), 2);
            assert_eq!(free_run(&block, order, 3, 1), 1);
            assert_eq!(free_run(&block, order, last, 10), 1);
            assert_eq!(first_free(&block, order, last + 1), None);
        }
    }

    #[test]
    fn table_entry_gives_back_its_offset() {
        let geometry = Geometry::new(16, 4).unwrap();
        for offset in [0x1_0000, 0x00ff_ffff_ffff_0000] {
            let entry = RefcountTableEntry::new(HostOffset::new(offset));
            assert_eq!(entry.block_offset(), Some(HostOffset::new(offset)));
            assert_eq!(entry.validate(geometry), Ok(()));
        }
        assert_eq!(RefcountTableEntry::UNALLOCATED.block_offset(), None);
        assert_eq!(RefcountTableEntry::UNALLOCATED.validate(geometry), Ok(()));
    }

    #[test]
    fn every_bad_bit_of_a_table_entry_is_refused() {
        let geometry = Geometry::new(16, 4).unwrap();
        let result = |bit: u32| RefcountTableEntry(1 << bit).validate(geometry);
        for bit in 0..=8 {
            assert!(
                matches!(result(bit), Err(FormatError::ReservedBits { .. })),
                "bit {bit}"
            );
        }
        for bit in 9..=15 {
            assert!(
                matches!(result(bit), Err(FormatError::EntryUnaligned { .. })),
                "bit {bit}"
            );
        }
        for bit in 16..=55 {
            assert_eq!(result(bit), Ok(()), "bit {bit}");
        }
        for bit in 56..=63 {
            assert!(
                matches!(result(bit), Err(FormatError::EntryOutOfRange { .. })),
                "bit {bit}"
            );
        }
    }
}
