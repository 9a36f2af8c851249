//! Cluster size and refcount width of an image, and every size and index that follows from them.
//!
//! Invariant: a [`Geometry`] exists only with lawful values, so none of its shifts can overflow. The
//! limits that bound what an image may make us allocate stand here too.

#![forbid(unsafe_code)]

use super::FormatError;
use crate::units::{GuestCluster, GuestOffset, HostCluster, HostOffset, pow2};

/// Smallest `cluster_bits`: 512 bytes, one sector.
pub const CLUSTER_BITS_MIN: u32 = 9;

/// Largest `cluster_bits`: 2 MiB, QEMU's limit.
pub const CLUSTER_BITS_MAX: u32 = 21;

/// Largest `refcount_order`: 64-bit refcounts.
pub const REFCOUNT_ORDER_MAX: u32 = 6;

/// The only `refcount_order` of a v2 image: 16-bit refcounts.
pub const REFCOUNT_ORDER_V2: u32 = 4;

/// Longest L1 table, QEMU's limit: 4 Mi entries of 8 bytes.
pub const L1_BYTES_MAX: u64 = 32 << 20;

/// Longest refcount table, QEMU's limit: 1 Mi entries of 8 bytes.
pub const REFTABLE_BYTES_MAX: u64 = 8 << 20;

/// Most internal snapshots, QEMU's limit.
pub const SNAPSHOTS_MAX: u32 = 65536;

/// Longest snapshot table, QEMU's limit: 1 KiB for each of the most snapshots.
pub const SNAPSHOT_TABLE_BYTES_MAX: u64 = 64 << 20;

const _: () = assert!(SNAPSHOT_TABLE_BYTES_MAX == 1024 * SNAPSHOTS_MAX as u64);

/// Host offsets are below this: table entries keep bits 9 to 55 of them.
pub const HOST_OFFSET_END: u64 = 1 << 56;

/// Bytes of an L1, L2 or refcount table entry, as a power of two.
const ENTRY_BITS: u32 = 3;

/// Cluster size and refcount width.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Geometry {
    /// log2 of the cluster size, 9 to 21.
    cluster_bits: u32,
    /// log2 of the refcount width in bits, 0 to 6.
    refcount_order: u32,
}

#[expect(
    clippy::arithmetic_side_effects,
    reason = "bounded by the type's invariant: no shift reaches 64, no sum of bits 64"
)]
impl Geometry {
    /// Checks both values.
    ///
    /// # Errors
    ///
    /// [`FormatError::ClusterBits`] or [`FormatError::RefcountOrder`].
    pub const fn new(cluster_bits: u32, refcount_order: u32) -> Result<Self, FormatError> {
        if cluster_bits < CLUSTER_BITS_MIN || cluster_bits > CLUSTER_BITS_MAX {
            return Err(FormatError::ClusterBits {
                found: cluster_bits,
            });
        }
        if refcount_order > REFCOUNT_ORDER_MAX {
            return Err(FormatError::RefcountOrder {
                found: refcount_order,
            });
        }
        Ok(Self {
            cluster_bits,
            refcount_order,
        })
    }

    /// log2 of the cluster size.
    #[must_use]
    #[inline]
    pub const fn cluster_bits(self) -> u32 {
        self.cluster_bits
    }

    /// log2 of the refcount width in bits.
    #[must_use]
    #[inline]
    pub const fn refcount_order(self) -> u32 {
        self.refcount_order
    }

    /// Bytes in a cluster.
    #[must_use]
    #[inline]
    pub const fn cluster_size(self) -> u64 {
        pow2(self.cluster_bits)
    }

    /// log2 of the number of entries in an L2 table.
    #[must_use]
    #[inline]
    pub const fn l2_bits(self) -> u32 {
        self.cluster_bits - ENTRY_BITS
    }

    /// Entries in an L2 table, which fills one cluster. As many fit in a cluster of the L1 or the
    /// refcount table.
    #[must_use]
    #[inline]
    pub const fn l2_entries(self) -> u64 {
        pow2(self.l2_bits())
    }

    /// Bytes of the virtual disk that one L2 table maps.
    #[must_use]
    #[inline]
    pub const fn l2_table_span(self) -> u64 {
        pow2(self.cluster_bits + self.l2_bits())
    }

    /// Width of a refcount.
    #[must_use]
    #[inline]
    pub const fn refcount_bits(self) -> u32 {
        1 << self.refcount_order
    }

    /// Refcounts in a refcount block, which fills one cluster: the clusters that one block covers.
    #[must_use]
    #[inline]
    pub const fn refcount_block_entries(self) -> u64 {
        pow2(self.cluster_bits + 3 - self.refcount_order)
    }

