//! L1 table entries.

#![forbid(unsafe_code)]

use super::{FormatError, Geometry};
use crate::units::HostOffset;

/// Bit 63 of L1 and L2 entries: the refcount of what the entry names is exactly one, so it may be
/// written in place.
pub const COPIED: u64 = 1 << 63;

/// Bits 9 to 55: the host offset in L1 and standard L2 entries.
pub(super) const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;

/// The rest: bits 0 to 8 and 56 to 62.
const RESERVED_MASK: u64 = !(OFFSET_MASK | COPIED);

/// An L1 entry in host byte order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct L1Entry(pub u64);

impl L1Entry {
    /// No L2 table.
    pub const UNALLOCATED: Self = Self(0);

    /// Names the L2 table at `table`, which is aligned to a cluster.
    #[must_use]
    #[inline]
    pub const fn new(table: HostOffset, copied: bool) -> Self {
        debug_assert!(table.get() & !OFFSET_MASK == 0);
        Self(table.get() | if copied { COPIED } else { 0 })
    }

    /// Where the L2 table is, or `None` if there is none.
    #[must_use]
    #[inline]
    pub const fn table_offset(self) -> Option<HostOffset> {
        match self.0 & OFFSET_MASK {
            0 => None,
            offset => Some(HostOffset::new(offset)),
        }
    }

    /// Whether the L2 table's refcount is exactly one.
    #[must_use]
    #[inline]
    pub const fn copied(self) -> bool {
        self.0 & COPIED != 0
    }

    /// The same entry with the copied flag as given.
    #[must_use]
    #[inline]
    pub const fn with_copied(self, copied: bool) -> Self {
        Self(self.0 & !COPIED | if copied { COPIED } else { 0 })
    }

    /// Checks what an image may hold.
    ///
    /// # Errors
    ///
    /// [`FormatError::ReservedBits`] or [`FormatError::EntryUnaligned`].
    #[inline]
    pub const fn validate(self, geometry: Geometry) -> Result<(), FormatError> {
        let bits = self.0 & RESERVED_MASK;
        if bits != 0 {
            return Err(FormatError::ReservedBits {
                what: "L1 entry",
                entry: self.0,
                bits,
            });
        }
        if !geometry.is_cluster_aligned(self.0 & OFFSET_MASK) {
            return Err(FormatError::EntryUnaligned {
                what: "L1 entry",
                entry: self.0,
                cluster_size: geometry.cluster_size(),
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry(cluster_bits: u32) -> Geometry {
        Geometry::new(cluster_bits, 4).unwrap()
    }

    #[test]
    fn new_entry_gives_back_offset_and_flag() {
        for copied in [false, true] {
            for offset in [0x1_0000, 0x00ff_ffff_ffff_0000] {
                let entry = L1Entry::new(HostOffset::new(offset), copied);
                assert_eq!(entry.table_offset(), Some(HostOffset::new(offset)));
                assert_eq!(entry.copied(), copied);
                assert_eq!(entry.validate(geometry(16)), Ok(()));
                assert_eq!(entry.with_copied(!copied).copied(), !copied);
                assert_eq!(
                    entry.with_copied(!copied).table_offset(),
                    entry.table_offset()
                );
            }
        }
    }

    #[test]
    fn empty_entry_names_no_table_even_with_the_copied_flag() {
        assert_eq!(L1Entry::UNALLOCATED.table_offset(), None);
        assert_eq!(L1Entry(COPIED).table_offset(), None);
        assert_eq!(L1Entry(COPIED).validate(geometry(16)), Ok(()));
    }

    #[test]
    fn every_reserved_bit_is_named() {
        for bit in (0..=8).chain(56..=62) {
            let entry = 0x1_0000 | 1 << bit;
            assert_eq!(
                L1Entry(entry).validate(geometry(16)),
                Err(FormatError::ReservedBits {
                    what: "L1 entry",
                    entry,
                    bits: 1 << bit
                })
            );
        }
    }

    #[test]
    fn offset_bits_below_the_cluster_size_are_refused() {
        for bit in 9..=15 {
            assert!(matches!(
                L1Entry(1 << bit).validate(geometry(16)),
                Err(FormatError::EntryUnaligned { .. })
            ));
            assert_eq!(L1Entry(1 << bit).validate(geometry(9)), Ok(()));
        }
        assert_eq!(L1Entry(1 << 16).validate(geometry(16)), Ok(()));
    }
}
