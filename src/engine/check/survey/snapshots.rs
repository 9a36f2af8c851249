//! Internal snapshots: their table, and the L1 table of each.

use std::collections::HashMap;

use super::Surveyor;
use super::role::Role;
use crate::engine::error::Error;
use crate::format::geometry::L1_BYTES_MAX;
use crate::format::{L1Entry, SnapshotEntry};
use crate::storage::Storage;
use crate::units::{to_u64, to_usize};

/// Bytes of a snapshot table entry before what varies.
const SNAPSHOT_FIXED_BYTES: u64 = 40;

impl<S: Storage> Surveyor<'_, S> {
    /// Reads the snapshot table and walks the L1 table of each internal snapshot.
    pub(super) async fn snapshots(&mut self) -> Result<(), Error> {
        if self.layout.snapshot_count == 0 {
            return Ok(());
        }
        let offset = self.layout.snapshot_table_offset;
        let entries = match self.source.snapshots(self.layout).await? {
            Ok(entries) => entries,
            Err(error) => {
                self.out.references_trusted = false;
                self.corruption(1, || format!("snapshot table at {offset:#x}: {error}"));
                return Ok(());
            }
        };
        // Several snapshots may share one L1 table, in a hostile image all of them a large one.
        let mut l1_tables: HashMap<(u64, u64), u64> = HashMap::new();
        let mut bytes = 0;
        for entry in &entries {
            bytes = to_u64(to_usize(bytes).next_multiple_of(8)) + SNAPSHOT_FIXED_BYTES;
            bytes += to_u64(entry.extra.len() + entry.id.len() + entry.name.len());
            if !entry.is_complete(self.layout.version) {
                self.out.incomplete_snapshots += 1;
                self.corruption(1, || {
                    format!("{}: table entry is incomplete", name_of(entry))
                });
            }
            let (l1_offset, l1_bytes) = (entry.l1_offset.get(), u64::from(entry.l1_size) * 8);
            let problem = if !self.geometry.is_cluster_aligned(l1_offset) {
                Some("L1 table is not aligned to a cluster")
            } else if l1_bytes > L1_BYTES_MAX {
                Some("L1 table is too large")
            } else {
                None
            };
            if let Some(problem) = problem {
                self.out.references_trusted = false;
                self.corruption(1, || format!("{}: {problem}", name_of(entry)));
                continue;
            }
            *l1_tables.entry((l1_offset, l1_bytes)).or_insert(0) += 1;
        }
        let mut l1_tables: Vec<_> = l1_tables.into_iter().collect();
        l1_tables.sort_unstable();
        for ((l1_offset, l1_bytes), times) in l1_tables {
            if !self.metadata(l1_offset, l1_bytes, times, Role::SnapshotL1) {
                self.out.references_trusted = false;
                continue;
            }
            let Some(table) = self
                .read(l1_offset, l1_bytes, "a snapshot's L1 table")
                .await
            else {
                continue;
            };
            for (index, raw) in table.as_chunks::<8>().0.iter().enumerate() {
                self.l1_entry(index, L1Entry(u64::from_be_bytes(*raw)), times, 0);
            }
        }
        if !self.metadata(offset, bytes, 1, Role::SnapshotTable) {
            self.out.references_trusted = false;
        }
        Ok(())
    }
}

/// What to call a snapshot.
fn name_of(entry: &SnapshotEntry) -> String {
    format!("snapshot {}", String::from_utf8_lossy(&entry.id))
}
