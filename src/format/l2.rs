//! L2 table entries: standard and compressed cluster descriptors.
//!
//! [`L2Entry::decode`] is on the path of every request: no allocation, a handful of mask tests. The
//! order of the tests matters: bit 0 is the zero flag of a standard descriptor, but data of a
//! compressed one, so the compressed flag comes first.

#![forbid(unsafe_code)]

use std::ops::RangeInclusive;

use super::l1::{COPIED, OFFSET_MASK};
use super::{FormatError, Geometry};
use crate::units::{HostCluster, HostOffset, SECTOR_SIZE, pow2};

/// Bit 62: the descriptor is a compressed one.
pub const COMPRESSED: u64 = 1 << 62;

/// Bit 0 of a standard descriptor, v3 only: the cluster reads as zeroes, whether or not it has a
/// host cluster.
pub const ZERO: u64 = 1;

/// Bits of a standard descriptor that must be 0: 1 to 8 and 56 to 61.
const RESERVED_MASK: u64 = !(OFFSET_MASK | COPIED | COMPRESSED | ZERO);

/// Bits of a compressed descriptor: host offset below, additional sectors above, 62 in all.
const DESCRIPTOR_BITS: u32 = 62;

/// What an L2 entry says about its guest cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cluster {
    /// Reads from the backing file, or as zeroes without one.
    Unallocated,
    /// Reads as zeroes; no host cluster.
    ZeroPlain,
    /// Reads as zeroes; keeps a host cluster for later writes.
    ZeroAllocated {
        /// Start of the host cluster.
        host: HostOffset,
        /// Whether its refcount is exactly one.
        copied: bool,
    },
    /// Reads from a host cluster.
    Standard {
        /// Start of the host cluster.
        host: HostOffset,
        /// Whether its refcount is exactly one.
        copied: bool,
    },
    /// Reads from compressed data. Never written in place.
    Compressed {
        /// Start of the data, at any byte.
        host: HostOffset,
        /// Upper bound of the data's length: it ends somewhere in the last of these bytes' sector.
        bytes: u64,
    },
}

/// An L2 entry in host byte order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct L2Entry(pub u64);

impl L2Entry {
    /// Not mapped.
    pub const UNALLOCATED: Self = Self(0);

    /// Data in the host cluster at `host`, which is aligned to a cluster.
    #[must_use]
    #[inline]
    pub const fn standard(host: HostOffset, copied: bool) -> Self {
        debug_assert!(host.get() & !OFFSET_MASK == 0);
        Self(host.get() | if copied { COPIED } else { 0 })
    }

    /// Zeroes without a host cluster; v3 only.
    #[must_use]
    #[inline]
    pub const fn zero_plain() -> Self {
        Self(ZERO)
    }

    /// Zeroes that keep the host cluster at `host`, which is aligned to a cluster; v3 only.
    #[must_use]
    #[inline]
    pub const fn zero_allocated(host: HostOffset, copied: bool) -> Self {
        Self(Self::standard(host, copied).0 | ZERO)
    }

    /// Compressed data of `bytes` bytes at `host`, or `None` if a descriptor cannot say so.
    #[must_use]
    pub fn compressed(geometry: Geometry, host: HostOffset, bytes: u64) -> Option<Self> {
        let offset_bits = compressed_offset_bits(geometry);
        let last = host.get().checked_add(bytes.checked_sub(1)?)?;
        let sectors = (last / SECTOR_SIZE).checked_sub(host.get() / SECTOR_SIZE)?;
        let fits = host.get() < pow2(offset_bits)
            && last < super::geometry::HOST_OFFSET_END
            && sectors < pow2(DESCRIPTOR_BITS.checked_sub(offset_bits)?);
        fits.then(|| Self(COMPRESSED | (sectors << offset_bits) | host.get()))
    }

    /// The copied flag, whatever else the entry says.
    #[must_use]
    #[inline]
    pub const fn copied(self) -> bool {
        self.0 & COPIED != 0
    }

