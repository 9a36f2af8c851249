//! virtio-blk configuration space and feature bits: what the device says about itself.
//!
//! Owns the layout of `virtio_blk_config`, the offered features, and what the driver's answers mean
//! (write-back or write-through). Never offers what is not there.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX,
    VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};

use super::request::{SECTOR_SIZE, SEGMENT_SECTORS_MAX, SEGMENTS_MAX};

/// vhost: the dirty log can be switched on.
const VHOST_F_LOG_ALL: u64 = 26;
/// The largest configuration space that vhost-user can ask for.
const CONFIG_SPACE_SIZE: usize = 256;
/// Data segments of a request. A ring of 128, which QEMU offers by default, holds them with header
/// and status.
const SEGMENT_COUNT_MAX: u32 = 128 - 2;
/// Bytes of one data segment.
const SEGMENT_SIZE_MAX: u32 = 1 << 20;
/// Physical block size told to the guest: what host file systems write without reading.
const PHYSICAL_BLOCK: u64 = 4096;

/// Byte offsets in `virtio_blk_config` (VIRTIO 1.2, 5.2.4).
mod field {
    pub(super) const CAPACITY: usize = 0;
    pub(super) const SIZE_MAX: usize = 8;
    pub(super) const SEG_MAX: usize = 12;
    pub(super) const BLK_SIZE: usize = 20;
    pub(super) const PHYSICAL_BLOCK_EXP: usize = 24;
    pub(super) const MIN_IO_SIZE: usize = 26;
    pub(super) const WRITEBACK: usize = 32;
    pub(super) const NUM_QUEUES: usize = 34;
    pub(super) const MAX_DISCARD_SECTORS: usize = 36;
    pub(super) const MAX_DISCARD_SEG: usize = 40;
    pub(super) const DISCARD_SECTOR_ALIGNMENT: usize = 44;
    pub(super) const MAX_WRITE_ZEROES_SECTORS: usize = 48;
    pub(super) const MAX_WRITE_ZEROES_SEG: usize = 52;
    pub(super) const WRITE_ZEROES_MAY_UNMAP: usize = 56;
}

/// Facts about the disk that the configuration space shows, and that stay.
#[derive(Clone, Copy, Debug)]
pub(super) struct Geometry {
    /// Logical block size in bytes: a power of two from 512 on.
    pub(super) block_size: u32,
    pub(super) cluster_size: u64,
    pub(super) queue_count: u16,
    pub(super) read_only: bool,
}

/// The device's side of the negotiation.
#[derive(Debug)]
pub(super) struct ConfigSpace {
    geometry: Geometry,
    /// Size of the disk. Changes only while no front-end is connected: none has read another one.
    sector_count: AtomicU64,
    /// The `writeback` field at start and after a reset.
    writeback_default: bool,
    /// The `writeback` field: read by workers for each write, written by the control thread.
    writeback: AtomicBool,
    /// Features that the driver accepted.
    accepted: AtomicU64,
}

fn bit(number: u32) -> u64 {
    1 << number
}

impl ConfigSpace {
    pub(super) fn new(sector_count: u64, geometry: Geometry, writeback: bool) -> Self {
        Self {
            geometry,
            sector_count: AtomicU64::new(sector_count),
            writeback_default: writeback,
            writeback: AtomicBool::new(writeback),
            accepted: AtomicU64::new(0),
        }
    }

    /// virtio and vhost feature bits on offer.
    pub(super) fn features(&self) -> u64 {
        let mut features = bit(VIRTIO_F_VERSION_1)
            | bit(VIRTIO_RING_F_INDIRECT_DESC)
            | bit(VIRTIO_RING_F_EVENT_IDX)
            | 1 << VHOST_F_LOG_ALL
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
            | bit(VIRTIO_BLK_F_SIZE_MAX)
            | bit(VIRTIO_BLK_F_SEG_MAX)
            | bit(VIRTIO_BLK_F_BLK_SIZE)
            | bit(VIRTIO_BLK_F_FLUSH)
            | bit(VIRTIO_BLK_F_TOPOLOGY)
            | bit(VIRTIO_BLK_F_CONFIG_WCE)
            | bit(VIRTIO_BLK_F_MQ);
        features |= if self.geometry.read_only {
            bit(VIRTIO_BLK_F_RO)
        } else {
            bit(VIRTIO_BLK_F_DISCARD) | bit(VIRTIO_BLK_F_WRITE_ZEROES)
        };
        features
    }

