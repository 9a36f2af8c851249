//! Giving back: the L1 table of a deleted snapshot, and what unsettled snapshots had kept from being
//! given back.

use super::Root;
use super::walk::Batch;
use crate::engine::allocator::Change;
use crate::engine::error::{Error, lock};
use crate::engine::table::Target;
use crate::engine::worker::Worker;
use crate::storage::Storage;
use crate::units::to_u64;

/// References that were dropped while a snapshot was unsettled, and are taken away now.
#[derive(Debug, Default)]
pub(super) struct Given {
    batch: Batch,
    taken: bool,
    /// The tables that dropped them are durable.
    durable: bool,
}

impl<S: Storage> Worker<S> {
    /// Takes some references away; returns the bytes that it moved, `None` when nothing is left.
    pub(super) async fn give_back_settled(
        &self,
        target: Target<'_>,
        given: &mut Given,
    ) -> Result<Option<u64>, Error> {
        if !given.taken {
            let entries = target.mapping.geometry.refcount_block_entries();
            let mut drops = lock(&target.active.drops).take_settled();
            drops.sort_unstable_by_key(|dropped| dropped.start);
            for dropped in drops {
                let (start, count) = (dropped.start, dropped.count);
                given.batch.push(entries, start, count, dropped.tables);
            }
            given.batch.seal();
            given.taken = true;
        }
        if Self::is_batch_counted(&given.batch) {
            return Ok(None);
        }
        if !given.durable {
            self.flush().await?;
            given.durable = true;
        }
        let change = Change::Lower { tables: false };
        let bytes = self.count_batch(target, &mut given.batch, change).await?;
        Ok(Some(bytes))
    }

    /// The L1 table of a deleted snapshot goes. The file names it no longer.
    pub(super) fn drop_root(&self, target: Target<'_>, root: &Root) {
        let bytes = to_u64(root.l1.len()) * 8;
        let geometry = target.mapping.geometry;
        let start = root.l1_offset >> geometry.cluster_bits();
        self.drop_metadata(target, start, geometry.clusters_for(bytes));
    }
}