    /// Whether the descriptor is a compressed one.
    #[must_use]
    #[inline]
    pub const fn is_compressed(self) -> bool {
        self.0 & COMPRESSED != 0
    }

    /// The same entry with the copied flag as given.
    #[must_use]
    #[inline]
    pub const fn with_copied(self, copied: bool) -> Self {
        Self(self.0 & !COPIED | if copied { COPIED } else { 0 })
    }

    /// What the entry says, in an image of `version`.
    ///
    /// The copied flag counts only where there is a host cluster that could be written in place. Set
    /// on any other entry it means nothing here; a checker looks at [`copied`](Self::copied).
    ///
    /// # Errors
    ///
    /// Reserved bits, an offset that is not aligned to a cluster, the zero flag in a v2 image, or
    /// compressed data past the largest host offset.
    #[inline]
    pub const fn decode(self, geometry: Geometry, version: u32) -> Result<Cluster, FormatError> {
        if self.is_compressed() {
            return self.decode_compressed(geometry);
        }
        if self.0 & RESERVED_MASK != 0 {
            return Err(self.reserved_bits());
        }
        let host = HostOffset::new(self.0 & OFFSET_MASK);
        if !geometry.is_cluster_aligned(host.get()) {
            return Err(self.unaligned(geometry));
        }
        let copied = self.copied();
        if self.0 & ZERO == 0 {
            return Ok(match host.get() {
                0 => Cluster::Unallocated,
                _ => Cluster::Standard { host, copied },
            });
        }
        if version < 3 {
            return Err(FormatError::ZeroFlagInVersion2 { entry: self.0 });
        }
        Ok(match host.get() {
            0 => Cluster::ZeroPlain,
            _ => Cluster::ZeroAllocated { host, copied },
        })
    }

    /// The compressed half of [`decode`](Self::decode).
    const fn decode_compressed(self, geometry: Geometry) -> Result<Cluster, FormatError> {
        let offset_bits = compressed_offset_bits(geometry);
        let descriptor = self.0 & !(COPIED | COMPRESSED);
        let host = descriptor & (pow2(offset_bits).wrapping_sub(1));
        let additional_sectors = descriptor >> offset_bits;
        // At most 2^13 additional sectors (2 MiB clusters), so the product is small.
        let bytes = additional_sectors
            .wrapping_add(1)
            .wrapping_mul(SECTOR_SIZE)
            .wrapping_sub(host % SECTOR_SIZE);
        // `host` has at most 61 bits, so the sum cannot wrap.
        if host.wrapping_add(bytes) > super::geometry::HOST_OFFSET_END {
            return Err(FormatError::EntryOutOfRange {
                what: "compressed L2 entry",
                entry: self.0,
            });
        }
        Ok(Cluster::Compressed {
            host: HostOffset::new(host),
            bytes,
        })
    }

    /// The error for reserved bits, out of the request path.
    #[cold]
    const fn reserved_bits(self) -> FormatError {
        FormatError::ReservedBits {
            what: "L2 entry",
            entry: self.0,
            bits: self.0 & RESERVED_MASK,
        }
    }

    /// The error for a crooked offset, out of the request path.
    #[cold]
    const fn unaligned(self, geometry: Geometry) -> FormatError {
        FormatError::EntryUnaligned {
            what: "L2 entry",
            entry: self.0,
            cluster_size: geometry.cluster_size(),
        }
    }
}

/// Bits of a compressed descriptor that hold the host offset: more for small clusters, since the
/// number of sectors then needs fewer.
const fn compressed_offset_bits(geometry: Geometry) -> u32 {
    // `cluster_bits` is 9 to 21, so this is 49 to 61.
    DESCRIPTOR_BITS.wrapping_sub(geometry.cluster_bits().wrapping_sub(8))
}