    /// The largest refcount.
    #[must_use]
    #[inline]
    pub const fn refcount_max(self) -> u64 {
        u64::MAX >> (u64::BITS - self.refcount_bits())
    }

    /// Which L1 entry maps `offset`.
    #[must_use]
    #[inline]
    pub const fn l1_index(self, offset: GuestOffset) -> u64 {
        offset.get() >> (self.cluster_bits + self.l2_bits())
    }

    /// Which entry of its L2 table maps `offset`.
    #[must_use]
    #[inline]
    pub const fn l2_index(self, offset: GuestOffset) -> u64 {
        (offset.get() >> self.cluster_bits) & (self.l2_entries() - 1)
    }

    /// Distance of a guest or host offset from the start of its cluster.
    #[must_use]
    #[inline]
    pub const fn offset_in_cluster(self, offset: u64) -> u64 {
        offset & (self.cluster_size() - 1)
    }

    /// Whether a guest or host offset is the start of a cluster.
    #[must_use]
    #[inline]
    pub const fn is_cluster_aligned(self, offset: u64) -> bool {
        self.offset_in_cluster(offset) == 0
    }

    /// The cluster that holds `offset`.
    #[must_use]
    #[inline]
    pub const fn guest_cluster(self, offset: GuestOffset) -> GuestCluster {
        GuestCluster::new(offset.get() >> self.cluster_bits)
    }

    /// The cluster that holds `offset`.
    #[must_use]
    #[inline]
    pub const fn host_cluster(self, offset: HostOffset) -> HostCluster {
        HostCluster::new(offset.get() >> self.cluster_bits)
    }

    /// Where `cluster` starts. It must have come from an offset, or be known to lie in the image.
    #[must_use]
    #[inline]
    pub const fn guest_cluster_offset(self, cluster: GuestCluster) -> GuestOffset {
        debug_assert!(cluster.get() <= u64::MAX >> self.cluster_bits);
        GuestOffset::new(cluster.get() << self.cluster_bits)
    }

    /// Where `cluster` starts. It must have come from an offset, or be known to lie in the image.
    #[must_use]
    #[inline]
    pub const fn host_cluster_offset(self, cluster: HostCluster) -> HostOffset {
        debug_assert!(cluster.get() <= u64::MAX >> self.cluster_bits);
        HostOffset::new(cluster.get() << self.cluster_bits)
    }

    /// Which refcount table entry covers `cluster`.
    #[must_use]
    #[inline]
    pub const fn refcount_table_index(self, cluster: HostCluster) -> u64 {
        cluster.get() >> (self.cluster_bits + 3 - self.refcount_order)
    }

    /// Which refcount of its refcount block belongs to `cluster`.
    #[must_use]
    #[inline]
    pub const fn refcount_block_index(self, cluster: HostCluster) -> u64 {
        cluster.get() & (self.refcount_block_entries() - 1)
    }

    /// L1 entries that a virtual disk of `virtual_size` bytes needs.
    #[must_use]
    pub const fn l1_entries_for(self, virtual_size: u64) -> u64 {
        virtual_size.div_ceil(self.l2_table_span())
    }

    /// Clusters that hold `bytes` bytes.
    #[must_use]
    #[inline]
    pub const fn clusters_for(self, bytes: u64) -> u64 {
        bytes.div_ceil(self.cluster_size())
    }

    /// The start of the cluster that holds `offset`.
    #[must_use]
    #[inline]
    pub const fn cluster_align_down(self, offset: u64) -> u64 {
        offset & !(self.cluster_size() - 1)
    }

