//! Persistent bitmaps: their directory, their tables and their data.

use super::role::Role;
use super::{OFFSET, Surveyor};
use crate::storage::Storage;
use crate::units::to_usize;

impl<S: Storage> Surveyor<'_, S> {
    /// Counts persistent bitmaps, if the autoclear bit says that they are in force.
    pub(super) async fn bitmaps(&mut self) {
        let Some(bitmaps) = self.layout.bitmaps else {
            return;
        };
        if !self.metadata(bitmaps.offset, bitmaps.bytes, 1, Role::Bitmaps) {
            self.out.references_trusted = false;
            return;
        }
        let Some(directory) = self
            .read(bitmaps.offset, bitmaps.bytes, "the bitmap directory")
            .await
        else {
            return;
        };
        let mut rest: &[u8] = &directory;
        for _ in 0..bitmaps.count {
            let Some(entry) = BitmapEntry::decode(rest) else {
                self.out.references_trusted = false;
                self.corruption(1, || "bitmap directory is cut short or invalid".to_owned());
                return;
            };
            rest = rest.get(entry.bytes..).unwrap_or_default();
            self.bitmap(entry).await;
        }
    }

    /// Counts the table and data of one bitmap.
    async fn bitmap(&mut self, entry: BitmapEntry) {
        let bytes = entry.table_entries * 8;
        let valid = self.geometry.is_cluster_aligned(entry.table_offset)
            && bytes <= BitmapEntry::TABLE_BYTES_MAX;
        if !valid {
            self.out.references_trusted = false;
            self.corruption(1, || "bitmap table is unaligned or too large".to_owned());
            return;
        }
        if !self.metadata(entry.table_offset, bytes, 1, Role::Bitmaps) {
            self.out.references_trusted = false;
            return;
        }
        let Some(table) = self.read(entry.table_offset, bytes, "a bitmap table").await else {
            return;
        };
        for raw in table.as_chunks::<8>().0 {
            let word = u64::from_be_bytes(*raw);
            let offset = word & OFFSET;
            let reserved = word & !(OFFSET | 1) != 0 || (offset != 0 && word & 1 != 0);
            if reserved || !self.geometry.is_cluster_aligned(offset) {
                self.out.references_trusted = false;
                self.corruption(1, || format!("bitmap table entry {word:#018x} is invalid"));
            } else if offset != 0
                && !self.metadata(offset, self.geometry.cluster_size(), 1, Role::Bitmaps)
            {
                self.out.references_trusted = false;
            }
        }
    }
}

/// The fixed part of a bitmap directory entry that a check needs.
#[derive(Clone, Copy)]
struct BitmapEntry {
    /// Where the bitmap table is.
    table_offset: u64,
    /// Entries of it.
    table_entries: u64,
    /// Length of this entry with its padding.
    bytes: usize,
}

impl BitmapEntry {
    /// Length of the fixed part.
    const FIXED_BYTES: u64 = 24;

    /// Longest bitmap table, QEMU's limit: 8 Mi entries.
    const TABLE_BYTES_MAX: u64 = 64 << 20;

    /// Reads an entry at the start of `bytes`; `None` if it does not fit in there.
    fn decode(bytes: &[u8]) -> Option<Self> {
        let fixed = bytes.first_chunk::<24>()?;
        let field = |range: std::ops::Range<usize>| {
            fixed[range]
                .iter()
                .fold(0, |value, byte| value << 8 | u64::from(*byte))
        };
        let length = Self::FIXED_BYTES + field(18..20) + field(20..24);
        let entry = Self {
            table_offset: field(0..8),
            table_entries: field(8..12),
            bytes: to_usize(length.next_multiple_of(8)),
        };
        (entry.bytes <= bytes.len()).then_some(entry)
    }
}
