//! Settling: what is done to the active tree's tables on the way, and the end of it.
//!
//! A frozen table that the active L1 table still names is not ours alone any more, and nor is
//! anything in it: the copied flags go, in the file and in the L1 entry. Cached slices of such a
//! table may keep theirs. Nobody heeds them: the table is not owned, copying it clears them, owning
//! it again decides each anew, and until then those slices are not modified and so never written.

use std::sync::atomic::Ordering;

use futures_util::stream::{self, StreamExt};

use super::{Root, Snapshots, Task};
use crate::engine::error::{Error, lock};
use crate::engine::table::Target;
use crate::engine::worker::Worker;
use crate::format::l2::L2Entry;
use crate::storage::{AlignedBuf, SgList, Storage};
use crate::units::{HostOffset, to_u64, to_usize};

/// Table bytes that are written back together where one of their flags has changed.
const CHUNK_BYTES: usize = 4096;
/// Modified L1 entries that wait for a flush, at most: more of them only where clusters are small. Few in
/// tests.
const L1_MODIFIED_MAX: usize = if cfg!(test) { 8 } else { 1 << 15 };
/// Tables that are written at a time.
const WRITES_IN_FLIGHT: usize = 16;

impl<S: Storage> Worker<S> {
    /// Clears the copied flags of frozen tables that the active tree has still, in the file. Each comes
    /// as host offset and L1 index, `bytes` has their content. Returns the bytes that it wrote.
    pub(super) async fn clear_copied_flags(
        &self,
        target: Target<'_>,
        tables: &[(u64, usize)],
        bytes: &[u8],
    ) -> Result<u64, Error> {
        let cluster_size = target.mapping.geometry.cluster_size();
        let mut writes = stream::iter(tables)
            .zip(stream::iter(bytes.chunks_exact(to_usize(cluster_size))))
            .map(|((start, l1_index), table)| async move {
                if share_table(target, *l1_index, HostOffset::new(*start)) {
                    self.write_cleared(target, *start, table).await
                } else {
                    Ok(0)
                }
            })
            .buffer_unordered(WRITES_IN_FLIGHT);
        let mut written = Ok(0);
        // To the end also after an error: none is left in flight.
        while let Some(result) = writes.next().await {
            written = written.and_then(|sum| result.map(|bytes| sum + bytes));
        }
        written
    }

    /// Writes L1 entries that the background work has changed, where they are many: each costs memory
    /// until then, and again when it is written.
    pub(super) async fn flush_many_l1_entries(&self, target: Target<'_>) -> Result<(), Error> {
        let modified = lock(&target.active.l1).modified.len();
        if modified > L1_MODIFIED_MAX {
            self.flush().await?;
        }
        Ok(())
    }

    /// Writes those parts of a table that have copied flags, without them; returns how many bytes.
    async fn write_cleared(
        &self,
        target: Target<'_>,
        start: u64,
        table: &[u8],
    ) -> Result<u64, Error> {
        let mut written = 0;
        for (host_offset, chunk) in cleared(start, table) {
            written += to_u64(chunk.len());
            let sg = SgList::from_buf(AlignedBuf::from_slice(&chunk));
            let result = self.storage.write(target.layer.file, host_offset, sg).await;
            result.map_err(|error| {
                Error::io(format!("cannot write the L2 table at {start:#x}"), error)
            })?;
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
fn share_table(target: Target<'_>, l1_index: usize, table: HostOffset) -> bool {
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
fn cleared(start: u64, table: &[u8]) -> Vec<(u64, Vec<u8>)> {
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
