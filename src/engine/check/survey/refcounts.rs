//! The refcount structure: what it says, and the clusters that it is in.

use super::Surveyor;
use super::role::Role;
use crate::engine::check::count::CLUSTERS_MAX;
use crate::engine::check::{Phase, Progress};
use crate::engine::error::Error;
use crate::format::{RefcountTableEntry, refcount};
use crate::storage::{AlignedBuf, Storage};
use crate::units::{HostOffset, to_u64, to_usize};

impl<S: Storage> Surveyor<'_, S> {
    /// Reads the refcount table.
    pub(super) async fn load_reftable(&mut self) -> Result<(), Error> {
        let bytes = self.layout.reftable_clusters * self.geometry.cluster_size();
        let (result, table) = self
            .source
            .read(
                self.layout.reftable_offset,
                AlignedBuf::zeroed(to_usize(bytes)),
            )
            .await;
        result.map_err(|error| Error::io("cannot read the refcount table", error))?;
        self.out.reftable = table
            .as_chunks::<8>()
            .0
            .iter()
            .map(|raw| RefcountTableEntry(u64::from_be_bytes(*raw)))
            .collect();
        Ok(())
    }

    /// Reads the refcounts and notes which clusters have a refcount of one.
    pub(super) async fn load_refcounts(
        &mut self,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<(), Error> {
        self.load_reftable().await?;
        let order = self.geometry.refcount_order();
        let per_block = self.geometry.refcount_block_entries();
        let mut block = AlignedBuf::zeroed(to_usize(self.geometry.cluster_size()));
        let total = to_u64(self.out.reftable.len());
        for index in 0..self.out.reftable.len() {
            let first = to_u64(index) * per_block;
            if first >= CLUSTERS_MAX {
                break;
            }
            let end = per_block.min(CLUSTERS_MAX - first);
            let Some(offset) = self.out.reftable[index].block_offset().map(HostOffset::get) else {
                continue;
            };
            // What is wrong here is reported when the refcounts are compared.
            if !self.geometry.is_cluster_aligned(offset) {
                self.unknown.push(first..first + end);
                continue;
            }
            if offset >= self.source.len {
                continue;
            }
            let (result, back) = self.source.read(offset, block).await;
            block = back;
            if result.is_err() {
                self.unknown.push(first..first + end);
                continue;
            }
            let singles = &mut self.singles;
            each_refcount(&block, order, end, |place, count| {
                if count == 1 {
                    singles.insert(first + place);
                }
            });
            progress(Progress {
                phase: Phase::Refcounts,
                done: to_u64(index) + 1,
                total,
            });
        }
        Ok(())
    }

    /// Counts the refcount table and its blocks, last, so that what else uses their clusters shows.
    pub(super) fn refcount_structure(&mut self) {
        let cluster_size = self.geometry.cluster_size();
        let (offset, clusters) = (self.layout.reftable_offset, self.layout.reftable_clusters);
        if self.metadata(offset, clusters * cluster_size, 1, Role::Refcounts) {
            let first = offset / cluster_size;
            self.out.refcount_clusters.extend(first..first + clusters);
        } else {
            self.out.rebuild_needed = true;
        }
        for index in 0..self.out.reftable.len() {
            let entry = self.out.reftable[index];
            if entry.0 == 0 {
                continue;
            }
            let offset = entry.0 & !0x1ff;
            if entry.0 != offset {
                self.corruption(1, || {
                    format!(
                        "refcount table entry {index} {:#018x} has reserved bits set",
                        entry.0
                    )
                });
            } else if !self.geometry.is_cluster_aligned(offset) {
                self.corruption(1, || {
                    format!(
                        "refcount table entry {index} {:#018x} is not aligned",
                        entry.0
                    )
                });
            } else if offset >= self.source.len {
                self.corruption(1, || {
                    format!("refcount block {index} at {offset:#x} is outside the file")
                });
            } else if self.metadata(offset, cluster_size, 1, Role::Refcounts) {
                let cluster = offset / cluster_size;
                self.out.refcount_clusters.push(cluster);
                let references = self.out.refs.get(cluster);
                if references == 1 || !self.out.refs.window().contains(&cluster) {
                    continue;
                }
                self.corruption(1, || {
                    format!("refcount block {index} at {offset:#x} has {references} references")
                });
            }
            self.out.rebuild_needed = true;
        }
        if self
            .out
            .refcount_clusters
            .iter()
            .any(|cluster| self.out.refs.get(*cluster) != 1)
        {
            self.out.rebuild_needed = true;
        }
    }
}

/// Calls `visit` with the place and value of the first `end` refcounts of a block.
fn each_refcount(block: &[u8], order: u32, end: u64, mut visit: impl FnMut(u64, u64)) {
    if order == 4 {
        for (place, raw) in (0..end).zip(block.as_chunks::<2>().0) {
            visit(place, u64::from(u16::from_be_bytes(*raw)));
        }
    } else {
        for place in 0..end {
            visit(place, refcount::get(block, order, to_usize(place)));
        }
    }
}
