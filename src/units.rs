//! Distinct types for the numbers that every layer shares, and the arithmetic between them.
//!
//! A position on the virtual disk ([`GuestOffset`]) and one in the image file ([`HostOffset`]) never
//! mix, and neither mixes with an index of clusters. Conversions between offsets and clusters need a
//! cluster size and live in `format::Geometry`.
//!
//! The operators trap overflow in debug builds. A number that comes from a guest or an image is not
//! trusted: it goes through the `checked_` methods first.

#![forbid(unsafe_code)]

use std::fmt;
use std::ops::{Add, AddAssign, Sub};

/// A sector is always 512 bytes, whatever the block size that the guest sees.
pub const SECTOR_SIZE: u64 = 512;

// `to_usize` and `to_u64` lose nothing because both types have the same width.
const _: () = assert!(usize::BITS == 64, "qblkd needs a 64-bit platform");

macro_rules! quantity {
    ($(#[$doc:meta])* $name:ident, $format:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(transparent)]
        pub struct $name(u64);

        impl $name {
            /// Zero.
            pub const ZERO: Self = Self(0);

            /// Wraps a plain number.
            #[must_use]
            pub const fn new(value: u64) -> Self {
                Self(value)
            }

            /// The plain number.
            #[must_use]
            pub const fn get(self) -> u64 {
                self.0
            }

            /// `self + count`, or `None` past the end of 64 bits.
            #[must_use]
            pub const fn checked_add(self, count: u64) -> Option<Self> {
                match self.0.checked_add(count) {
                    Some(sum) => Some(Self(sum)),
                    None => None,
                }
            }

            /// The distance from `earlier` to `self`, or `None` if `earlier` lies behind `self`.
            #[must_use]
            pub const fn checked_sub(self, earlier: Self) -> Option<u64> {
                self.0.checked_sub(earlier.0)
            }
        }

        impl Add<u64> for $name {
            type Output = Self;

            #[inline]
            fn add(self, count: u64) -> Self {
                Self(self.0 + count)
            }
        }

        impl AddAssign<u64> for $name {
            #[inline]
            fn add_assign(&mut self, count: u64) {
                self.0 += count;
            }
        }

        impl Sub for $name {
            type Output = u64;

            #[inline]
            fn sub(self, earlier: Self) -> u64 {
                self.0 - earlier.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, $format, self.0)
            }
        }
    };
}

quantity! {
    /// A byte position on the virtual disk. Shown in hexadecimal.
    GuestOffset, "{:#x}"
}

quantity! {
    /// A byte position in the image file. Shown in hexadecimal.
    HostOffset, "{:#x}"
}

quantity! {
    /// The index of a cluster on the virtual disk.
    GuestCluster, "{}"
}

quantity! {
    /// The index of a cluster in the image file.
    HostCluster, "{}"
}

/// A byte count or index as the type that slices are indexed with.
#[must_use]
#[inline]
#[expect(
    clippy::cast_possible_truncation,
    reason = "asserted above: usize has 64 bits"
)]
pub const fn to_usize(value: u64) -> usize {
    value as usize
}

/// A slice length or index as the type that offsets are counted in.
#[must_use]
#[inline]
pub const fn to_u64(value: usize) -> u64 {
    value as u64
}

/// 2 to the power of `bits`, which must be below 64.
#[must_use]
#[inline]
pub const fn pow2(bits: u32) -> u64 {
    debug_assert!(bits < u64::BITS);
    1 << bits
}

/// The largest multiple of `alignment`, a power of two, that is not above `value`.
#[must_use]
#[inline]
pub const fn align_down(value: u64, alignment: u64) -> u64 {
    debug_assert!(alignment.is_power_of_two());
    value & !(alignment - 1)
}

/// The smallest multiple of `alignment`, a power of two, that is not below `value`.
///
/// Traps overflow in debug builds only: a value that is not trusted goes through
/// [`checked_align_up`].
#[must_use]
#[inline]
pub const fn align_up(value: u64, alignment: u64) -> u64 {
    align_down(value + (alignment - 1), alignment)
}

/// [`align_up`], or `None` if the result needs more than 64 bits.
#[must_use]
#[inline]
pub const fn checked_align_up(value: u64, alignment: u64) -> Option<u64> {
    match value.checked_add(alignment - 1) {
        Some(sum) => Some(align_down(sum, alignment)),
        None => None,
    }
}

/// Whether `value` is a multiple of `alignment`, a power of two.
#[must_use]
#[inline]
pub const fn is_aligned(value: u64, alignment: u64) -> bool {
    debug_assert!(alignment.is_power_of_two());
    value & (alignment - 1) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alignment_at_both_sides_of_a_boundary() {
        for (value, down, up) in [
            (0, 0, 0),
            (1, 0, 512),
            (511, 0, 512),
            (512, 512, 512),
            (513, 512, 1024),
        ] {
            assert_eq!(align_down(value, 512), down, "align_down({value})");
            assert_eq!(align_up(value, 512), up, "align_up({value})");
            assert_eq!(is_aligned(value, 512), down == up, "is_aligned({value})");
        }
    }

    #[test]
    fn checked_align_up_ends_at_64_bits() {
        let last = u64::MAX - 511;
        assert_eq!(checked_align_up(last, 512), Some(last));
        assert_eq!(checked_align_up(last + 1, 512), None);
    }

    #[test]
    fn checked_arithmetic_ends_at_64_bits() {
        assert_eq!(
            HostOffset::new(u64::MAX - 1).checked_add(1),
            Some(HostOffset::new(u64::MAX))
        );
        assert_eq!(HostOffset::new(u64::MAX).checked_add(1), None);
        assert_eq!(
            GuestCluster::new(3).checked_sub(GuestCluster::new(3)),
            Some(0)
        );
        assert_eq!(GuestCluster::new(3).checked_sub(GuestCluster::new(4)), None);
    }

    #[test]
    fn offsets_are_shown_in_hexadecimal_and_clusters_in_decimal() {
        assert_eq!(GuestOffset::new(0x1_0000).to_string(), "0x10000");
        assert_eq!(HostOffset::new(255).to_string(), "0xff");
        assert_eq!(GuestCluster::new(255).to_string(), "255");
        assert_eq!(HostCluster::new(16).to_string(), "16");
    }

    #[test]
    fn operators_move_an_offset_and_measure_a_distance() {
        let mut offset = GuestOffset::new(10) + 5;
        offset += 1;
        assert_eq!(offset.get(), 16);
        assert_eq!(offset - GuestOffset::new(6), 10);
    }
}
