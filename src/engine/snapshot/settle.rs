//! Settling: what is done to the active tree's tables on the way, and the end of it.
//!
//! A frozen table that the active L1 table still names is not ours alone any more, and nor is
//! anything in it: the copied flags go, in the file and in the L1 entry. Cached slices of such a
//! table may keep theirs. Nobody heeds them: the table is not owned, copying it clears them, owning
//! it again decides each anew, and until then those slices are not modified and so never written.

use std::sync::atomic::Ordering;

use super::walk::Piece;
use super::{Root, Snapshots, Task};
use crate::engine::error::{Error, lock};
use crate::engine::table::Target;
use crate::engine::worker::Worker;
use crate::format::l2::L2Entry;
use crate::storage::{AlignedBuf, SgList, Storage};
use crate::units::{HostOffset, to_u64, to_usize};

/// Table bytes that are written back together where one of their flags has changed.
const CHUNK_BYTES: usize = 4096;

impl<S: Storage> Worker<S> {
    /// Clears the copied flags of frozen tables that the active tree has still, in the file. Returns
    /// the bytes that it wrote.
    pub(super) async fn clear_copied_flags(
        &self,
        target: Target<'_>,
        piece: &Piece,
        bytes: &[u8],
    ) -> Result<u64, Error> {
        let cluster_size = target.mapping.geometry.cluster_size();
        let mut written = 0;
        let tables = bytes.chunks_exact(to_usize(cluster_size));
        for ((number, l1_index), table) in (0_u64..).zip(&piece.tables).zip(tables) {
            let start = piece.start + number * cluster_size;
            if !share_table(target, *l1_index, HostOffset::new(start)) {
                continue;
            }
            for (host_offset, chunk) in cleared(start, table) {
                written += to_u64(chunk.len());
                let sg = SgList::from_buf(AlignedBuf::from_slice(&chunk));
                let result = self.storage.write(target.layer.file, host_offset, sg).await;
                result.map_err(|error| {
                    Error::io(format!("cannot write the L2 table at {start:#x}"), error)
                })?;
            }
        }
        Ok(written)
    }

    /// The references of a frozen tree are counted, or never will be.
    pub(super) fn mark_settled(&self, target: Target<'_>, root: &Root, key: u64) {
        lock(&target.active.drops).settle(key);
        target.active.snapshots.show_settled(&root.id);
    }
}

impl Snapshots {
    fn show_settled(&self, id: &str) {
        for snapshot in lock(&self.shown).iter_mut() {
            if snapshot.id == id {
                snapshot.unsettled = false;
            }
        }
    }

    /// All that were there when the image was opened are counted.
    pub(super) fn show_rebuilt(&self) {
        let to_come: Vec<String> = lock(&self.queue)
            .items
            .iter()
            .filter_map(|work| match &work.task {
                Task::Settle { root, .. } => Some(root.id.clone()),
                _ => None,
            })
            .collect();
        for snapshot in lock(&self.shown).iter_mut() {
            snapshot.unsettled &= to_come.contains(&snapshot.id);
        }
    }
}

/// If the active L1 table names this table: takes the copied flag off the entry and says so.
pub(super) fn share_table(target: Target<'_>, l1_index: usize, table: HostOffset) -> bool {
    let mut l1 = lock(&target.active.l1);
    let entry = target.mapping.l1_entry(l1_index);
    if entry.table_offset() != Some(table) {
        return false;
    }
    if entry.copied()
        && let Some(slot) = target.mapping.l1.get(l1_index)
    {
        slot.store(entry.with_copied(false).0, Ordering::Release);
        l1.modified.push(l1_index);
    }
    true
}

/// The parts of a table with copied flags, without them.
pub(super) fn cleared(start: u64, table: &[u8]) -> Vec<(u64, Vec<u8>)> {
    let mut parts: Vec<(u64, Vec<u8>)> = Vec::new();
    for (at, chunk) in (start..)
        .step_by(CHUNK_BYTES)
        .zip(table.chunks(CHUNK_BYTES))
    {
        let entries = || {
            chunk
                .chunks_exact(8)
                .map(|entry| L2Entry(entry.try_into().map_or(0, u64::from_be_bytes)))
        };
        if !entries().any(|entry| entry.copied()) {
            continue;
        }
        // Also where the flag means nothing (a compressed entry): it must not be there.
        let bytes = entries().flat_map(|entry| entry.with_copied(false).0.to_be_bytes());
        match parts.last_mut() {
            Some((last, sum)) if *last + to_u64(sum.len()) == at => sum.extend(bytes),
            _ => parts.push((at, bytes.collect())),
        }
    }
    parts
}