    /// The first cluster boundary that is not below `offset`. Traps overflow in debug builds only.
    #[must_use]
    #[inline]
    pub const fn cluster_align_up(self, offset: u64) -> u64 {
        self.cluster_align_down(offset + (self.cluster_size() - 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry(cluster_bits: u32, refcount_order: u32) -> Geometry {
        Geometry::new(cluster_bits, refcount_order).unwrap()
    }

    #[test]
    fn limits_of_both_values_are_inclusive() {
        for (cluster_bits, order, result) in [
            (8, 4, Err(FormatError::ClusterBits { found: 8 })),
            (9, 0, Ok(())),
            (21, 6, Ok(())),
            (22, 4, Err(FormatError::ClusterBits { found: 22 })),
            (
                u32::MAX,
                4,
                Err(FormatError::ClusterBits { found: u32::MAX }),
            ),
            (16, 7, Err(FormatError::RefcountOrder { found: 7 })),
            (
                16,
                u32::MAX,
                Err(FormatError::RefcountOrder { found: u32::MAX }),
            ),
        ] {
            assert_eq!(Geometry::new(cluster_bits, order).map(|_| ()), result);
        }
    }

    #[test]
    fn sizes_follow_from_cluster_bits() {
        for (cluster_bits, cluster_size, l2_entries, l2_table_span) in [
            (9, 512, 64, 32 << 10),
            (12, 4096, 512, 2 << 20),
            (16, 65536, 8192, 512 << 20),
            (21, 2 << 20, 256 << 10, 512 << 30),
        ] {
            let geometry = geometry(cluster_bits, 4);
            assert_eq!(geometry.cluster_size(), cluster_size);
            assert_eq!(geometry.l2_entries(), l2_entries);
            assert_eq!(geometry.l2_table_span(), l2_table_span);
        }
    }

    #[test]
    fn refcount_sizes_follow_from_the_order() {
        for (order, bits, max, entries) in [
            (0, 1, 1, 524_288),
            (1, 2, 3, 262_144),
            (2, 4, 15, 131_072),
            (3, 8, 255, 65_536),
            (4, 16, 65_535, 32_768),
            (5, 32, u64::from(u32::MAX), 16_384),
            (6, 64, u64::MAX, 8192),
        ] {
            let geometry = geometry(16, order);
            assert_eq!(geometry.refcount_bits(), bits);
            assert_eq!(geometry.refcount_max(), max);
            assert_eq!(geometry.refcount_block_entries(), entries);
        }
    }

    #[test]
    fn indices_at_both_sides_of_a_cluster_and_a_table() {
        let geometry = geometry(16, 4);
        for (offset, l1_index, l2_index, in_cluster) in [
            (0, 0, 0, 0),
            (0xffff, 0, 0, 0xffff),
            (0x1_0000, 0, 1, 0),
            (0x1fff_ffff, 0, 8191, 0xffff),
            (0x2000_0000, 1, 0, 0),
            (u64::MAX, u64::MAX >> 29, 8191, 0xffff),
        ] {
            assert_eq!(geometry.l1_index(GuestOffset::new(offset)), l1_index);
            assert_eq!(geometry.l2_index(GuestOffset::new(offset)), l2_index);
            assert_eq!(geometry.offset_in_cluster(offset), in_cluster);
        }
    }

    #[test]
    fn refcount_indices_at_both_sides_of_a_block() {
        let geometry = geometry(16, 4);
        for (cluster, table_index, block_index) in [
            (0, 0, 0),
            (32_767, 0, 32_767),
            (32_768, 1, 0),
            (65_537, 2, 1),
        ] {
            let cluster = HostCluster::new(cluster);
            assert_eq!(geometry.refcount_table_index(cluster), table_index);
            assert_eq!(geometry.refcount_block_index(cluster), block_index);
        }
    }

    #[test]
    fn clusters_and_their_offsets_are_inverse() {
        let geometry = geometry(16, 4);
        let host = HostOffset::new(0x12_3456);
        let guest = GuestOffset::new(0x12_3456);
        let host_start = geometry.host_cluster_offset(geometry.host_cluster(host));
        let guest_start = geometry.guest_cluster_offset(geometry.guest_cluster(guest));
        assert_eq!(host_start, HostOffset::new(0x12_0000));
        assert_eq!(guest_start, GuestOffset::new(0x12_0000));
        assert_eq!(geometry.cluster_align_down(host.get()), 0x12_0000);
        assert_eq!(geometry.cluster_align_up(host.get()), 0x13_0000);
        assert_eq!(geometry.cluster_align_up(0x12_0000), 0x12_0000);
        assert!(geometry.is_cluster_aligned(0x12_0000));
        assert!(!geometry.is_cluster_aligned(0x12_0001));
    }

    #[test]
    fn counts_round_up_and_reach_the_largest_size() {
        let geometry = geometry(16, 4);
        for (bytes, clusters, l1_entries) in [
            (0, 0, 0),
            (1, 1, 1),
            (0x1_0000, 1, 1),
            (0x1_0001, 2, 1),
            (512 << 20, 8192, 1),
            ((512 << 20) + 1, 8193, 2),
            (u64::MAX, 1 << 48, 1 << 35),
        ] {
            assert_eq!(
                geometry.clusters_for(bytes),
                clusters,
                "clusters of {bytes}"
            );
            assert_eq!(
                geometry.l1_entries_for(bytes),
                l1_entries,
                "L1 entries of {bytes}"
            );
        }
    }
}