    /// vhost-user protocol features on offer.
    pub(super) fn protocol_features() -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::LOG_SHMFD
    }

    pub(super) fn accept(&self, features: u64) {
        self.accepted.store(features, Ordering::Release);
    }

    /// Gives the disk another size. Only while no front-end is connected.
    pub(super) fn set_sector_count(&self, sector_count: u64) {
        self.sector_count.store(sector_count, Ordering::Release);
    }

    /// Back to the state before any driver.
    pub(super) fn reset(&self) {
        self.accepted.store(0, Ordering::Release);
        self.writeback
            .store(self.writeback_default, Ordering::Release);
    }

    /// True if each write must be durable before it completes: the driver cannot flush, or has
    /// switched the write cache off.
    pub(super) fn is_write_through(&self) -> bool {
        let accepted = self.accepted.load(Ordering::Acquire);
        accepted & bit(VIRTIO_BLK_F_FLUSH) == 0 || !self.writeback.load(Ordering::Acquire)
    }

    /// The bytes of a part of the configuration space; `None` if it is not inside of it.
    pub(super) fn read(&self, offset: u32, size: u32) -> Option<Vec<u8>> {
        let start = usize::try_from(offset).ok()?;
        let end = start.checked_add(usize::try_from(size).ok()?)?;
        self.bytes().get(start..end).map(<[u8]>::to_vec)
    }

    /// A driver's write. Only the cache mode can be written; true if that is what was asked for.
    pub(super) fn write(&self, offset: u32, bytes: &[u8]) -> bool {
        match (usize::try_from(offset), bytes) {
            (Ok(field::WRITEBACK), &[value]) => {
                self.writeback.store(value != 0, Ordering::Release);
                true
            }
            _ => false,
        }
    }

    fn bytes(&self) -> [u8; CONFIG_SPACE_SIZE] {
        let geometry = &self.geometry;
        let block_size = u64::from(geometry.block_size);
        let physical = PHYSICAL_BLOCK.max(block_size);
        let alignment = geometry.cluster_size.max(block_size) / SECTOR_SIZE;

        let mut config = [0; CONFIG_SPACE_SIZE];
        let mut put = |offset: usize, bytes: &[u8]| {
            config[offset..offset + bytes.len()].copy_from_slice(bytes);
        };
        let sector_count = self.sector_count.load(Ordering::Acquire);
        put(field::CAPACITY, &sector_count.to_le_bytes());
        put(field::SIZE_MAX, &SEGMENT_SIZE_MAX.to_le_bytes());
        put(field::SEG_MAX, &SEGMENT_COUNT_MAX.to_le_bytes());
        put(field::BLK_SIZE, &geometry.block_size.to_le_bytes());
        let exponent = (physical / block_size).ilog2();
        put(
            field::PHYSICAL_BLOCK_EXP,
            &[u8::try_from(exponent).unwrap_or(0)],
        );
        let min_io_blocks = u16::try_from(physical / block_size).unwrap_or(1);
        put(field::MIN_IO_SIZE, &min_io_blocks.to_le_bytes());
        put(
            field::WRITEBACK,
            &[u8::from(self.writeback.load(Ordering::Acquire))],
        );
        put(field::NUM_QUEUES, &geometry.queue_count.to_le_bytes());
        if !geometry.read_only {
            let alignment = u32::try_from(alignment).unwrap_or(1);
            put(
                field::MAX_DISCARD_SECTORS,
                &SEGMENT_SECTORS_MAX.to_le_bytes(),
            );
            put(field::MAX_DISCARD_SEG, &SEGMENTS_MAX.to_le_bytes());
            put(field::DISCARD_SECTOR_ALIGNMENT, &alignment.to_le_bytes());
            put(
                field::MAX_WRITE_ZEROES_SECTORS,
                &SEGMENT_SECTORS_MAX.to_le_bytes(),
            );
            put(field::MAX_WRITE_ZEROES_SEG, &SEGMENTS_MAX.to_le_bytes());
            put(field::WRITE_ZEROES_MAY_UNMAP, &[1]);
        }
        config
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> ConfigSpace {
        ConfigSpace::new(
            0x1122_3344,
            Geometry {
                block_size: 512,
                cluster_size: 65536,
                queue_count: 16,
                read_only: false,
            },
            true,
        )
    }

    fn word(space: &ConfigSpace, offset: u32) -> u32 {
        let bytes = space.read(offset, 4).unwrap();
        u32::from_le_bytes(bytes.try_into().unwrap())
    }

    #[test]
    fn fields_are_where_virtio_says() {
        let space = space();
        assert_eq!(space.read(0, 8).unwrap(), 0x1122_3344_u64.to_le_bytes());
        assert_eq!(word(&space, 12), 126);
        assert_eq!(word(&space, 20), 512);
        assert_eq!(space.read(24, 4).unwrap(), [3, 0, 8, 0]);
        assert_eq!(space.read(32, 4).unwrap(), [1, 0, 16, 0]);
        assert_eq!(word(&space, 40), 64);
        assert_eq!(word(&space, 44), 128);
        assert_eq!(space.read(56, 1).unwrap(), [1]);
    }

    #[test]
    fn a_part_may_be_read_up_to_the_end_of_the_space() {
        let space = space();
        assert_eq!(space.read(252, 4).map(|bytes| bytes.len()), Some(4));
        assert_eq!(space.read(253, 4), None);
        assert_eq!(space.read(u32::MAX, u32::MAX), None);
    }

    #[test]
    fn only_the_cache_mode_can_be_written() {
        let space = space();
        assert!(!space.write(0, &[0; 8]));
        assert!(!space.write(32, &[0, 0]));
        assert!(space.write(32, &[0]));
        assert_eq!(space.read(32, 1).unwrap(), [0]);
        assert_eq!(space.read(0, 4).unwrap(), [0x44, 0x33, 0x22, 0x11]);
    }

    #[test]
    fn writes_go_through_without_flush_or_with_the_cache_off() {
        let space = space();
        assert!(space.is_write_through());
        space.accept(space.features());
        assert!(!space.is_write_through());
        space.write(32, &[0]);
        assert!(space.is_write_through());
        space.reset();
        space.accept(space.features());
        assert!(!space.is_write_through());
    }

    #[test]
    fn a_read_only_disk_offers_neither_discard_nor_write_zeroes() {
        let mut geometry = space().geometry;
        geometry.read_only = true;
        let features = ConfigSpace::new(8, geometry, true).features();
        assert_eq!(features & (1 << 13 | 1 << 14), 0);
        assert_ne!(features & 1 << 5, 0);
    }
}
