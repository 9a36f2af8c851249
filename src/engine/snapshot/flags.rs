//! Copied flags in the file that a crash has left where they must not be.
//!
//! An image that was not closed in order may have them in tables that it shares with snapshots, and
//! in L1 entries that name such tables. In memory nobody heeds them: no table of that time is owned.
//! In the file they must be gone before the dirty bit is. Tables that are not shared are decided entry
//! by entry when they become ours again (see `reown`).

use std::sync::atomic::Ordering;

use super::settle::{cleared, share_table};
use crate::engine::error::{Error, lock};
use crate::engine::table::Target;
use crate::engine::worker::Worker;
use crate::format::l1::L1Entry;
use crate::storage::{AlignedBuf, SgList, Storage};
use crate::units::{HostOffset, to_u64, to_usize};

/// L1 entries that are looked at together.
const ENTRIES_AT_ONCE: usize = 4096;
/// Bytes of tables that one step reads (at least one table).
const BYTES_AT_ONCE: u64 = 1 << 20;

/// How far the tables of the active tree are looked at.
#[derive(Debug, Default)]
pub(super) struct Flags {
    /// The next L1 index.
    next: usize,
    /// Shared tables among those before, in descending order of their place: host offset, L1 index.
    shared: Vec<(u64, usize)>,
}

impl<S: Storage> Worker<S> {
    /// Takes the copied flags off L1 entries that are as they were at open. Those of tables that are
    /// ours alone get theirs back.
    pub(super) fn forget_flags(&self, target: Target<'_>, l1_at_open: &[u64]) {
        let mapping = target.mapping;
        let mut l1 = lock(&target.active.l1);
        for (index, raw) in l1_at_open.iter().enumerate() {
            let entry = L1Entry(*raw);
            if entry.copied()
                && mapping.l1_entry(index) == entry
                && let Some(slot) = mapping.l1.get(index)
            {
                slot.store(entry.with_copied(false).0, Ordering::Release);
                l1.modified.push(index);
            }
        }
    }

    /// Clears the copied flags of some shared tables, in the file. Returns the bytes that it moved,
    /// `None` when there are no more.
    pub(super) async fn clear_shared_flags(
        &self,
        target: Target<'_>,
        flags: &mut Flags,
    ) -> Result<Option<u64>, Error> {
        let mapping = target.mapping;
        let cluster_size = mapping.geometry.cluster_size();
        if flags.shared.is_empty() {
            if flags.next >= mapping.l1.len() {
                return Ok(None);
            }
            let end = (flags.next + ENTRIES_AT_ONCE).min(mapping.l1.len());
            flags.shared = self.shared_tables(target, flags.next..end).await?;
            flags.next = end;
        }
        let mut moved = 0;
        while moved < BYTES_AT_ONCE
            && let Some((start, l1_index)) = flags.shared.last().copied()
        {
            moved += cluster_size;
            let (read, table) = self
                .storage
                .read_buf(
                    target.layer.file,
                    start,
                    AlignedBuf::zeroed(to_usize(cluster_size)),
                )
                .await;
            let fault = |error| Error::io(format!("cannot mend the L2 table at {start:#x}"), error);
            read.map_err(fault)?;
            if share_table(target, l1_index, HostOffset::new(start)) {
                for (host_offset, chunk) in cleared(start, &table) {
                    moved += to_u64(chunk.len());
                    let sg = SgList::from_buf(AlignedBuf::from_slice(&chunk));
                    let written = self.storage.write(target.layer.file, host_offset, sg).await;
                    written.map_err(fault)?;
                }
            }
            flags.shared.pop();
        }
        Ok(Some(moved))
    }

    /// The tables that more than the active tree refers to.
    async fn shared_tables(
        &self,
        target: Target<'_>,
        indices: std::ops::Range<usize>,
    ) -> Result<Vec<(u64, usize)>, Error> {
        let mapping = target.mapping;
        let mut tables: Vec<(u64, usize)> = Vec::new();
        for index in indices {
            let entry = mapping.l1_entry(index);
            if entry.table_offset().is_some() {
                tables.push((mapping.table(index, entry)?.get(), index));
            }
        }
        tables.sort_unstable();
        let clusters: Vec<u64> = tables
            .iter()
            .map(|(table, _)| table >> mapping.geometry.cluster_bits())
            .collect();
        let shared = target
            .active
            .allocator
            .counts_of(&self.storage, &clusters, |count| count > 1)
            .await?;
        let mut tables: Vec<_> = tables
            .into_iter()
            .zip(shared)
            .filter(|(_, shared)| *shared)
            .map(|(table, _)| table)
            .collect();
        tables.reverse();
        Ok(tables)
    }
}
