//! L1 tables: the active one, and what an entry of any of them names.

use super::role::Role;
use super::tables::TableUse;
use super::{OFFSET, Surveyor};
use crate::format::L1Entry;
use crate::format::l1::COPIED;
use crate::storage::Storage;
use crate::units::HostOffset;

impl<S: Storage> Surveyor<'_, S> {
    /// Walks the active L1 table.
    pub(super) async fn active_l1(&mut self) {
        let (offset, entries) = (self.layout.l1_offset, self.layout.l1_entries);
        if !self.metadata(offset, entries * 8, 1, Role::ActiveL1) {
            self.out.references_trusted = false;
        }
        let Some(table) = self.read(offset, entries * 8, "the active L1 table").await else {
            return;
        };
        for (index, raw) in table.as_chunks::<8>().0.iter().enumerate() {
            let found = u64::from_be_bytes(*raw);
            let entry = L1Entry(self.l1_at_open.get(index).copied().unwrap_or(found));
            self.l1_entry(index, entry, 1, 1);
            if let Some(offset) = entry.table_offset() {
                let cluster = self.geometry.host_cluster(offset).get();
                if self.singles.contains(cluster) != entry.copied() {
                    self.wrong_flag(cluster, 1, || {
                        format!("L1 entry {index} {:#018x}: copied flag is wrong", entry.0)
                    });
                }
            }
        }
    }

    /// Counts what one L1 entry names; `active` is how many of the `total` L1 tables are the active
    /// one.
    pub(super) fn l1_entry(&mut self, index: usize, entry: L1Entry, total: u64, active: u64) {
        if entry.0 & !(COPIED | OFFSET) != 0 {
            self.corruption(total, || {
                format!("L1 entry {index} {:#018x} has reserved bits set", entry.0)
            });
        }
        let Some(offset) = entry.table_offset().map(HostOffset::get) else {
            // Harmless when read, but QEMU's check takes it for a table at offset 0.
            if entry.copied() {
                self.out.flag_errors += active;
                self.corruption(total, || {
                    format!("L1 entry {index} has only the copied flag")
                });
            }
            return;
        };
        let inside = self.count(offset, self.geometry.cluster_size(), total, "L2 table");
        if !inside {
            self.out.references_trusted = false;
        }
        if !self.geometry.is_cluster_aligned(offset) {
            self.out.references_trusted = false;
            self.corruption(total, || {
                format!(
                    "L1 entry {index} {:#018x} is not aligned to a cluster",
                    entry.0
                )
            });
            return;
        }
        if !inside {
            return;
        }
        self.found_tables.add(TableUse {
            cluster: small(self.geometry.host_cluster(HostOffset::new(offset)).get()),
            active: small(active),
            total,
        });
    }
}

/// A number that fits 32 bits: a cluster that is counted, or a number of L1 entries.
fn small(number: u64) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}