/// The host clusters that compressed data touches; each holds one reference for it.
///
/// `host` and `bytes` are those of a decoded [`Cluster::Compressed`].
#[must_use]
pub fn compressed_host_clusters(
    geometry: Geometry,
    host: HostOffset,
    bytes: u64,
) -> RangeInclusive<HostCluster> {
    let last = HostOffset::new(host.get().saturating_add(bytes.saturating_sub(1)));
    geometry.host_cluster(host)..=geometry.host_cluster(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: HostOffset = HostOffset::new(0x5_0000);

    fn geometry(cluster_bits: u32) -> Geometry {
        Geometry::new(cluster_bits, 4).unwrap()
    }

    #[test]
    fn constructors_decode_to_what_they_were_given() {
        let cases = [
            (L2Entry::UNALLOCATED, Cluster::Unallocated),
            (
                L2Entry::standard(HOST, false),
                Cluster::Standard {
                    host: HOST,
                    copied: false,
                },
            ),
            (
                L2Entry::standard(HOST, true),
                Cluster::Standard {
                    host: HOST,
                    copied: true,
                },
            ),
            (L2Entry::zero_plain(), Cluster::ZeroPlain),
            (
                L2Entry::zero_allocated(HOST, false),
                Cluster::ZeroAllocated {
                    host: HOST,
                    copied: false,
                },
            ),
            (
                L2Entry::zero_allocated(HOST, true),
                Cluster::ZeroAllocated {
                    host: HOST,
                    copied: true,
                },
            ),
        ];
        for (entry, cluster) in cases {
            assert_eq!(entry.decode(geometry(16), 3), Ok(cluster), "{entry:x?}");
        }
    }

    #[test]
    fn copied_flag_without_a_host_cluster_means_nothing() {
        assert_eq!(
            L2Entry(COPIED).decode(geometry(16), 3),
            Ok(Cluster::Unallocated)
        );
        assert_eq!(
            L2Entry(COPIED | ZERO).decode(geometry(16), 3),
            Ok(Cluster::ZeroPlain)
        );
    }

    #[test]
    fn with_copied_changes_only_the_flag() {
        assert_eq!(
            L2Entry::standard(HOST, false).with_copied(true),
            L2Entry::standard(HOST, true)
        );
        assert_eq!(
            L2Entry::zero_allocated(HOST, true).with_copied(false),
            L2Entry::zero_allocated(HOST, false)
        );
    }

    #[test]
    fn zero_flag_is_refused_in_version_2() {
        for entry in [L2Entry::zero_plain(), L2Entry::zero_allocated(HOST, true)] {
            assert_eq!(
                entry.decode(geometry(16), 2),
                Err(FormatError::ZeroFlagInVersion2 { entry: entry.0 })
            );
        }
        assert!(
            L2Entry::standard(HOST, true)
                .decode(geometry(16), 2)
                .is_ok()
        );
    }

    #[test]
    fn every_reserved_bit_is_named() {
        for bit in (1..=8).chain(56..=61) {
            let entry = HOST.get() | 1 << bit;
            assert_eq!(
                L2Entry(entry).decode(geometry(16), 3),
                Err(FormatError::ReservedBits {
                    what: "L2 entry",
                    entry,
                    bits: 1 << bit
                })
            );
        }
    }

    #[test]
    fn offset_bits_below_the_cluster_size_are_refused() {
        for entry in [1 << 15, 1 << 9, 1 << 15 | ZERO] {
            assert!(matches!(
                L2Entry(entry).decode(geometry(16), 3),
                Err(FormatError::EntryUnaligned { .. })
            ));
        }
        let host = HostOffset::new(1 << 9);
        assert_eq!(
            L2Entry(1 << 9).decode(geometry(9), 3),
            Ok(Cluster::Standard {
                host,
                copied: false
            })
        );
    }

    #[test]
    fn bit_0_of_a_compressed_descriptor_is_data() {
        // 64 KiB clusters: 54 bits of offset, so bit 54 counts one additional sector.
        let entry = L2Entry(COMPRESSED | 1 << 54 | 0x1_0001);
        assert_eq!(
            entry.decode(geometry(16), 2),
            Ok(Cluster::Compressed {
                host: HostOffset::new(0x1_0001),
                bytes: 1023
            })
        );
    }

    #[test]
    fn compressed_descriptor_splits_at_62_minus_cluster_bits_minus_8() {
        for cluster_bits in 9..=21 {
            let split = 62 - (cluster_bits - 8);
            let sectors_mask = (1_u64 << (cluster_bits - 8)) - 1;
            let entry = L2Entry(COMPRESSED | sectors_mask << split | 0x200);
            assert_eq!(
                entry.decode(geometry(cluster_bits), 3),
                Ok(Cluster::Compressed {
                    host: HostOffset::new(0x200),
                    bytes: (sectors_mask + 1) * 512
                }),
                "cluster_bits {cluster_bits}"
            );
        }
    }

    #[test]
    fn compressed_bound_ends_at_a_sector_and_covers_the_data() {
        for (host, bytes, bound) in [
            (0x1_0000, 1, 512),
            (0x1_0000, 512, 512),
            (0x1_0000, 513, 1024),
            (0x1_01ff, 1, 1),
            (0x1_01ff, 2, 513),
            (0x1_0123, 70_000, 70_365),
        ] {
            let host = HostOffset::new(host);
            let entry = L2Entry::compressed(geometry(16), host, bytes).unwrap();
            assert_eq!(
                entry.decode(geometry(16), 3),
                Ok(Cluster::Compressed { host, bytes: bound }),
                "{bytes} bytes at {host}"
            );
        }
    }

    #[test]
    fn compressed_data_past_the_largest_host_offset_is_refused() {
        let small = geometry(9);
        let last = HostOffset::new((1 << 56) - 1);
        let entry = L2Entry::compressed(small, last, 1).unwrap();
        assert_eq!(
            entry.decode(small, 3),
            Ok(Cluster::Compressed {
                host: last,
                bytes: 1
            })
        );
        assert_eq!(L2Entry::compressed(small, last, 2), None);
        assert!(matches!(
            L2Entry(COMPRESSED | 1 << 56).decode(small, 3),
            Err(FormatError::EntryOutOfRange { .. })
        ));
    }

    #[test]
    fn compressed_constructor_refuses_what_does_not_fit() {
        let host = HostOffset::new(0x1_0000);
        assert!(L2Entry::compressed(geometry(16), host, 256 * 512).is_some());
        assert_eq!(L2Entry::compressed(geometry(16), host, 256 * 512 + 1), None);
        assert_eq!(L2Entry::compressed(geometry(16), host, 0), None);
        assert_eq!(
            L2Entry::compressed(geometry(21), HostOffset::new(1 << 49), 1),
            None
        );
    }

    #[test]
    fn compressed_data_touches_the_clusters_of_its_first_and_last_byte() {
        for (host, bytes, first, last) in [
            (0x1_0000, 0x1_0000, 1, 1),
            (0x1_0000, 0x1_0001, 1, 2),
            (0x1_ffff, 1, 1, 1),
            (0x1_ffff, 2, 1, 2),
        ] {
            assert_eq!(
                compressed_host_clusters(geometry(16), HostOffset::new(host), bytes),
                HostCluster::new(first)..=HostCluster::new(last),
                "{bytes} bytes at {host:#x}"
            );
        }
    }

    #[test]
    fn every_single_bit_of_an_entry_decodes_or_is_a_named_error() {
        for cluster_bits in 9..=21 {
            for base in [
                0,
                HOST.get(),
                COMPRESSED,
                COMPRESSED | u64::MAX >> 8,
                u64::MAX,
            ] {
                for bit in 0..64 {
                    for version in [2, 3] {
                        let entry = L2Entry(base ^ 1 << bit);
                        if let Err(error) = entry.decode(geometry(cluster_bits), version) {
                            assert!(error.to_string().contains("L2 entry"), "{error}");
                        }
                    }
                }
            }
        }
    }
}
