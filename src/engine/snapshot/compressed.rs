//! Room in the refcounts of clusters that hold compressed data.
//!
//! A host cluster of compressed data has one reference for each compressed cluster that touches it,
//! and gets as many more with each snapshot. Where refcounts are narrow, that may be more than they
//! hold, and it must be known before the instant: a snapshot that is committed has to be settled.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::walk::Piece;
use super::{Root, Task};
use crate::engine::error::{Error, ErrorKind, lock};
use crate::engine::layer::EntryPlace;
use crate::engine::table::Target;
use crate::engine::worker::Worker;
use crate::format::l2::{Cluster, L2Entry, compressed_host_clusters};
use crate::format::refcount;
use crate::storage::Storage;

/// From this `refcount_order` on (16 bits) the number of snapshots is what limits: QEMU packs no
/// more than 65535 compressed clusters into one host cluster, and hardly ever some hundreds.
const WIDE_ORDER: u32 = 4;

/// References that are to come, by host cluster.
type Coming = BTreeMap<u64, u64>;

impl<S: Storage> Worker<S> {
    /// Refuses `new` more snapshots where a cluster of compressed data has no room for them. Reads
    /// all L2 tables of an image with narrow refcounts, none of others.
    ///
    /// # Errors
    /// `Unsupported`; `Io`/`Corrupt` when a table or a refcount block cannot be read.
    pub(super) async fn check_compressed(&self, target: Target<'_>, new: u64) -> Result<(), Error> {
        let geometry = target.mapping.geometry;
        if geometry.refcount_order() >= WIDE_ORDER {
            return Ok(());
        }
        let mut coming = Coming::new();
        for l1_index in 0..target.mapping.l1.len() {
            self.coming_from_active(target, l1_index, new, &mut coming)
                .await?;
        }
        if coming.is_empty() {
            return Ok(());
        }
        // Snapshots that are not counted yet have had what the active tree has now, and more.
        let unsettled: Vec<Arc<Root>> = {
            let queue = lock(&target.active.snapshots.queue);
            let root = |task: &Task| match task {
                Task::Settle { root, .. } => Some(Arc::clone(root)),
                _ => None,
            };
            let tasks = queue.items.iter().map(|work| &work.task);
            tasks.filter_map(root).collect()
        };
        for root in unsettled {
            self.coming_from_root(target, &root, &mut coming).await?;
        }
        let clusters: Vec<u64> = coming.keys().copied().collect();
        let counts = target
            .active
            .allocator
            .counts_of(&self.storage, &clusters, |count| count)
            .await?;
        let most = refcount::most(geometry.refcount_order());
        let full = coming
            .iter()
            .zip(counts)
            .find(|((_, coming), count)| count.saturating_add(**coming) > most);
        let Some(((cluster, _), _)) = full else {
            return Ok(());
        };
        let bits = 1_u32 << geometry.refcount_order();
        Err(Error::new(
            ErrorKind::Unsupported,
            format!(
                "refcounts of {bits} bits have no room for another snapshot of the compressed data \
                 in host cluster {cluster:#x}; delete a snapshot, or use an image with wider \
                 refcounts"
            ),
        ))
    }

    async fn coming_from_active(
        &self,
        target: Target<'_>,
        l1_index: usize,
        new: u64,
        coming: &mut Coming,
    ) -> Result<(), Error> {
        let mapping = target.mapping;
        // The table stays a table while it is looked at.
        let _pin = self.pin();
        let entry = mapping.l1_entry(l1_index);
        if entry.table_offset().is_none() {
            return Ok(());
        }
        let table = mapping.table(l1_index, entry)?;
        let mut slice_in_table = 0;
        while slice_in_table < mapping.geometry.cluster_size() {
            let place = EntryPlace {
                l1_index,
                slice_in_table,
                index: 0,
            };
            let slice = self.slice(target.layer, mapping, table, &place).await?;
            let entries = (0..slice.body.len()).map(|index| slice.body.entry(index));
            add_compressed(target, entries, new, coming);
            slice_in_table += mapping.slice_bytes();
        }
        Ok(())
    }

    async fn coming_from_root(
        &self,
        target: Target<'_>,
        root: &Root,
        coming: &mut Coming,
    ) -> Result<(), Error> {
        for l1_index in 0..root.l1.len() {
            let Some(table) = u32::try_from(l1_index)
                .ok()
                .and_then(|index| root.table(index))
            else {
                continue;
            };
            let piece = Piece {
                start: table.get(),
                tables: vec![l1_index],
            };
            let (_, bytes) = self.read_tables(target, piece).await?;
            let entries = bytes
                .chunks_exact(8)
                .map(|raw| L2Entry(raw.try_into().map_or(0, u64::from_be_bytes)));
            add_compressed(target, entries, 1, coming);
        }
        Ok(())
    }
}

fn add_compressed(
    target: Target<'_>,
    entries: impl Iterator<Item = L2Entry>,
    times: u64,
    coming: &mut Coming,
) {
    let mapping = target.mapping;
    for entry in entries.filter(|entry| entry.is_compressed()) {
        // What does not decode fails where it is used.
        if let Ok(Cluster::Compressed { host, bytes }) =
            entry.decode(mapping.geometry, mapping.version)
        {
            let touched = compressed_host_clusters(mapping.geometry, host, bytes);
            for cluster in touched.start().get()..=touched.end().get() {
                *coming.entry(cluster).or_default() += times;
            }
        }
    }
}
